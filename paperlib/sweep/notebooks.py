"""Notebooks in batch: figures by papermill, and notebooks written back with their outputs."""

import multiprocessing
import os
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from tqdm.auto import tqdm
from traitlets import default

from paperlib import plans
from paperlib.runs import Store, figures_path

PARALLEL = 2  # kernels that start together race for ports; two notebooks keep two cores busy
TRIES = 3
CELL_SECONDS = 3600
# Numbers of the display that differ from one execution to the next.
STYLER = re.compile(r"\bT_([0-9a-f]{5})(?=[_\"' ])")
WIDGET = "application/vnd.jupyter.widget-view+json"
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class ThisKernel(AsyncKernelManager):
    """Kernels of the Python that runs this, whatever the kernel spec `python3` names."""

    @default("kernel_spec_manager")
    def _native(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[], ensure_native_kernel=True)


def notebooks_path() -> Path:
    """Return the folder of notebooks: the checkout's, or the one in the working directory."""
    for folder in (Path(__file__).parents[2] / "notebooks", Path.cwd() / "notebooks"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError("no folder notebooks/ here: run this in a checkout of the project")


def figures(scales: Mapping[str, plans.Scale], store: Store) -> pd.DataFrame:
    """Execute the notebooks of figures, several at a time.

    A notebook that fails keeps the outputs of its cells, and does not stop the others.

    Args:
        scales: the scale of each figure; figures of one notebook share the first one's.
        store: where the records are.

    Returns:
        One row a notebook: figures, profile, seconds, file (under figures/PROFILE/notebooks/) and
        error (the cell and its error, or None).
    """
    folder = notebooks_path()
    os.environ["PAPERLIB_RUNS"] = str(store.path.absolute())
    if store.results is not None:
        os.environ["PAPERLIB_RESULTS"] = str(store.results.absolute())
    by_notebook: dict[str, list[str]] = {}
    for name in scales:
        by_notebook.setdefault(plans.figure(name).notebook, []).append(name)
    jobs = {}
    for notebook, names in by_notebook.items():
        scale = scales[names[0]]
        out = figures_path() / scale.profile / "notebooks" / f"{notebook}.ipynb"
        jobs[notebook] = (execute, folder / f"{notebook}.ipynb", out, asdict(scale))
    done = _in_parallel(jobs)
    rows = [
        {"figures": ", ".join(names), "profile": scales[names[0]].profile, **done[notebook]}
        for notebook, names in by_notebook.items()
    ]
    return pd.DataFrame(rows, columns=["figures", "profile", "seconds", "file", "error"])


def _in_parallel(jobs: Mapping[str, tuple]) -> dict[str, Any]:
    """Return the result of each job, a function and its arguments, by name."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(PARALLEL, len(jobs)) or 1, context, _quiet) as pool:
        futures = {pool.submit(*job): name for name, job in jobs.items()}
        for _ in tqdm(as_completed(futures), "notebooks", len(futures), unit="notebook"):
            pass
        return {name: future.result() for future, name in futures.items()}


def _quiet() -> None:
    """Keep the kernels' stderr out of the bar: a notebook holds its own errors."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def execute(notebook: Path, out: Path, parameters: dict[str, object]) -> dict[str, object]:
    """Execute a notebook by papermill; return its seconds, file and error (None if it worked)."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    out.parent.mkdir(parents=True, exist_ok=True)
    start, error = time.perf_counter(), None
    for attempt in range(TRIES):
        try:
            papermill.execute_notebook(
                notebook, out, parameters, progress_bar=False, kernel_manager_class=ThisKernel
            )
        except papermill.PapermillExecutionError as failure:
            error = f"cell {failure.cell_index + 1}: {failure.ename}: {failure.evalue}"
        except (DeadKernelError, RuntimeError) as failure:
            error = f"the kernel died: {failure}"
            if attempt + 1 < TRIES:
                continue
        else:
            error = None
        break
    return {"seconds": time.perf_counter() - start, "file": str(out), "error": error}


def rewrite(paths: Iterable[Path], write: bool) -> pd.DataFrame:
    """Execute notebooks as they are, and write them back with their outputs.

    The same versions give the same bytes: timings, addresses and random names are left out.

    Args:
        paths: of the notebooks.
        write: otherwise nothing is written.

    Returns:
        One row a notebook: file, changed (whether its bytes change) and error (or None).
    """
    jobs = {str(path): (_rewrite, path, write) for path in paths}
    rows = [{"file": path, **result} for path, result in _in_parallel(jobs).items()]
    return pd.DataFrame(rows, columns=["file", "changed", "error"])


def _rewrite(path: Path, write: bool) -> dict[str, object]:
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    os.environ.setdefault("SOURCE_DATE_EPOCH", "0")  # no dates in the figures' files
    before = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(before, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_manager_class=ThisKernel,
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
        store_widget_state=False,
    )
    try:
        client.execute()
    except CellExecutionError as failure:
        return {"changed": False, "error": f"{failure.ename}: {failure.evalue}"}
    except (DeadKernelError, RuntimeError) as failure:
        return {"changed": False, "error": f"the kernel died: {failure}"}
    after = nbformat.writes(cleaned(notebook), version=4) + "\n"
    if write and after != before:
        path.write_text(after, encoding="utf-8")
    return {"changed": after != before, "error": None}


def cleaned(notebook: Any) -> Any:
    """Return an executed notebook without all that differs from one execution to the next.

    Left out are stderr, timings, widgets, the kernel's version and addresses; random names
    in pandas' tables are numbered.
    """
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = type(notebook)(name="python")
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            names: dict[str, str] = {}
            cell.outputs = [
                o
                for o in cell.outputs
                if o.get("name") != "stderr" and WIDGET not in o.get("data", {})
            ]
            for output in cell.outputs:
                if "text" in output:
                    output["text"] = _plain(output["text"], cell.id, names)
                for kind, content in output.get("data", {}).items():
                    if isinstance(content, str) and not kind.startswith("image/"):
                        output["data"][kind] = _plain(content, cell.id, names)
    return notebook


def _plain(text: str, cell: str, names: dict[str, str]) -> str:
    """Return a text without addresses; random names are numbered, and kept in `names`."""
    return STYLER.sub(
        lambda match: names.setdefault(match[0], f"T_{cell}_{len(names) + 1}"),
        ADDRESS.sub("", text),
    )
