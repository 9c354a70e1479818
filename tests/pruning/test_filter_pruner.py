"""Filter pruning: networks masked by hand, events, state, bad input."""

import copy
import gc
import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pruned_networks import (
    RESNETS,
    assert_refused,
    exactly_kept,
    generator,
    gone,
    images,
    network,
    resnet_by_hand,
    small_net,
    unchanged,
)

from paperlib.pruning import FilterPruner, PruningError, WeightPruner, prunable_layers

# The pruned network, and its training


@pytest.mark.parametrize("name", RESNETS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("every", [True, False])
def test_pruned_resnet_is_one_whose_filters_are_masked_everywhere(name, training, every):
    model = network(name).train(training)
    twin = copy.deepcopy(model)
    count = len(prunable_layers(model)) - 1
    fractions = [0.5] * count if every else [0.25, 0.4, 0.25, 0.7]
    pruner = FilterPruner(model, fractions, target="random", generator=generator(1))
    pruner.prune(1, 2)
    pruner.prune(2, 2)

    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    x, labels = images(), torch.arange(4)
    logits = model(x)
    expected, given = resnet_by_hand(twin, x, pruner.masks)
    assert torch.allclose(logits, expected, rtol=0, atol=1e-9)
    for i, output in enumerate(outputs):
        block = F.relu(given[f"blocks.{i}.conv2"])
        assert torch.allclose(output, block, rtol=0, atol=1e-9)
        mask = pruner.masks.get(f"blocks.{i}.conv2", torch.ones(output.shape[1])).bool()
        assert not output[:, ~mask].any()

    F.cross_entropy(logits, labels).backward()
    F.cross_entropy(expected, labels).backward()
    held, theirs = pruner.held(), dict(twin.named_parameters())
    for key, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, theirs[key].grad, rtol=0, atol=1e-9), key
        assert not parameter.grad[held.get(key, torch.tensor(False))].any()


def test_only_weights_are_masked_without_norm():
    model = network("vgg11_bn")
    pruner = FilterPruner(model, [0.3, 0.9], "l2", "largest", norm=False)
    before = copy.deepcopy(model.state_dict())
    pruner.prune(1, 1)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"features.22.weight", "features.25.weight"} == set(pruner.held())


# What `prune` takes and returns


def test_events_of_some_layers():
    pruner = FilterPruner(network("vgg11_bn"), [0.3, 0.3, 0.3, 0.9])
    assert pruner.prune([1, None, None, None], [1, 5, 5, 9]) == 32 - 23
    removed = [0, 32 - exactly_kept(32, "0.3", 1, 5), 0, 32 - exactly_kept(32, "0.9", 3, 9)]
    assert pruner.prune([None, 1, None, 3], [1, 5, 5, 9]) == sum(removed)
    assert [len(filters) for filters in gone(pruner).values()] == [32 - 23, *removed[1:]]
    assert pruner.prune([None] * 4, 9) == 0


@pytest.mark.parametrize("number", [np.int64, np.array, torch.tensor])
def test_events_in_other_types_of_number(number):
    pruner = FilterPruner(small_net(), [0.5, 0.5])
    assert pruner.prune(number(1), number(2)) == 10 - 8 + 6 - 5
    assert pruner.prune([number(2), None], 2) == 8 - 5
    assert pruner.prune(number([2, 2]), 2) == 5 - 3
    for schedule in ("linear", "annealing"):
        one, other = (WeightPruner(small_net(), "3", 0.5, "largest", schedule, 1) for _ in "ab")
        assert one.prune(number(1), number(4)) == other.prune(1, 4) > 0


def test_the_last_layers_are_taken():
    assert FilterPruner(network("vgg11_bn"), [0.1, 0.2]).fractions == {
        "features.22": 0.1,
        "features.25": 0.2,
    }
    assert not FilterPruner(small_net(), []).masks


@pytest.mark.parametrize("name", RESNETS)
def test_layers_of_resnets(name):
    model = network(name)
    blocks = [f"blocks.{i}.{c}" for i in range(len(model.blocks)) for c in ("conv1", "conv2")]
    assert list(prunable_layers(model)) == ["conv1", *blocks]
    assert list(FilterPruner(model, [0.1] * 3).masks) == blocks[-3:]


def test_state_of_before_takes_pruning_back():
    model = network("resnet20")
    pruner = FilterPruner(model, [0.5])
    state = copy.deepcopy(pruner.state_dict())
    weights = copy.deepcopy(model.state_dict())
    expected = model.eval()(images())
    pruner.prune(1, 1)
    pruner.load_state_dict(state)
    model.load_state_dict(weights, strict=False)
    pruner.hold()
    assert not pruner.held()
    assert torch.equal(model(images()), expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state.clear(), r"'mask\.0'.*'mask\.3'.*'score\.0'.*'passes'"),
        (lambda state: state.pop("score.3"), r"'score\.3'"),
        (lambda state: state.update({"mask.3": torch.ones(4)}), r"'mask\.3'"),
        (lambda state: state.update({"mask.3": None}), r"'mask\.3'"),
        (lambda state: state.update({"mask.6": torch.ones(4)}), r"'mask\.6'"),
    ],
)
def test_states_of_other_pruners(change, named):
    model = small_net()
    pruner = FilterPruner(model, [0.5, 0.5], "activation")
    state = {name: torch.zeros_like(tensor) for name, tensor in pruner.state_dict().items()}
    change(state)
    with unchanged(model), pytest.raises(PruningError, match=named):
        pruner.load_state_dict(state)
    assert gone(pruner) == {"0": [], "3": []}


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fractions": [1.0]}, r"\[0, 1\), got 1.0"),
        ({"fractions": [0.5, -0.1]}, r"\[0, 1\), got -0.1"),
        ({"fractions": [math.nan]}, "got nan"),
        ({"fractions": [0.5] * 3}, "3 fractions, but Sequential has 2 .*convolutions: 0, 3"),
        ({"fractions": ["0.5"], "layers": ["3"]}, "got '0.5'"),
        ({"fractions": [[0.5, 0.5]]}, r"got \[0.5, 0.5\]"),
        ({"fractions": "0.5"}, "got '0.5'"),
        ({"fractions": torch.tensor(0.5)}, r"got tensor\(0.5"),
        ({"fractions": [0.5], "layers": "0"}, "got '0'"),
        ({"fractions": [0.5], "layers": ["0", "3"]}, "1 fractions for 2 layers"),
        ({"layers": ["0", "4"]}, "no prunable layer '4': one of 0, 3"),
        ({"layers": ["3", "0"]}, r"in order: \['0', '3'\], not \['3', '0'\]"),
        ({"layers": ["0", "0"]}, "once each"),
        ({"score": "l3"}, "unknown score 'l3': one of l2, l1, ebn, ebn_signed, activation"),
        ({"target": "worst"}, "unknown target 'worst': one of smallest, largest, random"),
        ({"target": "random", "generator": 0}, "Generator of the CPU, got 0"),
    ],
)
def test_bad_requests(options, message):
    assert_refused(message, FilterPruner, small_net(), **{"fractions": [0.5, 0.5]} | options)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda conv: torch.ones(3), r"score of '3' has shape \(3,\), not \(6,\)"),
        (lambda conv: conv.weight, r"score of '3' has shape \(6, 10, 3, 3\)"),
        (lambda conv: torch.ones(6) * math.nan, "score of '3' is not finite"),
        (lambda conv: torch.tensor([1, 2, math.inf, 4, 5, 6]), "score of '3' is not finite"),
        (lambda conv: torch.ones(6, dtype=torch.complex64), "score of '3' .*complex"),
        (lambda conv: conv.weight.grad.sum((1, 2, 3)), "score of '3' fails: 'NoneType'"),
        (lambda conv: None, "score of '3' fails"),
    ],
)
def test_bad_scores_change_nothing(score, message):
    model = small_net()
    pruner = FilterPruner(model, [0.5], score)
    with unchanged(model), pytest.raises(PruningError, match=message):
        pruner.prune(1, 1)
    assert gone(pruner) == {"3": []}


def test_a_score_may_compute_gradients():
    model = small_net()

    @torch.enable_grad()
    def sensitivity(conv):
        out = conv(torch.ones(1, 10, 3, 3)).square().sum()
        return torch.autograd.grad(out, conv.weight)[0].abs().sum((1, 2, 3))

    expected = (model[3].weight.sum((1, 2, 3)) + model[3].bias).abs().argsort()[:3]
    pruner = FilterPruner(model, [0.5], sensitivity)
    assert pruner.prune(1, 1) == 3
    assert gone(pruner) == {"3": expected.sort().values.tolist()}


@pytest.mark.parametrize(
    ("event", "events", "message"),
    [
        (3, 2, "event must be from 1 to 2, got 3"),
        (0, 2, "event must be from 1 to 2, got 0"),
        ([1], 2, "1 layers, but 2"),
        ([1, 1], [2, 2, 2], "2 are pruned"),
        ([None, 4], [1, 3], "from 1 to 3, got 4"),
        (1.5, 2, "got 1.5"),
        (1, 2.0, "got 2.0"),
        ([1, 1.0], 2, "got 1.0"),
        ("1", 2, "got '1'|1 layers"),
        (torch.tensor(0.5), 2, "got 0.5"),
    ],
)
def test_bad_events(event, events, message):
    pruner = FilterPruner(small_net(), [0.5, 0.5])
    with pytest.raises(PruningError, match=message):
        pruner.prune(event, events)
    assert not pruner.held()


@pytest.mark.parametrize("score", ["l2", "activation"])
def test_a_network_and_its_pruner_go_with_their_last_use(score):
    collects = gc.isenabled()
    gc.disable()
    try:
        model = network("resnet20")
        pruner = FilterPruner(model, [0.5] * len(prunable_layers(model)), score=score)
        kept = [weakref.ref(model), weakref.ref(pruner), *map(weakref.ref, model.parameters())]
        model(torch.randn(2, 3, 32, 32, dtype=torch.float64))
        del model, pruner
        assert [each() for each in kept] == [None] * len(kept)
    finally:
        if collects:
            gc.enable()


def test_scores_of_pruned_filters_need_not_be_finite():
    def score(conv):
        sizes = conv.weight.flatten(1).norm(dim=1)
        return sizes.square() / sizes  # NaN where a filter is zero

    pruner = FilterPruner(small_net(), [0.5], score)
    assert [pruner.prune(event, 3) for event in (1, 2, 3)] == [1, 1, 1]
