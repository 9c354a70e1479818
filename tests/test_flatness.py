import copy
import math
import resource
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian

from paperlib import flatness, models, per_image

IMAGES = 24


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, 3, stride=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.to(dtype).eval()


def batch(dtype=torch.float64, n=IMAGES):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 1, 6, 6, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(0, 3, (n,), generator=generator)


def some_held(model):
    """A filter with its batch norm, and scattered weights."""
    scattered = torch.rand(model[3].weight.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    rows = torch.tensor([False, True, False])
    return {
        "0.weight": rows.view(-1, 1, 1, 1).expand_as(model[0].weight),
        "0.bias": rows,
        "1.weight": rows,
        "3.weight": scattered,
    }


def flat_mask(model, held):
    return torch.cat(
        [
            held.get(name, torch.zeros_like(p, dtype=torch.bool)).flatten()
            for name, p in model.named_parameters()
        ]
    )


def explicit_hessian(model, images, labels, held=None):
    """(P, P) by torch.func, rows and columns of held coordinates zero."""
    sizes = [p.numel() for p in model.parameters()]

    def loss(flat):
        pieces = flat.split(sizes)
        weights = {
            name: piece.view(p.shape)
            for piece, (name, p) in zip(pieces, model.named_parameters(), strict=True)
        }
        return F.cross_entropy(functional_call(model, weights, (images,)), labels)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    matrix = hessian(loss)(flat)
    mask = flat_mask(model, held or {})
    matrix[mask] = 0
    matrix[:, mask] = 0
    return matrix


def by_magnitude(values):
    return sorted((float(v) for v in values), key=lambda v: (-abs(v), v))


def plain_trace(model, images, labels, held=None, centered=False):
    free = ~flat_mask(model, held or {})
    gradients = []
    for x, y in zip(images.split(1), labels.split(1), strict=True):
        loss = F.cross_entropy(model(x), y)
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        gradients.append(torch.cat([g.flatten() for g in gradient])[free])
    gradients = torch.stack(gradients)
    if centered:
        gradients = gradients - gradients.mean(0)
    return float(gradients.square().sum(1).mean())


# The solver


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 5, 30, 120, 200])
def test_solver_against_numpy(dtype, k):
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.standard_normal((200, 200)))
    known = np.concatenate([[9, -8.9, 8.9, 5, -5], rng.standard_normal(195)])
    matrix = torch.tensor(turn * known @ turn.T, dtype=dtype)
    values, vectors, residuals = flatness.leading_eigenpairs(
        lambda v: matrix @ v, 200, k, dtype=dtype
    )
    expected = np.sort(np.abs(np.linalg.eigvalsh(matrix.double().numpy())))[::-1][:k]
    assert values.abs().double().numpy() == pytest.approx(expected, abs=1e-4)
    assert torch.allclose(vectors @ vectors.T, torch.eye(k, dtype=dtype), atol=2e-5)
    actual = (vectors @ matrix - values[:, None] * vectors).norm(dim=1)
    assert residuals.max() <= 1e-4 * 9
    assert torch.allclose(actual, residuals, atol=2e-5)


@pytest.mark.parametrize(
    ("spectrum", "k"),
    [
        ([4.0] * 6 + [-4.0] * 3 + [3.0] * 2, 10),  # repeated, of both signs
        ([10.0, 7, 7, 7, -6, -6, 5, 5, 5, 5], 5),  # k cuts a group
        ([10.0, 9, 1.5, 1.5, 1.5, 1.5, 1.5], 7),  # a far copy of a small one
        ([3.0], 20),  # rank below k
        ([], 3),  # nothing but zeros
        ([1.0] * 400, 30),  # the identity
    ],
)
def test_solver_gives_repeated_eigenvalues(spectrum, k):
    size = 400
    tail = 0.9 * torch.rand(size - len(spectrum), generator=torch.Generator().manual_seed(3))
    tail = tail if len(spectrum) >= 5 else torch.zeros_like(tail)
    diagonal = torch.cat([torch.tensor(spectrum), tail])
    values, vectors, _ = flatness.leading_eigenpairs(lambda v: diagonal * v, size, k)
    assert by_magnitude(values.abs()) == pytest.approx(by_magnitude(diagonal.abs())[:k], abs=1e-4)
    assert torch.allclose(vectors @ vectors.T, torch.eye(k), atol=2e-5)


def test_solver_restarts_and_says_where_it_did_not_converge():
    diagonal = torch.linspace(1, 1.1, 3000)
    with pytest.raises(flatness.ConvergenceError, match="eigenpairs converged"):
        flatness.leading_eigenpairs(lambda v: diagonal * v, 3000, 5, tol=1e-5, max_products=60)
    diagonal = torch.cat([torch.linspace(0, 1, 3000), torch.linspace(1.1, 2, 30)])
    values, _, _ = flatness.leading_eigenpairs(lambda v: diagonal * v, 3030, 30)
    assert values.numpy() == pytest.approx(np.linspace(2, 1.1, 30), abs=1e-4)


def test_solver_leaves_what_the_operator_returns():
    values, _, _ = flatness.leading_eigenpairs(lambda v: v, 50, 3)
    assert values.tolist() == pytest.approx([1, 1, 1])


def test_solver_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="not finite"):
        flatness.leading_eigenpairs(lambda v: v * float("nan"), 50, 3)


# The Hessian


@pytest.mark.parametrize("holding", [False, True])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 2e-4), (torch.float64, 1e-8)])
def test_spectrum_against_the_explicit_hessian(holding, dtype, tol):
    model, (images, labels) = network(dtype), batch(dtype)
    held = some_held(model) if holding else None
    matrix = explicit_hessian(model, images, labels, held)
    expected = by_magnitude(torch.linalg.eigvalsh(matrix.double()))
    k = 12
    values, vectors, residuals = flatness.hessian_spectrum(
        model, images, labels, k, held, tol=tol / 2, return_residuals=True
    )
    scale = abs(expected[0])
    assert values.tolist() == pytest.approx(expected[:k], abs=tol * scale)
    assert (values < 0).any()
    assert vectors.shape == (k, len(matrix))
    assert vectors.norm(dim=1).tolist() == pytest.approx([1] * k, abs=1e-5)
    assert (vectors @ matrix - values[:, None] * vectors).norm(dim=1).max() <= tol * scale
    assert residuals.max() <= tol * scale
    if holding:
        assert not vectors[:, flat_mask(model, held)].any()


def test_every_eigenvalue_when_k_is_all_free_parameters():
    model, (images, labels) = network(), batch()
    held = some_held(model)
    free = int((~flat_mask(model, held)).sum())
    values, _ = flatness.hessian_spectrum(model, images, labels, free, held)
    expected = by_magnitude(torch.linalg.eigvalsh(explicit_hessian(model, images, labels, held)))
    assert by_magnitude(values.abs()) == pytest.approx([abs(v) for v in expected[:free]], abs=1e-9)
    with pytest.raises(ValueError, match="free parameters"):
        flatness.hessian_spectrum(model, images, labels, free + 1, held)


class Twins(nn.Module):
    """Two copies of one network on separate inputs: every eigenvalue occurs twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.two = copy.deepcopy(self.one)

    def forward(self, x):
        first = x[:, :1] > 0
        return torch.where(first, self.one(x[:, 1:]), self.two(x[:, 1:]))


def test_repeated_eigenvalues_of_a_network():
    model = Twins()
    inputs = torch.randn(30, 4, generator=torch.Generator().manual_seed(4))
    labels = torch.arange(30) % 3
    images = torch.cat([torch.ones(60, 1), inputs.repeat(2, 1)], 1)
    images[:30, 0] = -1
    labels = labels.repeat(2)
    values, vectors = flatness.hessian_spectrum(model, images, labels, 8, tol=1e-5)
    expected = by_magnitude(torch.linalg.eigvalsh(explicit_hessian(model, images, labels)))
    assert values.tolist() == pytest.approx(expected[:8], abs=1e-4)
    assert values[::2].tolist() == pytest.approx(values[1::2].tolist(), abs=1e-4)
    assert torch.allclose(vectors @ vectors.T, torch.eye(8), atol=1e-5)


def test_chunks_and_rebuilt_graphs_give_the_same_product():
    model, (images, labels) = network(), batch()
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    expected = explicit_hessian(model, images, labels) @ v
    for chunk, memory in [(None, 4), (7, 4), (7, 0), (7, 2e-5)]:
        matvec, _ = flatness.hessian_operator(model, images, labels, chunk=chunk, memory=memory)
        assert torch.allclose(matvec(v), expected, atol=1e-10)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
        ),
    ],
)
def test_the_operator_is_symmetric_and_repeats_itself(device):
    torch.manual_seed(0)
    model = models.build("resnet20", width=0.25).to(device)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    matvec, size = flatness.hessian_operator(model, images, labels)
    u, v = torch.randn(2, size, device=device)
    product = matvec(v)
    difference = torch.dot(u, product) - torch.dot(v, matvec(u))
    assert abs(difference) <= 1e-5 * u.norm() * product.norm()
    assert torch.equal(product, matvec(v))
    first, again = (
        flatness.hessian_spectrum(network(torch.float32).to(device), *batch(torch.float32), 3)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# The gradients' covariance


@pytest.mark.parametrize("holding", [False, True])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("chunk", [None, 5])
def test_trace_against_the_loop(holding, centered, chunk):
    model, (images, labels) = network(), batch()
    held = some_held(model) if holding else None
    expected = plain_trace(model, images, labels, held, centered)
    actual = flatness.gradient_covariance_trace(model, images, labels, held, centered, chunk=chunk)
    assert actual == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", ["resnet20", "vgg11_bn", "conv4"])
@pytest.mark.parametrize("holding", [False, True])
def test_trace_of_the_papers_networks(name, holding):
    torch.manual_seed(0)
    model = models.build(name, width=0.25).eval()
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    held = {}
    if holding:
        for key, p in model.named_parameters():
            held[key] = (torch.rand(p.shape) < 0.3) if p.dim() > 2 else torch.rand(p.shape) < 0.1
        first = next(iter(held))
        held[first] = (torch.rand(len(held[first]), 1, 1, 1) < 0.5).expand_as(held[first])
    expected = plain_trace(model, images, labels, held)
    actual = flatness.gradient_covariance_trace(model, images, labels, held)
    assert actual == pytest.approx(expected, rel=1e-4)


class Reused(nn.Module):
    """One dense layer used twice, and a free parameter: its norms are not a sum over layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.same = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.same(F.relu_(self.same(x) * self.scale))


class Transposed(nn.Module):
    """A dense layer applied with the images as its second dimension."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 3)

    def forward(self, x):  # (N, 6, 2)
        return self.layer(x.transpose(0, 1)).tanh().sum(0)


@pytest.mark.parametrize(
    ("model", "shape"), [(Reused(), (3,)), (Transposed(), (6, 2)), (Twins(), (5,))]
)
def test_trace_of_networks_it_does_not_know(model, shape):
    images = torch.randn(6, *shape, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(6) % 3
    actual = flatness.gradient_covariance_trace(model, images, labels)
    assert actual == pytest.approx(plain_trace(model, images, labels), rel=1e-4)


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.dense = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        out = F.conv2d(input=x, weight=self.conv.weight, bias=self.conv.bias).tanh().mean((2, 3))
        return F.linear(input=out, weight=self.dense.weight, bias=self.dense.bias)


def parametrised():
    """Its modules refuse to be copied."""
    model = network()
    nn.utils.parametrizations.weight_norm(model[3])
    return model


@pytest.mark.parametrize("make", [lambda: ByKeyword().double(), parametrised])
def test_trace_of_networks_made_otherwise(make):
    model, (images, labels) = make(), batch()
    actual = flatness.gradient_covariance_trace(model, images, labels)
    assert actual == pytest.approx(plain_trace(model, images, labels), rel=1e-10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_network_is_measured_uncompiled():
    model, (images, labels) = network(), batch()
    trace = flatness.gradient_covariance_trace(model, images, labels)
    values = flatness.hessian_spectrum(model, images, labels, 3)[0]
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    compiled(images)
    assert len(seen) == 1
    again = flatness.gradient_covariance_trace(compiled, images, labels)
    assert again == pytest.approx(trace, rel=1e-12)
    assert torch.equal(flatness.hessian_spectrum(compiled, images, labels, 3)[0], values)
    compiled(images[:3])
    assert len(seen) == 2


GEOMETRIES = [
    # filters, kernel, stride, padding, dilation, pixels
    (12, (3, 3), 1, 1, 1, 4),
    (12, (3, 3), (2, 1), (1, 2), 1, 5),
    (12, (2, 3), 2, (0, 1), (1, 2), 6),
    (12, (1, 1), 2, 0, 1, 4),
    (3, (3, 3), 1, 1, 1, 8),
    (3, (5, 3), (1, 2), (2, 0), (2, 1), 12),
]


@pytest.mark.parametrize("holding", [None, "filters", "weights"])
@pytest.mark.parametrize(("filters", "kernel", "stride", "padding", "dilation", "size"), GEOMETRIES)
def test_norms_of_convolutions(filters, kernel, stride, padding, dilation, size, holding):
    """By the layer, not by the vectorised gradients that would stand in for a wrong one."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(11, filters, kernel, stride, padding, dilation), nn.Tanh(), nn.Flatten()
    )
    images, labels = torch.randn(5, 11, size, size), torch.arange(5) % 3
    held = {}
    if holding:
        shape = model[0].weight.shape
        chosen = torch.rand(shape if holding == "weights" else (filters, 1, 1, 1)) < 0.4
        held = {"0.weight": chosen.expand(shape)}
    weights, _ = flatness._parameters(model)
    twin = flatness._twin(model, weights)
    norms = flatness._layer_norms(twin, images, labels, weights, held)
    for norm, image, label in zip(norms, images, labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        if holding:
            gradients[0][held["0.weight"]] = 0
        assert float(norm) == pytest.approx(
            sum(float(g.square().sum()) for g in gradients), rel=1e-4
        )


def test_both_ways_to_the_norms_of_a_convolution_are_taken():
    for few, filters, size in ((True, 12, 4), (False, 3, 8)):
        x, out = (torch.empty(1, channels, size, size) for channels in (11, filters))
        layer = per_image.Convolution(x, torch.empty(filters, 11, 3, 3), padding=1)
        assert layer.few_places(out) == few


def folds_of(model, images):
    with torch.no_grad(), per_image.Foldable() as found:
        model(images)
    return found.folds


@pytest.mark.parametrize("holding", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_norms_of_a_convolution_and_its_batch_norm_as_one(bias, holding):
    """Against gradients one by one, a filter whose scale is zero among them."""
    model, (images, labels) = network(), batch()
    if not bias:
        weight = model[0].weight
        model[0] = nn.Conv2d(1, 3, 3, padding=1, bias=False, dtype=torch.float64)
        model[0].weight = weight
    with torch.no_grad():
        model[1].weight[0] = 0
    held = {k: v for k, v in some_held(model).items() if bias or k != "0.bias"} if holding else {}
    twin = flatness._twin(model, weights := flatness._parameters(model)[0])
    folds = folds_of(twin, images)
    assert [fold.scale is weights["1.weight"] for fold in folds] == [True]
    norms = flatness._layer_norms(twin, images, labels, weights, held, folds)
    expected = flatness._norms_one_by_one(model, weights, images, labels, held)
    torch.testing.assert_close(norms, expected, rtol=1e-10, atol=0)
    assert float(norms.mean()) == pytest.approx(plain_trace(model, images, labels, held))


class Between(nn.Module):
    """A convolution whose output is not for its batch norm alone."""

    def __init__(self, use):
        super().__init__()
        torch.manual_seed(0)
        self.use = use
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3).eval()
        nn.init.uniform_(self.norm.weight, 0.5, 2)

    def forward(self, x):
        out = self.conv(x)
        if self.use == "changed":
            out.relu_()
        result = self.norm(out)
        if self.use == "kept":
            result = result + out.tanh()
        return result.tanh().mean((2, 3))


@pytest.mark.parametrize(("use", "found"), [("changed", 0), ("kept", 1)])
def test_trace_where_a_batch_norm_cannot_be_folded(use, found):
    model, (images, labels) = Between(use).double().eval(), batch()
    assert len(folds_of(model, images)) == found
    actual = flatness.gradient_covariance_trace(model, images, labels)
    assert actual == pytest.approx(plain_trace(model, images, labels), rel=1e-10)


class Forgetful(nn.Module):
    """Keeps what it computes in itself, so that calls at once would mix it up."""

    def __init__(self):
        super().__init__()
        self.network = network()
        self.callers = set()

    def forward(self, x):
        self.mean = x.mean((1, 2, 3))
        self.callers.add(threading.get_ident())
        time.sleep(0.01)
        return self.network(x) * (2 + self.mean[:, None])


@pytest.fixture
def three_threads():
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


def threads_of_a_new_thread():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.mark.parametrize("centered", [False, True])
def test_trace_of_several_chunks_at_once(three_threads, centered):
    model, (images, labels) = Forgetful(), batch()
    held = {f"network.{name}": mask for name, mask in some_held(model.network).items()}
    before = {name: t.clone() for name, t in model.state_dict().items()}
    actual = flatness.gradient_covariance_trace(model, images, labels, held, centered, chunk=2)
    expected = plain_trace(model, images, labels, held, centered)
    assert actual == pytest.approx(expected, rel=1e-10)
    assert len(model.callers) > 2
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.get_num_threads() == threads_of_a_new_thread() == 3


def test_twins_are_made_before_any_thread_uses_the_model(three_threads, monkeypatch):
    """The check by single images swaps the model's parameters, in the thread of the first chunk."""
    model, (images, labels), makers = network(), batch(), []
    real = flatness._twin

    def twin(*args):
        makers.append(threading.get_ident())
        time.sleep(0.02)
        return real(*args)

    monkeypatch.setattr(flatness, "_twin", twin)
    for chunk in (2, 10):  # of 24 images: more chunks than threads, and as many
        flatness.gradient_covariance_trace(model, images, labels, chunk=chunk)
    assert set(makers) == {threading.get_ident()}
    assert len(makers) == 2 * (1 + 3)  # of each: one that finds what can be folded


def test_one_of_several_chunks_fails(three_threads):
    model, (images, labels) = Forgetful(), batch()
    images[20] = math.inf
    with pytest.raises(ValueError, match="not finite"):
        flatness.gradient_covariance_trace(model, images, labels, chunk=2)
    assert torch.get_num_threads() == threads_of_a_new_thread() == 3


def test_tic():
    assert flatness.tic(6.0, torch.tensor([5.0, -2.0])) == 2.0


# Sharpness


@pytest.mark.parametrize("holding", [False, True])
def test_sharpness_against_reloading(holding):
    model, (images, labels) = network(), batch()
    held = some_held(model) if holding else None
    mask = flat_mask(model, held or {})
    directions = F.normalize(torch.randn(2, len(mask), dtype=torch.float64), dim=1)
    epsilons = [-0.4, -0.1, 0.0, 0.4]
    losses, accuracies = flatness.sharpness(
        model, images, labels, directions, epsilons, held, chunk=7
    )
    assert losses.shape == accuracies.shape == (2, 4)
    for i, direction in enumerate(directions.masked_fill(mask, 0)):
        for j, epsilon in enumerate(epsilons):
            other = copy.deepcopy(model)
            steps = direction.split([p.numel() for p in other.parameters()])
            with torch.no_grad():
                for p, step in zip(other.parameters(), steps, strict=True):
                    p += epsilon * step.view(p.shape)
                logits = other(images)
            assert losses[i, j] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-12)
            correct = (logits.argmax(1) == labels).double().mean()
            assert accuracies[i, j] == pytest.approx(100 * float(correct))


def test_delta_w_of_known_losses():
    epsilons = [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3]
    losses = [[1.3, 1.05, 1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.05, 1.11, 1.2]]
    assert flatness.delta_w(torch.tensor(losses), epsilons, 1.0) == 0.2
    assert math.isnan(flatness.delta_w(torch.tensor(losses), epsilons, 1.0, rise=0.5))
    losses[0][2] = float("nan")
    assert flatness.delta_w(torch.tensor(losses), epsilons, 1.0) == 0.1


def test_walking_finds_the_delta_w_of_the_grid():
    model, (images, labels) = network(), batch()
    _, vectors = flatness.hessian_spectrum(model, images, labels, 3)
    epsilons = torch.arange(-40, 41) / 100
    losses, _ = flatness.sharpness(model, images, labels, vectors, epsilons)
    for rise in (0.001, 0.02, 100.0):
        expected = flatness.delta_w(losses, epsilons, float(losses[0, 40]), rise)
        actual = flatness.find_delta_w(model, images, labels, vectors, rise=rise)
        assert actual == pytest.approx(expected, nan_ok=True)
    assert math.isnan(actual)


# Around them


def measure_all(model, images, labels, held=None):
    _, vectors = flatness.hessian_spectrum(model, images, labels, 2, held)
    flatness.gradient_covariance_trace(model, images, labels, held, centered=True)
    flatness.sharpness(model, images, labels, vectors, [-0.1, 0.1], held)


def test_measuring_leaves_everything_as_it_was():
    model, (images, labels) = network(torch.float32), batch(torch.float32)
    model.insert(8, nn.Dropout(0.5))
    evaluated = flatness.hessian_spectrum(model.eval(), images, labels, 2)
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[9].weight.grad = torch.ones_like(model[9].weight)
    seen = []
    model[3].register_forward_hook(lambda module, inputs, out: seen.append(module.training))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    with torch.no_grad():
        measure_all(model, images, labels, some_held(model))
    values = flatness.hessian_spectrum(model, images, labels, 2)
    assert all(torch.equal(a, b) for a, b in zip(values, evaluated, strict=True))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(model[9].weight.grad, torch.ones_like(model[9].weight))
    assert model[3].weight.grad is None
    assert not model[0].weight.requires_grad
    assert seen
    assert not any(seen)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_a_hundred_calls_leave_memory_flat():
    model, (images, labels) = network(torch.float32), batch(torch.float32, 64)
    matvec, size = flatness.hessian_operator(model, images, labels)
    v = torch.randn(size)

    def peak(calls):
        for _ in range(calls):
            matvec(v)
            flatness.hessian_operator(model, images, labels)
            flatness.gradient_covariance_trace(model, images, labels)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before = peak(10)
    assert peak(100) - before < 16


BAD = {
    "no images": {"images": torch.zeros(0, 1, 6, 6), "labels": torch.zeros(0, dtype=torch.long)},
    "labels must be within": {"labels": torch.full((IMAGES,), 3)},
    "labels must be within 0": {"labels": torch.full((IMAGES,), -100)},
    "labels of shape": {"labels": torch.zeros(IMAGES - 1, dtype=torch.long)},
    "labels must be integers": {"labels": torch.zeros(IMAGES)},
    "images must be floats": {"images": torch.zeros(IMAGES, 1, 6, 6, dtype=torch.uint8)},
    "loss is not finite": {"images": torch.full((IMAGES, 1, 6, 6), float("nan"))},
    "no parameter 'nowhere'": {"held": {"nowhere": torch.zeros(3, dtype=torch.bool)}},
    "of shape": {"held": {"0.bias": torch.zeros(4, dtype=torch.bool)}},
    "must be bool": {"held": {"0.bias": torch.zeros(3)}},
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("measure", ["hessian_spectrum", "gradient_covariance_trace", "sharpness"])
def test_bad_input(message, measure):
    model, (images, labels) = network(torch.float32), batch(torch.float32)
    arguments = {"model": model, "images": images, "labels": labels} | BAD[message]
    if measure == "hessian_spectrum":
        arguments |= {"k": 2}
    if measure == "sharpness":
        size = sum(p.numel() for p in model.parameters())
        arguments |= {"directions": torch.zeros(1, size), "epsilons": [0.1]}
    with pytest.raises(ValueError, match=message):
        getattr(flatness, measure)(**arguments)


@pytest.mark.parametrize("k", [0, -1, 1000])
def test_bad_k(k):
    with pytest.raises(ValueError, match="k must be within"):
        flatness.hessian_spectrum(network(), *batch(), k)


def test_bad_directions():
    model, (images, labels) = network(), batch()
    with pytest.raises(ValueError, match="directions must be"):
        flatness.sharpness(model, images, labels, torch.zeros(1, 5), [0.1])
    size = sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match="finite"):
        flatness.sharpness(model, images, labels, torch.full((1, size), float("nan")), [0.1])


def test_networks_without_parameters_are_refused():
    with pytest.raises(ValueError, match="no parameters"):
        flatness.hessian_spectrum(nn.Flatten(), *batch(), 1)
