"""All there is to measure on a GPU, in one command of ten minutes: `python -m benchmarks.gpu`.

    python -m benchmarks.gpu --minutes 10 --data images:cifar10-jpeg.tar.xz
    python -m benchmarks.gpu --device cpu --tiny          # all of its logic, as the tests run it

Parts come in the order of their importance, each in a process of its own: one that fails costs no
other, and one that hangs no more than its share of the time. Rows are printed, and written as JSON,
as they come, so that what was measured survives a stop. What no longer fits into the time is left
out, and the rows say so. The tables at the end come in the reverse order, what matters most last.
"""

import argparse
import gc
import itertools
import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from benchmarks import flatness, training
from benchmarks.training import WHAT, OrdinaryLoop, OurLoop, setting
from paperlib import data, experiments
from paperlib import training as ours
from paperlib.config import Config, Flatness
from paperlib.flatness import gradient_covariance_trace, hessian_spectrum, sharpness

NETWORK = "vgg11_bn"
RUNS, EPOCHS = 60, 325  # of VGG11 in Figure 2: six settings, ten seeds
SPARE = 30.0  # seconds: of what came before `main`, and at the end, to stop what still runs
SHARES = {"epochs": 0.35, "runs": 0.4, "curvature": 0.2, "agreement": 0.15}  # of the time, at most
NOTE = "note"
MINUTES = f"minutes of {RUNS} runs"


@dataclass(frozen=True)
class Plan:
    """What is measured, and until when (`time.time()`)."""

    device: str
    data: str
    end: float
    cache: str  # folder of decoded images
    width: float = 1.0
    batch: int = 128
    product: int = 8192  # rows of the matrices multiplied
    counts: tuple[int, ...] = training.COUNTS  # runs at once
    per_class: tuple[int, int] = (1000, 200)  # images of runs at once, of training and of test
    seconds: float = 4.0  # that runs at once are timed, at least
    tested: int = 10_000  # images, by batch size of evaluation
    rounds: int = 2
    networks: tuple[str, ...] = tuple(training.SETTINGS)
    agreement: tuple[int, int, int] = (200, 50, 6)  # images per class, of both, and epochs
    flatness: Flatness = experiments.FLATNESS
    threads: int | None = None  # of the CPU; None: as torch has them

    @property
    def where(self) -> torch.device:
        return torch.device(self.device)

    @property
    def precisions(self) -> list[str]:
        """Those that are native, the quicker first."""
        native = training.precisions(self.where)
        return [precision for precision in reversed(native) if native[precision]]

    def config(self, name: str, **changes) -> Config:
        return setting(name, width=self.width, batch=self.batch, **changes)


class Part:
    """A part at work: it sends its rows home."""

    def __init__(self, plan: Plan, connection: Connection) -> None:
        self.plan, self.connection = plan, connection

    def row(self, about: dict, needs: float, measure: Callable[[], dict]) -> dict | None:
        """Send `about` and what `measure` returns, and return that; or send why there is nothing.

        needs: seconds it takes, roughly.
        """
        found, row = None, {}
        if time.time() + needs > self.plan.end:
            row = {NOTE: f"left out: no {needs:.0f} s left"}
        else:
            try:
                found = row = measure()
            except Exception as error:
                traceback.print_exc()
                row = {NOTE: f"failed: {type(error).__name__}: {str(error)[:300]}"}
        self.connection.send(about | row)
        gc.collect()
        if self.plan.where.type == "cuda":
            with suppress(RuntimeError):  # once something has gone wrong there, each call raises
                torch.cuda.empty_cache()
        return found


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _memory(device: torch.device) -> dict[str, float]:
    """Peaks since `_reset_peak`. What a graph works in is only counted as reserved."""
    row = {"peak GiB": flatness.peak_gib(device.type)}
    if device.type == "cuda":
        row["reserved GiB"] = torch.cuda.max_memory_reserved(device) / 2**30
    return row


# Parts


def epochs(part: Part, name: str = NETWORK) -> None:
    """Whole epochs: the ordinary loop, ours plain and captured, and a run's own."""
    plan = part.plan
    device, half = plan.where, training.halves(plan.data)
    counts = len(half[0][1]), len(half[1][1])
    peaks = {}
    on_gpu = device.type == "cuda"
    for precision in ("float32", *(["tf32"] if on_gpu else []), *plan.precisions[:-1]):
        about = {"network": "", "loop": "matrix product", "precision": precision}
        rate = part.row(about, 5, lambda p=precision: {"TFLOP/s": product(plan, p) / 1e12})
        peaks[precision] = rate["TFLOP/s"] if rate else float("nan")
    # Convolutions of float32 compute by TF32 on a GPU, unless told otherwise.
    peaks["float32"] = peaks.get("tf32", peaks["float32"])
    ordinary: dict = {}  # the quickest

    def laps(make: Callable, config: Config, **options) -> dict:
        _reset_peak(device)
        loop, start, kept = make(config, *half, device, **options), time.time(), []
        for i in itertools.count():
            seconds = training.lap(loop)
            if i >= (1 if make is OrdinaryLoop else 2):  # graphs are captured in the second
                kept.append(seconds)
            enough = len(kept) >= plan.rounds and np.sum(kept, axis=0)[2] >= plan.seconds
            if enough or (kept and time.time() - start > 25):
                break
        row = training.rates(np.min(kept, axis=0), *counts)
        rate = training.step_flops(config) * row["training"] / 1e12
        row |= {"TFLOP/s": rate, "of peak": rate / peaks[config.precision]}
        row["seconds an epoch"] = float(np.min(kept, axis=0)[2])
        return with_ratio(row | _memory(device))

    def with_ratio(row: dict) -> dict:
        return row | {f"{w} x": row[w] / ordinary[w] for w in WHAT if w in ordinary and w in row}

    def run(config: Config) -> dict:
        config = training.with_events(config, 1, plan.rounds + 2).with_(data=plan.data)
        record = ours.run(config, None, plan.device)
        seconds = float(record.epochs.seconds[2:].median())
        return with_ratio({"whole epoch": counts[0] / seconds, "seconds an epoch": seconds})

    config, most = plan.config(name), max(training.WORKERS, min(8, os.cpu_count() or 1))
    for workers in sorted({training.WORKERS, most} if name == NETWORK else {most}):
        about = {"network": name, "loop": f"ordinary, {workers} workers", "precision": "float32"}
        row = part.row(about, 40, lambda n=workers: laps(OrdinaryLoop, config, workers=n))
        if row and row["whole epoch"] > ordinary.get("whole epoch", 0.0):
            ordinary = row
    for precision in plan.precisions:
        about = {"network": name, "precision": precision}
        config = plan.config(name, precision=precision)
        part.row(about | {"loop": "captured"}, 15, lambda c=config: laps(OurLoop, c))
        part.row(about | {"loop": "training.run"}, 15, lambda c=config: run(c))
        if name == NETWORK:
            part.row(about | {"loop": "plain"}, 20, lambda c=config: laps(OurLoop, c, plain=True))


def product(plan: Plan, precision: str) -> float:
    """FLOP/s of the matrix product here."""
    return training.product_rate(plan.where, precision, plan.product)


def at_once(plan: Plan, configs: list[Config], images: int) -> dict:
    """Runs in streams of one process: training images a second of all, while all are at work.

    images: of an epoch's training. Their first two epochs warm up and capture, and do not count.
    """
    ends: list[list[float]] = [[] for _ in configs]

    def note(i: int) -> Callable:
        return lambda moment: ends[i].append(time.perf_counter())

    _reset_peak(plan.where)
    start = time.perf_counter()
    records = ours.run_together(
        configs, None, plan.device, [note(i) for i in range(len(configs))], fast=True
    )
    wall = time.perf_counter() - start
    for record in records:
        if isinstance(record, Exception):
            raise record
    if max(times[1] for times in ends) >= min(times[-1] for times in ends):
        raise torch.OutOfMemoryError("some found no memory beside the others, and came after them")
    rate = images * epochs_a_second(ends)
    row = {"images a second": rate, "TFLOP/s": training.step_flops(configs[0]) * rate / 1e12}
    return row | {"seconds in all": wall} | _memory(plan.where)


def epochs_a_second(ends: list[list[float]]) -> float:
    """Of all runs, from when each of their epochs ended, the first two left out.

    Run by run: runs whose epochs end at the same moments share a window only by its edges.
    """
    return sum((len(times) - 2) / (times[-1] - times[1]) for times in ends)


def runs(part: Part, name: str = NETWORK) -> None:
    """Runs at once on one device, by streams; and what Figure 2's runs of VGG11 come to."""
    plan = part.plan
    for precision in plan.precisions:
        base = training.SETTINGS[name].with_(
            width=plan.width, batch=plan.batch, precision=precision, data=plan.data
        )
        few = base.with_(train_per_class=plan.per_class[0], test_per_class=plan.per_class[1])
        images, best, speed = 10 * plan.per_class[0], (0.0, 1), 20_000.0
        for count in plan.counts:
            length = 3 + max(1, round(plan.seconds * speed / images / count))
            needs = count * (2 + length * images / speed)
            config = training.with_events(few, 1, length)
            configs = [config.with_(seed=seed) for seed in range(count)]
            about = {"network": name, "precision": precision, "runs": count}
            row = part.row(about, needs, lambda c=configs, n=images: at_once(plan, c, n))
            if row:
                speed = row["images a second"]
                best = max(best, (speed, count))
        if best[0] and name == NETWORK:
            _project(part, base, *best)


def _project(part: Part, base: Config, speed: float, count: int) -> None:
    """Figure 2's runs of VGG11 at the best number at once, from epochs of all the images."""
    plan = part.plan
    dataset = data.load(base.data)
    images = len(dataset.train_labels)
    config = training.with_events(base, 1, 4)
    configs = [config.with_(seed=seed) for seed in range(count)]

    def minutes(rate: float) -> dict:
        trained = -(-RUNS // count) * count  # the last runs at once are as slow with fewer
        return {MINUTES: trained * EPOCHS * images / rate / 60}

    def measure() -> dict:
        row = at_once(plan, configs, images)
        return row | minutes(row["images a second"])

    about = {"network": NETWORK, "precision": base.precision, "runs": count}
    few = {"of": "epochs of fewer images", "images a second": speed}
    part.row(about | few, 0, lambda: minutes(speed))
    needs = count * (3 + 4.5 * images / speed)
    part.row(about | {"of": f"epochs of {images:,} images"}, needs, measure)


def agreement(part: Part) -> None:
    """Loss curves of captured runs beside plain ones, and of plain ones beside each other.

    Off: by how much at most, over all epochs. agrees: the losses of the first two to 2%.
    """
    plan = part.plan
    train, test, length = plan.agreement
    activation = setting("resnet18").pruning
    settings = {
        "vgg11_bn": plan.config("vgg11_bn"),
        "resnet18, activation": plan.config(
            "resnet18",
            pruning=experiments.FilterPruning(
                activation.fractions, scratch=True, score="activation"
            ),
        ),
        "vgg11_bn, dropout": plan.config("vgg11_bn", dropout=0.5),
        "conv4, dropout": plan.config("conv4", dropout=experiments.CONV4_DROPOUT),
    }
    if plan.precisions[0] != "float32":
        settings["vgg11_bn, bfloat16"] = plan.config("vgg11_bn", precision="bfloat16")

    def curves(config: Config, plain: bool) -> np.ndarray:
        with mock.patch.dict(os.environ, PAPERLIB_PLAIN=str(int(plain))):
            frame = ours.run(config, None, plan.device, fast=True).epochs
        return frame[["train_loss", "test_loss", "post"]].to_numpy()

    def measure(config: Config) -> dict:
        captured, plain, again = (curves(config, plain) for plain in (False, True, True))
        first = slice(0, 2)  # epochs; rounding grows in those after them
        same = np.allclose(captured[first, :2], plain[first, :2], rtol=0.02)
        row = {"agrees": same, "last loss": captured[-1, 0], "plain": plain[-1, 0]}
        for i, what in enumerate(("train loss", "test loss", "accuracy %")):
            row[f"{what} off"] = float(np.abs(captured - plain)[:, i].max())
            row[f"{what} of plain off"] = float(np.abs(again - plain)[:, i].max())
        return row | {"captured losses": captured[:, 0].tolist(), "losses": plain[:, 0].tolist()}

    for name, config in settings.items():
        config = training.with_events(config, length)
        config = config.with_(data=plan.data, train_per_class=train, test_per_class=test)
        part.row({"setting": name}, 25, lambda c=config: measure(c))


def networks(part: Part) -> None:
    """Whole epochs of the other networks."""
    for name in part.plan.networks:
        if name != NETWORK:
            epochs(part, name)


def evaluation(part: Part) -> None:
    """Batch sizes of evaluation: images a second."""
    plan = part.plan
    options = argparse.Namespace(width=plan.width, tested=plan.tested, rounds=3 * plan.rounds)
    for precision in plan.precisions:
        for name in plan.networks:
            part.row(
                {},
                10,
                lambda n=name, p=precision: next(
                    training.evaluation_sizes([n], options, plan.where, p)
                ),
            )


def processes(part: Part) -> None:
    """Runs at once on one device, in processes."""
    plan, precision = part.plan, part.plan.precisions[0]
    train, test = (10 * count for count in plan.per_class)
    config = plan.config(NETWORK, precision=precision).with_(augment=False)  # as in `runs`
    job = {"config": config, "train": train, "test": test}
    job |= {"kind": "paperlib", "threads": 1, "device": plan.device}

    def measure(count: int) -> dict:
        done = training.at_once(count, plan.seconds, **job)
        rate = sum(row["whole epoch"] for row in done)
        return {"images a second": rate, "peak GiB a run": max(row["peak GiB"] for row in done)}

    for count in plan.counts:
        about = {"network": NETWORK, "precision": precision, "runs": count}
        part.row(about, 15 + 2 * count, lambda n=count: measure(n))


def curvature(part: Part) -> None:
    """Flatness, which Figure 2's runs of VGG11 measure once each, for the figures they share."""
    plan, f = part.plan, part.plan.flatness
    train, (images, labels) = training.halves(plan.data)
    loop = OurLoop(plan.config(NETWORK), train, (images, labels), plan.where)
    for _ in range(2):  # a spectrum is that of a network that was trained
        loop.train()
    model, held = loop.model.eval(), loop.loop.pruner.held()
    test = data.Batches(images, labels, training.MEAN, training.STD, plan.where)
    x, y = test.first(f.images)
    everything = [torch.cat(tensors) for tensors in zip(*test.evaluation(), strict=True)]
    size = sum(parameter.numel() for parameter in model.parameters())
    direction = torch.nn.functional.normalize(torch.randn(1, size, device=plan.where))

    def spectrum() -> object:
        return hessian_spectrum(model, x, y, f.eigenvalues, held)

    def trace() -> float:
        return gradient_covariance_trace(model, x, y, held)

    work = {
        f"{f.eigenvalues} eigenvalues of {f.images} images": (60, spectrum, 1),
        f"Tr(C) of {f.images} images": (20, trace, 1),
        f"sharpness along {f.directions} directions, of one timed": (
            60,
            lambda: sharpness(model, *everything, direction, f.epsilons, held),
            f.directions,
        ),
    }
    total = 0.0
    for what, (needs, function, times) in work.items():
        row = part.row(
            {"what": what},
            needs,
            lambda f=function, n=times: {"seconds a run": n * flatness.timed(f)[0]},
        )
        total += row["seconds a run"] if row else float("nan")
    part.row(
        {"what": "all", "seconds a run": total},
        0,
        lambda: {MINUTES: RUNS * total / 60},
    )


def more_runs(part: Part) -> None:
    """Runs at once of the other networks, by streams."""
    for name in part.plan.networks:
        if name != NETWORK:
            runs(part, name)


PARTS: dict[str, Callable[[Part], None]] = {
    f.__name__: f
    for f in (
        epochs,
        runs,
        curvature,
        agreement,
        evaluation,
        networks,
        processes,
        more_runs,
    )
}


def _do(connection: Connection, name: str, plan: Plan) -> None:
    """In the process of a part."""
    os.environ["PAPERLIB_DATA"] = plan.cache
    if plan.threads:
        torch.set_num_threads(plan.threads)
    try:
        if plan.where.type == "cuda":
            torch.cuda.init()  # what counts memory needs it
        PARTS[name](Part(plan, connection))
    except Exception as error:
        traceback.print_exc()
        connection.send({NOTE: f"failed: {type(error).__name__}: {str(error)[:300]}"})


def perform(name: str, plan: Plan, take: Callable[[dict], None]) -> None:
    """Do one part in a process of its own; `take` is given its rows as they come."""
    ways = training.context()
    end, other = ways.Pipe()
    process = ways.Process(target=_do, args=(other, name, plan))
    process.start()
    other.close()
    try:
        while end.poll(max(0.0, plan.end + SPARE / 2 - time.time())):
            take(end.recv())
        take({NOTE: "stopped: the time was up"})
    except EOFError:
        process.join(SPARE / 2)
        if process.exitcode:
            take({NOTE: f"its process died, exit status {process.exitcode}"})
    finally:
        process.kill()
        end.close()


def tiny(plan: dict) -> Plan:
    """A plan of seconds, on anything."""
    sizes = {"width": 1 / 16, "batch": 32, "product": 64, "counts": (1, 2), "per_class": (8, 4)}
    lengths = {"seconds": 0.1, "tested": 128, "rounds": 1, "agreement": (8, 4, 2)}
    measured = Flatness(epoch=0, images=16, eigenvalues=2, directions=1, reach=0.1, step=0.1)
    some = ("vgg11_bn", "conv4")
    # One thread: several that wait for each other crawl where other work shares their cores.
    return Plan(**plan, **sizes, **lengths, networks=some, flatness=measured, threads=1)


def printed(rows: list[dict]) -> str:
    """A part's table; what has no place in one is in the JSON only."""

    def cell(value: object) -> object:
        return f"{value[:40]}..." if isinstance(value, str) and len(value) > 43 else value

    return training.table(
        [{k: cell(v) for k, v in row.items() if not isinstance(v, list)} for row in rows]
    )


def summary(results: dict[str, list[dict]]) -> dict[str, float]:
    """What Figure 2's runs of VGG11 take: trained at the best number at once, and measured."""
    found = {}
    for row in results.get("runs", []):
        if MINUTES in row and "fewer" not in row["of"]:
            found[f"{MINUTES}, training, {row['precision']}"] = row[MINUTES]
    for row in results.get("curvature", []):
        if MINUTES in row:
            found[f"{MINUTES}, flatness, one by one"] = row[MINUTES]
    for row in results.get("epochs", []):
        if row.get("loop") == "training.run" and "whole epoch x" in row:
            key = f"times the quickest ordinary epoch, {row['precision']}"
            found[key] = row["whole epoch x"]
    return found


def line(row: dict) -> str:
    """A row as it comes."""
    texts = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
    return "; ".join(texts)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--data", help="what data.load takes; default: random images like CIFAR's")
    parser.add_argument("--tiny", action="store_true", help="very small, to see that it works")
    parser.add_argument("--out", type=Path, default=Path("build/gpu.json"))
    return parser


def main(argv: list[str] | None = None) -> dict:
    start = time.time()
    options = parser().parse_args(argv)
    end = start + 60 * options.minutes - SPARE
    results: dict = {"machine": flatness.machine(options.device)}
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        part = options.out.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1))
        part.replace(options.out)

    write()
    print(json.dumps(results["machine"]), flush=True)
    with tempfile.TemporaryDirectory(prefix="paperlib-bench-") as cache:
        spec = options.data
        if spec is None:
            archive = Path(cache, "images.zip")
            training.write_images(archive, *((160, 80) if options.tiny else training.CIFAR))
            spec = f"images:{archive}"
        plan = {"device": options.device, "data": spec, "end": end, "cache": cache}
        plan = tiny(plan) if options.tiny else Plan(**plan)
        for name in options.only:
            rows = results[name] = []

            def take(row: dict, rows: list = rows) -> None:
                rows.append(row)
                write()
                print(f"[{time.time() - start:3.0f} s] {line(row)}", flush=True)

            print(f"\n{PARTS[name].__doc__.splitlines()[0]}", flush=True)
            until = time.time() + 60 * options.minutes * SHARES.get(name, 1.0)
            perform(name, replace(plan, end=min(plan.end, until)), take)
    for name in reversed(options.only):
        print(f"\n{PARTS[name].__doc__.splitlines()[0]}\n{printed(results[name])}")
    results["summary"] = summary(results)
    write()
    print()
    for what, value in results["summary"].items():
        print(f"{what}: {value:.3g}")
    return results


if __name__ == "__main__":
    main()
