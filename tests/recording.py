"""Stands in for CUDA graphs on a CPU, and is as strict.

`Recording` writes down each operation with the very tensors that it read and wrote, and repeats
those without any Python between them. It refuses whatever a capture refuses.
"""

import pandas as pd
import pytest
import small
import torch
from small import SCRATCH, VGG, numbers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paperlib import training
from paperlib.config import Config, FilterPruning, Flatness, Noise, WeightPruning
from paperlib.extras.fast.graphs import CapturedLoop

torch.set_num_threads(1)

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
MAKE_LOOP = training.make_loop


class Recording(TorchDispatchMode):
    """A graph of a function, as on a GPU, but executed once when it is made."""

    made = 0

    def __init__(self, function):
        super().__init__()
        self.operations, self.fresh = [], True
        Recording.made += 1
        with self:
            function()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in WAITS:
            raise RuntimeError(f"{name} waits for the device within a capture")
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        if self.fresh:  # executed when it was made
            self.fresh = False
            return
        for function, args, kwargs, out in self.operations:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def captured(monkeypatch):
    """All runs by captured loops; gives what makes their graphs, which counts them."""

    def make_loop(config, model, optimizer, pruner, device, fast):
        loop = MAKE_LOOP(config, model, optimizer, pruner, device)
        return CapturedLoop(model, optimizer, pruner, loop.autocast, Recording)

    monkeypatch.setattr(training, "make_loop", make_loop)
    monkeypatch.setattr(Recording, "made", 0)
    return Recording


BASE, CONV = VGG.with_(epochs=5), small.CONV.with_(epochs=5)
PRUNING = FilterPruning((0.3, 0.3, 0.3, 0.9), ((1,), (1, 2), (2,), (1, 2, 3)), target="largest")
ALL = ((1, 2), (1, 2), (2,), (1, 3))
PLAIN_NORM = FilterPruning(PRUNING.fractions, PRUNING.epochs, target="largest", norm=False)
SETTINGS = {
    "plain": BASE,
    "milestones": BASE.with_(milestones=(2, 3)),
    "sgd": BASE.with_(optimizer="sgd", momentum=0.9, weight_decay=0.01, augment=True),
    "filters": BASE.with_(pruning=PRUNING),
    "scratch": BASE.with_(pruning=SCRATCH.pruning),
    "residual": BASE.with_(  # of 5 batches: the 10th pass, which is observed, ends an epoch
        model="resnet18",
        batch=10,
        pruning=FilterPruning((0.25, 0.4, 0.25, 0.9), ALL, "activation"),
    ),
    "many layers": BASE.with_(
        model="resnet20", width=0.5, pruning=FilterPruning((0.2,) * 18, ((1, 3),) * 18, "l1")
    ),
    "weights": CONV.with_(pruning=WeightPruning(("dense",), (0.9,), (1, 2, 3))),
    "dropout": CONV.with_(dropout=(0.25, 0.5), augment=True),
    "zeroing": BASE.with_(pruning=PLAIN_NORM, noise=Noise("zeroing", 5, 16)),
    "gaussian": BASE.with_(pruning=PLAIN_NORM, noise=Noise("gaussian", 9, 16)),
    "restored": BASE.with_(pruning=PLAIN_NORM, noise=Noise("restored", 3, 16)),
    "flatness": BASE.with_(
        pruning=PRUNING, flatness=Flatness(3, images=8, eigenvalues=2, directions=1, step=0.2)
    ),
    "histograms": BASE.with_(pruning=PRUNING, histograms=True),
}


def expected(config: Config) -> pd.DataFrame:
    """By the plain loop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_loop", MAKE_LOOP)
        patch.setenv("PAPERLIB_PLAIN", "1")
        return numbers(config)
