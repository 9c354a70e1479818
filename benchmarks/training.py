"""Training on the CPU against the ordinary loop, on the same machine in the same run.

    python -m benchmarks.training
    python -m benchmarks.training --networks resnet20 --rounds 5

The ordinary loop is a DataLoader with two workers over PIL images and torchvision's transforms,
masks multiplied into weights and batch norm on every forward pass, the loss read every batch, and
two evaluations an epoch. Ours evaluates once, and again only after an event. Loops take turns in
one process of one thread; the best of some rounds counts, after one that warms up. For a GPU see
`benchmarks.gpu`.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
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

from benchmarks.machine import machine
from paperlib import data, training
from paperlib.batches import Batches
from paperlib.config import Config, FilterPruning, WeightPruning
from paperlib.devices import memory_format
from paperlib.extras.fast import WORKER_ENVIRONMENT, loops
from paperlib.loop import finish
from paperlib.papers import regularization_2018, tradeoff_2020
from paperlib.pruning import FilterPruner
from paperlib.streams import generator

Half = tuple[Tensor, Tensor]  # images and labels: all of training, or all of test

MEAN, STD = data.CIFARS["cifar10"].mean, data.CIFARS["cifar10"].std
WORKERS = 2
BATCHES = {"vgg11_bn": 8, "resnet20": 10, "resnet18": 2, "conv4": 10}  # an epoch here
# The networks as the papers prune them, all events in one.
SETTINGS = {
    "vgg11_bn": tradeoff_2020.VGG11.with_(
        pruning=FilterPruning(tradeoff_2020.VGG_FRACTIONS, scratch=True)
    ),
    "resnet20": tradeoff_2020.SGD.with_(
        model="resnet20", pruning=FilterPruning((0.1,) * 18, score="l1", scratch=True)
    ),
    "resnet18": tradeoff_2020.RESNET18.with_(
        pruning=FilterPruning(tradeoff_2020.RESNET_FRACTIONS, scratch=True)
    ),
    "conv4": regularization_2018.CONV4.with_(
        pruning=WeightPruning(("dense",), (regularization_2018.CONV4_FRACTION,), (0,))
    ),
}


def setting(name: str, **changes: object) -> Config:
    """Return a network's configuration, with augmentation."""
    return SETTINGS[name].with_(augment=True, **changes)


def with_events(config: Config, events: int, epochs: int) -> Config:
    """Return a run of so many epochs, the first of which have events."""
    at, p = tuple(range(events)), config.pruning
    if isinstance(p, FilterPruning):
        p = replace(p, scratch=False, epochs=(at,) * len(p.fractions))
    else:
        p = replace(p, epochs=at)
    return config.with_(epochs=epochs, pruning=p, milestones=())


def images(count: int) -> Half:
    """Return random images of CIFAR's size and labels."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 32, 32), generator=draw, dtype=torch.uint8)
    return pixels, torch.randint(10, (count,), generator=draw)


@contextmanager
def written_images(train: int, test: int) -> Iterator[str]:
    """Write random images, of which 101 differ, to a .zip that `data.load` takes."""
    files = []
    for pixels in images(101)[0].permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=0)
        files.append(file.getvalue())
    with tempfile.TemporaryDirectory(prefix="paperlib-bench-") as folder:
        path = Path(folder, "images.zip")
        with zipfile.ZipFile(path, "w") as archive:
            for split, count in (("train", train), ("test", test)):
                for i in range(count):
                    archive.writestr(f"{split}/{i % 10}/{i // 10:05}.png", files[i % 101])
        with mock.patch.dict(os.environ, PAPERLIB_DATA=folder):
            yield f"images:{path}"


class Pictures(Dataset):
    """A data set the ordinary way: one PIL image at a time, transformed on its own."""

    def __init__(self, pixels: Tensor, labels: Tensor, augment: bool = False) -> None:
        self.pixels, self.labels = pixels.permute(0, 2, 3, 1).numpy(), labels.tolist()
        augmentation = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        usual = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        self.transform = transforms.Compose([*(augmentation if augment else []), *usual])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class Masked(nn.Module):
    """A convolution, dense layer or batch norm that multiplies by a mask in every forward pass.

    The mask is (filters,), of weight and bias, or of the weight's shape, of the weight alone.
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
    """Return the network on its device, pruned, and its pruner."""
    layout = memory_format(torch.device(device), config.precision)
    ours = training.build(config).to(device, memory_format=layout)
    pruner = training.make_pruner(config, ours)
    pruner.prune(1, 1)
    return ours, pruner


def masked(config: Config) -> nn.Module:
    """Return the same network the ordinary way: masks in the forward pass, and no zeros."""
    model, pruner = pruned(config)
    model.load_state_dict(training.build(config).state_dict(), strict=False)
    for name, mask in pruner.masks.items():
        names = [name]
        if isinstance(pruner, FilterPruner):
            norm = pruner.layers[name].norm
            names += [other for other, module in model.named_modules() if module is norm]
        for each in names:
            parent, _, last = each.rpartition(".")
            setattr(model.get_submodule(parent), last, Masked(model.get_submodule(each), mask))
    return model.to(memory_format=torch.contiguous_format)


class OrdinaryLoop:
    """The loop that one would write without this package."""

    evaluations = 2  # an epoch

    def __init__(
        self, config: Config, train: Half, test: Half, device: torch.device, workers: int = WORKERS
    ) -> None:
        self.device, self.model = device, masked(config).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), config.learning_rate)
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(
                self.model.parameters(),
                config.learning_rate,
                config.momentum,
                weight_decay=config.weight_decay,
            )
        options = {"num_workers": workers, "persistent_workers": workers > 0}
        options["pin_memory"] = device.type == "cuda"
        self.loader = DataLoader(
            Pictures(*train, augment=config.augment), config.batch, shuffle=True, **options
        )
        self.test_loader = DataLoader(Pictures(*test), config.batch, **options)

    def train(self) -> None:
        """Train one epoch."""
        self.model.train()
        for x, y in self.loader:
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            loss.item()

    @torch.no_grad()
    def evaluate(self) -> None:
        """Test once."""
        self.model.eval()
        for x, y in self.test_loader:
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            (self.model(x).argmax(1) == y).sum().item()


class OurLoop:
    """An epoch of `training.run` without an event."""

    evaluations = 1

    def __init__(self, config: Config, train: Half, test: Half, device: torch.device) -> None:
        self.config, self.epochs, self.stream = config, 0, loops.new_stream(device)
        with training.computing(config, self.stream):
            model, pruner = pruned(config, device)
            parts = config, model, training.make_optimizer(config, model), pruner, device
            self.loop = training.make_loop(*parts, fast=True)
            half = (MEAN, STD, device)
            layout = memory_format(device, config.precision)
            self.batches = Batches(*train, *half, config.batch, config.augment, layout)
            self.test = Batches(*test, *half, layout=layout)
        self.size = training.evaluation_batch(device)

    def train(self) -> None:
        """Train one epoch; reading its loss waits for it."""
        self.epochs += 1
        drawn = (generator(0, name, self.epochs) for name in ("order", "augmentation"))
        with training.computing(self.config, self.stream):
            finish(self.loop.launch(self.batches, *drawn)).read()

    def evaluate(self) -> None:
        """Test once."""
        with training.computing(self.config, self.stream):
            self.loop.evaluate(self.test, self.size).read()


def lap(loop: OrdinaryLoop | OurLoop) -> float:
    """Return the seconds of a whole epoch, evaluations included."""
    start = time.perf_counter()
    loop.train()
    for _ in range(loop.evaluations):
        loop.evaluate()
    return time.perf_counter() - start


def step_flops(config: Config) -> int:
    """Return the operations of a training step, an image: products and sums, dense."""
    model = training.build(config).to("meta")
    with FlopCounterMode(display=False) as counter:
        x = torch.empty(2, 3, 32, 32, device="meta")
        F.cross_entropy(model(x), torch.zeros(2, dtype=torch.int64, device="meta")).backward()
    return counter.get_total_flops() // 2


def precisions(device: torch.device) -> list[str]:
    """Return the precisions that a device computes in."""
    return ["float32", *(["bfloat16"] if loops.native_bfloat16(device) else [])]


def speed(options: argparse.Namespace) -> list[dict]:
    """Whole epochs of both loops, in images a second."""
    device, rows = torch.device("cpu"), []
    for name in options.networks:
        config = setting(name, width=options.width)
        train = (options.batches or BATCHES[name]) * config.batch
        halves = images(train), images(train // 5)  # five to one, as in CIFAR
        loops = {("ordinary", "float32"): OrdinaryLoop(config, *halves, device)}
        for p in precisions(device):
            loops["paperlib", p] = OurLoop(config.with_(precision=p), *halves, device)
        laps = np.array([[lap(x) for x in loops.values()] for _ in range(options.rounds + 1)])
        best = laps[1:].min(0)
        for (loop, precision), seconds in zip(loops, best, strict=True):
            row = {"network": name, "loop": loop, "precision": precision}
            row |= {"images a second": train / seconds, "x": best[0] / seconds}
            rows.append(row | {"GFLOP/s": step_flops(config) * train / seconds / 1e9})
    return rows


def table(rows: list[dict]) -> str:
    """Return rows as text."""
    return pd.DataFrame(rows).to_string(index=False, na_rep="", float_format="{:,.3g}".format)


def main(argv: list[str] | None = None) -> dict:
    """Measure, print and return everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=2, help="that count, after one to warm up")
    parser.add_argument("--batches", type=int, help="an epoch; default: by network")
    parser.add_argument("--width", type=float, default=1.0, help="of the networks")
    parser.add_argument("--out", type=Path, help="JSON file of everything printed")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results: dict = {"machine": machine("cpu"), "speed": speed(options)}
    print(f"{speed.__doc__}\n{table(results['speed'])}\n", flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    if "MALLOC_TOP_PAD_" in os.environ:
        main()
    else:  # as a worker: glibc reads these once
        command = [sys.executable, "-m", "benchmarks.training", *sys.argv[1:]]
        subprocess.run(command, env=os.environ | WORKER_ENVIRONMENT, check=True)
