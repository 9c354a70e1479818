"""Which runs are missing, and their execution in parallel, with progress."""

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed

import pandas as pd
from tqdm.auto import tqdm

from paperlib.config import Config
from paperlib.runs import Store, StoreError


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
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The records of all configurations: (one row an epoch, one row a run), keyed by `run`.

    What the store lacks is run first, by `execute`.
    """
    store = store or Store()
    configs = unique(configs)
    execute(configs, store, executor, device, jobs)
    return store.frames(configs)


def unique(configs: Iterable[Config]) -> dict[str, Config]:
    """Configurations by identity: those that are the same run appear once."""
    return {config.identity: config for config in configs}


def missing(configs: Iterable[Config], store: Store) -> list[Config]:
    """The configurations that have no whole record in the store."""
    configs = unique(configs)
    whole = store.whole(configs)
    return [config for run, config in configs.items() if run not in whole]


def execute(
    configs: Iterable[Config] | dict[str, Config],
    store: Store,
    executor: Executor | None = None,
    device: str = "auto",
    jobs: int | None = None,
) -> int:
    """Run what the store lacks; returns how many runs that were.

    executor: any `concurrent.futures.Executor` (runs in threads of one process take turns); by
    default `jobs` local processes of one thread each, which is both the fastest way to do several
    runs on a CPU and what keeps their numbers the same however many run at once. A run that fails
    does not stop the others: SweepError at the end names it. Stopping half-way (Ctrl-C) keeps
    every finished run.
    """
    todo = missing(configs.values() if isinstance(configs, dict) else configs, store)
    if not todo:
        return 0
    _fetch(todo, store)
    store.check_writable()
    if executor is not None:
        _execute(executor, todo, store, device)
        return len(todo)
    workers = min(jobs or default_jobs(), len(todo))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread)
    try:
        _execute(pool, todo, store, device)
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return len(todo)


def _fetch(todo: list[Config], store: Store) -> None:
    """Have every data set at hand, once, before workers start; raises where one cannot be had."""
    specs = {config.data for config in todo} - {"digits"}
    if specs:
        from paperlib import data

        for spec in specs:
            data.load(spec, store.path / "data")


def _execute(executor: Executor, todo: list[Config], store: Store, device: str) -> None:
    futures = {executor.submit(_work, config, str(store.path), device): config for config in todo}
    failed = []
    with tqdm(total=len(todo), desc="runs", unit="run") as bar:
        for future in as_completed(futures):
            try:
                future.result()
            except Exception as error:
                failed.append(f"{futures[future].title}: {error or type(error).__name__}")
            bar.update()
    if failed:
        raise SweepError(f"{len(failed)} of {len(todo)} runs failed:\n  " + "\n  ".join(failed))


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def _work(config: Config, store: str, device: str) -> str:
    """In a worker: do one run. What a caller can put right comes back as a StoreError or so."""
    from paperlib import training

    try:
        return training.run(config, Store(store), device).run
    except StoreError:
        raise
    except Exception as error:
        # Some exceptions cannot be sent between processes; their text always can.
        raise RuntimeError(f"{type(error).__name__}: {error}") from None
