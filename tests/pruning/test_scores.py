"""Schedules, scores and targets."""

import copy
from itertools import product

import numpy as np
import pytest
import torch
from pruned_networks import (
    exactly_kept,
    generator,
    gone,
    images,
    network,
    resnet_by_hand,
    small_net,
    unchanged,
)
from scipy import stats

from paperlib.pruning import (
    FilterPruner,
    PruningError,
    expected_activation,
    kept_filters,
    kept_weights,
    select,
)
from paperlib.pruning.layers import PrunableLayer

# Schedules


@pytest.mark.parametrize("filters", [1, 2, 3, 10, 16, 30, 64, 100, 256, 300, 511, 512])
def test_kept_filters_in_exact_arithmetic(filters):
    fractions = [f"0.{i:02}" for i in range(0, 100, 2)]
    fractions += ["0.001", "0.125", "0.35", "0.55", "0.999"]
    for fraction, events in product(fractions, (1, 2, 7, 37, 68)):
        for event in range(1, events + 1):
            kept = kept_filters(filters, float(fraction), event, events)
            assert kept == exactly_kept(filters, fraction, event, events)


@pytest.mark.parametrize("mu", [None, 0, 1, 3, 20, 100])
@pytest.mark.parametrize(("weights", "events"), [(100, 7), (999, 10), (1, 3), (1_179_648, 100)])
def test_kept_weights_in_exact_arithmetic(weights, events, mu):
    schedule = ("linear", 0) if mu is None else ("annealing", mu)
    for fraction, event in product(("0", "0.5", "0.7", "0.9", "0.98"), range(1, events + 1)):
        kept = kept_weights(weights, float(fraction), event, events, *schedule)
        assert kept == exactly_kept(weights, fraction, event, events, mu)


# Scores


def expected_value(gamma: float, beta: float, signed: bool = False) -> float:
    """Of relu(gamma z + beta), or of min(gamma z + beta, 0), by numerical integration."""
    output = stats.norm(beta, abs(gamma))
    return output.expect(ub=0) if signed and gamma < 0 else output.expect(lb=0)


@pytest.mark.parametrize("signed", [False, True])
def test_expected_activation_is_the_expected_value(signed):
    values = [(g, b) for g in (-2.5, -0.3, 0.01, 0.5, 1, 4) for b in (-3, -1, -0.1, 0, 0.2, 1, 5)]
    gamma, beta = torch.tensor(values, dtype=torch.float64).T
    expected = torch.tensor([expected_value(g, b, signed) for g, b in values]).double()
    assert torch.allclose(expected_activation(gamma, beta, signed), expected, atol=1e-10)
    single = expected_activation(gamma.float(), beta.float(), signed)
    assert single.dtype == torch.float32
    assert torch.allclose(single, expected.float(), atol=1e-6)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_expected_activation_is_finite_everywhere(signed, dtype):
    sizes = [0.0, 1e-45, 1e-38, 1e-20, 1e-3, 1.0, 5.0, 1e3, 1e20, 1e37]
    values = torch.tensor([s * size for size in sizes for s in (1, -1)], dtype=dtype)
    gamma, beta = torch.meshgrid(values, values, indexing="ij")
    score = expected_activation(gamma, beta, signed)
    assert score.shape == gamma.shape
    assert score.isfinite().all()
    constant = gamma == 0
    assert torch.equal(score[constant], beta[constant].relu())
    narrow = (gamma.abs() <= 1) & (gamma >= 0 if signed else True)
    assert torch.equal(score[narrow & (beta >= 1e3)], beta[narrow & (beta >= 1e3)])
    assert not score[narrow & (beta <= -1e3)].any()


def plain_scores(score: str, layer: PrunableLayer) -> list[float]:
    if score in ("l1", "l2"):
        weights = layer.conv.weight.detach().double().flatten(1)
        return [np.linalg.norm(w, int(score[1])) for w in weights.numpy()]
    scaled = zip(layer.norm.weight.tolist(), layer.norm.bias.tolist(), strict=True)
    return [expected_value(g, b, score == "ebn_signed") for g, b in scaled]


@pytest.mark.parametrize("score", ["l1", "l2", "ebn", "ebn_signed"])
@pytest.mark.parametrize("target", ["smallest", "largest"])
def test_the_worst_by_score_go_first(score, target):
    model = network("vgg11_bn", double=False)
    pruner = FilterPruner(model, [0.6, 0.3], score, target)
    worst = []
    for layer in pruner.layers.values():
        order = np.argsort(plain_scores(score, layer))
        worst.append((order if target == "smallest" else order[::-1]).tolist())
    for event in (1, 2, 3):
        assert pruner.prune(event, 3) > 0
        counts = [32 - exactly_kept(32, fraction, event, 3) for fraction in ("0.6", "0.3")]
        expected = [sorted(order[:n]) for order, n in zip(worst, counts, strict=True)]
        assert list(gone(pruner).values()) == expected
    assert counts == [32 - 13, 32 - 23]


def test_activation_score_by_brute_force():
    model = network("resnet20", double=False)
    layers = ["blocks.2.conv1", "blocks.2.conv2", "blocks.3.conv1", "blocks.3.conv2"]
    pruner = FilterPruner(model, [0.5] * 4, "activation", layers=layers)
    expected = {name: torch.zeros(pruner.layers[name].filters) for name in layers}

    for batch in range(1, 34):
        x = images(2, seed=batch, size=8, double=False)
        if batch % 10 == 0:
            _, given = resnet_by_hand(copy.deepcopy(model).train(), x, pruner.masks)
            for name in layers:
                activity = given[name].detach().abs().sum(dim=(0, 2, 3))
                expected[name] = 0.9 * expected[name] + 0.1 * activity
        model.train()(x)
        if batch % 4 == 0:
            model.eval()(x)
        if batch == 15:
            pruner.prune(1, 2)
    for name in layers:
        assert torch.allclose(pruner.activation.scores[name], expected[name], rtol=1e-4, atol=1e-3)

    before = gone(pruner)
    pruner.prune(2, 2)
    for name, filters in gone(pruner).items():
        order = [i for i in expected[name].argsort().tolist() if i not in before[name]]
        new = set(filters) - set(before[name])
        assert new
        assert new == set(order[: len(new)])


def test_activation_score_needs_a_pass_in_training_mode():
    model = small_net()
    pruner = FilterPruner(model, [0.5], "activation")
    model.eval()(images(size=8, double=False))
    state = copy.deepcopy(pruner.state_dict())
    with unchanged(model), pytest.raises(PruningError, match=r"'activation' of '3'"):
        pruner.prune(1, 1)
    assert gone(pruner) == {"3": []}
    model.train()(images(size=8, double=False))
    assert pruner.prune(1, 1) == 3
    pruner.load_state_dict(state)
    with pytest.raises(PruningError, match="'activation'"):
        pruner.prune(1, 1)
    pruner.before_pass(False)
    pruner.before_pass(True)
    assert pruner.activation.passes == 1


# Targets


@pytest.mark.parametrize(("target", "first"), [("smallest", [1, 3]), ("largest", [0, 2])])
def test_ties_by_position(target, first):
    values = torch.tensor([2.0, 1, 2, 1, 2, 1])
    pruner = FilterPruner(small_net(), [1 / 3], lambda conv: values, target)
    pruner.prune(1, 1)
    assert gone(pruner) == {"3": first}


@pytest.mark.parametrize(
    ("target", "order"),
    [("smallest", [0, 5, 1, 4, 2]), ("largest", [5, 0, 4, 1, 3]), ("random", None)],
)
def test_only_kept_filters_are_chosen(target, order):
    scores, seen = torch.arange(6.0), []
    pruner = FilterPruner(small_net(), [5 / 6], lambda conv: scores, target, generator=generator())
    for event in range(1, 6):
        assert pruner.prune(event, 5) == 1
        seen += set(gone(pruner)["3"]) - set(seen)
        scores = scores.flip(0)
    assert len(seen) == 5
    assert order is None or seen == order


def test_random_choice_is_uniform():
    kept = torch.tensor([True] * 6 + [False] * 4)
    draws = [select(None, kept, 2, "random", generator(seed)).tolist() for seed in range(1500)]
    pairs = [i + 6 * j for i, j in draws if i != j]
    assert len(pairs) == len(draws)
    counts = np.bincount(pairs, minlength=36)
    assert counts[counts > 0].size == 30
    assert stats.chisquare(counts[counts > 0]).pvalue > 1e-3
