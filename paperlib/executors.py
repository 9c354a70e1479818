"""Where runs are executed: processes of this machine, or a Dask cluster.

Both are executors as `concurrent.futures` has them. Imports neither torch nor Dask by itself.
"""

import itertools
import os
import queue
import signal
import threading
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import contextmanager, suppress
from functools import partial
from inspect import isgenerator
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

ALONE = "alone"  # what a generator yields that wants no other beside it
LOOK = 0.05  # seconds between looks for more work of a process that has room for it
LEAVE = 3.0  # seconds a process has to end when it is told to
CLOSE = 15.0  # and a cluster of ours


class WorkerDied(RuntimeError):
    """The process that had the work ended without an answer; the message says how.

    Raised by work, it ends its process, as when the GPU that it has answers no more.
    """


class ClusterError(RuntimeError):
    """A cluster that cannot be reached or used."""


class Turns:
    """Generators that take turns in one thread, each until it returns.

    One that yields `ALONE` has its next turn when no other has any left.
    """

    def __init__(self) -> None:
        self._going: dict[Hashable, Generator] = {}
        self._later: dict[Hashable, Generator] = {}
        self._alone: Hashable = None

    def __len__(self) -> int:
        return len(self._going) + len(self._later)

    def add(self, key: Hashable, steps: Generator) -> None:
        """Let one more take turns, by a key of its own, which is not None."""
        self._going[key] = steps

    def turn(self) -> Iterator[tuple[Hashable, bool, Any]]:
        """A turn of each; of each that ended key, whether by returning, and what, or its error."""
        if self._later and not self._going:
            self._alone = next(iter(self._later))
            self._going[self._alone] = self._later.pop(self._alone)
        for key in [self._alone] if self._alone in self._going else list(self._going):
            try:
                wish = next(self._going[key])
            except StopIteration as end:
                del self._going[key]
                yield key, True, end.value
            except Exception as error:
                del self._going[key]
                yield key, False, error
            else:
                if wish == ALONE:
                    self._later[key] = self._going.pop(key)

    def close(self) -> None:
        """End all."""
        for steps in (*self._going.values(), *self._later.values()):
            steps.close()


class Processes(Executor):
    """Local processes, one for each of `devices`, spawned when there is work for them.

    A process has one thread, and its device is what `mine` gives there. It is given `at_once` calls
    at any time; of these, generators take turns (`Turns`), and what they return is the result. One
    that dies fails the calls that it has, with one WorkerDied, and is replaced. All end with this
    process, even if it is killed. They leave Ctrl-C to this process, which calls `kill`.
    """

    def __init__(self, devices: Sequence[str], at_once: int = 1) -> None:
        self._at_once = at_once
        self._context = get_context("spawn")
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._processes: set[Any] = set()
        self._closed = self._killed = False
        self._threads = [
            threading.Thread(target=self._serve, args=(device,), daemon=True) for device in devices
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable, /, *args: Any, **kwargs: Any) -> Future:
        """Have function(*args, **kwargs) called in one of the processes."""
        with self._lock:
            if self._closed:
                raise RuntimeError("no work is taken after shutdown")
            future: Future = Future()
            self._work.put((future, partial(function, *args, **kwargs)))
            return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work, and end the processes when what there is has been done."""
        with self._lock:
            first, self._closed = not self._closed, True
        if cancel_futures:
            with suppress(queue.Empty):
                while True:
                    work = self._work.get_nowait()
                    if work is not None:
                        work[0].cancel()
            first = True
        if first:
            for _ in self._threads:
                self._work.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def kill(self) -> None:
        """End all processes now; work not done is cancelled or fails with WorkerDied."""
        with self._lock:
            self._killed = True
            processes = list(self._processes)
        for process in processes:
            process.terminate()
        self.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.join(LEAVE)
            if process.is_alive():
                process.kill()
        for thread in self._threads:
            thread.join(LEAVE)

    def _serve(self, device: str) -> None:
        """In a thread of this process: one process's work, and its replacement when it dies."""
        process = pipe = None
        held: dict[int, Future] = {}  # what the process has
        numbers, closing = itertools.count(), False
        while held or not closing:
            while not closing and len(held) < self._at_once:
                try:
                    work = self._work.get(block=not held)
                except queue.Empty:
                    break
                if work is None:
                    closing = True
                elif work[0].set_running_or_notify_cancel():
                    number = next(numbers)
                    held[number], call = work
                    try:
                        if process is None or (len(held) == 1 and not process.is_alive()):
                            process, pipe = self._start(device)
                        pipe.send((number, call))
                    except (EOFError, OSError):
                        process = self._lost(process, held)
                    except Exception as error:  # what cannot be sent
                        held.pop(number).set_exception(error)
            if not held:
                continue
            room = not closing and len(held) < self._at_once
            connection.wait([pipe, process.sentinel], LOOK if room else None)
            died = not process.is_alive()  # before the look at what it has sent
            try:
                while pipe.poll():
                    number, worked, result = pipe.recv()
                    future = held.pop(number)
                    if isinstance(result, WorkerDied):
                        process = self._lost(process, held, result)
                    (future.set_result if worked else future.set_exception)(result)
                    if process is None:
                        break
            except (EOFError, OSError):
                died = True
            if died and process is not None:
                process = self._lost(process, held)
        if process is not None:
            with suppress(OSError):
                pipe.send(None)
            self._forget(process)

    def _lost(self, process: Any, held: dict[int, Future], error: Exception | None = None) -> None:
        """The process is no more: what it had fails."""
        self._forget(process)
        error = error or WorkerDied(_ending(process))
        for future in held.values():
            future.set_exception(error)
        held.clear()

    def _start(self, device: str) -> tuple[Any, connection.Connection]:
        pipe, theirs = self._context.Pipe()
        process = self._context.Process(target=_worker, args=(theirs, device), daemon=True)
        with self._lock:
            if self._killed:
                raise EOFError
            process.start()
            self._processes.add(process)
        theirs.close()
        return process, pipe

    def _forget(self, process: Any) -> None:
        if process is not None:
            process.join(LEAVE)
            if process.is_alive():
                process.kill()
                process.join()
            with self._lock:
                self._processes.discard(process)


def _ending(process: Any) -> str:
    code = None if process is None else process.exitcode
    if code is not None and code < 0:
        hint = ": out of memory?" if -code == signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-code).name}{hint}"
    return f"its process ended with code {code}"


def _worker(pipe: connection.Connection, device: str) -> None:
    global _device
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # CUDA's default of 8 would have several streams wait for each other.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    _device, turns = device, Turns()

    def answer(number: int, worked: bool, result: Any) -> None:
        pipe.send((number, worked, result))
        if isinstance(result, WorkerDied):
            raise EOFError

    with suppress(EOFError, OSError):
        while True:
            while not turns or pipe.poll():
                message = pipe.recv()
                if message is None:
                    return
                number, call = message
                try:
                    result = alone(call)
                except BaseException as error:
                    answer(number, False, error)
                else:
                    if isgenerator(result):
                        turns.add(number, result)
                    else:
                        answer(number, True, result)
            for ended in turns.turn():
                answer(*ended)


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)


_device = ""


def mine(asked: str) -> str:
    """The device of this process where one was given to it and `asked` leaves the choice."""
    return _device if _device and asked in ("auto", "cuda") else asked


def alone(function: Callable, *args: Any) -> Any:
    """Call function with one thread: fastest for several runs on a CPU, and always the same sum."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    return function(*args)


def gpus() -> int:
    """How many CUDA devices there are; imports torch only where there may be some."""
    dev = Path("/dev")  # dxg: what Windows lends to WSL
    there = (dev / "dxg").exists() or any(dev.glob("nvidia[0-9]*"))
    if not there and not os.environ.get("CUDA_VISIBLE_DEVICES"):
        return 0
    import torch

    return torch.cuda.device_count()


def devices(
    asked: str, jobs: int | None, per_device: int | None, cores: int
) -> tuple[list[str], int]:
    """The device of each process, and how many runs one process does at once.

    By default a process a GPU, for all there are, with `per_device` runs at once in each; on the
    CPU one process a core with one run. jobs: how many processes, whatever there is.
    """
    count = gpus() if asked in ("auto", "cuda") else 0
    if count:
        return [f"cuda:{i % count}" for i in range(jobs or count)], per_device or 1
    if asked.startswith("cuda"):
        return [asked] * (jobs or 1), per_device or 1
    return [asked] * (jobs or per_device or cores), 1


class Cluster(Executor):
    """A Dask cluster as an executor: one run a worker slot, of one thread.

    Work whose worker goes away is given to another by the cluster. See `cluster`.
    """

    def __init__(self, client: Any, gpu: bool) -> None:
        resources = {"resources": {"GPU": 1}} if gpu else {}
        self.client = client
        self._executor = client.get_executor(pure=False, **resources)

    def submit(self, function: Callable, /, *args: Any, **kwargs: Any) -> Future:
        """Have function(*args, **kwargs) called by one of the workers."""
        return self._executor.submit(alone, partial(function, *args, **kwargs))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work."""
        self._executor.shutdown(wait=wait, cancel_futures=cancel_futures)

    @property
    def slots(self) -> int:
        """How many runs it does at once, as it is now."""
        return sum(
            worker["nthreads"] for worker in self.client.scheduler_info(-1)["workers"].values()
        )


@contextmanager
def cluster(address: str, gpu: bool = False) -> Iterator[Cluster]:
    """The Dask cluster at "tcp://HOST:PORT", or one of N processes here, "local:N".

    gpu: each run takes one of a worker's resource GPU. Raises ClusterError where Dask is not
    installed or nobody answers, and ValueError where `address` is neither.
    """
    kind, _, rest = address.partition(":")
    if kind == "local" and not (rest.isascii() and rest.isdigit() and int(rest) > 0):
        raise ValueError(f"a local cluster is local:N, with N processes, got {address!r}")
    if kind not in ("local", "tcp", "tls"):
        raise ValueError(f"a cluster is tcp://HOST:PORT or local:N, got {address!r}")
    try:
        import dask
        import distributed
    except ImportError as error:
        hint = "pip install 'distributed>=2024.8'"
        raise ClusterError(f"--cluster needs Dask, which is not installed: {hint}") from error
    with dask.config.set({"distributed.comm.timeouts.connect": "10s"}):
        try:
            if kind == "local":
                resources = {"resources": {"GPU": 1}} if gpu else {}
                scheduler = distributed.LocalCluster(
                    n_workers=int(rest),
                    threads_per_worker=1,
                    dashboard_address=None,
                    silence_logs=50,
                    **resources,
                )
                client = distributed.Client(scheduler)
            else:
                scheduler, client = None, distributed.Client(address)
        except (OSError, TimeoutError) as error:
            raise ClusterError(f"no cluster answers at {address}: {error}") from error
    try:
        yield Cluster(client, gpu)
    finally:
        with suppress(TimeoutError, OSError):
            client.close(timeout=LEAVE)
        if scheduler is not None:
            with suppress(TimeoutError, OSError):
                scheduler.close(timeout=CLOSE)


def died(error: BaseException) -> bool:
    """Whether work failed because of who had it, not because of itself."""
    killed = type(error).__name__ == "KilledWorker"  # Dask's, after several workers
    return killed or isinstance(error, WorkerDied | BrokenExecutor)
