"""One run, once: a claim on a run, held while it is trained, by any process of any host.

    STORE/claims/IDENTITY.lock   empty; locked by the process that trains the run, never removed
    STORE/claims/IDENTITY.json   who that is: host, pid, since when; its time of change is a pulse

The lock is the operating system's (`filelock.FileLock`: flock). It ends with the process, kill -9
included, and needs no clock: what a dead process leaves is taken over at once, and a process that
is paused keeps its claim for as long as it is. Assumed of the file system: rename is atomic, and
what is renamed is seen by whoever opens the name afterwards. So it is on local disks and on NFS,
where Linux passes flock on to the server (NFSv3 by lockd, NFSv4 within the protocol, which gives
up the locks of a host it has not heard of for about 90 s).

Not every file system passes flock on between hosts (NFS mounted with nolock, Lustre with
localflock, BeeGFS as delivered). So a claim also has a pulse: its holder touches IDENTITY.json
every `BEAT` seconds, and whoever gets the lock but finds the name of another host there, touched
within `STALE` seconds, leaves the run alone. Both times compared are the file server's, so hosts'
clocks may differ. Two costs are left: after a host's crash its runs are free only `STALE` seconds
later, and where flock is not passed on two hosts that claim a run in the same instant both get it.

A holder that was cut off or paused, and has been taken over, finds a token that is not its own in
IDENTITY.json and stops: `Claim.check` says so before anything is written. That leaves the instant
between check and rename; as runs are deterministic and files are replaced whole, the same record
or an older checkpoint is then written again, which costs time and no number.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from paperlib.runs import StoreError, write_whole

BEAT = 15.0
STALE = 120.0
POLL = 0.5


class Claimed(RuntimeError):
    """Another process has claimed the run; the message names the run and that process."""


class Lost(Claimed):
    """Another process took the run over while this one was paused or cut off."""


class Claim:
    """A claim that is held; see `claim`."""

    def __init__(self, path: Path) -> None:
        self.path, self.token = path, uuid.uuid4().hex
        self._ended = threading.Event()

    def check(self) -> None:
        """Raise Lost where another process has the claim by now."""
        who = _read(self.path)
        if who is not None and who.get("token") != self.token:
            raise Lost(f"run {self.path.stem} was taken over by {_name(who)}")

    def _begin(self) -> None:
        about = {"host": socket.gethostname(), "pid": os.getpid(), "kernel": _kernel()}
        about |= {"since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "token": self.token}
        for left in self.path.parent.glob(f".{self.path.name}.*"):
            left.unlink(missing_ok=True)
        write_whole(self.path, json.dumps(about, indent=1).encode())
        os.utime(self.path)
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError, Lost):
                self.check()
                os.utime(self.path)

    def _end(self) -> None:
        self._ended.set()
        with suppress(OSError, Lost):
            self.check()
            self.path.unlink(missing_ok=True)


@contextmanager
def claim(store: str | os.PathLike, run: str, wait: bool = True) -> Iterator[Claim]:
    """Hold the claim on a run (its identity) of the store at path `store`, for a `with` block.

    wait: until whoever has it is done, or dead; otherwise raises Claimed. The caller then looks
    whether the run is done before it trains it, and calls the claim's `check` before it writes.
    Raises StoreError where a claim cannot be written. A claim cannot be sent to another process.
    """
    path = Path(store) / "claims" / f"{run}.json"
    held = Claim(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        while not _taken(lock, path):
            if not wait:
                raise Claimed(f"run {run} is claimed by {_name(_read(path))}")
            time.sleep(POLL)
    except OSError as error:
        raise StoreError(f"cannot claim run {run} in {store}: {error}") from error
    try:
        held._begin()
        yield held
    finally:
        held._end()
        lock.release()


def holder(store: str | os.PathLike, run: str) -> dict | None:
    """Who has claimed a run, or None; changes nothing, and so is right but for `STALE` seconds.

    A dict of host, pid and since (UTC). One killed less than `STALE` seconds ago, by this host's
    clock, is still named.
    """
    path = Path(store) / "claims" / f"{run}.json"
    who = _read(path)
    if who is None or abs(time.time() - _touched(path)) > STALE:
        return None
    return {name: who.get(name) for name in ("host", "pid", "since")}


def _taken(lock: FileLock, path: Path) -> bool:
    """Try once for the lock; not where a host that the lock does not reach has the claim."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    try:
        who = _read(path)
        if who is not None and who.get("kernel") != _kernel():
            os.utime(lock.lock_file)
            if abs(_touched(Path(lock.lock_file)) - _touched(path)) <= STALE:
                lock.release()
                return False
    except BaseException:
        lock.release()
        raise
    return True


def _touched(path: Path) -> float:
    """When a file was last touched, by its server's clock; 0 where it is not there."""
    try:
        # Opening makes an NFS client ask the server; stat alone may answer from a cache.
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return 0.0


def _read(path: Path) -> dict | None:
    """A claim's content; None where there is none, or none that can be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _name(who: dict | None) -> str:
    if who is None:
        return "another process"
    return f"process {who.get('pid')} on {who.get('host')} since {who.get('since')}"


@cache
def _kernel() -> str:
    """What processes have in common whose locks reach each other: the boot of a kernel."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
