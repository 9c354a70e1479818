"""A named function that changes: on disk, or in the memory of one process."""

import hashlib
import importlib
import subprocess
import sys

import pytest
import torch

from paperlib import training
from paperlib.config import Config, FilterPruning
from paperlib.runs import Mismatch, Store
from paperlib.store.code import code_checksum, source_checksum

SCORE = """
import functools
import torch
from torch import nn

POWER = 2

def size(weight):
    return weight.abs() ** POWER

def twice(function):
    @functools.wraps(function)
    def doubled(conv):
        return 2 * function(conv)
    return doubled

@torch.no_grad()
def score(conv):
    return size(conv.weight).sum((1, 2, 3))

decorated = twice(score)

class Net(nn.Sequential):
    def __init__(self, num_classes, in_channels):
        super().__init__(nn.Conv2d(in_channels, 4, 3), nn.ReLU(), self.last(num_classes))
    def last(self, classes):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))
"""
NAMED = ("score", "decorated", "Net")
EDITS = {
    "score": ("sum((1", "amax((1"),
    "what it uses": ("abs()", "square()"),
    "a decorator": ("2 * function", "3 * function"),
    "a method": ("Linear(4, classes)", "Linear(4, classes, False)"),
    "a constant": ("POWER = 2", "POWER = 3"),
}
TINY = Config(data="digits", width=0.1, epochs=2, train_per_class=4, test_per_class=4)


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """Write a module of the source given, and return its path."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # written twice within a second
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "edited_module.py"
    path.write_text(SCORE)
    yield path
    sys.modules.pop(path.stem, None)


def named(score: str) -> Config:
    return TINY.with_(pruning=FilterPruning((0.5, 0.5), ((0,), (0,)), score=score))


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_file_is_another_code_and_stale_memory_is_refused(module, edit):
    """The file is edited before its module is imported, after it, and it is loaded again."""
    before = {name: source_checksum(f"{module.stem}:{name}") for name in NAMED}
    assert set(before.values()) == {hashlib.sha256(SCORE.encode()).hexdigest()}
    loaded = importlib.import_module(module.stem)
    assert {name: source_checksum(f"{module.stem}:{name}") for name in NAMED} == before
    module.write_text(SCORE.replace(*EDITS[edit]))
    for name in NAMED:
        with pytest.raises(ValueError, match=str(module)):
            source_checksum(f"{module.stem}:{name}")
    importlib.reload(loaded)
    after = hashlib.sha256(module.read_bytes()).hexdigest()
    assert {source_checksum(f"{module.stem}:{name}") for name in NAMED} == {after}


@pytest.mark.parametrize(("edit", "name"), [*zip(EDITS, ("score", "score", "decorated", "Net"))])
def test_memory_is_compared_with_the_file_at_the_first_look(module, edit, name):
    importlib.import_module(module.stem)
    module.write_text(SCORE.replace(*EDITS[edit]))
    with pytest.raises(ValueError, match=str(module)):
        source_checksum(f"{module.stem}:{name}")


@pytest.mark.parametrize("cell", ["score = lambda conv: 7", "size = lambda x: 7", "score = max"])
def test_a_function_that_is_replaced_in_memory(module, cell):
    loaded = importlib.import_module(module.stem)
    exec(compile(cell, "<cell>", "exec"), vars(loaded))
    with pytest.raises(ValueError, match=f"{module.stem}:score"):
        source_checksum(f"{module.stem}:score")


def test_runs_of_a_function_that_is_edited(module, tmp_path):
    """In one process: the record of one is never that of the other, nor kept under its name."""
    config, store = named(f"{module.stem}:score"), Store(tmp_path / "runs")
    first = training.run(config, store, "cpu")
    module.write_text(SCORE.replace(*EDITS["score"]))
    with pytest.raises(Mismatch, match="reload"):
        training.run(config, store, "cpu")
    with pytest.raises(ValueError, match="reload"):  # nothing is trained and kept
        training.run(config, Store(tmp_path / "new"), "cpu")
    assert not Store(tmp_path / "new").identities()
    importlib.reload(sys.modules[module.stem])
    with pytest.raises(Mismatch, match=first.provenance["source"]):
        training.run(config, store, "cpu")
    second = training.run(config, Store(tmp_path / "new"), "cpu")
    assert second.provenance["source"] == code_checksum(config) != first.provenance["source"]
    module.write_text(SCORE)
    importlib.reload(sys.modules[module.stem])
    assert training.run(config, store, "cpu").provenance == first.provenance


CELLS = """
from IPython.core.interactiveshell import InteractiveShell
from paperlib.store.code import source_checksum
shell = InteractiveShell.instance()
for cell in {cells!r}:
    shell.run_cell(cell)
    try:
        print(source_checksum("__main__:f"))
    except ValueError as error:
        print("refused")
"""


@pytest.mark.parametrize(
    "cells",
    [
        ["def f(c):\n    return 1\n", "def f(c):\n    return 2\n", "def f(c):\n    return 1\n"],
        ["def g(c):\n    return 1\ndef f(c):\n    return g(c)\n", "def g(c):\n    return 2\n"],
        ["K = 1\ndef f(c):\n    return [c.K + K for _ in c]\n", "K = 2\n", "K = 1\n"],
        [
            "class f:\n    def g(s):\n        return 1\n",
            "class f:\n    def g(s):\n        return 2\n",
        ],
        ["g = lambda c: 1\ndef f(c):\n    return g(c)\n", "g = lambda c: 2\n"],
    ],
)
def test_functions_of_a_notebook(cells):
    """Redefined in a later cell, alone or in what they use, they are others."""
    done = subprocess.run(
        [sys.executable, "-c", CELLS.format(cells=cells)], capture_output=True, text=True
    )
    first, second, *again = done.stdout.split()
    assert len({first, second}) == 2
    assert again in ([], [first])
    if cells[0] == "def f(c):\n    return 1\n":
        assert first == hashlib.sha256(cells[0].encode()).hexdigest()


def test_what_a_notebook_uses_and_nothing_can_check_is_refused():
    cells = ["import torch\nK = torch.ones(3)\ndef f(c):\n    return c * K\n"]
    cells += ["exec('def f(c): return 1')", "from math import sqrt as f", "f = 3"]
    done = subprocess.run(
        [sys.executable, "-c", CELLS.format(cells=cells)], capture_output=True, text=True
    )
    assert done.stdout.split() == ["refused"] * len(cells), done.stderr


@pytest.mark.parametrize("spec", ["vgg11_bn", "no_such_module:f", "paperlib.models:nope"])
def test_names_of_nothing_have_no_checksum(spec):
    assert source_checksum(spec) is None
