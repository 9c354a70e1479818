"""The fastest loop of a run, and its own CUDA stream."""

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from paperlib.devices import switched
from paperlib.extras.fast.convolutions import QuickLoop
from paperlib.extras.fast.graphs import CapturedLoop
from paperlib.loop import PlainLoop


def loop_class(device: torch.device, known: bool, captured: bool) -> type[PlainLoop]:
    """Return the fastest training loop for a device.

    Args:
        device: Where the run trains.
        known: The network is one of `models.MODELS`, which graphs have been tested with.
        captured: The caller allows CUDA graphs.

    Returns:
        `PlainLoop` or a subclass; always `PlainLoop` if the variable PAPERLIB_PLAIN is 1.
    """
    if os.environ.get("PAPERLIB_PLAIN", "0") != "1":
        if device.type == "cuda" and known and captured:
            return CapturedLoop
        if device.type == "cpu":
            return QuickLoop
    return PlainLoop


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Launch work on a CUDA stream, with cuDNN's fastest kernels. Without one, do nothing."""
    with ExitStack() as stack:
        if stream is not None:
            # The device comes first: leaving a stream would otherwise touch the previous device.
            stack.enter_context(torch.cuda.device(stream.device))
            stack.enter_context(torch.cuda.stream(stream))
            stack.enter_context(switched(torch.backends.cudnn, benchmark=True))
        yield


def new_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return a stream for a new run on a CUDA device, or None for another device."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()  # memory of earlier runs, which other processes may need
    return torch.cuda.Stream(device)


def native_bfloat16(device: torch.device) -> bool:
    """Return whether a device computes in bfloat16. Others emulate it, about 100 times slower."""
    if device.type == "cpu":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def warn_if_emulated(precision: str, device: torch.device) -> None:
    """Warn if a device only emulates a precision."""
    if precision == "bfloat16" and not native_bfloat16(device):
        slow = f"this {device.type} only emulates bfloat16, about 100 times slower than float32"
        warnings.warn(slow, stacklevel=4)
