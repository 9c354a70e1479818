"""Training on a GPU: `python -m benchmarks.gpu`, some minutes.

    python -m benchmarks.gpu --data images:cifar10-jpeg.tar.xz
    python -m benchmarks.gpu --device cpu --tiny          # all of its logic, as the tests run it

Whole epochs of the ordinary loop, of the plain and of the captured one; several runs at a time, and
the minutes that the runs of VGG11 in figure 2 would take. Rows are printed, and written as JSON, as
they come, so that a stop loses no row.
"""

import argparse
import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import machine, training
from benchmarks.training import OrdinaryLoop, OurLoop, setting
from paperlib import data
from paperlib.config import Config
from paperlib.extras.fast.together import by_turns
from paperlib.extras.fast.turns import Turns
from paperlib.runs import RunRecord, Store
from paperlib.training import Callback

RUNS, EPOCHS = 60, 325  # of VGG11 in figure 2: six settings, ten seeds
CIFAR = 50_000, 10_000  # images


def epochs(options: argparse.Namespace) -> Iterator[dict]:
    """Whole epochs, in images a second; x: times the ordinary loop."""
    device, dataset = torch.device(options.device), data.load(options.data)
    train = dataset.train_images, dataset.train_labels
    halves = train, (dataset.test_images, dataset.test_labels)
    for name in options.networks:
        usual = 0.0
        ways = [("ordinary", "float32")]
        ways += [(way, p) for p in training.precisions(device) for way in ("plain", "captured")]
        for way, precision in ways:
            config = setting(name, width=options.width, precision=precision)
            make = OrdinaryLoop if way == "ordinary" else OurLoop
            with mock.patch.dict(os.environ, PAPERLIB_PLAIN=str(int(way == "plain"))):
                loop = make(config, *halves, device)
            laps = [training.lap(loop) for _ in range(2 + options.rounds)]  # two of them warm up
            rate = len(train[1]) / min(laps[2:])
            usual = usual or rate
            row = {"network": name, "loop": way, "precision": precision}
            row |= {"images a second": rate, "x": rate / usual}
            row["TFLOP/s"] = training.step_flops(config) * rate / 1e12
            yield row | {"peak GiB": machine.peak_gib(options.device)}


def together(options: argparse.Namespace) -> Iterator[dict]:
    """Runs that share the device, in images a second of all; and the minutes of figure 2's VGG11.

    The first two epochs warm up and capture graphs, and do not count.
    """
    images = len(data.load(options.data).train_labels)
    for precision in training.precisions(torch.device(options.device)):
        config = setting("vgg11_bn", width=options.width, precision=precision, data=options.data)
        for count in options.counts:
            configs = [
                training.with_events(config, 1, 2 + options.rounds).with_(seed=seed)
                for seed in range(count)
            ]
            row = {"precision": precision, "runs": count}
            try:
                rate = images * epochs_a_second(configs, options.device)
            except torch.OutOfMemoryError:
                yield row | {"note": "out of memory"}
                continue
            minutes = -(-RUNS // count) * count * EPOCHS * images / rate / 60
            yield row | {"images a second": rate, f"minutes of {RUNS} runs": minutes}


def epochs_a_second(configs: list[Config], device: str) -> float:
    """Return the epochs a second of runs that share a device, while all are at work."""
    ends: list[list[float]] = [[] for _ in configs]
    notes = [lambda moment, i=i: ends[i].append(time.perf_counter()) for i in range(len(configs))]
    for record in run_together(configs, None, device, notes, fast=True):
        if isinstance(record, Exception):
            raise record
    if max(times[1] for times in ends) >= min(times[-1] for times in ends):
        raise torch.OutOfMemoryError("some runs found no memory beside the others")
    return sum((len(times) - 2) / (times[-1] - times[1]) for times in ends)


def run_together(
    configs: Sequence[Config],
    store: Store | None = None,
    device: str = "cpu",
    callbacks: Iterable[Callback | None] | None = None,
    *,
    at_once: int | None = None,
    **options: Any,
) -> list[RunRecord | Exception]:
    """Do runs in the order given, `at_once` of them at a time; see `together.by_turns`."""
    callbacks = [None] * len(configs) if callbacks is None else callbacks
    waiting = deque(enumerate(zip(configs, callbacks, strict=True)))
    at_once = at_once or len(configs)
    alone = min(at_once, len(configs)) == 1
    results: dict[int, RunRecord | Exception] = {}
    with closing(Turns[int]()) as turns:
        while waiting or turns:
            while waiting and len(turns) < at_once:
                i, (config, note) = waiting.popleft()
                turns.add(i, by_turns(config, store, device, note, alone=alone, **options))
            for i, worked, result in turns.turn():
                if not worked:
                    raise result
                results[i] = result
    return [results[i] for i in range(len(configs))]


PARTS = {part.__name__: part for part in (epochs, together)}


def main(argv: list[str] | None = None) -> dict:
    """Measure, print and return everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--networks", nargs="+", default=list(training.SETTINGS))
    parser.add_argument("--counts", nargs="+", type=int, default=(1, 2, 4, 8))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--data", help="what data.load takes; default: random images like CIFAR's")
    parser.add_argument("--tiny", action="store_true", help="very small, to see that it works")
    parser.add_argument("--out", type=Path, default=Path("build/gpu.json"))
    options = parser.parse_args(argv)
    if options.tiny:
        options.width, options.counts, options.networks = 1 / 16, (1, 2), ["conv4"]
    results: dict = {"machine": machine.machine(options.device)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    written = training.written_images(*((160, 80) if options.tiny else CIFAR))
    with nullcontext(options.data) if options.data else written as options.data:
        for name in options.only:
            print(f"\n{PARTS[name].__doc__.splitlines()[0]}", flush=True)
            results[name] = []
            for row in PARTS[name](options):
                results[name].append(row)
                print(row, flush=True)
                options.out.write_text(json.dumps(results, indent=1))
            print(training.table(results[name]))
    return results


if __name__ == "__main__":
    main()
