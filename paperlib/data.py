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
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

VALID = "digits, cifar10, cifar100, images:PATH (a folder, .zip, .tar, .tar.gz, .tgz or .tar.xz)"
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
PADDING = 4  # pixels of black on each side, before the random crop
KEPT_BYTES = 256e6  # of normalised images, at most, between passes of an evaluation


class DataError(ValueError):
    """A data set that cannot be had as asked for; one line that says what and why."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test images in memory.

    Images are uint8 (N, C, H, W), labels int64 (N,), indices into `classes`. `mean` and `std` are
    per channel, of pixels scaled to 0..1. Raises DataError where tensors do not fit these.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

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
    - "images:PATH": a folder, .zip, .tar, .tar.gz, .tgz or .tar.xz of train/CLASS/* and
      test/CLASS/* (possibly under one common top folder), all of one size; decoded once, then
      cached in `root`. Hidden files and files that are not images are ignored; links are refused.

    `mean` and `std` of CIFAR are the paper's (arXiv 1906.03728), otherwise measured on the training
    images; images whose classes are CIFAR-10's ten names are CIFAR-10's and get its constants.
    `root` is the variable PAPERLIB_DATA, or else `data` in the run store. Raises DataError.
    """
    kind, _, path = spec.partition(":")
    if spec == "digits":
        return _digits()
    if spec in CIFARS or (kind == "images" and path):
        folder = Path(root) if root is not None else _default_root()
        return _cifar(spec, folder) if spec in CIFARS else _images(Path(path).expanduser(), folder)
    raise DataError(f"unknown data set {spec!r}; there are: {VALID}")


class Batches:
    """Batches of one set of images, made on `device` from tensors held there.

    images: uint8 (N, C, H, W); labels: (N,); mean, std: per channel, of pixels scaled to 0..1;
    augment: crop at random after padding by 4 with black, then flip at random (see `epoch`).
    A batch is x float32 (B, C, H, W), normalised, in channels-last memory format, and y int64 (B,).
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
    ) -> None:
        if size < 1:
            raise ValueError(f"a batch of {size} images; it needs at least 1")
        self.size, self.augment = size, augment
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
        return pixels.float().mul_(self.scale).add_(self.shift).permute(0, 3, 1, 2)


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


def _default_root() -> Path:
    from paperlib import runs

    return Path(os.environ.get("PAPERLIB_DATA") or Path(runs.default_path()) / "data")


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
    return Dataset("digits", *split, classes, *measure(split[0]))


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
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test=("test_batch.bin",),
        names="batches.meta.txt",
        label_bytes=1,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
    ),
    "cifar100": Cifar(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        train=("train.bin",),
        test=("test.bin",),
        names="fine_label_names.txt",
        label_bytes=2,
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
    ),
}


def _cifar(name: str, root: Path) -> Dataset:
    cifar = CIFARS[name]
    archive = _download(name, root)
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
    return Dataset(
        name, *records(cifar.train), *records(cifar.test), classes, cifar.mean, cifar.std
    )


def _download(name: str, root: Path) -> Path:
    """The archive of a CIFAR in `root`, verified, downloaded where it is missing or damaged."""
    from torchvision.datasets.utils import check_integrity, download_url

    cifar = CIFARS[name]
    archive = root / cifar.url.rsplit("/", 1)[-1]
    if check_integrity(archive, cifar.md5):
        return archive
    root.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    with FileLock(f"{archive}.lock"):
        try:
            socket.setdefaulttimeout(
                30
            )  # torchvision sets none: behind some firewalls it would hang
            download_url(cifar.url, root, md5=cifar.md5)
        except (OSError, RuntimeError, HTTPException) as error:
            raise DataError(
                f"{name} could not be downloaded from {cifar.url} ({error}); "
                "without a network pass digits, or images:PATH for a folder or archive of images"
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
    return archive


@dataclass(frozen=True)
class Member:
    """A file in a folder or an archive; `plain` unless it is a link, a device or the like."""

    name: str
    plain: bool
    read: Callable[[], bytes]


def _images(path: Path, root: Path) -> Dataset:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    cache = root / f"images-{_checksum(path)[:32]}.safetensors"
    decoded = _read_cache(cache)
    if decoded is None:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{cache}.lock"):
            decoded = _read_cache(cache)  # another process may have been faster
            if decoded is None:
                decoded = _decode(path)
                _write_cache(cache, *decoded)
    tensors, classes = decoded
    if classes == CIFAR10_CLASSES:
        mean, std = CIFARS["cifar10"].mean, CIFARS["cifar10"].std
    else:
        mean, std = measure(tensors["train_images"])
    return Dataset(f"images:{path.name}", **tensors, classes=classes, mean=mean, std=std)


def _checksum(path: Path) -> str:
    """Of an archive the sha256 of the file; of a folder that of relative paths, sizes, mtimes."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(
        (file.relative_to(path).as_posix(), file.lstat().st_size, file.lstat().st_mtime_ns)
        for file in _files(path)
    )
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _read_cache(cache: Path) -> tuple[dict[str, Tensor], tuple[str, ...]] | None:
    """Tensors and classes, or None where there is no cache or a damaged one, which is removed."""
    if not cache.exists():
        return None
    try:
        with safe_open(cache, "pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in TENSORS}
        if int(metadata["crc32"]) != _crc32(tensors):
            raise ValueError("its checksum differs")
        return tensors, tuple(json.loads(metadata["classes"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        warnings.warn(f"{cache} is damaged ({error}); the images are decoded afresh", stacklevel=4)
        cache.unlink(missing_ok=True)
        return None


def _write_cache(cache: Path, tensors: dict[str, Tensor], classes: tuple[str, ...]) -> None:
    part = cache.with_suffix(f".{os.getpid()}.part")
    metadata = {"classes": json.dumps(classes), "crc32": str(_crc32(tensors))}
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


def _decode(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Every image of a folder or archive: tensors by their name in `Dataset`, and the classes."""
    with _opened(path) as members:
        for member in members:
            _check(member, path)
        # Of two members of one name the later counts, as it would were they extracted.
        members = {member.name: member for member in members if _is_image(member.name)}
        order, labels, classes = layout(list(members), path)
        position = {name: i for i, name in enumerate(order)}
        first, images = None, None
        # In the archive's own order: a compressed one can only be read from front to back.
        members = [member for name, member in members.items() if name in position]
        for member in tqdm(members, desc=f"decoding {path.name}", unit="image", mininterval=1):
            image = decode_image(member.read(), f"{path}: {member.name}")
            if images is None:
                first, images = member.name, np.empty((len(order), *image.shape), np.uint8)
            if image.shape != images.shape[1:]:
                sizes = ["x".join(map(str, s[:0:-1])) for s in (images.shape[1:], image.shape)]
                raise DataError(
                    f"{path}: images of mixed size: {first} is {sizes[0]}, "
                    f"{member.name} is {sizes[1]} (width x height)"
                )
            images[position[member.name]] = image
    images, at = torch.from_numpy(images), len(labels["train"])
    tensors = {"train_images": images[:at], "test_images": images[at:]}
    tensors |= {f"{split}_labels": torch.tensor(labels[split]) for split in SPLITS}
    return tensors, classes


def decode_image(data: bytes, name: str) -> np.ndarray:
    """uint8 (3, H, W) of an image file's bytes; `name` is what a DataError calls it."""
    try:
        with Image.open(io.BytesIO(data), formats=list(FORMATS)) as image:
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except Exception as error:  # Pillow's decoders raise all sorts
        reason = str(error).partition(" <")[0]  # without the address of a buffer
        raise DataError(f"{name} cannot be decoded as an image ({reason})") from error


def layout(
    names: Sequence[str], source: str | os.PathLike
) -> tuple[list[str], dict[str, list[int]], tuple[str, ...]]:
    """What images of `source` are, by their paths train/CLASS/* and test/CLASS/*.

    Returns the paths, all of train before all of test, each by class and name; labels by split in
    that order; and the classes, sorted. What lies in neither train nor test is left out. Raises
    DataError.
    """
    if not names:
        raise DataError(f"{source}: holds no images ({', '.join(IMAGES)})")
    parts = {name: PurePosixPath(name).parts for name in names}
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
    order = sorted(parts, key=lambda name: (SPLITS.index(parts[name][0]), *parts[name][1:]))
    index = {label: i for i, label in enumerate(classes)}
    labels = {
        split: [index[parts[name][1]] for name in order if parts[name][0] == split]
        for split in SPLITS
    }
    return order, labels, tuple(classes)


@contextmanager
def _opened(path: Path) -> Iterator[list[Member]]:
    """The members of a folder or an archive, to be read while this is open."""
    try:
        if path.is_dir():
            yield [
                Member(f.relative_to(path).as_posix(), not f.is_symlink(), f.read_bytes)
                for f in _files(path)
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


def _files(folder: Path) -> list[Path]:
    """Everything in a folder but folders; of a link to a folder the link."""
    found = []
    for parent, folders, files in os.walk(folder):
        found += [Path(parent, name) for name in files]
        found += [Path(parent, name) for name in folders if Path(parent, name).is_symlink()]
    return found


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


def _is_image(name: str) -> bool:
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and name.lower().endswith(IMAGES)
