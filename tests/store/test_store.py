"""The run store: what is written is read, and what is damaged is never read in silence."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from paperlib import measures, runs
from paperlib.config import Config, Flatness, Noise
from paperlib.runs import DamagedRecord, Store, StoreError
from paperlib.store import archive
from tests.store.helpers import PRUNED, file, record, same

RUN = PRUNED.identity


@pytest.fixture
def written(store) -> Store:
    store.write(record())
    return store


@pytest.mark.parametrize("arrays", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(data="images:/a/b/cifar", dropout=(0.1, 0.2)),
        PRUNED.with_(noise=Noise("gaussian", 129), flatness=Flatness(300)),
    ],
)
def test_round_trip(store, arrays, config):
    original = record(config, arrays)
    store.write(original)
    assert same(original, store.read(config.identity))
    assert same(original, Store(str(store.path)).records()[0])
    assert config.identity in store
    kinds = ("parquet", "npz") if arrays else ("parquet",)
    assert {*store.path.rglob("*.*")} == {file(store, config.identity, kind) for kind in kinds}


def test_a_run_that_is_not_there(store):
    assert RUN not in store
    assert store.identities() == []
    with pytest.raises(KeyError, match=RUN):
        store.read(PRUNED)
    assert len(store.epochs()) == len(store.runs()) == 0
    assert not store.path.exists()


def test_frames_of_many_runs(store):
    originals = [record(PRUNED.with_(seed=seed)) for seed in (3, 1, 2)]
    for seed, one in enumerate(originals):  # columns may differ
        one.epochs[("a", "b", "removed")[seed]] = one.epochs.post / 3
        store.write(one)
    (store.path / "records" / f".{RUN}.parquet.abcd").write_bytes(b"half of one")
    assert store.identities() == sorted(one.run for one in originals)
    epochs, table = store.frames()
    expected = pd.concat([r.epochs.assign(run=r.run) for r in store.records()], ignore_index=True)
    pd.testing.assert_frame_equal(epochs[expected.columns], expected, check_exact=True)
    summary = measures.summarize(expected).set_index("run")
    for one in originals:
        row = table.set_index("run").loc[one.run]
        assert row.mean_stability == summary.mean_stability[one.run]
        assert (row.seed, row.model, row.device) == (one.config.seed, "vgg11_bn", "cpu")
    assert store.epochs([originals[0].config]).run.unique().tolist() == [originals[0].run]
    with pytest.raises(KeyError):
        store.runs([originals[0].run, "0" * 16])


def refused(store: Store, run: str = RUN) -> bool:
    """Whether no way of reading gives a damaged record's numbers."""
    for read in (store.read, lambda run: store.runs([run]), lambda run: store.epochs([run])):
        with pytest.raises(DamagedRecord, match=run):
            read(run)
    return run not in store and run in store.identities()


@pytest.mark.parametrize("kind", ["parquet", "npz"])
def test_cut_overwritten_or_changed_anywhere(written, kind):
    path, refusals = file(written, RUN, kind), 0
    content = path.read_bytes()
    for length in [*(len(content) * np.arange(10) // 10), len(content) - 1]:
        for damage in {content[:length], content[:length].ljust(len(content), b"\0")} - {content}:
            path.write_bytes(damage)
            assert refused(written)
    for place in range(0, len(content), 31):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        try:
            assert same(record(), written.read(RUN))
        except DamagedRecord:
            refusals += 1
    assert refusals > 50
    path.unlink()
    assert RUN not in written
    written.write(record())
    assert same(record(), written.read(RUN))


@pytest.mark.parametrize("kinds", [("parquet",), ("npz",), ("parquet", "npz")])
def test_files_of_two_runs_mixed_up(written, kinds):
    other = record(PRUNED.with_(seed=9))
    written.write(other)
    for kind in kinds:
        a, b = (file(written, run, kind) for run in (RUN, other.run))
        mine, theirs = a.read_bytes(), b.read_bytes()
        a.write_bytes(theirs)
        b.write_bytes(mine)
    assert refused(written)
    assert refused(written, other.run)


def test_foreign_files_and_another_provenance(written):
    path = file(written, RUN)
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"paperlib"]) | {"provenance": {"parameters": 7}}
    pq.write_table(table.replace_schema_metadata({"paperlib": json.dumps(about)}), path)
    assert refused(written)
    pd.DataFrame({"epoch": [0], "post": [50.0]}).to_parquet(path)
    assert refused(written)


KILLED = """
import os, signal, sys
from paperlib.runs import Store
from tests.store.helpers import record
calls, function, at = [], sys.argv[2], int(sys.argv[3])
real = getattr(os, function)
def dies(*arguments):
    calls.append(arguments)
    return os.kill(os.getpid(), signal.SIGKILL) if len(calls) == at else real(*arguments)
setattr(os, function, dies)
Store(sys.argv[1]).write(record(numbers=7))
"""


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("again", [False, True])
def test_a_killed_writer(store, function, at, again):
    """The old record or none, or one that is known to be damaged; never a mixture."""
    if again:
        store.write(record())
    command = [sys.executable, "-c", KILLED, str(store.path), function, str(at)]
    assert subprocess.run(command, check=False).returncode == -9
    if not again:
        assert store.identities() == []
    elif at == 1:
        assert same(record(), store.read(RUN))
    else:
        assert refused(store)
    store.write(record(numbers=7))
    assert same(record(numbers=7), store.read(RUN))


@pytest.mark.parametrize("below", ["runs", "a/b"])
def test_a_store_that_cannot_be_written(tmp_path, below):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / below)
    uses = (store.check_writable, lambda: store.write(record()), lambda: store.fail(PRUNED, ""))
    for use in uses:
        with pytest.raises(StoreError, match="file"):
            use()
    assert RUN not in store
    assert store.failure(RUN) is None


def test_notes_of_failures(store):
    assert store.failure(RUN) is None
    store.fail(PRUNED, ValueError("the loss is nan at epoch 3"))
    assert store.failures() == {RUN: "the loss is nan at epoch 3"}
    assert RUN not in store
    note = store.path / "failed" / f"{RUN}.json"
    assert json.loads(note.read_text())["config"]["seed"] == 2
    for damage in ("", "{", "{}", "\0\0\0"):
        note.write_text(damage)
        assert store.failure(RUN)
    store.write(record())
    assert store.failure(RUN) is None


def test_where_folders_are(tmp_path, monkeypatch):
    for name in ("RUNS", "RESULTS", "FIGURES"):
        monkeypatch.delenv(f"PAPERLIB_{name}", raising=False)
    monkeypatch.chdir(tmp_path)
    assert Store().path == tmp_path / "runs"
    for folder in ("notebooks/sub", "paperlib", "results"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "notebooks" / "sub")
    assert runs.default_path() == tmp_path / "runs"
    assert runs.results_path() == tmp_path / "results"
    assert runs.figures_path() == tmp_path / "figures"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("RUNS", "RESULTS", "FIGURES"):
        monkeypatch.setenv(f"PAPERLIB_{name}", f"~/{name}")
    assert Store().path == tmp_path / "home" / "RUNS"
    assert Store().results == runs.results_path() == tmp_path / "home" / "RESULTS"
    assert runs.figures_path() == tmp_path / "home" / "FIGURES"
    assert Store("~/mine", "~/below").results == tmp_path / "home" / "below"


def test_reading_gives_copies_and_frames_have_each_run_once(written, tmp_path):
    """Records of the read-only layer are cached: a caller's change must not reach the next one."""
    archive.export(written, tmp_path / "all.parquet")
    layered = Store(tmp_path / "other", tmp_path)
    mine = layered.read(RUN)
    mine.arrays["loss"][:] = 0
    mine.provenance["device"] = "abacus"
    mine.epochs["post"] = 0.0
    assert same(layered.read(RUN), written.read(RUN))
    assert layered.runs([RUN, RUN]).equals(layered.runs([RUN]))
