"""Sweeps: what is missing is run, once, and nothing stops the rest."""

import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM

import pandas as pd
import psutil
import pytest

from paperlib import sweep
from paperlib.config import Config, FilterPruning, Flatness
from paperlib.runs import RunRecord, Store, StoreError
from paperlib.sweep import SweepError, workers
from paperlib.sweep.states import State, forecast, seconds, speeds
from tests import small
from tests.store.helpers import exported, file, record

QUICK = small.VGG.with_(model="conv4", epochs=2, batch=32, pruning=FilterPruning((0.5,), ((0, 1),)))
DIVERGING = QUICK.with_(optimizer="sgd", learning_rate=1e30, seed=5)


@pytest.fixture
def threads():
    with ThreadPoolExecutor(1) as executor:
        yield executor


def seeds(count: int, **changes) -> list[Config]:
    return [QUICK.with_(seed=seed, **changes) for seed in range(count)]


def identities(configs) -> list[str]:
    return sorted(config.identity for config in configs)


def assert_same(frames, others) -> None:
    for frame, other in zip(frames, others, strict=True):
        pd.testing.assert_frame_equal(
            frame.drop(columns="seconds"), other.drop(columns="seconds"), check_exact=True
        )


def test_only_what_is_missing_is_run_and_once(store, threads, capsys):
    assert sweep.execute([QUICK, *seeds(2), QUICK.with_()], store, threads) == 2
    before = {path: path.stat().st_mtime_ns for path in store.path.glob("records/*")}
    assert sweep.missing(seeds(3), store) == seeds(3)[2:]
    file(store, seeds(2)[1].identity).write_bytes(b"half a record")
    found = sweep.states([*seeds(3), QUICK], store)
    assert [state.state for state in found] == ["done", "damaged", "missing"]
    capsys.readouterr()
    assert sweep.execute(seeds(3), store, threads) == 2
    told = "2 runs (1 damaged, 1 missing), 1 in parallel: about "
    assert capsys.readouterr().err.startswith(told)
    after = {path: path.stat().st_mtime_ns for path in store.path.glob("records/*")}
    assert [p for p in before if after[p] == before[p]] == [file(store, QUICK.identity)]
    epochs, _ = sweep.collect(seeds(3), store)
    assert epochs.run.tolist() == [config.identity for config in seeds(3) for _ in range(2)]
    assert sweep.collect([], Store(store.path / "none"))[0].empty
    assert not (store.path / "none").exists()


def test_failures_are_named_noted_and_left_alone(store, threads):
    unknown = QUICK.with_(model="nope")
    with pytest.raises(SweepError) as caught:
        sweep.execute([DIVERGING, unknown, *seeds(2)], store, threads)
    assert all(word in str(caught.value) for word in (DIVERGING.identity, "'nope'", "vgg11_bn"))
    assert store.identities() == identities(seeds(2))
    assert list(store.failures()) == [DIVERGING.identity]
    note = store.path / "failed" / f"{DIVERGING.identity}.json"
    before = note.stat().st_mtime_ns
    with pytest.raises(SweepError, match=DIVERGING.identity):
        sweep.execute([DIVERGING, *seeds(3)], store, threads)
    assert note.stat().st_mtime_ns == before
    assert store.identities() == identities(seeds(3))
    with pytest.raises(SweepError, match=DIVERGING.identity):
        sweep.execute([DIVERGING], store, threads, retry_failed=True)
    assert note.stat().st_mtime_ns > before


def test_numbers_depend_neither_on_processes_nor_on_threads(store, tmp_path, monkeypatch):
    """One process a run; several runs in each of two processes; threads of this one."""
    expected = sweep.collect(seeds(3), store, jobs=2)
    assert {record.provenance["threads"] for record in store.records()} == {1}
    with ThreadPoolExecutor(3) as three:
        assert_same(sweep.collect(seeds(3), Store(tmp_path / "a"), three), expected)
    monkeypatch.setattr(workers, "devices", lambda *_: (["cpu", "cpu"], 2))
    with pytest.raises(SweepError, match=DIVERGING.identity):
        sweep.execute([*seeds(3), DIVERGING], Store(tmp_path / "b"))
    assert_same(sweep.collect(seeds(3), Store(tmp_path / "b")), expected)


def test_records_that_are_sent_back(store, tmp_path, threads, monkeypatch):
    theirs = Store(tmp_path / "theirs")
    monkeypatch.setenv("PAPERLIB_RUNS", str(theirs.path))
    config = QUICK.with_(model="vgg11_bn", pruning=None, histograms=True)
    sweep.execute([config], store, threads, send_back=True)
    assert store.read(config.identity).arrays.keys() == {"untrained", "trained"}
    assert theirs.identities() == store.identities()


def measured(store: Store, config: Config, seconds: float, device: str = "cpu") -> None:
    frame = pd.DataFrame({"epoch": range(config.epochs), "seconds": seconds})
    store.write(RunRecord(config, frame, {}, {"device": device}))


def test_speeds_are_those_of_runs_alike_on_this_device(store):
    narrower = QUICK.with_(width=1 / 32)
    devices = ("cpu", "cpu", "cpu", "cuda")
    for seed, (seconds_, device) in enumerate(zip((2.0, 4.0, 30.0, 50.0), devices, strict=True)):
        measured(store, QUICK.with_(seed=seed + 3), seconds_, device)
    known = speeds(store, "cpu")

    def epoch(config: Config, of: dict = known) -> float:
        return seconds(State(config.identity, config, "missing", 1, ""), of)

    assert epoch(QUICK) == epoch(QUICK.with_(pruning=None)) == 4.0  # the median; one is left
    assert epoch(QUICK, speeds(store, "cuda:1")) == 50.0
    assert math.isnan(epoch(narrower))
    assert math.isnan(epoch(QUICK.with_(flatness=Flatness(1))))
    told = forecast(sweep.states([QUICK, narrower], store), 2, known)
    assert told == "2 runs (2 missing), 2 in parallel: about 00:08, 1 of unknown length"


@pytest.mark.parametrize("together", [1, 2])
def test_a_sweep_stops_when_its_time_is_up(store, together, monkeypatch):
    """Runs at work leave checkpoints; others are not begun, nor one known to take too long."""
    monkeypatch.setattr(workers, "devices", lambda *_: (["cpu"], together))
    monkeypatch.setattr(workers, "Processes", lambda devices: ThreadPoolExecutor(len(devices)))
    slow = QUICK.with_(width=1 / 32)
    measured(store, slow.with_(seed=9), 400.0)
    long = [config.with_(epochs=10**6, batch=16) for config in seeds(3)]
    first = QUICK.with_(seed=7)  # the first one in a process takes longer
    assert sweep.execute([first], store) == 1
    assert sweep.execute([slow, QUICK, *long], store, minutes=0.3) == 1
    assert store.identities() == identities([QUICK, first, slow.with_(seed=9)])
    assert not store.failures()
    slow_state, done, *rest = [s.state for s in sweep.states([slow, QUICK, *long], store)]
    assert (slow_state, done) == ("missing", "done")
    assert rest == sorted(rest, reverse=True)  # in the order given, "partial" first
    assert 1 <= rest.count("partial") <= together
    assert rest.count("partial") + rest.count("missing") == 3


FAULTY = """
from torch import nn
from paperlib import models
def one(num_classes, in_channels):
    layers = nn.Conv2d(in_channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4, num_classes))
def whole(conv):
    return conv.weight.abs().sum()
def sloped(conv):
    return (conv.weight * conv.weight.grad).flatten(1).sum(1)
"""


@pytest.mark.parametrize(
    ("model", "score", "named"),
    [
        ("conv4", "faulty:nope", "faulty:nope"),
        ("conv4", "faulty:whole", "score"),
        ("faulty:one", "l2", "1"),
        ("faulty:whole", "l2", "num_classes"),
        ("nowhere:f", "l2", "nowhere"),
    ],
)
def test_faults_of_named_functions_are_found_before_anything_is_trained(
    store, threads, tmp_path, monkeypatch, model, score, named
):
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(str(tmp_path))
    pruning = FilterPruning((0.5, 0.5), ((0, 1), (0, 1)), score)
    config = QUICK.with_(model=model, width=1.0, pruning=pruning)
    with pytest.raises(ValueError, match=rf"(?s){config.identity}.*{named}"):
        sweep.execute([*seeds(1), config], store, threads)
    assert not store.identities()


def test_named_functions_are_not_imported_here_and_may_use_gradients(store, tmp_path, monkeypatch):
    """The next sweep of one process takes the file that is edited in between."""
    monkeypatch.syspath_prepend(str(tmp_path))
    config = QUICK.with_(pruning=FilterPruning((0.5,), ((0, 1),), "sloping:sloped"))
    checksums = set()
    for comment in ("# first", "# second"):
        (tmp_path / "sloping.py").write_text(f"{FAULTY}{comment}")
        assert sweep.execute([config], store, jobs=1, retrain_changed=True) == 1
        checksums.add(store.read(config).provenance["source"])
    assert len(checksums) == 2


DYING = """
import os, signal
from pathlib import Path
from paperlib import models
from paperlib.extras.fast.graphs import CaptureError

def build(num_classes, in_channels):
    lives = Path(__file__).with_name("lives")
    left = int(lives.read_text())
    if left:
        lives.write_text(str(left - 1))
        if "SPOILING" in os.environ:
            raise CaptureError("a capture failed")
        os.kill(os.getpid(), signal.SIGKILL)
    return models.build("conv4", num_classes, in_channels, 1 / 16)
"""


@pytest.fixture
def dying(tmp_path, monkeypatch) -> Config:
    """A run whose process dies as often as the file `lives` says."""
    (tmp_path / "dying_network.py").write_text(DYING)
    monkeypatch.syspath_prepend(str(tmp_path))
    return QUICK.with_(model="dying_network:build", width=1.0)


@pytest.mark.parametrize(("kind", "together"), [("killed", 1), ("killed", 2), ("SPOILING", 2)])
def test_a_run_that_kills_its_process_is_found(store, dying, tmp_path, monkeypatch, kind, together):
    """Killed, or with a GPU that does no more: the others are done, the last try is alone."""
    monkeypatch.setenv(kind, "1")
    (tmp_path / "lives").write_text("9")
    monkeypatch.setattr(workers, "devices", lambda *_: (["cpu"], together))
    with pytest.raises(SweepError, match=dying.identity):
        sweep.execute([seeds(1)[0], dying, *seeds(3)[1:]], store)
    assert (tmp_path / "lives").read_text() == "5"  # tried once before the three times
    assert store.identities() == identities(seeds(3))
    assert list(store.failures()) == [dying.identity]
    (tmp_path / "lives").write_text("0")
    assert sweep.execute([dying], store, retry_failed=True) == 1
    assert not store.failures()


def test_a_cluster_with_a_worker_that_is_killed(store, tmp_path, threads):
    pytest.importorskip("distributed")
    from paperlib.sweep import cluster

    configs = seeds(4, epochs=15)
    with cluster.connected("local:2") as two:
        pids = [two.submit(os.getpid).result() for _ in range(2)]

        def kill():
            assert wait_for(store.identities, 120)
            os.kill(pids[0], SIGKILL)

        with ThreadPoolExecutor(1) as other:
            killing = other.submit(kill)
            frames = sweep.collect(configs, store, two)
            killing.result()
    assert_same(frames, sweep.collect(configs, Store(tmp_path / "alone"), threads))


SCRIPT = """
import sys
from pathlib import Path
from paperlib import sweep
from paperlib.config import FilterPruning
from paperlib.runs import Store
from tests import small

def score(conv):
    with open(Path(__file__).with_name("events"), "a") as file:
        file.write("event\\n")
    return conv.weight.abs().sum((1, 2, 3))

pruning = FilterPruning((0.5,), ((0, 1),), "counted_runs:score")
quick = small.VGG.with_(model="conv4", train_per_class=20, epochs=2, batch=32, pruning=pruning)
def main():
    seeds = [quick.with_(seed=seed) for seed in range(4)]
    configs = {"seeds": seeds, "long": [quick, quick.with_(epochs=10**6)]}[sys.argv[2]]
    sweep.collect(configs, Store(sys.argv[1]), jobs=1)
"""
GUARD = 'if __name__ == "__main__":\n    main()\n'


def started(folder: Path, store: Store, what: str, end: str = GUARD) -> subprocess.Popen:
    script = folder / "counted_runs.py"
    script.write_text(SCRIPT + end)
    path = os.pathsep.join([str(folder), str(Path(sweep.__file__).parents[2])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    options = {"env": environment, "start_new_session": True, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, script, store.path, what], text=True, **options)


def test_two_sweeps_on_one_store(store, tmp_path):
    """Nothing is computed twice, and nothing is lost."""
    processes = [started(tmp_path, store, "seeds") for _ in range(2)]
    for process in processes:
        assert process.communicate(timeout=300)
        assert process.returncode == 0
    tried = range(1, 3)  # by each sweep that has runs to do
    assert len((tmp_path / "events").read_text().splitlines()) - 4 * 2 in tried
    assert len(store.runs()) == 4


def test_a_script_without_a_main_guard(store, tmp_path):
    process = started(tmp_path, store, "seeds", "main()\n")
    _, error = process.communicate(timeout=300)
    assert process.returncode == 1
    assert error.count("Traceback") <= 2  # this process's alone: the error and its cause
    assert '__name__ == "__main__"' in error.splitlines()[-1]
    assert not store.identities()
    assert not store.failures()


def wait_for(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return bool(condition())


@pytest.mark.parametrize(
    ("send", "number"),
    [(os.killpg, SIGINT), (os.kill, SIGINT), (os.kill, SIGTERM), (os.kill, SIGKILL)],
)
def test_the_end_of_a_sweep_half_way(store, tmp_path, send, number):
    """Ctrl-C by a scheduler, by a terminal, and kill -9: workers end, what is done is kept."""
    process = started(tmp_path, store, "long")
    workers_ = []
    try:
        assert wait_for(store.identities, 120)
        workers_ = psutil.Process(process.pid).children(recursive=True)
        assert workers_
        send(process.pid, number)
        assert process.wait(60) != 0
        _, alive = psutil.wait_procs(workers_, 30)
        assert not alive
    finally:
        process.kill()
        for left in workers_:
            with suppress(psutil.NoSuchProcess):
                left.kill()
    assert len(store.identities()) == len(store.runs()) == 1


def test_records_of_other_data_or_folders(store, tmp_path, threads):
    """They stop a sweep before anything is run, and are replaced only if that is asked for."""
    known = record(QUICK, data="0" * 32)
    store.write(known)
    alike = [QUICK.with_(data=f"images:{tmp_path / place / 'photos'}") for place in "ab"]
    store.write(record(alike[0]))
    for configs in ([QUICK], [alike[1]]):
        (state,) = sweep.states(configs, store)
        assert state.state == "changed"
        for use in (sweep.execute, sweep.collect, sweep.missing):
            with pytest.raises(StoreError, match=configs[0].identity):
                use(configs, store)
    with pytest.raises(StoreError, match="photos"):
        sweep.collect(alike, store)
    with pytest.raises(ValueError, match=str(tmp_path / "b")):  # nothing to train on
        sweep.execute([QUICK, alike[1]], store, threads, retrain_changed=True)
    assert len(store.own()) == 2
    assert store.read(QUICK.identity).same_numbers(known)
    below = Store(store.path, exported(store, tmp_path / "other").results)
    with pytest.raises(StoreError, match=QUICK.identity):  # it is in the read-only layer, too
        sweep.execute([QUICK], below, threads, retrain_changed=True)
    assert sweep.execute([QUICK], store, threads, retrain_changed=True) == 1
    assert len(store.read(QUICK).epochs) == QUICK.epochs
    assert sweep.execute([QUICK], store, threads, retrain_changed=True) == 0
