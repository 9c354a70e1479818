"""Small networks made at random, and the same networks with each tensor masked by hand.

A network is a tree of bodies, each a list of steps on the tensors so far. `Body.run` with masks
sets a pruned filter's channel to zero after every step: a residual sum has the channels of its
branch. It knows nothing of how `paperlib.pruning` follows zeros, and calls no hook.
"""

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperlib.models import ResidualSum

KEEPING = {  # of zeros
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "elu": nn.ELU,
    "softshrink": nn.Softshrink,
    "identity": nn.Identity,
    "dropout": lambda: nn.Dropout(0.0),
    "max": lambda: nn.MaxPool2d(3, 1, 1),
    "average": lambda: nn.AvgPool2d(3, 1, 1),
}
SPOILING = {
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "hardsigmoid": nn.Hardsigmoid,
    "threshold": lambda: nn.Threshold(0.1, 0.5),
    "hardtanh": lambda: nn.Hardtanh(0.3, 2.0),
}
FUNCTIONS = {  # written as functions and methods: keeping zeros
    "F.relu": F.relu,
    "x.relu": lambda x: x.relu(),
    "x.relu_": lambda x: x.clone().relu_(),
    "2x": lambda x: 2 * x,
    "x * x": lambda x: x * x,
    "x * sigmoid": lambda x: x * x.sigmoid(),
    "abs": abs,
    "clamp": lambda x: x.clamp(-1, 1),
    "same shape": lambda x: x.view(*(x.shape[i] for i in range(4))),
    "F.dropout": lambda x: F.dropout(x, 0.0),
    "pooled": lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1),
}
STRANGE = {  # spoiling, across channels, or not known
    "x + 1": lambda x: x + 1,
    "exp": torch.exp,
    "cumsum": lambda x: x.cumsum(1),
    "softmax": lambda x: x.softmax(1),
    "layer norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "flip": lambda x: x.flip(1),
    "mean of channels": lambda x: x - x.mean(1, keepdim=True),
    "view": lambda x: x.view(-1, 4, 4, 4).relu().view(x.shape),
}
SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a + b": lambda a, b: a + b,
    "b + a": lambda a, b: b + a,
    "torch.add": lambda a, b: torch.add(a, b),
    "a.add": lambda a, b: a.add(b),
    "a.add_": lambda a, b: a.clone().add_(b),
    "iadd": lambda a, b: operator.iadd(a.clone(), b),
    "sum": lambda a, b: sum([a, b]),
    "stack": lambda a, b: torch.stack([b, a]).sum(0),
    "torch.sum": lambda a, b: torch.sum(torch.stack([a, b], dim=1), dim=1),
    "three": lambda a, b: a + b + b,
    "nested": lambda a, b: b + (a + b),
}


@dataclass
class Step:
    kind: str
    sources: list[int]
    part: str | None = None
    name: str = ""


@dataclass
class Masks:
    """The filters that are kept, by name of convolution; `seen`: what each mixing layer reads."""

    kept: dict[str, Tensor]
    seen: dict[str, Tensor] = field(default_factory=dict)


class Body(nn.Module):
    """Steps on the tensors so far; returns the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.parts = nn.ModuleDict()
        self.scales = nn.ParameterDict()

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            part = dict(self.parts.items()).get(step.part)
            values.append(self._after(step, part, [values[i] for i in step.sources]))
        return values[-1]

    def _after(self, step: Step, part: Callable | None, inputs: list[Tensor]) -> Tensor:
        if step.kind == "function":
            return (FUNCTIONS | STRANGE)[step.name](*inputs)
        if step.kind == "cat":
            return torch.cat(inputs, 1)
        if step.kind in ("residual", "equal"):
            return SUMS[step.name](*inputs) if part is None else part(*inputs)
        if step.kind == "gate":
            return inputs[0] * torch.sigmoid(part(F.adaptive_avg_pool2d(inputs[0], 1)))
        if step.kind == "scale":
            return inputs[0] * self.scales[step.part]
        return part(*inputs)

    def masked(self, x: Tensor, kept: Tensor, masks: Masks, path: str) -> tuple[Tensor, Tensor]:
        """As `forward`, each tensor masked; and which of the last one's channels are kept."""
        values = [(x, kept)]
        for step in self.steps:
            inputs, there = zip(*(values[i] for i in step.sources), strict=True)
            name, part = f"{path}parts.{step.part}", dict(self.parts.items()).get(step.part)
            kept = there[0]
            if step.kind in ("conv", "gate"):
                masks.seen[name] = kept
            if step.kind == "body":
                values.append(part.masked(inputs[0], kept, masks, f"{name}."))
                continue
            if step.kind == "conv":
                kept = masks.kept.get(name, torch.ones(part.out_channels, dtype=torch.bool))
            elif step.kind == "cat":
                kept = torch.cat(there)
            elif step.kind == "equal":
                kept = torch.ones_like(kept)
            add = isinstance(part, ResidualSum)
            forward = operator.add if add else None if part is None else part.forward
            x = self._after(step, forward, [one.clone() for one in inputs])
            values.append((x * kept[:, None, None], kept))
        return values[-1]


@dataclass
class Maker:
    """Makes random networks; `wild` ones may hold operations that spoil zeros or mix channels."""

    chance: random.Random
    wild: bool
    convs: list[str] = field(default_factory=list)

    def network(self) -> "Network":
        self.convs = []
        body, channels = self.body(3, 2, "body.", self.chance.randint(2, 4))
        return Network(body, channels, self.chance.random() < 0.5)

    def body(self, channels: int, depth: int, path: str, units: int) -> tuple[Body, int]:
        body = Body()
        for unit in range(units):
            makes = [self._unit, self._unit]
            if unit and depth:
                makes += [self._residual, self._concatenation, self._residual]
            if unit:
                makes += [self._depthwise, self._gate, self._scale]
                if self.wild:
                    makes += [self._strange, self._equal]
            channels = self.chance.choice(makes)(body, channels, depth, path)
        return body, channels

    def _add(self, body: Body, kind: str, *sources: int, part=None, name: str = "") -> int:
        key = None
        if part is not None:
            key = f"p{len(body.steps)}"
            body.parts[key] = part
        sources = list(sources) or [len(body.steps)]
        body.steps.append(Step(kind, sources, key, name))
        return len(body.steps)

    def _conv(self, body: Body, channels: int, filters: int, path: str, *source: int) -> int:
        size = self.chance.choice([1, 3])
        bias = self.chance.random() < 0.7
        conv = nn.Conv2d(channels, filters, size, padding=size // 2, bias=bias)
        self.convs.append(f"{path}parts.p{len(body.steps)}")
        return self._add(body, "conv", *source, part=conv)

    def _between(self, body: Body, channels: int, *, norm: float = 0.6) -> None:
        """Norms, activations and pools, in any order."""
        for _ in range(self.chance.randint(0, 2)):
            self._activation(body, channels)
        if self.chance.random() < norm:
            kinds = [
                lambda: nn.BatchNorm2d(channels),
                lambda: nn.GroupNorm(2, channels),
                lambda: nn.InstanceNorm2d(channels, affine=True),
            ]
            self._add(body, "norm", part=self.chance.choice(kinds)())
        for _ in range(self.chance.randint(0, 2)):
            self._activation(body, channels)

    def _activation(self, body: Body, channels: int) -> None:
        if self.chance.random() < 0.1:
            self._add(body, "prelu", part=nn.PReLU(channels))
        elif self.chance.random() < 0.4:
            self._add(body, "function", name=self.chance.choice(list(FUNCTIONS)))
        else:
            self._add(body, "module", part=KEEPING[self.chance.choice(list(KEEPING))]())

    def _unit(self, body: Body, channels: int, depth: int, path: str) -> int:
        filters = self.chance.choice([4, 6, 8])
        self._conv(body, channels, filters, path)
        self._between(body, filters)
        return filters

    def _depthwise(self, body: Body, channels: int, depth: int, path: str) -> int:
        bias = self.chance.random() < 0.5
        conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=bias)
        self._add(body, "depthwise", part=conv)
        self._between(body, channels)
        return channels

    def _gate(self, body: Body, channels: int, depth: int, path: str) -> int:
        self._add(body, "gate", part=nn.Conv2d(channels, channels, 1))
        return channels

    def _scale(self, body: Body, channels: int, depth: int, path: str) -> int:
        body.scales[f"p{len(body.steps)}"] = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)
        body.steps.append(Step("scale", [len(body.steps)], f"p{len(body.steps)}"))
        return channels

    def _residual(self, body: Body, channels: int, depth: int, path: str) -> int:
        """A block: a branch of convolutions, and the block's input or a convolution of it."""
        inside = f"{path}parts.p{len(body.steps)}."
        block, filters = Body(), self.chance.choice([4, 6, channels])
        width, source = channels, 0
        for i in range(count := self.chance.randint(2, 3)):
            outputs = filters if i == count - 1 else self.chance.choice([4, 6])
            self._conv(block, width, outputs, inside, *([0] if i == 0 else []))
            self._between(block, outputs)
            width = outputs
        branch = len(block.steps)
        if filters != channels:
            source = self._add(block, "conv", 0, part=nn.Conv2d(channels, filters, 1))
        if self.chance.random() < 0.3:
            self._add(block, "residual", branch, source, part=ResidualSum())
        else:
            self._add(block, "residual", branch, source, name=self.chance.choice(list(SUMS)))
        for _ in range(self.chance.randint(0, 2)):
            name = self.chance.choice(["F.relu", "x.relu", "2x", "clamp"])
            self._add(block, "function", name=name)
        self._add(body, "body", part=block)
        return filters

    def _concatenation(self, body: Body, channels: int, depth: int, path: str) -> int:
        source, total, ends = len(body.steps), 0, []
        if self.chance.random() < 0.5:
            ends, total = [source], channels
        for _ in range(self.chance.randint(1, 2)):
            filters = self.chance.choice([4, 6])
            self._conv(body, channels, filters, path, source)
            self._between(body, filters, norm=0.3)
            ends.append(len(body.steps))
            total += filters
        self.chance.shuffle(ends)
        self._add(body, "cat", *ends)
        self._between(body, total)
        return total

    def _strange(self, body: Body, channels: int, depth: int, path: str) -> int:
        if self.chance.random() < 0.5:
            self._add(body, "module", part=SPOILING[self.chance.choice(list(SPOILING))]())
        else:
            names = [n for n in STRANGE if n != "view" or channels == 8]
            self._add(body, "function", name=self.chance.choice(names))
        self._between(body, channels)
        return channels

    def _equal(self, body: Body, channels: int, depth: int, path: str) -> int:
        """A sum of two convolutions, neither of which is a shortcut."""
        source = len(body.steps)
        ends = [self._conv(body, channels, 4, path, source) for _ in range(2)]
        self._add(body, "equal", *ends, name=self.chance.choice(list(SUMS)[:5]))
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

    def masked(self, x: Tensor, kept: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The output without the filters that are not kept; and which channels are read.

        The latter, bool (channels,), by name of each layer that mixes channels.
        """
        masks = Masks(kept)
        x, there = self.body.masked(x, torch.ones(3, dtype=torch.bool), masks, "body.")
        masks.seen["head"] = there.repeat_interleave(self.head.in_features // len(there))
        return self.head(x.mean((2, 3)) if self.pooled else x.flatten(1)), masks.seen
