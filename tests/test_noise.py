"""Noise on chosen filters, against training loops that spell out every batch."""

import math
import re
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperlib.noise import KINDS, FilterNoise
from paperlib.papers import tradeoff_2020
from paperlib.papers.noise_spans import training_batches, with_noise
from paperlib.pruning import FilterPruner, PruningError, WeightPruner
from tests.pruning.pruned_networks import OPTIMIZERS, with_varied_norms

# T: a training batch; E: an evaluation batch; 0, 1: an event of the first or second convolution.
# The second 0 comes 12 passes after the first: its noise is just over with N = 11, not with 15.
PROGRAM = "TTTEE0EETTE1EETTTEE0TETTEETTTEE1TETTTETTEETT"
# Filters of either, and how many each of its events chooses.
FILTERS, CHOSEN = (5, 7), ((2, 2), (1, 2))
FRACTIONS = (0.8, 0.5)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    a, b = FILTERS
    layers = [nn.Conv2d(2, a, 3), nn.BatchNorm2d(a), nn.ReLU()]
    layers += [nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU()]
    return with_varied_norms(nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * b, 3)))


def batch(i: int) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(i)
    x = torch.randn(8, 2, 6, 6, generator=chance)
    return x, torch.randint(3, (8,), generator=chance)


def train_on(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    x, y = batch(i)
    model.train()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def noised(model: nn.Module, kind: str, passes: int) -> FilterNoise:
    pruner = FilterPruner(model, FRACTIONS, target="largest", norm=False)
    return FilterNoise(model, pruner, kind, passes, torch.Generator().manual_seed(7))


def steps(model, noise: FilterNoise, optimizer) -> Iterator[dict[str, Tensor]]:
    """The network's state after every step of the program, with `FilterNoise`."""
    for i, step in enumerate(PROGRAM):
        if step == "T":
            train_on(model, optimizer, i)
            noise.hold()
        elif step == "E":
            model.eval()
            with torch.inference_mode():
                model(batch(i)[0])
        else:
            layer, event = int(step), PROGRAM[: i + 1].count(step)
            assert noise.prune([event if k == layer else None for k in (0, 1)], [2, 2]) > 0
        yield snapshot(model)


def by_hand(kind: str, n: int, name: str) -> Iterator[dict[str, Tensor]]:
    """The same, by counting the passes since each layer's event."""
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    tensors = [
        (conv.weight.data, norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var)
        for conv, norm in ((model[0], model[1]), (model[3], model[4]))
    ]
    never = [list(range(filters)) for filters in FILTERS]
    latest, passes, saved = [[], []], [math.inf, math.inf], [{}, {}]
    chance = torch.Generator().manual_seed(7)
    for i, step in enumerate(PROGRAM):
        if step in "01":
            layer = int(step)
            weight = tensors[layer][0]
            by_norm = sorted(never[layer], key=lambda k: -float(weight[k].norm()))
            latest[layer] = by_norm[: CHOSEN[layer][PROGRAM[:i].count(step)]]
            never[layer] = [k for k in never[layer] if k not in latest[layer]]
            passes[layer] = 0
            saved[layer] = [tensor.clone() for tensor in tensors[layer]]
        else:
            for layer in (0, 1):
                passes[layer] += 1
                weight, *_ = values = tensors[layer]
                every = [k for k in range(FILTERS[layer]) if k not in never[layer]]
                if kind == "zeroing" and passes[layer] <= n + 1:
                    weight[latest[layer]] = 0
                if kind == "gaussian" and passes[layer] <= n + 1:
                    deviation = weight[never[layer][0]].std()
                    drawn = torch.randn(len(latest[layer]), *weight[0].shape, generator=chance)
                    weight[latest[layer]] += drawn * deviation
                if kind == "restored" and passes[layer] <= n:
                    for value in values[:3]:
                        value[every] = 0
                if kind == "restored" and passes[layer] == n + 1:
                    for value, old in zip(values, saved[layer], strict=True):
                        value[every] = old[every]
            if step == "T":
                train_on(model, optimizer, i)
            else:
                model.eval()
                with torch.no_grad():
                    model(batch(i)[0])
        yield snapshot(model)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("passes", [0, 1, 11, 15])
@pytest.mark.parametrize("kind", KINDS)
def test_every_batch_is_as_by_hand(kind, passes, optimizer):
    model = network()
    noise = noised(model, kind, passes)
    states = steps(model, noise, OPTIMIZERS[optimizer](model.parameters()))
    pairs = zip(states, by_hand(kind, passes, optimizer), strict=True)
    for i, (state, expected) in enumerate(pairs):
        assert same(state, expected), f"step {i} ({PROGRAM[i]})"


@pytest.mark.parametrize("kind", KINDS)
def test_removal_is_for_good_and_leaves_batch_norm_alone(kind):
    model = network()
    noise, optimizer = noised(model, kind, 2), OPTIMIZERS["adam"](model.parameters())
    list(islice(steps(model, noise, optimizer), 18))
    expected = snapshot(model)
    for name, mask in noise.masks.items():
        expected[f"{name}.weight"][~mask] = 0
    noise.remove()
    assert same(model.state_dict(), expected)
    assert noise.held().keys() == {"0.weight", "3.weight"}
    for i in range(3):
        train_on(model, optimizer, i)
        noise.hold()
        assert not model[0].weight[~noise.masks["0"]].any()
    again = network()
    other = noised(again, kind, 2)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(noise.state_dict())
    assert other.removed
    assert same(again.state_dict(), model.state_dict())
    assert other.prune([2, None], 2) == 2
    assert not again[0].weight[~other.masks["0"]].any()


class Late(nn.Module):
    """Norms after an activation, after joining channels, and in groups; a depthwise layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3)
        self.spread = nn.ConvTranspose2d(4, 4, 1, groups=4)
        self.groups, self.joined = nn.GroupNorm(2, 4), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 3, 1)
        for parameter in (*self.groups.parameters(), *self.joined.parameters()):
            nn.init.uniform_(parameter, 0.5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.a(x).relu(), self.groups(self.spread(self.b(x).relu()))], 1)
        return self.head(self.joined(x))


def test_restored_noise_reaches_norms_wherever_they_are():
    model = Late().eval()
    pruner = FilterPruner(model, [0.5], target="largest", norm=False, layers=["b"])
    noise = FilterNoise(model, pruner, "restored", 2)
    noise.prune(1, 1)
    before, reads = snapshot(model), []
    model.head.register_forward_pre_hook(lambda module, inputs: reads.append(inputs[0]))
    gone = ~noise.masks["b"]
    lost = torch.cat([torch.zeros(4, dtype=torch.bool), gone])
    zero = {"b.weight": gone, "groups.weight": gone, "groups.bias": gone}
    zero |= {"joined.weight": lost, "joined.bias": lost}
    with torch.no_grad():
        for passes in range(1, 5):
            model(batch(0)[0])
            for name, tensor in model.state_dict().items():
                expected = before[name].clone()
                if name in zero and passes <= 2:
                    expected[zero[name]] = 0
                assert torch.equal(tensor, expected)
            assert model.b.bias[gone].any()
            assert bool(reads[-1][:, lost].any()) == (passes > 2)
    again = FilterNoise(model, pruner, "restored", 2)
    again.load_state_dict(noise.state_dict())
    assert not again.busy
    noise.prune(1, 1)
    pruner.masks["b"][:] = True
    noise.prune(1, 1)
    state = noise.state_dict()
    for name in ("noise.removed", "noise.passes.b", "noise.scale.1.b", "mask.b"):
        assert name in state
        with pytest.raises(PruningError, match=f"'{re.escape(name)}'"):
            again.load_state_dict({key: x for key, x in state.items() if key != name})
    assert not again.busy
    again.load_state_dict(state)
    assert again.busy


def test_restored_noise_needs_zeros_that_can_be_followed():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Softmax2d(), nn.Conv2d(4, 2, 1))
    pruner = FilterPruner(model, [0.5], layers=["0"], norm=False)
    with pytest.raises(PruningError, match=r"'0'.*'1'"):
        FilterNoise(model, pruner, "restored", 1)
    FilterNoise(model, pruner, "zeroing", 1)


def test_noise_that_cannot_be():
    model, tiny = network(), nn.Sequential(nn.Conv2d(1, 4, 1))
    pruner = FilterPruner(model, FRACTIONS, norm=False)
    for message, arguments in {
        r"'rain'.*zeroing, gaussian, restored": (model, pruner, "rain", 1),
        "noise passes .*got -1": (model, pruner, "zeroing", -1),
        r"noise passes .*got 1\.5": (model, pruner, "zeroing", 1.5),
        "noise passes .*got '1'": (model, pruner, "zeroing", "1"),
        "norm=False": (model, FilterPruner(model, FRACTIONS), "zeroing", 1),
        "WeightPruner": (model, WeightPruner(model, "0", 0.5), "zeroing", 1),
        "another network.*'0'": (network(), pruner, "zeroing", 1),
        "'0' is one weight": (tiny, FilterPruner(tiny, [0.5], norm=False), "gaussian", 1),
    }.items():
        with pytest.raises(PruningError, match=message):
            FilterNoise(*arguments)
    FilterNoise(nn.Sequential(model), pruner, "zeroing", 1)


PAPER = tradeoff_2020.VGG_PRUNE_WEIGHTS.config
FIGURE_5, FIGURE_D2 = {0: 0, 51: 129, 1106: 1500}, {89: 129, 630: 750, 1220: 1500, 2480: 3000}


@pytest.mark.parametrize(
    ("kind", "evaluation_batch", "spans"),
    [("zeroing", 128, FIGURE_5), ("gaussian", 128, FIGURE_5), ("restored", 256, FIGURE_D2)],
)
def test_the_spans_of_the_papers_figures(kind, evaluation_batch, spans):
    configs = [with_noise(PAPER, kind, n, evaluation_batch) for n in spans]
    assert [config.noise.passes for config in configs] == list(spans.values())


@pytest.mark.parametrize("evaluation_batch", [128, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_passes_and_training_batches_are_inverse(kind, evaluation_batch):
    for batches in (0, 1, 2, 89, 390, 391, 392, 393, 781, 782, 783, 784, 1106, 1173, 1174):
        config = with_noise(PAPER, kind, batches, evaluation_batch)
        assert config.noise.evaluation_batch == evaluation_batch
        assert training_batches(config) == batches
