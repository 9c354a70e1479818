"""Masks of residual sums. A mask belongs to the network, so every copy of the network has it.

A pruned filter is zero because its weights are zero; the forward pass masks nothing. A residual sum
is the exception, because its shortcut would fill the filter again. A `ResidualSum` has a mask of
its own, `keep`. Any other module that returns the sum gets a buffer, `kept_channels`, and a forward
hook that multiplies by it. deepcopy, `torch.save`, `torch.fx` and `torch.compile` keep both kinds
of mask. A `state_dict` holds the masks, but not the hooks.
"""

import sys

import torch
from torch import Tensor, nn

from paperlib.models import ResidualSum

BUFFER = "kept_channels"


def mask_name(module: nn.Module) -> str:
    """Return the name of a module's mask, a buffer that is 1 where a channel is kept, else 0."""
    return "keep" if isinstance(module, ResidualSum) else BUFFER


def mask_of(module: nn.Module) -> Tensor | None:
    """Return a module's mask (channels,), a view, or None."""
    mask = getattr(module, mask_name(module), None)
    return None if mask is None else mask.flatten()


@torch.inference_mode(False)  # training cannot use tensors that are made in inference mode
def add_mask(module: nn.Module, ones: Tensor) -> None:
    """Make a module multiply its output, or a `ResidualSum` its shortcut, by a mask (channels,)."""
    if isinstance(module, ResidualSum):
        module.keep = ones.clone()[:, None, None]
        return
    module.register_buffer(BUFFER, ones.clone()[None, :, None, None])
    # First, so that other hooks see the masked output.
    module.register_forward_hook(multiply_by_mask, prepend=True)
    if "torch._dynamo" in sys.modules:
        # A compiled network does not notice a new hook.
        torch.compiler.reset()


def remove_mask(module: nn.Module) -> None:
    """Remove a module's mask, and the hook that multiplies by it."""
    if isinstance(module, ResidualSum):
        module.keep = None
        return
    del module._buffers[BUFFER]
    for key in [k for k, hook in module._forward_hooks.items() if hook is multiply_by_mask]:
        del module._forward_hooks[key]


def multiply_by_mask(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """Multiply a module's output by its mask: the forward hook that `add_mask` registers."""
    return (output * module.get_buffer(BUFFER)).to(output.dtype)
