"""Pruning of single weights, against formulas and masks written out."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paperlib import models
from paperlib.pruning import PruningError, WeightPruner, kept_weights

torch.set_num_threads(1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense(outputs: int = 5, inputs: int = 20) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs))


def with_weights(*values: float) -> nn.Module:
    network = dense(1, len(values))
    network[0].weight.data = torch.tensor([values], dtype=torch.float32)
    return network


def kept(pruner: WeightPruner, name: str = "0") -> list[int]:
    return pruner.masks[name].flatten().nonzero().flatten().tolist()


# Schedules


def written_out(weights: int, fraction: str, e: int, n: int, mu: int | None) -> int:
    """The papers' formulas in exact arithmetic; linear where mu is None."""
    final = math.ceil((1 - Fraction(fraction)) * weights)
    if mu is None:
        share = Fraction(n - e, n)
    else:
        share = max(Fraction(0), Fraction(n - 2 * e, 2 * e * mu + n))
    return math.ceil(final + (weights - final) * share)


@pytest.mark.parametrize("mu", [None, 0, 1, 3, 20, 100])
@pytest.mark.parametrize("fraction", ["0", "0.5", "0.7", "0.9", "0.98"])
@pytest.mark.parametrize(("weights", "events"), [(100, 7), (999, 10), (1, 3), (1_179_648, 100)])
def test_schedule_is_the_formula(weights, fraction, events, mu):
    schedule, number = ("linear", 0) if mu is None else ("annealing", mu)
    for event in range(1, events + 1):
        assert kept_weights(
            weights, float(fraction), event, events, schedule, number
        ) == written_out(weights, fraction, event, events, mu)


@pytest.mark.parametrize(("schedule", "mu"), [("linear", 0), ("annealing", 0), ("annealing", 5)])
@pytest.mark.parametrize("target", ["largest", "smallest", "random"])
def test_events_follow_the_schedule(schedule, mu, target):
    network = dense(10, 33)
    pruner = WeightPruner(network, "0", 0.9, target, schedule, mu, generator())
    before = pruner.masks["0"].clone()
    for event in range(1, 9):
        removed = pruner.prune(event, 8)
        mask = pruner.masks["0"]
        expected = written_out(330, "0.9", event, 8, None if schedule == "linear" else mu)
        assert int(mask.sum()) == expected
        assert removed == int(before.sum()) - expected
        assert not (mask & ~before).any()  # none comes back
        assert network[0].weight.ne(0).equal(mask)
        before = mask.clone()
    assert int(before.sum()) == 33


# Targets


def test_targets_go_by_magnitude():
    values = (0.1, -5.0, 2.0, -0.3, 4.0, 0.2)
    for target, left in {"largest": [0, 3, 5], "smallest": [1, 2, 4]}.items():
        network = with_weights(*values)
        pruner = WeightPruner(network, "0", 0.5, target)
        assert pruner.prune(1, 1) == 3
        assert kept(pruner) == left
        expected = [value if i in left else 0.0 for i, value in enumerate(values)]
        assert network[0].weight.flatten().tolist() == pytest.approx(expected)


# Zero stays zero

IMAGES, LABELS = torch.randn(16, 20, generator=generator(1)), torch.arange(16) % 3
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
}


def steps(network: nn.Module, optimizer: torch.optim.Optimizer, count: int, *pruners) -> None:
    x = IMAGES.to(network[0].weight.dtype)
    for _ in range(count):
        loss = F.cross_entropy(network(x), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for pruner in pruners:
            pruner.hold()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_stay_zero_and_the_others_train(name):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 3))
    pruner = WeightPruner(network, "0", 0.8)
    optimizer = OPTIMIZERS[name](network.parameters())
    steps(network, optimizer, 5, pruner)  # momentum that will pull at what is pruned then
    for event in range(1, 5):
        pruner.prune(event, 4)
        mask = pruner.masks["0"].clone()
        before = network[0].weight.detach().clone()
        steps(network, optimizer, 3, pruner)
        after = network[0].weight.detach()
        assert after[~mask].eq(0).all()
        read = network[2].weight.detach().ne(0).any(0)
        assert after.ne(before)[mask & read[:, None]].float().mean() > 0.5
        assert pruner.masks["0"].equal(mask)


def test_training_is_that_of_a_network_multiplied_by_its_mask():
    """Gradient descent by hand on what is kept alone."""
    network = dense(3).double()
    pruner = WeightPruner(network, "0", 0.5)
    pruner.prune(1, 1)
    mask = pruner.masks["0"].double()
    weight, bias = (p.detach().clone().requires_grad_() for p in network.parameters())
    steps(network, torch.optim.SGD(network.parameters(), lr=0.1), 4, pruner)
    for _ in range(4):
        loss = F.cross_entropy(F.linear(IMAGES.double(), weight * mask, bias), LABELS)
        gradients = torch.autograd.grad(loss, (weight, bias))
        with torch.no_grad():
            weight -= 0.1 * gradients[0]
            bias -= 0.1 * gradients[1]
    torch.testing.assert_close(network[0].weight.detach(), weight.detach() * mask)


@pytest.mark.parametrize("event", [1, 3])
def test_state_is_carried_over(event):
    network, other = dense(), dense()
    pruner = WeightPruner(network, "0", 0.8)
    for i in range(1, event + 1):
        pruner.prune(i, 4)
    resumed = WeightPruner(other, "0", 0.8)
    resumed.load_state_dict(pruner.state_dict())
    assert other[0].weight.equal(network[0].weight)
    assert pruner.prune(4, 4) == resumed.prune(4, 4)
    assert resumed.masks["0"].equal(pruner.masks["0"])


# Networks


def test_several_layers_each_by_its_own_fraction():
    network = models.build("conv4", width=0.25)
    pruner = WeightPruner(network, ["features.2", "dense", "fc"], [0.25, 0.9, 0.5])
    removed = pruner.prune(1, 1)
    sizes = {"features.2": 8 * 8 * 9, "dense": 128 * 576, "fc": 1280}
    left = {"features.2": 432, "dense": 7373, "fc": 640}
    assert {name: int(mask.sum()) for name, mask in pruner.masks.items()} == left
    assert removed == sum(sizes.values()) - sum(left.values())
    for name in left:
        weight = network.get_submodule(name).weight.detach().abs()
        assert weight.count_nonzero() == left[name]
    assert network.features[0].weight.ne(0).all()


# Bad input


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"layer": "dens"}, r"'dens': one of features\.0, .*features\.8, dense, fc"),
        ({"layer": "features.1"}, r"'features\.1'"),  # a ReLU
        ({"layer": ""}, "''"),
        ({"layer": ["fc", "dense"]}, "forward order"),
        ({"layer": ["fc", "fc"]}, "once each"),
        ({"fraction": 1.0}, r"\[0, 1\), got 1"),
        ({"fraction": 1}, r"\[0, 1\), got 1"),
        ({"fraction": -0.1}, r"\[0, 1\), got -0\.1"),
        ({"fraction": math.nan}, "got nan"),
        ({"layer": ["dense", "fc"], "fraction": [0.5, 1.5]}, r"got 1\.5"),
        ({"layer": ["dense", "fc"], "fraction": [0.5]}, "1 fractions for 2 layers"),
        ({"target": "biggest"}, "'biggest': one of smallest, largest, random"),
        ({"schedule": "cosine"}, "'cosine': one of linear, annealing"),
        ({"schedule": "annealing", "mu": -1}, "mu must be at least 0, got -1"),
        ({"mu": -0.5}, "mu must be at least 0"),
    ],
)
def test_what_cannot_be_done(options, named):
    network = models.build("conv4", width=0.1)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(PruningError, match=named):
        WeightPruner(network, **{"layer": "dense", "fraction": 0.5} | options)
    assert all(tensor.equal(before[name]) for name, tensor in network.state_dict().items())
