"""The mask of a residual sum: it belongs to the network, so every copy of the network has it.

A pruned filter is zero through its weights alone, and nothing is masked in the forward pass. A
residual sum is the exception: its shortcut would fill the filter again. A `ResidualSum` has a mask
of its own, `keep`. Any other module that returns the sum gets a buffer, `kept_channels`, and a
forward hook that multiplies by it. Both go with the network wherever it goes: deepcopy,
`state_dict`, `torch.save`, `torch.fx` and `torch.compile`.
"""

import sys

import torch
from torch import Tensor, nn

from paperlib.models import ResidualSum

BUFFER = "kept_channels"


def mask_name(module: nn.Module) -> str:
    """Return the name of the buffer for a mask, which is 1 where a channel is kept, else 0."""
    return "keep" if isinstance(module, ResidualSum) else BUFFER


def mask_of(module: nn.Module) -> Tensor | None:
    """Return a module's mask (channels,), or None."""
    mask = getattr(module, mask_name(module), None)
    return None if mask is None else mask.flatten()


@torch.inference_mode(False)  # it is kept for training, whenever it is made
def set_mask(module: nn.Module, keep: Tensor) -> None:
    """Have a module multiply its output, or a `ResidualSum` its shortcut, by a mask (channels,).

    A mask that is there already keeps its place in memory, where a captured CUDA graph reads it.
    """
    mask = mask_of(module)
    if mask is not None:
        mask.copy_(keep)
        return
    if isinstance(module, ResidualSum):
        module.keep = keep.clone()[:, None, None]
        return
    module.register_buffer(BUFFER, keep.clone()[None, :, None, None])
    # First, so that hooks which look at the output see it masked.
    module.register_forward_hook(multiply_by_mask, prepend=True)
    if "torch._dynamo" in sys.modules:
        # A network that was compiled before does not notice a new hook.
        torch.compiler.reset()


def remove_mask(module: nn.Module) -> None:
    """Have a module multiply by no mask any more."""
    if isinstance(module, ResidualSum):
        module.keep = None
        return
    del module._buffers[BUFFER]
    for key in [k for k, hook in module._forward_hooks.items() if hook is multiply_by_mask]:
        del module._forward_hooks[key]


def multiply_by_mask(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """Forward hook of a module that `set_mask` has given a buffer."""
    return (output * module.get_buffer(BUFFER)).to(output.dtype)
