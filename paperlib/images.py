"""Images in a folder or an archive: read, checked, decoded once, then cached.

Archives are read in place: nothing is extracted. The layout is train/CLASS/FILE and
test/CLASS/FILE, possibly under one common top folder.
"""

import hashlib
import io
import json
import lzma
import os
import stat
import tarfile
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from paperlib.store.provenance import files_below

TARS = (".tar", ".tar.gz", ".tgz", ".tar.xz")
FORMATS = {
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "PPM": (".ppm", ".pgm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
IMAGES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
SPLITS = ("train", "test")
TENSORS = tuple(f"{split}_{kind}" for split in SPLITS for kind in ("images", "labels"))
BITS_PER_SAMPLE = 258  # a TIFF tag

Decoded = tuple[dict[str, Tensor], tuple[str, ...]]  # tensors by their name in Dataset, classes


class DataError(ValueError):
    """A data set that cannot be had as asked for; one line that says what and why."""


@dataclass(frozen=True)
class Member:
    """A file in a folder or an archive; `plain` is False for a link, a device or the like."""

    name: str
    plain: bool
    read: Callable[[], bytes]


def decoded(checksum: str, find: Callable[[], Path], folders: Sequence[Path]) -> Decoded:
    """Return the images with a checksum, from a cache or from their source.

    Args:
        checksum: What `images_checksum` gives for them.
        find: Returns the folder or archive; called only if there is no cache.
        folders: Where caches may be; a new one is written to the first.

    Raises:
        DataError: The source is damaged, or its images are others or cannot be decoded.
    """
    caches = [folder / f"images-{checksum}.safetensors" for folder in folders]
    found = _read_caches(caches, checksum)
    if found is None:
        folders[0].mkdir(parents=True, exist_ok=True)
        with FileLock(f"{caches[0]}.lock"):
            found = _read_caches(caches, checksum)  # another process may have been faster
            if found is None:
                path = find()
                found = _decode(read_images(path, checksum), path)
                _write_cache(caches[0], checksum, *found)
    return found


def _read_caches(caches: Sequence[Path], checksum: str) -> Decoded | None:
    """Return the first whole cache, or None; damaged ones are removed."""
    for cache in filter(Path.exists, caches):
        try:
            with safe_open(cache, "pt") as file:
                metadata = file.metadata()
                tensors = {key: file.get_tensor(key) for key in TENSORS}
            if metadata["checksum"] != checksum or int(metadata["crc32"]) != _crc32(tensors):
                raise ValueError("its checksum differs")
            return tensors, tuple(json.loads(metadata["classes"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            message = f"{cache} is damaged ({error}); the images are decoded afresh"
            warnings.warn(message, stacklevel=4)
            with suppress(OSError):  # the folder may be read-only
                cache.unlink(missing_ok=True)
    return None


def _write_cache(
    cache: Path, checksum: str, tensors: dict[str, Tensor], classes: tuple[str, ...]
) -> None:
    part = cache.with_suffix(f".{os.getpid()}.part")
    crc32 = str(_crc32(tensors))
    metadata = {"checksum": checksum, "crc32": crc32, "classes": json.dumps(classes)}
    try:
        save_file(tensors, part, metadata)
        os.replace(part, cache)
    finally:
        part.unlink(missing_ok=True)


def _crc32(tensors: dict[str, Tensor]) -> int:
    crc = 0
    for _, tensor in sorted(tensors.items()):
        crc = zlib.crc32(tensor.numpy(), crc)
    return crc


def read_images(path: Path, checksum: str | None = None) -> dict[str, bytes]:
    """Return the image files of a folder or archive, by SPLIT/CLASS/FILE.

    Args:
        path: A folder or an archive.
        checksum: The expected checksum; None accepts every content.

    Raises:
        DataError: There is no such layout, the archive is damaged, or the checksum differs.
    """
    with _opened(path) as members:
        for member in members:
            _check(member, path)
        # Of two members of one name the later counts, as it would were they extracted.
        members = {member.name: member for member in members if _is_image(member.name)}
        places = layout(list(members), path)
        # In the archive's own order: a compressed one can only be read from front to back.
        files = {places[n]: member.read() for n, member in members.items() if n in places}
    found = images_checksum(files)
    if checksum not in (None, found):
        raise DataError(
            f"{path}: its images have checksum {found}, not the expected {checksum}; "
            "remove or replace it"
        )
    return files


def images_checksum(files: dict[str, bytes]) -> str:
    """Return 32 hex digits of the sha256 of all paths and contents, in the order of the paths."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode())
        digest.update(files[name])
    return digest.hexdigest()[:32]


def _decode(files: dict[str, bytes], source: Path) -> Decoded:
    """Decode image files, and sort them by class and name."""
    parts = {name: tuple(name.split("/")) for name in files}
    classes = sorted({label for _, label, _ in parts.values()})
    order = {
        split: sorted((n for n in files if parts[n][0] == split), key=parts.get) for split in SPLITS
    }
    position = {name: i for i, name in enumerate(n for split in SPLITS for n in order[split])}
    first, images = None, None
    for name, content in tqdm(
        files.items(), desc=f"decoding {source.name}", unit="image", mininterval=1
    ):
        image = decode_image(content, f"{source}: {name}")
        if images is None:
            first, images = name, np.empty((len(files), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            sizes = ["x".join(map(str, s[:0:-1])) for s in (images.shape[1:], image.shape)]
            raise DataError(
                f"{source}: images of mixed size: {first} is {sizes[0]}, "
                f"{name} is {sizes[1]} (width x height)"
            )
        images[position[name]] = image
    images, at = torch.from_numpy(images), len(order["train"])
    tensors = {"train_images": images[:at], "test_images": images[at:]}
    for split, names in order.items():
        labels = [classes.index(parts[name][1]) for name in names]
        tensors[f"{split}_labels"] = torch.tensor(labels)
    return tensors, tuple(classes)


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decode an image file.

    Of 16 bits the upper 8 are kept, as Pillow does for colour images.

    Args:
        data: The file's bytes.
        name: The file's name in a DataError.

    Returns:
        uint8 (3, H, W).

    Raises:
        DataError: The file is damaged, or its pixels have no fixed range (modes I and F).
    """
    try:
        with Image.open(io.BytesIO(data), formats=list(FORMATS)) as image:
            mode, bits = image.mode, 16
            if image.format == "TIFF":
                bits = image.tag_v2.get(BITS_PER_SAMPLE, (8,))[0]
            # Older versions of Pillow open a PNG or PGM of 16 bits in mode I.
            if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
                gray = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
                return np.stack(3 * [gray])
            if mode not in ("I", "F"):
                return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except Exception as error:  # Pillow's decoders raise all sorts
        reason = str(error).partition(" <")[0]  # without the address of a buffer
        raise DataError(f"{name} cannot be decoded as an image ({reason})") from error
    raise DataError(
        f"{name} has pixels of mode {mode}, of no fixed range: save it with 8 or 16 bits a channel"
    )


def layout(names: Sequence[str], source: str | os.PathLike) -> dict[str, str]:
    """Return each image's place SPLIT/CLASS/FILE, by its name in the source.

    A backslash separates like /, accents are composed (Unicode NFC), and one common top folder is
    ignored. Files outside train/ and test/ are left out.

    Args:
        names: Of image files.
        source: For messages.

    Raises:
        DataError: The layout is another, or a class is in test/ only.
    """
    if not names:
        raise DataError(f"{source}: holds no images ({', '.join(IMAGES)})")
    parts = {name: _parts(name) for name in names}
    if not any(p[0] in SPLITS for p in parts.values()):
        tops = {p[0] for p in parts.values() if p[1:2] and p[1] in SPLITS}
        if len(tops) > 1:
            raise DataError(
                f"{source}: train/ and test/ in more than one folder: {', '.join(sorted(tops))}"
            )
        parts = {name: p[1:] for name, p in parts.items() if p[0] in tops}
    parts = {name: p for name, p in parts.items() if p[0] in SPLITS}
    for split in SPLITS:
        if not any(p[0] == split for p in parts.values()):
            raise DataError(
                f"{source}: no images in {split}/ (needed: train/CLASS/*, test/CLASS/*)"
            )
    for name, p in parts.items():
        if len(p) != 3:
            raise DataError(f"{source}: {name} is not at {p[0]}/CLASS/FILE")
    classes = sorted({p[1] for p in parts.values() if p[0] == "train"})
    for split, label, _ in parts.values():
        if label not in classes:
            raise DataError(
                f"{source}: class {label!r} is in {split}/ but not in train/: {', '.join(classes)}"
            )
    names = {p: name for name, p in parts.items()}
    for name, p in parts.items():
        if names[p] != name:
            raise DataError(f"{source}: {name!r} and {names[p]!r} are both {'/'.join(p)}")
    return {name: "/".join(p) for name, p in parts.items()}


@contextmanager
def _opened(path: Path) -> Iterator[list[Member]]:
    """List the members of a folder or an archive, to be read within this context."""
    try:
        if path.is_dir():
            yield [
                Member(f.relative_to(path).as_posix(), not f.is_symlink(), f.read_bytes)
                for f in files_below(path)
            ]
        elif path.name.lower().endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                yield [
                    Member(
                        info.filename,
                        not stat.S_ISLNK(info.external_attr >> 16),
                        lambda info=info: archive.read(info),
                    )
                    for info in archive.infolist()
                ]
        elif path.name.lower().endswith(TARS):
            with tarfile.open(path) as archive:
                yield [
                    Member(
                        info.name + "/" * info.isdir(),
                        info.isreg() or info.isdir(),
                        lambda info=info: archive.extractfile(info).read(),
                    )
                    for info in _tar_members(archive)
                ]
        else:
            raise DataError(f"{path}: not a folder, .zip, {', '.join(TARS)}")
    except (
        *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError),
        RuntimeError,  # an encrypted .zip, an unknown compression
    ) as error:
        raise DataError(f"{path}: cannot be read, truncated or damaged ({error})") from error


def _tar_members(archive: tarfile.TarFile) -> list[tarfile.TarInfo]:
    members = archive.getmembers()
    # tarfile ends at a damaged or missing header as at the real end, a block of zeros.
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it breaks off after {len(members)} members")
    return members


def _check(member: Member, source: Path) -> None:
    """Refuse a member that is outside the archive's folder, or no plain file."""
    name = PureWindowsPath(member.name)  # which also takes / for a separator
    if name.anchor or ".." in name.parts:
        raise DataError(f"{source}: member {member.name!r} lies outside the archive")
    if not member.plain:
        raise DataError(f"{source}: member {member.name!r} is a link or a device, not a file")


def _parts(name: str) -> tuple[str, ...]:
    """Return the parts of a path, for any separator and form of Unicode."""
    return PureWindowsPath(unicodedata.normalize("NFC", name)).parts


def _is_image(name: str) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in _parts(name))
    return not hidden and name.lower().endswith(IMAGES)
