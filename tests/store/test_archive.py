"""Many runs in one file, imports, and the removal of leftovers."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from paperlib.runs import DamagedRecord, Store, StoreError
from paperlib.store import archive, checkpoints
from tests.store.helpers import PRUNED, record, same

RUN = PRUNED.identity
DATA = Path(__file__).parent / "data"  # written by version 0.1.0: a file of runs, and records


@pytest.fixture
def below(tmp_path) -> Store:
    """A store with nothing of its own, above a file of three runs."""
    other = Store(tmp_path / "other", tmp_path / "none")
    for seed in range(3):
        other.write(record(PRUNED.with_(seed=seed), arrays=seed != 1))
    assert archive.export(other, tmp_path / "results" / "all.parquet") == 3
    return Store(tmp_path / "runs", tmp_path / "results")


# The layer below


def test_results_are_found(below):
    assert RUN in below
    assert len(below.identities()) == len(below.runs()) == 3
    for seed in range(3):
        config = PRUNED.with_(seed=seed)
        assert same(below.read(config), record(config, arrays=seed != 1))
    assert not below.path.exists()


def test_the_store_goes_before_results(below):
    ours = record(PRUNED.with_(seed=9))
    ours.config = PRUNED
    below.write(ours)
    assert same(below.read(RUN), ours)
    path = below.path / "records" / f"{RUN}.parquet"
    path.write_bytes(bytes(path.stat().st_size))
    assert same(below.read(RUN), record())


@pytest.mark.parametrize("how", ["cut", "zeros", "flipped"])
@pytest.mark.filterwarnings("ignore:.*left out:UserWarning")
def test_damaged_results_are_left_out(below, how):
    path, refusals = below.results / "all.parquet", 0
    content = path.read_bytes()
    for tenth in range(10):
        damage = bytearray(content)
        cut = len(content) * tenth // 10 + 7
        if how == "flipped":
            damage[cut] ^= 0x10
        else:
            damage[cut:] = b"" if how == "cut" else bytes(len(content) - cut)
        path.write_bytes(damage)
        for seed in range(3):
            config = PRUNED.with_(seed=seed)
            try:
                assert same(below.read(config), record(config, arrays=seed != 1))
            except (KeyError, DamagedRecord):
                refusals += 1
    assert refusals >= (3 if how == "flipped" else 30)


def test_damaged_results_are_named(below):
    path = below.results / "all.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.warns(UserWarning, match="all.parquet"):
        assert RUN not in below


def test_an_exported_file_is_a_tidy_frame(below):
    frame = pd.read_parquet(below.results / "all.parquet")
    for seed in range(3):
        config = PRUNED.with_(seed=seed)
        mine = frame[frame.run == config.identity]
        assert mine.post.tolist() == record(config).epochs.post.tolist()
        assert json.loads(mine.about.dropna().item())["config"].get("seed", 0) == seed


def test_columns_that_differ_between_runs(tmp_path):
    store, configs = Store(tmp_path / "a", tmp_path), [PRUNED.with_(seed=seed) for seed in range(4)]
    for config, kind in zip(configs, (np.int32, np.float32, bool, None), strict=True):
        one = record(config)
        if kind is not None:
            one.epochs["removed"] = one.epochs.removed.astype(kind if kind is not bool else int)
            one.epochs[f"only {kind.__name__}"] = one.epochs.removed.astype(kind)
        store.write(one)
    archive.export(store, tmp_path / "out" / "all.parquet")
    back = Store(tmp_path / "b", tmp_path / "out")
    for config in configs:
        assert same(back.read(config), store.read(config))


def test_an_export_without_arrays(below, tmp_path):
    thin = tmp_path / "thin" / "all.parquet"
    archive.export(below, thin, arrays=False)
    read = Store(tmp_path / "empty", thin.parent).read(RUN)
    pd.testing.assert_frame_equal(read.epochs, record().epochs)
    with pytest.raises(StoreError, match=RUN):
        read.arrays["eigenvalues"]
    mine = Store(tmp_path / "mine", tmp_path / "none")
    assert archive.merge(mine, thin).outcome.tolist() == ["new"] * 3
    assert RUN in mine
    whole = archive.merge(mine, below.results / "all.parquet").set_index("run").outcome
    assert whole[RUN] == "better"
    assert whole[PRUNED.with_(seed=1).identity] == "same"
    assert same(mine.read(RUN), record())
    assert archive.merge(mine, thin).outcome.tolist() == ["same"] * 3
    assert same(mine.read(RUN), record())


def test_an_export_names_no_folder_of_this_machine(tmp_path):
    config = PRUNED.with_(data=f"images:{tmp_path}/pictures.zip")
    store = Store(tmp_path / "mine", tmp_path)
    store.write(record(config))
    archive.export(store, tmp_path / "out" / "all.parquet")
    assert str(tmp_path).encode() not in (tmp_path / "out" / "all.parquet").read_bytes()
    read = Store(tmp_path / "empty", tmp_path / "out").read(config.identity)
    assert read.config == config.portable
    assert read.config.data == "images:pictures.zip"


def test_nothing_to_export(tmp_path):
    with pytest.raises(StoreError, match=str(tmp_path)):
        archive.export(Store(tmp_path, tmp_path), tmp_path / "x.parquet")


# Imports


def test_merging_keeps_what_is_better_or_different(below, tmp_path):
    store = Store(tmp_path / "mine", tmp_path / "none")
    different = record(PRUNED.with_(seed=9))
    different.config = PRUNED
    short = record(PRUNED.with_(seed=1), arrays=False)
    short.epochs = short.epochs[:10]
    damaged = record(PRUNED.with_(seed=0))
    for one in (different, short, damaged):
        store.write(one)
    (store.path / "records" / f"{damaged.run}.parquet").write_bytes(b"half")
    outcome = archive.merge(store, below.results / "all.parquet").set_index("run").outcome
    assert outcome[RUN] == "different"
    assert outcome[short.run] == "better"
    assert outcome[damaged.run] == "mended"
    assert same(store.read(RUN), different)
    assert same(store.read(short.run), record(PRUNED.with_(seed=1), arrays=False))
    assert same(store.read(damaged.run), damaged)
    # From a store to another: a damaged record is not taken.
    other = Store(tmp_path / "third", tmp_path / "none")
    (store.path / "records" / f"{damaged.run}.npz").write_bytes(b"")
    outcome = archive.merge(other, store.path).set_index("run").outcome
    assert outcome[damaged.run].startswith("damaged: ")
    assert sorted(other.own()) == sorted({RUN, short.run})


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_files_that_cannot_be_imported(tmp_path, content):
    store, path = Store(tmp_path / "a"), tmp_path / "some.parquet"
    if content is None:
        pd.DataFrame({"a": [1]}).to_parquet(path)
    else:
        path.write_bytes(content)
    for source in (path, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StoreError, match=str(source)):
            archive.merge(store, source)


def expected_of_version_0_1_0(seed: int) -> tuple[list[float], list[float] | None]:
    post = [20.0 + epoch - seed for epoch in range(4)]
    return post, None if seed == 1 else [x / 4 + seed for x in range(5)]


@pytest.mark.parametrize("source", ["exported-0.1.0.parquet", ".", "results"])
def test_records_of_version_0_1_0(source, tmp_path):
    """An exported file and a store; imported, or as the layer below."""
    store = Store(tmp_path / "runs", DATA if source == "results" else tmp_path / "none")
    seeds = [1, 2] if source == "." else [0, 1, 2]
    if source != "results":
        assert archive.merge(store, DATA / source).outcome.tolist() == ["new"] * len(seeds)
    read = {one.config.seed: one for one in store.records()}
    assert sorted(read) == seeds
    for seed, one in read.items():
        post, eigenvalues = expected_of_version_0_1_0(seed)
        assert one.epochs.post.tolist() == post
        assert one.epochs.train_loss[2] == 1 / 3
        assert one.provenance["held"] == 10 * seed
        if eigenvalues is None:
            assert one.arrays == {}
            assert one.epochs.extra.dtype == np.int32
        else:
            assert one.arrays["eigenvalues"].tolist() == eigenvalues
            assert "extra" not in one.epochs
            kept = np.unpackbits(one.arrays["kept.conv"], count=4)
            assert kept.tolist() == [1, 0, 1, 0]


# Lists


def test_a_table_and_descriptions(below):
    below.write(record(PRUNED.with_(seed=5)))
    broken = PRUNED.with_(seed=6)
    below.write(record(broken))
    (below.path / "records" / f"{broken.identity}.npz").write_bytes(b"")
    frame = archive.table(below).set_index("run")
    assert len(frame) == 5
    assert frame.damaged.dropna().index.tolist() == [broken.identity]
    assert frame.title[RUN] == PRUNED.title
    assert archive.resolve(below, RUN[:9]) == RUN
    for start in ("", "xyz"):
        with pytest.raises(StoreError):
            archive.resolve(below, start)
    about = archive.describe(below, RUN)
    assert [row["post"] for row in about["rows"]] == pytest.approx(record().epochs.post.tolist())
    assert json.loads(json.dumps(about))["config"]["seed"] == 2
    assert archive.describe(below, broken.identity)["damaged"]
    below.fail(PRUNED.with_(seed=8), "why")
    assert archive.describe(below, PRUNED.with_(seed=8).identity)["failure"] == "why"


# Leftovers


def write(path: Path, content: bytes = b"x", age: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    time = path.stat().st_mtime - age
    os.utime(path, (time, time))
    return path


def test_leftovers(tmp_path):
    store = Store(tmp_path / "runs", tmp_path / "none")
    done, damaged, open_ = (PRUNED.with_(seed=seed) for seed in range(3))
    for config in (done, damaged):
        store.write(record(config))
    folder, old = store.path, 7200.0
    store.fail(done, "before it was done")
    store.fail(open_, "still of use")
    useless = {
        write(folder / "records" / f"{damaged.identity}.parquet"),
        folder / "records" / f"{damaged.identity}.npz",
        folder / "failed" / f"{done.identity}.json",
        write(checkpoints.file(folder, done.identity)),
        write(folder / "checkpoints" / f"{open_.identity}.damaged.safetensors"),
        write(folder / "records" / f".{RUN}.parquet.{'0' * 32}", age=old),
        write(folder / "records" / f"{'1' * 16}.npz", age=old),
        write(folder / "progress" / open_.identity, age=old),
        write(folder / "claims" / f"{open_.identity}.lock"),
        write(folder / "index.parquet"),
    }
    write(folder / "records" / f".{RUN}.parquet.{'1' * 32}")
    write(folder / "records" / f"{'2' * 16}.npz")
    write(folder / "progress" / done.identity)
    write(folder / "data" / "digits.safetensors", age=old)
    write(folder / "claims" / f"{open_.identity}.lease", age=old)
    found = archive.leftovers(store)
    assert {leftover.file for leftover in found} == useless
    assert all(leftover.bytes == leftover.file.stat().st_size for leftover in found)
    everything = {path for path in folder.rglob("*") if path.is_file()}
    archive.remove(found)
    assert {path for path in folder.rglob("*") if path.is_file()} == everything - useless
    assert same(store.read(done), record(done))
    assert archive.leftovers(store) == []


def test_leftovers_of_settings_that_are_not_wanted(tmp_path):
    store = Store(tmp_path / "runs", tmp_path / "none")
    for seed in range(4):
        store.write(record(PRUNED.with_(seed=seed)))
        store.fail(PRUNED.with_(seed=10 + seed), "why")
    found = archive.leftovers(store, lambda config: config.seed % 2 == 0)
    expected = {PRUNED.with_(seed=seed).identity for seed in (1, 3, 11, 13)}
    assert {leftover.run for leftover in found} == expected
    archive.remove(found)
    assert len(store.own()) == len(store.failures()) == 2
