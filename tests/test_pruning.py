"""Filter pruning: schedules, scores, targets, and masked networks against cut ones."""

import copy
import doctest
import gc
import importlib
import math
import weakref
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from scipy import integrate, stats
from torch import nn
from torchvision.models.resnet import BasicBlock

import paperlib
from paperlib import experiments
from paperlib.config import FilterPruning, schedule
from paperlib.models import ResidualSum, build
from paperlib.pruning import (
    FilterPruner,
    PruningError,
    expected_activation,
    kept_filters,
    prunable_layers,
    select,
)

torch.set_num_threads(1)

WIDTHS = {"vgg11_bn": 1 / 16, "resnet18": 1 / 16, "resnet20": 0.5, "resnet56": 0.25}
RESNETS = ("resnet18", "resnet20", "resnet56")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(name: str, seed: int = 0, double: bool = True) -> nn.Module:
    """Narrow, with batch norms that differ from channel to channel."""
    torch.manual_seed(seed)
    model = build(name, width=WIDTHS[name])
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.randn(module.num_features).mul(0.3).add(0.8))
                module.bias.normal_(0, 0.5)
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    return model.double() if double else model


def small_net(*, bias: bool = True, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 10, 3, bias=bias), nn.BatchNorm2d(10), nn.ReLU()]
    layers += [nn.Conv2d(10, 6, 3, bias=bias), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*(m for m in layers if norm or not isinstance(m, nn.BatchNorm2d)))


def images(count: int = 4, seed: int = 0, size: int = 32, double: bool = True) -> torch.Tensor:
    x = torch.randn(count, 3, size, size, generator=generator(seed))
    return x.double() if double else x


def gone(pruner: FilterPruner) -> dict[str, list[int]]:
    return {name: (~mask).nonzero().flatten().tolist() for name, mask in pruner.masks.items()}


def indices(kept: torch.Tensor) -> torch.Tensor:
    return kept.nonzero().flatten()


# Schedules


def exactly_kept(filters: int, fraction: str, event: int, events: int) -> int:
    final = math.ceil((1 - Fraction(fraction)) * filters)
    return math.ceil(final + (filters - final) * Fraction(events - event, events))


@pytest.mark.parametrize("filters", [1, 2, 3, 10, 16, 30, 64, 100, 256, 300, 511, 512])
def test_kept_filters_in_exact_arithmetic(filters):
    fractions = [f"0.{i:02}" for i in range(0, 100, 2)] + [
        "0.001",
        "0.125",
        "0.35",
        "0.55",
        "0.999",
    ]
    for fraction in fractions:
        for events in (1, 2, 7, 37, 68):
            kept = [kept_filters(filters, float(fraction), i + 1, events) for i in range(events)]
            assert kept == [exactly_kept(filters, fraction, i + 1, events) for i in range(events)]


@pytest.mark.parametrize("event", [-1, 0, 5])
def test_an_event_there_is_not(event):
    with pytest.raises(PruningError, match=f"event must be from 1 to 4, got {event}"):
        kept_filters(8, 0.5, event, 4)


def count_events(filters, fractions, schedules) -> int:
    """Epochs on which at least one filter goes."""
    epochs = set()
    for count, fraction, events in zip(filters, fractions, schedules, strict=True):
        before = count
        for i, epoch in enumerate(events):
            kept = kept_filters(count, fraction, i + 1, len(events))
            if kept < before:
                epochs.add(epoch)
            before = kept
        assert before == math.ceil((1 - Fraction(str(fraction))) * count)
    return len(epochs)


VGG = ([512] * 4, (0.3, 0.3, 0.3, 0.9), (3, 4, 5, 6), (150, 150, 150, 275))
RESNET = ([512] * 4, (0.25, 0.4, 0.25, 0.95), (7, 8, 9, 10), (150, 150, 170, 275))
C1 = (RESNET[0], (0.25, 0.8, 0.25, 0.95), *RESNET[2:])
B2 = (RESNET[0], RESNET[1], (3, 4, 5, 6), RESNET[3])
BLOCKS_18 = [64] * 4 + [128] * 4 + [256] * 4 + [512] * 4
BLOCKS_20 = [16] * 6 + [32] * 6 + [64] * 6
BLOCKS_56 = [16] * 18 + [32] * 18 + [64] * 18
VGG_EVENTS = {4: 179, 20: 38, 40: 19, 60: 14, 100: 9, 200: 5, 300: 4}
EVENTS = [
    *((*VGG, period, events) for period, events in VGG_EVENTS.items()),
    (*RESNET, 4, 180),
    (*RESNET, 40, 20),
    (*C1, 4, 180),
    (*C1, 40, 20),
    (*B2, 4, 184),
    (*B2, 40, 20),
    *((f, 0.1, 40, 100, 30, 3) for f in (BLOCKS_18, BLOCKS_20, BLOCKS_56)),
    *((f, 0.1, 40, 100, 60, 2) for f in (BLOCKS_18, BLOCKS_20, BLOCKS_56)),
    (BLOCKS_18, 0.1, 24, 100, 1, 54),
    (BLOCKS_18, 0.06, 24, 100, 1, 34),
    ([512], 0.7, 2500, 3500, 750, 2),
]


@pytest.mark.parametrize(("filters", "fractions", "first", "last", "period", "events"), EVENTS)
def test_events_of_each_schedule_of_the_paper(filters, fractions, first, last, period, events):
    def each(value):
        return value if isinstance(value, tuple) else [value] * len(filters)

    ends = zip(each(first), each(last), strict=True)
    schedules = [schedule(a, b, period) for a, b in ends]
    assert count_events(filters, each(fractions), schedules) == events


def test_event_epochs_of_the_last_schedule():
    assert schedule(2500, 3500, 750) == (2500, 3250)


VALID = {
    ("figure-1", "VGG11"): {19},
    ("figure-2", "VGG11"): {179, 19},
    ("figure-2", "ResNet18"): {180, 20},
    ("figure-3", "VGG11"): set(VGG_EVENTS.values()),
    ("figure-4", "ResNet18"): {3, 2},
    ("figure-4", "ResNet20"): {3, 2},
    ("figure-4", "ResNet56"): {3, 2},
    ("figure-5", "VGG11"): {19},
    ("figure-D2", "VGG11"): {19},
    ("figure-6", "VGG11"): {179, 19},
    ("figure-C1", "VGG11"): set(VGG_EVENTS.values()),
    ("figure-C2", "VGG11"): set(VGG_EVENTS.values()),
    ("figure-B2", "VGG11"): {179, 19},
    ("figure-B2", "ResNet18"): {184, 20},
    ("figure-C3", "ResNet18"): {54, 34},
    ("table-C1", "ResNet18"): {180, 20},
    ("table-F1", "ResNet18"): {2},
}


@cache
def filters_of(model: str) -> list[int]:
    with torch.device("meta"):
        return [layer.filters for layer in prunable_layers(build(model)).values()]


@pytest.mark.parametrize("name", [n for n in experiments.FIGURES if n in {f for f, _ in VALID}])
def test_events_of_each_figure(name):
    found = {}
    for setting in experiments.figure(name).settings:
        pruning = setting.config.pruning
        if not isinstance(pruning, FilterPruning) or pruning.scratch:
            continue
        filters = filters_of(setting.config.model)[-len(pruning.fractions) :]
        events = count_events(filters, pruning.fractions, pruning.epochs)
        found.setdefault((name, setting.network), set()).add(events)
    assert found == {key: events for key, events in VALID.items() if key[0] == name}


# Scores


def expected_relu(gamma: float, beta: float) -> float:
    """By numerical integration, each side of the kink for itself."""

    def integrand(z):
        return max(gamma * z + beta, 0) * stats.norm.pdf(z)

    kink = -beta / gamma
    points = [-40, *([kink] if abs(kink) < 40 else []), 0, 40]
    pieces = zip(sorted(points), sorted(points)[1:], strict=False)
    return sum(integrate.quad(integrand, a, b, epsabs=1e-13)[0] for a, b in pieces)


def closed_form(gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    alpha = -beta / gamma
    return stats.norm.sf(alpha) * beta + stats.norm.pdf(alpha) * gamma


def test_expected_activation_is_the_expected_value():
    values = [(g, b) for g in (-2.5, -0.3, 0.01, 0.5, 1, 4) for b in (-3, -1, -0.1, 0, 0.2, 1, 5)]
    gamma, beta = torch.tensor(values, dtype=torch.float64).T
    expected = torch.tensor([expected_relu(g, b) for g, b in values], dtype=torch.float64)
    assert torch.allclose(expected_activation(gamma, beta), expected, atol=1e-10)
    single = expected_activation(gamma.float(), beta.float())
    assert single.dtype == torch.float32
    assert torch.allclose(single, expected.float(), atol=1e-6)


def test_signed_expected_activation():
    gamma, beta = torch.linspace(-3, 3, 50).double(), torch.linspace(4, -4, 50).double()
    formula = torch.from_numpy(closed_form(gamma.numpy(), beta.numpy()))
    assert torch.allclose(expected_activation(gamma, beta, signed=True), formula, atol=1e-12)
    negative = gamma < 0
    assert (formula < expected_activation(gamma, beta))[negative].all()
    unsigned = expected_activation(gamma, beta)[~negative]
    assert torch.allclose(unsigned, formula[~negative], atol=1e-12)


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


def test_deep_negatives_tie_at_zero_in_single_precision():
    beta = torch.tensor([-6.0, -7.0, -20.0, -1e30])
    assert not expected_activation(torch.ones(4), beta).any()
    assert expected_activation(torch.ones(4).double(), beta.double())[0] > 0

    model = small_net()
    nn.init.constant_(model[4].bias, -1)
    with torch.no_grad():
        model[4].bias[[2, 4]] = torch.tensor([-6.0, -7.0])
    pruner = FilterPruner(model.double(), [1 / 6], "ebn")
    pruner.prune(1, 1)
    assert gone(pruner) == {"3": [2]}


def plain_score(score: str, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> list[float]:
    weights = conv.weight.detach().double().numpy()
    gamma, beta = norm.weight.detach().double().numpy(), norm.bias.detach().double().numpy()
    if score in ("l1", "l2"):
        power = int(score[1])
        return [float((np.abs(w) ** power).sum() ** (1 / power)) for w in weights]
    return list(closed_form(abs(gamma) if score == "ebn" else gamma, beta))


@pytest.mark.parametrize("score", ["l1", "l2", "ebn", "ebn_signed"])
@pytest.mark.parametrize("target", ["smallest", "largest"])
def test_the_worst_by_score_go_first(score, target):
    model = network("vgg11_bn", double=False)
    pruner = FilterPruner(model, [0.6, 0.3], score, target)
    worst = {}
    for name, layer in pruner.layers.items():
        order = np.argsort(plain_score(score, layer.conv, layer.norm))
        worst[name] = (order if target == "smallest" else order[::-1]).tolist()
    for event in (1, 2, 3):
        removed = pruner.prune(event, 3)
        before = gone(pruner)
        for (name, order), fraction in zip(worst.items(), ("0.6", "0.3"), strict=True):
            count = 32 - exactly_kept(32, fraction, event, 3)
            assert sorted(order[:count]) == before[name]
        assert removed > 0
    assert [len(filters) for filters in gone(pruner).values()] == [32 - 13, 32 - 23]


def test_the_bias_does_not_count_in_norms():
    model = small_net(norm=False)
    with torch.no_grad():
        model[2].weight.copy_(torch.arange(1.0, 7)[:, None, None, None])
        model[2].bias.copy_(torch.tensor([100.0, 0, 0, 0, 0, 0]))
    pruner = FilterPruner(model, [1 / 6], "l2", layers=["2"])
    pruner.prune(1, 1)
    assert gone(pruner) == {"2": [0]}


def taken_out(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pre-ReLU outputs of a ResNet's layers in training mode, computed beside it."""
    out, seen = F.relu(model.bn1(model.conv1(x))), {}
    for i, block in enumerate(model.blocks):
        seen[f"blocks.{i}.conv1"] = block.bn1(block.conv1(out))
        branch = block.bn2(block.conv2(F.relu(seen[f"blocks.{i}.conv1"])))
        shortcut = block.shortcut(out)
        if block.sum.keep is not None:
            shortcut = shortcut * block.sum.keep
        seen[f"blocks.{i}.conv2"] = branch + shortcut
        out = F.relu(seen[f"blocks.{i}.conv2"])
    return seen


def test_activation_score_by_brute_force():
    model = network("resnet20", double=False)
    layers = ["blocks.2.conv1", "blocks.2.conv2", "blocks.3.conv1", "blocks.3.conv2"]
    pruner = FilterPruner(model, [0.5] * 4, "activation", layers=layers)
    expected = {name: torch.zeros(pruner.layers[name].filters) for name in layers}

    for batch in range(1, 34):
        x = images(2, seed=batch, size=8, double=False)
        if batch % 10 == 0:
            seen = taken_out(copy.deepcopy(model).train(), x)
            for name in layers:
                expected[name] *= 0.9
                expected[name] += 0.1 * seen[name].detach().abs().sum(dim=(0, 2, 3))
        model.train()
        model(x)
        if batch % 4 == 0:
            model.eval()
            model(x)
        if batch == 15:
            pruner.prune(1, 2)
    for name in layers:
        assert torch.allclose(pruner.activation.scores[name], expected[name], rtol=1e-4, atol=1e-3)

    before = {name: set(filters) for name, filters in gone(pruner).items()}
    pruner.prune(2, 2)
    for name, filters in gone(pruner).items():
        order = [i for i in expected[name].argsort().tolist() if i not in before[name]]
        new = set(filters) - before[name]
        assert new == set(order[: len(new)])
        assert new


def test_activation_score_starts_at_zero():
    model = network("vgg11_bn", double=False)
    pruner = FilterPruner(model, [0.5], "activation")
    for batch in range(9):
        model(images(2, seed=batch, double=False))
    assert not pruner.activation.scores["features.25"].any()
    pruner.prune(1, 1)
    assert gone(pruner) == {"features.25": list(range(16))}


# Targets


@pytest.mark.parametrize(("target", "first"), [("smallest", [1, 3]), ("largest", [0, 2])])
def test_ties_by_position(target, first):
    model = small_net()
    values = torch.tensor([2.0, 1, 2, 1, 2, 1])
    pruner = FilterPruner(model, [1 / 3], lambda conv: values, target)
    pruner.prune(1, 1)
    assert gone(pruner) == {"3": first}


@pytest.mark.parametrize("target", ["smallest", "largest", "random"])
def test_only_kept_filters_are_chosen(target):
    model = small_net()
    scores = torch.arange(6.0)
    pruner = FilterPruner(model, [5 / 6], lambda conv: scores, target, generator=generator())
    seen = []
    for event in range(1, 6):
        assert pruner.prune(event, 5) == 1
        (new,) = set(gone(pruner)["3"]) - set(seen)
        seen.append(new)
        scores = scores.flip(0)
    if target == "smallest":
        assert seen == [0, 5, 1, 4, 2]
    if target == "largest":
        assert seen == [5, 0, 4, 1, 3]


def test_a_score_need_not_be_finite_where_nothing_is_kept():
    pruner = FilterPruner(small_net(), [2 / 3], lambda conv: 1 / conv.weight.flatten(1).norm(dim=1))
    assert pruner.prune(1, 2) + pruner.prune(2, 2) == 4


def drawn(seed: int) -> list[int]:
    pruner = FilterPruner(small_net(), [0.5], "l2", "random", ["0"], generator(seed))
    pruner.prune(1, 1)
    return gone(pruner)["0"]


def test_random_choice_repeats_with_its_seed():
    draws = [drawn(seed) for seed in range(10)]
    assert draws == [drawn(seed) for seed in range(10)]
    assert len({tuple(draw) for draw in draws}) > 5


def test_random_choice_is_uniform():
    kept = torch.tensor([True] * 6 + [False] * 4)
    draws = [select(None, kept, 2, "random", generator(seed)).tolist() for seed in range(1500)]
    pairs = [i + 6 * j for i, j in draws if i != j]
    assert len(pairs) == len(draws)
    counts = np.bincount(pairs, minlength=36)
    assert counts[counts > 0].size == 30
    assert stats.chisquare(counts[counts > 0]).pvalue > 1e-3


# Masked networks against cut ones


def cut_vgg(model: nn.Module, masks: dict[str, torch.Tensor]) -> nn.Sequential:
    """A network without the filters that are not in `masks`."""
    layers, alive = [], torch.arange(3)
    for name, module in model.features.named_children():
        if isinstance(module, nn.Conv2d):
            kept = indices(masks.get(f"features.{name}", torch.ones(module.out_channels)))
            conv = nn.Conv2d(len(alive), len(kept), 3, padding=1).double()
            conv.weight = nn.Parameter(module.weight.detach()[kept][:, alive].clone())
            conv.bias = nn.Parameter(module.bias.detach()[kept].clone())
            layers.append(conv)
            alive = kept
        elif isinstance(module, nn.BatchNorm2d):
            norm = nn.BatchNorm2d(len(alive)).double()
            for key in ("weight", "bias", "running_mean", "running_var"):
                getattr(norm, key).data = getattr(module, key).detach()[alive].clone()
            layers.append(norm)
        else:
            layers.append(copy.deepcopy(module))
    dense = nn.Linear(len(alive), 10).double()
    dense.weight = nn.Parameter(model.classifier[2].weight.detach()[:, alive].clone())
    dense.bias = nn.Parameter(model.classifier[2].bias.detach().clone())
    return nn.Sequential(*layers, nn.Flatten(), dense)


def cut_resnet(model: nn.Module, weights: dict, masks: dict, x: torch.Tensor, training: bool):
    """Logits and block outputs from `weights`, the filters not in `masks` sliced away."""

    def norm(out, name, kept):
        stats = [weights[f"{name}.running_{s}"][kept].clone() for s in ("mean", "var")]
        gamma, beta = (weights[f"{name}.{p}"][kept] for p in ("weight", "bias"))
        return F.batch_norm(out, *stats, gamma, beta, training)

    out = F.conv2d(x, weights["conv1.weight"], padding=1)
    out = F.relu(norm(out, "bn1", torch.arange(out.shape[1])))
    alive, outputs = torch.arange(out.shape[1]), []
    for i, block in enumerate(model.blocks):
        name, stride = f"blocks.{i}", block.conv1.stride[0]
        first, second = (weights[f"{name}.{conv}.weight"] for conv in ("conv1", "conv2"))
        inner = indices(masks.get(f"{name}.conv1", torch.ones(len(first))))
        outer = indices(masks.get(f"{name}.conv2", torch.ones(len(second))))
        branch = F.conv2d(out[:, alive], first[inner][:, alive], stride=stride, padding=1)
        branch = F.relu(norm(branch, f"{name}.bn1", inner))
        branch = F.conv2d(branch, second[outer][:, inner], padding=1)
        branch = norm(branch, f"{name}.bn2", outer)
        if isinstance(block.shortcut, nn.Identity):
            shortcut = out[:, outer]
        elif f"{name}.shortcut.1.weight" in weights:
            projection = weights[f"{name}.shortcut.1.weight"][outer]
            shortcut = F.conv2d(out, projection, stride=stride)
            shortcut = norm(shortcut, f"{name}.shortcut.2", outer)
        else:
            before = (len(second) - out.shape[1]) // 2
            wide = out.new_zeros(len(out), len(second), *branch.shape[2:])
            wide[:, before : before + out.shape[1]] = out[:, :, ::2, ::2]
            shortcut = wide[:, outer]
        kept = F.relu(branch + shortcut)
        out = kept.new_zeros(len(kept), len(second), *kept.shape[2:]).index_copy(1, outer, kept)
        alive = outer
        outputs.append(out)
    logits = F.linear(
        out.mean((2, 3))[:, alive], weights["fc.weight"][:, alive], weights["fc.bias"]
    )
    return logits, outputs


@pytest.mark.parametrize("name", RESNETS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("every", [True, False])
def test_masked_resnet_is_one_without_the_filters(name, training, every):
    model = network(name).train(training)
    weights = {
        key: value.detach().clone().requires_grad_("running" not in key)
        for key, value in model.state_dict().items()
        if value.is_floating_point()
    }
    count = len(prunable_layers(model)) - 1
    fractions = [0.5] * count if every else [0.25, 0.4, 0.25, 0.7]
    pruner = FilterPruner(model, fractions, target="random", generator=generator(1))
    pruner.prune(1, 2)
    pruner.prune(2, 2)

    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    x = images()
    logits = model(x)
    cut_logits, cut_outputs = cut_resnet(model, weights, pruner.masks, x, training)
    assert torch.allclose(logits, cut_logits, rtol=0, atol=1e-9)
    for i, (output, cut) in enumerate(zip(outputs, cut_outputs, strict=True)):
        mask = pruner.masks.get(f"blocks.{i}.conv2", torch.ones(output.shape[1], dtype=torch.bool))
        assert not output[:, ~mask].any()
        assert torch.allclose(output, cut, rtol=0, atol=1e-9)

    labels = torch.arange(len(x))
    F.cross_entropy(logits, labels).backward()
    F.cross_entropy(cut_logits, labels).backward()
    held = pruner.held()
    for key, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, weights[key].grad, rtol=0, atol=1e-9), key
        assert not parameter.grad[held.get(key, torch.tensor(False))].any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("score", ["l1", "ebn"])
def test_masked_vgg_is_one_without_the_filters(training, score):
    model = network("vgg11_bn").train(training)
    pruner = FilterPruner(model, [0.3, 0.3, 0.3, 0.9], score)
    original = copy.deepcopy(model)
    pruner.prune(1, 1)
    cut = cut_vgg(original, pruner.masks).train(training)
    assert torch.allclose(model(images()), cut(images()), rtol=0, atol=1e-10)


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=0.01)
    if name == "adam, decay":
        return torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def step(model: nn.Module, optimizer, seed: int, double: bool = True) -> None:
    x = images(seed=seed, double=double)
    optimizer.zero_grad()
    F.cross_entropy(model(x), torch.arange(len(x))).backward()
    optimizer.step()


@pytest.mark.parametrize("optimizer", ["adam", "adam, decay", "sgd"])
@pytest.mark.parametrize("name", ["vgg11_bn", "resnet18"])
def test_pruned_parameters_stay_zero(name, optimizer):
    model = network(name, double=False)
    pruner = FilterPruner(model, [0.3, 0.3, 0.3, 0.9], "ebn", "largest")
    steps = optimizer_of(optimizer, model)
    event, parameters = 0, dict(model.named_parameters())
    for seed in range(8):
        step(model, steps, seed, double=False)
        pruner.hold()
        if seed in (2, 4):
            event += 1
            assert pruner.prune(event, 2)
        held = pruner.held()
        assert bool(held) == bool(event)
        for key, zero in held.items():
            assert zero.shape == parameters[key].shape
            assert not parameters[key][zero].any()
            assert parameters[key][~zero].all() or key.endswith("bias")
    kept = [exactly_kept(32, f, 2, 2) for f in ("0.3", "0.3", "0.3", "0.9")]
    assert [int(m.sum()) for m in pruner.masks.values()] == kept
    per_layer = 4 if name == "vgg11_bn" else 3
    assert len(held) == 4 * per_layer


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_rest_trains_like_a_cut_network(optimizer):
    model = network("vgg11_bn")
    pruner = FilterPruner(model, [0.3, 0.3, 0.3, 0.9], target="random", generator=generator())
    original = copy.deepcopy(model)
    pruner.prune(1, 1)
    cut = cut_vgg(original, pruner.masks)
    nets = model.train(), cut.train()
    optimizers = [optimizer_of(optimizer, net) for net in nets]
    for seed in range(4):
        step(model, optimizers[0], seed)
        pruner.hold()
        step(cut, optimizers[1], seed)
    trained = cut_vgg(model, pruner.masks)
    for a, b in zip(trained.state_dict().values(), cut.state_dict().values(), strict=True):
        if a.is_floating_point():
            assert torch.allclose(a, b, rtol=0, atol=1e-6)
    trained.eval(), cut.eval()
    assert torch.allclose(model.eval()(images(seed=9)), cut(images(seed=9)), atol=1e-6)
    assert torch.allclose(trained(images(seed=9)), cut(images(seed=9)), atol=1e-6)


def test_only_weights_are_masked_without_norm():
    model = network("vgg11_bn")
    pruner = FilterPruner(model, [0.3, 0.9], "l2", "largest", norm=False)
    before = copy.deepcopy(model.state_dict())
    pruner.prune(1, 1)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"features.22.weight", "features.25.weight"} == set(pruner.held())

    model.eval()
    norm, conv, mask = model.features[26], model.features[25], pruner.masks["features.25"]
    constant = (conv.bias - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    constant = constant * norm.weight + norm.bias
    seen = model.features[:27](images())
    assert torch.allclose(
        seen[:, ~mask], constant[~mask][:, None, None].expand(-1, 2, 2), atol=1e-10
    )
    seen = model.train().features[:27](images())
    assert torch.allclose(
        seen[:, ~mask], norm.bias[~mask][:, None, None].expand(-1, 2, 2), atol=1e-10
    )


def test_shortcuts_stay_without_norm():
    model = network("resnet20")
    pruner = FilterPruner(model, [0.5], norm=False)
    pruner.prune(1, 1)
    mask = pruner.masks["blocks.8.conv2"]
    outputs = []
    model.blocks[8].register_forward_hook(lambda module, inputs, out: outputs.append((inputs, out)))
    model.train()(images())
    (shortcut,), out = outputs[0]
    beta = model.blocks[8].bn2.bias[:, None, None]
    assert torch.allclose(out[:, ~mask], F.relu(shortcut + beta)[:, ~mask], atol=1e-10)


# What `prune` takes and returns


def test_events_of_some_layers():
    model = network("vgg11_bn")
    pruner = FilterPruner(model, [0.3, 0.3, 0.3, 0.9])
    assert pruner.prune([1, None, None, None], [1, 5, 5, 9]) == 32 - 23
    assert pruner.prune([None, 1, None, 3], [1, 5, 5, 9]) == sum(
        32 - exactly_kept(32, f, i, n) for f, i, n in (("0.3", 1, 5), ("0.9", 3, 9))
    )
    assert len(gone(pruner)["features.22"]) == 0
    assert pruner.prune([None] * 4, 9) == 0


def test_an_event_reaches_its_number_whatever_went_before():
    pruner = FilterPruner(small_net(), [0.5], layers=["0"])
    assert pruner.prune(3, 5) == 3
    assert pruner.prune(2, 5) == 0
    assert pruner.prune(5, 5) == 2
    assert pruner.prune(5, 5) == 0


def test_nothing_goes_at_fraction_zero():
    model = network("resnet18")
    before = copy.deepcopy(model.state_dict())
    pruner = FilterPruner(model, [0.0, 0.0], target="largest")
    assert pruner.prune(1, 1) == 0
    assert not pruner.held()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_last_layers_are_taken():
    pruner = FilterPruner(build("vgg11_bn", width=1 / 16), [0.1, 0.2])
    assert pruner.fractions == {"features.22": 0.1, "features.25": 0.2}
    pruner = FilterPruner(build("resnet18", width=1 / 16), [0.1] * 4)
    last = ["blocks.6.conv1", "blocks.6.conv2", "blocks.7.conv1", "blocks.7.conv2"]
    assert list(pruner.masks) == last
    assert not FilterPruner(small_net(), []).masks


@pytest.mark.parametrize("name", RESNETS)
def test_prunable_layers_of_resnets(name):
    model = build(name, width=WIDTHS[name])
    blocks = [f"blocks.{i}.{c}" for i in range(len(model.blocks)) for c in ("conv1", "conv2")]
    layers = prunable_layers(model)
    assert list(layers) == ["conv1", *blocks]
    assert layers["conv1"].norm is model.bn1
    for i, block in enumerate(model.blocks):
        first, second = layers[f"blocks.{i}.conv1"], layers[f"blocks.{i}.conv2"]
        assert (first.norm, first.sum, second.norm, second.sum) == (
            block.bn1,
            None,
            block.bn2,
            block.sum,
        )


def test_choosing_leaves_the_weights():
    model = network("vgg11_bn")
    before = copy.deepcopy(model.state_dict())
    pruner = FilterPruner(model, [0.25], "l1")
    chosen = pruner.choose(1, 2)
    assert [len(filters) for filters in chosen.values()] == [4]
    assert gone(pruner) == {"features.25": sorted(chosen["features.25"].tolist())}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    again = pruner.choose(2, 2)["features.25"]
    assert not set(again.tolist()) & set(chosen["features.25"].tolist())


@pytest.mark.parametrize("score", ["l2", "activation"])
def test_state_goes_on_where_it_was(score):
    def pruned(model):
        return FilterPruner(model, [0.5, 0.5], score, "largest")

    whole = network("resnet20", double=False)
    pruner = pruned(whole)

    def train(model, passes):
        for seed in passes:
            model.train()(images(2, seed, size=8, double=False))

    train(whole, range(14))
    pruner.prune(1, 3)
    state = {k: v.clone() for k, v in pruner.state_dict().items()}
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    weights = {k: v.clone() for k, v in whole.state_dict().items() if not k.endswith("keep")}

    resumed = network("resnet20", seed=5, double=False)
    second = pruned(resumed)
    resumed.load_state_dict(weights)
    second.load_state_dict(state)
    x = images(size=8, double=False)
    assert torch.equal(whole.eval()(x), resumed.eval()(x))
    for model in (whole, resumed):
        train(model, range(14, 25))
    assert pruner.prune(2, 3) == second.prune(2, 3) > 0
    assert gone(pruner) == gone(second)
    assert torch.equal(whole.eval()(x), resumed.eval()(x))


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


def operations(model: nn.Module, x: torch.Tensor) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x)
    return [event.name for event in profile.events() if event.name.startswith("aten::")]


def test_a_pruned_network_computes_no_masks():
    model = network("vgg11_bn", double=False).train()
    x = images(double=False)
    pruner = FilterPruner(model, [0.3, 0.3, 0.3, 0.9])
    model(x)
    dense = operations(model, x)
    pruner.prune(1, 1)
    assert operations(model, x) == dense

    model = network("resnet18", double=False).train()
    pruner = FilterPruner(model, [0.5] * 4)
    model(x)
    dense = operations(model, x)
    pruner.prune(1, 1)
    sums, views = {"aten::add_", "aten::addcmul_"}, {"aten::to", "aten::resolve_conj"}
    ours, dense = (
        ["sum" if name in sums else name for name in names if name not in views]
        for names in (operations(model, x), dense)
    )
    assert ours == dense


def test_precision_is_the_same_before_and_after_pruning():
    model = network("resnet20", double=False)
    pruner, seen = FilterPruner(model, [0.5] * 18), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(images(double=False))
        pruner.prune(1, 1)
        model(images(double=False))
    assert set(seen) == {torch.bfloat16}


# Networks of one's own


def test_plain_sequential():
    model = small_net()
    pruner = FilterPruner(model, [0.5, 0.5], lambda conv: conv.bias)
    with torch.no_grad():
        model[0].bias.copy_(torch.arange(10.0))
        model[3].bias.copy_(-torch.arange(6.0))
    pruner.prune(1, 1)
    assert gone(pruner) == {"0": [0, 1, 2, 3, 4], "3": [3, 4, 5]}
    out = model(images(size=8, double=False))
    assert not out[:, 3:].any()
    assert out[:, :3].any()


def test_torchvisions_resnet():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    layers = prunable_layers(model)
    assert len(layers) == 17
    assert not [name for name in layers if "downsample" in name]

    pruner = FilterPruner(model, [0.5] * 16, lambda conv: conv.weight.flatten(1).amax(1), "largest")
    pruner.prune(1, 1)
    seen = []
    for block in (m for m in model.modules() if isinstance(m, BasicBlock)):
        block.register_forward_hook(lambda *call: seen.append(call))
    model(images(1, size=64, double=False))
    names = [name for name in pruner.masks if name.endswith("conv2")]
    for name, (block, (x,), out) in zip(names, seen, strict=True):
        branch = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
        shortcut = x if block.downsample is None else block.downsample(x)
        mask = pruner.masks[name]
        assert not out[:, ~mask].any()
        assert torch.allclose(out[:, mask], F.relu(branch + shortcut)[:, mask], atol=1e-5)


class PlainBlock(nn.Module):
    def __init__(self, add) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.side, self.add = nn.Conv2d(4, 4, 1), add

    def forward(self, x):
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(self.add(out, self.side(x)))


@pytest.mark.parametrize(
    "add", [torch.add, lambda a, b: a + b, lambda a, b: b + a, lambda a, b: a.add_(b)]
)
def test_plain_sum_is_pruned_like_a_residual_sum(add):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), PlainBlock(add), PlainBlock(add))
    ours = copy.deepcopy(plain)
    for block in ours[1:]:
        block.add = ResidualSum()
    for model in (plain, ours):
        assert list(prunable_layers(model)) == ["0", "1.conv1", "1.conv2", "2.conv1", "2.conv2"]
    fractions = [0.5] * 4
    pruners = [FilterPruner(model, fractions) for model in (plain, ours)]
    assert [p.prune(1, 1) for p in pruners] == [8, 8]
    assert gone(pruners[0]) == gone(pruners[1])
    x = images(size=8, double=False)
    outputs = [model(x) for model in (plain, ours)]
    assert torch.allclose(*outputs, atol=1e-6)
    assert not outputs[0][:, ~pruners[0].masks["2.conv2"]].any()
    for output in outputs:
        output.square().sum().backward()
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-4)


def test_grouped_convolutions_are_left_out():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=3), nn.Conv2d(6, 2, 1))
    assert list(prunable_layers(model)) == ["0", "2"]


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


class InlineSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv2(torch.relu(self.conv1(x) + x))


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fractions": [1.0]}, r"\[0, 1\), got 1.0"),
        ({"fractions": [0.5, -0.1]}, r"\[0, 1\), got -0.1"),
        ({"fractions": [math.nan]}, "got nan"),
        ({"fractions": [0.5] * 3}, "3 fractions, but Sequential has 2 .*convolutions: 0, 3"),
        ({"fractions": [0.5], "layers": ["0", "3"]}, "1 fractions for 2 layers"),
        ({"layers": ["0", "4"]}, "no prunable layer '4': one of 0, 3"),
        ({"layers": ["3", "0"]}, "in forward order"),
        ({"layers": ["0", "0"]}, "once each"),
        ({"score": "l3"}, "unknown score 'l3': one of l2, l1, ebn, ebn_signed, activation"),
        ({"target": "worst"}, "unknown target 'worst': one of smallest, largest, random"),
    ],
)
def test_bad_requests(options, message):
    with pytest.raises(PruningError, match=message):
        FilterPruner(small_net(), **{"fractions": [0.5, 0.5]} | options)


@pytest.mark.parametrize("score", ["ebn", "ebn_signed"])
def test_expected_activation_needs_batch_norm(score):
    with pytest.raises(PruningError, match=f"'{score}' needs a batch norm .* '2'"):
        FilterPruner(small_net(norm=False), [0.5], score)


def test_networks_that_cannot_be_followed():
    with pytest.raises(PruningError, match="cannot follow the forward pass of Branching"):
        FilterPruner(Branching(), [0.5])
    with pytest.raises(PruningError, match="ResidualSum"):
        FilterPruner(nn.Sequential(InlineSum()), [0.5])


def test_activation_cannot_see_a_plain_sum():
    model = nn.Sequential(PlainBlock(torch.add))
    with pytest.raises(PruningError, match=r"'0.conv2'.*ResidualSum"):
        FilterPruner(model, [0.5], "activation")


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda conv: torch.ones(3), r"score of '3' has shape \(3,\), not \(6,\)"),
        (lambda conv: conv.weight, r"score of '3' has shape \(6, 10, 3, 3\)"),
        (lambda conv: torch.ones(6) * math.nan, "score of '3' is not finite"),
        (lambda conv: torch.tensor([1, 2, math.inf, 4, 5, 6]), "score of '3' is not finite"),
    ],
)
def test_bad_scores_change_nothing(score, message):
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    pruner = FilterPruner(model, [0.5], score)
    with pytest.raises(PruningError, match=message):
        pruner.prune(1, 1)
    assert gone(pruner) == {"3": []}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("event", "events", "message"),
    [
        (3, 2, "event must be from 1 to 2, got 3"),
        (0, 2, "event must be from 1 to 2, got 0"),
        ([1], 2, "1 layers, but 2"),
        ([1, 1], [2, 2, 2], "2 are pruned"),
        ([None, 4], [1, 3], "from 1 to 3, got 4"),
    ],
)
def test_bad_events(event, events, message):
    pruner = FilterPruner(small_net(), [0.5, 0.5])
    with pytest.raises(PruningError, match=message):
        pruner.prune(event, events)
    assert not pruner.held()


# Documentation


MODULES = sorted(Path(paperlib.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("name", [m.stem for m in MODULES if ">>>" in m.read_text()])
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(f"paperlib.{name}"))
    assert result.failed == 0
    assert result.attempted > 0


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
