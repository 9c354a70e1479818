"""Claims: a run is trained once, by the process that claims it first, on any host.

    STORE/claims/IDENTITY.lease   names the process that trains the run, and exists as long

A claim is a `filelock.SoftFileLease`. Its holder refreshes the file every BEAT_SECONDS. The claim
of a process that died on the same host is taken over at once. That of a process that is paused, or
of another host, is taken over LEASE_SECONDS after its last refresh. The process that waits measures
that time by its own clock, so clocks of hosts may differ. The file system needs exclusive creation
and atomic rename, as local disks, NFS, Lustre and BeeGFS have. No operating system's lock is used.

A holder that was paused or cut off for longer finds another token in the file, and stops:
`Claim.check` is called before anything is written. A race remains between check and rename. It is
harmless: both writers produce the same record.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import SoftFileLease, Timeout

from paperlib.store.records import StoreError

BEAT_SECONDS = 15.0
LEASE_SECONDS = 120.0
POLL_SECONDS = 0.5
EMPTY_SECONDS = 10.0  # an empty file of this age is of a process that died before it wrote
RETRY_SECONDS = 0.05  # if files cannot be exchanged, a dead holder's is removed, then replaced
# Leases that were not acquired. Each remembers since when the holder has not refreshed its file.
_watched: dict[Path, SoftFileLease] = {}


class Claimed(RuntimeError):
    """Another process has claimed the run; the message names the run and that process."""


class Lost(Claimed):
    """Another process took the run over while this one was paused or cut off."""


@dataclass(frozen=True)
class Claim:
    """A claim that is held; see `claim`."""

    run: str
    lease: SoftFileLease

    def check(self) -> None:
        """Raise Lost if another process has the claim now."""
        owner = self.lease.owner
        if owner is not None and owner.token != self.lease.token:
            raise Lost(f"run {self.run} was taken over by {_name(self.lease)}")


@contextmanager
def claim(store: str | os.PathLike, run: str, wait: bool = True) -> Iterator[Claim]:
    """Hold the claim on a run for a `with` block.

    In the block, the caller first checks whether the run is done, and calls the claim's `check`
    before it writes. A claim cannot be sent to another process.

    Args:
        store: The store's path.
        run: The run's identity.
        wait: Wait until the holder is done or dead.

    Raises:
        Claimed: Another process has the run, and `wait` is False.
        StoreError: The claim cannot be written.
    """
    path = Path(store) / "claims" / f"{run}.lease"
    limit, poll = (EMPTY_SECONDS, POLL_SECONDS) if wait else (RETRY_SECONDS, RETRY_SECONDS)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lease = _watched.pop(path, None) or SoftFileLease(
            path,
            lease_duration=LEASE_SECONDS,
            heartbeat_interval=BEAT_SECONDS,
            thread_local=False,  # a run's claim is returned by whichever thread ends it
        )
        while not lease.is_locked:
            _remove_empty(path)
            with suppress(Timeout) if wait else nullcontext():
                lease.acquire(timeout=limit, poll_interval=poll)
    except Timeout:
        _watched[path] = lease
        raise Claimed(f"run {run} is claimed by {_name(lease)}") from None
    except OSError as error:
        raise StoreError(f"cannot claim run {run} in {store}: {error}") from error
    try:
        yield Claim(run, lease)
    finally:
        lease.release()


def _remove_empty(path: Path) -> None:
    """Remove a claim whose process died as it made the file, before it wrote its name there.

    Nobody else would: an empty file says nothing of its holder. If the holder is alive after all,
    two processes do the run, with the same numbers.
    """
    with suppress(FileNotFoundError):
        state = path.stat()
        if state.st_size == 0 and time.time() - state.st_mtime > EMPTY_SECONDS:
            path.unlink()


def _name(lease: SoftFileLease) -> str:
    owner = lease.owner
    return f"process {owner.pid} on {owner.hostname.partition('?')[0]}" if owner else "another"
