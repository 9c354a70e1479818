"""The website's own extensions: files and provenance, docstrings in plain English."""

import importlib.util
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

pytest.importorskip("sphinx", reason="no Sphinx: pip install 'paperlib[site]'")

ROOT = Path(__file__).parents[1]


def extension(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/_ext/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path):
    """A checkout with figures of a notebook that draws two, at one profile."""
    folder = tmp_path / "figures/small"
    folder.mkdir(parents=True)
    for name, words in (("figure-E1", "profile small, 10 seeds"), ("figure-E2", "")):
        figure = plt.figure(figsize=(1, 1))
        figure.savefig(folder / f"{name}.png", metadata={"Description": words} if words else {})
        figure.savefig(folder / f"{name}.pdf")
        plt.close(figure)
    (folder / "figure-E2.csv").write_text("a\n1\n")
    (folder / "figure-1.png").write_bytes(b"another notebook's")
    return tmp_path


@pytest.mark.parametrize(
    ("notebook", "files"),
    [("tour", []), ("tradeoff-2020/figure-E", ["E1.png", "E1.pdf", "E2.png", "E2.pdf", "E2.csv"])],
)
def test_a_notebook_offers_itself_and_the_files_of_its_figures(notebook, files, root):
    text = extension("provenance").section(f"notebooks/{notebook}", root)
    figures = [f"figures/small/figure-{name}" for name in files]
    assert re.findall("</(.+?)>", text) == [f"notebooks/{notebook}.ipynb", *figures]
    assert ("profile small, 10 seeds" in text) == bool(figures)


@pytest.mark.parametrize(
    "line",
    [
        "the residual |Hv - av| of each pair",
        "submit(function, *args, **kwargs)",
        "an item * 2 and a | b, `*args` and ``a | *b``, 3*4",
        ">>> print(*values, a|b)",
    ],
)
def test_plain_docstrings_read_as_they_are_written(line):
    from docutils.core import publish_doctree

    escape = extension("plain_docstrings").escape
    document = publish_doctree(escape(line), settings_overrides={"report_level": 5})
    assert "problematic" not in document.pformat()
    assert document.astext() == re.sub("`+", "", line)


def test_an_indented_block_of_a_docstring_keeps_its_lines():
    from docutils.core import publish_doctree
    from docutils.nodes import literal_block

    table = "done    whether *all* is\n        there\n\nruns    |n|"
    text = "Columns:\n\n" + re.sub("^(?=.)", "    ", table, flags=re.M) + "\n\nArgs:\n    x: *y.\n"
    lines = extension("plain_docstrings").plain(text.splitlines())
    [block] = publish_doctree("\n".join(lines)).findall(literal_block)
    assert block.astext() == table
