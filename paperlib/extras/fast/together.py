"""Several runs on one GPU, each on a CUDA stream of its own.

A step of a small network leaves most of a GPU idle; steps of several networks share it. The runs
take turns (`turns.Turns`) in launching steps from one thread. Nothing random in one depends on
the others. On a CPU this is no faster than one run after the other.
"""

import math
import sys
import traceback
from collections.abc import Generator

import torch

from paperlib import inputs, training
from paperlib.config import Config
from paperlib.devices import choose_device
from paperlib.extras import fast as faster
from paperlib.extras.fast.graphs import GO_ON, CaptureError
from paperlib.extras.fast.turns import ALONE
from paperlib.runs import RunRecord, Store
from paperlib.training import Callback, Steps


def by_turns(
    config: Config,
    store: Store | None = None,
    device: str = "auto",
    callback: Callback | None = None,
    *,
    alone: bool = False,
    fast: bool = False,
    until: float = math.inf,
) -> Generator[str | None, None, RunRecord | Exception]:
    """Do one of several runs that take turns on a device.

    A run that finds no memory beside the others starts again, from its checkpoint, when they are
    done.

    Args:
        config: The run.
        store: As for `training.run`, like device, callback and fast.
        device: As for `training.run`.
        callback: As for `training.run`.
        alone: No other run uses the device, so a lack of memory is a failure of this run.
        fast: As for `training.run`.
        until: When to stop with a checkpoint at the end of an epoch, by `time.time`.

    Yields:
        None when it is the others' turn, `turns.ALONE` when it has to wait for their end.

    Returns:
        The record, or the exception that ended the run: `lease.Claimed` if another process has it.
    """
    handled, steps = sys.exception(), None
    try:
        if record := inputs.finished(config, store):
            return record
        where = choose_device(device)
        while True:
            try:
                steps = training.steps(
                    config, store, where, callback, False, alone, captured=fast, until=until
                )
                return (yield from _launched(config, steps, where, alone))
            except torch.OutOfMemoryError as error:
                _free_frames(error, handled)
                if alone:
                    return error
            steps, alone = None, True
            yield ALONE
    except Exception as error:
        _free_frames(error, handled)
        return error
    finally:
        if steps is not None:
            steps.close()  # which gives up the run's claim


def _launched(config: Config, steps: Steps, device: torch.device, alone: bool) -> Steps:
    """Take a run's steps on a new stream, and yield while its stream is busy."""
    stream = faster.new_stream(device)
    while True:
        with training.computing(config, stream):
            try:
                busy = next(steps) != GO_ON
            except StopIteration as end:
                return end.value
        yield None
        while busy and stream is not None and not alone and not stream.query():
            yield None


def _free_frames(error: BaseException | None, handled: BaseException | None) -> None:
    """Free the networks and graphs that the frames of an error's traceback hold.

    Args:
        error: The error.
        handled: The exception that the caller handles; its frames are kept.
    """
    while error is not None and error is not handled:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def is_fatal(error: object) -> bool:
    """Return whether everything else that this process does on a GPU may fail after an error."""
    return isinstance(error, CaptureError | torch.AcceleratorError)
