"""torch's global switches, changed for a while and then as they were."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_depth = 0  # contexts of `full_float32` that are open now: those of several threads overlap
_switches = ExitStack()  # resets what the first of them has set


@contextmanager
def switched(where: Any, **switches: Any) -> Iterator[None]:
    """These attributes of `where`, as of torch.backends.cudnn, have other values meanwhile."""
    before = {name: getattr(where, name) for name in switches}
    try:
        for name, value in switches.items():
            setattr(where, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(where, name, value)


@contextmanager
def full_float32() -> Iterator[None]:
    """In this context products and convolutions of float32 do not round to TF32 or bfloat16.

    Contexts may be nested, and overlap in threads. The last to end resets the switches. It makes no
    difference by which of torch's two interfaces they were set: from torch 2.9 on the older one
    raises an error where the newer one was used.
    """
    global _depth
    with _lock:
        if _depth == 0:
            _set_full_float32()
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _switches.close()


def _set_full_float32() -> None:
    cudnn, cuda, mkldnn = torch.backends.cudnn, torch.backends.cuda, torch.backends.mkldnn
    if hasattr(cuda.matmul, "fp32_precision"):
        for where in (cudnn.conv, cuda.matmul, mkldnn.conv, mkldnn.matmul):
            if where.fp32_precision not in ("ieee", "none"):
                _switches.enter_context(switched(where, fp32_precision="ieee"))
    else:
        precision = torch.get_float32_matmul_precision()
        _switches.callback(torch.set_float32_matmul_precision, precision)
        torch.set_float32_matmul_precision("highest")
        _switches.enter_context(switched(cudnn, allow_tf32=False))
