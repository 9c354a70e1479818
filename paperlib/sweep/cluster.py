"""A Dask cluster as an executor: on one machine, SLURM, Kubernetes or a cloud."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from typing import Any

LEAVE_SECONDS = 3.0  # that a client has to leave a cluster
CLOSE_SECONDS = 15.0  # and a cluster of ours to close


class ClusterError(RuntimeError):
    """A cluster that cannot be reached or used."""


class Cluster(Executor):
    """A Dask cluster as an executor. A thread of a worker does one run at a time.

    If a worker goes away, the cluster gives its work to another one. See `connected`.
    """

    def __init__(self, client: Any, gpu: bool) -> None:
        resources = {"resources": {"GPU": 1}} if gpu else {}
        self.client = client
        self._executor = client.get_executor(pure=False, **resources)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Have fn(*args, **kwargs) called by one of the workers."""
        return self._executor.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work."""
        self._executor.shutdown(wait=wait, cancel_futures=cancel_futures)

    @property
    def slots(self) -> int:
        """How many runs it does in parallel, with the workers that it has now."""
        return sum(
            worker["nthreads"] for worker in self.client.scheduler_info(-1)["workers"].values()
        )


@contextmanager
def connected(address: str, gpu: bool = False) -> Iterator[Cluster]:
    """Connect to the Dask cluster at "tcp://HOST:PORT", or start N processes here, "local:N".

    Args:
        address: of the cluster.
        gpu: each run takes one of a worker's resource GPU.

    Raises:
        ClusterError: Dask is not installed, or nobody answers.
        ValueError: the address is neither.
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
            client.close(timeout=LEAVE_SECONDS)
        if scheduler is not None:
            with suppress(TimeoutError, OSError):
                scheduler.close(timeout=CLOSE_SECONDS)
