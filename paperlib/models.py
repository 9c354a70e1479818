"""The networks of both papers, each with a `width`: a factor on the number of filters.

At `width=1` the architecture, the initialisation and the order of parameters are those of the
papers (arXiv 1906.03728 and, for `conv4`, arXiv 1805.01930). Images are (N, C, 32, 32), logits
(N, num_classes).
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOL = "M"
VGG11 = (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)

Dropout = tuple[float, float]  # rates after each pool and after a dense layer


def scaled(filters: int, width: float) -> int:
    """Return `filters` times `width`, rounded, at least 1."""
    return max(1, round(filters * width))


class ResidualSum(nn.Module):
    """Add a branch and a shortcut; to a pruned filter of the branch the shortcut adds nothing.

    A residual block that adds with this module can be pruned, and its sum observed, from outside
    (arXiv 1906.03728).

    Args:
        inplace: Write the sum into the memory of the branch. This is allowed after batch norm.

    Attributes:
        keep: None, or (filters, 1, 1): 1 where the filter is kept, else 0.
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.keep: Tensor | None
        self.register_buffer("keep", None)
        self.register_load_state_dict_pre_hook(_expect_keep)

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """Return the sum (N, filters, H, W)."""
        if self.keep is None:
            return branch.add_(shortcut) if self.inplace else branch + shortcut
        keep = self.keep.to(branch)
        add = branch.addcmul_ if self.inplace else branch.addcmul
        return add(shortcut, keep)


def _expect_keep(add: ResidualSum, state: Mapping[str, Tensor], prefix: str, *rest: object) -> None:
    """Let a network without masks load the state of a pruned network."""
    stored = state.get(prefix + "keep")
    if stored is not None and add.keep is None:
        add.keep = torch.ones_like(stored)


class PadChannels(nn.Module):
    """Add zero channels on both sides."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        before = (outputs - inputs) // 2
        self.padding = (0, 0, 0, 0, before, outputs - inputs - before)

    def forward(self, x: Tensor) -> Tensor:
        """Return images with `outputs` channels."""
        return F.pad(x, self.padding)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        # This takes every `stride`-th pixel. Its gradient stays channels-last, unlike that of a
        # slice, which makes earlier layers faster.
        pixels = nn.AvgPool2d(1, stride)
        if stride == 1 and inputs == outputs:
            self.shortcut: nn.Module = nn.Identity()
        elif projection:
            # This is a 1x1 convolution of stride 2. It is written so because oneDNN crashes in the
            # backward pass of a strided one with 4 channels, channels-last.
            conv = nn.Conv2d(inputs, outputs, 1, bias=False)
            self.shortcut = nn.Sequential(pixels, conv, nn.BatchNorm2d(outputs))
        else:
            self.shortcut = nn.Sequential(pixels, PadChannels(inputs, outputs))
        self.sum = ResidualSum(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's activations."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(self.sum(out, self.shortcut(x)), inplace=True)


class ResNet(nn.Module):
    """A CIFAR ResNet: 3x3 stem without pooling, stages of `BasicBlock`, average pool, dense."""

    def __init__(
        self,
        blocks: int,
        filters: Sequence[int],
        projection: bool,
        num_classes: int,
        in_channels: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, filters[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters[0])
        stages, inputs = [], filters[0]
        for stage, outputs in enumerate(filters):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                stages.append(BasicBlock(inputs, outputs, stride, projection))
                inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes)."""
        out = self.blocks(F.relu(self.bn1(self.conv1(x)), inplace=True))
        return self.fc(self.dropout(out.mean(dim=(2, 3))))


def conv4(num_classes: int, in_channels: int, width: float, dropout: Dropout) -> nn.Module:
    """Return a network of four 3x3 convolutions and two dense layers, without batch norm."""
    filters, dense = scaled(32, width), scaled(512, width)

    def two(inputs: int, outputs: int) -> list[nn.Module]:
        first, second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3)
        pooled = nn.MaxPool2d(2), nn.Dropout(dropout[0])
        return [first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True), *pooled]

    convolutions = [*two(in_channels, filters), *two(filters, 2 * filters)]
    layers: dict[str, nn.Module] = {"features": nn.Sequential(*convolutions, nn.Flatten())}
    layers |= {"dense": nn.Linear(2 * filters * 6 * 6, dense), "relu": nn.ReLU()}
    layers |= {"dropout": nn.Dropout(dropout[1]), "fc": nn.Linear(dense, num_classes)}
    return nn.Sequential(OrderedDict(layers))


def vgg11_bn(num_classes: int, in_channels: int, width: float, dropout: Dropout) -> nn.Module:
    """Return VGG11 with batch norm and one dense layer."""
    features = _convolutions(VGG11, in_channels, width)
    dense = nn.Linear(scaled(512, width), num_classes)
    classifier = nn.Sequential(nn.Flatten(), nn.Dropout(dropout[1]), dense)
    _draw_by_fan_out(features)
    return nn.Sequential(OrderedDict(features=features, classifier=classifier))


def _convolutions(layout: Sequence, in_channels: int, width: float) -> nn.Sequential:
    """Return 3x3 convolutions with bias, batch norm and ReLU, and max pools between them."""
    layers: list[nn.Module] = []
    for item in layout:
        if item == POOL:
            layers.append(nn.MaxPool2d(2))
            continue
        filters = scaled(item, width)
        layers.append(nn.Conv2d(in_channels, filters, 3, padding=1))
        layers += [nn.BatchNorm2d(filters), nn.ReLU(inplace=True)]
        in_channels = filters
    return nn.Sequential(*layers)


def _draw_by_fan_out(features: nn.Sequential) -> None:
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.get_parameter("bias"))


def resnet(
    blocks: int,
    filters: Sequence[int],
    projection: bool,
    num_classes: int,
    in_channels: int,
    width: float,
    dropout: Dropout,
) -> nn.Module:
    """Return a ResNet for CIFAR.

    Args:
        blocks: How many blocks each stage has.
        filters: How many filters each stage has, at width 1.
        projection: Shortcuts to more filters are 1x1 convolutions with batch norm, as in ResNet18.
            Otherwise they add channels of zeros, and all weights are drawn as by He et al.
        num_classes: As for `build`.
        in_channels: As for `build`.
        width: As for `build`.
        dropout: As for `build`.
    """
    scales = [scaled(n, width) for n in filters]
    model = ResNet(blocks, scales, projection, num_classes, in_channels, dropout[1])
    for module in model.modules():
        if not projection and isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return model


MODELS: dict[str, Callable[[int, int, float, Dropout], nn.Module]] = {
    "conv4": conv4,
    "vgg11_bn": vgg11_bn,
    "resnet18": partial(resnet, 2, (64, 128, 256, 512), True),
    "resnet20": partial(resnet, 3, (16, 32, 64), False),
    "resnet56": partial(resnet, 9, (16, 32, 64), False),
}


def build(
    name: str,
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float | tuple[float, float] = 0.0,
) -> nn.Module:
    """Build a freshly initialised network, with weights from torch's global generator.

    Args:
        name: One of `MODELS`.
        num_classes: The number of classes.
        in_channels: The number of channels of an image.
        width: The factor on the filters of every layer, and on the units of dense layers but the
            last. Positive.
        dropout: The rate, in [0, 1): before the last dense layer, in `conv4` also after each pool.
            `conv4` alone takes a pair: the rates after each pool and after the first dense layer.

    Raises:
        ValueError: A value is outside its range.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: one of {', '.join(MODELS)}")
    if not width > 0:
        raise ValueError(f"width must be positive, got {width}")
    rates = (dropout, dropout) if isinstance(dropout, int | float) else tuple(dropout)
    if len(rates) != 2 or not all(0 <= rate < 1 for rate in rates):
        raise ValueError(f"dropout must be a rate in [0, 1), or a pair of them, got {dropout!r}")
    if rates[0] != rates[1] and name != "conv4":
        raise ValueError(f"a pair of dropout rates is for conv4, and {name} got {dropout!r}")
    return MODELS[name](num_classes, in_channels, width, rates)
