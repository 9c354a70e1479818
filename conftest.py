"""For every test, notebooks too: the smallest profile, and a run store and figures of its own."""

import os
import signal
import tempfile


def pytest_configure(config):
    # A job in the background inherits that Ctrl-C is ignored; here it is to be what it is usually.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = tempfile.TemporaryDirectory(prefix="paperlib-tests-")
    config.add_cleanup(folder.cleanup)
    os.environ.setdefault("PAPERLIB_PROFILE", "smoke")
    os.environ.setdefault("PAPERLIB_RUNS", f"{folder.name}/runs")
    os.environ.setdefault("PAPERLIB_FIGURES", f"{folder.name}/figures")
    os.environ.setdefault("PAPERLIB_RESULTS", f"{folder.name}/results")


def pytest_collection_modifyitems(items):
    """nbval takes an output without a count for one of a cell never run; stripping takes counts."""
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is not None and cell.get("outputs") and cell.get("execution_count") is None:
            cell["execution_count"] = 1
