"""Which runs are missing, and their execution in parallel, with progress.

A run is done once however many sweeps, processes and hosts share a store: who trains it has claimed
it, and others wait for its record. What dies is tried again from its checkpoint; what fails is
noted, and left alone until somebody asks for it again.
"""

import math
import os
import queue
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import CancelledError, Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from paperlib import checkpoints, costs, executors, locks
from paperlib.config import Config, to_dict
from paperlib.packs import Entry
from paperlib.runs import RunRecord, Store, StoreError

TRIES = 3  # how often a run is begun whose process dies
DEATHS = 9  # so many in a row, and something else is wrong
POLL = 1.0  # seconds between looks at what others do
ASK = 5.0  # seconds until a run that others have claimed is tried for again
RETRY = "but for --retry-failed (retry_failed=True)"
STATES = ("done", "partial", "failed", "damaged", "missing")
TO_RUN = ("partial", "damaged", "missing")


class SweepError(RuntimeError):
    """Some runs failed; the message names each with its reason. All others are in the store."""


def default_jobs() -> int:
    """PAPERLIB_JOBS, or one process a core this process may use."""
    given = os.environ.get("PAPERLIB_JOBS", "")
    if given and not (given.isascii() and given.isdigit() and int(given) > 0):
        raise ValueError(f"PAPERLIB_JOBS must be a positive number, got {given!r}")
    if given:
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def collect(
    configs: Iterable[Config],
    store: Store | None = None,
    executor: Executor | None = None,
    device: str = "auto",
    jobs: int | None = None,
    **options: object,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The records of all configurations: (one row an epoch, one row a run), keyed by `run`.

    What the store lacks is run first, by `execute`, which the options are for.
    """
    store = store or Store()
    configs = unique(configs)
    execute(configs, store, executor, device, jobs, **options)
    return store.frames(configs)


def unique(configs: Iterable[Config]) -> dict[str, Config]:
    """Configurations by identity: those that are the same run appear once."""
    return {config.identity: config for config in configs}


@dataclass
class State:
    """What a store knows of a run: `state` is done, partial, failed, damaged or missing.

    epochs: how many are done. why: why it would or would not be run, for people. error: the note
    of a failure, or what is wrong with a record.
    """

    run: str
    config: Config
    state: str
    epochs: int
    why: str
    error: str | None = None


def states(configs: Iterable[Config] | dict[str, Config], store: Store) -> list[State]:
    """The state of each configuration, in order. Imports no torch."""
    configs = configs if isinstance(configs, dict) else unique(configs)
    found, failures = store.find(configs), store.failures()
    own = set(store.own())
    return [_state(run, config, found, failures, own, store) for run, config in configs.items()]


def _state(run, config, found, failures, own, store) -> State:
    record = found.get(run)
    if isinstance(record, Entry):
        where = "in the store" if run in own else "in results"
        return State(run, config, "done", config.epochs, f"not run: {where}")
    epochs = checkpoints.progress(store.path, run) or 0
    resumed = f"goes on from epoch {epochs}" if epochs else "starts from its first epoch"
    if record is not None:
        return State(run, config, "damaged", epochs, "run: its record is damaged", str(record))
    if run in failures:
        why = "not run: it failed before; --retry-failed runs it again"
        return State(run, config, "failed", epochs, why, failures[run])
    holder = locks.holder(store.path, run)
    if holder:
        resumed += f"; process {holder['pid']} on {holder['host']} is at it"
    state = "partial" if epochs else "missing"
    return State(run, config, state, epochs, f"run: {resumed}")


def missing(configs: Iterable[Config], store: Store) -> list[Config]:
    """The configurations that have no whole record in the store."""
    configs = unique(configs)
    whole = store.whole(configs)
    return [config for run, config in configs.items() if run not in whole]


def forecast(todo: list[State], again: int, slots: int | None, speeds: costs.Speeds) -> str:
    """What is about to be run and why, and what it will take, in a line for people.

    again: how many of them failed before. slots: runs at once, None where that is open.
    """
    counts = Counter(state.state for state in todo)
    new = counts["missing"] + counts["failed"] - again
    parts = [f"{new} new"] if new else []
    parts += [f"{counts['partial']} resumed"] if counts["partial"] else []
    parts += [f"{again} tried again"] if again else []
    parts += [f"{counts['damaged']} damaged"] if counts["damaged"] else []
    seconds = [speeds.epoch(s.config) * (s.config.epochs - s.epochs) for s in todo]
    known = [value for value in seconds if not math.isnan(value)]
    left = len(seconds) - len(known)
    if not known:
        time_needed = "time unknown: nothing alike was measured here"
    elif slots is None:
        time_needed = f"about {costs.duration(sum(known))} one after the other"
    else:
        wall = max(sum(known) / slots, max(known))
        time_needed = f"about {costs.duration(wall)}, {slots} at once"
    if known and left:
        time_needed += f", and {left} of unknown length"
    space = costs.size(costs.disk([s.config for s in todo], slots or len(todo)))
    return f"{len(todo)} runs ({', '.join(parts)}): {time_needed}; up to {space} of disk"


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
    """Run what the store lacks, in the order given; returns how many runs were done.

    executor: any `concurrent.futures.Executor` (runs in threads of one process take turns); by
    default local processes of one thread each, which is both the fastest way to do several runs
    on a CPU and what keeps their numbers the same however many run at once: `jobs` of them. On
    GPUs there is a process for each, which does `per_device` runs at once, by `training.by_turns`:
    when one is done the next begins. send_back: workers keep a store of their own and send the
    records. fast: as for `training.make_loop`. tell: is given lines for people, before anything is
    run.

    minutes: how long this may take. A run is not begun that cannot be done by then, by the speeds
    measured so far; where nothing alike was measured it is. When the time is up, those at work stop
    at the end of an epoch, and leave a checkpoint.

    Runs that failed before are left alone unless retry_failed. A run that fails does not stop the
    others: SweepError at the end names it, and those left alone. Raises StoreError where the store
    cannot be written, or its disk is too small. Stopping half-way (Ctrl-C) keeps every finished
    run, and what the checkpoints hold of the others.
    """
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes must be a positive number, got {minutes}")
    until = math.inf if minutes is None else time.time() + 60 * minutes
    todo, alone = [], []
    for state in states(configs, store):
        if state.state in TO_RUN or (state.state == "failed" and retry_failed):
            todo.append(state)
        elif state.state == "failed":
            alone.append(state)
    failed, left = [], 0
    if todo:
        how = {"send_back": send_back, "fast": fast, "until": until}
        failed, left = _execute(todo, store, executor, device, jobs, per_device, how, tell)
    problems = []
    if failed:
        problems.append(f"{len(failed)} of {len(todo)} runs failed:")
        problems += [f"  {line}" for line in failed]
    if alone:
        problems.append(f"{len(alone)} runs failed before and are left alone, {RETRY}:")
        problems += [f"  {state.config.title}: {state.error}" for state in alone]
    if problems:
        raise SweepError("\n".join(problems))
    return len(todo) - left


def _execute(todo, store, executor, device, jobs, per_device, how, tell) -> tuple[list[str], int]:
    """Those that failed, and how many there was no time for."""
    devices, together = [], 1
    if executor is None:
        devices, together = executors.devices(device, jobs, per_device, default_jobs())
        devices = devices[: len(todo)]
        together = min(together, math.ceil(len(todo) / len(devices)))
    if not how["send_back"]:
        _fetch([state.config for state in todo], store)
    store.check_writable()
    at_once = together * len(devices) or getattr(executor, "slots", 0) or None
    costs.check_disk([s.config for s in todo], at_once or 1, store.path)
    speeds = costs.speeds(store, device if executor is None else None)
    again = sum(state.state == "failed" for state in todo)
    tell(forecast(todo, again, at_once, speeds))
    if executor is None:
        seconds = sum(speeds.epoch(s.config) * (s.config.epochs - s.epochs) for s in todo)
        if quicker := costs.hint([s.config for s in todo], seconds, device):
            tell(quicker)
    if getattr(executor, "slots", None) == 0:
        tell("the cluster has no workers yet: the runs wait for some")
    for state in todo:
        if state.state == "damaged":
            tell(f"run again: {state.error}")
    pool = executor or executors.Processes(devices, together)
    room = at_once if executor is None else None
    if executor is not None and how["until"] < math.inf:
        room = at_once or default_jobs()
    work = _Sweep(pool, todo, store, device, speeds, together > 1, room, **how)
    try:
        work.run()
    except BaseException:
        work.cancel()
        if executor is None:
            pool.kill()
        raise
    if executor is None:
        pool.shutdown(wait=True)
    return work.failed, len(work.left)


def _fetch(todo: list[Config], store: Store) -> None:
    """Have every data set at hand, once, before workers start; raises where one cannot be had."""
    specs = {config.data for config in todo} - {"digits"}
    if specs:
        from paperlib import data

        for spec in specs:
            data.load(spec, store.path / "data")


class _Sweep:
    """Runs on their way through an executor.

    by_turns: several at once in one process. room: so many at a time are given to the executor,
    the next when one is done; None gives it all.
    """

    def __init__(
        self, executor, todo, store, device, speeds, by_turns, room, send_back, fast, until
    ) -> None:
        self.executor, self.store, self.device, self.send_back = executor, store, device, send_back
        self.todo: dict[str, State] = {state.run: state for state in todo}
        self.by_turns, self.room, self.fast, self.until = by_turns, room, fast, until
        self.waiting = deque(todo)
        self.suspects: deque[State] = deque()  # what several processes may have died of
        self.finished: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self.pending: dict[Future, State] = {}
        self.elsewhere: dict[str, float] = {}  # when each was found claimed
        self.tries, self.deaths = Counter(), 0
        self.death: BaseException | None = None
        self.failed: list[str] = []
        self.left: list[State] = []
        self.bar = _Bar(self.todo, store.path, speeds)

    def run(self) -> None:
        """Until every run is done, here or elsewhere, or has failed, or there is no time for it."""
        with self.bar:
            self._feed()
            while self.pending or self.elsewhere:
                with suppress(queue.Empty):
                    if self.pending:
                        self._take(self.finished.get(timeout=POLL))
                    else:
                        time.sleep(POLL)
                if self.elsewhere and self.finished.empty():
                    self._look_elsewhere()
                self._feed()
                self.bar.show()

    def cancel(self) -> None:
        """Take back what was not begun."""
        for future in self.pending:
            future.cancel()

    def _feed(self) -> None:
        """Give the executor what it has room for."""
        while self.waiting and (self.room is None or len(self.pending) < self.room):
            self._submit(self.waiting.popleft())
        if self.suspects and not (self.pending or self.waiting):
            self._submit(self.suspects.popleft())  # alone: one may be what they died of

    def _submit(self, state: State) -> None:
        if self._too_late(state):
            self._leave(state)
            return
        how = self.device, self.fast, self.until
        if self.send_back:
            work = _work_and_send
        else:
            work = _work_by_turns if self.by_turns else _work
            how = str(self.store.path.absolute()), self.store.results, *how
        try:
            future = self.executor.submit(work, state.config, *how)
        except RuntimeError as error:  # an executor that is broken takes nothing more
            self._give_up(state, error)
            return
        self.pending[future] = state
        future.add_done_callback(self.finished.put)

    def _too_late(self, state: State) -> bool:
        seconds = self.bar.speeds.epoch(state.config) * (state.config.epochs - state.epochs)
        return time.time() + (0 if math.isnan(seconds) else seconds) >= self.until

    def _leave(self, state: State) -> None:
        self.left.append(state)
        self.bar.gave_up(state)

    def _take(self, future: Future) -> None:
        state = self.pending.pop(future)
        try:
            outcome = future.result()
            self.deaths = 0
        except (Exception, CancelledError) as error:
            outcome = error
            self._count_death(error)
        if self.send_back and isinstance(outcome, tuple):
            entry, arrays = outcome
            try:
                self.store.put(entry, arrays)
                outcome = float(entry.columns["seconds"].mean())
            except StoreError as error:
                outcome = error
        if isinstance(outcome, checkpoints.Stopped):
            self._leave(state)
        elif isinstance(outcome, BaseException):
            self._failed(state, outcome)
        elif outcome is None:
            self.elsewhere[state.run] = time.monotonic()
        else:
            self.bar.done(state, outcome)

    def _count_death(self, error: BaseException) -> None:
        """Once for all runs that one process had."""
        if executors.died(error) and error is not self.death:
            self.death = error
            self.deaths += 1
            if self.deaths >= DEATHS:
                raise SweepError(f"the workers die, {self.deaths} in a row: {error}") from error

    def _failed(self, state: State, error: BaseException) -> None:
        if executors.died(error):
            self.tries[state.run] += 1
            if self.tries[state.run] < TRIES:
                last = self.tries[state.run] == TRIES - 1
                (self.suspects if self.by_turns and last else self.waiting).append(state)
                return
            error = f"{error or type(error).__name__}, {TRIES} times"
            self.store.fail(state.config, error)
        elif isinstance(error, StoreError):
            # What the next runs would come to, too; better now than after hours. The disk first: if
            # it is full, whether a file can just be written hangs on what others do there.
            costs.check_disk([state.config], 1, self.store.path)
            self.store.check_writable()
        self._give_up(state, error)

    def _give_up(self, state: State, error: BaseException | str) -> None:
        self.failed.append(f"{state.config.title}: {error or type(error).__name__}")
        self.bar.gave_up(state)

    def _look_elsewhere(self) -> None:
        """Runs that others had claimed: done by now, or free again."""
        whole = self.store.whole(self.elsewhere)
        for run, since in list(self.elsewhere.items()):
            if run in whole:
                self.bar.done(self.todo[run], None)
            elif time.monotonic() - since > ASK:
                self.waiting.appendleft(self.todo[run])
            else:
                continue
            del self.elsewhere[run]


class _Bar:
    """Epochs done of all, runs done of all, and the time left by the speed measured so far."""

    def __init__(self, todo: dict[str, State], store: Path, speeds: costs.Speeds) -> None:
        self.todo, self.folder, self.speeds = todo, store / "progress", speeds
        self.left = {run: state.config.epochs - state.epochs for run, state in todo.items()}
        self.runs = self.epochs = 0
        self.total = sum(self.left.values())
        self.done_weight = 0.0
        self.start = self.looked = time.monotonic()

    def __enter__(self) -> "_Bar":
        shown = (
            "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} epochs "
            "[{elapsed}, {rate_noinv_fmt}{postfix}]"
        )
        self.bar = tqdm(total=self.total, unit=" epochs", bar_format=shown)
        self.show()
        return self

    def __exit__(self, *_) -> None:
        self.show(look=True)
        self.bar.close()

    def done(self, state: State, seconds: float | None) -> None:
        """A run is done; seconds: what its epochs took on average."""
        if seconds is not None:
            self.speeds.observe(to_dict(state.config), seconds)
        self.runs += 1
        left = self.left.pop(state.run)
        self.epochs += left
        self.done_weight += self._weight(state, left)

    def gave_up(self, state: State) -> None:
        """A run failed: its epochs will not be done."""
        self.total -= self.left.pop(state.run)

    def show(self, look: bool = False) -> None:
        """Bring the bar up to date; looks at unfinished runs at most once a `POLL`."""
        if not look and time.monotonic() - self.looked < POLL and self.runs:
            return
        self.looked = time.monotonic()
        running = self._running()
        weight = self.done_weight + sum(self._weight(self.todo[r], n) for r, n in running.items())
        remaining = sum(self._weight(self.todo[run], n) for run, n in self.left.items())
        remaining += self.done_weight - weight
        self.bar.total = self.total
        self.bar.set_description_str(f"runs {self.runs}/{len(self.todo)}", refresh=False)
        if weight > 0 and remaining > 0:
            left = (self.looked - self.start) * remaining / weight
            self.bar.set_postfix_str(f"{costs.duration(left)} left", refresh=False)
        else:
            self.bar.set_postfix_str("", refresh=False)
        self.bar.n = self.epochs + sum(running.values())
        self.bar.refresh()

    def _weight(self, state: State, epochs: int) -> float:
        """What epochs of a run cost, in seconds where all networks' are known."""
        seconds = self.speeds.epoch(state.config)
        return epochs * (1.0 if math.isnan(seconds) else seconds)

    def _running(self) -> dict[str, int]:
        """Epochs done of each run that is at work, by the notes of whoever shares the store."""
        running = {}
        with suppress(OSError):
            for name in os.listdir(self.folder):
                if name in self.left:
                    with suppress(OSError, ValueError):
                        epochs = int((self.folder / name).read_text())
                        done = epochs - self.todo[name].epochs
                        running[name] = min(max(done, 0), self.left[name])
        return running


class _Note:
    """Notes in the store, about once a `POLL`, how many epochs of a run are done."""

    def __init__(self, store: Path, run: str) -> None:
        self.path, self.last = store / "progress" / run, time.monotonic()
        self.written = False

    def __call__(self, moment) -> None:
        if time.monotonic() - self.last >= POLL:
            self.last = time.monotonic()
            with suppress(OSError):
                self.path.parent.mkdir(exist_ok=True)
                self.path.write_text(str(moment.epoch + 1))
                self.written = True

    def remove(self) -> None:
        if self.written:  # else it is that of whoever has claimed the run
            with suppress(OSError):
                self.path.unlink(missing_ok=True)


def _work(
    config: Config, store: str, results: Path | None, device: str, fast: bool, until: float
) -> float | Exception | None:
    """In a worker: do a run.

    Returns its mean seconds an epoch, None where others have claimed it, or why it failed; what a
    caller can put right as a StoreError, and Stopped where its time was up. Raises WorkerDied where
    this process should do no more.
    """
    from paperlib import training

    note = _Note(Path(store), config.identity)
    try:
        places = Store(store, results), executors.mine(device)
        (record,) = training.run_together([config], *places, [note], fast=fast, until=until)
        return _outcome(record)
    finally:
        note.remove()


def _work_by_turns(
    config: Config, store: str, results: Path | None, device: str, fast: bool, until: float
) -> Generator[str | None, None, float | Exception | None]:
    """As `_work`, for `executors.Turns`."""
    from paperlib import training

    note = _Note(Path(store), config.identity)
    try:
        places = Store(store, results), executors.mine(device)
        record = yield from training.by_turns(config, *places, note, fast=fast, until=until)
        return _outcome(record)
    finally:
        note.remove()


def _outcome(record: RunRecord | Exception) -> float | Exception | None:
    from paperlib import training

    if training.spoils(record):
        raise executors.WorkerDied(f"{type(record).__name__}: {record}")
    if isinstance(record, locks.Claimed):
        return None
    if isinstance(record, StoreError | checkpoints.Stopped):
        return record
    if isinstance(record, Exception):
        # Some exceptions cannot be sent between processes; their text always can.
        return RuntimeError(f"{type(record).__name__}: {record}")
    return float(record.epochs.seconds.mean())


def _work_and_send(
    config: Config, device: str, fast: bool, until: float
) -> tuple[Entry, bytes | None] | Exception | None:
    """In a worker with a store of its own: as `_work`, but a record as `Store.put` takes it."""
    store = Store()
    outcome = _work(config, str(store.path), store.results, device, fast, until)
    if not isinstance(outcome, float):
        return outcome
    (entry,) = store.entries([config.identity])
    return entry, store.arrays(entry)
