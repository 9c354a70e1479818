"""Small networks made at random, and the same networks with pruned filters cut out by hand.

A network is a tree of bodies, each a list of steps on the tensors so far. `Body.forward` runs them;
`Body.cut` runs them again with a pruned filter absent: its channel is not in the tensors at all, no
layer reads it, and to the end of a residual branch the shortcut adds nothing. The second knows
nothing of the first, nor of how `paperlib.pruning` follows zeros.
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
class Present:
    """Channels that are there: (N, channels there, H, W), and which of all they are, bool."""

    x: Tensor
    kept: Tensor

    def whole(self) -> Tensor:
        """With zeros for the others."""
        out = self.x.new_zeros(len(self.x), len(self.kept), *self.x.shape[2:])
        return out.index_copy(1, self.kept.nonzero().flatten(), self.x)


@dataclass
class Step:
    kind: str
    sources: list[int]
    part: str | None = None
    name: str = ""


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
            inputs = [values[i] for i in step.sources]
            part = self._part(step)
            if step.kind == "function":
                values.append((FUNCTIONS | STRANGE)[step.name](*inputs))
            elif step.kind == "cat":
                values.append(torch.cat(inputs, 1))
            elif step.kind in ("residual", "equal"):
                values.append(SUMS[step.name](*inputs) if part is None else part(*inputs))
            elif step.kind == "gate":
                pooled = F.adaptive_avg_pool2d(inputs[0], 1)
                values.append(inputs[0] * torch.sigmoid(part(pooled)))
            elif step.kind == "scale":
                values.append(inputs[0] * self.scales[step.part])
            else:
                values.append(part(*inputs))
        return values[-1]

    def _part(self, step: Step) -> nn.Module | None:
        return dict(self.parts.items()).get(step.part)

    def cut(
        self, x: Present, masks: dict[str, Tensor], training: bool, seen: dict, path: str
    ) -> Present:
        """As `forward`, without the filters that are not in `masks`.

        seen: is filled, by name of each layer that mixes channels, with those that it reads.
        """
        values = [x]
        for step in self.steps:
            inputs = [values[i] for i in step.sources]
            name = f"{path}parts.{step.part}"
            part = self._part(step)
            first = inputs[0]
            if step.kind in ("conv", "gate"):
                seen[name] = first.kept
            if step.kind == "conv":
                kept = masks.get(name, torch.ones(part.out_channels, dtype=torch.bool))
                bias = None if part.bias is None else part.bias[kept]
                weight = part.weight[kept][:, first.kept]
                out = Present(F.conv2d(first.x, weight, bias, padding=part.padding), kept)
            elif step.kind == "depthwise":
                bias = None if part.bias is None else part.bias[first.kept]
                count = int(first.kept.sum())
                y = F.conv2d(first.x, part.weight[first.kept], bias, padding=1, groups=count)
                out = Present(y, first.kept)
            elif step.kind == "norm":
                out = _normed(part, first, training)
            elif step.kind == "prelu":
                out = Present(F.prelu(first.x, part.weight[first.kept]), first.kept)
            elif step.kind == "cat":
                kept = torch.cat([one.kept for one in inputs])
                out = Present(torch.cat([one.x for one in inputs], 1), kept)
            elif step.kind == "residual":
                branch, shortcut = inputs
                times = 2 if step.name in ("three", "nested") and part is None else 1
                x = branch.x + times * shortcut.whole()[:, branch.kept]
                out = Present(x, branch.kept)
            elif step.kind == "equal":
                whole = sum(one.whole() for one in inputs)
                out = Present(whole, torch.ones(whole.shape[1], dtype=torch.bool))
            elif step.kind == "gate":
                pooled = first.x.mean((2, 3), keepdim=True)
                gate = F.conv2d(pooled, part.weight[:, first.kept], part.bias)
                out = Present(first.x * gate.sigmoid()[:, first.kept], first.kept)
            elif step.kind == "scale":
                out = Present(first.x * self.scales[step.part][first.kept], first.kept)
            elif step.kind == "body":
                out = part.cut(first, masks, training, seen, f"{name}.")
            else:
                function = part or (FUNCTIONS | STRANGE)[step.name]
                out = Present(function(first.x.clone()), first.kept)
            values.append(out)
        return values[-1]


def _normed(norm: nn.Module, value: Present, training: bool) -> Present:
    weight, bias = norm.weight[value.kept], norm.bias[value.kept]
    if isinstance(norm, nn.GroupNorm):
        # Its groups have zeros in them: what it makes of the others is part of the network.
        whole = F.group_norm(value.whole(), norm.num_groups, norm.weight, norm.bias, norm.eps)
        return Present(whole[:, value.kept], value.kept)
    if isinstance(norm, nn.InstanceNorm2d):
        return Present(F.instance_norm(value.x, weight=weight, bias=bias), value.kept)
    mean, variance = (s[value.kept].clone() for s in (norm.running_mean, norm.running_var))
    x = F.batch_norm(value.x, mean, variance, weight, bias, training, eps=norm.eps)
    return Present(x, value.kept)


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

    def cut(
        self, x: Tensor, masks: dict[str, Tensor], training: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The output without the filters that are not in `masks`; and which channels are read.

        The latter, bool (channels,), by name of each layer that mixes channels.
        """
        seen: dict[str, Tensor] = {}
        start = Present(x, torch.ones(3, dtype=torch.bool))
        value = self.body.cut(start, masks, training, seen, "body.")
        pixels = self.head.in_features // len(value.kept)
        seen["head"] = value.kept.repeat_interleave(pixels)
        weight = self.head.weight.view(3, len(value.kept), -1)[:, value.kept].flatten(1)
        x = value.x.mean((2, 3)) if self.pooled else value.x.flatten(1)
        return F.linear(x, weight, self.head.bias), seen
