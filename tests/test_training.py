"""Runs: what decides their numbers, and what is recorded of them."""

import copy
import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small import CONV, GONE, NUMBERS, PRUNED, SCRATCH, VGG, WEIGHTS, images_of, numbers, same
from torch import nn

from paperlib import data, inputs, streams, training
from paperlib.config import Config, FilterPruning, Noise, WeightPruning, to_dict
from paperlib.extras.fast.together import by_turns
from paperlib.loop import finish
from paperlib.noise import FilterNoise
from paperlib.pruning import PruningError
from paperlib.runs import Mismatch, Store, StoreError
from paperlib.training import TrainingError, run

FILTERS, DENSE = FilterPruning((0.5,), ((1,),)), WeightPruning(("dense",), (0.5,), (1,))
NINE = FilterPruning((0.5,) * 9, ((1,),) * 9)
ACTIVATION = VGG.with_(pruning=FilterPruning((0.5,), ((1,),), "activation"))
RANDOM = VGG.with_(pruning=FilterPruning((0.5,), ((1, 2),), target="random"))
NOISY = VGG.with_(
    pruning=FilterPruning((0.5,), ((0, 1),), target="random", norm=False),
    noise=Noise("zeroing", 5, evaluation_batch=16),
)


@pytest.fixture(scope="module")
def plain() -> pd.DataFrame:
    return numbers(VGG)


def by_hand(config: Config) -> pd.DataFrame:
    """The same run, written out: weights, order, steps, evaluation and one pruned layer."""
    (train_x, train_y), (x, y) = (images_of(config, half).first(999) for half in ("train", "test"))
    model = training.build(config)
    conv, norm = model.features[25], model.features[26]
    dead, rows = torch.tensor([], dtype=torch.int64), []

    @torch.no_grad()
    def remove():
        for parameter in (conv.weight, conv.bias, norm.weight, norm.bias):
            parameter[dead] = 0

    @torch.no_grad()
    def measured():
        logits = model.eval()(x)
        accuracy = 100 * (logits.argmax(1) == y).double().mean().item()
        return F.cross_entropy(logits, y).item(), accuracy

    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    kind, more = torch.optim.Adam, {}
    if config.optimizer == "sgd":
        kind, more = torch.optim.SGD, {"momentum": config.momentum}
    steps = kind(model.parameters(), **options, **more)
    schedule = torch.optim.lr_scheduler.MultiStepLR(steps, config.milestones, 0.1)
    for epoch in range(config.epochs):
        model.train()
        generator = training.generator(config.seed, "order", epoch)
        losses, correct = [], []
        for chosen in torch.randperm(len(train_y), generator=generator).split(config.batch):
            logits = model(train_x[chosen])
            loss = F.cross_entropy(logits, train_y[chosen])
            steps.zero_grad()
            loss.backward()
            steps.step()
            remove()
            losses += [loss.item()] * len(chosen)
            correct += (logits.argmax(1) == train_y[chosen]).tolist()
        test_loss, pre = measured()
        if epoch == 1:
            dead = conv.weight.detach().square().sum((1, 2, 3)).argsort()[:16]
            remove()
        test_loss, post = measured()
        rows.append((np.mean(losses), 100 * np.mean(correct), test_loss, pre, post))
        schedule.step()
    return pd.DataFrame(rows, columns=NUMBERS)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01},
        {"batch": 16, "epochs": 2},  # the last batch is smaller
    ],
)
def test_against_a_run_written_out(changes):
    options = {"learning_rate": 0.001, "batch": 25, "epochs": 4, "milestones": (2,)}
    config = VGG.with_(**{"pruning": FILTERS, **options, **changes})
    ours, expected = numbers(config), by_hand(config)
    assert ours.removed.tolist() == [0, 16, 0, 0][: config.epochs]
    for name in ("train_loss", "test_loss"):
        assert np.allclose(ours[name], expected[name], rtol=3e-4)
    for name in ("train_accuracy", "pre", "post"):
        assert np.allclose(ours[name], expected[name], atol=100 / 50 + 1e-9)


@pytest.mark.parametrize(
    "config",
    [
        *(PRUNED, SCRATCH, WEIGHTS, RANDOM),
        *(ACTIVATION.with_(model="resnet18"), CONV.with_(augment=True, dropout=(0.25, 0.5))),
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


@pytest.mark.parametrize("other", [PRUNED, ACTIVATION, RANDOM, VGG.with_(milestones=(1,))])
def test_settings_share_what_comes_before_they_differ(plain, other):
    rows = numbers(other)
    assert same(rows[:1], plain[:1])
    assert not same(rows, plain)
    before = ["train_loss", "train_accuracy", "pre"]
    assert other.milestones or rows[before][:2].equals(plain[before][:2])


def test_an_event_is_measured_before_and_after():
    accuracies, zero = [], []

    @torch.no_grad()
    def look(moment):
        x, y = moment.test.first(1000)
        accuracies.append(100 * (moment.model.eval()(x).argmax(1) == y).double().mean().item())
        zero.append(sum(int((~mask).sum()) for mask in moment.pruner.masks.values()))
        convs = [m for m in moment.model.modules() if isinstance(m, nn.Conv2d)]
        assert sum(int((c.weight.flatten(1) == 0).all(1).sum()) for c in convs) == zero[-1]

    rows = numbers(PRUNED, callback=look)
    assert same(rows, numbers(PRUNED))
    assert np.allclose(rows.post, accuracies)
    assert zero == rows.removed.cumsum().tolist()
    assert zero[-1] == GONE
    assert (rows.pre != rows.post).any()
    assert rows.pre[0] == rows.post[0]


def test_an_event_that_removes_nothing():
    rows = numbers(VGG.with_(pruning=FilterPruning((0.0, 0.05), ((0, 1), (0, 1)))))
    assert rows.removed.tolist() == [0, 1, 0]
    assert (rows.pre == rows.post)[rows.removed == 0].all()


def test_scratch_pruning(plain):
    seen = []
    rows = numbers(SCRATCH, callback=lambda moment: seen.append(copy.deepcopy(moment.model)))
    assert rows.trained.tolist() == [False, True, True]
    assert rows.removed.tolist() == [9 + 28, 0, 0]
    for column in ("train_loss", "train_accuracy"):
        assert rows[column].isna().tolist() == [True, False, False]
    both = (model.parameters() for model in (seen[0], training.build(VGG)))
    for now, before in zip(*both, strict=True):
        assert torch.equal(now[now != 0], before[now != 0])
    assert rows.post.iloc[1:].equals(rows.pre.iloc[1:])
    assert not rows.train_loss.isin(plain.train_loss).any()


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


def test_reduced_precision(plain):
    rows = numbers(PRUNED.with_(precision="bfloat16"))
    assert rows[NUMBERS].notna().all(axis=None)
    assert rows.train_loss[0] != plain.train_loss[0]
    assert rows.train_loss[0] == pytest.approx(plain.train_loss[0], rel=0.1)


def test_a_network_and_a_score_of_ones_own(tmp_path):
    pruning = FilterPruning((0.5,), ((1,),), "small:largest_weight", layers=("0",))
    config = VGG.with_(model="small:Chain", pruning=pruning)
    record = run(config, Store(tmp_path), "cpu")
    assert record.epochs.removed.tolist() == [0, 4, 0]  # half of the filters of its only layer
    assert Store(tmp_path).read(config.identity).config == config


def test_a_score_that_draws_is_seeded():
    pruning = FilterPruning((0.5,), ((0, 1),), "small:random_score")
    config = VGG.with_(pruning=pruning)
    torch.manual_seed(1)
    first = numbers(config)
    torch.manual_seed(2)
    assert same(first, numbers(config))
    assert not same(first, numbers(config.with_(seed=5)))


def test_a_loss_that_is_not_finite(tmp_path):
    config = VGG.with_(model="small:nan_at_pass_six")
    store = Store(tmp_path)
    with pytest.raises(TrainingError, match=f"{config.identity}.* nan at epoch 1"):
        run(config, store, "cpu")
    assert config.identity not in store
    assert "nan at epoch 1" in store.failure(config.identity)
    assert store.identities() == []
    run(config.with_(epochs=1), store, "cpu")


def untouched(config: Config, store: Store | None = None, device: str = "cpu"):
    return run(config, store, device, lambda moment: pytest.fail("trained"))


def test_the_store_keeps_the_run(tmp_path, plain):
    def measure(moment):
        weights = next(moment.model.parameters()).detach().clone().numpy()
        return {f"weights {moment.epoch}": weights} if moment.epoch != 1 else None

    store = Store(tmp_path)
    record = run(VGG, store, "cpu", measure)
    assert same(record.epochs.drop(columns="seconds"), plain)
    assert record.config == VGG
    assert record.provenance["device"] == "cpu"
    assert torch.__version__.startswith(record.provenance["torch"])
    assert (record.epochs.seconds > 0).all()
    assert list(record.arrays) == ["weights 0", "weights 2"]
    again = untouched(VGG, store, "no such device")
    assert same(again.epochs, record.epochs)
    assert again.provenance == record.provenance
    assert to_dict(again.config) == to_dict(VGG)
    for name, array in record.arrays.items():
        assert np.array_equal(again.arrays[name], array)
    assert not np.array_equal(*again.arrays.values())


def write_images(folder, shade: int) -> None:
    for split, label, i in itertools.product(("train", "test"), ("cat", "dog"), range(2)):
        (folder / split / label).mkdir(parents=True, exist_ok=True)
        pixels = np.full((32, 32, 3), 100 * i + (label == "dog"), np.uint8)
        pixels[: 9 + i] = shade
        Image.fromarray(pixels).save(folder / split / label / f"{i}.png")


def test_a_record_of_other_data_is_not_taken(tmp_path):
    write_images(tmp_path / "images", 7)
    config = VGG.with_(data=f"images:{tmp_path / 'images'}", train_per_class=None, test_per_class=1)
    config, store = config.with_(epochs=1), Store(tmp_path / "runs")
    record = run(config, store, "cpu")
    then = data.known_checksum(config.data, store.path / "data")
    assert record.provenance["data"] == then
    assert len(then) == 32
    assert record.provenance["source"] is None
    assert run(config, store, "cpu").provenance == record.provenance
    write_images(tmp_path / "images", 8)
    with pytest.raises(Mismatch, match=f"{config.identity}(.|\n)*{then}"):
        untouched(config, store)
    assert isinstance(finish(by_turns(config, store, "cpu")), Mismatch)
    assert run(config, Store(tmp_path / "other"), "cpu").provenance["data"] != then
    write_images(tmp_path / "images", 7)
    assert untouched(config, store).provenance == record.provenance


def test_a_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        untouched(VGG, Store(tmp_path / "file" / "runs"))


def pruned(by, model: str = "vgg11_bn", **changes) -> dict:
    return {"model": model, "pruning": replace(by, **changes)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "vgg7"}, ValueError, "unknown model 'vgg7'"),
        ({"model": "small:eight_outputs"}, ValueError, r"small:eight_outputs.*\(2, 8\)"),
        ({"model": "small:logits_in_a_pair"}, ValueError, "small:logits_in_a_pair.*tuple"),
        ({"model": "small:random_in_evaluation"}, ValueError, "random_in_evaluation is random"),
        ({"model": "small:mixes_images"}, ValueError, "small:mixes_images mixes the images"),
        (pruned(FILTERS, score="small:broken_score"), PruningError, "fails: 'broken score'"),
        (pruned(FILTERS, score="small:part_of_a_score"), ValueError, "is a partial.* a function"),
        ({"model": "small:norm_at_the_end", "batch": 7}, ValueError, "50 images in batches of 7"),
        ({"model": "nowhere.at_all:f"}, ValueError, "cannot find 'nowhere.at_all:f'"),
        ({"data": "mnist"}, ValueError, "mnist"),
        ({"dropout": 1.5}, ValueError, "1.5"),
        ({"train_per_class": 10_000}, ValueError, "10000|10_000|10,000"),
        (pruned(FILTERS, score="l7"), PruningError, "unknown score 'l7'"),
        (pruned(FILTERS, target="x"), PruningError, "target 'x'"),
        (pruned(NINE), PruningError, "9 fractions.* 8"),
        (pruned(FILTERS, score="math:nothing"), ValueError, "math:nothing"),
        (pruned(DENSE, "conv4", layers=("x",)), PruningError, "layer 'x': one of f"),
        (pruned(DENSE, "conv4", target="most"), PruningError, "unknown target 'most': one of"),
        (pruned(DENSE, "conv4", schedule="x"), PruningError, "'x': one of linear, annealing"),
    ],
)
def test_what_cannot_be_run(tmp_path, changes, error, message):
    store, config = Store(tmp_path), VGG.with_(**changes)
    with pytest.raises(error, match=message):
        untouched(config, store)
    assert store.identities() == []


@pytest.mark.parametrize(
    ("model", "size", "fits"),
    [("vgg11_bn", 28, "32x32"), ("vgg11_bn", 64, "48x48"), ("resnet20", 28, None)],
)
def test_images_of_another_size(model, size, fits, tmp_path, monkeypatch):
    digits = data.load("digits").subset(1, 1)
    halves = (digits.train_images, digits.test_images)
    train, test = (F.interpolate(half.float(), (size, size)).byte() for half in halves)
    resized = data.replace(digits, train_images=train, test_images=test)
    monkeypatch.setattr(inputs, "images_of", lambda *_: resized)
    config, store = VGG.with_(model=model, epochs=1), Store(tmp_path)
    if fits is None:
        assert len(run(config, store, "cpu").epochs) == 1
        return
    with pytest.raises(ValueError, match=f"{model} .*{size}x{size}.*{fits}") as caught:
        untouched(config, store)
    assert f"{size}x{size}" not in str(caught.value).partition("takes")[2]
    assert not store.failures()


@pytest.mark.parametrize("model", ["small:logits_in_an_object", "small:logits_in_a_dict"])
def test_logits_within_an_object(model):
    assert same(numbers(VGG.with_(model=model)), numbers(VGG.with_(model="small:Tiny")))


def test_training_images_are_augmented():
    assert not same(numbers(CONV), numbers(CONV.with_(augment=True)))


def test_streams_stay():
    """Records that were made before are those of the same streams."""
    assert streams.stream(3, "order", 2) == 42154503093795398
    places = itertools.product(range(3), ("order", "noise"), range(50))
    assert len({streams.stream(*place) for place in places}) == 300


def test_every_purpose_has_its_stream_of_each_epoch(monkeypatch):
    drawn, real = Counter(), streams.stream

    def recorded(seed, name, epoch=0):
        drawn[name, epoch] += 1
        return real(seed, name, epoch)

    monkeypatch.setattr(streams, "stream", recorded)
    monkeypatch.setattr(training, "stream", recorded)
    numbers(CONV.with_(augment=True, dropout=(0.25, 0.5), train_per_class=2))
    names = ("order", "augmentation", "dropout")
    per_epoch = {key: drawn[key] for key in drawn if key[0] in names}
    assert per_epoch == dict.fromkeys(itertools.product(names, range(3)), 1)
    drawn.clear()
    pruning = FilterPruning((0.5,), ((0, 2),), target="largest", norm=False)
    numbers(VGG.with_(pruning=pruning, noise=Noise("gaussian", 5), train_per_class=2))
    expected = [*(("noise", e) for e in range(3)), ("filters", 0), ("filters", 2)]
    beside = {key: drawn[key] for key in drawn if key[0] in ("noise", "filters")}
    assert beside == dict.fromkeys(expected, 1)


def test_passes_of_a_run_with_noise(monkeypatch):
    """Each epoch has its training batches and two evaluations, also without an event."""
    passes, ends, before_pass = [], [], FilterNoise.before_pass

    def counted(noise, training):
        passes.append("ET"[training])
        before_pass(noise, training)

    monkeypatch.setattr(FilterNoise, "before_pass", counted)
    numbers(NOISY, callback=lambda moment: ends.append("".join(passes)))
    assert ends == [n * (4 * "T" + 8 * "E") for n in (1, 2, 3)]


def test_noise_chooses_the_filters_of_pruning_and_removes_them_in_the_end():
    chosen, zero = [], []

    def look(moment):
        (mask,), (layer,) = moment.pruner.masks.values(), moment.pruner.layers.values()
        chosen.append(~mask)
        zero.append((layer.conv.weight.detach().flatten(1) == 0).all(1))

    for config in (NOISY, NOISY.with_(noise=None)):
        numbers(config, callback=look)
        assert torch.equal(zero[-1], chosen[-1])
    assert torch.equal(chosen[0], chosen[config.epochs])
