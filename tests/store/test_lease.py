"""Claims: a run is trained once, however many want it, and none is held by the dead."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from paperlib import checkpoints, locks, training
from paperlib.config import Config
from paperlib.locks import Claimed, Lost, claim
from paperlib.runs import Store, StoreError
from paperlib.training import TrainingError

torch.set_num_threads(1)

RUN = "0123456789abcdef"
QUICK = Config(data="digits", train_per_class=5, test_per_class=5, width=1 / 16, epochs=4, batch=16)

HOLDER = """
import sys, time
from paperlib import locks
with locks.claim(sys.argv[1], sys.argv[2], wait=False):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def other(tmp_path):
    """Another process, which holds the claim on RUN until a line is sent to it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), RUN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    with process:
        yield process
        process.kill()


def claimed_elsewhere(store: Path, run: str = RUN, age: float = 0.0) -> Path:
    """The claim of a host that no lock of ours reaches, touched `age` seconds ago."""
    path = store / "claims" / f"{run}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"host": "elsewhere", "pid": 7, "kernel": "other", "since": "then", "token": "t"}
    path.write_text(json.dumps(about))
    os.utime(path, (time.time() - age,) * 2)
    return path


def free(store: Path, run: str = RUN) -> bool:
    try:
        with claim(store, run, wait=False):
            return True
    except Claimed:
        return False


def test_held_and_given_back(tmp_path):
    with claim(tmp_path, RUN) as held:
        held.check()
        assert not free(tmp_path)
        assert free(tmp_path, "another")
        assert locks.holder(tmp_path, RUN)["pid"] == os.getpid()
    assert free(tmp_path)
    assert locks.holder(tmp_path, RUN) is None
    assert [path.name for path in (tmp_path / "claims").glob("*.json")] == []


def test_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyError), claim(tmp_path, RUN):
        raise KeyError
    assert free(tmp_path)


def test_of_a_live_process(tmp_path, other):
    with pytest.raises(Claimed, match=f"{RUN} is claimed by process {other.pid} on .* since 2"):
        claim(tmp_path, RUN, wait=False).__enter__()
    assert locks.holder(tmp_path, RUN)["pid"] == other.pid
    threading.Timer(0.3, lambda: (other.stdin.write("\n"), other.stdin.flush())).start()
    with claim(tmp_path, RUN):
        assert other.wait(10) == 0


def test_of_a_dead_process(tmp_path, other):
    other.kill()
    other.wait(10)
    assert locks.holder(tmp_path, RUN)["pid"] == other.pid
    assert free(tmp_path)
    assert locks.holder(tmp_path, RUN) is None


def test_of_a_paused_process(tmp_path, other, monkeypatch):
    """However long it is, and it goes on unharmed."""
    other.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(locks, "STALE", -1.0)
    assert not free(tmp_path)
    other.send_signal(signal.SIGCONT)
    other.communicate("\n", timeout=10)
    assert other.returncode == 0
    assert free(tmp_path)


def test_one_at_a_time_among_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "POLL", 0.001)
    inside, most = [], []

    def work(_):
        with claim(tmp_path, RUN):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.001)
            inside.pop()

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(work, range(40)))
    assert most == [1] * 40


# Of hosts that locks do not reach


def test_of_another_host(tmp_path):
    claimed_elsewhere(tmp_path)
    with pytest.raises(Claimed, match="process 7 on elsewhere"):
        claim(tmp_path, RUN, wait=False).__enter__()
    claimed_elsewhere(tmp_path, age=locks.STALE - 5)
    assert not free(tmp_path)


@pytest.mark.parametrize("sign", [1, -1])
def test_of_another_host_that_died(tmp_path, sign):
    claimed_elsewhere(tmp_path, age=sign * (locks.STALE + 5))
    assert free(tmp_path)


def test_waiting_for_another_host(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "STALE", 1.0)
    claimed_elsewhere(tmp_path)
    start = time.monotonic()
    with claim(tmp_path, RUN):
        assert 0.5 < time.monotonic() - start < 20


@pytest.mark.parametrize("content", [b"", b"{", b"[]", bytes(100), b'{"kernel": "other"}'])
def test_a_damaged_claim_is_none_once_stale(tmp_path, content):
    path = claimed_elsewhere(tmp_path)
    path.write_bytes(content)
    os.utime(path, (1, 1))
    assert free(tmp_path)


def test_a_pulse(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.02)
    path = tmp_path / "claims" / f"{RUN}.json"
    with claim(tmp_path, RUN):
        os.utime(path, (1, 1))
        wait_for(lambda: path.stat().st_mtime > 1)
        claimed_elsewhere(tmp_path, age=1000)
        before = path.stat().st_mtime
        time.sleep(0.1)
        assert path.stat().st_mtime == before
    assert path.exists()


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_holder_notices_that_it_lost(tmp_path):
    with claim(tmp_path, RUN) as held:
        claimed_elsewhere(tmp_path)
        with pytest.raises(Lost, match=f"{RUN} was taken over by process 7 on elsewhere"):
            held.check()
    assert json.loads((tmp_path / "claims" / f"{RUN}.json").read_text())["token"] == "t"


def test_claims_that_cannot_be_written(tmp_path):
    (tmp_path / "claims").write_text("")
    with pytest.raises(StoreError, match=f"cannot claim run {RUN}"):
        claim(tmp_path, RUN).__enter__()


def test_nothing_half_written_stays(tmp_path):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / f".{RUN}.json.1234").write_text("{")
    assert free(tmp_path)
    assert [path.name for path in (tmp_path / "claims").iterdir()] == [f"{RUN}.lock"]


# Runs

AT_ONCE = """
import os, sys, time
import torch
from paperlib import checkpoints, training
from paperlib.runs import Store
from tests.test_locks import QUICK

torch.set_num_threads(1)
path, processes = sys.argv[1], int(sys.argv[2])
configs = [QUICK, QUICK.with_(seed=1)]

def work():
    for config in configs:
        with open(f"{path}/trained-{config.seed}", "a") as file:
            look = lambda moment: print(moment.epoch, file=file, flush=True)
            record = training.run(config, Store(f"{path}/runs"), "cpu", look)
        with open(f"{path}/got-{config.seed}", "a") as file:
            print(record.epochs.post.tolist(), record.epochs.seconds.tolist(), file=file)

start = time.time() + 0.5
children = []
for _ in range(processes):
    child = os.fork()
    if not child:
        time.sleep(start - time.time())
        work()
        os._exit(0)
    children.append(child)
assert not any(os.waitpid(child, 0)[1] for child in children)
"""


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_that_want_the_same_runs(tmp_path, processes):
    command = [sys.executable, "-c", AT_ONCE, str(tmp_path), str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for seed in (0, 1):
        assert (tmp_path / f"trained-{seed}").read_text().split() == ["0", "1", "2", "3"]
        got = (tmp_path / f"got-{seed}").read_text().splitlines()
        assert len(got) == processes
        assert len(set(got)) == 1
    assert len(Store(tmp_path / "runs").runs()) == 2


def test_a_run_that_is_claimed(tmp_path):
    store = Store(tmp_path)
    with claim(tmp_path, QUICK.identity), pytest.raises(Claimed, match=QUICK.identity):
        training.run(QUICK, store, "cpu", wait=False)
    assert store.identities() == []
    assert store.failure(QUICK.identity) is None
    record = training.run(QUICK, store, "cpu", wait=False)
    with claim(tmp_path, QUICK.identity):
        assert training.run(QUICK, store, "cpu", wait=False).provenance == record.provenance


def test_a_run_that_failed_while_it_was_waited_for(tmp_path):
    """It is not tried again; one that had failed before is."""
    store = Store(tmp_path)

    def fail(claim_):
        time.sleep(0.5)
        store.fail(QUICK, "the loss is nan")
        claim_.__exit__(None, None, None)

    held = claim(tmp_path, QUICK.identity)
    held.__enter__()
    timer = threading.Thread(target=fail, args=(held,))
    timer.start()
    with pytest.raises(TrainingError, match="failed in another process: the loss is nan"):
        training.run(QUICK, store, "cpu")
    timer.join()
    training.run(QUICK, store, "cpu")
    assert store.failure(QUICK.identity) is None


@pytest.mark.parametrize("saving", [True, False])
def test_a_run_that_was_taken_over(tmp_path, monkeypatch, saving):
    """It stops before it writes: at its next checkpoint, or its record."""
    if saving:
        monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    store, seen = Store(tmp_path), []

    def look(moment):
        seen.append(moment.epoch)
        if moment.epoch == 1:
            path = claimed_elsewhere(tmp_path, QUICK.identity)
            os.utime(path)

    with pytest.raises(Lost, match="taken over by process 7 on elsewhere"):
        training.run(QUICK, store, "cpu", look)
    assert seen == ([0, 1] if saving else [0, 1, 2, 3])
    assert store.identities() == []
    assert store.failure(QUICK.identity) is None
    assert not free(tmp_path, QUICK.identity)


def test_a_finished_record_stays(tmp_path):
    """Where one is copied there while the run is trained."""
    store, elsewhere = Store(tmp_path / "a"), Store(tmp_path / "b")
    first = training.run(QUICK, elsewhere, "cpu")

    def copy(moment):
        if moment.epoch == 2:
            store.write(first)

    assert training.run(QUICK, store, "cpu", copy).provenance == first.provenance
    assert store.read(QUICK.identity).epochs.equals(first.epochs)


def test_a_read_only_store(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write to the run store"):
        training.run(QUICK, Store(tmp_path / "file" / "runs"), "cpu")
