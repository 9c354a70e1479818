"""What is measured beside a run, and that it changes no other number."""

import copy
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import PRUNED, SCRATCH, TWO_LAYERS, VGG, WEIGHTS, images_of, numbers, same
from torch import nn

from paperlib import diagnostics, training
from paperlib.batches import Batches
from paperlib.config import ConfigError, FilterPruning, Flatness, Noise
from paperlib.loop import PlainLoop
from paperlib.runs import Store
from paperlib.training import TrainingError, build, run


def test_histograms_of_batch_norms():
    record = run(VGG.with_(histograms=True), device="cpu")
    assert same(record.epochs.drop(columns="seconds"), numbers(VGG))
    model = build(VGG)
    (out, _), expected = images_of(VGG, "train").first(50), []
    for layer in model.features:
        if isinstance(layer, nn.BatchNorm2d):
            centered = out - out.mean((0, 2, 3), keepdim=True)
            z = centered / (centered.square().mean((0, 2, 3), keepdim=True) + layer.eps).sqrt()
            expected.append(np.histogram(z.detach().numpy(), 200, (-5, 5), density=True)[0])
        out = layer(out)
    assert record.arrays["untrained"].shape == (8, 200)
    assert np.allclose(record.arrays["untrained"], expected, atol=0.02)
    assert np.allclose(record.arrays["trained"].sum(1) * 10 / 200, 1)
    assert not np.allclose(record.arrays["untrained"], record.arrays["trained"], atol=0.02)


@pytest.mark.parametrize(
    ("values", "bins"),
    [
        ([0.0, 0.0], {}),
        ([0.0, -1.02, 1.05, 1.01], {120: 3}),
        ([0.5, -0.5, 0.105, 1.05e-3], {113: 2, 100: 1, 60: 1}),
        ([1e-9, -1e-30, 2e-6], {0: 2, 6: 1}),
        ([10.0, 1e9, -9.9], {139: 3}),
    ],
)
def test_magnitudes_by_hand(values, bins):
    """Bins of a twentieth of a decade from 1e-6 on: the i-th from 10 ** (i / 20 - 6)."""
    counts = diagnostics.magnitudes(torch.tensor(values, dtype=torch.float64).view(1, -1))
    assert counts.shape == (140,)
    assert {int(i): int(counts[i]) for i in counts.nonzero()[0]} == bins


@pytest.mark.parametrize(
    "config",
    [WEIGHTS, WEIGHTS.with_(epochs=4, optimizer="adam", pruning=TWO_LAYERS, momentum=0)],
)
def test_what_is_recorded_of_pruned_weights(config):
    seen = []

    def look(moment):
        layers = {name: layer.weight for name, layer in moment.pruner.layers.items()}
        seen.append({name: weight.detach().clone() for name, weight in layers.items()})

    record = run(config.with_(histograms=True), None, "cpu", look)
    last = config.pruning.epochs[-1]
    names = config.pruning.layers
    moments = ("before", "after", "end", "kept")
    assert set(record.arrays) == {"edges"} | {f"{m}.{name}" for m in moments for name in names}
    assert np.array_equal(record.arrays["edges"], diagnostics.MAGNITUDES)
    for name in names:
        for moment, epoch in (("after", last), ("end", -1)):
            expected = diagnostics.magnitudes(seen[epoch][name])
            assert np.array_equal(record.arrays[f"{moment}.{name}"], expected)
        # Before the first event nothing is zero.
        weights = seen[0][name].numel()
        assert record.arrays[f"before.{name}"].sum() == weights
        assert record.arrays[f"after.{name}"].sum() < weights
    assert same(record.epochs.drop(columns="seconds"), numbers(config))


CHOSEN = FilterPruning((0.3, 0.5), ((0, 2), (1, 2)), "activation", "largest", norm=False)
MEASURED = {
    "filters": PRUNED.with_(augment=True),
    "scratch": SCRATCH,
    "activation": VGG.with_(
        model="resnet18", pruning=FilterPruning((0.3, 0.5), ((0, 1), (1, 2)), "activation")
    ),
    "random": VGG.with_(pruning=FilterPruning((0.5,), ((0, 2),), target="random")),
    "weights": WEIGHTS.with_(dropout=(0.25, 0.5)),
    "plus": VGG.with_(
        model="small:Plus", learning_rate=0.05, pruning=FilterPruning((0.5, 0.7), ((0, 1), (1,)))
    ),
    **{
        kind: VGG.with_(pruning=CHOSEN, noise=Noise(kind, 5, evaluation_batch=16))
        for kind in ("zeroing", "gaussian", "restored")
    },
}


def all_tensors(moment) -> dict[str, np.ndarray]:
    """A callback: everything that the network and the pruner hold, at every epoch."""
    state = dict(moment.model.named_parameters()) | dict(moment.model.named_buffers())
    state |= {f"pruner {name}": t for name, t in moment.pruner.state_dict().items()}
    return {f"{moment.epoch} {k}": t.detach().clone().numpy() for k, t in state.items()}


@pytest.mark.parametrize("name", MEASURED)
def test_measuring_changes_no_number(name, monkeypatch):
    record = run(MEASURED[name], None, "cpu", all_tensors)
    monkeypatch.setattr(training.Run, "replica", lambda run: None)
    for measure in ("training_loss", "recalibrated", "distance"):
        monkeypatch.setattr(diagnostics, measure, lambda *arguments: math.nan)
    plain = run(MEASURED[name], None, "cpu", all_tensors)
    beside = list(training.BESIDE)
    assert plain.epochs[beside].isna().all(axis=None)
    assert list(plain.epochs) == list(record.epochs)
    assert same(*(each.epochs.drop(columns=["seconds", *beside]) for each in (plain, record)))
    assert list(plain.arrays) == list(record.arrays)
    for key, array in plain.arrays.items():
        assert array.tobytes() == record.arrays[key].tobytes(), key
    event = (record.epochs.removed > 0) & (MEASURED[name].noise is None)
    assert (record.epochs.removed > 0).any()
    assert record.epochs.pre_loss.notna().equals(event)
    assert record.epochs.post_loss.notna().equals(event)
    with_norm = event & (name != "weights")
    assert record.epochs.recalibrated.notna().equals(with_norm)
    assert record.epochs.distance.notna().tolist() == [False, False, True]


@pytest.mark.parametrize("name", ["filters", "scratch", "activation", "weights", "plus"])
def test_what_is_measured_by_hand(name, monkeypatch):
    """Of copies of the pruned network, hooks included, whose observers are not due."""
    monkeypatch.setattr(diagnostics, "LOSS_IMAGES", 30)
    monkeypatch.setattr(diagnostics, "RECALIBRATION_IMAGES", 41)
    monkeypatch.setattr(diagnostics, "RECALIBRATION_BATCH", 10)
    config = MEASURED[name]
    train, seen, last = images_of(config, "train"), [], []

    @torch.no_grad()
    def look(moment):
        network = copy.deepcopy(moment.model).eval()
        images, labels = train.first(30)
        loss = F.cross_entropy(network(images), labels).item()
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        mixed = torch.randperm(41, generator=torch.Generator().manual_seed(0))
        for batch in train.first(41)[0][mixed[:40]].split(10):  # no last batch of one image
            network(batch)
        x, y = next(moment.test.evaluation(1000))
        correct = (network.eval()(x).argmax(1) == y).double().mean().item()
        seen.append((loss, 100 * correct if norms else math.nan))
        last[:] = [p.detach().clone().flatten() for p in moment.model.parameters()]

    rows = numbers(config, callback=look)
    event = rows.removed > 0
    losses, accuracies = np.array(seen)[event].T
    assert np.allclose(rows.post_loss[event], losses, rtol=1e-5)
    assert np.allclose(rows.recalibrated[event], accuracies, equal_nan=True)
    assert name == "weights" or not (rows.recalibrated == rows.post)[event].all()
    initial = torch.cat([p.detach().flatten() for p in build(config).parameters()])
    moved = torch.linalg.vector_norm(torch.cat(last) - initial) / torch.linalg.vector_norm(initial)
    assert rows.distance.iloc[-1] == pytest.approx(moved.item(), rel=1e-5)


def test_recalibration_mixes_classes():
    """Images of a folder come class by class; their statistics are those of all classes."""
    values = torch.arange(10, dtype=torch.uint8).repeat_interleave(400) * 25
    images = values[:, None, None, None].expand(-1, 3, 4, 4).contiguous()
    labels = torch.arange(10).repeat_interleave(400)
    batches = Batches(images, labels, (0.0,) * 3, (1.0,) * 3, "cpu")
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    loop = PlainLoop(model, torch.optim.SGD(model.parameters()), None, nullcontext)
    diagnostics.recalibrated(model, loop, batches, 1000, batches)
    pixels = values.double() / 255
    assert norm.running_mean.numpy() == pytest.approx(pixels.mean().item(), rel=0.02)
    assert norm.running_var.numpy() == pytest.approx(pixels.var().item(), rel=0.05)


def test_what_cannot_be_measured_is_refused_before_training():
    """Histograms without batch norm, too many eigenvalues, and a loss without derivatives."""
    conv4 = VGG.with_(model="conv4", histograms=True, width=1 / 16)
    many = VGG.with_(flatness=Flatness(0, eigenvalues=10**9))
    for config, named in ((conv4, "BatchNorm2d"), (many, "1000000000")):
        with pytest.raises(ConfigError, match=named):
            run(config, device="cpu", callback=lambda moment: pytest.fail("it has trained"))
    detached = VGG.with_(model="small:detached", flatness=Flatness(0, eigenvalues=10))
    with pytest.raises(ValueError, match="cannot be differentiated"):
        run(detached, device="cpu", callback=lambda moment: pytest.fail("it has trained"))


def test_flatness_that_fails_later_is_the_failure_of_the_run(tmp_path):
    held = VGG.with_(pruning=FilterPruning((0.9,), scratch=True, layers=("conv",)))
    few = held.with_(model="small:tiny", flatness=Flatness(1, eigenvalues=200, directions=1))
    store = Store(tmp_path)
    with pytest.raises(TrainingError, match=f"{few.identity}.* at epoch 1.*free parameters"):
        run(few, store, "cpu")
    assert "epoch 1" in store.failure(few.identity)


def test_histograms_draw_dropout_from_a_stream_of_their_own():
    config = VGG.with_(model="small:Plus", histograms=True, epochs=1)
    arrays = []
    for chance in (1, 2):
        torch.manual_seed(chance)
        arrays.append(run(config, device="cpu").arrays)
    for name in ("untrained", "trained"):
        assert np.array_equal(*(of[name] for of in arrays))


def test_an_array_of_objects_is_refused():
    with pytest.raises(TrainingError, match=r"'odd'.* holds objects"):
        run(VGG, device="cpu", callback=lambda moment: {"odd": np.array([None, 1])})


def test_the_last_eight_norms():
    model, images = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(10))), torch.randn(4, 3, 9, 9)
    with torch.no_grad():
        model[1].weight.fill_(1e-2)  # the next norm's eps matters
    rows = diagnostics.normalised_outputs(model, images)
    assert rows.shape == (8, 200)
    assert np.array_equal(rows[0], diagnostics.normalised_outputs(model[:3], images)[2])


def test_directions_and_images_of_flatness(monkeypatch):
    """Directions of the algebraically largest eigenvalues, on as many test images as asked for."""
    values, along = torch.tensor([-3.0, 1.0, 2.0]), []
    monkeypatch.setattr(diagnostics, "hessian_spectrum", lambda *_: (values, torch.eye(3)))
    monkeypatch.setattr(diagnostics, "gradient_covariance_trace", lambda *_: 1.0)

    def sharpness(model, images, labels, directions, *_):
        along.append((len(images), directions.argmax(1).tolist()))
        return torch.zeros(2, 3), torch.zeros(2, 3)

    monkeypatch.setattr(diagnostics, "sharpness", sharpness)
    test = images_of(VGG, "test")
    for test_images in (7, None):
        how = Flatness(0, images=4, eigenvalues=3, directions=2, test_images=test_images)
        diagnostics.measured_flatness(None, test, how, {})
    assert along == [(7, [2, 1]), (60, [2, 1])]
