"""Pruning of single weights, against formulas and masks written out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from pruned_networks import OPTIMIZERS, assert_refused, exactly_kept, generator, unchanged
from torch import nn

from paperlib import models
from paperlib.pruning import PruningError, WeightPruner


def dense(inputs: int, outputs: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs))


@pytest.mark.parametrize(("schedule", "mu"), [("linear", 0), ("annealing", 0), ("annealing", 5)])
@pytest.mark.parametrize("target", ["largest", "smallest", "random"])
def test_events_follow_the_schedule(schedule, mu, target):
    network = dense(33, 10)
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
        assert pruner.held()["0.weight"].equal(~mask)
        before = mask.clone()


@pytest.mark.parametrize(("target", "left"), [("largest", [0, 3, 5]), ("smallest", [1, 2, 4])])
def test_targets_go_by_magnitude(target, left):
    values = torch.tensor([0.1, -5.0, 2.0, -0.3, 4.0, 0.2])
    network = dense(6, 1)
    network[0].weight.data[0] = values
    pruner = WeightPruner(network, "0", 0.5, target)
    assert pruner.prune(1, 1) == 3
    assert pruner.masks["0"][0].nonzero().flatten().tolist() == left
    assert network[0].weight[0].equal(values * pruner.masks["0"][0])


def test_random_weights_come_from_the_generator():
    masks = []
    for seed in (0, 0, 1):
        pruner = WeightPruner(dense(20, 5), "0", 0.5, "random", generator=generator(seed))
        pruner.prune(1, 1)
        masks.append(pruner.masks["0"])
    assert masks[0].equal(masks[1])
    assert not masks[0].equal(masks[2])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_that_of_a_network_multiplied_by_its_mask(name):
    network = dense(20, 12).extend([nn.ReLU(), nn.Linear(12, 3)])
    twin = copy.deepcopy(network)
    pruner = WeightPruner(network, "0", 0.8)
    ours, theirs = (OPTIMIZERS[name](model.parameters()) for model in (network, twin))
    x, labels = torch.randn(16, 20, generator=generator(1)), torch.arange(16) % 3
    for event in range(5):  # before the first one, momentum that pulls at what is pruned then
        if event:
            pruner.prune(event, 4)
        mask = pruner.masks["0"].clone()
        twin[0].weight.data.mul_(mask)
        for _ in range(4):
            for model, optimizer in ((network, ours), (twin, theirs)):
                optimizer.zero_grad()
                F.cross_entropy(model(x), labels).backward()
                optimizer.step()
            pruner.hold()
            twin[0].weight.data.mul_(mask)
        assert network[0].weight.ne(0).equal(mask)
        torch.testing.assert_close(network.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_several_layers_each_by_its_own_fraction():
    network = models.build("conv4", width=0.25)
    left = {"features.2": 432, "dense": 7373, "fc": 640}
    pruner = WeightPruner(network, list(left), [0.25, 0.9, 0.5])
    assert pruner.prune(1, 1) == 8 * 8 * 9 + 128 * 576 + 1280 - sum(left.values())
    assert {name: int(mask.sum()) for name, mask in pruner.masks.items()} == left
    for name, count in left.items():
        assert network.get_submodule(name).weight.count_nonzero() == count
    assert network.features[0].weight.all()


# Bad input


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"layer": "dens"}, r"'dens': one of features\.0, .*features\.8, dense, fc"),
        ({"layer": "features.1"}, r"'features\.1'"),  # a ReLU
        ({"layer": ""}, "''"),
        ({"layer": 3}, "got 3"),
        ({"layer": ["fc", "dense"]}, "in order: "),
        ({"layer": ["fc", "fc"]}, "once each"),
        ({"fraction": "0.5"}, "got '0.5'"),
        ({"fraction": None}, "got None"),
        ({"fraction": 1}, r"\[0, 1\), got 1"),
        ({"fraction": -0.1}, r"\[0, 1\), got -0\.1"),
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
    with unchanged(network):
        assert_refused(
            named, WeightPruner, network, **{"layer": "dense", "fraction": 0.5} | options
        )


def test_layers_of_other_types_are_named_as_such():
    network = nn.Sequential(nn.Conv1d(3, 6, 3), nn.Embedding(3, 6))
    assert_refused(r"'0'.*nn\.Linear.*nn\.Conv2d", WeightPruner, network, "0", 0.5)


@pytest.mark.parametrize(("event", "events"), [([1], 2), (1.0, 2), (1, "2"), (None, 2)])
@pytest.mark.parametrize("schedule", ["linear", "annealing"])
def test_bad_events(event, events, schedule):
    pruner = WeightPruner(dense(6, 2), "0", 0.5, schedule=schedule)
    with pytest.raises(PruningError, match=r"\[1\]|1\.0|'2'|None"):
        pruner.prune(event, events)
    assert pruner.masks["0"].all()
