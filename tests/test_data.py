"""Data sets, batches and augmentation, against the plainest way to do the same."""

import hashlib
import io
import shutil
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import served

from paperlib import data, images
from paperlib.data import DataError, Dataset

ARCHIVE = Path(__file__).parents[1].parent / "shared" / "data" / "cifar10-jpeg.tar.xz"
HALVES = ("train_images", "train_labels", "test_images", "test_labels")


def same(a: Dataset, b: Dataset) -> bool:
    about, other = ((d.classes, d.mean, d.std, d.checksum) for d in (a, b))
    return about == other and all(torch.equal(getattr(a, h), getattr(b, h)) for h in HALVES)


def encoded(pixels: np.ndarray, suffix: str = "png", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, suffix, **options)
    return file.getvalue()


def png(value: int = 0, size: tuple[int, int] = (4, 4)) -> bytes:
    rng = np.random.default_rng(value)
    return encoded(rng.integers(256, size=(*size[::-1], 3), dtype=np.uint8))


# Two classes, 3 training images and 2 test images of each.
NAMES = [
    f"{split}/{label}/{i}.png"
    for split, count in (("test", 2), ("train", 3))
    for label in ("dog", "cat")
    for i in range(count)
]
FEW = {name: png(i) for i, name in enumerate(NAMES)}


def write(path: Path, files: dict[str, bytes]) -> Path:
    """`files` as a folder, a .zip or a .tar, whatever the name says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    elif ".tar" in path.name or path.suffix == ".tgz":
        compression = {".tar": "", ".xz": "xz"}.get(path.suffix, "gz")
        with tarfile.open(path, f"w:{compression}") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    return path


def load(path: Path, root: Path) -> Dataset:
    return data.load(f"images:{path}", root)


def test_digits(tmp_path):
    digits = data.load("digits", tmp_path)
    assert digits.train_images.shape == (1000, 3, 32, 32)
    assert digits.test_images.shape == (797, 3, 32, 32)
    assert digits.train_labels.bincount().tolist() == [100] * 10
    std, mean = torch.std_mean(digits.train_images.double() / 255, (0, 2, 3), correction=0)
    assert digits.mean == pytest.approx(mean.tolist())
    assert digits.std == pytest.approx(std.tolist())
    everything = torch.cat([digits.train_images, digits.test_images])[:, 0].flatten(1)
    assert len(everything.unique(dim=0)) == 1797  # no test image is a training image
    assert not list(tmp_path.iterdir())
    assert digits.checksum == digits.subset(3).checksum == data.known_checksum("digits")
    content = b"".join(getattr(digits, half).numpy().tobytes() for half in HALVES)
    assert hashlib.sha256(content).hexdigest()[:32] == digits.checksum


def test_subset_is_balanced_nested_and_always_the_same(tmp_path):
    digits = data.load("digits", tmp_path)
    # An image can be told by its pixels.
    train, test = (torch.arange(n).view(-1, 1, 1, 1).view(torch.uint8) for n in (1000, 797))
    numbered = data.replace(digits, train_images=train, test_images=test)

    def members(dataset: Dataset) -> list[int]:
        return dataset.train_images.view(torch.int64).flatten().tolist()

    small, large = numbered.subset(10, 5), numbered.subset(40)
    assert small.train_labels.bincount().tolist() == [10] * 10
    assert small.test_labels.bincount().tolist() == [5] * 10
    assert set(members(small)) < set(members(large))
    assert members(numbered.subset(10)) == members(small) == sorted(members(small))
    assert torch.equal(small.train_labels, digits.train_labels[members(small)])
    assert torch.equal(large.test_images, numbered.test_images)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).tolist()
    zeros = [i for i in order if digits.train_labels[i] == 0]
    assert set(zeros[:10]) < set(members(small))
    few = (101,), "101 training images per class: class '0' has 100"
    for counts, message in (few, ((None, 75), "75 test .* class '8' has 74"), ((0,), "0 training")):
        with pytest.raises(DataError, match=message):
            numbered.subset(*counts)


@pytest.mark.parametrize("spec", ["cifar", "images", "images:", "digits:8", ""])
def test_unknown_data_set(spec, tmp_path):
    with pytest.raises(DataError) as error:
        data.load(spec, tmp_path)
    for word in (repr(spec), "digits", "cifar10", "cifar10-jpeg", "cifar100", "images:PATH"):
        assert word in str(error.value)


FILES = {
    "cifar10": [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"],
    "cifar100": ["train.bin", "test.bin"],
}


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A folder, and the address at which it is served."""
    (tmp_path / "web").mkdir()
    monkeypatch.setenv("no_proxy", "*")
    with served(tmp_path / "web") as address:
        yield tmp_path / "web", address


def fake_cifar(name: str, web: tuple[Path, str], monkeypatch) -> tuple[Path, np.ndarray]:
    """An archive laid out like the real one, with 2 records a file; their pixels."""
    cifar, files = data.CIFARS[name], FILES[name]
    size = len(files), 2, cifar.label_bytes + 3072
    records = np.random.default_rng(0).integers(256, size=size, dtype=np.uint8)
    records[..., : cifar.label_bytes] = 7  # the coarse label
    records[..., cifar.label_bytes - 1] = (0, 1)
    content = {f"top/{file}": part.tobytes() for file, part in zip(files, records, strict=True)}
    content[f"top/{cifar.names}"] = b"apple\nbear\n\n"
    archive = write(web[0] / cifar.url.rsplit("/", 1)[-1], content)
    md5 = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
    fake = data.replace(cifar, url=f"{web[1]}/{archive.name}", md5=md5)
    monkeypatch.setitem(data.CIFARS, name, fake)
    return archive, records[..., cifar.label_bytes :].reshape(-1, 3, 32, 32)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_downloaded_once_and_read(name, web, tmp_path, monkeypatch):
    archive, pixels = fake_cifar(name, web, monkeypatch)
    root = tmp_path / "root"
    first = data.load(name, root)
    archive.unlink()
    assert same(first, data.load(name, root))
    count = len(pixels) - 2
    assert first.classes == ("apple", "bear")
    assert np.array_equal(first.train_images.numpy(), pixels[:count])
    assert np.array_equal(first.test_images.numpy(), pixels[count:])
    assert first.train_labels.tolist() == [0, 1] * (count // 2)
    assert first.mean == data.CIFARS[name].mean
    assert first.checksum == data.CIFARS[name].md5


@pytest.mark.parametrize("harm", [lambda p: p.write_bytes(p.read_bytes()[:-9]), Path.unlink])
def test_cifar_damaged_or_without_a_network(harm, web, tmp_path, monkeypatch):
    harm(fake_cifar("cifar10", web, monkeypatch)[0])
    with pytest.raises(DataError, match=r"^cifar10 could not be .* digits, or images:PATH.*$"):
        data.load("cifar10", tmp_path / "root")


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.tar.xz"])
@pytest.mark.parametrize("top", ["", "images/", "./"])
def test_folder_and_archives_are_the_same(name, top, tmp_path):
    """Archives are read, not extracted: members outside train/ and test/ are nothing."""
    folder = tmp_path / "in"
    expected = load(write(folder / "folder", FEW), folder / "root")
    noise = {"README.md": b"", "__MACOSX/train/cat/9.png": b"", "train/cat/._0.png": b""}
    noise |= {"train/.DS_Store": b"", "train/cat/list.txt": b"", ".git/x.png": b""}
    content = {top + file: content for file, content in (FEW | noise).items()}
    content |= {"../evil.png": png(), "/evil.png": png(), "C:\\evil.png": png()}
    content |= {"train/../../b.png": b""} if not top else {}
    found = load(write(folder / name, content), folder / "root")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert same(found, expected)
    assert found.classes == ("cat", "dog")
    assert found.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.test_labels.tolist() == [0, 0, 1, 1]
    for i, image in enumerate(found.train_images[3:]):
        with Image.open(io.BytesIO(FEW[f"train/dog/{i}.png"])) as file:
            assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(file))
    assert found.mean == pytest.approx((found.train_images / 255).mean((0, 2, 3)).tolist())


def test_cache_is_used_and_follows_its_source(tmp_path, monkeypatch):
    decode, calls = images.decode_image, []
    monkeypatch.setattr(images, "decode_image", lambda *a: calls.append(a[1]) or decode(*a))
    for path in (tmp_path / "a.zip", tmp_path / "folder"):
        root = tmp_path / f"root-{path.stem}"  # one of their own: they share their content
        first = load(write(path, FEW), root)
        assert same(first, load(path, root))
        assert len(calls) == 10
        changed = FEW | {"train/cat/0.png": png(99)}
        assert not same(first, load(write(path, changed), root))
        assert len(calls) == 20
        calls.clear()
        assert not list(root.glob("*.part"))


def test_damaged_cache_is_decoded_afresh(tmp_path):
    path, root = write(tmp_path / "a.zip", FEW), tmp_path / "root"
    first = load(path, root)
    (cache,) = root.glob("images-*.npz")
    whole, pixel = cache.read_bytes(), first.test_images.flatten()[:8].numpy().tobytes()
    place = whole.index(pixel)
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    for damaged in (whole[:-40], flipped, b"something else altogether", b""):
        cache.write_bytes(damaged)
        with pytest.warns(UserWarning, match="is damaged .* decoded afresh"):
            assert same(first, load(path, root))
        assert same(first, load(path, root))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"notes.txt": b""}, "no images in train/"),
        ({k: v for k, v in FEW.items() if "test/" not in k}, "no images in test/"),
        ({k: v for k, v in FEW.items() if "train/" not in k}, "no images in train/"),
        ({f"{i}/{k}": FEW[k] for i in "ab" for k in FEW}, "more than one folder: [ab], [ab]"),
        (FEW | {"train/0.png": png()}, "train/0.png is not at train/CLASS/FILE"),
        (FEW | {"train/cat/more/0.png": png()}, "train/cat/more/0.png is not at train/"),
        (FEW | {"other/train/cat/9.png": png()}, "more than one folder: ., other"),
        (FEW | {"test/cow/0.png": png()}, "'cow' is in test/ but not in train/: cat, dog"),
        (FEW | {"train/cat/9.png": png(size=(5, 4))}, "t/cat/0.png is 4x4, train/cat/9.png is 5x4"),
        (FEW | {"train/cat/bad.png": b"not an image"}, "train/cat/bad.png cannot be decoded"),
        (FEW | {"train/cat/bad.png": png()[:-30]}, "train/cat/bad.png cannot be decoded"),
    ],
    ids=range(11),
)
@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_bad_contents(content, message, name, tmp_path):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as error:
        load(path, tmp_path / "root")
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "root").glob("*.npz"))


def test_missing_and_foreign_paths(tmp_path):
    for name, content, message in (
        ("nowhere.zip", None, "no such file"),
        ("a.rar", b"Rar!", r"not a folder, \.zip, \.tar, "),
        ("a.zip", b"no zip at all", "cannot be read"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: {message}"):
            load(tmp_path / name, tmp_path)


@pytest.mark.parametrize("name", ["folder", "a.zip", "a.tar"])
def test_link_is_refused(name, tmp_path):
    path = write(tmp_path / name, FEW)
    if name == "folder":
        (path / "train" / "cow").symlink_to(tmp_path, target_is_directory=True)
    elif name == "a.zip":
        link = zipfile.ZipInfo("train/cow")
        link.external_attr = 0o120777 << 16
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(link, "/etc")
    else:
        link = tarfile.TarInfo("train/cow")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        with tarfile.open(path, "a") as archive:
            archive.addfile(link)
    with pytest.raises(DataError, match="'train/cow' is a link"):
        load(path, tmp_path / "root")


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tar.xz"])
def test_truncated_archive(name, tmp_path):
    whole = write(tmp_path / name, FEW).read_bytes()
    for share in (0, 0.1, 0.3, 0.45):
        cut = tmp_path / f"cut-{share}{name[1:]}"
        cut.write_bytes(whole[: int(share * len(whole)) // 512 * 512])  # between blocks of a .tar
        with pytest.raises(DataError, match="truncated or damaged"):
            load(cut, tmp_path / "root")
    if name == "a.tar":  # between two members, which is no end
        with tarfile.open(tmp_path / name) as archive:
            end = archive.getmembers()[-1].offset
        cut.write_bytes(whole[:end])
        with pytest.raises(DataError, match="breaks off"):
            load(cut, tmp_path / "root")


@pytest.mark.parametrize("factor", [256, 257])
@pytest.mark.parametrize("suffix", ["png", "tiff", "ppm"])
def test_16_bits_become_8(suffix, factor):
    """Whether 8 bits were widened by a shift or by 257, they come back."""
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found = images.decode_image(encoded(gray.astype(np.uint16) * factor, suffix), "a")
    assert found.dtype == np.uint8
    assert np.array_equal(found, np.stack(3 * [gray]))


PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
ORIENTED = {  # each EXIF orientation, and how its rows and columns are stored (EXIF 2.3, 4.6.4)
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.transpose(1, 0, 2),
    6: PIXELS.transpose(1, 0, 2)[::-1],
    7: PIXELS.transpose(1, 0, 2)[::-1, ::-1],
    8: PIXELS.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("orientation", ORIENTED)
def test_images_are_turned_as_their_exif_says(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    for suffix in ("png", "tiff"):
        file = encoded(np.ascontiguousarray(ORIENTED[orientation]), suffix, exif=exif)
        assert np.array_equal(images.decode_image(file, "a"), PIXELS.transpose(2, 0, 1))


def test_what_is_transparent_is_laid_on_black():
    alpha = np.random.default_rng(1).integers(0, 256, (4, 6, 1), np.uint8)
    expected = (PIXELS * (alpha / 255)).transpose(2, 0, 1)
    found = images.decode_image(encoded(np.concatenate([PIXELS, alpha], 2)), "a")
    assert np.abs(found - expected).max() <= 1
    one = tuple(map(int, PIXELS[1, 2]))
    found = images.decode_image(encoded(PIXELS, transparency=one), "a")
    visible = (one != PIXELS).any(2, keepdims=True)
    assert np.array_equal(found, (PIXELS * visible).transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", ["gif", "png", "tiff", "webp"])
def test_several_frames_are_refused(suffix):
    more = {"save_all": True, "append_images": [Image.fromarray(PIXELS[::-1])]}
    with pytest.raises(DataError, match=r"a\b.* 2 "):
        images.decode_image(encoded(PIXELS, suffix, **more), "a")


@pytest.mark.parametrize(("kind", "mode"), [(np.int32, "I"), (np.float32, "F")])
def test_pixels_without_a_range_are_refused(kind, mode, tmp_path):
    file = encoded(np.ones((4, 4), kind), "tiff")
    path = write(tmp_path / "a.zip", FEW | {"train/cat/7.tif": file})
    with pytest.raises(DataError, match=rf"train/cat/7\.tif .* mode {mode}\b"):
        load(path, tmp_path / "root")


def test_backslashes_and_accents(tmp_path):
    expected = load(write(tmp_path / "folder", FEW), tmp_path / "root")
    windows = {name.replace("/", "\\"): content for name, content in FEW.items()}
    assert same(load(write(tmp_path / "a.zip", windows), tmp_path / "root"), expected)
    cafe = {name.replace("cat", "café"): content for name, content in FEW.items()}
    forms = {"test": "NFC", "train": "NFD"}  # composed, decomposed
    accented = {unicodedata.normalize(forms[k.split("/")[0]], k): x for k, x in cafe.items()}
    for path in (tmp_path / "accents", tmp_path / "accents.tar"):
        found = load(write(path, accented), tmp_path / "root")
        assert found.classes == ("café", "dog")
        assert torch.equal(found.train_images, expected.train_images)
    both = {unicodedata.normalize(form, "train/café/0.png"): png() for form in ("NFC", "NFD")}
    with pytest.raises(DataError, match=r"second image at train/café/0\.png"):
        load(write(tmp_path / "b.zip", accented | both), tmp_path / "root")


def test_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.zip", FEW)
    first = data.load("images:~/a.zip", "~/root")
    assert list((tmp_path / "root").glob("*.npz"))
    assert data.known_checksum("images:~/a.zip", "~/root") == first.checksum
    monkeypatch.setenv("PAPERLIB_DATA", "~/other")
    assert same(first, data.load("images:~/a.zip"))
    assert list((tmp_path / "other").glob("*.npz"))
    assert not (tmp_path / "~").exists()


def plain_checksum(files: dict[str, bytes]) -> str:
    parts = (f"{name}\0{len(files[name])}\0".encode() + files[name] for name in sorted(files))
    return hashlib.sha256(b"".join(parts)).hexdigest()[:32]


@pytest.mark.parametrize("name", ["folder", "a.zip", "a.tar", "a.tar.gz", "a.tar.xz"])
def test_checksum_is_of_the_content_alone(name, tmp_path):
    root, checksum = tmp_path / "root", plain_checksum(FEW)

    def written(place: str, content: dict[str, bytes]) -> str:
        (tmp_path / place).mkdir()
        return f"images:{write(tmp_path / place / name, content)}"

    for order, top in ((sorted(FEW), ""), (sorted(FEW, reverse=True), "top/")):
        content = {top + file: FEW[file] for file in order} | {top + "notes.txt": b"x"}
        spec = written(top or "no top", content)
        assert data.known_checksum(spec, root) == checksum
        found = data.load(spec, root)
        assert found.checksum == found.subset(1, 1).checksum == checksum
    assert len(list(root.glob("*.npz"))) == 1
    first, second = FEW["train/cat/0.png"], FEW["train/cat/1.png"]
    fewer = {k: v for k, v in FEW.items() if k != "test/cat/1.png"}
    changes = {
        "a bit": FEW | {"train/cat/0.png": first[:-1] + bytes([first[-1] ^ 1])},
        "order": FEW | {"train/cat/0.png": second, "train/cat/1.png": first},
        "name": fewer | {"test/cat/9.png": FEW["test/cat/1.png"]},
        "fewer": fewer,
    }
    changed = {data.known_checksum(written(*change), root) for change in changes.items()}
    assert len(changed | {checksum}) == 5


@pytest.fixture
def few_jpegs(monkeypatch) -> dict[str, bytes]:
    """A small stand-in for the public repository's images, with its own checksum."""
    files = {
        f"{split}/{label}/0000.png": png(i)
        for split in ("train", "test")
        for i, label in enumerate(data.CIFAR10_CLASSES)
    }
    monkeypatch.setitem(data.CHECKSUMS, "cifar10-jpeg", plain_checksum(files))
    return files


@pytest.mark.parametrize("name", ["cifar10-jpeg", "cifar10-jpeg.tar.xz", "cifar10-jpeg.zip"])
@pytest.mark.parametrize("place", ["root", "PAPERLIB_DATA"])
def test_jpeg_is_found_verified_and_cached(name, place, few_jpegs, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "JPEG_URL", "nowhere")
    root, folder = tmp_path / "root", tmp_path / place
    folder.mkdir()
    if place != "root":
        monkeypatch.setenv("PAPERLIB_DATA", str(folder))
    path = write(folder / name, few_jpegs)
    found = data.load("cifar10-jpeg", root)
    assert found.name == "cifar10-jpeg"
    assert found.classes == data.CIFAR10_CLASSES
    assert found.mean == data.CIFARS["cifar10"].mean
    assert found.checksum == data.known_checksum("cifar10-jpeg") == plain_checksum(few_jpegs)
    # Once decoded the archive is not needed, also by one who finds the cache in PAPERLIB_DATA.
    path.rename(tmp_path / "away")
    assert same(found, data.load("cifar10-jpeg", root))
    monkeypatch.setenv("PAPERLIB_DATA", str(root))
    assert same(found, data.load("cifar10-jpeg", tmp_path / "third"))


def test_jpeg_is_downloaded(few_jpegs, web, tmp_path, monkeypatch):
    folder, address = web
    monkeypatch.setattr(data, "JPEG_URL", f"{address}/master.zip")
    with pytest.raises(DataError, match=r"^cifar10-jpeg could not be downloaded.*$"):
        data.load("cifar10-jpeg", tmp_path / "root")
    write(folder / "master.zip", {f"CIFAR-10-images-master/{k}": x for k, x in few_jpegs.items()})
    found = data.load("cifar10-jpeg", tmp_path / "root")
    assert found.train_labels.tolist() == list(range(10))
    assert not list((tmp_path / "root").glob("*.part"))


@pytest.mark.skipif(not ARCHIVE.exists(), reason=f"{ARCHIVE.name} is not beside the repository")
def test_cifar10_as_jpeg(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERLIB_DATA", str(ARCHIVE.parent))
    found = data.load("cifar10-jpeg", tmp_path)
    assert found.train_images.shape == (50_000, 3, 32, 32)
    assert found.test_images.shape == (10_000, 3, 32, 32)
    assert found.train_labels.bincount().tolist() == [5000] * 10
    assert found.test_labels.bincount().tolist() == [1000] * 10
    mean, std = data.measure(found.train_images)
    assert mean == pytest.approx(found.mean, abs=1e-3)
    # The paper's std is the mean of the images' own, below that of all pixels.
    assert std == pytest.approx((0.247, 0.243, 0.262), abs=3e-3)
    shutil.rmtree(tmp_path)  # 180 MB
