"""The execution of missing runs, in worker processes or any other executor."""

import math
import queue
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pandas as pd

from paperlib.config import Config
from paperlib.runs import Store, StoreError
from paperlib.store import checkpoints
from paperlib.sweep import costs, tasks, workers
from paperlib.sweep.progress import Bar
from paperlib.sweep.states import TO_RUN, State, states, unique
from paperlib.sweep.tasks import How, Outcome

TRIES = 3  # how often a run is begun whose process dies
DEATHS = 9  # so many in a row, and something else is wrong
POLL_SECONDS = 1.0  # between looks at what others do
ASK_SECONDS = 5.0  # until a run that others have claimed is tried for again
RETRY = "use --retry-failed (retry_failed=True) to run them again"


class SweepError(RuntimeError):
    """Some runs failed; the message names each with its reason. All others are in the store."""


def collect(
    configs: Iterable[Config],
    store: Store | None = None,
    executor: Executor | None = None,
    device: str = "auto",
    jobs: int | None = None,
    **options: Any,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the records of all configurations; run first what the store lacks.

    Args:
        configs: the configurations.
        store: where records are; the default store where None.
        executor: as for `execute`.
        device: as for `execute`.
        jobs: as for `execute`.
        **options: of `execute`.

    Returns:
        Two frames keyed by `run`: one row an epoch, and one row a run.
    """
    store = store or Store()
    named = unique(configs)
    execute(named, store, executor, device, jobs, **options)
    return store.frames(named.values())


def execute(
    configs: Iterable[Config] | dict[str, Config],
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
            speeds measured so far. When the time is up, runs stop at the end of an epoch and leave
            a checkpoint.
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
    failed: list[str] = []
    left = 0
    if todo:
        path = None if send_back else str(store.path.absolute())
        how = How(path, store.results, device, fast, until)
        failed, left = _execute(todo, store, executor, jobs, per_device, how, tell)
    _raise(failed, len(todo), alone)
    return len(todo) - left


def _raise(failed: list[str], count: int, alone: list[State]) -> None:
    """Raise SweepError where runs failed, of so many, or failed before and were left alone."""
    problems = []
    if failed:
        problems.append(f"{len(failed)} of {count} runs failed:")
        problems += [f"  {line}" for line in failed]
    if alone:
        problems.append(f"{len(alone)} runs failed before and are left alone; {RETRY}:")
        problems += [f"  {state.config.title}: {state.error}" for state in alone]
    if problems:
        raise SweepError("\n".join(problems))


def _execute(
    todo: list[State],
    store: Store,
    executor: Executor | None,
    jobs: int | None,
    per_device: int | None,
    how: How,
    tell: Callable[[str], object],
) -> tuple[list[str], int]:
    """Return lines on the runs that failed, and for how many there was no time."""
    devices: list[str] = []
    together = 1
    if executor is None:
        workers.check_main()
        devices, together = workers.devices(how.device, jobs, per_device, workers.default_jobs())
        devices = devices[: len(todo)]
        together = min(together, math.ceil(len(todo) / len(devices)))
    store.check_writable()
    if how.store is not None:
        _fetch([state.config for state in todo], store)
    slots = together * len(devices) or getattr(executor, "slots", None)
    speeds = costs.speeds(store, how.device if executor is None else None)
    again = sum(state.state == "failed" for state in todo)
    tell(costs.forecast(todo, again, slots or None, speeds))
    if slots == 0:
        tell("the cluster has no workers yet: the runs wait for some")
    for state in todo:
        if state.state == "damaged":
            tell(f"run again: {state.error}")
    room = len(devices) or None
    if executor is not None and how.until < math.inf:
        room = slots or workers.default_jobs()
    pool = executor or workers.Processes(devices)
    bar = Bar({state.run: state for state in todo}, store.path, speeds)
    work = _Sweep(pool, todo, store, how, together, room, bar)
    try:
        work.run()
    except BaseException:
        work.cancel()
        if isinstance(pool, workers.Processes):
            pool.kill()
        raise
    if executor is None:
        pool.shutdown()
    return work.failed, work.left


def _fetch(todo: list[Config], store: Store) -> None:
    """Load every data set once before workers start; raises where one cannot be had."""
    specs = {config.data for config in todo} - {"digits"}
    if specs:
        from paperlib import data

        for spec in specs:
            data.load(spec, store.path / "data")


@dataclass
class _Task:
    """Runs that were given to the executor; `together` if one process has several of them."""

    runs: list[State]
    together: bool


class _Sweep:
    """Runs on their way through an executor.

    together: runs that a process has in parallel. room: as many tasks are given to the executor at
    a time, the next one when one is done; None gives it all.
    """

    def __init__(
        self,
        executor: Executor,
        todo: list[State],
        store: Store,
        how: How,
        together: int,
        room: int | None,
        bar: Bar,
    ) -> None:
        self.executor, self.store, self.how, self.bar = executor, store, how, bar
        self.together, self.room = together, room
        self.waiting = deque(todo)
        self.suspects: deque[State] = deque()  # several processes may have died of one of these
        self.finished: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self.pending: dict[Future, _Task] = {}
        self.elsewhere: dict[str, tuple[float, State]] = {}  # when each was found claimed
        self.tries: Counter[str] = Counter()
        self.deaths = 0
        self.failed: list[str] = []
        self.left = 0

    def run(self) -> None:
        """Return when every run is done, here or elsewhere, has failed, or there is no time."""
        with self.bar:
            self._feed()
            while self.pending or self.elsewhere:
                with suppress(queue.Empty):
                    if self.pending:
                        self._take(self.finished.get(timeout=POLL_SECONDS))
                    else:
                        time.sleep(POLL_SECONDS)
                if self.finished.empty():
                    self._look_elsewhere()
                self._feed()
                self.bar.show()

    def cancel(self) -> None:
        """Take back tasks that were not begun."""
        for future in self.pending:
            future.cancel()

    def _feed(self) -> None:
        """Give the executor as many tasks as it has room for."""
        while self.waiting and (self.room is None or len(self.pending) < self.room):
            if self.together > 1 and self.room is not None:
                share, states = self.room - len(self.pending), list(self.waiting)
                self.waiting = deque(s for i, s in enumerate(states) if i % share)
                self._submit(_Task(states[::share], True))
            else:
                self._submit(_Task([self.waiting.popleft()], False))
        if self.suspects and not (self.pending or self.waiting):
            self._submit(_Task([self.suspects.popleft()], False))  # one may be what they died of

    def _submit(self, task: _Task) -> None:
        future: Future
        seconds = [0.0 if math.isnan(s) else s for s in map(self.bar.speeds.seconds, task.runs)]
        try:
            if task.together:
                work = list(zip([s.config for s in task.runs], seconds, strict=True))
                future = self.executor.submit(tasks.train_together, work, self.together, self.how)
            elif time.time() + seconds[0] >= self.how.until:
                self._leave(task.runs[0])
                return
            else:
                future = self.executor.submit(tasks.train_one, task.runs[0].config, self.how)
        except RuntimeError as error:  # an executor that is broken takes nothing more
            for state in task.runs:
                self._give_up(state, error)
            return
        self.pending[future] = task
        future.add_done_callback(self.finished.put)

    def _take(self, future: Future) -> None:
        task = self.pending.pop(future)
        try:
            outcomes = future.result()
        except workers.WorkersError:
            raise
        except (Exception, CancelledError) as error:
            if workers.is_death(error):
                self._died(task, error)
                return
            outcomes = dict.fromkeys((state.run for state in task.runs), error)
        if not isinstance(outcomes, dict):
            outcomes = {task.runs[0].run: outcomes}
        self.deaths = 0
        for state in task.runs:
            self._end(state, outcomes[state.run])

    def _end(self, state: State, outcome: Outcome) -> None:
        """A run has come back."""
        if isinstance(outcome, tuple):
            entry, arrays = outcome
            try:
                self.store.put(entry, arrays)
                outcome = float(entry.columns["seconds"].mean())
            except StoreError as error:
                outcome = error
        if isinstance(outcome, checkpoints.Stopped):
            self._leave(state)
        elif isinstance(outcome, Exception):
            if isinstance(outcome, StoreError):
                self.store.check_writable()  # else the next runs would come to the same
            self._give_up(state, outcome)
        elif outcome is None:
            self.elsewhere[state.run] = time.monotonic(), state
        else:
            self.bar.done(state, outcome)

    def _died(self, task: _Task, error: BaseException) -> None:
        """The process that had a task died: its runs are tried again, the last time alone."""
        self.deaths += 1
        if self.deaths >= DEATHS:
            raise SweepError(f"the workers die, {self.deaths} in a row: {error}") from error
        runs = [state.run for state in task.runs]
        begun = set(getattr(error, "runs", ()))
        if task.together and not begun:  # the dead left their notes
            begun = {path.name for path in (self.store.path / "progress").glob("*")}
        begun = begun.intersection(runs) or set(runs)
        whole = self.store.whole(runs) if task.together else set()
        for state in task.runs:
            if state.run in whole:
                self.bar.done(state, None)
                continue
            if state.run in begun:
                self.tries[state.run] += 1
                tasks.Note(self.store.path, state.run).remove()
            if self.tries[state.run] >= TRIES:
                why = f"{error or type(error).__name__}, {TRIES} times"
                self.store.fail(state.config, why)
                self._give_up(state, why)
            elif task.together and self.tries[state.run] == TRIES - 1:
                self.suspects.append(state)
            else:
                self.waiting.append(state)

    def _leave(self, state: State) -> None:
        self.left += 1
        self.bar.gave_up(state)

    def _give_up(self, state: State, error: BaseException | str) -> None:
        self.failed.append(f"{state.config.title}: {error or type(error).__name__}")
        self.bar.gave_up(state)

    def _look_elsewhere(self) -> None:
        """Look at runs that others had claimed, done by now or free again, and at long tasks."""
        whole = self.store.whole(self.elsewhere)
        for run, (since, state) in list(self.elsewhere.items()):
            if run in whole:
                self.bar.done(state, None)
            elif time.monotonic() - since > ASK_SECONDS:
                self.waiting.appendleft(state)
            else:
                continue
            del self.elsewhere[run]
        for task in self.pending.values():
            if task.together:
                for run in self.store.whole(s.run for s in task.runs if self.bar.waits_for(s)):
                    self.bar.done(self.bar.todo[run], None)
