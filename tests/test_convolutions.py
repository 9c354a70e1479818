"""Convolutions as products of matrices against the convolution itself."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import VGG
from torch import nn

from paperlib import flatness, models
from paperlib.config import FilterPruning
from paperlib.extras.fast import convolutions
from paperlib.extras.fast.convolutions import convolve, quick
from paperlib.training import run

torch.set_num_threads(1)


def tensors(images, channels, filters, height, width, layout=torch.contiguous_format):
    torch.manual_seed(0)
    x = torch.randn(images, channels, height, width, dtype=torch.float64)
    weight = torch.randn(filters, channels, 3, 3, dtype=torch.float64)
    x, weight = (t.contiguous(memory_format=layout).requires_grad_() for t in (x, weight))
    return x, weight, torch.randn(filters, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def narrow(monkeypatch):
    """Products for narrow layers, too."""
    monkeypatch.setattr(convolutions, "WIDE", 1)
    monkeypatch.setattr(convolutions, "WIDER", 1)


SIZES = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (3, 3), (4, 4), (4, 2), (5, 4)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_against_the_convolution(size, biased, layout, narrow):
    x, weight, bias = tensors(3, 5, 4, *size, layout)
    inputs = [x, weight, bias] if biased else [x, weight]
    outputs = convolve(*inputs), F.conv2d(*inputs, padding=1)
    upstream = torch.randn_like(outputs[0])
    ours, theirs = ([out, *torch.autograd.grad(out, inputs, upstream)] for out in outputs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4)])
def test_differentiated_twice(size, narrow):
    inputs = tensors(2, 3, 2, *size)
    assert torch.autograd.gradgradcheck(convolve, inputs)


def test_training_after_an_evaluation():
    convolutions._taps.cache_clear()
    inputs = tensors(2, 3, 2, 2, 2)
    with torch.inference_mode():
        convolve(*inputs)
    convolve(*inputs).sum().backward()
    assert all(t.grad is not None for t in inputs)


@pytest.mark.parametrize("size", [2, 4, 5])
def test_autocast(size, narrow):
    inputs = [t.detach().float().requires_grad_() for t in tensors(64, 6, 5, size, size)]
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = convolve(*inputs), F.conv2d(*inputs, padding=1)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    expected = F.conv2d(*inputs, padding=1)
    upstream = torch.randn_like(expected)
    found, exact = (
        [out, *torch.autograd.grad(out, inputs, upstream.to(out))] for out in (ours, expected)
    )
    for a, b in zip(found, exact, strict=True):
        assert (a - b).norm() < 5e-3 * b.norm()  # bfloat16 has eight bits


def test_only_in_the_context_and_only_what_suits():
    suits = [{"padding": 1}, {"padding": "same"}]
    others = [{"kernel_size": 1}, {}, {"padding": 1, "stride": 2}, {"padding": 2, "dilation": 2}]
    others += [{"padding": 1, **more} for more in ({"groups": 2}, {"padding_mode": "reflect"})]
    others += [{"padding": 1, "kernel_size": 5}]
    options = [{"kernel_size": 3} | each for each in suits + others]
    network = nn.Sequential(*(nn.Conv2d(2, 2, **each) for each in options))
    with quick(network):
        changed = ["_conv_forward" in vars(module) for module in network]
        with quick(network):
            pass
        assert changed == ["_conv_forward" in vars(module) for module in network]
    assert changed == [True, True] + [False] * 7
    assert not any("_conv_forward" in vars(module) for module in network)
    with pytest.raises(RuntimeError), quick(network):
        network(torch.zeros(1))
    assert not any("_conv_forward" in vars(module) for module in network)


def test_hessian_products():
    torch.manual_seed(0)
    network = models.build("vgg11_bn", width=0.25).double().eval()
    x, y = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)
    loss = flatness.Loss(network, x, y)
    matvec, v = flatness.hessian_operator(loss), torch.randn(loss.size, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolutions, "DENSE", 0)
        patch.setattr(convolutions, "FEW", 0)
        plain = flatness.hessian_operator(loss)
    product = matvec(v)
    assert torch.allclose(product, plain(v), atol=1e-10 * float(product.abs().max()))


def test_a_run_by_the_quick_and_the_plain_loop(monkeypatch):
    pruning = FilterPruning((0.3, 0.9), ((1,), (1, 2)), target="largest")
    config = VGG.with_(width=1 / 4, epochs=4, learning_rate=0.001, pruning=pruning)
    rows = run(config, device="cpu").epochs
    monkeypatch.setenv("PAPERLIB_PLAIN", "1")
    plain = run(config, device="cpu").epochs
    assert rows.removed.equals(plain.removed)
    for name in ("train_loss", "test_loss"):
        assert np.allclose(rows[name], plain[name], rtol=2e-2)  # rounding grows
    assert np.allclose(rows.train_loss[:1], plain.train_loss[:1], rtol=1e-5)
