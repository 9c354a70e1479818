"""Sweeps: what is missing is run, once, and nothing stops the rest."""

import errno
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
import torch

from paperlib import archive, costs, executors, sweep
from paperlib.config import Config, FilterPruning, Flatness
from paperlib.runs import RunRecord, Store, StoreError
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
DISK = f"up to {costs.size(costs.disk([QUICK], 1))} of disk"
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


def test_failed_runs_are_left_alone(store, threads):
    configs = [DIVERGING, *seeds(1)]
    with pytest.raises(SweepError, match="1 of 2 runs failed"):
        sweep.collect(configs, store, threads)
    note = store.path / "failed" / f"{DIVERGING.identity}.json"
    before = note.stat().st_mtime_ns
    for again in (configs, [*configs, QUICK.with_(seed=1)]):
        with pytest.raises(SweepError) as caught:
            sweep.collect(again, store, threads)
        headline, line = str(caught.value).splitlines()
        assert headline.startswith("1 runs failed before and are left alone, but for --retry-fail")
        assert DIVERGING.identity in line
        assert "nan" in line
    assert note.stat().st_mtime_ns == before
    assert QUICK.with_(seed=1).identity in store
    told = []
    with pytest.raises(SweepError, match="1 of 1 runs failed"):
        sweep.execute(configs, store, threads, retry_failed=True, tell=told.append)
    assert note.stat().st_mtime_ns > before
    assert told[0].startswith("1 runs (1 tried again): ")


def test_what_is_told_before(store, threads):
    told = []
    sweep.execute(seeds(1), store, threads, tell=told.append)
    assert told == [f"1 runs (1 new): time unknown: nothing alike was measured here; {DISK}"]
    path = store.path / "records" / f"{QUICK.identity}.parquet"
    path.write_bytes(b"half a record")
    sweep.execute(seeds(2), store, threads, tell=told.append)
    assert told[1].startswith("2 runs (1 new, 1 damaged): time unknown")
    assert told[2].startswith(f"run again: {path} is not a whole record")
    sweep.execute(seeds(3), store, threads, tell=told.append)
    assert told[3].startswith("1 runs (1 new): about 0 s one after the other; up to ")
    sweep.execute(seeds(3), store, threads, tell=told.append)
    assert len(told) == 4


def test_states(store, threads):
    with pytest.raises(SweepError):
        sweep.collect([*seeds(2), DIVERGING], store, threads)
    damaged, new = seeds(3)[1:]
    (store.path / "records" / f"{damaged.identity}.parquet").write_bytes(b"")
    found = sweep.states([*seeds(3), DIVERGING], store)
    assert [s.state for s in found] == ["done", "damaged", "missing", "failed"]
    assert [s.config for s in found] == [*seeds(2), new, DIVERGING]
    assert found[0].epochs == QUICK.epochs
    assert "not a whole record" in found[1].error
    assert "nan" in found[3].error
    store.results = store.path / "below"
    archive.export(store, store.results / "a.parquet", [QUICK.identity])
    (store.path / "records" / f"{QUICK.identity}.parquet").unlink()
    (state,) = sweep.states([QUICK], store)
    assert (state.state, state.why) == ("done", "not run: in results")
    assert sweep.execute([QUICK], store, threads) == 0


@pytest.mark.parametrize("path", ["file", "file/runs"])
def test_a_store_that_cannot_be_written(tmp_path, threads, path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match=f"cannot write to the run store .*{path}"):
        sweep.collect([QUICK], Store(tmp_path / path), threads)
    assert (tmp_path / "file").read_text() == "not a folder"


# Costs


def measured(store: Store, config: Config, seconds: float, device: str = "cpu") -> None:
    """A record whose epochs took so many seconds each."""
    frame = pd.DataFrame({"epoch": range(config.epochs), "seconds": seconds})
    store.write(RunRecord(config, frame, {}, {"device": device}))


def test_speeds_are_those_of_runs_alike_on_this_device(store, tmp_path):
    other = QUICK.with_(pruning=None)
    narrower = QUICK.with_(width=1 / 32)
    measured(store, QUICK.with_(seed=3), 2.0)
    measured(store, QUICK.with_(seed=4), 4.0)
    measured(store, QUICK.with_(seed=5), 50.0, "cuda")
    speeds = costs.speeds(store, "cpu")
    assert speeds.epoch(QUICK) == speeds.epoch(other) == 3.0
    assert math.isnan(speeds.epoch(narrower))
    assert math.isnan(speeds.epoch(QUICK.with_(flatness=Flatness(1))))
    assert costs.speeds(store, "cuda:1").epoch(QUICK) == 50.0
    measured(store, other.with_(seed=3), 7.0)
    assert costs.speeds(store, "cpu").epoch(other) == 7.0
    todo = sweep.states([QUICK, narrower], store)
    told = sweep.forecast(todo, 0, 2, costs.speeds(store, "cpu"))
    assert told.startswith("2 runs (2 new): about 6 s, 2 at once, and 1 of unknown length; up to ")
    # what others measured says nothing of this machine
    archive.export(store, tmp_path / "results" / "all.parquet")
    above = Store(tmp_path / "above", tmp_path / "results")
    assert math.isnan(costs.speeds(above, "cpu").epoch(QUICK))


@pytest.mark.parametrize(
    ("seconds", "device", "flags", "precision", "expected"),
    [
        (5000.0, "cpu", "fma avx512_bf16 avx2", "float32", True),
        (5000.0, "cpu", "amx_bf16", "float32", True),
        (5.0, "auto", "avx512_bf16", "float32", False),
        (math.nan, "auto", "avx512_bf16", "float32", False),
        (5000.0, "cuda", "avx512_bf16", "float32", False),
        (5000.0, "auto", "avx2 avx512_bf16x", "float32", False),
        (5000.0, "auto", "avx512_bf16", "bfloat16", False),
    ],
)
def test_a_hint_at_bfloat16(monkeypatch, seconds, device, flags, precision, expected):
    monkeypatch.setattr(Path, "read_text", lambda _: f"processor: 0\nflags\t: {flags}\nbugs:\n")
    monkeypatch.setattr(Path, "glob", lambda *_: [])
    said = costs.hint([QUICK.with_(precision=precision)], seconds, device)
    assert (said is not None) is expected


def test_disk_of_records_and_checkpoints(store, threads):
    one = costs.disk([QUICK], 1)
    assert costs.disk([QUICK] * 2, 1) > one
    wide = QUICK.with_(model="vgg11_bn", width=1.0)
    # two checkpoints of weights and two averages, 9 million floats each
    assert costs.disk([wide] * 3, 2) - costs.disk([wide] * 3, 1) == pytest.approx(221e6, rel=0.01)
    sweep.collect([QUICK], store, threads)
    taken = sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
    assert taken < one


# Disks


@pytest.fixture
def tmpfs(tmp_path):
    """Mounts a disk of its own at a folder, of so many bytes."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("only root may mount a disk")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small(threads, monkeypatch, store):
    monkeypatch.setattr(costs, "free", lambda path: 10_000)
    with pytest.raises(StoreError, match=r"is too small: these runs need 4\..* MB, 10.0 kB free"):
        sweep.collect([QUICK], store, threads)
    assert store.identities() == []


def test_a_small_disk_is_refused(tmpfs, threads):
    store = Store(tmpfs(2 << 20) / "runs")
    with pytest.raises(StoreError, match="is too small: these runs need"):
        sweep.collect([QUICK], store, threads)


def test_a_disk_that_fills_up(tmpfs, threads, monkeypatch):
    """The sweep ends, says why, keeps what is done, and goes on when there is room again."""
    disk = tmpfs(6 << 20)
    store = Store(disk / "runs")
    sweep.collect(seeds(1), store, threads)

    class Fill:
        def __init__(self, *_):
            pass

        def __call__(self, moment):
            with suppress(OSError), (disk / "filler").open("wb", 0) as file:
                while True:
                    file.write(bytes(4096))
            monkeypatch.setattr(Store, "check_writable", cannot)  # not even for a moment

        def remove(self):
            pass

    def cannot(self):
        raise StoreError("cannot write to the run store")

    monkeypatch.setattr(sweep, "_Note", Fill)
    with (
        pytest.raises(StoreError, match=r"disk of .* is too small: these runs need"),
        ThreadPoolExecutor(1) as others,
    ):
        sweep.collect(seeds(4), store, others)
    assert len(store.runs()) == 1
    monkeypatch.undo()
    (disk / "filler").unlink()
    epochs, _ = sweep.collect(seeds(4), store, threads)
    assert len(epochs) == 8


def test_no_space_while_a_record_is_written(store, threads, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises((SweepError, StoreError), match="No space left on device"):
        sweep.collect(seeds(2), store, threads)
    monkeypatch.undo()
    assert store.identities() == []
    assert len(sweep.collect(seeds(2), store, threads)[1]) == 2


def test_a_store_that_is_only_read(tmpfs, threads):
    folder = tmpfs(20 << 20)
    store = Store(folder / "runs")
    expected = sweep.collect(seeds(2), store, threads)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    for frame, other in zip(sweep.collect(seeds(2), store, threads), expected, strict=True):
        pd.testing.assert_frame_equal(frame, other)
    assert [s.state for s in sweep.states(seeds(3), store)] == ["done", "done", "missing"]
    with pytest.raises(StoreError, match=r"cannot write to the run store .*Read-only"):
        sweep.collect(seeds(3), store, threads)


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


@pytest.mark.parametrize(
    ("files", "visible", "expected"),
    [((), "", 0), (("nvidiactl",), "", 0), (("nvidia0",), "", 2), (("dxg",), "", 2), ((), "0", 2)],
)
def test_gpus_are_looked_for_without_torch(files, visible, expected, tmp_path, monkeypatch):
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(executors, "Path", lambda path: tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert executors.gpus() == expected


@pytest.mark.parametrize(
    ("asked", "jobs", "per_device", "gpus", "expected"),
    [
        ("auto", None, None, 0, (["auto"] * 5, 1)),
        ("cpu", None, None, 2, (["cpu"] * 5, 1)),
        ("auto", 3, None, 0, (["auto"] * 3, 1)),
        ("auto", None, 2, 0, (["auto"] * 2, 1)),
        ("auto", None, None, 2, (["cuda:0", "cuda:1"], 1)),
        ("cuda", None, 4, 2, (["cuda:0", "cuda:1"], 4)),
        ("cuda", 3, None, 2, (["cuda:0", "cuda:1", "cuda:0"], 1)),
        ("cuda:1", None, 2, 2, (["cuda:1"], 2)),
        ("cuda:1", 2, 3, 2, (["cuda:1"] * 2, 3)),
    ],
)
def test_devices(monkeypatch, asked, jobs, per_device, gpus, expected):
    monkeypatch.setattr(executors, "gpus", lambda: gpus)
    assert executors.devices(asked, jobs, per_device, cores=5) == expected


# Several runs at once in one process, as on a GPU


def test_at_once_in_each_process(store, tmp_path, threads, monkeypatch):
    monkeypatch.setattr(executors, "devices", lambda *_: (["cpu", "cpu"], 3))
    told = []
    with pytest.raises(SweepError, match="1 of 5 runs failed") as caught:
        sweep.execute([*seeds(4), DIVERGING], store, tell=told.append)
    assert "the loss of" in str(caught.value)
    epochs, _ = sweep.collect(seeds(4), Store(tmp_path / "alone"), threads)
    together, _ = sweep.collect(seeds(4), store)
    assert epochs.drop(columns="seconds").equals(together.drop(columns="seconds"))


def test_what_several_die_of_is_found(store, dying, tmp_path, monkeypatch):
    (tmp_path / "lives").write_text("9")
    monkeypatch.setattr(executors, "devices", lambda *_: (["cpu"], 3))
    with pytest.raises(SweepError, match="1 of 3 runs failed"):
        sweep.execute([dying, *seeds(2)], store)
    assert (tmp_path / "lives").read_text() == "6"
    assert sorted(store.identities()) == sorted(c.identity for c in seeds(2))


# Workers that die

DYING = """
import os, signal
from pathlib import Path
from paperlib import models

def build(num_classes, in_channels):
    lives = Path(__file__).with_name("lives")
    left = int(lives.read_text())
    if left:
        lives.write_text(str(left - 1))
        os.kill(os.getpid(), signal.SIGKILL)
    return models.build("conv4", num_classes, in_channels, 1 / 16)
"""


SPOILING = """
from pathlib import Path
from paperlib.graphs import CaptureError

def build(num_classes, in_channels):
    lives = Path(__file__).with_name("lives")
    left = int(lives.read_text())
    lives.write_text(str(left - 1))
    raise CaptureError("a capture failed")
"""


@pytest.fixture
def dying(tmp_path, monkeypatch) -> Config:
    """A run whose process dies as often as the file `lives` says."""
    (tmp_path / "dying_network.py").write_text(DYING)
    (tmp_path / "lives").write_text("1")
    monkeypatch.syspath_prepend(str(tmp_path))
    return QUICK.with_(model="dying_network:build", width=1.0)


def test_a_worker_that_dies_is_replaced(store, dying):
    assert sweep.execute([dying, *seeds(2)], store, jobs=1) == 3
    assert len(store.runs()) == 3


def test_a_run_that_kills_its_workers_fails(store, dying, tmp_path):
    (tmp_path / "lives").write_text("9")
    with pytest.raises(SweepError, match="1 of 3 runs failed") as caught:
        sweep.collect([dying, *seeds(2)], store, jobs=1)
    assert "ended by SIGKILL: out of memory?, 3 times" in str(caught.value)
    assert (tmp_path / "lives").read_text() == "6"
    assert sorted(store.identities()) == sorted(c.identity for c in seeds(2))
    assert "SIGKILL" in store.failure(dying.identity)
    (tmp_path / "lives").write_text("0")
    assert sweep.execute([dying], store, jobs=1, retry_failed=True) == 1
    assert store.failure(dying.identity) is None


def test_processes_take_any_work():
    with executors.Processes(["cpu"]) as pool:
        assert pool.submit(max, 3, 7).result(60) == 7
        with pytest.raises(ZeroDivisionError):
            pool.submit(divmod, 1, 0).result(60)
        with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
            pool.submit(lambda: 0).result(60)
        with pytest.raises(executors.WorkerDied, match="ended with code 3"):
            pool.submit(os._exit, 3).result(60)
        assert pool.submit(max, 3, 8).result(60) == 8
        first = pool.submit(os.getpid).result(60)
        with pytest.raises(executors.WorkerDied, match="the GPU is gone"):
            pool.submit(gone).result(60)
        assert pool.submit(os.getpid).result(60) != first
    with pytest.raises(RuntimeError, match="shutdown"):
        pool.submit(max, 1, 2)


def gone():
    raise executors.WorkerDied("the GPU is gone")


def numbered(name: str, count: int):
    """A generator of so many turns; returns what it and all others of the process had by then."""
    for _ in range(count):
        TURNS.append(name)
        yield
    return list(TURNS)


TURNS: list[str] = []


def spoiling():
    """Ends its process in its third turn."""
    yield
    yield
    raise executors.WorkerDied("a capture failed")


def test_processes_let_generators_take_turns():
    with executors.Processes(["cpu"], at_once=3) as pool:
        futures = [pool.submit(numbered, name, 2 * 10**5) for name in "ab"]
        assert pool.submit(max, 3, 7).result(60) == 7  # they are asked between turns
        turns, _ = (future.result(60) for future in futures)
        assert turns.count("a") == 2 * 10**5
        assert turns.count("b") > 1000
        more = [pool.submit(numbered, "c", 1) for _ in range(9)]
        assert [len(future.result(60)) for future in more][-1] == 4 * 10**5 + 9


def test_what_a_dead_process_had_fails_and_no_more():
    with executors.Processes(["cpu"], at_once=2) as pool:
        futures = [pool.submit(numbered, "a", 10**9), pool.submit(spoiling)]
        later = [pool.submit(numbered, "b", 1) for _ in range(3)]
        errors = [future.exception(60) for future in futures]
        assert isinstance(errors[0], executors.WorkerDied)
        assert errors[0] is errors[1]
        assert max(len(future.result(60)) for future in later) <= 3


def test_one_that_wants_to_be_alone_comes_last():
    order, turns = [], executors.Turns()

    def steps(name, count, wishes=()):
        for i in range(count):
            order.append(name)
            yield executors.ALONE if i in wishes else None
        return name

    for name, *how in (("a", 3, [0]), ("b", 3), ("c", 2, [0, 1])):
        turns.add(name, steps(name, *how))
    ended = []
    while turns:
        ended += [key for key, worked, _ in turns.turn() if worked]
        if ended == ["b"] and "d" not in order:
            turns.add("d", steps("d", 2))
    assert ended[0] == "b"
    assert sorted(ended) == list("abcd")
    assert "".join(order).startswith("abcbb")
    assert turns._going == turns._later == {}


def test_runs_go_on_elsewhere_when_a_capture_spoils_their_process(
    store, dying, tmp_path, monkeypatch
):
    """Those beside it begin again, and the last try of each is alone."""
    (tmp_path / "lives").write_text("9")
    (tmp_path / "dying_network.py").write_text(SPOILING)
    configs = [*seeds(2), dying, *[c.with_(seed=9 + c.seed) for c in seeds(2)]]
    monkeypatch.setattr(executors, "devices", lambda *_: (["cpu"], 3))
    with pytest.raises(SweepError, match="1 of 5 runs failed") as caught:
        sweep.execute(configs, store)
    assert "a capture failed, 3 times" in str(caught.value)
    assert (tmp_path / "lives").read_text() == "6"
    assert len(store.identities()) == 4
    assert list(store.failures()) == [dying.identity]


def test_workers_that_all_die_end_the_sweep(store, dying, tmp_path, monkeypatch):
    (tmp_path / "lives").write_text("99")
    monkeypatch.setattr(executors, "devices", lambda *_: (["cpu"], 4))
    monkeypatch.setattr(sweep, "DEATHS", 4)
    with pytest.raises(SweepError, match="the workers die, 4 in a row"):
        sweep.execute([dying.with_(seed=seed) for seed in range(8)], store)
    assert 90 <= int((tmp_path / "lives").read_text()) <= 95


# Limited time


def test_order_is_kept(store, monkeypatch):
    """Of runs given one by one, and of several at once in a process."""
    configs = [QUICK.with_(seed=seed) for seed in (3, 1, 2, 0)]
    begun = []
    monkeypatch.setattr(executors, "devices", lambda *_: (["cpu"], 2))
    real = executors.Processes.submit

    def submit(pool, work, config, *rest):
        begun.append(config)
        return real(pool, work, config, *rest)

    monkeypatch.setattr(executors.Processes, "submit", submit)
    sweep.execute(configs, store)
    assert begun == configs


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_sweep_stops_when_its_time_is_up(store, at_once, monkeypatch):
    monkeypatch.setattr(executors, "devices", lambda *_: (["cpu"], at_once))
    long = [config.with_(epochs=10**6, batch=16) for config in seeds(3)]  # none alike measured
    start = time.monotonic()
    assert sweep.execute([QUICK, *long], store, minutes=0.3) == 1
    assert 17 < time.monotonic() - start < 40
    assert store.identities() == [QUICK.identity]
    assert not store.failures()
    found = sweep.states([QUICK, *long], store)
    stopped = [state for state in found if state.state == "partial"]
    assert len(stopped) == at_once
    assert all(state.epochs > 10 for state in stopped)
    assert [state.state for state in found][1 : 1 + at_once] == ["partial"] * at_once
    assert not list(store.path.glob("claims/*.json"))


def test_what_cannot_end_in_time_is_not_begun(store, threads):
    slow, unknown = QUICK.with_(width=1 / 32), QUICK
    measured(store, slow.with_(seed=9), 40.0)
    told = []
    assert sweep.execute([slow, unknown], store, threads, minutes=1, tell=told.append) == 1
    assert unknown.identity in store
    assert slow.identity not in store
    assert sweep.execute([slow], store, threads, minutes=2) == 1


def test_no_time_is_wrong(store, threads):
    with pytest.raises(ValueError, match="minutes must be a positive number, got 0"):
        sweep.execute([QUICK], store, threads, minutes=0)


# Several at one store

COUNTED = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from paperlib import sweep
from paperlib.config import Config, FilterPruning
from paperlib.runs import Store

def score(conv):
    with open(Path(__file__).with_name("events"), "a") as file:
        file.write("event\\n")
    return conv.weight.abs().sum((1, 2, 3))

def configs():
    pruning = FilterPruning((0.5,), ((0, 1),), "counted_runs:score")
    return [
        Config(data="digits", train_per_class=20, test_per_class=5, model="conv4", width=1 / 16,
               epochs=2, batch=32, pruning=pruning, seed=seed)
        for seed in range(6)
    ]

if __name__ == "__main__":
    import torch
    torch.set_num_threads(1)
    while not Path(__file__).with_name("go").exists():
        time.sleep(0.01)
    with ThreadPoolExecutor(1) as threads:
        _, runs = sweep.collect(configs(), Store(sys.argv[1]), threads)
    assert len(runs) == 6
"""


@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_share_a_store(store, tmp_path, count):
    """Nothing is computed twice, and nothing is lost."""
    script = tmp_path / "counted_runs.py"
    script.write_text(COUNTED)
    command = [sys.executable, str(script), str(store.path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    processes = [subprocess.Popen(command, env=environment) for _ in range(count)]
    time.sleep(5)
    (tmp_path / "go").touch()
    assert [process.wait(200) for process in processes] == [0] * count
    assert len((tmp_path / "events").read_text().splitlines()) == 6 * 2
    assert len(store.runs()) == 6


def test_a_cluster_with_a_worker_that_is_killed(store, tmp_path, threads):
    pytest.importorskip("distributed")
    configs = seeds(5, epochs=15)
    with executors.cluster("local:3") as cluster:
        pids = list(cluster.client.run(os.getpid).values())
        assert len(pids) == cluster.slots == 3

        def kill():
            assert wait_for(store.identities, 120)
            os.kill(pids[0], signal.SIGKILL)

        with ThreadPoolExecutor(1) as other:
            killing = other.submit(kill)
            measured = sweep.collect(configs, store, cluster)
            killing.result()
    alone = sweep.collect(configs, Store(tmp_path / "alone"), threads)
    for frame, expected in zip(measured, alone, strict=True):
        pd.testing.assert_frame_equal(
            frame.drop(columns="seconds"), expected.drop(columns="seconds"), check_exact=True
        )


def test_records_that_are_sent_back(store, tmp_path, threads, monkeypatch):
    theirs = Store(tmp_path / "theirs")
    monkeypatch.setenv("PAPERLIB_RUNS", str(theirs.path))
    config = QUICK.with_(model="vgg11_bn", pruning=None, histograms=True)
    _, frame = sweep.collect([config], store, threads, send_back=True)
    assert len(frame) == 1
    assert store.read(config.identity).arrays.keys() == {"untrained", "trained"}
    assert theirs.identities() == store.identities()


def test_dask_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(executors.ClusterError, match="pip install 'distributed"),
        executors.cluster("local:2"),
    ):
        pass


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
@pytest.mark.parametrize("to", ["process", "group", "kill", "term"])
def test_ctrl_c(store, tmp_path, to):
    """Alone, as a scheduler interrupts; with its workers, as a terminal does; and killed."""
    script = tmp_path / "long_sweep.py"
    script.write_text(LONG_SWEEP)
    command = [sys.executable, str(script), str(store.path)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        assert wait_for(lambda: store.identities(), 120)
        assert len(group_members(process.pid)) > 1
        if to == "group":
            os.killpg(process.pid, signal.SIGINT)
        else:
            kinds = {"process": signal.SIGINT, "kill": signal.SIGKILL, "term": signal.SIGTERM}
            os.kill(process.pid, kinds[to])
        assert process.wait(15) != 0
        assert wait_for(lambda: not group_members(process.pid), 5)
    finally:
        for member in group_members(process.pid):
            os.kill(member, signal.SIGKILL)
    kept = store.identities()
    assert len(kept) == len(store.runs()) == 1
    assert {path.stem for path in store.path.glob("records/*")} == set(kept)
