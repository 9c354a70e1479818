"""Networks whose measures are hard to get right: each is measured rightly, or refused."""

import collections
import copy
import itertools
import random
import re
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from explicit import Explicit, network
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

from paperlib import flatness

torch.set_num_threads(1)

IMAGES = torch.randn(12, 1, 5, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(12) % 3


class Net(nn.Module):
    """A small network with `use` between its two layers, and `wrap` around its output."""

    def __init__(self, use=lambda h: h, wrap=lambda out: out):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.dense = nn.Conv2d(1, 2, 3), nn.Linear(18, 3)
        self.use, self.wrap = use, wrap

    def forward(self, x):
        return self.wrap(self.dense(self.use(self.conv(x)).tanh().flatten(1)))


def check(model, expected=None, held=None, images=IMAGES):
    """Compare the measures with explicit derivatives, those of `expected` if it is given."""
    exact = Explicit(expected or model, images, LABELS, held)
    values, vectors = flatness.hessian_spectrum(model, images, LABELS, 3, held)
    assert values.tolist() == pytest.approx(exact.eigenvalues(3).tolist(), rel=1e-3, abs=1e-6)
    noise = flatness.gradient_covariance_trace(model, images, LABELS, held)
    assert noise == pytest.approx(exact.trace(), rel=1e-4)
    losses, _ = flatness.sharpness(model, images, LABELS, vectors[:1], [0.0, 0.01], held)
    moved = [float(exact.loss(exact.flat + eps * vectors[0])) for eps in (0.0, 0.01)]
    assert losses[0].tolist() == pytest.approx(moved, rel=1e-5)


def check_refused(model, count, named):
    """The first `count` measures refuse the network."""
    size = sum(p.numel() for p in model.parameters())
    measures = (
        lambda: flatness.hessian_spectrum(model, IMAGES, LABELS, 2),
        lambda: flatness.gradient_covariance_trace(model, IMAGES, LABELS),
        lambda: flatness.sharpness(model, IMAGES, LABELS, torch.ones(1, size), [0.1]),
    )
    for measure in measures[:count]:
        with pytest.raises(ValueError, match=re.escape(named)):
            measure()


class Remembering(Net):
    """Its buffers change in evaluation mode, in place or by assignment."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.register_buffer("seen", torch.tensor(3.0), persistent=kind != "not persistent")

    def forward(self, x):
        if self.kind == "assigned":
            self.seen = self.seen + 1
        else:
            self.seen += x.detach().mean() if self.kind == "average" else 1
        return super().forward(x) * self.seen


def with_parameter(dtype):
    model = Net()
    model.codes = nn.Parameter(torch.zeros(2, dtype=dtype), requires_grad=False)
    return model


LOW = {
    "bfloat16": torch.autocast("cpu", torch.bfloat16)(lambda h: h @ h),
    "float16": lambda h: h.half().tanh().float(),
    "float8_e5m2": lambda h: h + h.detach().to(torch.float8_e5m2).float(),
}
CALLS = itertools.count(1)
NO_FUNCTION = {
    "alpha dropout": lambda h: F.alpha_dropout(h, 0.5, training=True),
    "little noise": lambda h: h + 1e-3 * torch.randn_like(h),
    "random slopes": lambda h: F.rrelu(h, training=True),
    "Python's generator": lambda h: h * random.random(),
    "NumPy's generator": lambda h: h + np.random.default_rng().normal(),
    "count of calls": lambda h: h * next(CALLS),
    "mean": lambda h: h - h.mean(0),
    "softmax": lambda h: h.softmax(0),
    "batch norm": nn.BatchNorm2d(2, track_running_stats=False),
    "neighbour": lambda h: h + 0.1 * h.roll(1, 0),
}
NO_LOGITS = {
    "list": lambda o: [o],
    "dict": lambda o: {"out": o},
    "ndarray": lambda o: o.detach().numpy(),
    "NoneType": lambda o: None,
    "(12, 3, 1)": lambda o: o[..., None],
    "(36, 1)": lambda o: o.reshape(-1, 1),
}
REFUSED = {  # and what the error names
    **{name: (Net(use), "Net") for name, use in NO_FUNCTION.items()},
    **{name: (Net(use), name) for name, use in LOW.items()},
    **{name: (Net(wrap=wrap), name) for name, wrap in NO_LOGITS.items()},
    "average of batches": (Remembering("average"), "Remembering"),
    "int8": (with_parameter(torch.int8), "int8"),
    "complex64": (with_parameter(torch.complex64), "complex64"),
    "no parameters": (nn.Flatten(), "None"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_function_of_each_image_in_float32_is_refused(kind):
    model, named = REFUSED[kind]
    check_refused(model, 3, named)


def custom(forward, backward, wrap=lambda f: f, vmap=None):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return forward(x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        @wrap
        def backward(ctx, gradient):
            return backward(*ctx.saved_tensors, gradient)

    if vmap is not None:
        Function.vmap = staticmethod(vmap)
    return Function.apply


def slope(x):
    return x.sigmoid() * (1 + x * (1 - x.sigmoid()))


def of_flash(h):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(h, h, h)


REVERSAL = custom(torch.clone, lambda x, g: -g)
WRONG = {  # and how many of the measures it spoils
    "backward without a graph": (custom(F.silu, lambda x, g: g * slope(x.detach())), 1),
    "backward in NumPy": (
        custom(F.silu, lambda x, g: g * torch.tensor(slope(x.detach()).numpy())),
        1,
    ),
    "differentiable once": (custom(F.silu, lambda x, g: g * slope(x), once_differentiable), 1),
    "flash attention": (of_flash, 1),
    "wrong gradient": (custom(F.silu, lambda x, g: 1.1 * g * slope(x)), 2),
    "gradient reversal": (REVERSAL, 2),
    "straight through": (lambda h: h + (h.sign() - h).detach(), 2),
    "no gradients": (torch.no_grad()(torch.tanh), 2),
    "reentrant checkpoint": (lambda h: checkpoint(F.silu, h, use_reentrant=True), 2),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_derivatives_are_refused(kind):
    use, spoilt = WRONG[kind]
    check_refused(Net(use), spoilt, "Net")


def test_a_weight_that_is_computed_wrongly_is_named():
    """As with weight norm, whose second derivative PyTorch gets wrong on a CPU."""
    model = nn.Sequential(Net(), nn.Linear(3, 3))
    reversal = nn.Module()
    reversal.forward = REVERSAL
    register_parametrization(model[1], "weight", reversal)
    check_refused(model, 2, "of 1,")


@pytest.mark.parametrize("convert", [lambda h: h.float(), lambda h: h @ torch.ones(3, 3)])
def test_without_float64_the_gradient_is_checked(convert, caplog):
    check(Net(convert))
    assert "Net" in caplog.text
    check_refused(Net(lambda h: REVERSAL(convert(h))), 2, "Net")


def test_a_part_without_gradients_is_right_when_it_is_held():
    model = Net()
    conv = model.conv
    model.conv.forward = torch.no_grad()(lambda x: F.conv2d(x, conv.weight, conv.bias))
    check_refused(model, 2, "Net")
    held = {f"conv.{n}": torch.ones_like(p, dtype=torch.bool) for n, p in conv.named_parameters()}
    check(model, held=held)


def test_derivatives_of_a_tiny_loss_are_not_refused():
    """Of a network that is sure of every label: its loss is about 1e-6."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[3].weight.mul_(1e-3)
        model[3].bias.copy_(torch.tensor([14.0, 0, 0]))
    labels = torch.zeros(12, dtype=torch.long)
    assert flatness.gradient_covariance_trace(model, IMAGES, labels) < 1e-8
    flatness.hessian_spectrum(model, IMAGES, labels, 1, tol=1e-2)


def test_weights_that_pruning_set_to_zero_are_no_kinks():
    model = network(torch.float32)
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias, model[1].weight, model[1].bias):
            tensor[1] = 0
    check(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("where", [range(9), (0,), (1,)])
def test_weights_of_other_precisions_are_measured_in_one(dtype, where):
    """Low ones as float32; where one is float64, all are."""
    like = torch.float64 if dtype == torch.float64 else torch.float32
    model = network(torch.float32)
    for index in where:
        model[index].to(dtype)
    exact = copy.deepcopy(model).to(like)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    check(model, exact, images=IMAGES.to(like))
    assert flatness.hessian_spectrum(model, IMAGES, LABELS, 1)[1].dtype == like
    assert all(t.dtype == before[n].dtype for n, t in model.state_dict().items())


class Attending(nn.Module):
    """Five rows of pixels are five tokens."""

    def __init__(self, attend):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        self.attend = attend()

    def forward(self, x):
        return self.head(self.attend(self.embed(x[:, 0])).mean(1))


def encoder():
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2)


def by_value(h):
    return h * 2 if float(h.detach().sum()) > 1e9 else h


def by_index(h):
    out = torch.empty(len(h), 2, 3, 3)
    out[:, 0], out[:, 1] = h[:, 0], h[:, 1]
    return out


DOUBLED = custom(  # under vmap, which is another function
    torch.clone, lambda x, g: g.clone(), vmap=lambda info, dims, x: (2 * x, dims[0])
)


class Checkpointed(Net):
    """Its convolution is computed again in every backward pass."""

    def forward(self, x):
        return self.dense(checkpoint(self.conv, x, use_reentrant=False).tanh().flatten(1))


class Shared(nn.Module):
    """One layer used three times, once as a function."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.same, self.head = nn.Linear(25, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        h = self.same(self.same(self.first(x.flatten(1)).tanh()).tanh())
        return self.head(F.linear(h.tanh(), self.same.weight))


def frozen():
    model = Net()
    model.conv.weight.requires_grad_(False)
    return model


Output = collections.namedtuple("Output", ["loss", "logits"])
RIGHT = {  # and a network that is the same, if it takes another for the explicit derivatives
    "differentiable twice": lambda: (Net(custom(F.silu, lambda x, g: g * slope(x))), Net(F.silu)),
    "kinks": lambda: (Net(lambda h: F.hardtanh(h) + h.abs() + F.max_pool2d(h, 3, 1, 1)), None),
    "dead": lambda: (Net(lambda h: F.relu(h - 100)), None),
    "attention": lambda: (
        Attending(lambda: lambda x: F.scaled_dot_product_attention(x, x, x)),
        Attending(lambda: lambda x: (x @ x.mT / 2).softmax(2) @ x),
    ),
    "encoder": lambda: (Attending(encoder), None),
    "branch by value": lambda: (Net(by_value), None),
    "written by index": lambda: (Net(by_index), None),
    "another vmap": lambda: (Net(DOUBLED), Net()),
    "checkpoint": lambda: (Checkpointed(), Net()),
    "shared": lambda: (Shared(), None),
    "frozen": lambda: (frozen(), Net()),
    "named tuple": lambda: (Net(wrap=lambda o: Output(None, o)), Net()),
    "dict": lambda: (Net(wrap=lambda o: collections.OrderedDict(logits=o, hidden=None)), Net()),
    "object": lambda: (Net(wrap=lambda o: types.SimpleNamespace(logits=o)), Net()),
    "count": lambda: (Remembering("count"), Net(wrap=lambda o: 4 * o)),
    "assigned": lambda: (Remembering("assigned"), Net(wrap=lambda o: 4 * o)),
    "not persistent": lambda: (Remembering("not persistent"), Net(wrap=lambda o: 4 * o)),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("kind", RIGHT)
def test_right_derivatives_are_taken(kind):
    model, expected = RIGHT[kind]()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    check(model, expected)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert torch.backends.mha.get_fastpath_enabled()


def test_tied_parameters_count_once():
    model = Shared()
    model.head.weight = model.same.weight
    held = {"same.weight": torch.rand(3, 3) < 0.5}
    check(model, held=held)
    _, vectors = flatness.hessian_spectrum(model, IMAGES, LABELS, 1, held)
    assert vectors.shape[1] == 25 * 3 + 3 + 9 + 3 + 3
