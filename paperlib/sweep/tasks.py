"""What workers do: train runs of a store. Imports no torch by itself.

Several runs on a CPU are fastest in processes of one thread each, and their numbers then do not
depend on how many run in parallel. On a GPU one process may train several runs that take turns.
"""

import math
import os
import time
from collections import deque
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paperlib.config import Config
from paperlib.runs import RunRecord, Store, StoreError
from paperlib.store import checkpoints, lease
from paperlib.store.records import Entry
from paperlib.sweep.workers import WorkerDied, assigned_device

NOTE_SECONDS = 1.0  # between notes of how far a run is

Outcome = float | tuple[Entry, bytes | None] | Exception | None


@dataclass(frozen=True)
class How:
    """How a worker trains.

    Attributes:
        store: path of the run store; None for one of the worker's own, which sends its records.
        results: the store's layer below.
        device: as for `training.choose_device`.
        fast: as for `training.make_loop`.
        until: when runs have to stop, by `time.time`.
    """

    store: str | None
    results: Path | None
    device: str
    fast: bool = False
    until: float = math.inf


def train_one(config: Config, how: How) -> Outcome:
    """Do a run in this process, with one thread.

    Returns:
        Its mean seconds an epoch (or what `Store.put` takes, if the record is sent back); None if
        another process has claimed it; or why it failed: a StoreError or `checkpoints.Stopped` as
        such, other errors as a RuntimeError.

    Raises:
        WorkerDied: this process can do no more.
    """
    own = Store() if how.store is None else None
    if own is not None:
        how = replace(how, store=str(own.path.absolute()), results=own.results)
    outcome = train_together([(config, 0.0)], 1, how)[config.identity]
    if own is None or not isinstance(outcome, float):
        return outcome
    (entry,) = own.entries([config.identity])
    return entry, own.arrays(entry)


def train_together(
    work: Sequence[tuple[Config, float]], count: int, how: How
) -> dict[str, Outcome]:
    """Do runs in this process, `count` in parallel; a run begins as soon as another one is done.

    Args:
        work: configurations, and the seconds that each will take; a run that would end after
            `how.until` is not begun.
        count: how many take turns.
        how: see `How`; it has a store.

    Returns:
        By identity, as `train_one`.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from paperlib.extras.fast.together import by_turns, is_fatal
    from paperlib.extras.fast.turns import Turns

    torch.set_num_threads(1)
    assert how.store is not None
    store, device = Store(how.store, how.results), assigned_device(how.device)
    waiting = deque(work)
    outcomes: dict[str, Outcome] = {}
    notes: dict[str, Note] = {}
    turns: Turns[str] = Turns()
    with closing(turns):
        while waiting or turns:
            while waiting and len(turns) < count:
                config, seconds = waiting.popleft()
                if len(work) > 1 and time.time() + seconds >= how.until:
                    outcomes[config.identity] = checkpoints.Stopped("there is no time for it")
                    continue
                note = notes[config.identity] = Note(store.path, config.identity)
                note.write(0)
                alone = min(count, len(work)) == 1
                steps = by_turns(
                    config, store, device, note, alone=alone, fast=how.fast, until=how.until
                )
                turns.add(config.identity, steps)
            for run, worked, result in turns.turn():
                notes.pop(run).remove()
                if not worked:
                    raise result
                if is_fatal(result):
                    raise WorkerDied(f"{type(result).__name__}: {result}", [run, *notes])
                outcomes[run] = _outcome(result)
    return outcomes


def _outcome(result: RunRecord | Exception) -> Outcome:
    if isinstance(result, lease.Claimed):
        return None
    if isinstance(result, StoreError | checkpoints.Stopped):
        return result
    if isinstance(result, Exception):
        # Some exceptions cannot be sent between processes. Their text always can.
        return RuntimeError(f"{type(result).__name__}: {result}")
    return float(result.epochs.seconds.mean())


class Note:
    """Notes in the store that a run has begun, and about once a second how far it is."""

    def __init__(self, store: Path, run: str) -> None:
        self.path, self.last = store / "progress" / run, time.monotonic()

    def __call__(self, moment: Any) -> None:
        """Note the end of an epoch, a `training.Moment`."""
        if time.monotonic() - self.last >= NOTE_SECONDS:
            self.last = time.monotonic()
            self.write(moment.epoch + 1)

    def write(self, epochs: int) -> None:
        """Note how many epochs are done."""
        with suppress(OSError):
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_text(str(epochs))

    def remove(self) -> None:
        """Remove the note."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
