"""Training, images a second, against the ordinary loop on the same machine in the same run.

    python -m benchmarks.training                  # all but compile: some minutes on two cores
    python -m benchmarks.training --only speed --networks resnet20 --rounds 5
    python -m benchmarks.training --only compile

The ordinary loop: a DataLoader with two workers over PIL images and torchvision's transforms, masks
multiplied into weights and batch norm on every forward pass, an optimizer as torch makes it, the
loss read every batch, two evaluations an epoch, whether or not something was pruned between them.
Ours evaluates once, and a second time only where something was. The ordinary one computes in
float32; ours in bfloat16, too, where the processor does. Loops take turns, each in a process of its
own, and the best of a few rounds counts, after one that warms up. What there is to measure on a
GPU: `benchmarks.gpu`.
"""

import argparse
import gc
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from benchmarks import flatness
from paperlib import backends, data, experiments, sweep, training
from paperlib.config import Config, FilterPruning, WeightPruning
from paperlib.memory import kept
from paperlib.pruning import FilterPruner

Half = tuple[Tensor, Tensor]  # images and labels: all of training, or all of test

MEAN, STD = data.CIFARS["cifar10"].mean, data.CIFARS["cifar10"].std
CIFAR = 50_000, 10_000  # images
WORKERS = 2
SIZES = (128, 250, 500, 1000, 2000)
COUNTS = (1, 2, 4, 8, 16)  # runs at once
# Batches an epoch here: what some seconds on two cores can do.
BATCHES = {"vgg11_bn": 8, "resnet20": 10, "resnet18": 2, "conv4": 10}

# The networks as the papers prune them, all at once.
SETTINGS = {
    "vgg11_bn": experiments.VGG11.with_(
        pruning=FilterPruning(experiments.VGG_FRACTIONS, scratch=True)
    ),
    "resnet20": experiments.SGD.with_(
        model="resnet20", pruning=FilterPruning((0.1,) * 18, score="l1", scratch=True)
    ),
    "resnet18": experiments.RESNET18.with_(
        pruning=FilterPruning(experiments.RESNET_FRACTIONS, scratch=True)
    ),
    "conv4": experiments.CONV4.with_(
        pruning=WeightPruning(("dense",), (experiments.CONV4_FRACTION,), (0,))
    ),
}


def setting(name: str, **changes) -> Config:
    """A network's configuration, with augmentation."""
    return SETTINGS[name].with_(augment=True, **changes)


def with_events(config: Config, events: int, epochs: int | None = None) -> Config:
    """So many epochs, with an event at the end of each of the first, thus two evaluations there.

    epochs: as many as events if None.
    """
    epochs, events = epochs or events, tuple(range(events))
    p = config.pruning
    if isinstance(p, FilterPruning):
        p = replace(p, scratch=False, epochs=(events,) * len(p.fractions))
    elif p is not None:
        p = replace(p, epochs=events)
    return config.with_(epochs=epochs, pruning=p, milestones=())


# Images


def images(count: int) -> Half:
    """Random images of CIFAR's size: what is in them costs nothing."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return pixels, torch.randint(10, (count,), generator=generator)


def write_images(path: Path, train: int, test: int, classes: int = 10) -> None:
    """A .zip of random PNGs of CIFAR's size, as data "images:PATH" takes it; 101 differ."""
    rng = np.random.default_rng(0)
    files = []
    for pixels in rng.integers(256, size=(101, 32, 32, 3), dtype=np.uint8):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=0)
        files.append(file.getvalue())
    with zipfile.ZipFile(path, "w") as archive:
        for split, count in (("train", train), ("test", test)):
            for i in range(count):
                name = f"{split}/{i % classes}/{i // classes:05}.png"
                archive.writestr(name, files[i % len(files)])


@contextmanager
def written_images(train: int, test: int) -> Iterator[str]:
    """What a configuration's `data` is for such an archive; it and its cache go afterwards."""
    with tempfile.TemporaryDirectory(prefix="paperlib-bench-") as folder:
        path = Path(folder, "images.zip")
        write_images(path, train, test)
        with mock.patch.dict(os.environ, PAPERLIB_DATA=folder):
            yield f"images:{path}"


def halves(spec: str) -> tuple[Half, Half]:
    """Training and test images of what `data.load` takes."""
    dataset = data.load(spec)
    return (dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels)


class Pictures(Dataset):
    """A data set the ordinary way: one PIL image at a time, transformed on its own."""

    def __init__(self, pixels: Tensor, labels: Tensor, augment: bool = False) -> None:
        self.pixels, self.labels = pixels.permute(0, 2, 3, 1).numpy(), labels.tolist()
        augmentation = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        self.transform = transforms.Compose(
            [
                *(augmentation if augment else []),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


# The two loops


class Masked(nn.Module):
    """A convolution, dense layer or batch norm, multiplied by a mask on every forward pass.

    mask: (filters,), of weight and bias; or of the weight's shape, of the weight alone.
    """

    def __init__(self, module: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("mask", mask.float())

    def forward(self, x: Tensor) -> Tensor:
        m, mask, bias = self.module, self.mask, self.module.bias
        if mask.dim() == 1:
            weight = m.weight * mask.view(-1, *[1] * (m.weight.dim() - 1))
            bias = bias * mask if bias is not None else None
        else:
            weight = m.weight * mask
        if isinstance(m, nn.Conv2d):
            return F.conv2d(x, weight, bias, m.stride, m.padding)
        if isinstance(m, nn.Linear):
            return F.linear(x, weight, bias)
        mean, var = m.running_mean, m.running_var
        return F.batch_norm(x, mean, var, weight, bias, self.training, m.momentum, m.eps)


def pruned(config: Config, device: torch.device | str = "cpu") -> tuple[nn.Module, object]:
    """The network on its device, pruned, and its pruner."""
    device = torch.device(device)
    ours = training.build(config).to(device, memory_format=torch.channels_last)
    pruner = training.make_pruner(config, ours)
    pruner.prune(1, 1)
    return ours, pruner


def masked(config: Config) -> nn.Module:
    """The same network the ordinary way: nothing is zero but by masks in the forward pass."""
    model, pruner = pruned(config)
    model.load_state_dict(training.build(config).state_dict(), strict=False)
    for name, mask in pruner.masks.items():
        names = [name]
        if isinstance(pruner, FilterPruner) and pruner.layers[name].norm_name:
            names.append(pruner.layers[name].norm_name)
        for each in names:
            parent, _, last = each.rpartition(".")
            setattr(model.get_submodule(parent), last, Masked(model.get_submodule(each), mask))
    return model.to(memory_format=torch.contiguous_format)


class OrdinaryLoop:
    """What one would write without this package."""

    evaluations = 2  # an epoch

    def __init__(
        self, config: Config, train: Half, test: Half, device: torch.device, workers: int = WORKERS
    ) -> None:
        self.device = device
        self.model = masked(config).to(device)
        parameters, rate = self.model.parameters(), config.learning_rate
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(
                parameters, rate, config.momentum, weight_decay=config.weight_decay
            )
        else:
            self.optimizer = torch.optim.Adam(parameters, rate, weight_decay=config.weight_decay)
        options = {"num_workers": workers, "persistent_workers": workers > 0}
        if workers and sys.platform == "linux":
            options["multiprocessing_context"] = "fork"  # as usual there, in processes of ours too
        options["pin_memory"] = device.type == "cuda"
        pictures = Pictures(*train, augment=config.augment)
        self.loader = DataLoader(pictures, config.batch, shuffle=True, **options)
        self.test_loader = DataLoader(Pictures(*test), config.batch, **options)

    def train(self) -> float:
        """One epoch; returns the sum of its batches' losses."""
        self.model.train()
        total = 0.0
        for x, y in self.loader:
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            total += loss.item()
        return total

    @torch.no_grad()
    def evaluate(self) -> float:
        """One evaluation; returns how many images it classified correctly."""
        self.model.eval()
        correct = 0
        for x, y in self.test_loader:
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            correct += (self.model(x).argmax(1) == y).sum().item()
        return correct


class OurLoop:
    """What `training.run` does in an epoch without an event. plain: without CUDA graphs, too."""

    evaluations = 1

    def __init__(
        self, config: Config, train: Half, test: Half, device: torch.device, plain: bool = False
    ) -> None:
        self.device, self.epochs = device, 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with self._as_a_run():
            self.model, pruner = pruned(config, device)
            optimizer = training.make_optimizer(config, self.model)
            with mock.patch.dict(os.environ, PAPERLIB_PLAIN=str(int(plain))):
                parts = config, self.model, optimizer, pruner, device
                self.loop = training.make_loop(*parts, fast=True)
            half = (MEAN, STD, device)
            self.batches = data.Batches(*train, *half, config.batch, config.augment)
            self.test = data.Batches(*test, *half)
        large = training.LARGE_EVALUATION_BATCH
        self.size = training.EVALUATION_BATCH.get(device.type, large)

    @contextmanager
    def _as_a_run(self) -> Iterator[None]:
        """On a stream of its own, with the quickest kernels, and memory kept, as `training.run`."""
        with ExitStack() as stack:
            if self.stream is not None:
                stack.enter_context(torch.cuda.stream(self.stream))
                stack.enter_context(backends.switched(torch.backends.cudnn, benchmark=True))
            stack.enter_context(kept())
            yield

    def train(self) -> float:
        """One epoch; returns its mean loss."""
        self.epochs += 1
        drawn = (training.generator(0, name, self.epochs) for name in ("order", "augmentation"))
        with self._as_a_run():
            return self.loop.train(self.batches, *drawn).read()[0]

    def evaluate(self, size: int | None = None) -> float:
        """One evaluation, in batches of `size`; returns the accuracy in percent."""
        with self._as_a_run():
            return self.loop.evaluate(self.test, size or self.size).read()[1]


LOOPS = {"ordinary": OrdinaryLoop, "paperlib": OurLoop}


def lap(loop: OrdinaryLoop | OurLoop) -> np.ndarray:
    """A whole epoch: seconds of its training, of one evaluation, of all. Reading waits."""
    start = time.perf_counter()
    loop.train()
    trained = time.perf_counter()
    for _ in range(loop.evaluations):
        loop.evaluate()
    end = time.perf_counter()
    return np.array([trained - start, (end - trained) / loop.evaluations, end - start])


def rates(seconds: np.ndarray, train: int, test: int) -> dict[str, float]:
    """Of such a lap: images a second; of the whole epoch, its training images a second."""
    return dict(zip(WHAT, np.array([train, test, train]) / seconds, strict=True))


WHAT = ("training", "evaluation", "whole epoch")


def with_ratios(rows: list[dict], to: dict) -> list[dict]:
    """Rows with how many times the speed of row `to` they are."""
    return [row | {f"{what} x": row[what] / to[what] for what in WHAT} for row in rows]


# What a machine can do


def step_flops(config: Config) -> int:
    """Floating-point operations of a training step, an image: products and sums, dense."""
    model = training.build(config).to("meta")
    with FlopCounterMode(display=False) as counter:
        x = torch.empty(2, 3, 32, 32, device="meta")
        F.cross_entropy(model(x), torch.zeros(2, dtype=torch.int64, device="meta")).backward()
    return counter.get_total_flops() // 2


def product_rate(device: torch.device, precision: str, size: int, rounds: int = 5) -> float:
    """FLOP/s of the product of two square matrices, the best of some rounds.

    precision: "float32", "tf32" (of a GPU; what its float32 convolutions compute by) or "bfloat16".
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    best = float("inf")
    try:
        for _ in range(rounds + 1):
            _wait(device)
            start = time.perf_counter()
            for _ in range(repeats := 10 if device.type == "cuda" else 1):
                a @ b
            _wait(device)
            best = min(best, (time.perf_counter() - start) / repeats)
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def precisions(device: torch.device) -> dict[str, bool]:
    """Whether each is native here."""
    return {"float32": True, "bfloat16": training.native_bfloat16(device)}


# Processes of their own


def context() -> multiprocessing.context.BaseContext:
    """New processes that have imported all, but hold no GPU and no threads of this one."""
    there = "forkserver" in multiprocessing.get_all_start_methods()
    made = multiprocessing.get_context("forkserver" if there else "spawn")
    if there:
        made.set_forkserver_preload(["benchmarks.flatness", "paperlib.training", "torchvision"])
    return made


@contextmanager
def processes(jobs: Iterable[dict]) -> Iterator[list[Connection]]:
    """A process for each job, with a loop of its own that is ready. jobs: arguments of `_work`.

    Yields a connection to each: what is sent there is how many seconds to train, an epoch at least,
    and what comes back are the laps. Raises RuntimeError where one of them fails.
    """
    ways = context()
    ends, started = [], []
    try:
        for job in jobs:
            end, other = ways.Pipe()
            process = ways.Process(target=_work, args=(other,), kwargs=job)
            process.start()
            other.close()
            ends.append(end)
            started.append(process)
        for end in ends:
            received(end)
        yield ends
    finally:
        for end in ends:
            end.close()
        for process in started:
            process.join(10)
            process.kill()


def received(end: Connection) -> dict:
    """What a process answers: its laps and its peak of memory; nothing when it is ready."""
    try:
        answer = end.recv()
    except EOFError:
        raise RuntimeError("a process died") from None
    if isinstance(answer, Exception):
        raise RuntimeError(f"a process failed: {answer}")
    return answer


def _work(
    connection: Connection,
    kind: str,
    config: Config,
    train: int,
    test: int,
    threads: int,
    device: str = "cpu",
) -> None:
    """In the process. kind: of `LOOPS`. train, test: how many images."""
    try:
        torch.set_num_threads(threads)
        where = torch.device(device)
        make = LOOPS[kind]
        with kept() if make is OurLoop else nullcontext():
            loop = make(config, images(train), images(test), where)
            connection.send({})
            with suppress(EOFError):
                while True:
                    _laps(connection, loop, connection.recv())
            del loop  # and with it the workers of its loaders
            gc.collect()
    except Exception as error:
        with suppress(OSError):
            connection.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _laps(connection: Connection, loop: OrdinaryLoop | OurLoop, seconds: float) -> None:
    laps, start = [], time.perf_counter()
    while not laps or time.perf_counter() - start < seconds:
        laps.append(lap(loop))
    connection.send({"laps": laps, "peak GiB": flatness.peak_gib(str(loop.device))})


def at_once(count: int, seconds: float = 0.0, **job) -> list[dict]:
    """So many processes that train at the same time, each for `seconds` and an epoch at least.

    With seconds = 0 they do not warm up: what they need is what counts.

    job: arguments of `_work`. Returns a row each: what `rates` says, and the peak of memory. Raises
    RuntimeError where one of them fails.
    """
    rows = []
    with processes([job] * count) as ends:
        warm = 3 if job.get("device", "cpu").startswith("cuda") else 1
        for each in [0.0] * (warm if seconds else 0) + [seconds]:
            for end in ends:
                end.send(each)
            answers = [received(end) for end in ends]
        for answer in answers:
            row = rates(np.mean(answer["laps"], axis=0), job["train"], job["test"])
            rows.append(row | {"peak GiB": answer["peak GiB"]})
    return rows


def turns(jobs: list[tuple[int, dict]], rounds: int) -> list[np.ndarray]:
    """The shortest laps of loops that take turns, so many of each kind at once.

    The first round only warms up. Where several run at once a lap is the mean of theirs.
    """
    laps: list[list[np.ndarray]] = [[] for _ in jobs]
    each = [job for count, job in jobs for _ in range(count)]
    with processes(each) as ends:
        groups, rest = [], iter(ends)
        for count, _ in jobs:
            groups.append([next(rest) for _ in range(count)])
        for _ in range(rounds + 1):
            for group, done in zip(groups, laps, strict=True):
                for end in group:
                    end.send(0.0)
                done.append(np.mean([received(end)["laps"] for end in group], axis=(0, 1)))
    return [np.min(done[1:], axis=0) for done in laps]


# The tables


def speed(options: argparse.Namespace) -> list[dict]:
    """Images a second on the CPU: the ordinary loop, ours, and how near the machine's peak.

    Each as one run on all cores, and as a sweep has it: as many runs as cores, of one thread each.
    """
    device, cores = torch.device("cpu"), sweep.default_jobs()
    native = precisions(device)
    peaks = {precision: 0.0 for precision, is_native in native.items() if is_native}
    rows = []
    for name in options.networks:
        config = setting(name, width=options.width)
        train, test = _sizes(name, options)
        for precision in peaks:
            rate = product_rate(device, precision, options.product)
            peaks[precision] = max(peaks[precision], rate)
        ways = [("ordinary", "float32"), *(("paperlib", precision) for precision in peaks)]
        ways = [(*way, runs) for way in ways for runs in dict.fromkeys((1, cores))]
        jobs = []
        for loop, precision, runs in ways:
            job = {"kind": loop, "config": config.with_(precision=precision)}
            jobs.append((runs, job | {"train": train, "test": test, "threads": cores // runs}))
        made = []
        for way, seconds in zip(ways, turns(jobs, options.rounds), strict=True):
            row = {"network": name} | dict(zip(("loop", "precision", "runs"), way, strict=True))
            row |= {key: way[2] * rate for key, rate in rates(seconds, train, test).items()}
            made.append(row | {"GFLOP/s": step_flops(config) * row["training"] / 1e9})
        rows += with_ratios(made, made[0])
    for row in rows:
        row["of peak"] = 1e9 * row["GFLOP/s"] / peaks[row["precision"]]
    for precision in native:
        row = {"loop": "matrix product", "precision": precision}
        row |= {"GFLOP/s": peaks[precision] / 1e9} if native[precision] else {}
        rows.append(row if native[precision] else row | {"loop": "paperlib", "note": NOT_NATIVE})
    return rows


NOT_NATIVE = "not native here: emulated, some hundred times slower"


def _sizes(name: str, options: argparse.Namespace) -> tuple[int, int]:
    """Images of training and of test, five to one as in CIFAR."""
    train = (options.batches or BATCHES[name]) * SETTINGS[name].batch
    return train, train // 5


def evaluation(options: argparse.Namespace) -> list[dict]:
    """Batch sizes of evaluation: images a second on the CPU."""
    names = [name for name in options.networks if name in ("vgg11_bn", "resnet20")]
    return list(evaluation_sizes(names, options, torch.device("cpu"), "float32"))


def evaluation_sizes(
    names: Iterable[str], options: argparse.Namespace, device: torch.device, precision: str
) -> Iterator[dict]:
    """A row for each network: its images a second by batch size."""
    for name in names:
        config = setting(name, width=options.width, precision=precision)
        loop = OurLoop(config, images(config.batch), images(options.tested), device)
        best = dict.fromkeys((s for s in SIZES if s <= options.tested), float("inf"))
        warm = 2 if device.type == "cuda" else 1  # graphs are captured in the second
        for turn in range(warm + max(1, options.rounds - 1)):
            for size in best:
                start = time.perf_counter()
                loop.evaluate(size)
                if turn >= warm:
                    best[size] = min(best[size], time.perf_counter() - start)
        rows = {f"batches of {size}": options.tested / s for size, s in best.items()}
        yield {"network": name, "precision": precision} | rows


def memory(options: argparse.Namespace) -> list[dict]:
    """Peak memory of a fresh process that trains and evaluates, without the loader's workers."""
    rows = []
    for name in options.networks:
        train = SETTINGS[name].batch
        job = {"config": setting(name, width=options.width), "train": train, "test": 500}
        for loop in LOOPS:
            (row,) = at_once(1, kind=loop, threads=sweep.default_jobs(), **job)
            rows.append({"network": name, "loop": loop, "peak GiB": row["peak GiB"]})
    return rows


def whole(options: argparse.Namespace) -> list[dict]:
    """An epoch of `training.run`, all that it does, against the ordinary loop's: seconds."""
    device, rows = torch.device("cpu"), []
    train, test = options.whole
    with written_images(train, test) as spec:
        for name in [name for name in options.networks if name in ("vgg11_bn", "resnet20")]:
            config = setting(name, width=options.width)
            loop = OrdinaryLoop(config, *halves(spec), device)
            seconds = {"ordinary": min(lap(loop)[2] for _ in range(3))}
            for precision in [p for p, native in precisions(device).items() if native]:
                run = with_events(config, 3, 6).with_(data=spec, precision=precision)
                took = training.run(run, None, "cpu").epochs.seconds
                seconds[f"paperlib {precision}"] = float(took[3:].min())
                seconds[f"paperlib {precision}, with an event"] = float(took[1:3].min())
            for loop, value in seconds.items():
                row = {"network": name, "loop": loop, "images": train, "tested": test}
                ratio = seconds["ordinary"] / value
                rows.append(row | {"seconds an epoch": value, "x": ratio})
    return rows


def runs(options: argparse.Namespace) -> list[dict]:
    """Runs at once on the CPU, in processes that share its cores out: images a second of all."""
    cores, rows = sweep.default_jobs(), []
    for name in [name for name in options.networks if name in ("vgg11_bn", "resnet20")]:
        train = 2 * SETTINGS[name].batch
        for precision in [p for p, native in precisions(torch.device("cpu")).items() if native]:
            config = setting(name, width=options.width, precision=precision)
            job = {"kind": "paperlib", "config": config, "train": train, "test": train // 4}
            for count in options.counts:
                threads = max(1, cores // count)
                done = at_once(count, options.seconds, threads=threads, **job)
                row = {"network": name, "precision": precision, "runs": count, "threads": threads}
                row |= {what: sum(each[what] for each in done) for what in WHAT}
                rows.append(row | {"peak GiB a run": max(each["peak GiB"] for each in done)})
    return rows


def compiled(options: argparse.Namespace) -> list[dict]:
    """torch.compile: what it gains in training, and after how many epochs its start is paid."""
    device, rows = torch.device("cpu"), []
    for name in [name for name in options.networks if name in ("vgg11_bn", "resnet20")]:
        config = setting(name, width=options.width)
        train = _sizes(name, options)[0]
        plain = OurLoop(config, images(train), images(500), device)
        ours = OurLoop(config, images(train), images(500), device)
        ours.loop.model = torch.compile(ours.model)
        seconds = {"plain": [], "compiled": []}
        try:
            for _ in range(options.rounds + 1):
                for loop, kept in zip((plain, ours), seconds.values(), strict=True):
                    start = time.perf_counter()
                    loop.train()
                    kept.append(time.perf_counter() - start)
        except Exception as error:  # the first lines say that there is no compiler, or no Python.h
            rows.append({"network": name, "note": str(error).strip()[:200]})
            continue
        best = {key: min(values[1:]) for key, values in seconds.items()}
        start = seconds["compiled"][0] - best["compiled"]
        gain = (best["plain"] - best["compiled"]) * CIFAR[0] / train
        row = {"network": name} | {key: train / value for key, value in best.items()}
        row |= {"compiled x": best["plain"] / best["compiled"], "seconds to start": start}
        rows.append(row | {"paid back after epochs": start / gain if gain > 0 else float("inf")})
    return rows


PARTS: dict[str, Callable] = {
    "speed": speed,
    "memory": memory,
    "evaluation": evaluation,
    "whole": whole,
    "runs": runs,
    "compile": compiled,
}
UNITS = {
    speed: "images a second of all runs; x: times one ordinary loop on all cores; of peak: of the "
    "matrix product's FLOP/s",
    memory: "GiB of a fresh process",
    evaluation: "images a second",
    whole: "seconds; x: times the ordinary loop's speed",
    runs: "images a second of all runs; evaluations included in the whole epoch",
    compiled: "images a second in training",
}


def table(rows: list[dict]) -> str:
    """Rows as text, numbers to three or more digits; what a row lacks stays empty."""

    def short(value: object) -> object:
        if not isinstance(value, float):
            return value
        return "" if np.isnan(value) else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

    frame = pd.DataFrame(rows).astype(object)
    return frame.where(frame.notna(), "").map(short).to_string(index=False)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = [name for name in PARTS if name != "compile"]
    parser.add_argument("--only", nargs="+", choices=PARTS, default=default)
    parser.add_argument("--networks", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=2, help="that count, after one to warm up")
    parser.add_argument("--batches", type=int, help="an epoch; default: by network")
    parser.add_argument("--width", type=float, default=1.0, help="of the networks")
    parser.add_argument("--product", type=int, default=2048, help="rows of the matrices multiplied")
    parser.add_argument("--tested", type=int, default=2000, help="images, by batch size")
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS, help="runs at once")
    parser.add_argument("--seconds", type=float, default=2.0, help="of runs at once, at least")
    parser.add_argument("--whole", nargs=2, type=int, default=(1000, 200), help="images of a run")
    parser.add_argument("--out", type=Path, help="JSON file of everything printed")
    return parser


def main(argv: list[str] | None = None) -> dict:
    options = parser().parse_args(argv)
    results: dict = {"machine": flatness.machine("cpu")}
    for name in options.only:
        part = PARTS[name]
        start = time.perf_counter()
        results[name] = part(options)
        print(f"{part.__doc__.splitlines()[0]}\n({UNITS[part]})\n{table(results[name])}")
        print(f"[{time.perf_counter() - start:.0f} s]\n", flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
