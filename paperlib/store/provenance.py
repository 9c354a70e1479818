"""The origin of a record or a figure: versions, commit, machine, checksums of data and code.

Imports no torch.
"""

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

from paperlib import __version__
from paperlib.config import Config
from paperlib.store.code import code_checksum, source_checksum
from paperlib.store.paths import data_folders

PACKAGES = ("paperlib", "torch", "torchvision", "numpy")
# Checksums of the named data sets: the md5 of CIFAR's binary archives, `data.images_checksum` of
# the JPEG images, and 32 digits of the sha256 of the digits' tensors.
CHECKSUMS = {
    "digits": "f50368098ec3849434b31573e44bda4a",
    "cifar10": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar10-jpeg": "50ad6748b6e21784d69d60c380dbc30b",
    "cifar100": "03b5dce01913d631647c71ecec9e9cb8",
}


def version(package: str) -> str:
    """Return a package's version. For paperlib this works without an installation, too."""
    return __version__ if package == "paperlib" else metadata.version(package)


@cache
def commit() -> str | None:
    """Return the checkout's commit, with + if files differ from it; None outside a checkout.

    PAPERLIB_COMMIT replaces it, for code that is copied to a cluster's nodes without its history.
    """
    if os.environ.get("PAPERLIB_COMMIT"):
        return os.environ["PAPERLIB_COMMIT"]
    try:
        root = Path(__file__).resolve().parents[2]
        if not (root / ".git").exists():
            return None
        git = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(device: str, processor: str, threads: int) -> dict[str, object]:
    """Return versions, machine and the present time, for a record."""
    return {
        "device": device,
        "processor": processor or platform.processor() or platform.machine(),
        "threads": threads,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "commit": commit(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def files_below(folder: Path) -> list[Path]:
    """Return everything below a folder except folders. Links to folders are not followed."""
    found = []
    for parent, folders, files in os.walk(folder):
        found += [Path(parent, name) for name in files]
        found += [Path(parent, name) for name in folders if Path(parent, name).is_symlink()]
    return found


def known_checksum(spec: str, root: str | os.PathLike | None = None) -> str | None:
    """Return the checksum that the data set `spec` has when it is loaded. Nothing is downloaded.

    Images at a path are read, not decoded. Their checksum is then kept in the data folder, and used
    until a file of theirs changes its size or times. A kept checksum needs no torch.

    Args:
        spec: As for `data.load`.
        root: The data folder, as for `data.load`.

    Returns:
        32 hex digits, or None for an unknown data set or a path that does not exist.

    Raises:
        ValueError: The images at the path cannot be read, or are not in train/ and test/.
    """
    path = images_path(spec)
    if path is None or not path.exists():
        return CHECKSUMS.get(spec)
    files = sorted(files_below(path)) if path.is_dir() else [path]
    stats = [(f, f.stat() if f == path else f.lstat()) for f in files]  # `path` may be a link
    states = [(str(f), s.st_size, s.st_mtime_ns, s.st_ctime_ns) for f, s in stats]
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


def images_path(spec: str) -> Path | None:
    """Return the path of "images:PATH"; None for other data sets."""
    kind, _, path = spec.partition(":")
    return Path(path).expanduser().absolute() if kind == "images" and path else None


def comparison(
    root: str | os.PathLike,
) -> Callable[[Config, Mapping[str, Any]], str | None]:
    """Return a function that tells how a run's data and code differ from those of its record.

    It takes the run's configuration and the record's provenance, and returns None if nothing
    differs. Only checksums that both sides know are compared. Each is computed once.

    Args:
        root: The data folder, as for `data.load`.
    """
    data_of, code_of = cache(partial(known_checksum, root=root)), cache(source_checksum)

    def difference(config: Config, then: Mapping[str, Any]) -> str | None:
        path = images_path(config.data)
        if path is not None and not path.exists():
            return (
                f"there are no images at {path}; records of another {path.name!r} are used only if "
                "the path exists and holds the same images"
            )
        try:
            now = {"data": data_of(config.data), "source": code_checksum(config, code_of)}
        except ValueError as error:
            return str(error)
        names = {"data": f"data {config.data!r}", "source": "code of its network or score"}
        for key, name in names.items():
            if then.get(key) and now[key] and then[key] != now[key]:
                return (
                    f"it was made with other {name}: checksum {then[key]}, now {now[key]}. Keep it "
                    "and give what changed a new name, or train the run anew in its place: "
                    "sweep.collect(..., retrain_changed=True), paperlib sweep --retrain-changed"
                )
        return None

    return difference
