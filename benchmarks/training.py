"""Training, images a second, against the ordinary loop on the same machine in the same run.

    python -m benchmarks.training                  # all but compile: some minutes on two cores
    python -m benchmarks.training --only speed --networks resnet20 --rounds 5
    python -m benchmarks.training --only compile

The ordinary loop: a DataLoader with two workers over PIL images and torchvision's transforms, masks
multiplied into weights and batch norm on every forward pass, an optimizer as torch makes it, the
loss read every batch, two evaluations an epoch. It computes in float32; ours in bfloat16, too,
where the processor does. Loops take turns, and the best of a few rounds counts, after one that
warms up. What there is to measure on a GPU: `benchmarks.gpu`.
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
from contextlib import ExitStack, contextmanager, suppress
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
from paperlib import data, experiments, sweep, training
from paperlib.config import Config, FilterPruning, WeightPruning
from paperlib.memory import kept
from paperlib.pruning import FilterPruner

Half = tuple[Tensor, Tensor]  # images and labels: all of training, or all of test

MEAN, STD = data.CIFARS["cifar10"].mean, data.CIFARS["cifar10"].std
CIFAR = 50_000, 10_000  # images
WORKERS = 2
SIZES = (128, 250, 500, 1000, 2000)
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


def event_every_epoch(config: Config, epochs: int) -> Config:
    """So many epochs with an event at the end of each, which makes for two evaluations."""
    p, events = config.pruning, tuple(range(epochs))
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
    """What `training.run` does in an epoch. plain: without CUDA graphs, too."""

    def __init__(
        self, config: Config, train: Half, test: Half, device: torch.device, plain: bool = False
    ) -> None:
        self.device, self.epochs = device, 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with self._as_a_run():
            self.model, pruner = pruned(config, device)
            optimizer = training.make_optimizer(config, self.model)
            with mock.patch.dict(os.environ, PAPERLIB_PLAIN=str(int(plain))):
                self.loop = training.make_loop(config, self.model, optimizer, pruner, device)
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
                stack.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=True))
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


def lap(loop: OrdinaryLoop | OurLoop) -> np.ndarray:
    """A whole epoch: seconds of its training, of its two evaluations, of all. Reading waits."""
    start = time.perf_counter()
    loop.train()
    trained = time.perf_counter()
    loop.evaluate()
    loop.evaluate()
    end = time.perf_counter()
    return np.array([trained - start, end - trained, end - start])


def turns(loops: dict[str, OrdinaryLoop | OurLoop], rounds: int) -> dict[str, np.ndarray]:
    """The shortest laps of loops that take turns; the first round only warms up."""
    laps = [{name: lap(loop) for name, loop in loops.items()} for _ in range(rounds + 1)][1:]
    return {name: np.min([each[name] for each in laps], axis=0) for name in loops}


def rates(seconds: np.ndarray, train: int, test: int) -> dict[str, float]:
    """Of such a lap: images a second; of the whole epoch, its training images a second."""
    return dict(zip(WHAT, np.array([train, 2 * test, train]) / seconds, strict=True))


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


def at_once(count: int, kind: str, seconds: float = 0.0, **job) -> list[dict]:
    """So many processes that train at the same time, each for `seconds` and an epoch at least.

    With seconds = 0 they do not warm up: what they need is what counts.

    kind: "ordinary" or "ours". job: arguments of `_work`. Returns a row each: what `rates` says,
    and the peak of memory. Raises RuntimeError where one of them fails.
    """
    ways = context()
    ends, processes = [], []
    try:
        for _ in range(count):
            end, other = ways.Pipe()
            process = ways.Process(target=_work, args=(other, kind, seconds), kwargs=job)
            process.start()
            other.close()
            ends.append(end)
            processes.append(process)
        for end in ends:
            _received(end)
        for end in ends:
            end.send("go")
        return [_received(end) for end in ends]
    finally:
        for process in processes:
            process.join(None if process.exitcode is not None else 10)
            process.kill()


def _received(end: Connection) -> object:
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
    seconds: float,
    config: Config,
    train: int,
    test: int,
    threads: int,
    device: str = "cpu",
) -> None:
    """In the process: warm up, wait for the others, train; train, test: how many images."""
    try:
        torch.set_num_threads(threads)
        where = torch.device(device)
        loop = {"ordinary": OrdinaryLoop, "ours": OurLoop}[kind]
        loop = loop(config, images(train), images(test), where)
        warm = 3 if where.type == "cuda" else 1
        for _ in range(warm if seconds else 0):
            lap(loop)
        connection.send("ready")
        connection.recv()
        laps, start = [], time.perf_counter()
        while not laps or time.perf_counter() - start < seconds:
            laps.append(lap(loop))
        row = rates(np.mean(laps, axis=0), train, test)
        del loop  # and with it the workers of its loaders
        gc.collect()
        connection.send(row | {"peak GiB": flatness.peak_gib(device)})
    except Exception as error:
        with suppress(OSError):
            connection.send(RuntimeError(f"{type(error).__name__}: {error}"))


# The tables


def speed(options: argparse.Namespace) -> list[dict]:
    """Images a second on the CPU: the ordinary loop, ours, and how near the machine's peak."""
    device = torch.device("cpu")
    native = precisions(device)
    peaks = {precision: 0.0 for precision, is_native in native.items() if is_native}
    rows = []
    for name in options.networks:
        config = setting(name, width=options.width)
        train, test = _sizes(name, options)
        half = images(train), images(test)
        loops = {("ordinary", "float32"): OrdinaryLoop(config, *half, device)}
        for precision in peaks:
            peaks[precision] = max(
                peaks[precision], product_rate(device, precision, options.product)
            )
            loops["paperlib", precision] = OurLoop(config.with_(precision=precision), *half, device)
        made = []
        for (loop, precision), seconds in turns(loops, options.rounds).items():
            row = {"network": name, "loop": loop, "precision": precision}
            row |= rates(seconds, train, test)
            made.append(row | {"GFLOP/s": step_flops(config) * row["training"] / 1e9})
        rows += with_ratios(made, made[0])
        del loops
        gc.collect()
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


def threads(options: argparse.Namespace) -> list[dict]:
    """One run on all cores, or as many runs as cores of one thread each: images a second of all."""
    cores = sweep.default_jobs()
    rows = []
    for name in options.networks:
        train = 2 * SETTINGS[name].batch
        job = {"config": setting(name, width=options.width), "train": train, "test": train // 5}
        made = []
        for runs, each in dict.fromkeys([(1, cores), (cores, 1)]):
            done = at_once(runs, "ours", options.seconds, threads=each, **job)
            row = {"network": name, "runs": runs, "threads a run": each}
            row |= {what: sum(one[what] for one in done) for what in WHAT}
            made.append(row | {"peak GiB a run": max(one["peak GiB"] for one in done)})
        rows += with_ratios(made, made[0])
    return rows


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
        for kind in ("ordinary", "ours"):
            (row,) = at_once(1, kind, threads=sweep.default_jobs(), **job)
            loop = {"ours": "paperlib"}.get(kind, kind)
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
            seconds = {"ordinary": turns({"": loop}, 1)[""][2]}
            for precision in [p for p, native in precisions(device).items() if native]:
                run = event_every_epoch(config, 3).with_(data=spec, precision=precision)
                record = training.run(run, None, "cpu")
                seconds[f"paperlib {precision}"] = float(record.epochs.seconds[1:].median())
            for loop, value in seconds.items():
                row = {"network": name, "loop": loop, "images": train, "tested twice": test}
                ratio = seconds["ordinary"] / value
                rows.append(row | {"seconds an epoch": value, "x": ratio})
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
    "threads": threads,
    "memory": memory,
    "evaluation": evaluation,
    "whole": whole,
    "compile": compiled,
}
UNITS = {
    speed: "images a second; x: times the ordinary loop; of peak: of the matrix product's FLOP/s",
    threads: "images a second of all runs together; x: times one run on all cores",
    memory: "GiB of a fresh process",
    evaluation: "images a second",
    whole: "seconds; x: times the ordinary loop's speed",
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
    parser.add_argument("--seconds", type=float, default=3.0, help="that runs at once are timed")
    parser.add_argument("--tested", type=int, default=2000, help="images, by batch size")
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
