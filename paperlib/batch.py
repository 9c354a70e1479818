"""Figures in batch: the runs they need, then their notebooks by papermill, several at a time."""

import math
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from paperlib import costs, experiments, sweep
from paperlib.config import Config
from paperlib.runs import Store, figures_path

AT_ONCE = 2  # kernels that start together race for ports; two notebooks keep two cores busy
TRIES = 3


def notebooks_path() -> Path:
    """The folder of notebooks: the checkout's, or the one in the working directory."""
    for folder in (Path(__file__).parents[1] / "notebooks", Path.cwd() / "notebooks"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError("no folder notebooks/ here: run this in a checkout of the project")


def needed(
    names: Iterable[str],
    profile: str,
    data: str | None = None,
    seeds: int | None = None,
    precision: str | None = None,
) -> dict[str, pd.DataFrame]:
    """The plan of each figure; all figures where no names are given."""
    names = list(names) or list(experiments.FIGURES)
    return {name: experiments.plan(name, profile, data, seeds, precision) for name in names}


def queue(
    names: Iterable[str],
    profile: str,
    data: str | None = None,
    seeds: int | None = None,
    precision: str | None = None,
) -> list[Config]:
    """The runs of figures as they are named, each seed by seed; of all, `experiments.queue`."""
    names = list(names)
    if not names:
        return experiments.queue(profile, data, seeds, precision)
    plans = needed(names, profile, data, seeds, precision)
    return [c for plan in plans.values() for c in plan.sort_values("seed", kind="stable").config]


def figures(
    names: Iterable[str],
    profile: str,
    store: Store,
    data: str | None = None,
    seeds: int | None = None,
    jobs: int | None = None,
    device: str = "auto",
    executor: Executor | None = None,
    precision: str | None = None,
    **options: object,
) -> pd.DataFrame:
    """Do the runs that are missing, then every notebook; returns one row a notebook.

    Columns: figures, seconds, file (the executed notebook, under figures/PROFILE/notebooks/) and
    error (the cell and its error, or None). A notebook that fails keeps what it had done and does
    not stop the others; neither does a run, which `attrs["failed_runs"]` then names. options: of
    `sweep.execute`. Figures with runs that there was no time for are in `attrs["left"]`; their
    notebooks are not executed, which would do them.
    """
    names = list(names)
    plans = needed(names, profile, data, seeds, precision)
    folder = notebooks_path()
    configs = sweep.unique(queue(names, profile, data, seeds, precision))
    failed_runs = None
    try:
        sweep.execute(configs, store, executor, device, jobs, **options)
    except sweep.SweepError as error:
        failed_runs = str(error)
    left: list[str] = []
    if options.get("minutes"):
        undone = {s.run for s in sweep.states(configs, store) if s.state in sweep.TO_RUN}
        left = [name for name, plan in plans.items() if undone.intersection(plan.run)]
    unready = {experiments.figure(name).notebook for name in left}
    by_notebook: dict[str, list[str]] = {}
    for name in plans:
        notebook = experiments.figure(name).notebook
        if notebook not in unready:
            by_notebook.setdefault(notebook, []).append(name)
    out = figures_path() / profile / "notebooks"
    os.environ["PAPERLIB_RUNS"] = str(store.path.absolute())
    parameters = {"profile": profile, "data": data, "seeds": seeds, "precision": precision}
    context = multiprocessing.get_context("spawn")
    rows = []
    workers = min(AT_ONCE, len(by_notebook)) or 1
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_quiet) as pool:
        futures = {
            pool.submit(_execute, folder / f"{n}.ipynb", out / f"{n}.ipynb", parameters): n
            for n in by_notebook
        }
        for future in tqdm(as_completed(futures), "notebooks", len(futures), unit="notebook"):
            shown = ", ".join(by_notebook[futures[future]])
            rows.append({"figures": shown, **future.result()})
    order = list(by_notebook.values())
    rows.sort(key=lambda row: order.index(row["figures"].split(", ")))
    frame = pd.DataFrame(rows, columns=["figures", "seconds", "file", "error"])
    frame.attrs |= {"failed_runs": failed_runs, "left": left}
    return frame


def _quiet() -> None:
    """Keep what kernels write to stderr out of the bar: a notebook holds its own errors."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _execute(notebook: Path, out: Path, parameters: dict) -> dict[str, object]:
    import papermill
    from nbclient.exceptions import DeadKernelError

    out.parent.mkdir(parents=True, exist_ok=True)
    start, error = time.perf_counter(), None
    for attempt in range(TRIES):
        try:
            papermill.execute_notebook(notebook, out, parameters, progress_bar=False)
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


def status(
    names: Iterable[str],
    profile: str,
    store: Store,
    data: str | None = None,
    seeds: int | None = None,
    precision: str | None = None,
) -> pd.DataFrame:
    """One row a figure: its runs, and how many are done, partial, failed, damaged and missing.

    hours: what those not done will take one after the other on this machine, as far as its store
    has measured runs alike; NaN where it holds none. unknown: how many of them that leaves out.
    `attrs["states"]` has the `sweep.State` of every run, by figure.
    """
    plans = needed(names, profile, data, seeds, precision)
    configs = sweep.unique(config for plan in plans.values() for config in plan.config)
    states = {state.run: state for state in sweep.states(configs, store)}
    speeds, rows = costs.speeds(store), []
    by_figure = {name: [states[run] for run in dict.fromkeys(plans[name].run)] for name in plans}
    for name, mine in by_figure.items():
        counts = Counter(state.state for state in mine)
        left = [state for state in mine if state.state != "done"]
        seconds = [speeds.epoch(s.config) * (s.config.epochs - s.epochs) for s in left]
        known = [value for value in seconds if not math.isnan(value)]
        rows.append(
            {"figure": name, "runs": len(mine)}
            | {state: counts[state] for state in sweep.STATES}
            | {
                "hours": sum(known) / 3600 if known or not left else float("nan"),
                "unknown": len(left) - len(known),
            }
        )
    frame = pd.DataFrame(rows)
    frame.attrs["states"] = by_figure
    return frame
