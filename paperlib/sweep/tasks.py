"""The work of a worker: training runs of a store. Imports no torch by itself.

On a CPU, several runs are fastest in processes of one thread each. Their numbers then do not depend
on how many run in parallel. On a GPU, one process may train several runs that take turns.
"""

import os
import time
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from paperlib.config import Config
from paperlib.runs import RunRecord, Store, StoreError
from paperlib.store.checkpoints import Stopped
from paperlib.store.lease import Claimed
from paperlib.sweep.workers import WorkerDied, assigned_device

Outcome = RunRecord | Exception | None  # None: the record is in the store


def train(
    path: Path | None,
    results: Path | None,
    device: str,
    together: int,
    fast: bool,
    until: float,
    work: Sequence[tuple[Config, float]],
) -> dict[str, Outcome]:
    """Do runs in this process, with one thread; the next begins as soon as one has ended.

    Args:
        path: Of the run store; None if the worker uses one of its own and sends its records.
        results: The store's read-only layer.
        device: As for `devices.choose_device`.
        together: The number of runs that take turns.
        fast: As for `training.run`.
        until: The time at which runs have to stop, by `time.time`.
        work: Each configuration with the seconds that it will take. A run that would end after
            `until` does not begin.

    Returns:
        Each run's outcome. Errors but Claimed, Stopped and StoreError become a RuntimeError.

    Raises:
        WorkerDied: This process can do no more work.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from paperlib.extras.fast.together import by_turns, is_fatal
    from paperlib.extras.fast.turns import Turns

    torch.set_num_threads(1)
    store = Store() if path is None else Store(path, results)
    device, together = assigned_device(device), min(together, len(work))
    waiting, turns = deque(work), Turns[str]()
    outcomes: dict[str, Outcome] = {}
    with closing(turns):
        while waiting or turns:
            while waiting and len(turns) < together:
                config, seconds = waiting.popleft()
                if time.time() + seconds >= until:
                    outcomes[config.identity] = Stopped("there is no time for it")
                    continue
                alone = together == 1
                steps = by_turns(config, store, device, alone=alone, fast=fast, until=until)
                turns.add(config.identity, steps)
            for run, worked, result in turns.turn():
                if not worked:
                    raise result
                if is_fatal(result):
                    raise WorkerDied(f"{type(result).__name__}: {result}")
                if isinstance(result, RunRecord):
                    outcomes[run] = result if path is None else None
                elif isinstance(result, Claimed | Stopped | StoreError):
                    outcomes[run] = result
                else:  # some errors cannot be sent; their text can
                    outcomes[run] = RuntimeError(f"{type(result).__name__}: {result}")
    return outcomes
