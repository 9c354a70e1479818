"""Faster training with the same numbers, up to rounding. Everything works without it.

`training` asks `loops` for its loop. On a CPU, convolutions of few pixels become products of
matrices (`convolutions`). On a GPU, steps may be replayed as CUDA graphs (`graphs`), and several
runs may share a device (`together`). Importing this imports no torch.
"""

# For worker processes, before they start: glibc reads these once. By default it returns freed
# blocks and asks for them again in every step, and Linux clears their pages of 4 KiB anew.
WORKER_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(2**26),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # pages of 2 MiB, if Linux allows them
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",  # with the default of 8, more streams would wait
}
