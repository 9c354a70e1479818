"""Many runs in one file, imports, and the removal of leftovers."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from paperlib.runs import DamagedRecord, Store, StoreError
from paperlib.store import archive, checkpoints
from tests.store.helpers import PRUNED, exported, file, record, same

RUN = PRUNED.identity
DATA = Path(__file__).parent / "data"  # written by version 0.1.0: a file of runs, and records


@pytest.fixture
def below(tmp_path) -> Store:
    """A store above a file of three runs."""
    other = Store(tmp_path / "other", tmp_path / "none")
    for seed in range(3):
        other.write(record(PRUNED.with_(seed=seed), arrays=seed != 1))
    return exported(other, tmp_path)


def test_results_are_found_below_the_store(below):
    assert RUN in below
    assert len(below.identities()) == len(below.runs()) == 3
    for seed in range(3):
        config = PRUNED.with_(seed=seed)
        assert same(below.read(config), record(config, arrays=seed != 1))
    assert not below.path.exists()
    below.write(record(numbers=9))
    assert same(below.read(RUN), record(numbers=9))
    path = file(below, RUN)
    path.write_bytes(bytes(path.stat().st_size))
    assert same(below.read(RUN), record())


@pytest.mark.parametrize("how", ["cut", "zeros", "flipped"])
@pytest.mark.filterwarnings("ignore:.*left out:UserWarning")
def test_damaged_results_are_not_read(below, how):
    path, refusals = below.results / "all.parquet", 0
    content = path.read_bytes()
    for tenth in range(10):
        cut = len(content) * tenth // 10 + 7
        tail = {"cut": b"", "zeros": bytes(len(content) - cut)}
        tail["flipped"] = bytes([content[cut] ^ 0x10]) + content[cut + 1 :]
        path.write_bytes(content[:cut] + tail[how])
        for seed in range(3):
            config = PRUNED.with_(seed=seed)
            try:
                assert same(below.read(config), record(config, arrays=seed != 1))
            except (KeyError, DamagedRecord):
                refusals += 1
    assert refusals >= (3 if how == "flipped" else 30)


def test_damaged_results_are_named(below):
    path = below.results / "all.parquet"
    frame = pd.read_parquet(path)
    frame.loc[frame.run == RUN, "post"] += 1
    frame.to_parquet(path)
    with pytest.raises(DamagedRecord, match=RUN):
        below.read(RUN)
    assert len(below.whole(below.identities())) == 2
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.warns(UserWarning, match="all.parquet"):
        assert RUN not in below


def test_columns_that_differ_between_runs(tmp_path):
    store = Store(tmp_path / "a", tmp_path)
    for seed, kind in enumerate((np.int32, np.float32, bool, None)):
        one = record(PRUNED.with_(seed=seed))
        if kind is not None:
            one.epochs["removed"] = one.epochs.removed.astype(kind if kind is not bool else int)
            one.epochs[f"only {kind.__name__}"] = one.epochs.removed.astype(kind)
        store.write(one)
    back = exported(store, tmp_path)
    assert all(map(same, back.records(), store.records()))
    assert back.identities() == store.identities()


def test_an_export_names_no_folder_of_this_machine(tmp_path):
    config = PRUNED.with_(data=f"images:{tmp_path}/pictures.zip")
    store = Store(tmp_path / "mine", tmp_path)
    with pytest.raises(StoreError, match=str(tmp_path)):
        archive.export(store, tmp_path / "nothing.parquet")
    store.write(record(config))
    back = exported(store, tmp_path)
    assert str(tmp_path).encode() not in (back.results / "all.parquet").read_bytes()
    assert back.read(config.identity).config == config.with_(data="images:pictures.zip")


def test_an_import_keeps_ours_where_the_numbers_differ(below, tmp_path):
    store = Store(tmp_path / "mine", tmp_path / "none")
    different, damaged = record(numbers=9), record(PRUNED.with_(seed=0))
    store.write(different)
    store.write(damaged)
    file(store, damaged.run).write_bytes(b"half")
    new = PRUNED.with_(seed=1)
    for expected in (["different", "mended", "new"], ["different", "same", "same"]):
        outcome = archive.merge(store, below.results / "all.parquet").set_index("run").outcome
        assert outcome[[RUN, damaged.run, new.identity]].tolist() == expected
    assert same(store.read(RUN), different)
    assert same(store.read(new.identity), record(new, arrays=False))
    assert same(store.read(damaged.run), damaged)
    # From a store to another: a damaged record is not taken.
    other = Store(tmp_path / "third", tmp_path / "none")
    file(store, damaged.run, "npz").write_bytes(b"")
    outcome = archive.merge(other, store.path).set_index("run").outcome
    assert outcome[damaged.run].startswith("damaged: ")
    assert sorted(other.own()) == sorted({RUN, new.identity})


@pytest.mark.parametrize("content", [b"", b"nothing", None])
@pytest.mark.filterwarnings("ignore:.*left out:UserWarning")
def test_files_that_cannot_be_imported(tmp_path, content):
    store, path = Store(tmp_path / "a"), tmp_path / "some.parquet"
    pd.DataFrame({"a": [1]}).to_parquet(path)
    if content is not None:
        path.write_bytes(content)
    for source in (path, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StoreError, match=str(source)):
            archive.merge(store, source)


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
        assert one.epochs.post.tolist() == [20.0 + epoch - seed for epoch in range(4)]
        assert one.epochs.train_loss[2] == 1 / 3
        assert one.provenance["held"] == 10 * seed
        if seed == 1:
            assert one.arrays == {}
            assert one.epochs.extra.dtype == np.int32
        else:
            assert one.arrays["eigenvalues"].tolist() == [x / 4 + seed for x in range(5)]
            assert "extra" not in one.epochs
            assert np.unpackbits(one.arrays["kept.conv"], count=4).tolist() == [1, 0, 1, 0]


def test_the_start_of_an_identity_names_one_run(below):
    for start in ("", "xyz"):
        with pytest.raises(StoreError, match=f"'{start}'"):
            archive.describe(below, start)
    _, epochs = archive.describe(below, RUN[:9])
    assert epochs.post.tolist() == record().epochs.post.tolist()


def write(path: Path, age: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    time = path.stat().st_mtime - age
    os.utime(path, (time, time))
    return path


def test_leftovers(tmp_path):
    store = Store(tmp_path / "runs", tmp_path / "none")
    done, damaged, open_, unwanted = (PRUNED.with_(seed=seed) for seed in range(4))
    for config in (done, damaged, unwanted):
        store.write(record(config))
    folder, records, old = store.path, store.path / "records", 7200.0
    store.fail(done, "before it was done")
    store.fail(open_, "still of use")
    store.fail(unwanted.with_(epochs=30), "of no use")
    useless = {
        write(file(store, damaged.identity)),
        file(store, damaged.identity, "npz"),
        file(store, unwanted.identity),
        file(store, unwanted.identity, "npz"),
        folder / "failed" / f"{done.identity}.json",
        folder / "failed" / f"{unwanted.with_(epochs=30).identity}.json",
        write(checkpoints.file(folder, done.identity)),
        write(records / f".{RUN}.parquet.{'0' * 32}", age=old),
        write(records / f"{'1' * 16}.npz", age=old),
    }
    write(records / f".{RUN}.parquet.{'1' * 32}")
    write(records / f"{'2' * 16}.npz")
    write(folder / "data" / "digits.safetensors", age=old)
    write(folder / "claims" / f"{open_.identity}.lease", age=old)
    found = archive.leftovers(store, lambda config: config.seed != unwanted.seed)
    assert set(found) == useless
    order = [path.name for path in found]
    for run in (damaged.identity, unwanted.identity):  # a record goes before its arrays
        assert order.index(f"{run}.parquet") < order.index(f"{run}.npz")
