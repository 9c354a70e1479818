"""The folders of runs, results, figures and data. `~` is the home folder in all of them."""

import os
from pathlib import Path


def default_path() -> Path:
    """Return PAPERLIB_RUNS, or `runs` in the checkout.

    The checkout is the one around the working directory. Outside a checkout it is the working
    directory itself.
    """
    return _beside_notebooks("PAPERLIB_RUNS", "runs")


def figures_path() -> Path:
    """Return PAPERLIB_FIGURES, or `figures` in the checkout, as for `default_path`."""
    return _beside_notebooks("PAPERLIB_FIGURES", "figures")


def results_path() -> Path | None:
    """Return PAPERLIB_RESULTS, or `results` in the checkout or beside the package, or None."""
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
    """Return the folders that may hold data: `root` and PAPERLIB_DATA.

    Files are written to the first one. Without either it is `data` in the default run store.
    """
    places = [place for place in (root, os.environ.get("PAPERLIB_DATA")) if place]
    return list(dict.fromkeys(Path(p).expanduser() for p in places or [default_path() / "data"]))
