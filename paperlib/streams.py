"""Named streams of randomness, all derived from a run's seed.

There is one stream for each purpose and epoch. Runs that share a seed share their initial weights,
order of images and augmentation, so settings can be compared in pairs. These are drawn on the CPU,
so all devices see the same numbers. A network draws its dropout on the run's device.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def stream(seed: int, name: str, epoch: int = 0) -> int:
    """Return the seed of a named stream."""
    digest = hashlib.sha256(f"{seed}/{name}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def generator(seed: int, name: str, epoch: int = 0) -> torch.Generator:
    """Return a CPU generator at the start of a named stream."""
    return torch.Generator().manual_seed(stream(seed, name, epoch))


@contextmanager
def seeded(seed: int, name: str, epoch: int = 0) -> Iterator[None]:
    """Put torch's global generators at the start of a named stream, and back afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(stream(seed, name, epoch))
        yield
