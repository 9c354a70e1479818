"""Every notebook runs, at profile smoke, from one store that all of them share."""

import json
from pathlib import Path

import nbformat
import papermill
import pytest
from filelock import FileLock

from paperlib import experiments, sweep
from paperlib.runs import Store

ROOT = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = {str(p.relative_to(ROOT).with_suffix("")): p for p in sorted(ROOT.rglob("*.ipynb"))}
FIGURES = {figure.notebook: figure for figure in experiments.FIGURES.values()}
SECTIONS = ("Definition", "The paper's answer", "The picture", "The numbers", "What to make of it")
ONE_SEED = {"profile": "smoke", "seeds": 1}
# Those that take other parameters.
PARAMETERS = {
    "index": {"profile": "smoke"},
    "claims": {"profile": "smoke"},
    "explore": {"profiles": ["smoke"]},
    "tour": {"profile": "smoke"},
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory, worker_id) -> Path:
    """A folder that all workers of pytest-xdist share, with one seed of every run, trained once."""
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "notebooks"
    shared.mkdir(exist_ok=True)
    with FileLock(shared / "lock"):
        sweep.collect(
            experiments.queue(experiments.Scale("smoke", seeds=1)), Store(shared / "runs")
        )
    return shared


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, folder, monkeypatch):
    monkeypatch.setenv("PAPERLIB_RUNS", str(folder / "runs"))
    monkeypatch.setenv("PAPERLIB_RESULTS", str(folder / "results"))
    monkeypatch.setenv("PAPERLIB_FIGURES", str(folder / "figures"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT.parent))
    out = folder / f"{Path(name).name}.ipynb"
    parameters = PARAMETERS.get(name, ONE_SEED)
    papermill.execute_notebook(
        NOTEBOOKS[name], out, parameters, cwd=str(folder), progress_bar=False, log_output=False
    )
    executed = nbformat.read(out, as_version=4)
    assert "injected-parameters" in str(executed.cells)
    shown = [
        output for cell in executed.cells for output in cell.get("outputs", []) if "data" in output
    ]
    pictures = [output for output in shown if "image/png" in output.data]
    figures = [figure.name for figure in experiments.FIGURES.values() if figure.notebook == name]
    assert len(pictures) >= len(figures)
    for figure in figures:
        assert (folder / f"figures/smoke/{figure}.png").stat().st_size > 5_000
        assert (folder / f"figures/smoke/{figure}.pdf").exists()
    if figures:
        assert all(picture.metadata["image/png"]["alt"] for picture in pictures)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_keeps_to_the_template(name):
    content = json.loads(NOTEBOOKS[name].read_text())
    cells = [("".join(c["source"]), c) for c in content["cells"]]
    code = [(source, c) for source, c in cells if c["cell_type"] == "code"]
    assert len({c["id"] for _, c in cells}) == len(cells)
    headings = [source.partition("\n")[0] for source, _ in cells if source.startswith("#")]
    assert headings[0].startswith("# ")
    if name not in FIGURES:
        return
    for section in SECTIONS:
        assert any(heading.startswith(f"## {section}") for heading in headings), section
    text = "\n".join(source for source, c in cells if c["cell_type"] == "markdown")
    assert "arxiv.org/abs/" in text
    assert "$$" in text or "$" in text
    for source, cell in code:
        if "plots.save(" in source:
            assert cell["metadata"]["mystnb"]["image"]["alt"]
