"""Memory that stays with the process while it trains."""

import subprocess
import sys
from pathlib import Path

import pytest

from paperlib import memory

FAULTS = """
import resource, sys
import torch
from paperlib import memory
from contextlib import nullcontext

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        tensors = [torch.ones(12_000_000) for _ in range(3)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return 4096 * int(file.read().split()[1])

way = memory.kept if sys.argv[1] == "kept" else nullcontext
with way():
    with way():  # of runs at once, one that is over
        faults()
    print(faults())
print(resident())
"""


@pytest.mark.skipif(memory._glibc() is None, reason="needs glibc")
def test_pages_are_kept_and_given_back():
    faults, resident = {}, {}
    for how in ("kept", "usual"):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True
        )
        faults[how], resident[how] = map(int, done.stdout.split())
    assert faults["kept"] < 1000
    assert faults["usual"] > 10 * faults["kept"]
    assert resident["kept"] < resident["usual"] + 50e6


HUGE = """
import torch
from paperlib import memory

def huge_pages_wished_for():
    kib = size = 0
    with open("/proc/self/smaps") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name == "Size":
                size = int(rest.split()[0])
            elif name == "VmFlags" and "hg" in rest.split():
                kib += size
    return kib

before = huge_pages_wished_for()
with memory.kept():
    tensor = torch.ones(12_000_000)
    print(huge_pages_wished_for() - before)
    del tensor
print(huge_pages_wished_for() - before)
"""


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists() or memory._glibc() is None,
    reason="needs glibc and a Linux with huge pages",
)
def test_huge_pages_are_asked_for():
    done = subprocess.run([sys.executable, "-c", HUGE], check=True, capture_output=True, text=True)
    within, after = map(int, done.stdout.split())
    assert within > 0.9 * memory.RESERVE / 1024
    assert after < 0.2 * within


def test_elsewhere_it_does_nothing(monkeypatch):
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with memory.kept():
        pass
    with pytest.raises(KeyError), memory.kept():
        raise KeyError
