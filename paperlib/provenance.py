"""Where a record or a figure comes from: versions, commit, machine. Imports no torch."""

import platform
import subprocess
import time
from functools import cache
from importlib import metadata
from pathlib import Path

from paperlib import __version__

PACKAGES = ("paperlib", "torch", "torchvision", "numpy")


def version(package: str) -> str:
    """A package's version; ours also where it is not installed, as in a bare checkout."""
    return __version__ if package == "paperlib" else metadata.version(package)


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
