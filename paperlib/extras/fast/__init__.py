"""Faster training with the same numbers, up to rounding. Everything works without it.

`training` asks here for its loop. On a CPU, convolutions of few pixels become products of matrices
(`convolutions`). On a GPU, steps may be replayed as CUDA graphs (`graphs`), and several runs may
share a device (`together`). Importing this imports no torch.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from paperlib.loop import PlainLoop

# For worker processes, before they start: glibc reads these once. By default it returns freed
# blocks and asks for them again in every step, and Linux clears their pages of 4 KiB anew.
WORKER_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(2**26),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # pages of 2 MiB, if Linux allows them
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",  # with the default of 8, more streams would wait
}


def loop_class(device: torch.device, known: bool, captured: bool) -> type[PlainLoop]:
    """Return the fastest training loop for a device.

    Args:
        device: Where the run trains.
        known: The network is one of `models.MODELS`, which graphs have been tested with.
        captured: The caller allows CUDA graphs.

    Returns:
        `PlainLoop` or a subclass; always `PlainLoop` if the variable PAPERLIB_PLAIN is 1.
    """
    from paperlib.loop import PlainLoop

    if os.environ.get("PAPERLIB_PLAIN", "0") != "1":
        if device.type == "cuda" and known and captured:
            from paperlib.extras.fast.graphs import CapturedLoop

            return CapturedLoop
        if device.type == "cpu":
            from paperlib.extras.fast.convolutions import QuickLoop

            return QuickLoop
    return PlainLoop


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Launch work on a CUDA stream, with the fastest kernels of cuDNN; without one, do nothing."""
    import torch

    from paperlib.devices import switched

    with ExitStack() as stack:
        if stream is not None:
            # The device first: leaving a stream would otherwise touch the previous device.
            stack.enter_context(torch.cuda.device(stream.device))
            stack.enter_context(torch.cuda.stream(stream))
            stack.enter_context(switched(torch.backends.cudnn, benchmark=True))
        yield


def new_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return a stream for a new run on a CUDA device, or None for another device."""
    import torch

    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()  # memory of earlier runs, which other processes may need
    return torch.cuda.Stream(device)


def native_bfloat16(device: torch.device) -> bool:
    """Return whether a device computes in bfloat16; others emulate it some hundred times slower."""
    import torch

    if device.type == "cpu":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def warn_if_emulated(precision: str, device: torch.device) -> None:
    """Warn if a device would only emulate a precision."""
    if precision == "bfloat16" and not native_bfloat16(device):
        slow = f"this {device.type} only emulates bfloat16, about 100 times slower than float32"
        warnings.warn(slow, stacklevel=4)
