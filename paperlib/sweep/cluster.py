"""A Dask cluster as an executor: on one machine, SLURM, Kubernetes or a cloud."""

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any


class ClusterError(RuntimeError):
    """A cluster that cannot be reached or used."""


@contextmanager
def connected(address: str, gpu: bool = False) -> Iterator[Executor]:
    """Connect to the Dask cluster at "tcp://HOST:PORT", or start N processes here, "local:N".

    Each thread of a worker does one run at a time. If a worker is lost, the cluster gives its work
    to another one.

    Args:
        address: The address of the cluster, or "local:N".
        gpu: Each run takes one unit of a worker's resource GPU.

    Raises:
        ClusterError: Dask is not installed, or no cluster answers.
        ValueError: The address has another form.
    """
    kind, _, count = address.partition(":")
    options: dict[str, Any] = {"address": address, "timeout": "10s"}
    if kind == "local" and count.isdecimal() and int(count):
        options = {"n_workers": int(count), "threads_per_worker": 1, "silence_logs": 50}
    elif kind not in ("tcp", "tls"):
        raise ValueError(f"a cluster is tcp://HOST:PORT or local:N, got {address!r}")
    try:
        import distributed

        client = distributed.Client(**options)
    except ImportError as error:
        hint = "pip install 'distributed>=2024.8'"
        raise ClusterError(f"--cluster needs Dask, which is not installed: {hint}") from error
    except (OSError, TimeoutError) as error:
        raise ClusterError(f"no cluster answers at {address}: {error}") from error
    with client:
        yield client.get_executor(pure=False, **({"resources": {"GPU": 1}} if gpu else {}))
