"""Operations that give a tensor another shape: flattenings, views, means over pixels, paddings."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import fx, nn

from paperlib.models import ResidualSum
from paperlib.pruning import operations as ops
from paperlib.pruning.graph import Traced
from paperlib.pruning.operations import CONVOLUTIONS, NORMS, TRANSPOSED


@dataclass(frozen=True)
class Layout:
    """How a tensor (images, channels, ...) is laid out.

    Attributes:
        channels: how many there are, None where that is not known.
        dims: its number of dimensions.
        flat: a channel is several features, one after the other.
        shift: how many channels have come before the first.
    """

    channels: int | None
    dims: int
    flat: bool = False
    shift: int = 0


def channels_of(traced: Traced, node: fx.Node) -> int | None:
    """Return the size of dimension 1 of a node's output, None where layers do not tell it."""
    key, module, tensors = traced.key(node), traced.module(node), traced.tensors(node)
    if key in (*CONVOLUTIONS, *TRANSPOSED):
        return module.out_channels
    if key in NORMS:
        return norm_channels(module)
    if key in ops.CAT:
        parts = [channels_of(traced, part) for part in tensors]
        return None if None in parts else sum(parts)
    if key in ops.VIEW:
        sizes = _sizes(node)
        source, dim = _size(sizes[1] if len(sizes) > 1 else None)
        return channels_of(traced, source) if dim == 1 else None
    if key in ops.ELEMENTWISE:
        counts = [channels_of(traced, source) for source in tensors]
        most = max((count for count in counts if count is not None), default=None)
        # A tensor of one channel is spread over the other's.
        return None if most == 1 and None in counts else most
    pads = argument(node, 1, "pad") if key is F.pad else ()
    pixels = isinstance(pads, tuple | list) and len(pads) <= 4
    same = key in ops.PASSING | ops.ACTIVATIONS | ops.SPATIAL | {ResidualSum, F.pad}
    return channels_of(traced, tensors[0]) if same and pixels else None


def norm_channels(norm: nn.Module) -> int:
    """Return how many channels a norm's scale and shift have."""
    return norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features


def laid_out(
    traced: Traced, node: fx.Node, before: Layout, per_image: Callable[[fx.Node], bool]
) -> Layout | None:
    """Return the layout of a node's output, None where images or channels may be mixed up.

    Args:
        traced: the node's network.
        node: one of the operations in `operations.MOVES`.
        before: the layout of its input.
        per_image: whether the first dimension of a node's output is that of the images.
    """
    key, dims = traced.key(node), before.dims
    if key in ops.FLATTEN:
        return _flattened(traced.module(node), node, before)
    if key in ops.VIEW:
        return _viewed(traced, node, before, per_image)
    if key in ops.REDUCE:
        over = argument(node, 1, "dim")
        over = [over] if isinstance(over, int) else over
        if not over or not isinstance(over, tuple | list):
            return None
        if not all(isinstance(d, int) and d % dims >= 2 for d in over):
            return None
        kept = argument(node, 2, "keepdim", False)
        return Layout(before.channels, dims if kept else dims - len(over))
    if key in ops.INDEX:
        return _indexed(node.args[1], before)
    if key in ops.UNSQUEEZE:
        dim = argument(node, 1, "dim")
        fits = isinstance(dim, int) and dim % (dims + 1) >= 2
        return Layout(before.channels, dims + 1) if fits else None
    if key in ops.SQUEEZE:
        dim = argument(node, 1, "dim")
        if before.flat or not _one_pixel(traced, traced.tensors(node)[0]):
            return None
        if dim is None:
            return Layout(before.channels, 2)
        fits = isinstance(dim, int) and dim % dims >= 2
        return Layout(before.channels, dims - 1) if fits else None
    return _padded(traced.module(node), node, before)


def argument(node: fx.Node, position: int, name: str, default: object = None) -> object:
    """Return an argument of a node, by position or by name."""
    return node.kwargs.get(name, node.args[position] if len(node.args) > position else default)


def _flattened(module: nn.Flatten | None, node: fx.Node, before: Layout) -> Layout | None:
    if module is not None:
        start, end = module.start_dim, module.end_dim
    else:
        start, end = argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1)
    if not isinstance(start, int) or end not in (-1, before.dims - 1) or start % before.dims < 1:
        return None
    start %= before.dims
    return Layout(before.channels, start + 1, before.flat or (start == 1 and before.dims > 2))


def _viewed(
    traced: Traced, node: fx.Node, before: Layout, per_image: Callable[[fx.Node], bool]
) -> Layout | None:
    sizes = _sizes(node)
    if len(sizes) < 2 or not all(isinstance(size, int | fx.Node) for size in sizes):
        return None
    source, dim = _size(sizes[0])
    images = source is not None and dim == 0 and per_image(source)
    flat = Layout(before.channels, 2, before.flat or before.dims > 2)
    if len(sizes) == 2 and images:
        return flat
    if len(sizes) == 2 and sizes[0] == -1 and isinstance(sizes[1], int) and before.channels:
        # Rows of whole images, if of whole channels and nothing makes images of them again.
        whole = sizes[1] % before.channels == 0 and not _becomes_images(traced, node)
        return flat if whole else None
    source, dim = _size(sizes[1])
    channels = channels_of(traced, source) if dim == 1 and per_image(source) else sizes[1]
    same = before.channels is not None and channels == before.channels
    return Layout(before.channels, len(sizes)) if images and same and not before.flat else None


def _sizes(node: fx.Node) -> tuple:
    """The sizes in the arguments of a view."""
    sizes = node.args[1:] or (node.kwargs.get("shape"),)
    return tuple(sizes[0]) if isinstance(sizes[0], tuple | list) else sizes


def _size(node: object) -> tuple[fx.Node | None, int | None]:
    """Which dimension of which tensor a node tells the size of; None of both where it does not."""
    if not isinstance(node, fx.Node):
        return None, None
    if node.target == "size" and len(node.args) == 2:
        return node.args[0], node.args[1]
    if node.op == "call_function" and node.target in ops.INDEX:
        of, dim = node.args
        if isinstance(of, fx.Node) and isinstance(dim, int):
            whole = of.target == "size" and len(of.args) == 1
            if whole or (of.target is getattr and of.args[1] == "shape"):
                return of.args[0], dim
    return None, None


def _becomes_images(traced: Traced, node: fx.Node) -> bool:
    """Whether anything computed from a node could be read as images again."""
    seen, left = set(), [node]
    while left:
        for user in left.pop().users:
            if user not in seen:
                seen.add(user)
                left.append(user)
    mixing = ops.MIXING - {nn.Linear}
    keys = {traced.key(user) for user in seen}
    return bool(keys & (mixing | ops.VIEW | ops.UNSQUEEZE | {nn.Unflatten, "unflatten"}))


def _one_pixel(traced: Traced, node: fx.Node) -> bool:
    """Whether a tensor is known to have been pooled to one pixel."""
    key, module = traced.key(node), traced.module(node)
    if key in ops.TO_A_SIZE:
        size = argument(node, 1, "output_size") if module is None else module.output_size
        return size in (1, (1, 1), [1, 1])
    if key in ops.REDUCE:
        over = argument(node, 1, "dim")
        return argument(node, 2, "keepdim", False) is True and isinstance(over, tuple | list)
    through = key in ops.PASSING | ops.ACTIVATIONS | ops.ELEMENTWISE | ops.SQUEEZE
    return through and all(_one_pixel(traced, source) for source in traced.tensors(node))


def _indexed(index: object, before: Layout) -> Layout | None:
    index = index if isinstance(index, tuple) else (index,)
    if any(i is Ellipsis for i in index):
        at = next(k for k, i in enumerate(index) if i is Ellipsis)
        missing = before.dims - sum(i is not None and i is not Ellipsis for i in index)
        index = (*index[:at], *[slice(None)] * missing, *index[at + 1 :])
    if index[:2] != (slice(None), slice(None)):
        return None
    if not all(i is None or isinstance(i, int | slice) for i in index[2:]):
        return None
    change = sum(i is None for i in index) - sum(isinstance(i, int) for i in index)
    return Layout(before.channels, before.dims + change, before.flat)


def _padded(module: nn.ConstantPad2d | None, node: fx.Node, before: Layout) -> Layout | None:
    pads = module.padding if module is not None else argument(node, 1, "pad")
    value = module.value if module is not None else argument(node, 3, "value")
    constant = module is not None or argument(node, 2, "mode", "constant") == "constant"
    if not isinstance(pads, tuple | list) or (constant and value not in (None, 0)):
        return None
    pixels = 2 * (before.dims - 2)
    if before.flat or len(pads) > pixels + 2 or (len(pads) > pixels and not constant):
        return None
    front, back = [*pads[pixels:], 0, 0][:2]
    if not isinstance(front, int) or not isinstance(back, int) or min(front, back) < 0:
        return None
    channels = None if before.channels is None else before.channels + front + back
    return Layout(channels, before.dims, shift=front)
