"""The pure measures, and what runs measure for the frames of figures 6 and E."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, hessian

from paperlib import data, experiments, instability, measures, training
from paperlib.batches import Batches
from paperlib.config import Config, ConfigError, FilterPruning, Flatness, Noise
from paperlib.runs import RunRecord, Store

torch.set_num_threads(1)

FLATNESS = Flatness(epoch=1, images=8, eigenvalues=4, directions=2, reach=0.2, step=0.1)
BASE = Config(data="digits", train_per_class=4, test_per_class=3, width=1 / 16, epochs=3, batch=16)
PRUNING = FilterPruning((0.4, 0.8), ((0, 1), (0, 2)), target="largest")
PRUNED = BASE.with_(pruning=PRUNING)
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

    config = PRUNED.with_(flatness=FLATNESS, model=f"{__name__}:small")
    config = config.with_(pruning=FilterPruning((0.5,), ((0, 2),)))
    record = training.run(config, device="cpu", callback=keep)
    dataset = data.load("digits").subset(4, 3)
    test = Batches(
        dataset.test_images, dataset.test_labels, dataset.mean, dataset.std, torch.device("cpu")
    )
    images, labels = test.first(8)
    model = small(10, 3).eval()
    names = [name for name, _ in model.named_parameters()]
    shapes = [kept["state"][name].shape for name in names]

    def loss(flat: torch.Tensor, x=images, y=labels) -> torch.Tensor:
        pieces = flat.split([s.numel() for s in shapes])
        weights = {n: p.view(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        return F.cross_entropy(functional_call(model, kept["state"] | weights, (x,)), y)

    flat = torch.cat([kept["state"][name].flatten() for name in names]).double()
    held = torch.cat(
        [
            kept["held"].get(n, torch.zeros(s, dtype=bool)).flatten()
            for n, s in zip(names, shapes, strict=True)
        ]
    )
    assert held.any()
    kept["state"] = {
        k: v.double() if v.is_floating_point() else v for k, v in kept["state"].items()
    }
    images = images.double()
    explicit = hessian(lambda f: loss(f, images))(flat)[~held][:, ~held]
    values, vectors = torch.linalg.eigh(explicit)
    expected = values[values.abs().argsort(descending=True)[:4]]
    assert record.arrays["eigenvalues"] == pytest.approx(expected.numpy(), rel=1e-3)
    noise = 0.0
    for x, y in zip(images, labels, strict=True):
        point = flat.clone().requires_grad_()
        gradient = torch.autograd.grad(loss(point, x[None], y[None]), point)[0]
        noise += float(gradient[~held].square().sum()) / 8
    assert float(record.arrays["noise"]) == pytest.approx(noise, rel=1e-4)
    assert record.arrays["epsilons"] == pytest.approx([-0.2, -0.1, 0, 0.1, 0.2])
    everything = torch.cat([x for x, _ in test.evaluation()]).double()
    all_labels = torch.cat([y for _, y in test.evaluation()])
    chosen = expected.sort(descending=True).values[:2]
    for row, value in zip(record.arrays["losses"], chosen, strict=True):
        direction = torch.zeros_like(flat)
        direction[~held] = vectors[:, (values - value).abs().argmin()]
        ends = sorted(
            float(loss(flat + eps * direction, everything, all_labels)) for eps in (-0.2, 0.2)
        )
        assert sorted((row[0], row[-1])) == pytest.approx(ends, abs=1e-4)
        assert row[2] == pytest.approx(float(loss(flat, everything, all_labels)), abs=1e-5)


def small(num_classes: int, in_channels: int) -> torch.nn.Module:
    """A smooth network of few parameters."""
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
    frame = measures.flatness([FIRST, FLAT]).set_index("run")
    assert frame.loc[FIRST.run].to_dict() == {
        "curvature": 2.0,
        "noise": 8.0,
        "tic": 4.0,
        "delta_w": 0.1,
    }
    assert math.isnan(frame.delta_w[FLAT.run])
    assert frame.tic[FLAT.run] == 0.5


def test_delta_w_of_known_losses():
    epsilons = [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3]
    losses = [[1.3, 1.05, 1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.05, 1.11, 1.2]]
    assert measures.delta_w(losses, epsilons, 1.0) == 0.2
    assert math.isnan(measures.delta_w(losses, epsilons, 1.0, rise=0.5))
    losses[0][2] = math.nan
    assert measures.delta_w(losses, epsilons, 1.0) == 0.1


def test_tic():
    assert measures.tic(6.0, [5.0, -2.0]) == 2.0


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


def test_the_arrays_survive_the_store(tmp_path):
    store = Store(tmp_path)
    config = PRUNED.with_(flatness=FLATNESS)
    run = training.run(config, store, "cpu")
    again = measures.flatness(store.records([config.identity]))
    assert again.equals(measures.flatness([run]))


@pytest.mark.parametrize("profile", experiments.PROFILES)
def test_measured_near_the_end_after_all_events(profile):
    measured = [c for c in experiments.plan("figure-6", profile).config if c.seed == 0]
    assert len(measured) == (5 if profile == "smoke" else 6)  # there, 1% and 13% are the same
    for config in measured:
        events = config.pruning.epochs if config.pruning else ()
        last = max((max(epochs) for epochs in events), default=0)
        assert last < config.flatness.epoch < config.epochs
        assert config.flatness.epoch >= 0.9 * (config.epochs - 1)
        assert 0 in config.flatness.epsilons


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"step": 0.0}, "0"),
        ({"step": 0.5}, "0.5"),
        ({"directions": 200}, "200"),
        ({"images": 0}, "0"),
    ],
)
def test_what_cannot_be_measured(changes, value):
    with pytest.raises(ConfigError, match=value):
        Flatness(epoch=1, **changes)


def test_measures_import_no_torch():
    code = "import sys, paperlib.measures; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
    assert measures.stability is instability.stability
