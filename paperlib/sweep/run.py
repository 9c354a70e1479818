"""The execution of missing runs, in worker processes or any other executor."""

import math
import queue
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Any

import pandas as pd

from paperlib.config import Config
from paperlib.runs import Store, StoreError
from paperlib.store.checkpoints import Stopped
from paperlib.store.lease import Claimed
from paperlib.sweep import costs, workers
from paperlib.sweep.progress import Bar
from paperlib.sweep.states import TO_RUN, State, states, unique
from paperlib.sweep.tasks import How, Outcome, train

TRIES = 3  # how often a run is begun whose process dies
DEATHS = 9  # so many in a row, and something else is wrong
POLL_SECONDS = 1.0  # between looks at what others do
ASK_SECONDS = 5.0  # until runs that others have claimed are tried for again
RETRY = "use --retry-failed (retry_failed=True) to run them again"


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
    tell: Callable[[str], object] = lambda text: None,
) -> int:
    """Run what the store lacks, in the order given.

    Stopping half-way (Ctrl-C) keeps every finished run, and the checkpoints of the others.

    Args:
        configs: the configurations.
        store: where the records go.
        executor: any `concurrent.futures.Executor`; by default local processes, see `workers`.
        device: as for `training.choose_device`.
        jobs: how many local processes; by default one a core, or one a GPU.
        retry_failed: run again what failed before, which is left alone otherwise.
        per_device: runs in parallel in each process on a GPU.
        send_back: workers keep a store of their own and send the records.
        fast: as for `training.make_loop`.
        minutes: how long this may take. A run is not begun that cannot be done by then, by the
            speeds that the store has measured. When the time is up, runs stop at the end of an
            epoch and leave a checkpoint.
        tell: is given lines for people, before anything is run.

    Returns:
        How many runs were done.

    Raises:
        SweepError: runs failed, now or before; the others were run all the same.
        StoreError: the store cannot be written, or has records of other data or code.
        workers.WorkersError: worker processes cannot be started.
    """
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes must be a positive number, got {minutes}")
    until = math.inf if minutes is None else time.time() + 60 * minutes
    found = states(configs, store)
    if changed := [state.error or "" for state in found if state.state == "changed"]:
        raise StoreError("\n".join(changed))
    alone = [s for s in found if s.state == "failed" and not retry_failed]
    todo = [s for s in found if s.state in TO_RUN or (s.state == "failed" and retry_failed)]
    problems, stopped = [], 0
    if todo:
        devices: list[str] = []
        together = 1
        if executor is None:
            cores = workers.default_jobs()
            devices, together = workers.devices(device, jobs, per_device, cores, len(todo))
        _prepare(todo, store, tell, send_back)
        path = None if send_back else store.path.absolute()
        how = How(path, store.results, device, together, fast, until)
        speeds = costs.speeds(store, device)
        tell(costs.forecast(todo, max(len(devices) * together, 1), speeds))
        work = _Sweep(todo, store, how, speeds)
        work.run(executor or workers.Processes(devices, until), len(devices))
        stopped = work.stopped
        if work.failed:
            problems = [f"{len(work.failed)} of {len(todo)} runs failed:", *work.failed]
    if alone:
        problems.append(f"{len(alone)} runs failed before and are left alone; {RETRY}:")
        problems += [f"  {state.config.title}: {state.error}" for state in alone]
    if problems:
        raise SweepError("\n".join(problems))
    return len(todo) - stopped


def _prepare(
    todo: Sequence[State], store: Store, tell: Callable[[str], object], send_back: bool
) -> None:
    """Load every data set once before workers start; raise where one cannot be had."""
    store.check_writable()
    for state in todo:
        if state.state == "damaged":
            tell(f"run again: {state.error}")
    specs = {state.config.data for state in todo} - {"digits"}
    if specs and not send_back:
        from paperlib import data

        for spec in specs:
            data.load(spec, store.path / "data")


class _Sweep:
    """Runs on their way through an executor."""

    def __init__(self, todo: list[State], store: Store, how: How, speeds: costs.Speeds) -> None:
        self.todo, self.store, self.how, self.speeds = todo, store, how, speeds
        self.bar = Bar(todo, store, speeds)
        self.ended: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self.tasks: dict[Future, Sequence[State]] = {}
        self.claimed: list[State] = []  # by other processes
        self.tries: Counter[str] = Counter()
        self.deaths = self.stopped = 0
        self.failed: list[str] = []

    def run(self, executor: Executor, processes: int) -> None:
        """Return when every run is done, here or elsewhere, has failed, or there is no time."""
        self.executor = executor
        try:
            with self.bar:
                count = processes if self.how.together > 1 else len(self.todo)
                for i in range(count):
                    self._submit(self.todo[i::count])
                self._wait()
        except BaseException:
            for future in self.tasks:
                future.cancel()
            if isinstance(executor, workers.Processes):
                executor.kill()
            raise
        if isinstance(executor, workers.Processes):
            executor.shutdown()

    def _wait(self) -> None:
        looked = asked = time.monotonic()
        while self.tasks or self.claimed:
            with suppress(queue.Empty):
                self._take(self.ended.get(timeout=POLL_SECONDS))
            now = time.monotonic()
            if now - looked >= POLL_SECONDS:
                looked = now
                self.bar.look()
                self.claimed = [state for state in self.claimed if state.run in self.bar.left]
            if now - asked >= ASK_SECONDS:
                asked, again, self.claimed = now, self.claimed, []
                for state in again:
                    self._submit([state])

    def _submit(self, runs: Sequence[State]) -> None:
        """Give the executor a task."""
        work = [(s.config, s.left * self.speeds.epoch(s.config, unknown=0.0)) for s in runs]
        future = self.executor.submit(train, work, self.how)
        self.tasks[future] = runs
        future.add_done_callback(self.ended.put)

    def _take(self, future: Future) -> None:
        """A task has come back."""
        runs = self.tasks.pop(future)
        outcomes: dict[str, Outcome]
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
            self._end(state, outcomes[state.run])

    def _end(self, state: State, outcome: Outcome) -> None:
        """A run has come back."""
        if isinstance(outcome, tuple):
            try:
                self.store.put(*outcome)
            except StoreError as error:
                outcome = error
        if isinstance(outcome, Claimed):
            self.claimed.append(state)
        elif isinstance(outcome, Stopped):
            self.stopped += 1
            self.bar.left.pop(state.run, None)
        elif isinstance(outcome, Exception):
            if isinstance(outcome, StoreError):
                self.store.check_writable()  # else the next runs would come to the same
            self._give_up(state, outcome)

    def _died(self, runs: Sequence[State], error: Exception) -> None:
        """A process died: the runs that it trained are tried again alone, the others as before."""
        self.deaths += 1
        if self.deaths >= DEATHS:
            raise SweepError(f"the workers die, {self.deaths} in a row: {error}") from error
        self.bar.look()
        left = [state for state in runs if state.run in self.bar.left]
        begun, rest = left[: self.how.together], left[self.how.together :]  # in this order
        if rest:
            self._submit(rest)
        for state in begun:
            self.tries[state.run] += 1
            if self.tries[state.run] < TRIES:
                self._submit([state])
            else:
                why = f"{error or type(error).__name__}, {TRIES} times"
                self.store.fail(state.config, why)
                self._give_up(state, why)

    def _give_up(self, state: State, error: Exception | str) -> None:
        self.failed.append(f"  {state.config.title}: {error or type(error).__name__}")
        self.bar.left.pop(state.run, None)
