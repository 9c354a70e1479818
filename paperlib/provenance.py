"""Where a record or a figure comes from: versions, commit, machine, checksums of data and code.

Importing this imports no torch.
"""

import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

from paperlib import __version__

PACKAGES = ("paperlib", "torch", "torchvision", "numpy")
# The content of the named data sets: of CIFAR in binary form its archive's md5, of JPEG images
# `data.images_checksum`, of the digits the first 32 digits of their tensors' sha256.
CHECKSUMS = {
    "digits": "f50368098ec3849434b31573e44bda4a",
    "cifar10": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar10-jpeg": "50ad6748b6e21784d69d60c380dbc30b",
    "cifar100": "03b5dce01913d631647c71ecec9e9cb8",
}


def version(package: str) -> str:
    """A package's version; ours also where it is not installed, as in a bare checkout."""
    return __version__ if package == "paperlib" else metadata.version(package)


@cache
def commit() -> str | None:
    """Return the checkout's commit, with + if files differ from it.

    PAPERLIB_COMMIT replaces it where the code travels without its history, as to a cluster's nodes.
    None outside a checkout.
    """
    if os.environ.get("PAPERLIB_COMMIT"):
        return os.environ["PAPERLIB_COMMIT"]
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


def data_folders(root: str | os.PathLike | None = None) -> list[Path]:
    """The folders to look for data in, first the one to write to: `root`, then PAPERLIB_DATA.

    Without either it is `data` in the run store.
    """
    places = [place for place in (root, os.environ.get("PAPERLIB_DATA")) if place]
    if not places:
        from paperlib import runs

        places = [Path(runs.default_path()) / "data"]
    return list(dict.fromkeys(Path(os.path.expanduser(place)) for place in places))


def files_below(folder: Path) -> list[Path]:
    """Everything in a folder but folders; of a link to a folder the link."""
    found = []
    for parent, folders, files in os.walk(folder):
        found += [Path(parent, name) for name in files]
        found += [Path(parent, name) for name in folders if Path(parent, name).is_symlink()]
    return found


def known_checksum(spec: str, root: str | os.PathLike | None = None) -> str | None:
    """The `checksum` that the data set `spec` has when it is loaded; nothing is downloaded.

    Images at a path are read, not decoded. Their checksum is then remembered in the data folder
    for as long as no file there changes its size or times; what is remembered needs no torch.

    Args:
        spec: as `data.load` takes it.
        root: the data folder, as `data.load` takes it.

    Returns:
        32 hex digits, or None for an unknown data set or a path that does not exist.

    Raises:
        DataError: the images at the path cannot be read, or are not in train/ and test/.
    """
    kind, _, name = spec.partition(":")
    path = Path(os.path.expanduser(name)).absolute()
    if kind != "images" or not name or not path.exists():
        return CHECKSUMS.get(spec)
    files = sorted(files_below(path)) if path.is_dir() else [path]
    states = [(str(f), s.st_size, s.st_mtime_ns, s.st_ctime_ns) for f in files for s in [f.lstat()]]
    state = hashlib.sha256(json.dumps(states).encode()).hexdigest()[:32]
    notes = [folder / f"checksum-{state}.txt" for folder in data_folders(root)]
    for note in notes:
        with suppress(OSError, ValueError):
            (checksum,) = note.read_text().splitlines()
            if len(checksum) == 32:
                return checksum
    from paperlib import data

    checksum = data.images_checksum(data.read_images(path))
    with suppress(OSError):  # the folder may be read-only
        notes[0].parent.mkdir(parents=True, exist_ok=True)
        notes[0].write_text(f"{checksum}\n")
    return checksum


def source_checksum(spec: str) -> str | None:
    """The sha256 of the source file of a function named "package.module:function".

    The module itself is not imported, the packages around it are.

    Args:
        spec: the name of a score or network.

    Returns:
        64 hex digits, or None where `spec` has no ":" or there is no such file.
    """
    module, colon, _ = spec.partition(":")
    if not colon:
        return None
    try:
        found = importlib.util.find_spec(module)
        file = found.origin if found else None
    except (ImportError, ValueError):  # a script, as __main__, has no spec
        file = getattr(sys.modules.get(module), "__file__", None)
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None
    except OSError:  # "built-in" is no file
        return None
