"""Memory that is freed stays with the process while it trains, where it would go back to Linux.

By default glibc gives large blocks back and asks for them anew in every step; each time Linux has
to map and to clear their pages. And pages are of 4 KiB, where a processor that streams through
tensors is quicker with pages of 2 MiB: those are asked for.
"""

import ctypes
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
KEPT = {MMAP_THRESHOLD: 2**31 - 1, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**26}
USUAL = {MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**26, TOP_PAD: 2**17}  # what glibc grows to itself
RESERVE = 2**30  # bytes of addresses that get huge pages, if and when they are used
PAGE = 2**21
MADV_HUGEPAGE = 14  # of linux/mman.h

_lock = threading.Lock()
_depth = 0  # contexts that are open now: those of runs at once overlap


@cache
def _glibc() -> ctypes.CDLL | None:
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


@contextmanager
def kept() -> Iterator[None]:
    """In this context freed memory is kept for what comes next; after the last it is given back."""
    global _depth
    libc = _glibc()
    if libc is None:
        yield
        return
    with _lock:
        _depth += 1
        if _depth == 1:
            _set(libc, KEPT)
            _ask_for_huge_pages(libc)
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _set(libc, USUAL)
                libc.malloc_trim(0)


def _set(libc: ctypes.CDLL, parameters: dict[int, int]) -> None:
    for parameter, value in parameters.items():
        libc.mallopt(parameter, value)


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """For the next RESERVE bytes of the heap; a wish, that Linux may not grant."""
    block = libc.malloc(RESERVE)
    if block:
        first = -(-block // PAGE) * PAGE
        libc.madvise(first, (block + RESERVE - first) // PAGE * PAGE, MADV_HUGEPAGE)
        libc.free(block)  # untouched, and by KEPT still the heap's
