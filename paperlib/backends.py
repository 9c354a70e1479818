"""torch's global switches, changed for a while and then as they were."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


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
    """Products and convolutions of float32 do not round to TF32 or bfloat16 meanwhile.

    Whichever way they were told to: from torch 2.9 on there are two, and the older raises where the
    newer was used.
    """
    cudnn, cuda, mkldnn = torch.backends.cudnn, torch.backends.cuda, torch.backends.mkldnn
    with ExitStack() as stack:
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
