"""Worker processes of this machine, each with a device of its own. Imports no torch by itself."""

import os
import queue
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from concurrent.futures import ThreadPoolExecutor as Threads
from contextlib import contextmanager
from multiprocessing import connection, current_process, get_context, parent_process
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from paperlib.extras.fast import WORKER_ENVIRONMENT

P = ParamSpec("P")
T = TypeVar("T")
PAUSES_SECONDS = (2.0, 4.0, 8.0, 16.0, 30.0, 60.0)  # before a device that is busy is tried again
GUARD = (
    "the worker processes ended as they started. A script that starts runs has to do so below "
    '`if __name__ == "__main__":`, since each worker imports the script'
)


_ENVIRONMENT = threading.Lock()


@contextmanager
def _worker_environment() -> Iterator[None]:
    """Set WORKER_ENVIRONMENT's variables, but those that the user has set, for this context."""
    with _ENVIRONMENT:
        added = {k: v for k, v in WORKER_ENVIRONMENT.items() if k not in os.environ}
        os.environ.update(added)
        try:
            yield
        finally:
            for name in added:
                del os.environ[name]


class WorkerDied(RuntimeError):
    """The process that had the work ended without an answer, or can do no more.

    Work may raise this to retire its process, for example after a GPU failure.

    Attributes:
        runs: identities of the runs that were being trained, where that is known.
    """

    def __init__(self, message: str, runs: Sequence[str] = ()) -> None:
        super().__init__(message, tuple(runs))
        self.runs = tuple(runs)

    def __str__(self) -> str:
        return self.args[0]


class WorkersError(RuntimeError):
    """Worker processes cannot be started at all; the message says what to do."""


class Processes(Executor):
    """Local worker processes, one for each of `devices`, started when there is work for them.

    Each is a process pool of the standard library with one worker, so that a death fails only the
    work that this process had; it is then replaced. `assigned_device` gives a worker its device.
    Workers end with this process, even if it is killed. They leave Ctrl-C to it.

    Raises:
        WorkersError: this script cannot be imported by workers.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        check_main()
        self._stopped = threading.Event()
        self._workers = [_Worker(device, self._stopped) for device in devices]
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)
        self._threads = Threads(len(devices))

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have fn(*args, **kwargs) called in the first process that is free."""
        return self._threads.submit(self._serve, fn, args, kwargs)

    def _serve(self, fn: Callable[..., T], args: tuple, kwargs: dict[str, Any]) -> T:
        worker = self._free.get()
        try:
            return worker.call(fn, *args, **kwargs)
        finally:
            self._free.put(worker)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work, and end the processes when all work is done."""
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
        if wait:
            for worker in self._workers:
                worker.end()

    def kill(self) -> None:
        """End all processes now; work not done is cancelled or fails with WorkerDied."""
        self._stopped.set()
        for worker in self._workers:
            worker.kill()
        self.shutdown(cancel_futures=True)


class _Worker:
    """One worker process with its device; it is started when there is work, and after its death."""

    def __init__(self, device: str, stopped: threading.Event) -> None:
        self.device, self.stopped, self.started = device, stopped, False
        self.pool: ProcessPoolExecutor | None = None
        self.lifeline: connection.Connection | None = None

    def call(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call fn in the process. Raises WorkerDied where it dies, and what fn raises."""
        try:
            return self._pool().submit(fn, *args, **kwargs).result()
        except BrokenExecutor as error:
            self.end()
            raise WorkerDied("its process was killed or crashed: out of memory?") from error
        except WorkerDied:
            self.end()
            raise

    def _pool(self) -> ProcessPoolExecutor:
        """Return the pool, with its device initialised; wait where other processes are at it."""
        if self.pool is not None:
            return self.pool
        for pause in (*PAUSES_SECONDS, None):
            try:
                problem = self._start()
            except BrokenExecutor as error:
                if self.started or self.stopped.is_set():
                    raise
                self.end()
                raise WorkersError(GUARD) from error
            if problem is None:
                break
            self.end()
            if pause is None or self.stopped.wait(pause * random.uniform(0.7, 1.3)):
                raise WorkerDied(f"its process cannot use {self.device}: {problem}")
        assert self.pool is not None
        return self.pool

    def _start(self) -> str | None:
        """Start the process; return why it cannot use its device, if it cannot."""
        context = get_context("spawn")
        theirs, self.lifeline = context.Pipe(duplex=False)
        with theirs:
            if self.stopped.is_set():  # nobody else would end the process
                self.kill()
            self.pool = ProcessPoolExecutor(1, context, _begin, (theirs, self.device))
            with _worker_environment():  # the first call starts the process
                begun = self.pool.submit(_device_problem, self.device)
            problem = begun.result()
        self.started = True
        return problem

    def kill(self) -> None:
        """End the process now."""
        if self.lifeline is not None:
            self.lifeline.close()

    def end(self) -> None:
        """End the process, when it has done its work."""
        if self.pool is not None:
            self.pool.shutdown()
        self.kill()
        self.pool = self.lifeline = None


def check_main() -> None:
    """Raise WorkersError where worker processes could not import the script that starts them.

    A worker that is importing a script without a main guard ends here, without a word: its parent
    reports it.
    """
    if getattr(current_process(), "_inheriting", False):
        raise SystemExit(1)
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if path and main.__spec__ is None and not Path(path).exists():
        raise WorkersError(f"worker processes cannot import {path}: save the script as a file")


def _begin(lifeline: connection.Connection, device: str) -> None:
    global _device
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    # CUDA's default of 8 would have several streams wait for each other.
    _device = device


def _end_with_parent(lifeline: connection.Connection) -> None:
    parent = parent_process()
    connection.wait([lifeline] if parent is None else [lifeline, parent.sentinel])
    os._exit(1)


def _device_problem(device: str) -> str | None:
    """Initialise a GPU; return why that is not possible. Under MPS it may be so for a while."""
    if not device.startswith("cuda"):
        return None
    import torch

    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


_device = ""


def assigned_device(asked: str) -> str:
    """Return the device of this process, if it was given one and `asked` leaves the choice."""
    return _device if _device and asked in ("auto", "cuda") else asked


def is_death(error: BaseException) -> bool:
    """Whether work failed because of the process that had it, not because of itself."""
    killed = type(error).__name__ == "KilledWorker"  # Dask's, after several workers
    return killed or isinstance(error, WorkerDied | BrokenExecutor)


def default_jobs() -> int:
    """Return PAPERLIB_JOBS, or one process a core this process may use."""
    given = os.environ.get("PAPERLIB_JOBS", "")
    if given and not (given.isascii() and given.isdigit() and int(given) > 0):
        raise ValueError(f"PAPERLIB_JOBS must be a positive number, got {given!r}")
    if given:
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> int:
    """Return how many CUDA devices there are; import torch only where there may be some."""
    dev = Path("/dev")  # dxg: what Windows lends to WSL
    there = (dev / "dxg").exists() or any(dev.glob("nvidia[0-9]*"))
    if not there and not os.environ.get("CUDA_VISIBLE_DEVICES"):
        return 0
    import torch

    return torch.cuda.device_count()


def devices(
    asked: str, jobs: int | None, per_device: int | None, cores: int
) -> tuple[list[str], int]:
    """Return the device of each process, and how many runs a process has in parallel.

    By default there is a process for each GPU, with `per_device` runs in parallel, or on the CPU a
    process for each core, with one run.

    Args:
        asked: the device, as for `training.choose_device`.
        jobs: how many processes, whatever there is.
        per_device: runs in parallel on a GPU.
        cores: of the CPU.
    """
    count = gpus() if asked in ("auto", "cuda") else 0
    if count:
        return [f"cuda:{i % count}" for i in range(jobs or count)], per_device or 1
    if asked.startswith("cuda"):
        return [asked] * (jobs or 1), per_device or 1
    return [asked] * (jobs or per_device or cores), 1
