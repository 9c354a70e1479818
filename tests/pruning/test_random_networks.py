"""Random networks: a pruned filter is zero where it is used, or pruning it is refused."""

import copy
import random

import pytest
import torch
from pruned_networks import assert_refused, unchanged, with_varied_norms
from random_networks import Maker, Network
from torch import nn

from paperlib.pruning import FilterPruner, prunable_layers

CHUNK = 25


def made(seed: int, wild: bool) -> tuple[Network, list[str]]:
    """A network, and its convolutions that are no shortcut."""
    torch.manual_seed(seed)
    maker = Maker(random.Random(seed), wild)
    return with_varied_norms(maker.network()).double(), maker.convs


def check(network: Network, layers: list[str], seed: int) -> None:
    """Prune, train on a step, prune again; compare with a copy that is masked by hand."""
    pruner = FilterPruner(network, [0.6] * len(layers), "l1", "random", layers)
    pruner.generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 4, 4).double()
    assert pruner.prune(1, 2) > 0
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=0.1)
    for event in (1, 2):
        network.train()(x.clone()).square().sum().backward()
        optimizer.step()
        pruner.hold()
        pruner.prune(event, 2)
    twin, reads = copy.deepcopy(network), {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            module.register_forward_pre_hook(lambda m, i, name=name: reads.update({name: i[0]}))
    for training in (False, True):
        expected, there = twin.train(training).masked(x.clone(), pruner.masks)
        output = network.train(training)(x.clone())
        assert torch.allclose(output, expected, rtol=1e-6, atol=1e-8)
        assert reads.keys() >= there.keys()
        for name, kept in there.items():
            assert not reads[name][:, ~kept].any(), f"{name} reads a pruned filter"


@pytest.mark.parametrize("start", range(0, 250, CHUNK))
def test_networks_of_known_operations_are_pruned(start):
    for seed in range(start, start + CHUNK):
        network, convs = made(seed, wild=False)
        layers = list(prunable_layers(network))
        assert set(layers) >= set(convs)
        check(network, [name for name in layers if name in convs], seed)


@pytest.mark.parametrize("start", range(1000, 1250, CHUNK))
def test_networks_of_any_operations_are_pruned_right_or_refused(start):
    refused = pruned = 0
    for seed in range(start, start + CHUNK):
        network, convs = made(seed, wild=True)
        layers = prunable_layers(network)
        for name in set(convs) - set(layers):
            with unchanged(network):
                assert_refused(f"{name!r}", FilterPruner, network, [0.5], layers=[name])
            refused += 1
        chosen = [name for name in layers if name in convs]
        pruned += len(chosen)
        if chosen:
            check(network, chosen, seed)
    assert refused > 0
    assert pruned > refused
