"""Several runs on one GPU, each on a CUDA stream of its own.

A step of a small network leaves most of a GPU idle, so steps of several networks share it. The runs
take turns (`turns.Turns`) to launch steps from one thread. Nothing random in one run depends on the
others. On a CPU this is no faster than one run after the other.
"""

import math
import sys
import traceback
from collections.abc import Generator

import torch

from paperlib import inputs, training
from paperlib.config import Config
from paperlib.devices import choose_device
from paperlib.extras.fast import loops
from paperlib.extras.fast.graphs import GO_ON, CaptureError
from paperlib.runs import RunRecord, Store
from paperlib.training import Callback


def by_turns(
    config: Config,
    store: Store | None = None,
    device: str = "auto",
    callback: Callback | None = None,
    *,
    alone: bool = False,
    fast: bool = False,
    until: float = math.inf,
) -> Generator[None, None, RunRecord | Exception]:
    """Do one of several runs that take turns on a device, each on a CUDA stream of its own.

    Args:
        config: The run.
        store: As for `training.run`, like device, callback and fast.
        device: As for `training.run`.
        callback: As for `training.run`.
        alone: No other run uses the device, so the store notes a lack of memory as a failure of
            this run. A run that finds no memory beside others can be tried again.
        fast: As for `training.run`.
        until: The time, by `time.time`, at which to stop with a checkpoint at the end of an epoch.

    Yields:
        None at the others' turn: after a launch, and while the run's stream is busy.

    Returns:
        The record, or the exception that ended the run: `lease.Claimed` if another process has it.
    """
    handled, steps = sys.exception(), None
    try:
        if record := inputs.finished(config, store):
            return record
        where = choose_device(device)
        stream = loops.new_stream(where)
        steps = training.steps(
            config, store, where, callback, wait=False, alone=alone, captured=fast, until=until
        )
        while True:
            with training.computing(config, stream):
                try:
                    busy = next(steps) != GO_ON
                except StopIteration as end:
                    return end.value
            yield
            while busy and stream is not None and not alone and not stream.query():
                yield
    except Exception as error:
        _free_frames(error, handled)
        return error
    finally:
        if steps is not None:
            steps.close()  # this gives up the run's claim


def _free_frames(error: BaseException | None, handled: BaseException | None) -> None:
    """Free the networks and graphs that the frames of an error's traceback hold.

    Args:
        error: The error.
        handled: The exception that the caller handles. Its frames are kept.
    """
    while error is not None and error is not handled:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def is_fatal(error: object) -> bool:
    """Return whether all further work of this process on a GPU may fail after an error."""
    return isinstance(error, CaptureError | torch.AcceleratorError)
