"""Sweeps: what is missing is run, once, and nothing stops the rest."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import torch

from paperlib import sweep
from paperlib.config import Config, FilterPruning
from paperlib.runs import Store, StoreError
from paperlib.sweep import SweepError

torch.set_num_threads(1)

QUICK = Config(
    data="digits",
    train_per_class=5,
    test_per_class=5,
    model="conv4",
    width=1 / 16,
    epochs=2,
    batch=32,
    pruning=FilterPruning((0.5,), ((0, 1),)),
)
DIVERGING = QUICK.with_(optimizer="sgd", learning_rate=1e30, seed=5)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "runs")


@pytest.fixture
def threads():
    with ThreadPoolExecutor(1) as executor:
        yield executor


def changed(store: Store) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in store.path.glob("records/*")}


def seeds(count: int, **changes) -> list[Config]:
    return [QUICK.with_(seed=seed, **changes) for seed in range(count)]


def test_only_what_is_missing_is_run(store, threads):
    sweep.collect(seeds(2), store, threads)
    before = changed(store)
    assert len(before) == 2
    assert sweep.missing(seeds(3), store) == seeds(3)[2:]
    epochs, runs = sweep.collect(seeds(3), store, threads)
    after = changed(store)
    assert len(after) == 3
    assert before.items() <= after.items()
    assert sorted(runs.run) == sorted(config.identity for config in seeds(3))
    assert epochs.run.tolist() == [config.identity for config in seeds(3) for _ in range(2)]
    assert sweep.execute(seeds(3), store, threads) == 0
    assert changed(store) == after


def test_a_damaged_record_is_run_again(store, threads):
    sweep.collect(seeds(2), store, threads)
    before = changed(store)
    (store.path / "records" / f"{QUICK.identity}.parquet").write_bytes(b"half a record")
    epochs, _ = sweep.collect(seeds(2), store, threads)
    assert epochs.post.notna().all()
    other = f"{seeds(2)[1].identity}.parquet"
    assert changed(store)[other] == before[other]


def test_the_same_run_twice_is_one(store, threads):
    configs = [QUICK, QUICK.with_(), QUICK.with_(seed=1), QUICK]
    assert sweep.execute(configs, store, threads) == 2
    _, runs = sweep.collect(configs, store)
    assert set(runs.run) == {QUICK.identity, QUICK.with_(seed=1).identity}


def test_nothing_to_do(store):
    epochs, runs = sweep.collect([], store)
    assert epochs.empty
    assert runs.empty
    assert not store.path.exists()


def test_failures_are_named_and_stop_nothing(store, threads):
    unknown = QUICK.with_(model="nope")
    configs = [DIVERGING, unknown, *seeds(2)]
    with pytest.raises(SweepError) as caught:
        sweep.collect(configs, store, threads)
    headline, *lines = str(caught.value).splitlines()
    assert headline == "2 of 4 runs failed:"
    assert len(lines) == 2
    (diverged,) = [line for line in lines if DIVERGING.identity in line]
    (missing,) = [line for line in lines if unknown.identity in line]
    assert "loss" in diverged
    assert "nan" in diverged
    assert "epoch 0" in diverged
    assert "seed 5" in diverged
    assert "unknown model 'nope': one of conv4, vgg11_bn" in missing
    assert store.identities() == sorted(config.identity for config in seeds(2))
    assert "nan" in store.failure(DIVERGING.identity)


def test_processes(store, tmp_path):
    """Numbers do not depend on how many run at once, nor on which process runs them."""
    configs = [DIVERGING, *seeds(3)]
    with pytest.raises(SweepError, match="1 of 4 runs failed") as caught:
        sweep.collect(configs, store, jobs=2)
    assert DIVERGING.identity in str(caught.value)
    epochs, runs = sweep.collect(configs[1:], store)
    alone = Store(tmp_path / "alone")
    for frame, other in zip((epochs, runs), sweep.collect(configs[1:], alone, jobs=1), strict=True):
        pd.testing.assert_frame_equal(
            frame.drop(columns="seconds"), other.drop(columns="seconds"), check_exact=True
        )
    assert {record.provenance["threads"] for record in store.records()} == {1}


def test_several_threads_at_once(store, tmp_path):
    configs = seeds(6)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(6) as six:
        expected, _ = sweep.collect(configs, store, one)
        measured, _ = sweep.collect(configs, Store(tmp_path / "six"), six)
    pd.testing.assert_frame_equal(
        measured.drop(columns="seconds"), expected.drop(columns="seconds"), check_exact=True
    )


@pytest.mark.parametrize("path", ["file", "file/runs"])
def test_a_store_that_cannot_be_written(tmp_path, threads, path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match=f"cannot write to the run store .*{path}"):
        sweep.collect([QUICK], Store(tmp_path / path), threads)
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.parametrize("jobs", ["0", "-1", "two", "1.5"])
def test_bad_number_of_jobs(store, monkeypatch, jobs):
    monkeypatch.setenv("PAPERLIB_JOBS", jobs)
    with pytest.raises(ValueError, match=f"PAPERLIB_JOBS must be a positive number, got '{jobs}'"):
        sweep.collect([QUICK], store)
    assert store.identities() == []


@pytest.mark.parametrize(("given", "expected"), [("3", 3), ("", len(os.sched_getaffinity(0)))])
def test_number_of_jobs(monkeypatch, given, expected):
    monkeypatch.setenv("PAPERLIB_JOBS", given)
    assert sweep.default_jobs() == expected


# Stopping

LONG_SWEEP = """
import sys

from paperlib import sweep
from paperlib.config import Config
from paperlib.runs import Store

if __name__ == "__main__":
    quick = Config(
        data="digits", train_per_class=5, test_per_class=5, model="conv4", width=1 / 16, epochs=2
    )
    sweep.collect([quick, quick.with_(epochs=10**6)], Store(sys.argv[1]), jobs=1)
"""


def group_members(group: int) -> list[int]:
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            members.append(int(stat.parent.name))
    return members


def wait_for(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("to", ["process", "group"])
def test_ctrl_c(store, tmp_path, to):
    """Alone, as a scheduler interrupts; and with its workers, as a terminal does."""
    script = tmp_path / "long_sweep.py"
    script.write_text(LONG_SWEEP)
    command = [sys.executable, str(script), str(store.path)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        assert wait_for(lambda: store.identities(), 120)
        assert len(group_members(process.pid)) > 1
        (os.kill if to == "process" else os.killpg)(process.pid, signal.SIGINT)
        assert process.wait(15) != 0
        assert wait_for(lambda: not group_members(process.pid), 5)
    finally:
        for member in group_members(process.pid):
            os.kill(member, signal.SIGKILL)
    kept = store.identities()
    assert len(kept) == len(store.runs()) == 1
    assert {path.stem for path in store.path.glob("records/*")} == set(kept)
