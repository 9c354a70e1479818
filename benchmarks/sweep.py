"""How long many stored runs take to open: `python -m benchmarks.sweep`.

Every record is read and checked. Again: the same store object, as in a notebook whose cell is run
a second time. Names in _cpu: this process's own seconds, whatever else the machine does.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd

from paperlib import experiments, sweep
from paperlib.config import Config
from paperlib.runs import RunRecord, Store

OPEN = """
import json, sys, time
from benchmarks import sweep as bench
from paperlib import sweep
from paperlib.runs import Store
configs, store = bench.configurations(int(sys.argv[2])), Store(sys.argv[1])
seconds = []
for _ in range(2):
    start, work = time.perf_counter(), time.process_time()
    epochs, runs = sweep.collect(configs, store)
    seconds += [time.perf_counter() - start, time.process_time() - work]
assert len(runs) == len(configs)
print(json.dumps([*seconds, len(epochs)]))
"""


def configurations(count: int) -> list[Config]:
    """`count` runs of figures 2 and 5, of as many seeds as that takes."""
    plans = [
        experiments.plan(name, experiments.Scale("paper", seeds=1))
        for name in ("figure-2", "figure-5")
    ]
    settings = sweep.unique(config for plan in plans for config in plan.config).values()
    seeds = range(-(-count // len(settings)))
    return [config.with_(seed=seed) for seed in seeds for config in settings][:count]


def record(config: Config, epochs: int, arrays: bool) -> RunRecord:
    """A record of the usual form with numbers drawn at random."""
    rng = np.random.default_rng(config.seed)
    frame = pd.DataFrame(
        {
            "epoch": np.arange(epochs),
            "trained": True,
            "learning_rate": config.learning_rate,
            "train_loss": rng.random(epochs),
            "train_accuracy": 100 * rng.random(epochs),
            "test_loss": rng.random(epochs),
            "pre": 100 * rng.random(epochs),
            "post": 100 * rng.random(epochs),
            "removed": rng.integers(0, 9, epochs),
            "seconds": rng.random(epochs),
        }
    )
    measured = {"eigenvalues": rng.standard_normal(100), "losses": rng.random((10, 81))}
    about = {"device": "cpu", "parameters": 10**6, "held": 1000, "finished": "2026-01-01T00:00:00Z"}
    return RunRecord(config, frame, measured if arrays else {}, about)


def compare(count: int, epochs: int) -> dict[str, float]:
    """Seconds to open `count` runs of `epochs` epochs, a tenth of them with arrays."""
    folder = Path(tempfile.mkdtemp(prefix="paperlib-bench-"))
    try:
        store = Store(folder / "runs", folder / "none")
        start = time.perf_counter()
        with mock.patch("os.fsync"):
            for i, config in enumerate(configurations(count)):
                store.write(record(config, epochs, arrays=i % 10 == 0))
        written = time.perf_counter() - start
        command = [sys.executable, "-c", OPEN, str(store.path), str(count)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        first, first_cpu, again, again_cpu, lines = json.loads(done.stdout)
        return {
            "runs": count,
            "epochs": lines,
            "write": written,
            "first": first,
            "first_cpu": first_cpu,
            "again": again,
            "again_cpu": again_cpu,
        }
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()
    print(pd.Series(compare(options.runs, options.epochs)).round(2).to_string())


if __name__ == "__main__":
    main()
