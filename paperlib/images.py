"""Images in a folder or an archive: read, checked, decoded once, then cached.

Archives are read in place: nothing is extracted. The layout is train/CLASS/FILE and
test/CLASS/FILE, possibly under one common top folder.
"""

import hashlib
import io
import json
import lzma
import stat
import tarfile
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
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
TENSORS = tuple(f"{split}_{kind}" for split in SPLITS for kind in ("images", "labels"))
BITS_PER_SAMPLE = 258  # a TIFF tag
DAMAGED = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError),
    RuntimeError,  # an encrypted .zip, an unknown compression
)

Decoded = tuple[dict[str, Tensor], tuple[str, ...]]  # tensors by their name in Dataset, classes
Member = tuple[str, bool, Callable[[], bytes]]  # name, whether it is a plain file, its content


class DataError(ValueError):
    """A data set that cannot be had as asked for; one line that says what and why."""


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
    for cache in filter(Path.exists, caches):
        try:
            return _read_cache(cache)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            message = f"{cache} is damaged ({error}); the images are decoded afresh"
            warnings.warn(message, stacklevel=4)
            with suppress(OSError):  # the folder may be read-only
                cache.unlink(missing_ok=True)
    path = find()
    tensors, classes = _decode(read_images(path, checksum), path)
    about = {"crc32": str(_crc32(tensors)), "classes": json.dumps(classes)}
    write_whole(caches[0], save(tensors, about))
    return tensors, classes


def _read_cache(cache: Path) -> Decoded:
    with safe_open(cache, "pt") as file:
        about = file.metadata()
        tensors = {key: file.get_tensor(key) for key in TENSORS}
    if int(about["crc32"]) != _crc32(tensors):
        raise ValueError("its checksum differs")
    return tensors, tuple(json.loads(about["classes"]))


def _crc32(tensors: dict[str, Tensor]) -> int:
    crc = 0
    for _, tensor in sorted(tensors.items()):
        crc = zlib.crc32(tensor.numpy().data, crc)
    return crc


def read_images(path: Path, checksum: str | None = None) -> dict[str, bytes]:
    """Return the image files of a folder or archive, by SPLIT/CLASS/FILE.

    Args:
        path: A folder or an archive.
        checksum: The expected checksum; None accepts every content.

    Raises:
        DataError: There is no such layout, the archive is damaged, or the checksum differs.
    """
    files = {}
    try:
        for name, plain, read in members(path):
            if not plain:
                raise DataError(f"{path}: member {name!r} is a link or a device, not a file")
            if _is_image(name):
                files[name] = read()  # of two of one name the later counts, as if extracted
    except DAMAGED as error:
        raise DataError(f"{path}: cannot be read, truncated or damaged ({error})") from error
    places = _layout(list(files), path)
    files = {places[name]: content for name, content in files.items() if name in places}
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
    """Decode image files, and sort them by split, class and name."""
    parts = sorted(tuple(name.split("/")) for name in files)
    classes = sorted({label for _, label, _ in parts})
    names = ["/".join(part) for part in parts]
    images = [
        decode_image(files[name], f"{source}: {name}")
        for name in tqdm(names, desc=f"decoding {source.name}", unit="image", mininterval=1)
    ]
    for name, image in zip(names, images, strict=True):
        if image.shape != images[0].shape:
            sizes = ["x".join(map(str, s[:0:-1])) for s in (images[0].shape, image.shape)]
            raise DataError(
                f"{source}: images of mixed size: {names[0]} is {sizes[0]}, "
                f"{name} is {sizes[1]} (width x height)"
            )
    tensors = {}
    for split in SPLITS:
        chosen = [i for i, part in enumerate(parts) if part[0] == split]
        stacked = np.ascontiguousarray(np.stack([images[i] for i in chosen]))
        tensors[f"{split}_images"] = torch.from_numpy(stacked)
        tensors[f"{split}_labels"] = torch.tensor([classes.index(parts[i][1]) for i in chosen])
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
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            mode = image.mode
            tags = getattr(image, "tag_v2", {BITS_PER_SAMPLE: (16,)})  # which a TIFF has
            bits = tags.get(BITS_PER_SAMPLE, (8,))[0]
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


def _layout(names: Sequence[str], source: Path) -> dict[str, str]:
    """Return each image's place SPLIT/CLASS/FILE, by its name in the source.

    A backslash separates like /, accents are composed (Unicode NFC), and one common top folder is
    ignored. Files outside train/ and test/ are left out.

    Args:
        names: Of image files.
        source: For messages.

    Raises:
        DataError: The layout is another, or a class is in test/ only.
    """
    parts = {name: _parts(name) for name in names}
    if not any(p[0] in SPLITS for p in parts.values()):
        tops = {p[0] for p in parts.values() if len(p) > 1 and p[1] in SPLITS}
        if len(tops) > 1:
            found = ", ".join(sorted(tops))
            raise DataError(f"{source}: train/ and test/ in more than one folder: {found}")
        parts = {name: p[1:] for name, p in parts.items() if p[0] in tops}
    parts = {name: p for name, p in parts.items() if p[0] in SPLITS}
    classes: dict[str, set[str]] = {split: set() for split in SPLITS}
    seen: dict[tuple[str, ...], str] = {}
    for name, p in parts.items():
        if len(p) != 3:
            raise DataError(f"{source}: {name} is not at {p[0]}/CLASS/FILE")
        if p in seen:
            raise DataError(f"{source}: {seen[p]!r} and {name!r} are both {'/'.join(p)}")
        seen[p] = name
        classes[p[0]].add(p[1])
    for split, labels in classes.items():
        if not labels:
            needed = f"needed: train/CLASS/*, test/CLASS/* of {', '.join(IMAGES)}"
            raise DataError(f"{source}: no images in {split}/ ({needed})")
    if unknown := sorted(classes["test"] - classes["train"]):
        there = ", ".join(sorted(classes["train"]))
        raise DataError(f"{source}: class {unknown[0]!r} is in test/ but not in train/: {there}")
    return {name: "/".join(p) for name, p in parts.items()}


def members(path: Path) -> Iterator[Member]:
    """Iterate over a folder or an archive, in its own order: a compressed one has no other."""
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
                name = info.name + "/" * info.isdir()
                yield name, plain, partial(_content, tar, info)
            # tarfile ends at a damaged or missing header as at the real end, a block of zeros.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it breaks off")
    else:
        raise DataError(f"{path}: not a folder, .zip, {', '.join(TARS)}")


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    assert file is not None  # as of a folder
    return file.read()


def _parts(name: str) -> tuple[str, ...]:
    """Return the parts of a path, for any separator and form of Unicode."""
    return PureWindowsPath(unicodedata.normalize("NFC", name)).parts


def _is_image(name: str) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in _parts(name))
    return not hidden and name.lower().endswith(IMAGES)
