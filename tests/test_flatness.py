"""The measures against explicit Hessians, loops over images, and weights that are written anew."""

import math
import re
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from explicit import Explicit, network
from torch import nn

from paperlib import flatness, models
from paperlib.pruning import Pruner

torch.set_num_threads(1)

IMAGES = 24
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


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


@pytest.mark.parametrize("holding", [False, True])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 2e-4), (torch.float64, 1e-8)])
def test_spectrum_against_the_explicit_hessian(holding, dtype, tol):
    model, (images, labels) = network(dtype), batch(dtype)
    held = some_held(model) if holding else None
    exact, k = Explicit(model, images, labels, held), 12
    matrix, expected = exact.hessian(), exact.eigenvalues(k)
    values, vectors = flatness.hessian_spectrum(model, images, labels, k, held, tol=tol / 2)
    scale = abs(expected[0])
    assert (values - expected).abs().max() <= tol * scale
    assert (values < 0).any()
    assert vectors.shape == (k, len(matrix))
    assert vectors.norm(dim=1).tolist() == pytest.approx([1] * k, abs=1e-5)
    assert (vectors @ matrix - values[:, None] * vectors).norm(dim=1).max() <= tol * scale
    assert not vectors[:, ~exact.free].any()


@pytest.mark.parametrize(("chunk", "memory"), [(None, 4), (7, 4), (7, 0), (7, 2e-5)])
def test_chunks_and_rebuilt_graphs_give_the_same_product(chunk, memory, monkeypatch):
    monkeypatch.setattr(flatness, "GRAPHS_GIB", memory)
    model, (images, labels) = network(), batch()
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    expected = Explicit(model, images, labels).hessian() @ v
    matvec = flatness.hessian_operator(flatness.Loss(model, images, labels, chunk=chunk))
    assert torch.allclose(matvec(v), expected, atol=1e-10)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_the_same_numbers_every_time(device):
    torch.manual_seed(0)
    model = models.build("resnet20", width=0.25).to(device)
    loss = flatness.Loss(model, torch.randn(4, 3, 32, 32), torch.arange(4))
    matvec, v = flatness.hessian_operator(loss), torch.randn(loss.size, device=device)
    assert torch.equal(matvec(v), matvec(v))
    small, images = network(torch.float32).to(device), batch(torch.float32)
    first, again = (flatness.hessian_spectrum(small, *images, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@on_gpu
@pytest.mark.parametrize("memory", [4, 0])
def test_a_product_does_not_wait_for_the_gpu(memory, monkeypatch):
    monkeypatch.setattr(flatness, "GRAPHS_GIB", memory)
    model = network(torch.float32).to("cuda")
    loss = flatness.Loss(model, *batch(torch.float32), some_held(model))
    matvec = flatness.hessian_operator(loss)
    v = torch.randn(len(loss.free), device="cuda")
    expected = matvec(v)
    torch.cuda.set_sync_debug_mode("error")  # from here on a wait raises
    try:
        product = matvec(v)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(product, expected)


@pytest.mark.parametrize("holding", [False, True])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("chunk", [None, 5])
def test_trace_against_the_loop(holding, centered, chunk):
    model, (images, labels) = network(), batch()
    held = some_held(model) if holding else None
    expected = Explicit(model, images, labels, held).trace(centered)
    actual = flatness.gradient_covariance_trace(model, images, labels, held, centered, chunk=chunk)
    assert actual == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", ["resnet20", "vgg11_bn", "conv4"])
@pytest.mark.parametrize("limit", [0, 2**30])
def test_trace_of_the_papers_networks(name, limit, monkeypatch):
    """With the gradients of several images at once, and one by one."""
    torch.manual_seed(0)
    model = models.build(name, width=0.125).eval()
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    held = {key: torch.rand(p.shape) < 0.3 for key, p in model.named_parameters()}
    monkeypatch.setitem(flatness.GRADIENTS, "cpu", limit)
    expected = Explicit(model, images, labels, held).trace()
    actual = flatness.gradient_covariance_trace(model, images, labels, held)
    assert actual == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("holding", [False, True])
def test_sharpness_against_explicit_steps(holding):
    model, (images, labels) = network(), batch()
    held = some_held(model) if holding else None
    exact = Explicit(model, images, labels, held)
    directions = F.normalize(torch.randn(2, len(exact.flat), dtype=torch.float64), dim=1)
    epsilons = [-0.4, -0.1, 0.0, 0.4]
    losses, accuracies = flatness.sharpness(
        model, images, labels, directions, epsilons, held, chunk=7
    )
    assert losses.shape == accuracies.shape == (2, 4)
    for (i, direction), (j, epsilon) in product(enumerate(directions), enumerate(epsilons)):
        logits = exact.logits(exact.flat + epsilon * direction * exact.free, images)
        assert losses[i, j] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-12)
        correct = (logits.argmax(1) == labels).double().mean()
        assert accuracies[i, j] == pytest.approx(100 * float(correct))


def test_measuring_leaves_everything_as_it_was():
    model, (images, labels) = network(torch.float32), batch(torch.float32)
    model.insert(8, nn.Dropout(0.5))
    evaluated = flatness.hessian_spectrum(model.eval(), images, labels, 2)
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[9].weight.grad = torch.ones_like(model[9].weight)
    seen = set()
    model[3].register_forward_hook(lambda module, inputs, out: seen.add(module.training))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    with torch.no_grad():
        values = flatness.hessian_spectrum(model, images, labels, 2)
        flatness.gradient_covariance_trace(model, images, labels, some_held(model), centered=True)
        flatness.sharpness(model, images, labels, values[1], [-0.1, 0.1], some_held(model))
    assert all(torch.equal(a, b) for a, b in zip(values, evaluated, strict=True))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(model[9].weight.grad, torch.ones_like(model[9].weight))
    assert model[3].weight.grad is None
    assert not model[0].weight.requires_grad
    assert seen == {False}


BAD = {
    "0 images": {"images": torch.zeros(0, 1, 6, 6), "labels": torch.zeros(0, dtype=torch.long)},
    "got 3 to 3": {"labels": torch.full((IMAGES,), 3)},
    "got -100 to -100": {"labels": torch.full((IMAGES,), -100)},
    "(23,)": {"labels": torch.zeros(IMAGES - 1, dtype=torch.long)},
    "float32": {"labels": torch.zeros(IMAGES)},
    "uint8": {"images": torch.zeros(IMAGES, 1, 6, 6, dtype=torch.uint8)},
    "finite": {"images": torch.full((IMAGES, 1, 6, 6), float("nan"))},
    "'nowhere'": {"held": {"nowhere": torch.zeros(3, dtype=torch.bool)}},
    "(4,)": {"held": {"0.bias": torch.zeros(4, dtype=torch.bool)}},
    "torch.float32": {"held": {"0.bias": torch.zeros(3)}},
    "'0.bias'": {"held": {"0.bias": [True, False, False]}},
    "Pruner": {"held": Pruner()},
    "list": {"labels": [0] * IMAGES},
    "ndarray": {"images": np.zeros((IMAGES, 1, 6, 6), np.float32)},
    "chunk": {"chunk": 0},
    "2.5": {"chunk": 2.5},
}


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("measure", ["hessian_spectrum", "gradient_covariance_trace", "sharpness"])
def test_bad_input_is_named(value, measure):
    model, (images, labels) = network(torch.float32), batch(torch.float32)
    arguments = {"model": model, "images": images, "labels": labels} | BAD[value]
    more = {"directions": torch.zeros(1, 175), "epsilons": [0.1]}
    arguments |= {"hessian_spectrum": {"k": 2}, "sharpness": more}.get(measure, {})
    with pytest.raises(ValueError, match=re.escape(value)):
        getattr(flatness, measure)(**arguments)


def test_bad_sizes_are_named():
    for k in (-1, 0, 176, 2.0):
        with pytest.raises(ValueError, match=str(k)):
            flatness.hessian_spectrum(network(), *batch(), k)
    for tol in (0, -1, math.nan, "a"):
        with pytest.raises(ValueError, match=f"tol .*{tol}"):
            flatness.hessian_spectrum(network(), *batch(), 1, tol=tol)
    for directions in (torch.zeros(1, 5), torch.full((1, 175), math.nan), np.zeros((1, 175))):
        with pytest.raises(ValueError, match="directions"):
            flatness.sharpness(network(), *batch(), directions, [0.1])
    for epsilons in (0.25, [0.1, math.nan], ["a"], torch.tensor(0.5)):
        with pytest.raises(ValueError, match="epsilons"):
            flatness.sharpness(network(), *batch(), torch.zeros(1, 175), epsilons)
