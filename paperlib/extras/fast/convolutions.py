"""3x3 convolutions of images of a few pixels, faster on a CPU.

The last convolutions of these networks see images of 4x4 and 2x2. There oneDNN reaches a fraction
of a processor's speed, and a tenth for the gradients of the weights. Products of matrices compute
the same sums at nearly full speed. Results are the same up to rounding, and can be differentiated
any number of times.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperlib.loop import PlainLoop

DENSE = 2  # up to this height and width, an image is multiplied by one matrix
FEW = 4  # up to this height and width, a product with patches may replace the convolution
WIDE = 128  # filters and channels from which the product gives the gradient of the weights
WIDER = 256  # filters and channels from which it gives everything


@contextmanager
def quick(model: nn.Module) -> Iterator[None]:
    """Compute a network's 3x3 convolutions of few pixels as products of matrices.

    These are convolutions on a CPU with stride 1 and a padding of one pixel of zeros. Autocast sets
    their precision as usual.
    """
    convs = [module for module in model.modules() if _suits(module)]
    for conv in convs:
        conv._conv_forward = convolve  # type: ignore[assignment]
    try:
        yield
    finally:
        for conv in convs:
            del conv._conv_forward


class QuickLoop(PlainLoop):
    """The plain loop with quick convolutions, for a CPU."""

    def kernels(self, model: nn.Module) -> AbstractContextManager:
        """Return `quick` of the network."""
        return quick(model)


def _suits(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == (3, 3)
        and module.stride == (1, 1)
        and module.padding in ((1, 1), 1, "same")
        and module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and "_conv_forward" not in vars(module)
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `F.conv2d(x, weight, bias, padding=1)` of 3x3 kernels, by the fastest method."""
    if x.device.type == "cpu" and x.dim() == 4 and max(x.shape[2:]) <= FEW:
        if max(x.shape[2:]) <= DENSE:
            return _dense(*_cast(x, weight, bias))
        narrowest = min(weight.shape[:2])
        if narrowest >= WIDER or (narrowest >= WIDE and torch.is_grad_enabled()):
            return _Convolution.apply(*_cast(x, weight, bias))
    return F.conv2d(x, weight, bias, padding=1)


def _cast(*tensors: Tensor | None) -> list[Any]:
    """Return tensors in the precision of autocast, if it is on."""
    if not torch.is_autocast_enabled("cpu"):
        return list(tensors)
    precision = torch.get_autocast_dtype("cpu")
    return [None if tensor is None else tensor.to(precision) for tensor in tensors]


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute every pixel of the output from every pixel of the input, by one matrix.

    For 2x2 pixels these are 16 pairs. A convolution computes 36, most of them with zeros.
    """
    images, channels, height, width = x.shape
    filters, pixels = len(weight), height * width
    taps = weight.permute(2, 3, 0, 1).reshape(9, filters, channels)
    taps = taps.index_select(0, _taps(height, width)).view(pixels, pixels, filters, channels)
    matrix = taps.permute(0, 2, 1, 3).reshape(pixels * filters, pixels * channels)
    shift = None if bias is None else bias.repeat(pixels)
    out = F.linear(x.permute(0, 2, 3, 1).reshape(images, -1), matrix, shift)
    return out.view(images, height, width, filters).permute(0, 3, 1, 2)


@cache
@torch.inference_mode(False)  # the result is kept for training, but evaluation may come first
def _taps(height: int, width: int) -> Tensor:
    """Return the tap of the kernel that joins each pixel of the output with each of the input.

    On images of at most 2x2 pixels there is one for each pair. The output's pixel is the slower
    index.
    """
    places = [(row, column) for row in range(height) for column in range(width)]
    return torch.tensor([3 * (r - i + 1) + c - j + 1 for i, j in places for r, c in places])


class _Convolution(torch.autograd.Function):
    """A convolution as a product with patches. Its gradients are convolutions, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        if min(weight.shape[:2]) < WIDER:
            return F.conv2d(x, weight, bias, padding=1)
        images, _, height, width = x.shape
        # Weights that come from `_turned` have their filters innermost in memory.
        matrix = weight.permute(2, 3, 1, 0).reshape(-1, len(weight))
        patches = _patches(x)
        out = patches @ matrix if bias is None else torch.addmm(bias, patches, matrix)
        return out.view(images, height, width, len(weight)).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0] and min(weight.shape[:2]) < WIDER:
            of_x = F.conv_transpose2d(gradient, weight, padding=1)
        elif ctx.needs_input_grad[0]:
            of_x = _Convolution.apply(gradient, _turned(weight), None)
        if ctx.needs_input_grad[1]:
            of_weight = _OfWeight.apply(x, gradient)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_x, of_weight, of_bias


class _OfWeight(torch.autograd.Function):
    """The gradient of a convolution's weights, as one product of matrices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(x, gradient)
        filters, channels = gradient.shape[1], x.shape[1]
        gradients = gradient.permute(0, 2, 3, 1).reshape(-1, filters)
        return (gradients.mT @ _patches(x)).view(filters, 3, 3, channels).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, gradient = ctx.saved_tensors
        of_x = of_gradient = None
        if ctx.needs_input_grad[0]:
            of_x = _Convolution.apply(gradient, _turned(upstream), None)
        if ctx.needs_input_grad[1]:
            of_gradient = _Convolution.apply(x, upstream, None)
        return of_x, of_gradient


def _turned(weight: Tensor) -> Tensor:
    """Return the weights that turn the gradient of the output into that of the input."""
    return weight.flip(2, 3).transpose(0, 1)


def _patches(x: Tensor) -> Tensor:
    """Return the neighbourhood of each pixel, (images * height * width, 9 * channels)."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    taps = padded.unfold(1, 3, 1).unfold(2, 3, 1)  # images, height, width, channels, 3, 3
    return taps.permute(0, 1, 2, 4, 5, 3).reshape(-1, 9 * x.shape[1])
