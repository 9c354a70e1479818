"""Notebooks in batch: by this interpreter, and written back the same each time."""

import json
import sys

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook

from paperlib.sweep import notebooks
from tools.notebooks import rewrite

CELLS = [
    "import sys\nprofile = None",
    "from matplotlib import pyplot as plt",
    "print(sys.executable)\nprint('first', flush=True)\nprint('a warning', file=sys.stderr)",
    "%matplotlib inline\nplt.plot([1, 2]);\nprofile",
]


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """A notebook, where the kernel that is called python3 is broken."""
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    content = {"argv": ["/no/such/python"], "display_name": "Python 3", "language": "python"}
    spec.write_text(json.dumps(content))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    cells = [new_code_cell(source, id=f"cell{i}") for i, source in enumerate(CELLS)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = tmp_path / "one.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def test_notebooks_are_written_back_the_same(notebook):
    rewrite(notebook)
    once = notebook.read_bytes()
    written = nbformat.read(notebook, as_version=4)
    assert [cell.id for cell in written.cells] == [f"cell{i}" for i in range(4)]
    assert [cell.execution_count for cell in written.cells] == [1, 2, 3, 4]
    assert written.cells[2].outputs[0].text == f"{sys.executable}\nfirst\n"
    assert not any("execution" in cell.metadata for cell in written.cells)
    assert b'"name": "stderr"' not in once
    rewrite(notebook)
    assert notebook.read_bytes() == once


def test_a_cell_that_fails_is_told_and_nothing_written(notebook):
    content = nbformat.read(notebook, as_version=4)
    content.cells[1].source = "1 / 0"
    nbformat.write(content, notebook)
    before = notebook.read_bytes()
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        rewrite(notebook)
    assert notebook.read_bytes() == before


def test_papermill_runs_this_interpreter(notebook, tmp_path):
    out = tmp_path / "out" / "one.ipynb"
    row = notebooks.execute(notebook, out, {"profile": "smoke"})
    assert row["error"] is None
    written = nbformat.read(out, as_version=4)
    assert "'smoke'" in [o.data["text/plain"] for o in written.cells[-1].outputs if "data" in o]
    assert sys.executable in written.cells[3].outputs[0].text
