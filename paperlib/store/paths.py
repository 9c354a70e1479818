"""The folders of runs, results, figures and data. `~` is the home folder in all of them."""

import os
from pathlib import Path


def default_path() -> Path:
    """Return PAPERLIB_RUNS, or `runs` in the checkout around the working directory, or in that."""
    return _beside_notebooks("PAPERLIB_RUNS", "runs")


def figures_path() -> Path:
    """Return PAPERLIB_FIGURES, or `figures` in the checkout around the working directory."""
    return _beside_notebooks("PAPERLIB_FIGURES", "figures")


def results_path() -> Path | None:
    """Return PAPERLIB_RESULTS, or `results` in the checkout, or the package's; None without."""
    beside = _beside_notebooks("PAPERLIB_RESULTS", "results")
    if os.environ.get("PAPERLIB_RESULTS"):
        return beside
    there = [path for path in (beside, Path(__file__).parents[2] / "results") if path.is_dir()]
    return there[0] if there else None


def _beside_notebooks(variable: str, name: str) -> Path:
    if os.environ.get(variable):
        return Path(os.environ[variable]).expanduser()
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "notebooks").is_dir() and (folder / "paperlib").is_dir():
            return folder / name
    return here / name


def data_folders(root: str | os.PathLike | None = None) -> list[Path]:
    """Return the folders that may hold data, the one to write to first: `root`, PAPERLIB_DATA.

    Without either it is `data` in the run store.
    """
    places = [place for place in (root, os.environ.get("PAPERLIB_DATA")) if place]
    return list(dict.fromkeys(Path(p).expanduser() for p in places or [default_path() / "data"]))
