"""The networks of both papers, each with a `width`: a factor on the number of filters.

At `width=1` architecture, initialisation and order of parameters are those of the papers (arXiv
1906.03728 and, for `conv4`, arXiv 1805.01930). Images are (N, C, 32, 32), logits (N, num_classes).
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOL = "M"
VGG11 = (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)
VGG19 = (64, 64, POOL, 128, 128, POOL, *[256] * 4, POOL, *[512] * 4, POOL, *[512] * 4, POOL)


def scaled(filters: int, width: float) -> int:
    """Return `filters` times `width`, rounded, at least 1."""
    return max(1, round(filters * width))


class ResidualSum(nn.Module):
    """`branch + shortcut`; where a filter of the branch is pruned the shortcut adds nothing to it.

    A residual block that adds with this module can be pruned, and its sum observed, from outside
    (arXiv 1906.03728). `keep` is None, or (filters, 1, 1) with 1 where the filter is kept. inplace:
    the sum takes the memory of the branch, as after batch norm it may.
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
    """Let `load_state_dict` of a pruned network's state work in one that has no masks yet."""
    stored = state.get(prefix + "keep")
    if stored is not None and add.keep is None:
        add.keep = torch.ones_like(stored)


class Subsample(nn.Module):
    """Every `stride`-th pixel.

    A pooling of single pixels: unlike a slice's, its gradient stays channels-last where the images
    are, and what the gradient meets next is quicker by half.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Return every `stride`-th pixel of images (N, C, H, W)."""
        return F.avg_pool2d(x, 1, self.stride)


class PadChannels(nn.Module):
    """Adds zero channels on both sides."""

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
        if stride == 1 and inputs == outputs:
            self.shortcut: nn.Module = nn.Identity()
        elif projection:
            # A 1x1 convolution of stride 2, written so because oneDNN crashes in the backward pass
            # of one with 4 channels, channels last.
            self.shortcut = nn.Sequential(
                Subsample(stride),
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )
        else:
            self.shortcut = nn.Sequential(Subsample(stride), PadChannels(inputs, outputs))
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
        filters: tuple[int, ...],
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
            strides = [1 if stage == 0 else 2] + [1] * (blocks - 1)
            for stride in strides:
                stages.append(BasicBlock(inputs, outputs, stride, projection))
                inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes)."""
        out = self.blocks(F.relu(self.bn1(self.conv1(x)), inplace=True))
        return self.fc(self.dropout(out.mean(dim=(2, 3))))


class VGG(nn.Module):
    """VGG with batch norm: 3x3 convolutions with bias, max pools between them, then `head`."""

    def __init__(self, layout: tuple, in_channels: int, head: Callable[[int], nn.Module]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = in_channels
        for item in layout:
            if item == POOL:
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [
                    nn.Conv2d(inputs, item, 3, padding=1),
                    nn.BatchNorm2d(item),
                    nn.ReLU(inplace=True),
                ]
                inputs = item
        self.features = nn.Sequential(*layers)
        self.classifier = head(inputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.constant_(module.get_parameter("bias"), 0)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes)."""
        return self.classifier(self.features(x))


class Conv4(nn.Module):
    """Four 3x3 convolutions and a dense layer of 512, without batch norm (arXiv 1805.01930)."""

    def __init__(
        self,
        filters: int,
        dense: int,
        num_classes: int,
        in_channels: int,
        dropout: tuple[float, float],
    ) -> None:
        super().__init__()
        after_pool, after_dense = dropout
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, filters, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(filters, filters, 3),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Dropout(after_pool),
            nn.Conv2d(filters, 2 * filters, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(2 * filters, 2 * filters, 3),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Dropout(after_pool),
            nn.Flatten(),
        )
        self.dense = nn.Linear(2 * filters * 6 * 6, dense)
        self.dropout = nn.Dropout(after_dense)
        self.fc = nn.Linear(dense, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes)."""
        return self.fc(self.dropout(F.relu(self.dense(self.features(x)))))


def conv4(num_classes: int, in_channels: int, width: float, dropout: tuple) -> nn.Module:
    """Return four convolutions and two dense layers, without batch norm."""
    return Conv4(scaled(32, width), scaled(512, width), num_classes, in_channels, dropout)


def vgg11_bn(num_classes: int, in_channels: int, width: float, dropout: tuple) -> nn.Module:
    """Return VGG11 with batch norm and one dense layer."""

    def head(inputs: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(dropout[1]), nn.Linear(inputs, num_classes))

    return VGG(_widened(VGG11, width), in_channels, head)


def vgg19_bn(num_classes: int, in_channels: int, width: float, dropout: tuple) -> nn.Module:
    """Return VGG19 with torchvision's names and initialisation, so that its weights load."""
    model = VGG(_widened(VGG19, width), in_channels, lambda inputs: nn.Identity())
    dense = scaled(4096, width)
    model.features.append(nn.AdaptiveAvgPool2d(7)).append(nn.Flatten())
    model.classifier = nn.Sequential(
        nn.Linear(scaled(512, width) * 49, dense),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout[1]),
        nn.Linear(dense, dense),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout[1]),
        nn.Linear(dense, num_classes),
    )
    for module in model.classifier:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)
    return model


def resnet18(num_classes: int, in_channels: int, width: float, dropout: tuple) -> nn.Module:
    """Return ResNet18 for CIFAR, with projections in its shortcuts."""
    filters = tuple(scaled(n, width) for n in (64, 128, 256, 512))
    return ResNet(2, filters, True, num_classes, in_channels, dropout[1])


def resnet20(num_classes: int, in_channels: int, width: float, dropout: tuple) -> nn.Module:
    """Return ResNet20, with zero channels in its shortcuts."""
    return _thin_resnet(3, num_classes, in_channels, width, dropout)


def resnet56(num_classes: int, in_channels: int, width: float, dropout: tuple) -> nn.Module:
    """Return ResNet56, with zero channels in its shortcuts."""
    return _thin_resnet(9, num_classes, in_channels, width, dropout)


def _thin_resnet(
    blocks: int, num_classes: int, in_channels: int, width: float, dropout: tuple
) -> nn.Module:
    filters = tuple(scaled(n, width) for n in (16, 32, 64))
    model = ResNet(blocks, filters, False, num_classes, in_channels, dropout[1])
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return model


def _widened(layout: tuple, width: float) -> tuple:
    return tuple(item if item == POOL else scaled(item, width) for item in layout)


MODELS = {f.__name__: f for f in (conv4, vgg11_bn, vgg19_bn, resnet18, resnet20, resnet56)}


def build(
    name: str,
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float | tuple[float, float] = 0.0,
) -> nn.Module:
    """A freshly initialised network; its weights are drawn from torch's global generator.

    name: one of `MODELS`. width: factor on every layer's filters (and on dense layers between).
    dropout: the rate, or for `conv4` a pair (after each pool, after the dense layer); in the other
    networks it acts before the dense layers only. Raises ValueError on a value outside its range.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: one of {', '.join(MODELS)}")
    if not width > 0:
        raise ValueError(f"width must be positive, got {width}")
    rates = (dropout, dropout) if isinstance(dropout, int | float) else tuple(dropout)
    if len(rates) != 2 or not all(0 <= rate < 1 for rate in rates):
        raise ValueError(f"dropout must be a rate in [0, 1), or a pair of them, got {dropout!r}")
    return MODELS[name](num_classes, in_channels, width, rates)


def pretrained_vgg19_bn() -> nn.Module:
    """`vgg19_bn` with torchvision's ImageNet weights, which are downloaded.

    Raises RuntimeError, naming the address, where they cannot be had.
    """
    from torchvision.models import VGG19_BN_Weights

    weights = VGG19_BN_Weights.IMAGENET1K_V1
    try:
        state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except OSError as error:
        raise RuntimeError(f"cannot download {weights.url}: {error}") from error
    model = build("vgg19_bn", num_classes=1000)
    model.load_state_dict(state)
    return model
