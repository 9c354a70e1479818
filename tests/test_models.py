"""The networks: sizes, initial weights, order of parameters and shortcuts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paperlib.models import build

torch.set_num_threads(1)

NARROW = {"conv4": 1 / 8, "vgg11_bn": 1 / 16, "resnet18": 1 / 16}
NAMES = [*NARROW, "resnet20", "resnet56"]
RESNETS = {"resnet18": (8, 4), "resnet20": (9, 8), "resnet56": (27, 8)}  # blocks, last pixels


def meta(name: str, **options) -> nn.Module:
    """A network without the cost of its weights."""
    with torch.device("meta"):
        return build(name, **options)


def narrow(name: str, seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return build(name, width=NARROW.get(name, 0.25), **options)


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        *(("vgg11_bn", 10, 9_231_114), ("vgg11_bn", 100, 9_231_114 + 90 * 513)),
        *(("resnet18", 10, 11_173_962), ("resnet18", 100, 11_173_962 + 90 * 513)),
        *(("resnet20", 10, 269_722), ("resnet56", 10, 853_018)),
    ],
)
def test_number_of_parameters(name, classes, parameters):
    assert sum(p.numel() for p in meta(name, num_classes=classes).parameters()) == parameters


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_logits_of_each_image(name, channels):
    model = narrow(name, num_classes=7, in_channels=channels)
    images = torch.randn(2, channels, 32, 32)
    assert model(images).shape == (2, 7)
    model.eval()
    assert torch.allclose(model(images)[1:], model(images[1:]), atol=1e-5)


@pytest.mark.parametrize("name", ["vgg11_bn", "resnet20", "resnet56"])
def test_kaiming_normal_weights(name):
    torch.manual_seed(0)
    model = build(name)
    for conv in convolutions(model)[1:]:
        fan = conv.out_channels if name == "vgg11_bn" else conv.in_channels
        expected, n = math.sqrt(2 / (9 * fan)), conv.weight.numel()
        assert conv.weight.std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * n))
        assert abs(conv.weight.mean().item()) < 4 * expected / math.sqrt(n)
        # A normal distribution has far tails, a uniform one none beyond 1.73 deviations.
        assert conv.weight.abs().max() > 2.5 * expected
        assert conv.bias is None or not conv.bias.any()


@pytest.mark.parametrize(("before", "after", "front"), [(16, 32, 8), (4, 8, 2), (3, 6, 1)])
def test_parameter_free_shortcut(before, after, front):
    model = build("resnet20", width=before / 16)
    x = torch.randn(2, before, 8, 8)
    expected = torch.zeros(2, after, 4, 4)
    expected[:, front : front + before] = x[:, :, ::2, ::2]
    assert torch.equal(model.blocks[3].shortcut(x), expected)
    assert not list(model.blocks[3].shortcut.parameters())


@pytest.mark.parametrize("name", RESNETS)
def test_resnet_by_hand(name):
    """The forward pass, from its parts."""
    model = narrow(name).eval()
    x = torch.randn(2, 3, 32, 32)
    out = F.relu(model.bn1(F.conv2d(x, model.conv1.weight, padding=1)))
    for block in model.blocks:
        stride = block.conv1.stride[0]
        branch = F.relu(block.bn1(F.conv2d(out, block.conv1.weight, stride=stride, padding=1)))
        branch = block.bn2(F.conv2d(branch, block.conv2.weight, padding=1))
        out = F.relu(branch + block.shortcut(out))
    blocks, size = RESNETS[name]
    assert (len(model.blocks), out.shape[2:]) == (blocks, (size, size))
    pooled = F.avg_pool2d(out, size).flatten(1)
    assert torch.allclose(model(x), F.linear(pooled, model.fc.weight, model.fc.bias), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "dropout"), [*((name, (0.5,)) for name in NAMES), ("conv4", (0.25, 0.5))]
)
def test_dropout(name, dropout):
    model = meta(name, dropout=dropout if len(dropout) > 1 else dropout[0])
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {*dropout}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vgg"}, "unknown model 'vgg': one of conv4, .*resnet56"),
        ({"width": 0}, "width must be positive, got 0"),
        ({"width": math.nan}, "width must be positive, got nan"),
        ({"dropout": 1.0}, r"\[0, 1\).*got 1.0"),
        ({"dropout": -0.1}, r"\[0, 1\).*got -0.1"),
        ({"dropout": (0.1, 0.2, 0.3)}, r"pair"),
        ({"name": "vgg11_bn", "dropout": (0.25, 0.5)}, r"conv4.*vgg11_bn.*\(0.25, 0.5\)"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        build(**{"name": "conv4"} | options)
