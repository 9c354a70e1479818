"""Sweeps that are killed: `python -m benchmarks.faults [--kills 50]`.

A sweep in processes of its own is killed with -9 at random moments, the whole group, its workers
only or its parent only, and begun again, until it has been killed so often. The frame must then
equal that of a sweep never stopped, number by number. Checkpoints are written after every epoch, so
that the short runs of the tests have some.

And the overhead: what a run takes in a sweep above the seconds its epochs took.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil

from benchmarks.sweep import record
from paperlib import experiments, sweep
from paperlib.config import Config
from paperlib.runs import Store

SWEEP = """
import sys
from benchmarks import faults
from paperlib import sweep
from paperlib.store import checkpoints
from paperlib.runs import Store
checkpoints.SECONDS, checkpoints.SHARE = 0.0, 1e9
if __name__ == "__main__":
    sweep.collect(faults.configurations(), Store(sys.argv[1]), jobs=2, retry_failed=True)
"""


def configurations() -> list[Config]:
    """The runs of figures 1 and R1 in the smallest profile."""
    plans = [experiments.plan(name, "smoke") for name in ("figure-1", "figure-R1")]
    return list(sweep.unique(config for plan in plans for config in plan.config).values())


def begin(script: Path, store: Path) -> subprocess.Popen:
    """Start the sweep in a session of its own."""
    command = [sys.executable, str(script), str(store)]
    path = os.pathsep.join([str(script.parent), str(Path(__file__).parents[1])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.DEVNULL, env=environment
    )


def trains(store: Path, since: float) -> bool:
    """Whether a run was claimed since then."""
    for path in store.glob("claims/*.lease"):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime > since:
                return True
    return False


def strike(process: subprocess.Popen, whom: str) -> bool:
    """Kill -9 the parent, a worker, or all; returns whether there was anybody to kill."""
    try:
        parent = psutil.Process(process.pid)
        children = parent.children(recursive=True)
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    except psutil.NoSuchProcess:  # or a zombie
        return False
    if whom == "worker" and not workers:
        return False
    targets = {"all": [parent, *children], "parent": [parent], "worker": workers[:1]}[whom]
    for target in targets:
        try:
            target.kill()
        except psutil.NoSuchProcess:
            return False
    return True


def kills(count: int, longest: float, seed: int = 0) -> dict[str, object]:
    """Kill a sweep `count` times, each up to `longest` seconds after it has begun to train."""
    chance = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="paperlib-faults-"))
    script = folder / "killed_sweep.py"
    script.write_text(SWEEP)
    try:
        expected = sweep.collect(configurations(), Store(folder / "unbroken"), jobs=2)
        struck, resumed, rounds, path = 0, 0, 0, folder / "killed"
        process, begun = begin(script, path), time.time()
        while struck < count:
            if process.poll() is not None:
                rounds += process.returncode == 0
                if process.returncode == 0:  # all done: once more from nothing
                    resumed += compare(path, expected)
                    shutil.rmtree(path)
                process, begun = begin(script, path), time.time()
            while process.poll() is None and not trains(path, begun):
                time.sleep(0.05)
            time.sleep(chance.uniform(0, longest))
            struck += strike(process, chance.choice(["all", "worker", "parent"]))
        if process.poll() is None:
            process.wait()
        while process.returncode != 0:
            process = begin(script, path)
            process.wait()
        resumed += compare(path, expected)
        return {"kills": struck, "sweeps ended": rounds + 1, "runs resumed": resumed}
    finally:
        shutil.rmtree(folder)


def compare(path: Path, expected: tuple[pd.DataFrame, pd.DataFrame]) -> int:
    """Fail unless the frames are equal, bit for bit; returns how many runs were resumed."""
    store = Store(path)
    assert not store.failures(), store.failures()
    runs = list(sweep.unique(configurations()))
    for frame, other in zip(store.frames(runs), expected, strict=True):
        pd.testing.assert_frame_equal(
            frame.drop(columns="seconds"), other.drop(columns="seconds"), check_exact=True
        )
    return sum("resumed" in store.read(run).provenance for run in runs)


def overhead(count: int = 20) -> dict[str, float]:
    """Seconds per run that are not training, in one process, its start counted apart."""
    settings = configurations()
    configs = [config.with_(seed=seed) for seed in range(100) for config in settings][:count]
    configs = list(sweep.unique(configs).values())
    folder = Path(tempfile.mkdtemp(prefix="paperlib-faults-"))
    try:
        store = Store(folder)
        seconds, trained = {}, {}
        for name, part in {"first": configs[:1], "all": configs}.items():
            start = time.perf_counter()
            _, runs = sweep.collect(part, Store(folder / name), jobs=1)
            seconds[name], trained[name] = time.perf_counter() - start, runs.seconds.sum()
        start = time.perf_counter()
        for config in configs:
            store.write(record(config, config.epochs, arrays=True))
        written = (time.perf_counter() - start) / len(configs)
        begin = seconds["first"] - trained["first"]
        rest = seconds["all"] - trained["all"] - begin
        return {
            "runs": len(configs),
            "start of a process": begin,
            "training a run": trained["all"] / len(configs),
            "not training, a run": rest / (len(configs) - 1),
            "of it writing a record": written,
        }
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--longest", type=float, default=6.0, help="seconds until a kill")
    options = parser.parse_args()
    print(pd.Series(overhead()).round(3).to_string(), flush=True)
    print(json.dumps(kills(options.kills, options.longest)))


if __name__ == "__main__":
    main()
