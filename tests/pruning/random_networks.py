"""Small networks made at random, and the same networks with each tensor masked by hand.

A network is a tree of bodies, each a list of steps on the tensors so far. `Body.masked` sets a
pruned filter's channel to zero after every step: a residual sum has the channels of its branch.
It knows nothing of how `paperlib.pruning` follows zeros, and calls no hook.
"""

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pruned_networks import Apply, gate
from torch import Tensor, nn

from paperlib.models import ResidualSum

# Layers that keep zeros, and layers that spoil them.
KEEPING = [nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.Hardswish, nn.ELU, nn.Softshrink, nn.Identity]
KEEPING += [lambda: nn.LeakyReLU(0.2), lambda: nn.Dropout(0.0)]
KEEPING += [lambda: nn.MaxPool2d(3, 1, 1), lambda: nn.AvgPool2d(3, 1, 1)]
SPOILING = [nn.Sigmoid, nn.Softplus, nn.Hardsigmoid]
SPOILING += [lambda: nn.Threshold(0.1, 0.5), lambda: nn.Hardtanh(0.3, 2.0)]
FUNCTIONS = [  # which keep zeros; the first four may come after a sum
    F.relu,
    lambda x: x.relu(),
    lambda x: 2 * x,
    lambda x: x.clamp(-1, 1),
    lambda x: x.clone().relu_(),
    lambda x: x * x,
    lambda x: x * x.sigmoid(),
    abs,
    lambda x: x.view(*(x.shape[i] for i in range(4))),
    lambda x: F.dropout(x, 0.0),
    lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1),
]
STRANGE = [  # spoiling, across channels, or not known; the last one is for 8 channels
    lambda x: x + 1,
    torch.exp,
    lambda x: x.cumsum(1),
    lambda x: x.softmax(1),
    lambda x: F.layer_norm(x, x.shape[1:]),
    lambda x: x.flip(1),
    lambda x: x - x.mean(1, keepdim=True),
    lambda x: x.view(-1, 4, 4, 4).relu().view(x.shape),
]
SUMS = [  # the first five are of two tensors and no more
    lambda a, b: a + b,
    lambda a, b: b + a,
    torch.add,
    lambda a, b: a.add(b),
    lambda a, b: a.clone().add_(b),
    lambda a, b: operator.iadd(a.clone(), b),
    lambda a, b: sum([a, b]),
    lambda a, b: torch.stack([b, a]).sum(0),
    lambda a, b: torch.sum(torch.stack([a, b], dim=1), dim=1),
    lambda a, b: a + b + b,
    lambda a, b: b + (a + b),
]


def scale(channels: int) -> nn.Module:
    factors = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)
    return Apply(lambda net, x: x * net.factors, factors=factors)


class Step(NamedTuple):
    kind: str  # conv, gate, cat, equal or body, which change the channels that are kept; or ""
    sources: tuple[int, ...]
    function: Callable | None  # None: the body's part of this step


class Body(nn.Module):
    """Steps on the tensors so far; returns the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.parts = nn.ModuleDict()

    def add(self, part: Callable, *sources: int, kind: str = "") -> int:
        """Append a step, on the last tensor by default; return the number of its result."""
        number, is_module = len(self.steps), isinstance(part, nn.Module)
        if is_module:
            self.parts[f"p{number}"] = part
        self.steps.append(Step(kind, sources or (number,), None if is_module else part))
        return number + 1

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for i, step in enumerate(self.steps):
            part = step.function or self.parts[f"p{i}"]
            values.append(part(*(values[k] for k in step.sources)))
        return values[-1]

    def masked(
        self, x: Tensor, kept: Tensor, filters: dict[str, Tensor], seen: dict, path: str
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, each tensor masked; and which of the last one's channels are kept.

        `filters`: those that are kept, by name of convolution. `seen` gets the channels that each
        layer which mixes channels reads.
        """
        values = [(x, kept)]
        for i, step in enumerate(self.steps):
            inputs, there = zip(*(values[k] for k in step.sources), strict=True)
            name, part, kept = f"{path}parts.p{i}", step.function or self.parts[f"p{i}"], there[0]
            if step.kind == "body":
                values.append(part.masked(inputs[0], kept, filters, seen, f"{name}."))
                continue
            if step.kind == "conv":
                seen[name] = kept
                kept = filters.get(name, torch.ones(part.out_channels, dtype=torch.bool))
            elif step.kind == "gate":
                seen[f"{name}.conv"] = kept
            elif step.kind == "cat":
                kept = torch.cat(there)
            elif step.kind == "equal":
                kept = torch.ones_like(kept)
            if isinstance(part, ResidualSum):
                part = operator.add
            x = getattr(part, "forward", part)(*(one.clone() for one in inputs))
            values.append((x * kept[:, None, None], kept))
        return values[-1]


@dataclass
class Maker:
    """Makes random networks; `wild` ones may hold operations that spoil zeros or mix channels."""

    chance: random.Random
    wild: bool
    convs: list[str] = field(default_factory=list)  # without those on shortcuts

    def network(self) -> "Network":
        body, channels = Body(), 3
        for unit in range(self.chance.randint(2, 4)):
            makes = [self._unit, self._unit]
            if unit:
                makes += [self._residual, self._concatenation, self._residual]
                makes += [self._depthwise, self._factors, self._factors]
            if unit and self.wild:
                makes += [self._strange, self._equal]
            channels = self.chance.choice(makes)(body, channels)
        return Network(body, channels, self.chance.random() < 0.5)

    def _conv(self, body: Body, channels: int, filters: int, *source: int, path="body.") -> int:
        size = self.chance.choice([1, 3])
        bias = self.chance.random() < 0.7
        conv = nn.Conv2d(channels, filters, size, padding=size // 2, bias=bias)
        self.convs.append(f"{path}parts.p{len(body.steps)}")
        return body.add(conv, *source, kind="conv")

    def _between(self, body: Body, channels: int, *, norm: float = 0.6) -> None:
        """Perhaps a norm; activations and pools before and after it."""
        norms = [nn.BatchNorm2d(channels), nn.GroupNorm(2, channels)]
        norms.append(nn.InstanceNorm2d(channels, affine=True))
        self._activations(body, channels)
        if self.chance.random() < norm:
            body.add(self.chance.choice(norms))
        self._activations(body, channels)

    def _activations(self, body: Body, channels: int) -> None:
        for _ in range(self.chance.randint(0, 2)):
            if self.chance.random() < 0.1:
                body.add(nn.PReLU(channels))
            elif self.chance.random() < 0.4:
                body.add(self.chance.choice(FUNCTIONS))
            else:
                body.add(self.chance.choice(KEEPING)())

    def _unit(self, body: Body, channels: int) -> int:
        filters = self.chance.choice([4, 6, 8])
        self._conv(body, channels, filters)
        self._between(body, filters)
        return filters

    def _depthwise(self, body: Body, channels: int) -> int:
        bias = self.chance.random() < 0.5
        body.add(nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=bias))
        self._between(body, channels)
        return channels

    def _factors(self, body: Body, channels: int) -> int:
        if self.chance.random() < 0.5:
            body.add(gate(channels), kind="gate")
        else:
            body.add(scale(channels))
        return channels

    def _residual(self, body: Body, channels: int) -> int:
        """A block: a branch of convolutions, and the block's input or a convolution of it."""
        inside = f"body.parts.p{len(body.steps)}."
        block, filters = Body(), self.chance.choice([4, 6, channels])
        width, source = channels, 0
        for i in range(count := self.chance.randint(2, 3)):
            outputs = filters if i == count - 1 else self.chance.choice([4, 6])
            self._conv(block, width, outputs, *([] if i else [0]), path=inside)
            self._between(block, outputs)
            width = outputs
        branch = len(block.steps)
        if filters != channels:
            source = block.add(nn.Conv2d(channels, filters, 1), 0, kind="conv")
        add = ResidualSum() if self.chance.random() < 0.3 else self.chance.choice(SUMS)
        block.add(add, branch, source)
        for _ in range(self.chance.randint(0, 2)):
            block.add(self.chance.choice(FUNCTIONS[:4]))
        body.add(block, kind="body")
        return filters

    def _concatenation(self, body: Body, channels: int) -> int:
        source, total, ends = len(body.steps), 0, []
        if self.chance.random() < 0.5:
            ends, total = [source], channels
        for _ in range(self.chance.randint(1, 2)):
            filters = self.chance.choice([4, 6])
            self._conv(body, channels, filters, source)
            self._between(body, filters, norm=0.3)
            ends.append(len(body.steps))
            total += filters
        self.chance.shuffle(ends)
        body.add(lambda *tensors: torch.cat(tensors, 1), *ends, kind="cat")
        self._between(body, total)
        return total

    def _strange(self, body: Body, channels: int) -> int:
        if self.chance.random() < 0.5:
            body.add(self.chance.choice(SPOILING)())
        else:
            body.add(self.chance.choice(STRANGE if channels == 8 else STRANGE[:-1]))
        self._between(body, channels)
        return channels

    def _equal(self, body: Body, channels: int) -> int:
        """A sum of two convolutions, neither of which is a shortcut."""
        source = len(body.steps)
        ends = [self._conv(body, channels, 4, source) for _ in range(2)]
        body.add(self.chance.choice(SUMS[:5]), *ends, kind="equal")
        return 4


class Network(nn.Module):
    """A random body, and a dense layer on all of its pixels or on their means."""

    def __init__(self, body: Body, channels: int, pooled: bool) -> None:
        super().__init__()
        self.body, self.pooled = body, pooled
        self.head = nn.Linear(channels if pooled else channels * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(x.mean((2, 3)) if self.pooled else x.flatten(1))

    def masked(self, x: Tensor, filters: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The output with these filters alone; and which channels are read.

        The latter, bool (channels,), by name of each layer that mixes channels.
        """
        seen = {}
        x, there = self.body.masked(x, torch.ones(3, dtype=torch.bool), filters, seen, "body.")
        seen["head"] = there.repeat_interleave(self.head.in_features // len(there))
        return self.head(x.mean((2, 3)) if self.pooled else x.flatten(1)), seen
