"""Noise on chosen filters, against training loops that spell out every batch."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperlib.noise import KINDS, FilterNoise
from paperlib.papers import tradeoff_2020
from paperlib.papers.noise_spans import training_batches, with_noise
from paperlib.pruning import FilterPruner, PruningError

torch.set_num_threads(1)

# T: a training batch; E: an evaluation batch; 0, 1: an event of the first or second convolution.
# The second 0 comes 12 passes after the first: its noise is just over with N = 11, not with 15.
PROGRAM = "TTTEE0EETTE1EETTTEE0TETTEETTTEE1TETTTETTEETT"
# Filters of either, and how many each of its events chooses.
FILTERS, CHOSEN = (5, 7), ((2, 2), (1, 2))
FRACTIONS = (0.8, 0.5)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    a, b = FILTERS
    model = nn.Sequential(
        nn.Conv2d(2, a, 3),
        nn.BatchNorm2d(a),
        nn.ReLU(),
        nn.Conv2d(a, b, 3),
        nn.BatchNorm2d(b),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * b, 3),
    )
    for norm in (model[1], model[4]):
        nn.init.normal_(norm.weight, 1, 0.2)
        nn.init.normal_(norm.bias, 0, 0.2)
    return model


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=0.01)
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


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


def noised(model: nn.Module, kind: str, passes: int, seed: int = 7) -> FilterNoise:
    pruner = FilterPruner(model, FRACTIONS, target="largest", norm=False)
    return FilterNoise(model, pruner, kind, passes, torch.Generator().manual_seed(seed))


def steps(
    model: nn.Module, noise: FilterNoise, optimizer: torch.optim.Optimizer, start: int = 0
) -> Iterator[dict[str, Tensor]]:
    """The program with `FilterNoise`, the network's state after every step of it."""
    for i, step in list(enumerate(PROGRAM))[start:]:
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
    """The same, with nothing but loops."""
    model = network()
    optimizer = optimizer_of(name, model)
    convs, norms = (model[0], model[3]), (model[1], model[4])
    never = [list(range(filters)) for filters in FILTERS]
    latest, passes, saved = [[], []], [math.inf, math.inf], [{}, {}]
    chance = torch.Generator().manual_seed(7)
    for i, step in enumerate(PROGRAM):
        if step in "01":
            layer = int(step)
            weight = convs[layer].weight.data
            by_norm = sorted(never[layer], key=lambda k: -float(weight[k].norm()))
            latest[layer] = by_norm[: CHOSEN[layer][PROGRAM[:i].count(step)]]
            never[layer] = [k for k in never[layer] if k not in latest[layer]]
            passes[layer] = 0
            values = (convs[layer].weight.data, *norm_tensors(norms[layer]))
            saved[layer] = [value.clone() for value in values]
        else:
            for layer in (0, 1):
                passes[layer] += 1
                weight = convs[layer].weight.data
                values = (weight, *norm_tensors(norms[layer]))
                every = [k for k in range(FILTERS[layer]) if k not in never[layer]]
                if kind == "zeroing" and passes[layer] <= n + 1:
                    for k in latest[layer]:
                        weight[k] = 0
                if kind == "gaussian" and passes[layer] <= n + 1:
                    deviation = weight[never[layer][0]].std()
                    drawn = torch.randn(len(latest[layer]), *weight[0].shape, generator=chance)
                    for k, normal in zip(latest[layer], drawn, strict=True):
                        weight[k] += normal * deviation
                if kind == "restored" and passes[layer] <= n:
                    for k in every:
                        for value in values[:3]:
                            value[k] = 0
                if kind == "restored" and passes[layer] == n + 1:
                    for k in every:
                        for value, old in zip(values, saved[layer], strict=True):
                            value[k] = old[k]
            if step == "T":
                train_on(model, optimizer, i)
            else:
                model.eval()
                with torch.no_grad():
                    model(batch(i)[0])
        yield snapshot(model)


def norm_tensors(norm: nn.BatchNorm2d) -> tuple[Tensor, ...]:
    return norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("passes", [0, 1, 11, 15])
@pytest.mark.parametrize("kind", KINDS)
def test_every_batch_is_as_by_hand(kind, passes, optimizer):
    model = network()
    noise = noised(model, kind, passes)
    with_noise = steps(model, noise, optimizer_of(optimizer, model))
    for i, (state, expected) in enumerate(
        zip(with_noise, by_hand(kind, passes, optimizer), strict=True)
    ):
        assert same(state, expected), f"step {i} ({PROGRAM[i]})"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [8, 14, 20])
def test_goes_on_from_its_state_in_the_middle_of_a_span(kind, start, tmp_path):
    model = network()
    noise, optimizer = noised(model, kind, 15), optimizer_of("adam", model)
    whole = steps(model, noise, optimizer)
    for _ in range(start):
        next(whole)
    assert any(key.startswith("noise.passes") for key in noise.state_dict())
    state = {
        "model": model.state_dict(),
        "noise": noise.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, tmp_path / "checkpoint")
    noise.generator.manual_seed(11)
    expected = list(whole)

    state = torch.load(tmp_path / "checkpoint", weights_only=True)
    model = network()
    noise, optimizer = noised(model, kind, 15, seed=11), optimizer_of("adam", model)
    model.load_state_dict(state["model"])
    noise.load_state_dict(state["noise"])
    assert same(model.state_dict(), state["model"])
    optimizer.load_state_dict(state["optimizer"])
    resumed = list(steps(model, noise, optimizer, start))
    assert all(same(a, b) for a, b in zip(resumed, expected, strict=True))


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_removal_is_for_good_and_leaves_batch_norm_alone(kind, resumed):
    model = network()
    noise, optimizer = noised(model, kind, 2), optimizer_of("adam", model)
    for _ in zip(range(18), steps(model, noise, optimizer), strict=False):
        pass
    if resumed:
        state = noise.state_dict()
        noise = noised(model, kind, 2)
        noise.load_state_dict(state)
    before = snapshot(model)
    noise.remove()
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in noise.masks:
            assert not tensor[~noise.masks[layer]].any()
            assert torch.equal(tensor[noise.masks[layer]], before[name][noise.masks[layer]])
        else:
            assert torch.equal(tensor, before[name])
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


def test_measurements_in_a_pause_are_no_passes():
    model = network().eval()
    noise = noised(model, "gaussian", 0)
    noise.prune(1, 2)
    before = snapshot(model)
    with noise.by_hand():
        model(batch(0)[0])
    assert same(before, model.state_dict())
    model(batch(0)[0])
    assert not same(before, model.state_dict())


class Late(nn.Module):
    """Norms after an activation, after joining channels, and in groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3)
        self.groups, self.joined = nn.GroupNorm(2, 4), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 3, 1)
        for parameter in (*self.groups.parameters(), *self.joined.parameters()):
            nn.init.uniform_(parameter, 0.5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.a(x).relu(), self.groups(self.b(x).relu())], 1)
        return self.head(self.joined(x))


def test_restored_noise_reaches_norms_wherever_they_are():
    model = Late().eval()
    pruner = FilterPruner(model, [0.5], target="largest", norm=False, layers=["b"])
    noise = FilterNoise(model, pruner, "restored", 2)
    noise.prune(1, 1)
    before, reads = snapshot(model), []
    model.head.register_forward_pre_hook(lambda module, inputs: reads.append(inputs[0]))
    lost = torch.cat([torch.zeros(4, dtype=torch.bool), ~noise.masks["b"]])
    with torch.no_grad():
        for passes in range(1, 5):
            model(batch(0)[0])
            zero = {
                "b.weight": ~noise.masks["b"],
                **{f"groups.{key}": ~noise.masks["b"] for key in ("weight", "bias")},
                **{f"joined.{key}": lost for key in ("weight", "bias")},
            }
            for name, tensor in model.state_dict().items():
                if name in zero and passes <= 2:
                    assert not tensor[zero[name]].any()
                    assert torch.equal(tensor[~zero[name]], before[name][~zero[name]])
                else:
                    assert torch.equal(tensor, before[name])
            biased = model.b.bias[~noise.masks["b"]].any()
            assert biased
            assert bool(reads[-1][:, lost].any()) == (passes > 2)
    state = noise.state_dict()
    again = FilterNoise(model, pruner, "restored", 2)
    again.load_state_dict(state)
    assert not again.busy


def test_restored_noise_needs_zeros_that_can_be_followed():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Softmax2d(), nn.Conv2d(4, 2, 1))
    pruner = FilterPruner(model, [0.5], layers=["0"], norm=False)
    with pytest.raises(PruningError, match=r"'0'.*'1'"):
        FilterNoise(model, pruner, "restored", 1)
    FilterNoise(model, pruner, "zeroing", 1)


def test_noise_that_cannot_be():
    model = network()
    pruner = FilterPruner(model, FRACTIONS, norm=False)
    with pytest.raises(PruningError, match=r"'rain'.*zeroing, gaussian, restored"):
        FilterNoise(model, pruner, "rain", 1)
    with pytest.raises(PruningError, match="at least 0, got -1"):
        FilterNoise(model, pruner, "zeroing", -1)
    with pytest.raises(PruningError, match="norm=False"):
        FilterNoise(model, FilterPruner(model, FRACTIONS), "zeroing", 1)


# Passes and training batches


PAPER = tradeoff_2020.VGG_PRUNE_WEIGHTS.config


@pytest.mark.parametrize(
    ("kinds", "evaluation_batch", "spans"),
    [
        (("zeroing", "gaussian"), 128, {0: 0, 51: 129, 1106: 1500}),  # figure 5
        (("restored",), 256, {89: 129, 630: 750, 1220: 1500, 2480: 3000}),  # figure D2
    ],
)
def test_the_spans_of_the_papers_figures(kinds, evaluation_batch, spans):
    for kind in kinds:
        configs = [with_noise(PAPER, kind, n, evaluation_batch) for n in spans]
        assert [config.noise.passes for config in configs] == list(spans.values())


@pytest.mark.parametrize("evaluation_batch", [128, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_passes_and_training_batches_are_inverse(kind, evaluation_batch):
    for batches in (0, 1, 2, 89, 390, 391, 392, 393, 781, 782, 783, 784, 1106, 1173, 1174):
        config = with_noise(PAPER, kind, batches, evaluation_batch)
        assert config.noise.evaluation_batch == evaluation_batch
        assert training_batches(config) == batches
