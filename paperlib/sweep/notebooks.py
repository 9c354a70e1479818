"""Notebooks in batch, by papermill."""

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from tqdm.auto import tqdm
from traitlets import default

from paperlib import plans
from paperlib.runs import Store, figures_path

PARALLEL = 2  # two notebooks keep two cores busy
OVERVIEWS = ("index", "claims")  # notebooks about all figures; they have no runs of their own
TRIES = 3  # kernels that start together may race for a port


class ThisKernel(AsyncKernelManager):
    """Kernels of the Python that runs this, even if the kernel spec `python3` names another."""

    @default("kernel_spec_manager")
    def _native(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[], ensure_native_kernel=True)

    async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]
        """Start a kernel without its stderr, which would break the bar; notebooks keep errors."""
        await super().start_kernel(**options | {"stderr": subprocess.DEVNULL})


def notebooks_path() -> Path:
    """Return the folder of notebooks: the checkout's, or the one in the working directory.

    Raises:
        FileNotFoundError: Neither exists.
    """
    for folder in (Path(__file__).parents[2] / "notebooks", Path.cwd() / "notebooks"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError("no folder notebooks/ here: run this in a checkout of the project")


def figures(
    scales: Mapping[str, plans.Scale], store: Store, overview: plans.Scale | None = None
) -> pd.DataFrame:
    """Execute the notebooks of figures, several at a time.

    A notebook that fails keeps the outputs of its cells, and does not stop the others.

    Args:
        scales: The scale of each figure. A notebook of several figures has the first one's.
        store: The store that holds the records.
        overview: The scale of `OVERVIEWS`, which are executed last; None leaves them out.

    Returns:
        One row a notebook: figures, profile, seconds, file (under figures/PROFILE/notebooks/) and
        error (the cell and its error, or the death of the kernel; None if it worked).
    """
    os.environ["PAPERLIB_RUNS"] = str(store.path.absolute())
    if store.results is not None:
        os.environ["PAPERLIB_RESULTS"] = str(store.results.absolute())
    shown: dict[str, list[str]] = {}
    for name in scales:
        shown.setdefault(plans.figure(name).notebook, []).append(name)
    jobs = {(notebook, scales[names[0]]): names for notebook, names in shown.items()}
    rows = _executed(jobs)
    if overview is not None:
        rows += _executed({(notebook, overview): [notebook] for notebook in OVERVIEWS})
    return pd.DataFrame(rows, columns=["figures", "profile", "seconds", "file", "error"])


def _executed(jobs: Mapping[tuple[str, plans.Scale], list[str]]) -> list[dict[str, Any]]:
    """Execute notebooks at their scales; return the rows of `figures`."""
    works = {}
    for notebook, scale in jobs:
        out = figures_path() / scale.profile / "notebooks" / f"{notebook}.ipynb"
        parameters = asdict(scale)
        if parameters.pop("networks"):  # the notebook chooses them again
            parameters["profile"] = "auto"
        if notebook in OVERVIEWS:
            del parameters["seeds"]  # overviews show all registered seeds
        path = notebooks_path() / f"{notebook}.ipynb"
        works[notebook] = partial(execute, path, out, parameters)
    done = in_parallel(works)
    return [
        {"figures": ", ".join(names), "profile": scale.profile, **done[notebook]}
        for (notebook, scale), names in jobs.items()
    ]


def in_parallel(jobs: Mapping[str, Callable[[], dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Do jobs in threads; return each result by name. The kernels are processes of their own."""
    with ThreadPoolExecutor(PARALLEL) as pool:
        futures = {name: pool.submit(job) for name, job in jobs.items()}
        for _ in tqdm(as_completed(futures.values()), "notebooks", len(jobs), unit="notebook"):
            pass
        return {name: future.result() for name, future in futures.items()}


def execute(notebook: Path, out: Path, parameters: dict[str, object]) -> dict[str, object]:
    """Execute a notebook with papermill; return seconds, file and error (None if it worked)."""
    import papermill

    out.parent.mkdir(parents=True, exist_ok=True)
    start, error = time.perf_counter(), None
    for _ in range(TRIES):
        try:
            papermill.execute_notebook(
                notebook, out, parameters, progress_bar=False, kernel_manager_class=ThisKernel
            )
        except papermill.PapermillExecutionError as failure:
            error = f"cell {failure.cell_index + 1}: {failure.ename}: {failure.evalue}"
        except RuntimeError as failure:
            error = f"the kernel died: {failure}"
            continue
        else:
            error = None
        break
    return {"seconds": time.perf_counter() - start, "file": str(out), "error": error}
