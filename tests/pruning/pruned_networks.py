"""Networks, images and small things that the tests of pruning share."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperlib.models import build
from paperlib.pruning import FilterPruner, PruningError

torch.set_num_threads(1)

WIDTHS = {"vgg11_bn": 1 / 16, "resnet18": 1 / 16, "resnet20": 0.5, "resnet56": 0.25}
RESNETS = ("resnet18", "resnet20", "resnet56")
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam, decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def with_varied_norms(model: nn.Module) -> nn.Module:
    """Norms as after training, which differ from channel to channel."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.InstanceNorm2d):
            module.weight.normal_(0.8, 0.3)
            module.bias.normal_(0, 0.5)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model


def network(name: str, double: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = with_varied_norms(build(name, width=WIDTHS[name]))
    return model.double() if double else model


def resnet_by_hand(
    model: nn.Module, x: Tensor, masks: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits; and before ReLU, the output of each layer in a block, zero where not in its mask."""

    def masked(name: str, out: Tensor) -> Tensor:
        given[name] = out * masks.get(name, torch.ones(out.shape[1]))[:, None, None]
        return F.relu(given[name])

    out, given = F.relu(model.bn1(model.conv1(x))), {}
    for i, block in enumerate(model.blocks):
        inner = masked(f"blocks.{i}.conv1", block.bn1(block.conv1(out)))
        branch = block.bn2(block.conv2(inner))
        out = masked(f"blocks.{i}.conv2", branch + block.shortcut(out))
    return model.fc(out.mean((2, 3))), given


class Apply(nn.Module):
    """A function of the module itself, with its parts as attributes, and of the input."""

    def __init__(self, function: Callable, **parts: object) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def gate(channels: int) -> nn.Module:
    return Apply(
        lambda net, x: x * torch.sigmoid(net.conv(F.adaptive_avg_pool2d(x, 1))),
        conv=nn.Conv2d(channels, channels, 1),
    )


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(10, 6, 3), nn.BatchNorm2d(6), nn.ReLU())


def images(count: int = 4, seed: int = 0, size: int = 32, double: bool = True) -> Tensor:
    x = torch.randn(count, 3, size, size, generator=generator(seed))
    return x.double() if double else x


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """No tensor of the network is another one afterwards."""
    before = copy.deepcopy(model.state_dict())
    yield
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def assert_refused(named: str, pruner: type, *arguments: object, **options: object) -> None:
    """A pruner with these arguments is not made, and the error names this, a regular expression."""
    with pytest.raises(PruningError, match=named):
        pruner(*arguments, **options)


def gone(pruner: FilterPruner) -> dict[str, list[int]]:
    return {name: (~mask).nonzero().flatten().tolist() for name, mask in pruner.masks.items()}


def exactly_kept(count: int, fraction: str, event: int, events: int, mu: int | None = None) -> int:
    """The papers' formulas in exact arithmetic; linear where mu is None."""
    final = math.ceil((1 - Fraction(fraction)) * count)
    if mu is None:
        share = Fraction(events - event, events)
    else:
        share = max(Fraction(0), Fraction(events - 2 * event, 2 * event * mu + events))
    return math.ceil(final + (count - final) * share)
