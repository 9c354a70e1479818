"""Squared norms of single images' gradients, from one forward and one backward pass of a batch.

The gradient of a layer's weights for one image is a sum over the places where the layer acts, of
products of what goes in there and the gradient of what comes out (Goodfellow, arXiv 1510.01799).
So it is enough to watch the layers; no gradient of the whole network is ever held. What comes out
for an image must depend on that image only: batch norm acts in evaluation mode.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Mask = Tensor | None  # where a parameter is held


class LayerNorms(TorchFunctionMode):
    """Watches layers in a forward pass, and measures their gradients in a backward one.

    held: id of each parameter -> its mask. images: how many go in. folds: pairs of layers to
    compute as one (`Foldable.folds`). After the forward pass `seen` has the ids of the parameters
    of known layers, as often as they were used. The backward pass is `backward(loss)`, which gives
    the norms, (N,); neither parameters nor images need require gradients.
    """

    def __init__(self, held: Mapping[int, Mask], images: int, folds: Iterable["Fold"] = ()) -> None:
        super().__init__()
        self.held, self.images = held, images
        self.folds = {id(fold.parameters[0]): fold for fold in folds}
        self.done = {id(fold.scale) for fold in self.folds.values()}
        self.seen: list[int] = []
        self.start = torch.zeros((), requires_grad=True)
        self.parts: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in LAYERS:
            return function(*args, **kwargs)
        layer = LAYERS[function](*args, **kwargs)
        if id(layer.weight) in self.done:
            return layer.input
        fold = self.folds.get(id(layer.weight))
        if fold is None:
            out = function(*args, **kwargs)
            parameters, parts = layer.parameters, layer.parts
        else:
            out = fold.output(layer)
            parameters, parts = fold.parameters, partial(fold.parts, layer)
        if not layer.known or len(out) != self.images:
            return out
        if not out.requires_grad:
            out = _Start.apply(out, self.start)
        if out.requires_grad:  # unless the network says otherwise here
            self.seen += [id(p) for p in parameters if p is not None]
            masks = [self.held.get(id(p)) for p in parameters]
            out.register_hook(lambda gradient: self.parts.extend(parts(gradient, *masks)))
        return out

    def backward(self, loss: Tensor) -> Tensor:
        torch.autograd.grad(loss, self.start, allow_unused=True)
        return _norms(torch.cat(self.parts, 1)).square()


class _Start(torch.autograd.Function):
    """Has a graph start at a tensor that does not require gradients: the first layers' output.

    The images would do, but for a gradient that nobody asks for.
    """

    @staticmethod
    def forward(ctx, x: Tensor, start: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None]:
        return None, None


class Foldable(TorchFunctionMode):
    """Finds, in a forward pass, the convolutions that a batch norm in evaluation mode follows.

    Such a pair is one convolution with other weights, and its gradients follow from that one's.
    `folds` lists those where that pays: images are large beside the weights, whose gradients are
    computed one by one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folds: list[Fold] = []
        self._outputs: dict[int, tuple[Tensor, Convolution]] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function is F.conv2d:
            layer = Convolution(*args, **kwargs)
            large = 2 * out[0, 0].numel() >= layer.weight[0].numel()
            if large and layer.known and not layer.few_places(out):
                self._outputs[id(out)] = out, layer
        elif function is F.batch_norm:
            layer = BatchNorm(*args, **kwargs)
            between, convolution = self._outputs.get(id(layer.input), (None, None))
            unchanged = between is not None and between._version == 0
            if unchanged and layer.known and layer.bias is not None:
                self.folds.append(Fold(convolution, layer))
        return out


# The layers: their fields are the function's arguments. `parts` takes the gradient of the output
# and a mask for each of `parameters`, and gives tensors (N, ...) whose squares add up to the
# squared norms.


class _Layer:
    known = True  # whether `parts` can be had

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias


@dataclass(frozen=True, eq=False)
class Linear(_Layer):
    input: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def parts(self, gradient: Tensor, held: Mask, bias_held: Mask) -> Iterator[Tensor]:
        g, x = (t.reshape(len(t), -1, t.shape[-1]).mT for t in (gradient, self.input))
        if self.bias is not None:
            yield _free(g.sum(2), bias_held)
        outputs, places = g.shape[1:]
        inputs = x.shape[1]
        if held is not None and (held == held[:, :1]).all():
            g, held = g.masked_fill(held[:, :1], 0), None
        if held is None and places * (outputs + inputs) < outputs * inputs:
            yield _root((g.mT @ g) * (x.mT @ x))
        else:
            yield _norms(_free(g @ x.mT, held))[:, None]


@dataclass(frozen=True, eq=False)
class Convolution(_Layer):
    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] | str = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1

    @property
    def known(self) -> bool:
        return self.groups == 1 and not isinstance(self.padding, str) and self.input.dim() == 4

    @property
    def steps(self) -> list[list[int]]:
        """Stride, padding and dilation, each (vertical, horizontal)."""
        steps = self.stride, self.padding, self.dilation
        return [[n, n] if isinstance(n, int) else list(n) for n in steps]

    def parts(self, gradient: Tensor, held: Mask, bias_held: Mask) -> Iterator[Tensor]:
        if self.bias is not None:
            yield _free(gradient.sum((2, 3)), bias_held)
        if held is not None and (held == held[:, :1, :1, :1]).all():
            gradient, held = gradient.masked_fill(held[:, :1, 0, 0, None], 0), None
        if held is None and self.few_places(gradient):
            yield _root(self.products(gradient))
        else:
            yield _norms(_free(self.each_gradient(gradient), held))[:, None]

    def few_places(self, out: Tensor) -> bool:
        """Whether `products` costs less than the gradients themselves."""
        places, kernel = out[0, 0].numel(), self.weight[0, 0].numel()
        filters, channels = self.weight.shape[:2]
        pixels = self.input[0, 0].numel()
        cost = places**2 * (filters + kernel) + pixels**2 * channels
        return cost < places * filters * channels * kernel

    def products(self, gradient: Tensor) -> Tensor:
        """(g_p . g_q) (patch_p . patch_q) of any two places p and q: (N, places, places).

        Their sum is |sum over places p of g_p patch_p^T|^2. A patch's products are sums of its
        pixels' products, so no patch is ever written out.
        """
        g, pixels = gradient.flatten(2), self.input.flatten(2)
        products, shape = pixels.mT @ pixels, list(self.input.shape[2:])
        for axis, along in enumerate(zip(self.weight.shape[2:], *self.steps, strict=True)):
            products = products.view(len(g), *shape, *shape)
            shape[axis] = gradient.shape[2 + axis]
            products = _over_patches(products, axis + 1, shape[axis], *along)
        products = products.flatten(3).flatten(1, 2)
        return (g.mT @ g) * products

    def each_gradient(self, gradient: Tensor) -> Tensor:
        """The weight's gradient for each image, (N, *weight.shape)."""
        images, filters = gradient.shape[:2]
        stride, padding, dilation = self.steps
        if gradient.device.type != "cpu" or gradient[0, 0].numel() < filters:
            patches = F.unfold(self.input, self.weight.shape[2:], dilation, padding, stride)
            return (gradient.flatten(2) @ patches.mT).view(-1, *self.weight.shape)
        # By a convolution with a group an image. Of the weights only their shape enters.
        return torch.ops.aten.convolution_backward(
            gradient.reshape(1, -1, *gradient.shape[2:]),
            self.input.reshape(1, -1, *self.input.shape[2:]),
            self.weight.new_empty(1).expand(images * filters, *self.weight.shape[1:]),
            None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            images,
            [False, True, False],
        )[1].view(images, *self.weight.shape)


@dataclass(frozen=True, eq=False)
class BatchNorm(_Layer):
    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    @property
    def known(self) -> bool:
        return not self.training and self.weight is not None

    @property
    def inverse_std(self) -> Tensor:
        return (self.running_var + self.eps).rsqrt()

    def parts(self, gradient: Tensor, held: Mask, bias_held: Mask) -> Iterator[Tensor]:
        g, x = (t.reshape(*t.shape[:2], -1) for t in (gradient, self.input))
        shift = g.sum(2)
        yield _free(((g * x).sum(2) - shift * self.running_mean) * self.inverse_std, held)
        if self.bias is not None:
            yield _free(shift, bias_held)


class Fold:
    """A convolution and the batch norm after it as one: conv2d with `weight` and `shift`.

    The parts of the gradient follow, by the chain rule, from those of `weight` and `shift`.
    """

    def __init__(self, convolution: Convolution, batch_norm: BatchNorm) -> None:
        weight, bias = convolution.parameters
        self.parameters = convolution.parameters + batch_norm.parameters
        inverse_std = batch_norm.inverse_std
        offset = (0 if bias is None else bias) - batch_norm.running_mean
        # without batch norm's own scale and shift:
        self.plain_weight = weight * inverse_std.view(-1, 1, 1, 1)
        self.plain_shift = offset * inverse_std
        self.scale = batch_norm.weight
        self.factor = self.scale * inverse_std
        self.weight = self.plain_weight * self.scale.view(-1, 1, 1, 1)
        self.shift = self.plain_shift * self.scale + batch_norm.bias

    def output(self, convolution: Convolution) -> Tensor:
        where = convolution.stride, convolution.padding, convolution.dilation
        return F.conv2d(convolution.input, self.weight, self.shift, *where)

    def parts(
        self,
        convolution: Convolution,
        gradient: Tensor,
        held: Mask,
        bias_held: Mask,
        scale_held: Mask,
        shift_held: Mask,
    ) -> Iterator[Tensor]:
        each = convolution.each_gradient(gradient)
        shifts = gradient.sum((2, 3))
        along = torch.linalg.vecdot(each.flatten(2), self.plain_weight.flatten(1))
        yield _norms(_free(each, held), 2) * self.factor
        if convolution.bias is not None:
            yield _free(shifts * self.factor, bias_held)
        yield _free(torch.addcmul(along, shifts, self.plain_shift), scale_held)
        yield _free(shifts, shift_held)


LAYERS = {F.linear: Linear, F.conv2d: Convolution, F.batch_norm: BatchNorm}


def _over_patches(
    products: Tensor, dim: int, places: int, kernel: int, stride: int, padding: int, dilation: int
) -> Tensor:
    """From products of pixels, (N, height, width, height, width), to those of patches, along `dim`.

    That is along `dim` and `dim + 2`: the height, 1, or the width, 2.
    """
    shape = list(products.shape)
    pixels = shape[dim]
    shape[dim] = shape[dim + 2] = places
    out = products.new_zeros(shape)
    for tap in range(kernel):
        first = tap * dilation - padding  # the pixel, or padding, that the tap meets at place 0
        start = max(0, -(first // stride))
        stop = max(start, min(places, (pixels - 1 - first) // stride + 1))
        to, by = [slice(None)] * 5, [slice(None)] * 5
        to[dim] = to[dim + 2] = slice(start, stop)
        begin = first + start * stride
        by[dim] = by[dim + 2] = slice(begin, begin + (stop - start) * stride, stride)
        out[tuple(to)] += products[tuple(by)]
    return out


def _free(gradients: Tensor, held: Mask) -> Tensor:
    return gradients if held is None else gradients.masked_fill(held, 0)


def _norms(gradients: Tensor, dims: int = 1) -> Tensor:
    """Norms over all but the first `dims` dimensions."""
    return torch.linalg.vector_norm(gradients.flatten(dims), dim=dims)


def _root(squares: Tensor) -> Tensor:
    """The root of the sum of each image's numbers, (N, 1); rounding may leave it below zero."""
    return squares.flatten(1).sum(1, keepdim=True).clamp_min(0).sqrt()
