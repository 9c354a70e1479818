"""Every notebook: as committed, and run at profile smoke from one store that all of them share."""

import json
from pathlib import Path

import nbformat
import papermill
import pytest
from filelock import FileLock

from paperlib import experiments, sweep
from paperlib.runs import Store

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
NOTEBOOKS = {str(p.relative_to(ROOT / "notebooks").with_suffix("")): p for p in PATHS}
FIGURES = {figure.notebook for figure in experiments.FIGURES.values()}
SECTIONS = ("Definition", "The paper's answer", "The picture", "The numbers", "What to make of it")
# Of those that take other parameters than a profile and a number of seeds.
PARAMETERS = {name: {"profile": "smoke"} for name in ("index", "claims", "tour")}
PARAMETERS["explore"] = {"profiles": ["smoke"]}


@pytest.fixture(scope="session")
def folder(tmp_path_factory, worker_id) -> Path:
    """A folder that all workers of pytest-xdist share, with one seed of every run, trained once."""
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "notebooks"
    shared.mkdir(exist_ok=True)
    with FileLock(shared / "lock"):
        runs = experiments.queue(experiments.Scale("smoke", seeds=1))
        sweep.collect(runs, Store(shared / "runs"))
    return shared


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, folder, monkeypatch):
    for place in ("runs", "results", "figures"):
        monkeypatch.setenv(f"PAPERLIB_{place.upper()}", str(folder / place))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    out = folder / f"{Path(name).name}.ipynb"
    parameters = PARAMETERS.get(name, {"profile": "smoke", "seeds": 1})
    papermill.execute_notebook(
        NOTEBOOKS[name], out, parameters, cwd=str(folder), progress_bar=False, log_output=False
    )
    executed = nbformat.read(out, as_version=4)
    assert "injected-parameters" in str(executed.cells)
    shown = [output for cell in executed.cells for output in cell.get("outputs", [])]
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    figures = [figure.name for figure in experiments.FIGURES.values() if figure.notebook == name]
    assert len(pictures) >= len(figures)
    for figure in figures:
        assert (folder / f"figures/smoke/{figure}.png").stat().st_size > 5_000
        assert (folder / f"figures/smoke/{figure}.pdf").exists()
    if figures:
        assert all(picture.metadata["image/png"]["alt"] for picture in pictures)


def test_every_figure_has_its_notebook():
    assert FIGURES | {"index", "tour", "claims", "explore", "your-own"} == NOTEBOOKS.keys()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_keeps_to_the_template(name):
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    for cell in code:
        assert "execution" not in cell.metadata  # times of a run
        assert str(ROOT) not in json.dumps(cell.outputs)
        assert all(output.output_type != "error" for output in cell.outputs)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert text.startswith("# ")
    if name in FIGURES:
        for part in (*(f"\n## {section}" for section in SECTIONS), "arxiv.org/abs/", "$"):
            assert part in text
        for cell in code:
            if "plots.save(" in cell.source:
                assert cell.metadata["mystnb"]["image"]["alt"]
