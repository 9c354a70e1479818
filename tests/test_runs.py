"""The run store: what is written is read, and what is damaged is never read silently."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest

from paperlib import archive, instability, packs, runs
from paperlib.config import Config, FilterPruning, Flatness, Noise
from paperlib.runs import DamagedRecord, RunRecord, Store, StoreError

PRUNED = Config(pruning=FilterPruning((0.3, 0.9), ((3, 7), (4, 8, 12))), seed=2)


def record(config: Config = PRUNED, arrays: bool = True) -> RunRecord:
    rng = np.random.default_rng(config.seed)
    count = 20
    epochs = pd.DataFrame(
        {
            "epoch": range(count),
            "trained": [False] + [True] * (count - 1),
            "learning_rate": 0.001 * 0.1 ** np.arange(count),
            "train_loss": [np.nan, *rng.random(count - 1)],
            "train_accuracy": 100 * rng.random(count),
            "test_loss": rng.random(count),
            "pre": 100 * rng.random(count),
            "post": 100 * rng.random(count),
            "removed": rng.integers(0, 9, count),
            "seconds": rng.random(count),
        }
    )
    measured = {
        "eigenvalues": rng.standard_normal(100),
        "loss": rng.random((10, 81)).astype(np.float32),
        "chosen": rng.integers(0, 512, (3, 2)),
        "held": rng.random(7) > 0.5,
        "trace": np.float64(rng.random()),
    }
    about = {"device": "cpu", "threads": 2, "commit": None, "torch": "2.8.0"}
    return RunRecord(config, epochs, measured if arrays else {}, about)


def same(a: RunRecord, b: RunRecord) -> bool:
    pd.testing.assert_frame_equal(a.epochs, b.epochs)
    assert a.arrays.keys() == b.arrays.keys()
    for name, array in a.arrays.items():
        assert b.arrays[name].dtype == array.dtype
        assert np.array_equal(b.arrays[name], array)
    return a.config == b.config and a.provenance == b.provenance


def files(store: Store) -> list[str]:
    return sorted(str(p.relative_to(store.path)) for p in store.path.rglob("*") if p.is_file())


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "a" / "runs")


@pytest.mark.parametrize("arrays", [True, False])
def test_round_trip(store, arrays):
    written = record(arrays=arrays)
    store.write(written)
    assert same(written, store.read(PRUNED.identity))
    assert same(written, Store(str(store.path)).read(PRUNED.identity))
    assert PRUNED.identity in store
    names = [f"records/{PRUNED.identity}.{kind}" for kind in ("npz", "parquet")]
    assert files(store) == names[0 if arrays else 1 :]


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(data="images:/a/b/cifar", dropout=(0.1, 0.2)),
        PRUNED.with_(noise=Noise("gaussian", 129)),
        PRUNED.with_(flatness=Flatness(300)),
    ],
)
def test_any_configuration_is_kept(store, config):
    store.write(record(config))
    assert store.read(config.identity).config == config


def test_a_run_that_is_not_there(store):
    assert PRUNED.identity not in store
    assert store.identities() == []
    with pytest.raises(KeyError, match=PRUNED.identity):
        store.read(PRUNED.identity)
    assert len(store.epochs()) == len(store.runs()) == 0
    assert not store.path.exists()


def test_frames_of_many_runs(store):
    records = [record(PRUNED.with_(seed=seed)) for seed in (3, 1, 2)]
    for one in records:
        store.write(one)
    assert store.identities() == sorted(one.run for one in records)
    epochs = store.epochs()
    assert len(epochs) == 60
    for one in records:
        rows = epochs[epochs.run == one.run].drop(columns="run").reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, one.epochs)
    table = store.runs().set_index("run")
    for one in records:
        alone = instability.summarize(one.epochs.assign(run=one.run)).iloc[0]
        assert one.summary().equals(alone)
        row = table.loc[one.run]
        assert row.mean_stability == alone.mean_stability
        assert (row.seed, row.model, row.device) == (one.config.seed, "vgg11_bn", "cpu")
    assert store.epochs([records[0].run]).run.unique().tolist() == [records[0].run]
    with pytest.raises(KeyError):
        store.runs([records[0].run, "0" * 16])


def test_a_record_is_replaced(store):
    store.write(record())
    other = record(PRUNED.with_(seed=7))
    other.config = PRUNED
    store.write(other)
    assert same(other, store.read(PRUNED.identity))
    assert len(files(store)) == 2


def test_other_files_are_no_records(store):
    store.write(record())
    folder = store.path / "records"
    (folder / f".{PRUNED.identity}.parquet.abcd").write_bytes(b"half of one")
    (folder / ".DS_Store").write_bytes(b"")
    assert store.identities() == [PRUNED.identity]
    assert len(store.runs()) == 1


# Damage


def never_read(store: Store) -> None:
    run = PRUNED.identity
    with pytest.raises(DamagedRecord, match=run):
        store.read(run)
    with pytest.raises(DamagedRecord):
        store.runs()
    assert store.identities() == [run]


@pytest.fixture
def written(store) -> Store:
    store.write(record())
    return store


@pytest.mark.parametrize("kind", ["parquet", "npz"])
@pytest.mark.parametrize("tenth", range(10))
def test_truncated(written, kind, tenth):
    path = written.path / "records" / f"{PRUNED.identity}.{kind}"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * tenth // 10])
    never_read(written)


@pytest.mark.parametrize("kind", ["parquet", "npz"])
def test_a_byte_short(written, kind):
    path = written.path / "records" / f"{PRUNED.identity}.{kind}"
    path.write_bytes(path.read_bytes()[:-1])
    never_read(written)


@pytest.mark.parametrize("kind", ["parquet", "npz"])
def test_all_zero(written, kind):
    path = written.path / "records" / f"{PRUNED.identity}.{kind}"
    path.write_bytes(bytes(len(path.read_bytes())))
    never_read(written)


def test_zeros_in_the_middle(written):
    path = written.path / "records" / f"{PRUNED.identity}.parquet"
    content = bytearray(path.read_bytes())
    content[100:600] = bytes(500)
    path.write_bytes(content)
    never_read(written)


def test_a_changed_byte_changes_no_number(written):
    path = written.path / "records" / f"{PRUNED.identity}.parquet"
    content = path.read_bytes()
    expected, refused = record(), 0
    for place in range(0, len(content), 31):
        changed = bytearray(content)
        changed[place] ^= 0x10
        path.write_bytes(changed)
        try:
            read = written.read(PRUNED.identity)
        except DamagedRecord:
            refused += 1
        else:
            pd.testing.assert_frame_equal(read.epochs, expected.epochs)
    assert refused > 50


@pytest.mark.parametrize(
    ("kind", "start", "stop"),
    [("parquet", -9, None), ("parquet", 100, 600), ("npz", 0, 100), ("npz", 0, None)],
)
def test_a_run_whose_record_is_damaged_is_not_there(written, kind, start, stop):
    assert PRUNED.identity in written
    path = written.path / "records" / f"{PRUNED.identity}.{kind}"
    content = bytearray(path.read_bytes())
    content[start:stop] = bytes(len(content[start:stop]))
    path.write_bytes(content)
    assert PRUNED.identity not in written
    if kind == "npz":
        path.unlink()
        assert PRUNED.identity not in written


def test_swapped_records(written):
    other = record(PRUNED.with_(seed=9))
    written.write(other)
    a, b = (written.path / "records" / f"{run}.parquet" for run in (PRUNED.identity, other.run))
    swapped = a.read_bytes(), b.read_bytes()
    b.write_bytes(swapped[0]), a.write_bytes(swapped[1])
    for run in (PRUNED.identity, other.run):
        assert run not in written
        with pytest.raises(DamagedRecord, match="another run"):
            written.read(run)


def test_arrays_of_another_run(written):
    other = record(PRUNED.with_(seed=9))
    written.write(other)
    folder = written.path / "records"
    (folder / f"{other.run}.npz").replace(folder / f"{PRUNED.identity}.npz")
    for run in (PRUNED.identity, other.run):
        with pytest.raises(DamagedRecord, match=run):
            written.read(run)


def test_foreign_files(written):
    path = written.path / "records" / f"{PRUNED.identity}.parquet"
    pd.DataFrame({"epoch": [0], "post": [50.0]}).to_parquet(path)
    never_read(written)
    path.write_text("post\n50\n")
    never_read(written)


def test_a_damaged_record_is_written_anew(written):
    path = written.path / "records" / f"{PRUNED.identity}.parquet"
    path.write_bytes(path.read_bytes()[:1000])
    written.write(record())
    assert same(record(), written.read(PRUNED.identity))


# Writing, whole or not at all


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_stopped_while_writing(store, monkeypatch, error, at, function):
    calls, real = [], getattr(os, function)

    def stops(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            raise error
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, stops)
        with pytest.raises(StoreError if isinstance(error, OSError) else KeyboardInterrupt):
            store.write(record())
    assert PRUNED.identity not in store
    assert store.identities() == []
    assert [name for name in files(store) if not name.endswith(".npz")] == []
    assert not [name for name in files(store) if name.startswith("records/.")]
    store.write(record())
    assert same(record(), store.read(PRUNED.identity))


def test_stopped_between_arrays_and_record_of_a_second_writing(written, monkeypatch):
    other = record(PRUNED.with_(seed=7))
    other.config = PRUNED
    calls = []
    real = os.replace

    def stops(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stops)
        with pytest.raises(KeyboardInterrupt):
            written.write(other)
    never_read(written)


def test_killed_while_writing(store):
    code = f"""
import os, signal
from paperlib import runs
from paperlib.config import Config
import pandas as pd
runs.os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
runs.Store({str(store.path)!r}).write(runs.RunRecord(Config(), pd.DataFrame({{"epoch": [0]}})))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert store.identities() == []
    assert Config().identity not in store


@pytest.mark.parametrize("below", ["runs", "a/b"])
def test_a_store_that_cannot_be_written(tmp_path, below):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / below)
    for use in (store.check_writable, lambda: store.write(record())):
        with pytest.raises(StoreError, match=r"cannot write.*file"):
            use()
    with pytest.raises(StoreError, match="cannot write"):
        store.fail(PRUNED, "why")
    assert PRUNED.identity not in store


def test_checking_leaves_nothing(store):
    store.check_writable()
    assert files(store) == []


# Failures


def test_failure_notes(store):
    assert store.failure(PRUNED.identity) is None
    store.fail(PRUNED, ValueError("the loss is nan at epoch 3"))
    assert store.failure(PRUNED.identity) == "the loss is nan at epoch 3"
    assert store.failure(Config().identity) is None
    assert PRUNED.identity not in store
    store.fail(PRUNED, "killed")
    assert store.failure(PRUNED.identity) == "killed"
    note = json.loads((store.path / "failed" / f"{PRUNED.identity}.json").read_text())
    assert note["config"]["seed"] == 2
    store.write(record())
    assert store.failure(PRUNED.identity) is None


@pytest.mark.parametrize("content", ["", "{", "{}", "\0\0\0"])
def test_a_damaged_note_is_still_a_failure(store, content):
    store.fail(PRUNED, "killed")
    (store.path / "failed" / f"{PRUNED.identity}.json").write_text(content)
    assert "damaged" in store.failure(PRUNED.identity)


# The index


@pytest.fixture
def settled(monkeypatch):
    """Records that were just written count as settled, and few are worth an index."""
    monkeypatch.setattr(runs, "SETTLED", -(10**12))
    monkeypatch.setattr(runs, "INDEXED", 3)


@pytest.fixture
def indexed(store, settled) -> Store:
    for seed in range(5):
        store.write(record(PRUNED.with_(seed=seed), arrays=seed % 2 == 0))
    store.runs()
    assert (store.path / "index.parquet").exists()
    return store


def reads(store: Store, monkeypatch) -> list[str]:
    """The runs whose records are read from now on."""
    calls, real = [], Store._read_file
    monkeypatch.setattr(Store, "_read_file", lambda s, run: calls.append(run) or real(s, run))
    return calls


def frames_of_records(store: Store) -> list[pd.DataFrame]:
    """As `Store.frames`, from records read one by one."""
    records = [store.read(run) for run in store.identities()]
    epochs = pd.concat([r.epochs.assign(run=r.run) for r in records], ignore_index=True)
    return [epochs, instability.summarize(epochs)]


def test_the_index_saves_reading(indexed, monkeypatch):
    fresh = Store(indexed.path)
    calls = reads(fresh, monkeypatch)
    epochs, table = fresh.frames()
    assert calls == []
    expected_epochs, expected = frames_of_records(indexed)
    pd.testing.assert_frame_equal(epochs, expected_epochs, check_exact=True)
    pd.testing.assert_frame_equal(table[list(expected)], expected, check_exact=True)
    for run in fresh.identities():
        assert same(fresh.read(run), indexed.read(run))


@pytest.mark.parametrize("kind", ["parquet", "npz"])
@pytest.mark.parametrize("tenth", range(10))
def test_damage_after_the_index_was_written(indexed, kind, tenth):
    path = indexed.path / "records" / f"{PRUNED.identity}.{kind}"
    content = path.read_bytes()
    cut = len(content) * tenth // 10
    for damage in (content[:cut], content[:cut] + bytes(len(content) - cut)):
        path.write_bytes(damage)
        for store in (indexed, Store(indexed.path)):
            assert PRUNED.identity not in store.whole(store.identities())
            with pytest.raises(DamagedRecord, match=PRUNED.identity):
                store.frames()
    path.unlink()
    assert PRUNED.identity not in Store(indexed.path).whole([PRUNED.identity])


def test_a_record_that_changes_within_the_same_tick(store, monkeypatch):
    """Same size and times as when it was read: only young files could be so, and are read anew."""
    monkeypatch.setattr(runs, "INDEXED", 1)
    store.write(record())
    assert len(store.runs()) == 1
    path = store.path / "records" / f"{PRUNED.identity}.parquet"
    about = os.stat(path)
    path.write_bytes(bytes(about.st_size))
    monkeypatch.setattr(
        Store, "_signature", lambda *_: f"{about.st_size} {about.st_mtime_ns} 0 0, "
    )
    assert PRUNED.identity not in store


def test_a_replaced_record_is_read_anew(indexed):
    other = record(PRUNED.with_(seed=7))
    other.config = PRUNED
    Store(indexed.path).write(other)
    rows = indexed.epochs([PRUNED.identity, *indexed.identities()[:3]])
    mine = rows[rows.run == PRUNED.identity].post.iloc[:20]
    assert mine.tolist() == other.epochs.post.tolist()


@pytest.mark.parametrize("damage", ["gone", "empty", "zeros", "half", "text", "foreign"])
def test_a_damaged_index_is_written_anew(indexed, damage, monkeypatch):
    path = indexed.path / "index.parquet"
    content = path.read_bytes()
    expected = indexed.frames()
    new = {"empty": b"", "zeros": bytes(len(content)), "half": content[: len(content) // 2]}
    path.unlink()
    if damage == "foreign":
        pd.DataFrame({"epoch": [0]}).to_parquet(path)
    elif damage != "gone":
        path.write_bytes(new.get(damage, b"not an index"))
    for frame, other in zip(Store(indexed.path).frames(), expected, strict=True):
        pd.testing.assert_frame_equal(frame, other, check_exact=True)
    fresh = Store(indexed.path)
    calls = reads(fresh, monkeypatch)
    fresh.frames()
    assert calls == []


def test_a_changed_byte_of_the_index_changes_no_number(indexed):
    path = indexed.path / "index.parquet"
    content = path.read_bytes()
    expected = indexed.frames()
    for place in range(0, len(content), max(1, len(content) // 150)):
        changed = bytearray(content)
        changed[place] ^= 0x10
        path.write_bytes(changed)
        for frame, other in zip(Store(indexed.path).frames(), expected, strict=True):
            pd.testing.assert_frame_equal(frame, other, check_exact=True)


def test_many_write_the_index_at_once(indexed):
    expected = indexed.frames()

    def open_anew(i: int) -> None:
        if i % 3 == 0:
            (indexed.path / "index.parquet").unlink(missing_ok=True)
        for frame, other in zip(Store(indexed.path).frames(), expected, strict=True):
            pd.testing.assert_frame_equal(frame, other, check_exact=True)

    with ThreadPoolExecutor(4) as threads:
        assert len(list(threads.map(open_anew, range(40)))) == 40
    assert [path.name for path in indexed.path.glob(".*")] == []


def test_a_store_that_is_only_read_has_no_index(indexed, monkeypatch):
    (indexed.path / "index.parquet").unlink()
    refuse = StoreError("read-only")
    monkeypatch.setattr(runs, "write_whole", lambda *_: (_ for _ in ()).throw(refuse))
    assert len(Store(indexed.path).runs()) == 5


def test_columns_that_differ_between_runs(store, settled):
    for seed, name in enumerate(["a", "b", "removed"]):
        one = record(PRUNED.with_(seed=seed))
        one.epochs[name] = one.epochs.post / 3
        store.write(one)
    expected = {run: store.read(run).epochs for run in store.identities()}
    store.runs()
    fresh = Store(store.path)
    for entry in fresh.entries():
        pd.testing.assert_frame_equal(entry.epochs, expected[entry.run])
    assert fresh.epochs().a.notna().sum() == 20


# The layer below, export and import


@pytest.fixture
def below(tmp_path) -> Store:
    """A store with nothing of its own, above a file of three runs."""
    other = Store(tmp_path / "other")
    for seed in range(3):
        other.write(record(PRUNED.with_(seed=seed), arrays=seed != 1))
    (tmp_path / "results").mkdir()
    assert archive.export(other, tmp_path / "results" / "all.parquet") == 3
    return Store(tmp_path / "runs", tmp_path / "results")


def test_results_are_found(below):
    assert PRUNED.identity in below
    assert len(below.identities()) == len(below.runs()) == 3
    for seed in range(3):
        config = PRUNED.with_(seed=seed)
        assert same(below.read(config.identity), record(config, arrays=seed != 1))
    assert not below.path.exists()


def test_what_is_in_the_store_goes_before_results(below):
    ours = record(PRUNED.with_(seed=9))
    ours.config = PRUNED
    below.write(ours)
    assert same(below.read(PRUNED.identity), ours)
    path = below.path / "records" / f"{PRUNED.identity}.parquet"
    path.write_bytes(bytes(path.stat().st_size))
    assert same(below.read(PRUNED.identity), record())


@pytest.mark.parametrize("tenth", range(10))
@pytest.mark.parametrize("how", ["cut", "zeros", "flipped"])
@pytest.mark.filterwarnings("ignore:.*left out:UserWarning")
def test_damaged_results_are_left_out(below, tenth, how):
    path = below.results / "all.parquet"
    content = bytearray(path.read_bytes())
    cut = len(content) * tenth // 10
    if how == "flipped":
        content[cut] ^= 0x10
    else:
        content[cut:] = b"" if how == "cut" else bytes(len(content) - cut)
    path.write_bytes(content)
    for seed in range(3):
        config = PRUNED.with_(seed=seed)
        try:
            read = below.read(config.identity)
        except (KeyError, DamagedRecord):
            continue
        assert same(read, record(config, arrays=seed != 1))


def test_damaged_results_are_named(below):
    path = below.results / "all.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.warns(UserWarning, match="all.parquet cannot be read and is left out"):
        assert PRUNED.identity not in below


def test_an_export_without_arrays(below, tmp_path):
    thin = tmp_path / "thin" / "all.parquet"
    archive.export(below, thin, arrays=False)
    store = Store(tmp_path / "empty", thin.parent)
    read = store.read(PRUNED.identity)
    pd.testing.assert_frame_equal(read.epochs, record().epochs)
    with pytest.raises(StoreError, match=f"arrays of run {PRUNED.identity} were left out"):
        read.arrays["eigenvalues"]
    mine = Store(tmp_path / "mine")
    assert archive.merge(mine, thin).outcome.tolist() == ["new"] * 3
    assert PRUNED.identity in mine
    whole = archive.merge(mine, below.results / "all.parquet").set_index("run").outcome
    assert whole[PRUNED.identity] == "better"
    assert whole[PRUNED.with_(seed=1).identity] == "same"
    assert same(mine.read(PRUNED.identity), record())
    assert archive.merge(mine, thin).outcome.tolist() == ["same"] * 3
    assert same(mine.read(PRUNED.identity), record())


def test_an_export_names_no_folder_of_this_machine(tmp_path):
    config = PRUNED.with_(data=f"images:{tmp_path}/pictures.zip")
    store = Store(tmp_path / "mine")
    store.write(record(config))
    archive.export(store, tmp_path / "out" / "all.parquet")
    assert str(tmp_path).encode() not in (tmp_path / "out" / "all.parquet").read_bytes()
    read = Store(tmp_path / "empty", tmp_path / "out").read(config.identity)
    assert read.config == config.portable
    assert read.config.data == "images:pictures.zip"
    assert PRUNED.portable == PRUNED


def test_exported_epochs_are_a_tidy_frame(below):
    frame = pd.read_parquet(below.results / "all.parquet")
    for seed in range(3):
        config = PRUNED.with_(seed=seed)
        mine = frame[frame.run == config.identity]
        assert mine.post.tolist() == record(config).epochs.post.tolist()
        assert json.loads(mine.about.dropna().item())["config"].get("seed", 0) == seed


def test_merging_keeps_what_is_better_or_different(below, tmp_path):
    store = Store(tmp_path / "mine")
    different = record(PRUNED.with_(seed=9))
    different.config = PRUNED
    store.write(different)
    short = record(PRUNED.with_(seed=1), arrays=False)
    short.epochs = short.epochs[:10]
    store.write(short)
    damaged = record(PRUNED.with_(seed=0))
    store.write(damaged)
    (store.path / "records" / f"{damaged.run}.parquet").write_bytes(b"half")
    outcome = archive.merge(store, below.results / "all.parquet").set_index("run").outcome
    assert outcome[PRUNED.identity] == "different"
    assert outcome[short.run] == "better"
    assert outcome[damaged.run] == "mended"
    assert same(store.read(PRUNED.identity), different)
    assert same(store.read(short.run), record(PRUNED.with_(seed=1), arrays=False))
    assert same(store.read(damaged.run), damaged)
    # and from a store to another; a damaged record is not taken
    other = Store(tmp_path / "third")
    (store.path / "records" / f"{damaged.run}.npz").write_bytes(b"")
    outcome = archive.merge(other, store.path).set_index("run").outcome
    assert outcome[damaged.run].startswith("damaged: ")
    assert sorted(other.own()) == sorted({PRUNED.identity, short.run})


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_what_cannot_be_imported(store, tmp_path, content):
    path = tmp_path / "some.parquet"
    if content is None:
        pd.DataFrame({"a": [1]}).to_parquet(path)
    else:
        path.write_bytes(content)
    with pytest.raises(StoreError, match=r"cannot import .*some.parquet"):
        archive.merge(store, path)
    with pytest.raises(StoreError, match="no run store"):
        archive.merge(store, tmp_path)


def test_a_worse_record_replaces_none(written):
    worse = record(arrays=False)
    with pytest.raises(StoreError, match="a better record"):
        written.write(worse)
    worse = record()
    worse.epochs = worse.epochs[:-1]
    with pytest.raises(StoreError, match="a better record"):
        written.write(worse)
    assert same(written.read(PRUNED.identity), record())


def test_a_changed_provenance_is_damage(written):
    path = written.path / "records" / f"{PRUNED.identity}.parquet"
    entry = written.entries([PRUNED.identity])[0]
    about = json.dumps(entry.content | {"provenance": {"parameters": 7}})
    written.put(packs.Entry(entry.run, about, entry.columns), written.arrays(entry))
    with pytest.raises(DamagedRecord, match="provenance"):
        written.read(PRUNED.identity)
    assert path.exists()


# Where it is


def test_where_results_are(tmp_path, monkeypatch):
    monkeypatch.delenv("PAPERLIB_RESULTS")
    for folder in ("notebooks", "paperlib", "results"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert runs.results_path() == tmp_path / "results"
    monkeypatch.setenv("PAPERLIB_RESULTS", str(tmp_path / "none"))
    assert runs.results_path() == tmp_path / "none"
    assert Store(tmp_path).identities() == []


def test_where_runs_are_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("PAPERLIB_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert Store().path == tmp_path / "runs"
    for folder in ("notebooks/sub", "paperlib"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "notebooks" / "sub")
    assert runs.default_path() == tmp_path / "runs"
    monkeypatch.setenv("PAPERLIB_RUNS", str(tmp_path / "elsewhere"))
    assert Store().path == tmp_path / "elsewhere"
    assert Store(tmp_path).path == tmp_path


def test_reading_imports_no_torch(written):
    names = ("runs", "experiments", "instability", "config", "stats", "claims", "plots")
    names += ("sweep", "batch", "archive", "cli")
    modules = [f"paperlib.{name}" for name in names if find_spec(f"paperlib.{name}")]
    code = f"""
import sys
import {", ".join(modules)}
store = paperlib.runs.Store({str(written.path)!r})
assert len(store.runs()) == 1 and len(store.epochs()) == 20
paperlib.experiments.plan("figure-2", "paper")
loaded = {{"torch", "torchvision"}} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
