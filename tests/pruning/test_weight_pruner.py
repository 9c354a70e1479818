"""Pruning of single weights, against formulas and masks written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from pruned_networks import OPTIMIZERS, assert_refused, exactly_kept, generator, unchanged
from torch import nn

from paperlib import models
from paperlib.pruning import PruningError, WeightPruner


def dense(outputs: int = 5, inputs: int = 20) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs))


@pytest.mark.parametrize(("schedule", "mu"), [("linear", 0), ("annealing", 0), ("annealing", 5)])
@pytest.mark.parametrize("target", ["largest", "smallest", "random"])
def test_events_follow_the_schedule(schedule, mu, target):
    network = dense(10, 33)
    pruner = WeightPruner(network, "0", 0.9, target, schedule, mu, generator())
    before = pruner.masks["0"].clone()
    for event in range(1, 9):
        removed = pruner.prune(event, 8)
        mask = pruner.masks["0"]
        expected = exactly_kept(330, "0.9", event, 8, None if schedule == "linear" else mu)
        assert int(mask.sum()) == expected
        assert removed == int(before.sum()) - expected
        assert not (mask & ~before).any()  # none comes back
        assert network[0].weight.ne(0).equal(mask)
        before = mask.clone()
    assert int(before.sum()) == 33


@pytest.mark.parametrize(("target", "left"), [("largest", [0, 3, 5]), ("smallest", [1, 2, 4])])
def test_targets_go_by_magnitude(target, left):
    values = torch.tensor([0.1, -5.0, 2.0, -0.3, 4.0, 0.2])
    network = dense(1, 6)
    network[0].weight.data[0] = values
    pruner = WeightPruner(network, "0", 0.5, target)
    assert pruner.prune(1, 1) == 3
    assert pruner.masks["0"][0].nonzero().flatten().tolist() == left
    assert network[0].weight[0].equal(values * pruner.masks["0"][0])


# Zero stays zero

IMAGES, LABELS = torch.randn(16, 20, generator=generator(1)), torch.arange(16) % 3


def steps(network: nn.Module, optimizer: torch.optim.Optimizer, count: int, pruner) -> None:
    x = IMAGES.to(network[0].weight.dtype)
    for _ in range(count):
        loss = F.cross_entropy(network(x), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
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
        ({"layer": 3}, "got 3"),
        ({"fraction": "0.5"}, "got '0.5'"),
        ({"fraction": None}, "got None"),
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
    options = {"layer": "dense", "fraction": 0.5} | options
    with unchanged(network):
        assert_refused(named, WeightPruner, network, **options)


@pytest.mark.parametrize(("event", "events"), [([1], 2), (1.0, 2), (1, "2"), (None, 2)])
@pytest.mark.parametrize("schedule", ["linear", "annealing"])
def test_bad_events(event, events, schedule):
    pruner = WeightPruner(models.build("conv4", width=0.1), "dense", 0.5, schedule=schedule)
    with pytest.raises(PruningError, match=r"\[1\]|1\.0|'2'|None"):
        pruner.prune(event, events)
    assert pruner.masks["dense"].all()


def test_layers_of_other_types_are_named_as_such():
    network = nn.Sequential(nn.Conv1d(3, 6, 3), nn.Embedding(3, 6))
    assert_refused(r"'0'.*nn\.Linear.*nn\.Conv2d", WeightPruner, network, "0", 0.5)


def test_random_weights_come_from_the_generator():
    def chosen(seed):
        network = nn.Sequential(nn.Linear(20, 5))
        pruner = WeightPruner(network, "0", 0.5, "random", generator=generator(seed))
        pruner.prune(1, 1)
        return pruner.masks["0"]

    assert torch.equal(chosen(0), chosen(0))
    assert not torch.equal(chosen(0), chosen(1))


def test_held_weights_are_the_pruned_ones():
    network = nn.Sequential(nn.Linear(20, 5))
    pruner = WeightPruner(network, "0", 0.3)
    pruner.prune(1, 1)
    assert torch.equal(pruner.held()["0.weight"], network[0].weight == 0)
