"""Where a record or a figure comes from: versions, commit, machine. Imports no torch."""

import platform
import subprocess
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("paperlib", "torch", "torchvision", "numpy")


@cache
def commit() -> str | None:
    """The checkout's commit, with + where files differ from it; None outside a checkout."""
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        git += ["describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(device: str, processor: str, threads: int) -> dict[str, object]:
    """Versions, machine and time of now, for a record."""
    return {
        "device": device,
        "processor": processor or platform.processor() or platform.machine(),
        "threads": threads,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "commit": commit(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
