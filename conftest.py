"""For every test, notebooks too: the smallest profile, and a run store and figures of its own."""

import os
import tempfile


def pytest_configure(config):
    folder = tempfile.TemporaryDirectory(prefix="paperlib-tests-")
    config.add_cleanup(folder.cleanup)
    os.environ.setdefault("PAPERLIB_PROFILE", "smoke")
    os.environ.setdefault("PAPERLIB_RUNS", f"{folder.name}/runs")
    os.environ.setdefault("PAPERLIB_FIGURES", f"{folder.name}/figures")
