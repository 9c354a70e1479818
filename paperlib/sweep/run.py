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

TRIES = 3  # how often a run is begun whose process dies
DEATHS = 9  # so many in a row, and something else is wrong
POLL_SECONDS = 1.0  # between looks at the store
ASK_SECONDS = 5.0  # until runs that others have claimed are tried for again


class SweepError(RuntimeError):
    """Some runs failed; the message names each with its reason. All others are in the store."""


def collect(
    configs: Iterable[Config],
    store: Store | None = None,
    executor: Executor | None = None,
    **options: Any,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the records of all configurations; run first what the store lacks.

    Args:
        configs: the configurations.
        store: where records are; the default store where None.
        executor: as for `execute`.
        **options: of `execute`.

    Returns:
        Two frames keyed by `run`: one row an epoch, and one row a run.
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
    per_device: int | None = None,
    send_back: bool = False,
    fast: bool = False,
    minutes: float | None = None,
) -> int:
    """Run what the store lacks, in the order given. Ctrl-C keeps finished runs and checkpoints.

    Args:
        configs: the configurations.
        store: where the records go.
        executor: any `concurrent.futures.Executor`; by default local processes, see `workers`.
        device: as for `training.choose_device`.
        jobs: how many local processes; by default one a core, or one a GPU.
        retry_failed: also run what failed before.
        per_device: runs in parallel in each process on a GPU.
        send_back: workers keep a store of their own and send the records.
        fast: as for `training.make_loop`.
        minutes: how long this may take. By the speeds so far, no run begins that cannot end by
            then. When the time is up, runs stop with a checkpoint.

    Returns:
        How many runs were done.

    Raises:
        SweepError: runs failed, now or before; the others were done.
        StoreError: the store cannot be written, or has records of other data or code.
        ValueError: data cannot be had, or a named function is not what its file holds.
    """
    until = math.inf if minutes is None else time.time() + 60 * minutes
    found = states(configs, store)
    if changed := [state.why for state in found if state.state == "changed"]:
        raise StoreError("\n".join(changed))
    todo = [s for s in found if s.state in TO_RUN or (s.state == "failed" and retry_failed)]
    failed = [_line(s, s.why) for s in found if s.state == "failed" and not retry_failed]
    done = 0
    if todo:
        devices, together = [""], 1
        if executor is None:
            devices, together = workers.devices(device, jobs, per_device, len(todo))
        _prepare(todo, store, send_back)
        measured = speeds(store, device)
        tqdm.write(forecast(todo, len(devices) * together, measured), file=sys.stderr)
        path = None if send_back else store.path.absolute()
        task = partial(train, path, store.results, device, together, fast, until)
        work = _Sweep(todo, store, task, together, measured)
        with nullcontext(executor) if executor else workers.Processes(devices) as used:
            work.run(used, len(devices))
        done, failed = len(todo) - len(work.left), [*work.failed, *failed]
    if failed:
        raise SweepError("\n".join([f"{len(failed)} of {len(found)} runs failed:", *failed]))
    return done


def _line(state: State, why: Exception | str) -> str:
    return f"  {state.config.title}: {why or type(why).__name__}"


def _prepare(todo: Sequence[State], store: Store, send_back: bool) -> None:
    """Raise where runs cannot begin; load every data set once before workers start."""
    store.check_writable()
    for config in {(s.config.model, s.config.pruning): s.config for s in todo}.values():
        code_checksum(config)
    specs = {state.config.data for state in todo} - {"digits"}
    if specs and not send_back:
        from paperlib import data

        for spec in specs:
            data.load(spec, store.path / "data")


class _Sweep:
    """Runs on their way through an executor.

    Attributes:
        left: by identity, the runs that have no record yet.
        failed: a line for each run that failed.
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
        """Return when every run is done, here or elsewhere, has failed, or there is no time."""
        self.executor = executor
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
        """Show how far the runs are, here and in other processes that share the store."""
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
        """A task has come back."""
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
                    self.store.check_writable()  # else the next runs would come to the same
                self.failed.append(_line(state, outcome))

    def _died(self, runs: Sequence[State], error: Exception) -> None:
        """A process died: the runs that it trained are tried again alone, the others as before."""
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
