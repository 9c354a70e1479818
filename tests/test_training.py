"""Runs: what decides their numbers, and what is recorded of them."""

import copy
import hashlib
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from paperlib import backends, checkpoints, data, models, training
from paperlib.config import Config, FilterPruning, Flatness, Noise, WeightPruning, to_dict
from paperlib.loop import Totals
from paperlib.pruning import PruningError
from paperlib.runs import RunRecord, Store, StoreError
from paperlib.training import ChangedInputs, TrainingError, run

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
NUMBERS = ["train_loss", "train_accuracy", "test_loss", "pre", "post"]
GONE = 9 + 9 + 9 + 28


def numbers(config: Config, **options) -> pd.DataFrame:
    return run(config, device="cpu", **options).epochs.drop(columns="seconds")


def same(a: pd.DataFrame, b: pd.DataFrame) -> bool:
    return a.equals(b)


@pytest.fixture(scope="module")
def plain() -> pd.DataFrame:
    return numbers(VGG)


@pytest.fixture(scope="module")
def pruned() -> pd.DataFrame:
    return numbers(PRUNED)


def test_what_an_epoch_records(plain):
    assert plain.epoch.tolist() == [0, 1, 2]
    assert plain.trained.all()
    assert plain.removed.tolist() == [0, 0, 0]
    assert plain.pre.equals(plain.post)
    assert plain[NUMBERS].notna().all(axis=None)
    assert plain[["train_accuracy", "pre", "post"]].stack().between(0, 100).all()
    assert plain.train_loss.iloc[-1] < plain.train_loss.iloc[0]


def by_hand(config: Config) -> pd.DataFrame:
    """The same run, written out: weights, order, steps, evaluation and one pruned layer."""
    dataset = data.load("digits").subset(config.train_per_class, config.test_per_class)
    model = training.build(config)

    def normalised(pixels):
        mean, std = (torch.tensor(x)[:, None, None] for x in (dataset.mean, dataset.std))
        return (pixels / 255 - mean) / std

    def measured():
        model.eval()
        with torch.no_grad():
            logits = model(normalised(dataset.test_images))
        loss = F.cross_entropy(logits, dataset.test_labels).item()
        return loss, 100 * (logits.argmax(1) == dataset.test_labels).double().mean().item()

    steps = torch.optim.SGD(
        model.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    if config.optimizer == "adam":
        steps = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.MultiStepLR(steps, config.milestones, 0.1)
    conv, norm = model.features[25], model.features[26]
    dead, rows = torch.tensor([], dtype=torch.int64), []
    for epoch in range(config.epochs):
        model.train()
        order = torch.randperm(
            len(dataset.train_labels), generator=training.generator(config.seed, "order", epoch)
        )
        losses, correct = [], []
        for chosen in order.split(config.batch):
            images, labels = dataset.train_images[chosen], dataset.train_labels[chosen]
            logits = model(normalised(images))
            loss = F.cross_entropy(logits, labels)
            steps.zero_grad()
            loss.backward()
            steps.step()
            with torch.no_grad():
                for parameter in (conv.weight, conv.bias, norm.weight, norm.bias):
                    parameter[dead] = 0
            losses += [loss.item()] * len(chosen)
            correct += (logits.argmax(1) == labels).tolist()
        test_loss, pre = measured()
        post = pre
        if epoch == 1:
            dead = conv.weight.detach().square().sum((1, 2, 3)).argsort()[:16]
            with torch.no_grad():
                for parameter in (conv.weight, conv.bias, norm.weight, norm.bias):
                    parameter[dead] = 0
            test_loss, post = measured()
        rows.append((np.mean(losses), 100 * np.mean(correct), test_loss, pre, post))
        schedule.step()
    return pd.DataFrame(rows, columns=NUMBERS)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_against_a_run_written_out(optimizer):
    config = VGG.with_(
        optimizer=optimizer,
        momentum=0.9 if optimizer == "sgd" else 0,
        weight_decay=0.01 if optimizer == "sgd" else 0,
        learning_rate=0.001,
        batch=25,
        epochs=4,
        milestones=(2,),
        pruning=FilterPruning((0.5,), ((1,),)),
    )
    ours, expected = numbers(config), by_hand(config)
    assert ours.removed.tolist() == [0, 16, 0, 0]
    for name in ("train_loss", "test_loss"):
        assert np.allclose(ours[name], expected[name], rtol=3e-4)
    for name in ("train_accuracy", "pre", "post"):
        assert np.allclose(ours[name], expected[name], atol=100 / 50 + 1e-9)


# Seeds


@pytest.mark.parametrize(
    "config",
    [
        PRUNED,
        SCRATCH,
        WEIGHTS,
        CONV.with_(augment=True, dropout=(0.25, 0.5)),
        PRUNED.with_(pruning=FilterPruning((0.5,), ((1, 2),), target="random")),
        VGG.with_(model="resnet18", pruning=FilterPruning((0.5,), ((1,),), "activation")),
    ],
)
def test_same_seed_same_numbers(config):
    config = config.with_(train_per_class=2)
    first = numbers(config)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert same(first, numbers(config))
    assert torch.equal(torch.get_rng_state(), state)
    other = numbers(config.with_(seed=1))
    assert not same(first, other)
    assert first.train_loss.iloc[1] != other.train_loss.iloc[1]
    assert first.removed.equals(other.removed)


@pytest.mark.parametrize(
    "other",
    [
        PRUNED,
        PRUNED.with_(pruning=FilterPruning((0.5,), ((1,),), "activation")),
        PRUNED.with_(pruning=FilterPruning((0.5,), ((1,),), target="random")),
        VGG.with_(milestones=(1,)),
    ],
)
def test_settings_share_what_comes_before_they_differ(plain, other):
    rows = numbers(other)
    assert same(rows[:1], plain[:1])
    assert not same(rows, plain)
    before = ["train_loss", "train_accuracy"] + (["pre"] if other.pruning else [])
    assert other.milestones or rows[before][:2].equals(plain[before][:2])


def test_settings_share_initial_weights():
    models_ = [
        training.build(config)
        for config in (VGG, PRUNED, SCRATCH, VGG.with_(dropout=0.5), VGG.with_(seed=1))
    ]
    first, *others, different = [list(model.parameters()) for model in models_]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], different[0])


def test_streams_are_all_different():
    names = ("weights", "order", "augmentation", "dropout", "filters")
    seeds = {
        training.stream(seed, name, epoch)
        for seed in range(5)
        for name in names
        for epoch in range(20)
    }
    assert len(seeds) == 5 * len(names) * 20
    assert all(0 <= seed < 2**63 for seed in seeds)


# Events


def test_an_event_is_measured_before_and_after(pruned):
    accuracies, zero = [], []

    def look(moment):
        moment.model.eval()
        with torch.no_grad():
            x, y = next(iter(moment.test.evaluation(1000)))
            logits = moment.model(x)
        accuracies.append(100 * (logits.argmax(1) == y).double().mean().item())
        zero.append(sum(int((~mask).sum()) for mask in moment.pruner.masks.values()))
        dead = [
            (m.weight.flatten(1) == 0).all(1)
            for m in moment.model.modules()
            if isinstance(m, nn.Conv2d)
        ]
        assert sum(int(d.sum()) for d in dead) == zero[-1]

    rows = numbers(PRUNED, callback=look)
    assert same(rows, pruned)
    assert np.allclose(rows.post, accuracies)
    assert zero == rows.removed.cumsum().tolist()
    assert zero[-1] == GONE
    assert (rows.pre != rows.post).any()
    assert rows.pre[0] == rows.post[0]


@pytest.mark.parametrize(
    ("score", "target"),
    [("l1", "smallest"), ("ebn", "largest"), ("activation", "smallest"), ("l2", "random")],
)
def test_removed_adds_up_to_the_fractions(score, target):
    pruning = FilterPruning(PRUNED.pruning.fractions, PRUNED.pruning.epochs, score, target)
    rows = numbers(PRUNED.with_(pruning=pruning, train_per_class=2))
    assert rows.removed.sum() == GONE
    assert rows.removed[0] == 0


def test_batch_norm_stays_without_norm():
    seen = []

    def look(moment):
        (mask,) = moment.pruner.masks.values()
        conv, norm = moment.model.features[25:27]
        seen.append((conv.weight[~mask].any().item(), norm.weight[~mask].all().item()))

    run(VGG.with_(pruning=FilterPruning((0.5,), ((1,),), norm=False)), None, "cpu", look)
    assert seen[1:] == [(False, True)] * 2


def test_weights_removed_add_up():
    rows = numbers(WEIGHTS)
    size = models.build("conv4", width=1 / 16).dense.weight.numel()
    assert rows.removed.tolist() == [size // 4, 0, size // 4]


def test_an_event_that_removes_nothing():
    config = VGG.with_(pruning=FilterPruning((0.0, 0.05), ((0, 1), (0, 1))))
    rows = numbers(config)
    assert rows.removed.tolist() == [0, 1, 0]
    assert (rows.pre == rows.post)[rows.removed == 0].all()


def test_scratch_pruning(plain):
    seen = []

    def look(moment):
        seen.append([p.detach().clone() for p in moment.model.parameters()])

    rows = numbers(SCRATCH, callback=look)
    assert rows.trained.tolist() == [False, True, True]
    assert rows.removed.tolist() == [9 + 28, 0, 0]
    assert rows[["train_loss", "train_accuracy"]].isna().all(axis=1).tolist() == [
        True,
        False,
        False,
    ]
    untrained = training.build(VGG)
    for now, before in zip(seen[0], untrained.parameters(), strict=True):
        assert torch.equal(now[now != 0], before[now != 0])
    assert rows.post.iloc[1:].equals(rows.pre.iloc[1:])
    assert not rows.train_loss.isin(plain.train_loss).any()


@pytest.mark.parametrize(
    ("pruning", "first", "last", "at"),
    [
        (SCRATCH.pruning, 0, 0, {0: (1, 1)}),
        (
            PRUNED.pruning,
            1,
            2,
            {1: ([1, 1, None, 1], [1, 2, 1, 2]), 2: ([None, 2, 1, 2], [1, 2, 1, 2])},
        ),
        (FilterPruning((0.5, 0.5), ((4, 6), (2, 9))), 2, 9, {2: ([None, 1], [2, 2])}),
        (WEIGHTS.pruning, 0, 2, {0: (1, 2), 2: (2, 2)}),
        (WeightPruning(("dense",), (0.5,), (3, 5, 8)), 3, 8, {5: (2, 3)}),
    ],
)
def test_events_by_epoch(pruning, first, last, at):
    events = training.Events(pruning)
    assert (events.first, events.last) == (first, last)
    assert {epoch: events.at(epoch) for epoch in at} == at
    assert None not in (events.at(first), events.at(last))
    assert events.at(last + 1) is None
    assert first == 0 or events.at(first - 1) is None


def test_a_run_without_events():
    assert all(training.Events(None).at(epoch) is None for epoch in range(9))


# Learning rates


@pytest.mark.parametrize(
    ("config", "rates"),
    [
        (VGG.with_(epochs=4, milestones=(2, 3)), [1, 1, 0.1, 0.01]),
        (VGG.with_(epochs=4, milestones=(0, 1)), [0.1, 0.01, 0.01, 0.01]),
        (VGG.with_(epochs=2), [1, 1]),
        (SCRATCH.with_(epochs=5, milestones=(2, 3)), [1, 1, 1, 0.1, 0.01]),
    ],
)
def test_learning_rates(config, rates):
    rows = numbers(config.with_(train_per_class=2))
    assert np.allclose(rows.learning_rate, np.array(rates) * config.learning_rate, rtol=1e-12)


def test_augmentation_changes_training_only():
    config = CONV.with_(epochs=1)
    kept, augmented = numbers(config), numbers(config.with_(augment=True))
    assert kept.train_loss[0] != augmented.train_loss[0]
    still = config.with_(learning_rate=1e-20, weight_decay=0)
    columns = ["test_loss", "pre", "post"]
    assert np.allclose(
        numbers(still)[columns], numbers(still.with_(augment=True))[columns], rtol=1e-6
    )


def test_reduced_precision(plain):
    rows = numbers(PRUNED.with_(precision="bfloat16"))
    assert rows[NUMBERS].notna().all(axis=None)
    assert rows.train_loss[0] != plain.train_loss[0]
    assert rows.train_loss[0] == pytest.approx(plain.train_loss[0], rel=0.1)


# Networks of one's own


class Tiny(nn.Module):
    """Its loss is NaN from the `last`-th training pass on."""

    def __init__(self, num_classes: int, in_channels: int, last: float = math.inf) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 8, 3, stride=4)
        self.fc = nn.Linear(8, num_classes)
        self.passes, self.last = 0, last

    def forward(self, x):
        self.passes += self.training
        out = self.fc(F.relu(self.conv(x)).mean((2, 3)))
        return out * (math.nan if self.passes >= self.last else 1)


def nan_at_pass_six(num_classes: int, in_channels: int) -> nn.Module:
    return Tiny(num_classes, in_channels, 6)


def largest_weight(conv: nn.Conv2d) -> torch.Tensor:
    return conv.weight.flatten(1).amax(1)


class Chain(nn.Sequential):
    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, 8, 3, stride=4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, num_classes),
        )


def test_a_network_and_a_score_of_ones_own(tmp_path):
    pruning = FilterPruning((0.5,), ((1,),), f"{__name__}:largest_weight", layers=("0",))
    config = VGG.with_(model=f"{__name__}:Chain", pruning=pruning)
    seen = []
    record = run(config, Store(tmp_path), "cpu", lambda moment: seen.append(moment.pruner.masks))
    assert record.epochs.removed.tolist() == [0, 4, 0]
    assert list(seen[0]) == ["0"]
    assert Store(tmp_path).read(config.identity).config == config


def test_a_loss_that_is_not_finite(tmp_path):
    config = VGG.with_(model=f"{__name__}:nan_at_pass_six")
    store = Store(tmp_path)
    with pytest.raises(TrainingError, match=f"{config.identity}.* nan at epoch 1"):
        run(config, store, "cpu")
    assert config.identity not in store
    assert "nan at epoch 1" in store.failure(config.identity)
    assert store.identities() == []
    run(config.with_(epochs=1), store, "cpu")


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_learning_rate_far_too_large(tmp_path, epochs):
    config = CONV.with_(learning_rate=1e30, batch=1000, epochs=epochs)
    store = Store(tmp_path)
    with pytest.raises(TrainingError, match=config.identity):
        run(config, store, "cpu")
    assert store.failure(config.identity) is not None
    assert config.identity not in store


def test_a_failure_is_forgotten_when_the_run_succeeds(tmp_path):
    store, config = Store(tmp_path), VGG.with_(model=f"{__name__}:Tiny")
    store.fail(config, "killed")
    run(config, store, "cpu")
    assert store.failure(config.identity) is None


# The record


def test_the_store_keeps_the_run(tmp_path, plain):
    store = Store(tmp_path)
    record = run(VGG, store, "cpu")
    assert same(record.epochs.drop(columns="seconds"), plain)
    assert record.config == VGG
    assert record.provenance["device"] == "cpu"
    assert torch.__version__.startswith(record.provenance["torch"])
    assert (record.epochs.seconds > 0).all()

    again = run(VGG, store, "no such device", callback=lambda moment: pytest.fail("trained"))
    assert same(again.epochs, record.epochs)
    assert again.provenance == record.provenance
    assert to_dict(again.config) == to_dict(VGG)


def test_arrays_of_a_callback(tmp_path, pruned):
    def measure(moment):
        weights = next(moment.model.parameters()).detach().clone().numpy()
        return {f"weights {moment.epoch}": weights} if moment.epoch != 1 else None

    store = Store(tmp_path)
    record = run(PRUNED, store, "cpu", measure)
    assert list(record.arrays) == ["weights 0", "weights 2"]
    assert same(record.epochs.drop(columns="seconds"), pruned)
    kept = store.read(PRUNED.identity).arrays
    assert all(np.array_equal(kept[name], array) for name, array in record.arrays.items())
    assert not np.array_equal(kept["weights 0"], kept["weights 2"])


def test_histograms_change_no_number():
    config = VGG.with_(pruning=FilterPruning((0.5,), ((1,),), "activation"), batch=7)
    assert same(numbers(config), numbers(config.with_(histograms=True)))


def test_histograms_of_batch_norms(plain):
    record = run(VGG.with_(histograms=True), device="cpu")
    assert same(record.epochs.drop(columns="seconds"), plain)
    model = training.build(VGG)
    dataset = data.load("digits").subset(VGG.train_per_class)
    mean, std = (torch.tensor(x)[:, None, None] for x in (dataset.mean, dataset.std))
    out, expected = (dataset.train_images[:128] / 255 - mean) / std, []
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
    counts = training.magnitudes(torch.tensor(values, dtype=torch.float64).view(1, -1))
    assert counts.shape == (140,)
    assert {int(i): int(counts[i]) for i in counts.nonzero()[0]} == bins


def test_magnitudes_of_a_layer():
    weight = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)) * 0.03
    weight[:7] = 0
    found = weight.abs()[weight != 0].double().numpy()
    expected, _ = np.histogram(np.log10(found), 140, (-6, 1))
    assert np.array_equal(training.magnitudes(nn.Parameter(weight)), expected)
    assert training.MAGNITUDES[[0, 20, 140]] == pytest.approx([1e-6, 1e-5, 10])


TWO_LAYERS = WeightPruning(("features.2", "dense"), (0.4, 0.5), (0, 2), "smallest")


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
    assert np.array_equal(record.arrays["edges"], training.MAGNITUDES)
    for name in names:
        for moment, epoch in (("after", last), ("end", -1)):
            expected = training.magnitudes(seen[epoch][name])
            assert np.array_equal(record.arrays[f"{moment}.{name}"], expected)
        # Before the first event nothing is zero.
        weights = seen[0][name].numel()
        assert record.arrays[f"before.{name}"].sum() == weights
        assert record.arrays[f"after.{name}"].sum() < weights
        assert np.array_equal(
            record.arrays[f"kept.{name}"], np.packbits(seen[-1][name].numpy() != 0)
        )
    assert same(record.epochs.drop(columns="seconds"), numbers(config))


def test_before_is_just_before_the_first_event():
    """What the largest target takes of the weights is the upper end of their magnitudes."""
    pruning = WeightPruning(("dense",), (0.3,), (0,), "largest")
    config = WEIGHTS.with_(epochs=1, histograms=True, pruning=pruning)
    arrays = run(config, device="cpu").arrays
    before, after = arrays["before.dense"], arrays["after.dense"]
    left = math.ceil(0.7 * before.sum())
    assert after.sum() == left
    assert np.array_equal(after, np.diff(np.minimum(np.cumsum(before), left), prepend=0))
    assert np.array_equal(after, arrays["end.dense"])


def test_measuring_flatness_changes_no_other_number(plain):
    config = VGG.with_(
        flatness=Flatness(1, images=5, eigenvalues=2, directions=1, reach=0.1, step=0.1)
    )
    record = run(config, device="cpu")
    assert same(record.epochs.drop(columns="seconds"), plain)
    assert record.arrays["eigenvalues"].shape == (2,)
    assert record.arrays["losses"].shape == (1, 3)


@pytest.mark.parametrize("config", [VGG, PRUNED, SCRATCH, WEIGHTS])
def test_parameters_that_are_left(config):
    left = []

    def look(moment):
        left.append(sum(int(p.count_nonzero()) for p in moment.model.parameters()))

    config = config.with_(train_per_class=2)
    record = run(config, None, "cpu", look)
    model = training.build(config)
    assert record.provenance["parameters"] == sum(p.numel() for p in model.parameters())
    assert (record.provenance["held"] > 0) == (config.pruning is not None)
    assert record.parameters == left[-1]
    assert (record.provenance["classes"], record.provenance["channels"]) == (10, 3)


# Measured beside

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
        model=f"{__name__}:Plus",
        learning_rate=0.05,
        pruning=FilterPruning((0.5, 0.7), ((0, 1), (1,))),
    ),
} | {
    kind: VGG.with_(pruning=CHOSEN, noise=Noise(kind, 5, evaluation_batch=16))
    for kind in ("zeroing", "gaussian", "restored")
}


class Unmeasured:
    """Stands in for the replica, and measures nothing."""

    def __init__(self, *arguments) -> None:
        pass

    def load(self, *arguments) -> None:
        pass

    def nothing(self, *arguments) -> Totals:
        return Totals(math.nan, math.nan, 1)

    loss = recalibrated = nothing


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


def all_tensors(moment) -> dict[str, np.ndarray]:
    """A callback: everything that the network and the pruner hold, at every epoch."""
    state = dict(moment.model.named_parameters()) | dict(moment.model.named_buffers())
    if moment.pruner is not None:
        state |= {f"pruner {name}": t for name, t in moment.pruner.state_dict().items()}
    return {f"{moment.epoch} {k}": t.detach().clone().numpy() for k, t in state.items()}


def switch_measuring_off(monkeypatch) -> None:
    monkeypatch.setattr(training, "Replica", Unmeasured)
    monkeypatch.setattr(training, "distance", lambda *networks: math.nan)


def same_but_for_what_is_measured(a: RunRecord, b: RunRecord) -> None:
    columns = ["seconds", *training.BESIDE]
    assert a.epochs.drop(columns=columns).equals(b.epochs.drop(columns=columns))
    assert list(a.epochs) == list(b.epochs)
    assert list(a.arrays) == list(b.arrays)
    for name, array in a.arrays.items():
        assert array.tobytes() == b.arrays[name].tobytes(), name


@pytest.mark.parametrize("name", MEASURED)
def test_measuring_changes_no_number(name, monkeypatch):
    record = run(MEASURED[name], None, "cpu", all_tensors)
    with monkeypatch.context() as patch:
        switch_measuring_off(patch)
        plain = run(MEASURED[name], None, "cpu", all_tensors)
    assert plain.epochs[list(training.BESIDE)].isna().all(axis=None)
    same_but_for_what_is_measured(record, plain)
    event = record.epochs.removed > 0
    assert event.any()
    assert record.epochs.pre_loss.notna().equals(event)
    assert record.epochs.post_loss.notna().equals(event)
    with_norm = event & (name != "weights")
    assert record.epochs.recalibrated.notna().equals(with_norm)
    assert record.epochs.distance.notna().tolist() == [False, False, True]


@pytest.mark.parametrize("name", ["activation", "plus", "gaussian"])
def test_measuring_changes_no_number_of_a_resumed_run(name, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "SHARE", math.inf)
    config, store = MEASURED[name], Store(tmp_path)

    def stop(moment):
        if moment.epoch == 2:
            raise KeyboardInterrupt
        return all_tensors(moment)

    with pytest.raises(KeyboardInterrupt):
        run(config, store, "cpu", stop)
    resumed, unbroken = run(config, store, "cpu", all_tensors), run(config, None, "cpu")
    assert [part["epochs"] for part in resumed.provenance["resumed"]] == [2]
    assert same(resumed.epochs.drop(columns="seconds"), unbroken.epochs.drop(columns="seconds"))
    switch_measuring_off(monkeypatch)
    same_but_for_what_is_measured(resumed, run(config, None, "cpu", all_tensors))


def test_an_event_that_removes_nothing_is_not_measured():
    rows = numbers(VGG.with_(pruning=FilterPruning((0.0, 0.05), ((0, 1), (0, 1)))))
    assert rows.pre_loss.notna().tolist() == [False, True, False]
    assert rows.recalibrated.notna().tolist() == [False, True, False]
    assert numbers(VGG)[["recalibrated", "pre_loss", "post_loss"]].isna().all(axis=None)


def images_of(config: Config) -> data.Batches:
    dataset = data.load(config.data).subset(config.train_per_class, config.test_per_class)
    return data.Batches(
        dataset.train_images, dataset.train_labels, dataset.mean, dataset.std, "cpu"
    )


@pytest.mark.parametrize("name", ["filters", "scratch", "activation", "weights", "plus"])
def test_what_is_measured_by_hand(name, monkeypatch):
    """Of copies of the pruned network, hooks included, whose observers are not due."""
    monkeypatch.setattr(training, "LOSS_IMAGES", 30)
    monkeypatch.setattr(training, "RECALIBRATION_IMAGES", 41)
    monkeypatch.setattr(training, "RECALIBRATION_BATCH", 10)
    config = MEASURED[name]
    train, seen, last = images_of(config), [], []

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
        for batch in train.first(41)[0][:40].split(10):  # without a last batch of one image
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
    initial = torch.cat([p.detach().flatten() for p in training.build(config).parameters()])
    moved = torch.linalg.vector_norm(torch.cat(last) - initial) / torch.linalg.vector_norm(initial)
    assert rows.distance.iloc[-1] == pytest.approx(moved.item(), rel=1e-5)


def test_the_loss_before_an_event_is_that_of_a_run_without_it():
    train, losses = images_of(VGG), []

    @torch.no_grad()
    def look(moment):
        images, labels = train.first(1000)
        losses.append(F.cross_entropy(moment.model.eval()(images), labels).item())
        moment.model.train()

    numbers(VGG, callback=look)
    rows = numbers(PRUNED)
    assert rows.pre_loss[1] == pytest.approx(losses[1], rel=1e-5)
    assert rows.pre_loss[1] != pytest.approx(rows.post_loss[1], rel=1e-2)


def test_a_choice_of_filters_for_noise_changes_no_loss():
    """Noise acts at the passes after it, of which the measurements are none."""
    rows = numbers(MEASURED["zeroing"])
    event = (rows.removed > 0) & (rows.epoch < 2)
    assert rows.pre_loss[event].equals(rows.post_loss[event])
    assert rows.pre_loss[2] != rows.post_loss[2]  # at the end they are removed


def test_distance_of_no_step_is_zero():
    network = training.build(VGG)
    assert training.distance(network, training.build(VGG)) == 0
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(-2)
    assert training.distance(network, training.build(VGG)) == pytest.approx(3)


# Precision


@pytest.fixture
def tf32():
    """A GPU's convolutions would take TF32, as is PyTorch's default."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def rounds(*_) -> bool:
    """Whether any product or convolution of float32 may round more than float32 does."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return torch.get_float32_matmul_precision() != "highest" or torch.backends.cudnn.allow_tf32
    places = [torch.backends.cudnn.conv, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    return any(place.fp32_precision not in ("ieee", "none") for place in places)


@pytest.mark.parametrize(("precision", "full"), [("float32", True), ("bfloat16", False)])
def test_float32_is_full_float32(precision, full, tf32):
    config = VGG.with_(precision=precision, model=f"{__name__}:Chain", batch=50)
    seen = []
    assert rounds()
    run(config, None, "cpu", lambda moment: seen.append(rounds()))
    assert seen == [not full] * 3
    training.run_together([config, config.with_(seed=1)], None, "cpu")
    assert rounds()


def test_full_float32_overlaps(tf32):
    """As in two threads: the first context ends while the second is open."""
    first, second = backends.full_float32(), backends.full_float32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not rounds()
    second.__exit__(None, None, None)
    assert rounds()


# Data and code of a record


def write_images(folder, shade: int) -> None:
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True, exist_ok=True)
            for i in range(2):
                pixels = np.full((32, 32, 3), 100 * i + (label == "dog"), np.uint8)
                pixels[: 9 + i] = shade
                Image.fromarray(pixels).save(folder / split / label / f"{i}.png")


def test_a_record_of_other_data_is_not_taken(tmp_path):
    write_images(tmp_path / "images", 7)
    config = VGG.with_(
        data=f"images:{tmp_path / 'images'}", train_per_class=None, test_per_class=1, epochs=1
    )
    store = Store(tmp_path / "runs")
    record = run(config, store, "cpu")
    then = data.known_checksum(config.data, store.path / "data")
    assert record.provenance["data"] == then
    assert len(then) == 32
    assert record.provenance["source"] is None
    assert run(config, store, "cpu").provenance == record.provenance
    write_images(tmp_path / "images", 8)
    with pytest.raises(ChangedInputs, match=f"{config.identity}(.|\n)*{then}"):
        untouched(config, store)
    (result,) = training.run_together([config], store, "cpu")
    assert isinstance(result, ChangedInputs)
    assert run(config, Store(tmp_path / "other"), "cpu").provenance["data"] != then
    write_images(tmp_path / "images", 7)
    assert untouched(config, store).provenance == record.provenance


SCORE = "def score(conv):\n    return conv.weight.flatten(1).{}(1)\n"


def test_a_record_of_other_code_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    score = tmp_path / "of_a_score.py"
    score.write_text(SCORE.format("amax"))
    pruning = FilterPruning((0.5,), ((0,),), "of_a_score:score", layers=("features.25",))
    configs = {
        "score": VGG.with_(pruning=pruning, epochs=1),
        "both": VGG.with_(
            model=f"{__name__}:Chain",
            pruning=FilterPruning((0.5,), ((0,),), "of_a_score:score", layers=("0",)),
            epochs=1,
        ),
    }
    store = Store(tmp_path / "runs")
    sources = {name: run(c, store, "cpu").provenance["source"] for name, c in configs.items()}
    assert len(set(sources.values())) == 2
    assert sources["score"] == hashlib.sha256(score.read_bytes()).hexdigest()
    for config in configs.values():
        untouched(config, store)
    score.write_text(SCORE.format("amin"))
    for name, config in configs.items():
        with pytest.raises(ChangedInputs, match=f"{config.identity}(.|\n)*{sources[name]}"):
            untouched(config, store)


def test_a_record_without_checksums_is_taken(tmp_path, monkeypatch):
    store, frame = Store(tmp_path), pd.DataFrame({"epoch": [0], "post": [10.0]})
    monkeypatch.setattr(training.provenance, "known_checksum", lambda *_: "ab" * 16)
    for config, about in ((VGG, {}), (PRUNED, {"data": None, "source": None})):
        store.write(RunRecord(config, frame, provenance=about))
        assert untouched(config, store).provenance == about
    store.write(RunRecord(SCRATCH, frame, provenance={"data": "cd" * 16}))
    with pytest.raises(ChangedInputs, match="cd" * 16):
        untouched(SCRATCH, store)
    monkeypatch.setattr(training.provenance, "known_checksum", lambda *_: None)
    untouched(SCRATCH, store)


def test_a_checkpoint_of_other_code_is_not_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "SHARE", math.inf)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_another_score.py").write_text(SCORE.format("amax"))
    pruning = FilterPruning((0.5,), ((2,),), "of_another_score:score", layers=("features.25",))
    config, store = VGG.with_(pruning=pruning), Store(tmp_path / "runs")

    def stop(moment):
        if moment.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, store, "cpu", stop)
    (tmp_path / "of_another_score.py").write_text(SCORE.format("amin"))
    with pytest.warns(UserWarning, match="of_another_score|source"):
        record = run(config, store, "cpu")
    assert "resumed" not in record.provenance


# A network from its record


@pytest.mark.parametrize("config", [WEIGHTS, WEIGHTS.with_(pruning=TWO_LAYERS)])
def test_a_network_from_its_record(tmp_path, config):
    config, store = config.with_(histograms=True), Store(tmp_path)
    kept = []
    run(
        config,
        store,
        "cpu",
        lambda m: kept.append({k: v.clone() for k, v in m.pruner.masks.items()}),
    )
    model, pruner = training.pruned_network(store.read(config.identity))
    assert list(pruner.masks) == list(config.pruning.layers)
    for name, mask in pruner.masks.items():
        assert torch.equal(mask, kept[-1][name])
    initial = dict(training.build(config).named_parameters())
    held = pruner.held()
    for name, parameter in model.named_parameters():
        gone = held.get(name, torch.zeros_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter, initial[name].masked_fill(gone, 0))


def test_a_network_for_other_images_from_its_record():
    kept = np.packbits(np.arange(32 * 144) % 3 == 0)
    about = {"classes": 3, "channels": 1}
    record = RunRecord(WEIGHTS, pd.DataFrame(), {"kept.dense": kept}, about)
    model, pruner = training.pruned_network(record)
    assert (model.fc.out_features, model.features[0].in_channels) == (3, 1)
    assert torch.equal(pruner.masks["dense"].flatten(), torch.arange(32 * 144) % 3 == 0)
    assert training.initial_network(record).dense.weight.all()


@pytest.mark.parametrize(
    ("config", "arrays", "message"),
    [
        (VGG, {}, "is not of single weights pruned"),
        (PRUNED, {}, "is not of single weights pruned"),
        (WEIGHTS, {}, "no mask of 'dense': it was not made with histograms=True"),
        (WEIGHTS, {"kept.dense": np.zeros(3, np.uint8)}, r"3 bytes of 'dense', not of \(32, 144\)"),
    ],
)
def test_a_record_without_masks(config, arrays, message):
    with pytest.raises(ValueError, match=message):
        training.pruned_network(RunRecord(config, pd.DataFrame(), arrays))


# What cannot be run


def untouched(config: Config, store: Store | None = None, device: str = "cpu"):
    return run(config, store, device, lambda moment: pytest.fail("trained"))


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "", "gpu"])
def test_unknown_devices(name):
    with pytest.raises(ValueError, match=rf"no device '{name}' here: one of auto, .*cpu"):
        untouched(VGG, device=name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    with pytest.raises(ValueError, match="no device 'cuda' here"):
        untouched(VGG, device="cuda")
    assert training.choose_device().type in ("cpu", "mps")


def test_a_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        untouched(VGG, Store(tmp_path / "file" / "runs"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "vgg7"}, ValueError, "unknown model 'vgg7'"),
        ({"model": "paperlib.models:vgg7"}, ValueError, "cannot find 'paperlib.models:vgg7'"),
        ({"model": "nowhere.at_all:f"}, ValueError, "cannot find 'nowhere.at_all:f'"),
        ({"data": "mnist"}, ValueError, "mnist"),
        ({"dropout": 1.5}, ValueError, "1.5"),
        ({"train_per_class": 10_000}, ValueError, "10000|10_000|10,000"),
        ({"pruning": FilterPruning((0.5,), ((1,),), "l7")}, PruningError, "unknown score 'l7'"),
        ({"pruning": FilterPruning((0.5,), ((1,),), target="x")}, PruningError, "target 'x'"),
        ({"pruning": FilterPruning((0.5,), ((1,),), layers=("x",))}, PruningError, "layer 'x'"),
        ({"pruning": FilterPruning((0.5,) * 9, ((1,),) * 9)}, PruningError, "9 fractions.* 8"),
        ({"pruning": FilterPruning((0.5,), ((1,),), "math:nothing")}, ValueError, "math:nothing"),
        ({"pruning": WeightPruning(("x",), (0.5,), (1,))}, PruningError, "layer 'x': one of f"),
        (
            {"model": "conv4", "pruning": WeightPruning(("dense",), (0.5,), (1,), "most")},
            PruningError,
            "unknown target 'most': one of",
        ),
        (
            {"model": "conv4", "pruning": WeightPruning(("dense",), (0.5,), (1,), schedule="x")},
            PruningError,
            "'x': one of linear, annealing",
        ),
    ],
)
def test_what_cannot_be_run(tmp_path, changes, error, message):
    store, config = Store(tmp_path), VGG.with_(**changes)
    with pytest.raises(error, match=message):
        untouched(config, store)
    assert store.identities() == []
