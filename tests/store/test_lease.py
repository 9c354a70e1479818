"""Claims: a run is trained once, by whichever process claims it, and none is held by the dead."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

import pytest

from paperlib import training
from paperlib.runs import Store
from paperlib.store import checkpoints, lease
from paperlib.store.lease import Claimed, Lost, claim
from paperlib.training import TrainingError
from tests import small

RUN = "0123456789abcdef"
QUICK = small.VGG.with_(epochs=4)

HOLDER = """
import sys
from paperlib.store import lease
lease.LEASE_SECONDS, lease.BEAT_SECONDS = float(sys.argv[3]), float(sys.argv[3]) / 5
with lease.claim(sys.argv[1], sys.argv[2], wait=False) as held:
    print("held", flush=True)
    sys.stdin.readline()
    try:
        held.check()
    except lease.Lost as error:
        print(error, flush=True)
"""


@pytest.fixture
def hold(tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start another process that holds the claim on RUN until it is sent a line."""
    processes = []

    def start(seconds: float = lease.LEASE_SECONDS) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLDER, str(tmp_path), RUN, str(seconds)]
        process = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def quick(monkeypatch) -> None:
    """Leases of one second."""
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.05)


def claimed_elsewhere(store: Path, run: str = RUN) -> Path:
    """Leave the claim of a process of another host, which is never refreshed."""
    path = store / "claims" / f"{run}.lease"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # as a process that takes it over does: a new file
    about = f"filelock/2\npid=7\nhost=elsewhere\nmode=lease\ntoken={'0' * 32}\n"
    path.write_text(f"{about}duration={lease.LEASE_SECONDS!r}\n")
    return path


def free(store: Path, run: str = RUN) -> bool:
    try:
        with claim(store, run, wait=False):
            return True
    except Claimed:
        return False


@contextmanager
def taken_over(store: Path, wait: bool) -> Iterator[None]:
    """Take the claim over, not before its lease ends: wait for that, or ask again and again."""
    start = time.monotonic()
    while not wait and not free(store):
        time.sleep(0.1)
    with claim(store, RUN):
        assert time.monotonic() - start >= 0.8 * lease.LEASE_SECONDS
        yield


def test_held_and_given_back(tmp_path):
    with claim(tmp_path, RUN) as held:
        held.check()
        assert not free(tmp_path)
        assert free(tmp_path, "another")
    assert free(tmp_path)
    with pytest.raises(KeyError), claim(tmp_path, RUN):
        raise KeyError
    assert free(tmp_path)
    assert list((tmp_path / "claims").iterdir()) == []


def test_of_a_live_process(tmp_path, hold):
    other = hold()
    with pytest.raises(Claimed, match=f"{RUN} .*{other.pid}"):
        claim(tmp_path, RUN, wait=False).__enter__()
    threading.Timer(0.3, lambda: (other.stdin.write("\n"), other.stdin.flush())).start()
    with claim(tmp_path, RUN):
        assert other.wait(10) == 0


@pytest.mark.parametrize("wait", [True, False])
def test_of_a_dead_process(tmp_path, hold, wait):
    """It is taken over long before its lease ends."""
    other = hold()
    other.kill()
    other.wait(10)
    start = time.monotonic()
    with claim(tmp_path, RUN, wait):
        assert time.monotonic() - start < lease.LEASE_SECONDS / 4
        assert not free(tmp_path)


@pytest.mark.parametrize("wait", [True, False])
def test_of_a_paused_process(tmp_path, hold, quick, wait):
    """It finds out before it writes."""
    other = hold(lease.LEASE_SECONDS)
    other.send_signal(signal.SIGSTOP)
    with taken_over(tmp_path, wait):
        other.send_signal(signal.SIGCONT)
        out, _ = other.communicate("\n", timeout=30)
        assert RUN in out
        assert str(os.getpid()) in out
        assert not free(tmp_path)  # the other one's end leaves our claim


@pytest.mark.parametrize("wait", [True, False])
def test_of_another_host(tmp_path, quick, wait):
    """Nobody can see whether its process lives."""
    claimed_elsewhere(tmp_path)
    with pytest.raises(Claimed, match="7 on elsewhere"):
        claim(tmp_path, RUN, wait=False).__enter__()
    with taken_over(tmp_path, wait):
        pass


@pytest.mark.parametrize("content", [b"{", b"[]", bytes(100), b"filelock/2\npid=1\n"])
def test_a_damaged_claim_is_taken_over(tmp_path, quick, content):
    claimed_elsewhere(tmp_path).write_bytes(content)
    with claim(tmp_path, RUN):
        assert not free(tmp_path)


@pytest.mark.parametrize("wait", [False, True])
def test_an_empty_claim_is_of_a_process_that_died_as_it_made_it(tmp_path, wait):
    path = claimed_elsewhere(tmp_path)
    path.write_text("")
    assert not free(tmp_path)  # it may be written any moment
    old = time.time() - 2 * lease.EMPTY_SECONDS
    os.utime(path, (old, old))
    with claim(tmp_path, RUN, wait=wait):
        assert path.stat().st_size > 0


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
    threading.Thread(target=fail, args=(held,)).start()
    with pytest.raises(TrainingError, match="the loss is nan"):
        training.run(QUICK, store, "cpu")
    training.run(QUICK, store, "cpu")
    assert store.failure(QUICK.identity) is None


@pytest.mark.parametrize("saving", [True, False])
def test_a_run_that_was_taken_over(tmp_path, monkeypatch, saving):
    """It stops before it writes: at its next checkpoint, or its record."""
    if saving:
        monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
        monkeypatch.setattr(checkpoints, "SHARE", float("inf"))
    store, seen = Store(tmp_path), []

    def look(moment):
        seen.append(moment.epoch)
        if moment.epoch == 1:
            claimed_elsewhere(tmp_path, QUICK.identity)

    with pytest.raises(Lost, match="7 on elsewhere"):
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
