"""Worker processes of this machine, each with a device of its own. Imports no torch by itself."""

import math
import os
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from concurrent.futures import ThreadPoolExecutor as Threads
from multiprocessing import connection, current_process, get_context, parent_process
from pathlib import Path
from typing import Any

from paperlib.extras.fast import WORKER_ENVIRONMENT

GUARD = (
    "the worker processes ended as they started. A script that starts runs has to be a file, and "
    'to do so below `if __name__ == "__main__":`, since each worker imports the script'
)
_device = ""  # of this process, if it is a worker


class WorkerDied(RuntimeError):
    """The process that had the work ended without an answer, or can do no more work.

    Work may raise this to retire its process, for example after a GPU failure.
    """


class WorkersError(RuntimeError):
    """Worker processes cannot start at all; the message names the remedy."""


class Processes(Executor):
    """Local worker processes, one for each of `devices`, started when there is work for them.

    Each is a process pool of the standard library with one worker. If it dies, only its own work
    fails, and another one replaces it. `assigned_device` gives a worker its device. Workers end
    with this process, even if it is killed. They leave Ctrl-C to it. An error in a `with` block
    ends them at once.

    Args:
        devices: The device of each process.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        if getattr(current_process(), "_inheriting", False):
            raise SystemExit(1)  # this is a worker that imports a script without a main guard
        set_environment()
        self._context = get_context("spawn")
        # Workers end when this end of the pipe closes, after an error or this process's death.
        self._theirs, self._lifeline = self._context.Pipe(duplex=False)
        self._begun = self._stopped = False
        self._free: queue.SimpleQueue[tuple[str, ProcessPoolExecutor | None]] = queue.SimpleQueue()
        for device in devices:
            self._free.put((device, None))
        self._threads = Threads(len(devices))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Call fn(*args, **kwargs) in the first process that is free."""
        return self._threads.submit(self._serve, fn, args, kwargs)

    def _serve(self, fn: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        device, pool = self._free.get()
        try:
            pool = pool or self._start(device)
            return pool.submit(fn, *args, **kwargs).result()
        except (BrokenExecutor, WorkerDied) as error:
            if pool is not None:
                pool.shutdown()
            pool = None
            if isinstance(error, WorkerDied):
                raise
            raise WorkerDied("its process was killed or crashed: out of memory?") from error
        finally:
            self._free.put((device, pool))

    def _start(self, device: str) -> ProcessPoolExecutor:
        pool = ProcessPoolExecutor(1, self._context, _begin, (self._theirs, device))
        try:
            pool.submit(int).result()
        except BrokenExecutor as error:
            pool.shutdown()
            if self._begun or self._stopped:
                raise
            raise WorkersError(GUARD) from error
        self._begun = True
        return pool

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Refuse further work, and end the processes when all work is done."""
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
        while wait and not self._free.empty():
            _, pool = self._free.get()
            if pool is not None:
                pool.shutdown()

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            self._stopped = True
            self._lifeline.close()
        self.shutdown(cancel_futures=error[0] is not None)


def set_environment() -> None:
    """Set WORKER_ENVIRONMENT's variables for new processes, except those that the user has set.

    Under NVIDIA's MPS all processes share one pool of connections to the device, so there CUDA's
    default of 8 stays: with more in each process, only a few processes would get any.
    """
    for name, value in WORKER_ENVIRONMENT.items():
        if name != "CUDA_DEVICE_MAX_CONNECTIONS" or "CUDA_MPS_PIPE_DIRECTORY" not in os.environ:
            os.environ.setdefault(name, value)


def _begin(lifeline: connection.Connection, device: str) -> None:
    global _device
    _device = device
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()


def _end_with_parent(lifeline: connection.Connection) -> None:
    parent = parent_process()
    connection.wait([lifeline] if parent is None else [lifeline, parent.sentinel])
    os._exit(1)


def assigned_device(asked: str) -> str:
    """Return this process's own device if it has one and `asked` allows it, else `asked`."""
    return _device if _device and asked in ("auto", "cuda") else asked


def is_death(error: BaseException) -> bool:
    """Return whether work failed because its process died, not because of an error of its own."""
    killed = type(error).__name__ == "KilledWorker"  # Dask's, after several workers
    return killed or isinstance(error, WorkerDied | BrokenExecutor)


def may_have_gpu() -> bool:
    """Return whether there may be a CUDA device, as far as can be seen without torch."""
    dev = Path("/dev")  # dxg is the GPU that Windows lends to WSL
    return (dev / "dxg").exists() or any(dev.glob("nvidia[0-9]*"))


def gpus() -> int:
    """Return the number of CUDA devices; import torch only if there may be any."""
    if not may_have_gpu() and not os.environ.get("CUDA_VISIBLE_DEVICES"):
        return 0
    import torch

    return torch.cuda.device_count()


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices(
    asked: str, jobs: int | None, per_device: int | None, runs: int
) -> tuple[list[str], int]:
    """Return the device of each process, and the number of runs in parallel in each.

    By default there is one process a GPU, with `per_device` runs in parallel. Without a CUDA device
    there is one process a core, with one run.

    Args:
        asked: The device, as for `devices.choose_device`.
        jobs: The number of processes, whatever the number of GPUs or cores.
        per_device: Runs in parallel on a GPU. Elsewhere it is the number of processes, if `jobs` is
            None.
        runs: The number of runs. There are at most so many processes, and each has at most its
            share of the runs in parallel.
    """
    found, together = [asked], per_device or 1
    if count := gpus() if asked in ("auto", "cuda") else 0:
        found = [f"cuda:{i}" for i in range(count)]
    elif not asked.startswith("cuda"):
        jobs, together = jobs or per_device or cores(), 1
    jobs = min(jobs or len(found), runs)
    found = [found[i % len(found)] for i in range(jobs)]
    return found, min(together, math.ceil(runs / jobs))
