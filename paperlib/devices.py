"""Choose devices, and set torch's global switches for a while."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# torch's switches and global generators, and torch.fx's tracing, belong to the process: threads
# take turns.
one_at_a_time = threading.RLock()


def choose_device(name: str = "auto") -> torch.device:
    """Return a device by name.

    Args:
        name: "auto" for the first available of cuda, mps, cpu; or "cuda", "cuda:1", "mps", "cpu".

    Raises:
        ValueError: There is no such device here.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available[:0] = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise ValueError(f"no device {name!r} here: one of auto, {', '.join(available)}")
    return torch.device(name)


def memory_format(device: torch.device, precision: str) -> torch.memory_format:
    """Return the memory format of images and weights that trains fastest on a device.

    cuDNN has most float32 kernels for channels-first, and would convert around each of them.
    """
    planar = device.type == "mps" or (device.type == "cuda" and precision == "float32")
    return torch.contiguous_format if planar else torch.channels_last


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context of a forward pass in a precision, "float32" or "bfloat16".

    On a GPU converted weights are not kept: a CUDA graph must convert them itself.
    """
    enabled, kept = precision == "bfloat16", device.type != "cuda"
    return torch.autocast(device.type, torch.bfloat16, enabled, cache_enabled=kept)


@contextmanager
def switched(where: Any, **switches: Any) -> Iterator[None]:
    """Give attributes of `where`, for example torch.backends.cudnn, other values for a while."""
    before = {name: getattr(where, name) for name in switches}
    try:
        for name, value in switches.items():
            setattr(where, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(where, name, value)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Compute attention without fused kernels: they have no second derivative and no count."""
    attention = torch.backends.mha
    with ExitStack() as stack:
        stack.callback(attention.set_fastpath_enabled, attention.get_fastpath_enabled())
        attention.set_fastpath_enabled(False)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 products and convolutions in full, without rounding to TF32 or bfloat16.

    Threads take turns. This handles both of torch's interfaces, because from torch 2.9 on the older
    one raises an error if the newer one was used.
    """
    backends: Any = torch.backends
    cudnn, cuda, mkldnn = backends.cudnn, backends.cuda, backends.mkldnn
    with one_at_a_time, ExitStack() as stack:
        if hasattr(cuda.matmul, "fp32_precision"):
            for where in (cudnn.conv, cuda.matmul, mkldnn.conv, mkldnn.matmul):
                if where.fp32_precision not in ("ieee", "none"):
                    stack.enter_context(switched(where, fp32_precision="ieee"))
        else:
            precision = torch.get_float32_matmul_precision()
            stack.callback(torch.set_float32_matmul_precision, precision)
            torch.set_float32_matmul_precision("highest")
            stack.enter_context(switched(cudnn, allow_tf32=False))
        yield
