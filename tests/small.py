"""Small runs and networks that several tests use, and a small web server."""

import math
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from paperlib import data
from paperlib.batches import Batches
from paperlib.config import Config, FilterPruning, WeightPruning
from paperlib.runs import RunRecord
from paperlib.training import run

torch.set_num_threads(1)

VGG = Config(
    data="digits",
    train_per_class=5,
    test_per_class=6,
    width=1 / 16,
    epochs=3,
    batch=16,
    learning_rate=0.01,
)
CONV = VGG.with_(model="conv4", optimizer="sgd", momentum=0.9, weight_decay=0.01)
PRUNED = VGG.with_(
    pruning=FilterPruning((0.3, 0.3, 0.3, 0.9), ((1,), (1, 2), (2,), (1, 2)), target="largest")
)
SCRATCH = VGG.with_(pruning=FilterPruning((0.3, 0.9), scratch=True))
WEIGHTS = CONV.with_(pruning=WeightPruning(("dense",), (0.5,), (0, 2)))
TWO_LAYERS = WeightPruning(("features.2", "dense"), (0.4, 0.5), (0, 2), "smallest")
same = pd.DataFrame.equals
NUMBERS = ["train_loss", "train_accuracy", "test_loss", "pre", "post"]
GONE = 9 + 9 + 9 + 28


def numbers(config: Config, **options) -> pd.DataFrame:
    return run(config, device="cpu", **options).epochs.drop(columns="seconds")


def record(config: Config, arrays: dict | None = None, **columns) -> RunRecord:
    """Of a run that was not done: each column is one number, or those given."""
    constant = {"trained": True, "train_loss": 0.01, "pre": 80.0, "post": 70.0, "removed": 1}
    rows = {"epoch": range(config.epochs), **constant, "seconds": 1.0, **columns}
    return RunRecord(config, pd.DataFrame(rows), arrays or {})


def images_of(config: Config, half: str) -> Batches:
    """The "train" or "test" images of a run."""
    chosen = data.load(config.data).subset(config.train_per_class, config.test_per_class)
    images, labels = getattr(chosen, f"{half}_images"), getattr(chosen, f"{half}_labels")
    return Batches(images, labels, chosen.mean, chosen.std, "cpu")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@contextmanager
def served(folder):
    """The address at which a folder is served, on loopback."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Tiny(nn.Module):
    """Its loss is NaN from the `last`-th training pass on; `wrap` is around its output."""

    def __init__(self, num_classes, in_channels, last=math.inf, wrap=lambda out: out):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 8, 3, stride=4)
        self.fc = nn.Linear(8, num_classes)
        self.passes, self.last, self.wrap = 0, last, wrap

    def forward(self, x):
        self.passes += self.training
        out = self.fc(F.relu(self.conv(x)).mean((2, 3)))
        return self.wrap(out * (math.nan if self.passes >= self.last else 1))


def nan_at_pass_six(num_classes, in_channels):
    return Tiny(num_classes, in_channels, last=6)


def logits_in_an_object(num_classes, in_channels):
    return Tiny(num_classes, in_channels, wrap=lambda out: SimpleNamespace(logits=out, other=0))


def logits_in_a_dict(num_classes, in_channels):
    return Tiny(num_classes, in_channels, wrap=lambda out: {"logits": out})


def logits_in_a_pair(num_classes, in_channels):
    return Tiny(num_classes, in_channels, wrap=lambda out: (out, out))


def tiny(num_classes, in_channels):
    return Tiny(num_classes, in_channels)


def random_in_evaluation(num_classes, in_channels):
    return Tiny(num_classes, in_channels, wrap=F.dropout)


def mixes_images(num_classes, in_channels):
    return Tiny(num_classes, in_channels, wrap=lambda out: out - out.mean(0))


def detached(num_classes, in_channels):
    return Tiny(num_classes, in_channels, wrap=torch.detach)


def eight_outputs(num_classes, in_channels):
    return Tiny(num_classes, in_channels, wrap=lambda out: out[:, :8])


def largest_weight(conv: nn.Conv2d) -> torch.Tensor:
    return conv.weight.flatten(1).amax(1)


def broken_score(conv: nn.Conv2d) -> torch.Tensor:
    raise KeyError("broken score")


def random_score(conv: nn.Conv2d) -> torch.Tensor:
    return torch.rand(conv.out_channels)


part_of_a_score = partial(largest_weight)


def norm_at_the_end(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(Chain(num_classes, in_channels), nn.BatchNorm1d(num_classes))


class Chain(nn.Sequential):
    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, 8, 3, stride=4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, num_classes),
        )


class Plus(nn.Module):
    """A residual block with a plain sum, and dropout before it."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, stride=4, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.block = PlusBlock()
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        out = self.block(self.drop(self.norm(self.stem(x)).relu()))
        return self.fc(out.mean((2, 3)))


class PlusBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        out = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(out)) + x).relu()
