"""A record is of its data and its code: another's is never given in silence."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paperlib.config import Config, FilterPruning
from paperlib.runs import Mismatch, Store, StoreError
from paperlib.store import archive, provenance
from paperlib.store.store import by_identity
from tests.store.helpers import CIFAR10, PRUNED, exported, record, same


def photos(folder: Path, level: int) -> Config:
    """Four grey images, and the configuration of a run on them."""
    for split in ("train", "test"):
        for i, name in enumerate("ab"):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            pixels = np.full((8, 8, 3), level + i, np.uint8)
            Image.fromarray(pixels).save(folder / split / name / "0.png")
    return PRUNED.with_(data=f"images:{folder}")


def checksums(config: Config) -> dict[str, str | None]:
    return {
        "data": provenance.known_checksum(config.data),
        "source": provenance.code_checksum(config),
    }


def refused(store: Store, config: Config, named: str) -> bool:
    """Whether no way of taking a record for a configuration gives it; the error names `named`."""
    uses = (store.read, store.__contains__, lambda c: store.whole([c]), lambda c: store.runs([c]))
    for take in (*uses, lambda c: archive.export(store, store.path / "x.parquet", [c])):
        with pytest.raises(Mismatch) as error:
            take(config)
        assert named in str(error.value)
    found = store.find([config])[config.identity]
    return isinstance(found, Mismatch) and config.identity in store.find([config.identity])


def test_folders_of_one_name(store, tmp_path):
    mine, other = (photos(tmp_path / place / "photos", 50 * len(place)) for place in ("a", "bb"))
    assert mine.identity == other.identity
    original = record(mine, **checksums(mine))
    store.write(original)
    assert same(store.read(mine), original)
    assert refused(store, other, str(tmp_path / "bb"))
    assert same(store.read(mine.identity), original)  # by its name it is just that record
    with pytest.raises(Mismatch):
        store.whole([mine, other])
    with pytest.raises(StoreError, match="photos"):
        by_identity([mine, other])
    assert list(by_identity([mine, mine])) == [mine.identity]
    copy = photos(tmp_path / "copy" / "photos", 50)  # elsewhere, and the same images
    assert same(store.read(copy), original)


def file_instead_of(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("none")


IMAGE, OTHER = "train/a/0.png", "train/a/1.png"
CHANGES = {
    "content": lambda folder: photos(folder, 60),
    "added": lambda folder: shutil.copy(folder / IMAGE, folder / OTHER),
    "removed": lambda folder: (folder / IMAGE).unlink(),
    "renamed": lambda folder: (folder / IMAGE).rename(folder / OTHER),
    "class": lambda folder: (folder / IMAGE).rename(folder / "train/b/2.png"),
    "nothing": shutil.rmtree,
    "a file": file_instead_of,
    "no images": lambda folder: [path.rename(f"{path}.txt") for path in [*folder.rglob("*.png")]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_changed(change, store, tmp_path):
    folder = tmp_path / "photos"
    config = photos(folder, 50)
    store.write(record(config, **checksums(config)))
    assert config in store
    CHANGES[change](folder)
    assert refused(store, config, str(folder))


def test_named_data_need_no_images(store):
    configs = [PRUNED.with_(seed=seed) for seed in range(3)]
    for config, data in zip(configs, (CIFAR10, None, "0" * 32), strict=True):
        store.write(record(config, **({} if data is None else {"data": data})))
    assert store.whole(configs[:2]) == {config.identity for config in configs[:2]}
    assert refused(store, configs[2], "0" * 32)


@pytest.mark.parametrize("named", ["score", "model", "both"])
def test_code_that_changed(named, store, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / f"mine_{named}.py"
    module.write_text("def f(conv):\n    return 1\n")
    spec = f"{module.stem}:f"
    scored = PRUNED.with_(pruning=FilterPruning((0.5,), ((3,),), score=spec))
    both, network = scored.with_(model=spec), PRUNED.with_(model=spec)
    config = {"score": scored, "model": network, "both": both}[named]
    original = record(config, **checksums(config))
    assert original.provenance["source"]
    store.write(original)
    assert same(store.read(config), original)
    module.write_text("def f(conv):\n    return 2\n")
    assert refused(store, config, original.provenance["source"])
    module.write_text("def f(conv):\n    return 1\n")
    assert same(store.read(config), original)


def test_records_that_were_imported(store, tmp_path):
    """An import keeps the checksums, and no folder of the machine it comes from."""
    config = photos(tmp_path / "a" / "photos", 50)
    store.write(record(config, **checksums(config)))
    below = exported(store, tmp_path)
    assert config in below
    assert refused(below, photos(tmp_path / "b" / "photos", 60), str(tmp_path / "b"))
    mine = Store(tmp_path / "mine")
    archive.merge(mine, below.results / "all.parquet")
    assert mine.read(config).config == config.portable


def test_a_link_to_images_is_that_to_which_it_points(tmp_path):
    link, target = tmp_path / "link.zip", tmp_path / "target.zip"
    link.symlink_to(target)
    for level in (20, 90):
        photos(tmp_path / str(level), level)
        archived = shutil.make_archive(str(tmp_path / str(level)), "zip", tmp_path / str(level))
        shutil.copy(archived, target)
        known = provenance.known_checksum(f"images:{archived}", tmp_path)
        assert provenance.known_checksum(f"images:{link}", tmp_path) == known


def test_one_folder_spelled_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    two = [PRUNED.with_(data=f"images:{path}") for path in ("~/my.zip", tmp_path / "my.zip")]
    assert list(by_identity(two)) == [two[0].identity]
