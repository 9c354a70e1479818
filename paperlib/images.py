"""Images in a folder or an archive: read, checked, decoded once, then cached.

Archives are read in place: nothing is extracted. The layout is train/CLASS/FILE and
test/CLASS/FILE, possibly under one common top folder.
"""

import hashlib
import io
import lzma
import stat
import tarfile
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from paperlib.store.provenance import files_below
from paperlib.store.records import write_whole

TARS = (".tar", ".tar.gz", ".tgz", ".tar.xz")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
IMAGES = (
    *(".bmp", ".gif", ".jpg", ".jpeg", ".png"),
    *(".ppm", ".pgm", ".tif", ".tiff", ".webp"),
)
SPLITS = ("train", "test")
BITS_PER_SAMPLE = 258  # a TIFF tag
DAMAGED = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError),
    RuntimeError,  # an encrypted .zip, an unknown compression
)

Decoded = tuple[dict[str, Tensor], tuple[str, ...]]  # tensors by their name in Dataset, classes


class DataError(ValueError):
    """A data set cannot be loaded. The message is one line that names it and the reason."""


def decoded(checksum: str, find: Callable[[], Path], folders: Sequence[Path]) -> Decoded:
    """Return the images with a checksum, from a cache or from their source.

    Args:
        checksum: The result of `images_checksum` for these images.
        find: Returns the folder or archive. It is called only if no cache can be read.
        folders: Folders that may hold caches. A new cache is written to the first.

    Raises:
        DataError: The source is damaged, or its images are others or cannot be decoded.
        StoreError: The new cache cannot be written.
    """
    caches = [folder / f"images-{checksum}.npz" for folder in folders]
    for cache in filter(Path.exists, caches):
        try:
            with np.load(cache) as file:  # this compares the checksums of all arrays
                arrays = dict(file)
            classes = tuple(arrays.pop("classes").tolist())
            return {name: torch.from_numpy(array) for name, array in arrays.items()}, classes
        except (*DAMAGED, KeyError, ValueError) as error:
            message = f"{cache} is damaged ({error}); the images are decoded afresh"
            warnings.warn(message, stacklevel=4)
            with suppress(OSError):  # the folder may be read-only
                cache.unlink(missing_ok=True)
    path = find()
    tensors, classes = _decode(read_images(path, checksum), path)
    saved: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    content = io.BytesIO()
    np.savez(content, classes=np.array(classes), **saved)
    write_whole(caches[0], content.getvalue())
    return tensors, classes


def read_images(path: Path, checksum: str | None = None) -> dict[str, bytes]:
    """Return the image files of a folder or archive, by SPLIT/CLASS/FILE.

    A backslash counts as a slash, and accents are composed (Unicode NFC). Hidden files, other files
    and images outside train/ and test/ are left out.

    Args:
        path: A folder or an archive.
        checksum: The expected checksum; None accepts every content.

    Raises:
        DataError: The layout is another, there are links, the archive is damaged, or the checksum
            differs.
    """
    files: dict[str, bytes] = {}
    tops: set[str] = set()
    try:
        for name, plain, read in members(path):
            parts = PureWindowsPath(unicodedata.normalize("NFC", name)).parts
            hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
            if not plain:
                raise DataError(f"{path}: member {name!r} is a link or a device, not a file")
            if hidden or not name.lower().endswith(IMAGES) or not set(SPLITS) & set(parts):
                continue
            if len(parts) < 3 or parts[-3] not in SPLITS:
                raise DataError(f"{path}: {name} is not at train/CLASS/FILE or test/CLASS/FILE")
            tops.add("/".join(parts[:-3]) or ".")
            if len(tops) > 1:
                found = ", ".join(sorted(tops))
                raise DataError(f"{path}: train/ and test/ in more than one folder: {found}")
            place = "/".join(parts[-3:])
            if place in files:
                raise DataError(f"{path}: {name!r} is the second image at {place}")
            files[place] = read()
    except DAMAGED as error:
        raise DataError(f"{path}: cannot be read, truncated or damaged ({error})") from error
    _check_classes(files, path)
    found = images_checksum(files)
    if checksum not in (None, found):
        raise DataError(
            f"{path}: its images have checksum {found}, not the expected {checksum}; "
            "remove or replace it"
        )
    return files


def _check_classes(files: Iterable[str], source: Path) -> None:
    """Raise DataError unless there are images in both splits, and test/ has no class of its own."""
    train, test = (
        {label for part, label, _ in (name.split("/") for name in files) if part == split}
        for split in SPLITS
    )
    for split, labels in (("train", train), ("test", test)):
        if not labels:
            needed = f"needed: train/CLASS/*, test/CLASS/* of {', '.join(IMAGES)}"
            raise DataError(f"{source}: no images in {split}/ ({needed})")
    if unknown := sorted(test - train):
        there = ", ".join(sorted(train))
        raise DataError(f"{source}: class {unknown[0]!r} is in test/ but not in train/: {there}")


def images_checksum(files: dict[str, bytes]) -> str:
    """Return 32 hex digits of the sha256 of all paths and contents, in the order of the paths."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode())
        digest.update(files[name])
    return digest.hexdigest()[:32]


def _decode(files: dict[str, bytes], source: Path) -> Decoded:
    """Decode image files, and sort them by split, class and name."""
    places = sorted(tuple(name.split("/")) for name in files)
    classes = sorted({label for _, label, _ in places})
    images: dict[str, np.ndarray] = {}
    for place in tqdm(places, desc=f"decoding {source.name}", unit="image", mininterval=1):
        name = "/".join(place)
        images[name] = decode_image(files[name], f"{source}: {name}")
        first = next(iter(images))
        if images[name].shape != images[first].shape:
            sizes = ["x".join(map(str, images[n].shape[:0:-1])) for n in (first, name)]
            raise DataError(
                f"{source}: images of mixed size: {first} is {sizes[0]}, {name} is {sizes[1]} "
                "(width x height)"
            )
    tensors = {}
    for split in SPLITS:
        chosen = [place for place in places if place[0] == split]
        stacked = np.ascontiguousarray(np.stack([images["/".join(place)] for place in chosen]))
        tensors[f"{split}_images"] = torch.from_numpy(stacked)
        tensors[f"{split}_labels"] = torch.tensor([classes.index(label) for _, label, _ in chosen])
    return tensors, tuple(classes)


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decode an image file.

    It is turned as its EXIF orientation says. What is transparent is laid on black. Of 16 bits the
    upper 8 are kept, as Pillow keeps them of colour images.

    Args:
        data: The file's bytes.
        name: The file's name in a DataError.

    Returns:
        uint8 (3, H, W).

    Raises:
        DataError: The file is damaged or has several frames, or its pixels have no fixed range
            (modes I and F).
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            mode, frames = image.mode, getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # a JPEG with a preview
                raise ValueError(f"it has {frames} frames")
            ImageOps.exif_transpose(image, in_place=True)
            # Older versions of Pillow open a PNG or PGM of 16 bits in mode I.
            if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
                bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]
                return np.stack(3 * [(np.asarray(image) >> (bits - 8)).astype(np.uint8)])
            if mode not in ("I", "F"):
                shown: Image.Image = image
                if mode.upper().endswith("A") or "transparency" in image.info:
                    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
                    shown = Image.alpha_composite(black, image.convert("RGBA"))
                return np.asarray(shown.convert("RGB")).transpose(2, 0, 1)
    except Exception as error:  # Pillow's decoders raise all sorts
        reason = str(error).partition(" <")[0]  # without the address of a buffer
        raise DataError(f"{name} cannot be decoded as an image ({reason})") from error
    raise DataError(
        f"{name} has pixels of mode {mode}, of no fixed range: save it with 8 or 16 bits a channel"
    )


def members(path: Path) -> Iterator[tuple[str, bool, Callable[[], bytes]]]:
    """Iterate over a folder or an archive in its own order. A compressed one allows no other.

    Yields:
        A member's name, whether it is a plain file or folder, and a function that reads it.

    Raises:
        DataError: The path is neither.
    """
    if path.is_dir():
        for file in files_below(path):
            yield file.relative_to(path).as_posix(), not file.is_symlink(), file.read_bytes
    elif path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                plain = not stat.S_ISLNK(entry.external_attr >> 16)
                yield entry.filename, plain, partial(archive.read, entry)
    elif path.name.lower().endswith(TARS):
        with tarfile.open(path) as tar:
            for info in tar:
                plain = info.isreg() or info.isdir()
                yield info.name + "/" * info.isdir(), plain, partial(_content, tar, info)
            # tarfile stops at a damaged or missing header as at the real end, a block of zeros.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it breaks off")
    else:
        raise DataError(f"{path}: not a folder, .zip, {', '.join(TARS)}")


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    assert file is not None  # as of a folder
    return file.read()
