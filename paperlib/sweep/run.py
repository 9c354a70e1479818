"""The execution of missing runs, in worker processes or any other executor."""

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import nullcontext
from functools import partial
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from paperlib.config import Config
from paperlib.runs import RunRecord, Store, StoreError
from paperlib.store import checkpoints
from paperlib.store.checkpoints import Stopped
from paperlib.store.code import code_checksum
from paperlib.store.lease import Claimed
from paperlib.sweep import workers
from paperlib.sweep.states import TO_RUN, Speeds, State, forecast, seconds, speeds, states, unique
from paperlib.sweep.tasks import train

TRIES = 3  # starts of a run whose process dies each time
DEATHS = 9  # after so many deaths in a row, the sweep stops
POLL_SECONDS = 1.0  # between looks at the store
ASK_SECONDS = 5.0  # between attempts at runs that other processes have claimed


class SweepError(RuntimeError):
    """Some runs failed, and the message names each with its reason; or workers die in a row."""


def collect(
    configs: Iterable[Config],
    store: Store | None = None,
    executor: Executor | None = None,
    **options: Any,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Execute the runs that a store lacks, then return all records as frames.

    Args:
        configs: The configurations.
        store: The store; None for the default one.
        executor: As for `execute`.
        **options: Further arguments of `execute`.

    Returns:
        Two frames keyed by `run`: one row an epoch, and one row a run.

    Raises:
        SweepError, StoreError, ValueError, workers.WorkersError: As for `execute`.
        KeyError: A run has no record because the time was up.
    """
    store, configs = store or Store(), list(configs)
    execute(configs, store, executor, **options)
    return store.frames(unique(configs).values())


def execute(
    configs: Iterable[Config],
    store: Store,
    executor: Executor | None = None,
    device: str = "auto",
    jobs: int | None = None,
    *,
    retry_failed: bool = False,
    retrain_changed: bool = False,
    per_device: int | None = None,
    send_back: bool = False,
    fast: bool = False,
    minutes: float | None = None,
) -> int:
    """Execute the runs that a store lacks, in this order; return how many were done.

    Args:
        configs: The configurations.
        store: The store that the records are written to.
        executor: Any `concurrent.futures.Executor`; by default local processes, see `workers`.
        device: As for `devices.choose_device`.
        jobs: The number of local processes; by default one a core, or one a GPU.
        retry_failed: Also run those that failed before.
        retrain_changed: Also run those whose record in the store itself, not in results/, was made
            with other data or code. It is removed when all runs can begin. Not for `send_back`.
        per_device: Runs in parallel in each process on a GPU. Elsewhere it is the number of
            processes, if `jobs` is None.
        send_back: Workers keep a store of their own and send the records.
        fast: As for `training.run`.
        minutes: The time limit. A run begins only if it would end in time, by the speeds so far.
            When the time is up, runs stop with a checkpoint.

    Raises:
        KeyboardInterrupt: Finished runs and checkpoints are kept.
        SweepError: Runs failed, now or before (the others were done), or workers die in a row.
        StoreError: The store cannot be written, or has records of other data or code.
        ValueError: Data cannot be loaded, or a named function differs from its file or fails.
        workers.WorkersError: Worker processes cannot start.
    """
    until = math.inf if minutes is None else time.time() + 60 * minutes
    found = states(configs, store)
    _check_changed(found, store, retrain_changed and not send_back)
    again = {*TO_RUN, "changed"} | ({"failed"} if retry_failed else set())
    todo = [state for state in found if state.state in again]
    failed = [_line(s, s.why) for s in found if s.state == "failed" and not retry_failed]
    done = 0
    if todo:
        devices, together = [""], 1
        if executor is None:
            devices, together = workers.devices(device, jobs, per_device, len(todo))
        _prepare(todo, store, send_back)
        path = None if send_back else store.path.absolute()
        task = partial(train, path, store.results, device, together, fast, until)
        work = _Sweep(todo, store, task, together, speeds(store, device))
        with nullcontext(executor) if executor else workers.Processes(devices) as used:
            work.run(used, len(devices))
        done, failed = len(todo) - len(work.left), [*work.failed, *failed]
    if failed:
        raise SweepError("\n".join([f"{len(failed)} of {len(found)} runs failed:", *failed]))
    return done


def _line(state: State, why: Exception | str) -> str:
    return f"  {state.config.title}: {why or type(why).__name__}"


def _check_changed(found: Sequence[State], store: Store, removable: bool) -> None:
    """Raise StoreError if records of other data or code may not be removed."""
    beneath = set(Store(store.path / "no records", store.results).identities())
    fixed = beneath if removable else {state.run for state in found}
    changed = [state for state in found if state.state == "changed"]
    if refused := [state.why for state in changed if state.run in fixed]:
        raise StoreError("\n".join(refused))


def _prepare(todo: Sequence[State], store: Store, send_back: bool) -> None:
    """Raise an error if runs cannot begin; load each data set once before workers start."""
    store.check_writable()
    for config in {(s.config.model, s.config.pruning): s.config for s in todo}.values():
        code_checksum(config)
    specs = {state.config.data for state in todo} - {"digits"}
    if specs and not send_back:
        from paperlib import data

        for spec in specs:
            data.load(spec, store.path / "data")


def _try_named(todo: Sequence[State], executor: Executor) -> None:
    """Raise ValueError if a network or score of the user's does not work.

    They are tried in a worker, because a module that this process has imported is not read again
    when its file is edited.
    """
    named = {(s.config.model, s.config.pruning): s.config for s in todo if _names(s.config)}
    try:
        error = executor.submit(_first_error, list(named.values())).result() if named else None
    except Exception as death:
        if not workers.is_death(death):
            raise
        error = None  # the run itself will show whether it kills its process
    if error:
        raise ValueError(error)


def _names(config: Config) -> bool:
    return ":" in config.model + getattr(config.pruning, "score", "")


def _first_error(configs: Sequence[Config]) -> str | None:
    """Return the first error of these runs' networks and pruners, or None."""
    from paperlib.extras.fast.together import is_fatal
    from paperlib.networks import try_pruner

    for config in configs:
        try:
            try_pruner(config)
        except Exception as error:  # of any kind: the user's code runs
            if is_fatal(error):
                raise workers.WorkerDied(str(error)) from error
            return f"{config.title}: {type(error).__name__}: {error}"
    return None


class _Sweep:
    """Runs on their way through an executor.

    Attributes:
        left: The runs that have no record yet, by identity.
        failed: A line for each run that failed.
    """

    def __init__(
        self, todo: list[State], store: Store, task: Callable, together: int, measured: Speeds
    ) -> None:
        self.todo, self.store, self.task = todo, store, task
        self.together, self.measured = together, measured
        self.left, self.failed = {state.run: state for state in todo}, list[str]()
        self.tasks: dict[Future, Sequence[State]] = {}
        self.claimed: list[State] = []  # by other processes
        self.tries: Counter[str] = Counter()
        self.deaths = 0

    def run(self, executor: Executor, processes: int) -> None:
        """Work until each run is done, here or elsewhere, or has failed, or the time is up."""
        self.executor = executor
        told = forecast(self.todo, processes * self.together, self.measured)
        tqdm.write(told, file=sys.stderr)
        _try_named(self.todo, executor)
        for state in self.todo:
            if state.state == "changed":
                self.store.remove(state.run)
        count = processes if self.together > 1 else len(self.todo)
        try:
            with tqdm(total=sum(s.left for s in self.todo), unit=" epochs") as self.bar:
                for i in range(count):
                    self._submit(self.todo[i::count])
                while self.tasks or self.claimed:
                    if not self.tasks:
                        time.sleep(ASK_SECONDS)
                        again, self.claimed = self.claimed, []
                        for state in again:
                            self._submit([state])
                    ended, _ = wait(self.tasks, POLL_SECONDS, FIRST_COMPLETED)
                    for future in ended:
                        self._take(self.tasks.pop(future), future)
                    self._look()
        finally:
            for future in self.tasks:
                future.cancel()

    def _look(self) -> None:
        """Show the runs' progress, here and in other processes that share the store."""
        for run in self.store.whole(self.left.keys() & set(self.store.own())):
            del self.left[run]
        epochs = sum(state.left for state in self.todo)
        begun = {path.stem for path in (self.store.path / "checkpoints").glob("*.safetensors")}
        for run, state in self.left.items():
            there = checkpoints.progress(self.store.path, run) if run in begun else None
            epochs -= state.config.epochs - max(there or 0, state.epochs)
        done = len(self.todo) - len(self.left)
        self.bar.set_description_str(f"runs {done}/{len(self.todo)}", refresh=False)
        self.bar.update(epochs - self.bar.n)

    def _submit(self, runs: Sequence[State]) -> None:
        needed = [seconds(state, self.measured) for state in runs]
        work = [(s.config, 0.0 if math.isnan(t) else t) for s, t in zip(runs, needed, strict=True)]
        self.tasks[self.executor.submit(self.task, work)] = runs

    def _take(self, runs: Sequence[State], future: Future) -> None:
        """Take the outcomes of a task that has ended."""
        try:
            outcomes = future.result()
        except workers.WorkersError:
            raise
        except Exception as error:
            if workers.is_death(error):
                self._died(runs, error)
                return
            outcomes = {state.run: error for state in runs}
        self.deaths = 0
        for state in runs:
            outcome = outcomes[state.run]
            if isinstance(outcome, RunRecord):
                self.store.write(outcome)
            elif isinstance(outcome, Claimed):
                self.claimed.append(state)
            elif isinstance(outcome, Exception) and not isinstance(outcome, Stopped):
                if isinstance(outcome, StoreError):
                    self.store.check_writable()  # or all further runs would fail, too
                self.failed.append(_line(state, outcome))

    def _died(self, runs: Sequence[State], error: Exception) -> None:
        """Submit a dead process's runs again: each one in progress alone, the rest together."""
        self.deaths += 1
        if self.deaths >= DEATHS:
            raise SweepError(f"the workers die, {self.deaths} in a row: {error}") from error
        self._look()
        left = [state for state in runs if state.run in self.left]
        begun, rest = left[: self.together], left[self.together :]  # in this order
        if rest:
            self._submit(rest)
        for state in begun:
            self.tries[state.run] += 1
            if self.tries[state.run] < TRIES:
                self._submit([state])
            else:
                why = f"{error or type(error).__name__}, {TRIES} times"
                self.store.fail(state.config, why)
                self.failed.append(_line(state, why))
