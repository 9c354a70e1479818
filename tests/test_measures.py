"""The pure measures, and what runs measure for the frames of figures 6 and E."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from explicit import Explicit
from small import VGG, images_of

from paperlib import measures, training
from paperlib.config import FilterPruning, Flatness, Noise
from paperlib.runs import RunRecord

torch.set_num_threads(1)

FLATNESS = Flatness(epoch=1, images=8, eigenvalues=4, directions=2, reach=0.2, step=0.1)
BASE = VGG.with_(train_per_class=4, test_per_class=3, learning_rate=0.001)
PRUNING = FilterPruning((0.4, 0.8), ((0, 1), (0, 2)), target="largest")
KINDS = {
    "activation": BASE.with_(pruning=replace(PRUNING, score="activation")),
    "noise": BASE.with_(pruning=replace(PRUNING, norm=False), noise=Noise("gaussian", 3)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_measuring_changes_no_other_number(kind):
    """Nor what comes after it: the weights, batch norm's statistics and all randomness stay."""
    plain = training.run(KINDS[kind], device="cpu").epochs
    measured = training.run(KINDS[kind].with_(flatness=FLATNESS), device="cpu").epochs
    assert plain.drop(columns="seconds").equals(measured.drop(columns="seconds"))


def test_what_a_run_measures():
    """Against an explicit Hessian of the network as it was at the end of that epoch."""
    kept = {}

    def keep(moment: training.Moment) -> None:
        if moment.epoch == FLATNESS.epoch:
            kept["state"] = {k: v.clone() for k, v in moment.model.state_dict().items()}
            kept["held"] = {k: v.clone() for k, v in moment.pruner.held().items()}

    pruning = FilterPruning((0.5,), ((0, 2),))
    config = BASE.with_(flatness=FLATNESS, model=f"{__name__}:smooth", pruning=pruning)
    arrays = training.run(config, device="cpu", callback=keep).arrays
    test = images_of(config, "test")
    images, labels = test.first(8)
    model = smooth(10, 3).double()
    model.load_state_dict(kept["state"])
    exact = Explicit(model, images.double(), labels, kept["held"])
    assert not exact.free.all()
    expected = exact.eigenvalues(4)
    assert arrays["eigenvalues"] == pytest.approx(expected.numpy(), rel=1e-3)
    assert float(arrays["noise"]) == pytest.approx(exact.trace(), rel=1e-4)
    assert arrays["epsilons"] == pytest.approx([-0.2, -0.1, 0, 0.1, 0.2])
    x, y = test.first(30)
    values, vectors = torch.linalg.eigh(exact.hessian())
    for row, value in zip(arrays["losses"], expected.sort(descending=True).values[:2], strict=True):
        direction = vectors[:, (values - value).abs().argmin()]
        moved = [
            float(exact.loss(exact.flat + eps * direction, x.double(), y)) for eps in (-0.2, 0, 0.2)
        ]
        assert sorted((row[0], row[-1])) == pytest.approx(sorted((moved[0], moved[2])), abs=1e-4)
        assert row[2] == pytest.approx(moved[1], abs=1e-5)


def smooth(num_classes: int, in_channels: int) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.AvgPool2d(8),
        torch.nn.Conv2d(in_channels, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.Linear(16, num_classes),
    )


def record(seed: int, **arrays) -> RunRecord:
    return RunRecord(BASE.with_(seed=seed), pd.DataFrame(), arrays)


FIRST = record(
    0,
    eigenvalues=np.array([3.0, -2.0, 1.0], np.float32),
    noise=np.array(8.0),
    epsilons=np.array([-0.2, -0.1, 0.0, 0.1, 0.2]),
    losses=np.array([[2.0, 1.2, 1.0, 1.05, 1.3], [1.0, 1.0, 1.0, 1.01, 1.02]]),
    accuracies=np.zeros((2, 5)),
)
FLAT = record(1, **FIRST.arrays | {"losses": np.ones((2, 5)), "noise": np.array(1.0)})


def test_flatness():
    """FIRST's loss rises by 0.1 halfway from 0 to -0.1, where it has risen by 0.2."""
    frame = measures.flatness([FIRST, FLAT]).set_index("run")
    first = {"curvature": 2.0, "noise": 8.0, "tic": 4.0, "delta_w": 0.05}
    assert frame.loc[FIRST.run].to_dict() == pytest.approx(first)
    assert math.isnan(frame.delta_w[FLAT.run])
    assert frame.tic[FLAT.run] == 0.5


E = [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("losses", "rise", "expected"),
    [
        ([1.3, 1.05, 1.0, 1.0, 1.0, 1.0, 1.0], 0.1, 0.22),
        ([1.0, 1.0, 1.0, 1.0, 1.05, 1.15, 1.0], 0.1, 0.15),  # the first time, of several
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.1, 1.2], 0.1, 0.2),  # on a point
        ([1.2, 1.1, 1.0, 1.0, 1.0, 1.0, 1.0], 0.3, math.nan),  # not within reach
        ([1.0, 1.0, 1.0, 1.0, 1.05, math.nan, 1.0], 0.1, 0.2),
        ([math.inf, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 0.1, 0.3),
    ],
)
def test_delta_w_by_hand(losses, rise, expected):
    flat = [1.0] * len(E)
    found = measures.delta_w([flat, losses, flat], E, 1.0, rise)
    assert found == pytest.approx(expected, nan_ok=True)
    order = [3, 6, 0, 2, 5, 1, 4]
    shuffled = np.array([losses, flat])[:, order], np.array(E)[order]
    assert measures.delta_w(*shuffled, 1.0, rise) == pytest.approx(found, nan_ok=True)


def test_spectra_and_rises():
    spectra = measures.spectra([FIRST, FLAT])
    mine = spectra[spectra.run == FIRST.run]
    assert mine["rank"].tolist() == [1, 2, 3]
    assert mine.eigenvalue.tolist() == [3, -2, 1]
    assert mine.magnitude.tolist() == [3, 2, 1]
    rises = measures.rises([FIRST, FLAT])
    assert len(rises) == 20
    at = rises[(rises.run == FIRST.run) & (rises.direction == 0)].set_index("epsilon").rise
    assert at.to_dict() == pytest.approx({-0.2: 1, -0.1: 0.2, 0: 0, 0.1: 0.05, 0.2: 0.3})
    assert (rises[rises.run == FLAT.run].rise == 0).all()
