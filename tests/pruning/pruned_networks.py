"""Networks, images and small things that the tests of pruning share."""

import math
from fractions import Fraction

import torch
from torch import nn

from paperlib.models import build
from paperlib.pruning import FilterPruner

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


def exactly_kept(filters: int, fraction: str, event: int, events: int) -> int:
    final = math.ceil((1 - Fraction(fraction)) * filters)
    return math.ceil(final + (filters - final) * Fraction(events - event, events))
