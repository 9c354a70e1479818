"""The examples in docstrings."""

import doctest
import importlib
from pathlib import Path

import pytest

import paperlib

ROOT = Path(paperlib.__file__).parent
NAMES = sorted(
    ".".join(("paperlib", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for file in ROOT.rglob("*.py")
    if ">>>" in file.read_text()
)


@pytest.mark.parametrize("name", NAMES)
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert result.attempted > 0
