"""For every test, notebooks too: the smallest profile, and a run store and figures of its own."""

import os
import signal
import tempfile

import pytest


@pytest.fixture
def store(tmp_path):
    """Return an empty run store, with no results below it."""
    from paperlib.runs import Store

    return Store(tmp_path / "runs", tmp_path / "results")


def pytest_configure(config):
    """Let Ctrl-C do what it usually does; a job in the background inherits that it is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = tempfile.TemporaryDirectory(prefix="paperlib-tests-")
    config.add_cleanup(folder.cleanup)
    os.environ.setdefault("PAPERLIB_PROFILE", "smoke")
    os.environ.setdefault("PAPERLIB_RUNS", f"{folder.name}/runs")
    os.environ.setdefault("PAPERLIB_FIGURES", f"{folder.name}/figures")
    os.environ.setdefault("PAPERLIB_RESULTS", f"{folder.name}/results")


def pytest_collection_modifyitems(items):
    """Give outputs a count: nbval takes a cell without one for a cell that was never run."""
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is not None and cell.get("outputs") and cell.get("execution_count") is None:
            cell["execution_count"] = 1
