"""A named function that changes: on disk, or in the memory of one process."""

import hashlib
import importlib
import subprocess
import sys

import pytest

from paperlib import training
from paperlib.config import FilterPruning
from paperlib.runs import Mismatch, Store
from paperlib.store.code import code_checksum, source_checksum
from tests import small

SCORE = """
import functools
import torch

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

class Net(torch.nn.Module):
    def last(self, classes):
        return torch.nn.Linear(4, classes)
"""
EDITS = {  # by what is edited: what uses it, and the edit
    "the score": ("score", "sum((1", "amax((1"),
    "what it uses": ("score", "abs()", "square()"),
    "a decorator": ("decorated", "2 * function", "3 * function"),
    "a method": ("Net", "Linear(4, classes)", "Linear(4, classes, False)"),
    "a constant": (None, "POWER = 2", "POWER = 3"),
}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module and return its path."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # written twice within a second
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "edited_module.py"
    path.write_text(SCORE)
    yield path
    sys.modules.pop(path.stem, None)


@pytest.mark.parametrize(("user", "old", "new"), EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("first_look", ["before the edit", "after the edit"])
def test_an_edited_file_is_another_code_and_old_memory_is_refused(
    module, user, old, new, first_look
):
    specs = [f"{module.stem}:{name}" for name in ("score", "decorated", "Net")]
    before = hashlib.sha256(SCORE.encode()).hexdigest()
    assert {source_checksum(spec) for spec in specs} == {before}  # not imported yet
    loaded = importlib.import_module(module.stem)
    if first_look == "before the edit":
        assert {source_checksum(spec) for spec in specs} == {before}
    else:  # what is only a value is not compared then
        specs = [f"{module.stem}:{user}"] if user else []
    module.write_text(SCORE.replace(old, new))
    for spec in specs:
        with pytest.raises(ValueError, match=str(module)):
            source_checksum(spec)
    importlib.reload(loaded)
    after = hashlib.sha256(module.read_bytes()).hexdigest()
    assert {source_checksum(f"{module.stem}:{name}") for name in ("score", "Net")} == {after}


@pytest.mark.parametrize("cell", ["score = lambda conv: 7", "size = lambda x: 7", "score = max"])
def test_a_function_that_is_replaced_in_memory(module, cell):
    loaded = importlib.import_module(module.stem)
    exec(compile(cell, "<cell>", "exec"), vars(loaded))
    with pytest.raises(ValueError, match=f"{module.stem}:score"):
        source_checksum(f"{module.stem}:score")


def test_runs_of_a_function_that_is_edited(module, tmp_path):
    """In one process: the record of one is never that of the other, nor kept under its name."""
    pruning = FilterPruning((0.5, 0.5), ((0,), (0,)), score=f"{module.stem}:score")
    config, store = small.VGG.with_(epochs=2, pruning=pruning), Store(tmp_path / "runs")
    first = training.run(config, store, "cpu")
    module.write_text(SCORE.replace("abs()", "square()"))
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


def checksums(*cells: str) -> list[str]:
    """Return the checksum of f of a notebook after each cell, or "refused"."""
    code = """
import sys
from IPython.core.interactiveshell import InteractiveShell
from paperlib.store.code import source_checksum
shell = InteractiveShell.instance()
for cell in sys.argv[1:]:
    shell.run_cell(cell)
    try:
        print(source_checksum("__main__:f"))
    except ValueError as error:
        print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code, *cells], capture_output=True, text=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("cell", "change"),
    [
        ("def f(c): return 1\n", "def f(c): return 2\n"),
        ("def g(c): return 1\ndef f(c): return g(c)\n", "def g(c): return 2\n"),
        ("K = 1\ndef f(c): return [c.K + K for _ in c]\n", "K = 2\n"),
        ("g = lambda c: 1\ndef f(c): return g(c)\n", "g = lambda c: 2\n"),
        ("class f:\n def g(s): return 1\n", "class f:\n def g(s): return 2\n"),
        # What a function holds beside its code: defaults, variables around it, attributes.
        ("K = 1\ndef f(c, k=K): return k\n", "K = 2\ndef f(c, k=K): return k\n"),
        ("K = 1\ndef f(c, *, k=K): return k\n", "K = 2\ndef f(c, *, k=K): return k\n"),
        ("def g(k):\n def h(c): return k\n return h\nf = g(1)\n", "f = g(2)\n"),
        ("class g: K = 1\nclass f(g):\n def h(s): return super().K\n", "g.K = 2\n"),
        tuple(f"class f:\n @property\n def g(s): return {n}\n" for n in (1, 2)),
    ],
)
def test_a_function_of_a_notebook_is_another_where_what_it_uses_is_redefined(cell, change):
    first, second, again = checksums(cell, change, cell)
    assert first == again != second
    if "g" not in cell and "K" not in cell:
        assert first == hashlib.sha256(cell.encode()).hexdigest()


def test_what_nothing_can_check_is_refused():
    tensor = "import torch\nK = torch.ones(3)\ndef f(c):\n    return c * K\n"
    default = "import torch\ndef f(c, k=torch.ones(3)):\n    return c * k\n"
    cells = [tensor, default, "exec('def f(c): return 1')", "from math import sqrt as f", "f = 3"]
    assert checksums(*cells) == ["refused"] * 5


def test_code_whose_file_is_not_there_is_refused(module):
    importlib.import_module(module.stem)
    module.unlink()
    with pytest.raises(ValueError, match=str(module)):
        source_checksum(f"{module.stem}:score")
    lines = "from paperlib.store.code import source_checksum\ndef f(c): pass\nsource_checksum"
    script = f"{lines}('__main__:f')\n"
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("ValueError: __main__:f")


@pytest.mark.parametrize("spec", ["vgg11_bn", "no_such_module:f", "paperlib.models:nope"])
def test_names_of_nothing_have_no_checksum(spec):
    assert source_checksum(spec) is None
