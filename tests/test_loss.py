"""Networks whose measures are hard to get right: each is measured rightly, or refused."""

import collections
import random
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from paperlib import flatness

torch.set_num_threads(1)

IMAGES = torch.randn(12, 1, 5, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(12) % 3


class Net(nn.Module):
    """A small network with `use` between its two layers."""

    def __init__(self, use=lambda h: h):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.dense = nn.Conv2d(1, 2, 3), nn.Linear(18, 3)
        self.use = use

    def forward(self, x):
        return self.dense(self.use(self.conv(x)).tanh().flatten(1))


def check(model, expected=None, held=None, images=IMAGES):
    """Compare the measures with explicit derivatives, those of `expected` if it is given."""
    expected = (expected or model).eval()
    names = list(dict(expected.named_parameters()))
    shapes = [p.shape for p in expected.parameters()]

    def loss(flat, x=images, y=LABELS):
        pieces = flat.split([s.numel() for s in shapes])
        weights = {n: p.view(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        with sdpa_kernel(SDPBackend.MATH):
            return F.cross_entropy(functional_call(expected, weights, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in expected.parameters()])
    none = {n: torch.zeros(s, dtype=torch.bool) for n, s in zip(names, shapes, strict=True)}
    free = ~torch.cat([mask.flatten() for mask in (none | (held or {})).values()])
    matrix = torch.autograd.functional.hessian(loss, flat)[free][:, free]
    values = torch.linalg.eigvalsh(matrix)
    top = values[values.abs().argsort(descending=True)[:3]]
    actual, vectors = flatness.hessian_spectrum(model, images, LABELS, 3, held)
    assert actual.tolist() == pytest.approx(top.tolist(), rel=1e-3, abs=1e-6)
    noise = 0.0
    for x, y in zip(images.split(1), LABELS.split(1), strict=True):
        point = flat.clone().requires_grad_()
        gradient = torch.autograd.grad(loss(point, x, y), point)[0]
        noise += float(gradient[free].square().sum()) / len(images)
    actual = flatness.gradient_covariance_trace(model, images, LABELS, held)
    assert actual == pytest.approx(noise, rel=1e-4)
    losses, _ = flatness.sharpness(model, images, LABELS, vectors[:1], [0.0, 0.01], held)
    moved = [float(loss(flat + eps * vectors[0])) for eps in (0.0, 0.01)]
    assert losses[0].tolist() == pytest.approx(moved, rel=1e-5)


def measures(model):
    size = sum(p.numel() for p in model.parameters())
    return {
        "spectrum": lambda: flatness.hessian_spectrum(model, IMAGES, LABELS, 2),
        "trace": lambda: flatness.gradient_covariance_trace(model, IMAGES, LABELS),
        "sharpness": lambda: flatness.sharpness(model, IMAGES, LABELS, torch.ones(1, size), [0.1]),
    }


def check_refused(model, which=("spectrum", "trace", "sharpness"), named=""):
    for measure in which:
        with pytest.raises(ValueError) as error:
            measures(model)[measure]()
        assert named in str(error.value)


# The network is a function of each image


class Counting(Net):
    """Its output depends on how often it has been called."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


RANDOM = {
    "alpha dropout": lambda h: F.alpha_dropout(h, 0.5, training=True),
    "little noise": lambda h: h + 1e-3 * torch.randn_like(h),
    "random slopes": lambda h: F.rrelu(h, training=True),
    "Python's generator": lambda h: h * random.random(),
    "NumPy's generator": lambda h: h + np.random.default_rng().normal(),
    "rarely": lambda h: h * (torch.rand(()) > 1e-6),
}


@pytest.mark.parametrize("kind", RANDOM)
def test_randomness_in_evaluation_mode_is_refused(kind):
    model, state = Net(RANDOM[kind]), torch.get_rng_state()
    check_refused(model, named="Net")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_network_that_counts_its_calls_is_refused():
    check_refused(Counting(), named="Counting")


MIXING = {
    "mean": lambda h: h - h.mean(0),
    "softmax": lambda h: h.softmax(0),
    "batch norm": nn.BatchNorm2d(2, track_running_stats=False),
    "neighbour": lambda h: h + 0.1 * h.roll(1, 0),
}


@pytest.mark.parametrize("kind", MIXING)
def test_networks_that_mix_images_are_refused(kind):
    check_refused(Net(MIXING[kind]), named="Net")


# Derivatives


def custom(forward, backward, wrap=lambda f: f):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return forward(x)

        @staticmethod
        @wrap
        def backward(ctx, gradient):
            return backward(*ctx.saved_tensors, gradient)

    return Function.apply


def slope(x):
    return x.sigmoid() * (1 + x * (1 - x.sigmoid()))


WRONG = {  # and the measures that it spoils
    "backward without a graph": (custom(F.silu, lambda x, g: g * slope(x.detach())), 1),
    "backward in NumPy": (
        custom(F.silu, lambda x, g: g * torch.tensor(slope(x.detach()).numpy())),
        1,
    ),
    "differentiable once": (custom(F.silu, lambda x, g: g * slope(x), once_differentiable), 1),
    "wrong gradient": (custom(F.silu, lambda x, g: 1.1 * g * slope(x)), 2),
    "gradient reversal": (custom(torch.clone, lambda x, g: -g), 2),
    "straight through": (lambda h: h + (h.sign() - h).detach(), 2),
    "no gradients": (torch.no_grad()(torch.tanh), 2),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_derivatives_are_refused(kind):
    use, spoilt = WRONG[kind]
    check_refused(Net(use), ["spectrum", "trace"][:spoilt], named="Net")


MIXER = torch.rand(3, 3)
CONSTANTS = {
    "made": lambda h: h @ torch.ones(3, 3),
    "kept": lambda h: torch.stack([h @ MIXER, MIXER.expand_as(h)]).sum(0),
    "converted": lambda h: h.float().to(torch.float32).type(torch.float32),
}


@pytest.mark.parametrize("kind", CONSTANTS)
def test_derivatives_are_checked_where_float32_is_asked_for(kind, caplog):
    check(Net(CONSTANTS[kind]))
    assert not caplog.records
    reversal = WRONG["gradient reversal"][0]
    check_refused(Net(lambda h: reversal(CONSTANTS[kind](h))), ["spectrum", "trace"])


def test_derivatives_that_cannot_be_checked_are_told(caplog):
    def only_float32(h):
        assert h.dtype == torch.float32
        return F.relu(h)

    check(Net(only_float32))
    assert "Net" in caplog.text


RIGHT = {
    "differentiable twice": custom(F.silu, lambda x, g: g * slope(x)),
    "float32 inside": lambda h: h.float().tanh(),
    "kinks": lambda h: F.hardtanh(h) + h.abs() + F.max_pool2d(h, 3, 1, 1),
    "dead": lambda h: F.relu(h - 100),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_right_derivatives_are_not_refused(kind):
    check(Net(RIGHT[kind]), Net(F.silu) if kind == "differentiable twice" else None)


def test_weights_that_pruning_set_to_zero_are_no_kinks():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3)
    )
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias, model[1].weight, model[1].bias):
            tensor[1] = 0
    check(model)


# Precision


def lowered(dtype, where):
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)
    )
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, 0, 0.3)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    for index in where:
        model[index].to(dtype)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("where", [(0, 1, 4), (0,), (4,), (1,)])
def test_weights_of_other_precisions_are_measured_in_one(dtype, where):
    """Low ones as float32; where one is float64, all are."""
    model = lowered(dtype, where)
    exact = lowered(dtype, where).to(torch.float64 if dtype == torch.float64 else torch.float32)
    like = next(exact.parameters()).dtype
    before = {n: t.clone() for n, t in model.state_dict().items()}
    check(model, exact, images=IMAGES.to(like))
    assert flatness.hessian_spectrum(model, IMAGES, LABELS, 1)[1].dtype == like
    assert all(t.dtype == before[n].dtype for n, t in model.state_dict().items())


LOW = {
    "bfloat16": torch.autocast("cpu", torch.bfloat16)(lambda h: h @ h),
    "float16": lambda h: h.half().tanh().float(),
    "float8_e5m2": lambda h: h + h.detach().to(torch.float8_e5m2).float(),
}


@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_within_the_network_is_refused(dtype):
    check_refused(Net(LOW[dtype]), named=dtype)


def test_weights_that_have_to_stay_low_are_refused():
    table = torch.ones(3, 3, dtype=torch.bfloat16)
    check_refused(Net(lambda h: h @ table).bfloat16(), named="bfloat16")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_parameters_that_are_no_real_floats_are_refused(dtype):
    model = Net()
    model.codes = nn.Parameter(torch.zeros(2, dtype=dtype), requires_grad=False)
    check_refused(model, named="'codes'")


# Attention


class Attending(nn.Module):
    """Five rows of pixels are five tokens."""

    def __init__(self, attend):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        self.attend = attend()

    def forward(self, x):
        return self.head(self.attend(self.embed(x[:, 0])).mean(1))


class Heads(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class Function(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, **self.options)


class Plain(nn.Module):
    def forward(self, x):
        return (x @ x.mT / 2).softmax(2) @ x


ATTENTION = {
    "module": lambda: Heads(4, 2, batch_first=True),
    "function": Function,
    "causal": lambda: Function(is_causal=True),
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True), 2
    ),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("kind", ATTENTION)
def test_attention(kind):
    check(Attending(ATTENTION[kind]), Attending(Plain) if kind == "function" else None)
    assert torch.backends.mha.get_fastpath_enabled()


def test_attention_by_a_kernel_that_the_network_insists_on_is_refused():
    insisting = sdpa_kernel(SDPBackend.FLASH_ATTENTION)(
        lambda h: F.scaled_dot_product_attention(h, h, h)
    )
    check_refused(Net(insisting), ["spectrum"], named="Net")


# What vmap refuses; checkpoints; shared, tied and frozen parameters; outputs; buffers


def by_value(h):
    return h * 2 if float(h.detach().sum()) > 1e9 else h


def by_index(h):
    out = torch.empty(len(h), 2, 3, 3)
    for i in range(2):
        out[:, i] = h[:, i]
    return out


def by_place(h):
    out = h.flatten()
    return out.index_put((torch.nonzero(out < 0)[:, 0],), torch.zeros(())).view_as(h)


@pytest.mark.parametrize("use", [by_value, by_index, by_place])
def test_networks_that_vmap_refuses_are_measured_an_image_at_a_time(use):
    check(Net(use))


def test_other_gradients_by_vmap_are_not_taken():
    """A function may have a rule for vmap that is not its own."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, gradient):
            return gradient.clone()

        @staticmethod
        def vmap(info, in_dims, x):
            return 2 * x, in_dims[0]

    check(Net(Doubled.apply), Net())


class Checkpointed(Net):
    """Its layers run again in every backward pass."""

    def __init__(self, run):
        super().__init__()
        self.norm, self.run = nn.BatchNorm2d(2), run

    def forward(self, x):
        return self.dense(self.run(nn.Sequential(self.conv, self.norm), x).tanh().flatten(1))


def recomputed(part, x):
    return checkpoint(part, x, use_reentrant=False)


CHECKPOINTED = {
    "one part": recomputed,
    "nested": lambda part, x: recomputed(lambda h: recomputed(part, h) * 1, x),
    "sequence": lambda part, x: checkpoint_sequential(part, 2, x, use_reentrant=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_activation_checkpointing(kind, dtype, caplog):
    expected = Checkpointed(lambda part, x: part(x)).to(dtype).float()
    check(Checkpointed(CHECKPOINTED[kind]).to(dtype), expected)
    assert {record.name for record in caplog.records} == {flatness.__name__}  # of vmap alone


def test_reentrant_checkpointing_is_refused():
    use = lambda h: checkpoint(F.silu, h, use_reentrant=True)  # noqa: E731
    check_refused(Net(use), ["spectrum", "trace"], named="Net")


class Shared(nn.Module):
    """One layer used three times, once as a function."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.same, self.head = nn.Linear(25, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        h = self.same(self.same(self.first(x.flatten(1)).tanh()).tanh())
        return self.head(F.linear(h.tanh(), self.same.weight))


def residual():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.Tanh())
    return nn.Sequential(block, block, block, nn.Flatten(), nn.Linear(25, 3))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.down, self.up, self.head = nn.Linear(25, 3), nn.Linear(3, 25), nn.Linear(25, 3)
        self.head.weight = self.down.weight

    def forward(self, x):
        return self.head(self.up(self.down(x.flatten(1)).tanh()).tanh())


@pytest.mark.parametrize("make", [Shared, residual, Tied])
def test_parameters_used_more_than_once(make):
    check(make())


def test_tied_parameters_count_once():
    model = Tied()
    held = {"down.weight": torch.rand(3, 25) < 0.5}
    check(model, held=held)
    _, vectors = flatness.hessian_spectrum(model, IMAGES, LABELS, 1, held)
    assert vectors.shape[1] == 25 * 3 + 3 + 3 * 25 + 25 + 3


@pytest.mark.parametrize("frozen", [["conv.weight"], ["dense.weight", "dense.bias"], None])
def test_frozen_parameters_are_coordinates(frozen):
    model = Net()
    for name, p in model.named_parameters():
        p.requires_grad_(frozen is not None and name not in frozen)
    check(model, Net())


def test_a_part_without_gradients_is_right_when_it_is_held():
    model = Net()
    conv = model.conv
    model.conv.forward = torch.no_grad()(lambda x: F.conv2d(x, conv.weight, conv.bias))
    check_refused(model, ["spectrum", "trace"])
    held = {f"conv.{n}": torch.ones_like(p, dtype=torch.bool) for n, p in conv.named_parameters()}
    check(model, held=held)


class Wrapped(Net):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(super().forward(x))


Output = collections.namedtuple("Output", ["loss", "logits"])
OUTPUTS = {
    "named tuple": lambda o: Output(None, o),
    "ordered dict": lambda o: collections.OrderedDict(logits=o, hidden=None),
    "object": lambda o: types.SimpleNamespace(logits=o, attentions=()),
}
NOT_LOGITS = {
    "list": lambda o: [o],
    "dict": lambda o: {"out": o},
    "ndarray": lambda o: o.detach().numpy(),
    "NoneType": lambda o: None,
    "(12, 3, 1)": lambda o: o[..., None],
    "(36, 1)": lambda o: o.reshape(-1, 1),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_with_logits(kind):
    check(Wrapped(OUTPUTS[kind]), Net())


@pytest.mark.parametrize("named", NOT_LOGITS)
def test_other_outputs_are_refused(named):
    check_refused(Wrapped(NOT_LOGITS[named]), named=named)


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


@pytest.mark.parametrize("kind", ["count", "assigned", "not persistent"])
def test_buffers_that_change_in_evaluation_mode(kind):
    """Every pass starts from the same buffers, so the network is a function; they stay."""
    model = Remembering(kind)
    check(model, Scaled())
    assert float(model.seen) == 3


class Scaled(Net):
    def forward(self, x):
        return 4 * super().forward(x)


def test_a_buffer_that_remembers_a_batch_is_refused():
    check_refused(Remembering("average"), named="Remembering")


def test_networks_without_parameters_are_refused():
    with pytest.raises(ValueError, match="no parameters"):
        flatness.hessian_spectrum(nn.Flatten(), IMAGES, LABELS, 1)
