"""Compact networks against the masked ones they are made from."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import torchvision
from small import Plus
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from paperlib import models
from paperlib.compact import CompactError, compact, cost, cost_table
from paperlib.extras.compact import cut
from paperlib.pruning import FilterPruner, WeightPruner, prunable_layers
from tests.pruning.pruned_networks import Apply, gate, generator, unchanged, with_varied_norms

NETWORKS = {
    "conv4": 0.25,
    "vgg11_bn": 0.125,
    "resnet18": 0.125,
    "resnet20": 0.5,
    "resnet56": 0.5,
}


def randomised(network: nn.Module) -> nn.Module:
    """Norms and biases as after training."""
    with_varied_norms(network)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.normal_(layer.bias, 0, 0.1)
    return network


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomised(models.build(name, width=NETWORKS[name]))


def pruned(network: nn.Module, fraction: float, **options) -> FilterPruner:
    """Every convolution pruned, at random."""
    options = {"target": "random", "generator": generator(2)} | options
    layers = options.pop("layers", list(prunable_layers(network)))
    pruner = FilterPruner(network, [fraction] * len(layers), layers=layers, **options)
    pruner.prune(1, 1)
    return pruner


@torch.no_grad()
def compacted(network: nn.Module, *pruners, size: int = 32) -> nn.Module:
    """The compact network, which computes the same."""
    x = torch.randn(3, 3, size, size, generator=generator(3))
    small = compact(network, *pruners, example=(2, 3, size, size))
    expected = network.eval()(x)
    assert (small.eval()(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    return small


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def widths(network: nn.Module) -> dict[str, int]:
    return {n: m.out_channels for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}


# The same network


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "weights-only"])
@pytest.mark.parametrize("fraction", [0.0, 0.6])
@pytest.mark.parametrize("name", NETWORKS)
def test_same_outputs_as_masked(name, fraction, norm):
    network = build(name)
    small = compacted(network, pruned(network, fraction, norm=norm))
    assert (parameters(small) < parameters(network)) == (fraction > 0)


@pytest.mark.parametrize("target", ["smallest", "largest"])
def test_vgg_has_as_many_parameters_as_one_built_that_narrow(target):
    network = build("vgg11_bn")
    pruner = FilterPruner(network, [0.3, 0.3, 0.3, 0.9], target=target)
    pruner.prune(1, 1)
    small = compact(network, pruner)
    filters = [8, 16, 32, 32, 45, 45, 45, 7]
    assert list(widths(small).values()) == filters
    convolutions = sum((9 * n + 3) * m for n, m in pairwise([3, *filters]))
    assert parameters(small) == convolutions + filters[-1] * 10 + 10


def test_channels_of_a_residual_stage_are_cut_where_all_that_writes_to_them_is_zero():
    network = build("resnet18")  # stages of 8, 16, 32, 64
    pruner = pruned(network, 0, target="smallest")
    for i, name in enumerate(pruner.masks):
        if name == "conv1" or name.endswith("conv2"):
            pruner.masks[name][:3] = False
            pruner.masks[name][3 + i // 2 % 2] = False  # and one that is not the same everywhere
    pruner.load_state_dict(pruner.state_dict())
    small = compacted(network, pruner)
    filters = widths(small)
    assert filters["conv1"] == 5
    assert [filters[f"blocks.{i}.conv2"] for i in range(8)] == [5, 5, 13, 13, 29, 29, 61, 61]
    assert filters["blocks.2.shortcut.1"] == 13
    assert small.fc.in_features == 61
    assert small.blocks[0].sum.keep.shape == (5, 1, 1)
    assert small.blocks[0].sum.keep.sum() == 4


def test_zero_channels_of_a_shortcut_are_cut_with_those_they_are_added_to():
    network = build("resnet20")  # 8 channels become 16: 4 zero ones on both sides
    pruner = pruned(network, 0)
    for name in pruner.masks:
        if name.startswith(("blocks.3", "blocks.4", "blocks.5")) and name.endswith("conv2"):
            pruner.masks[name][[0, 1, 15]] = False
        elif name.startswith(("blocks.6", "blocks.7", "blocks.8")) and name.endswith("conv2"):
            pruner.masks[name][[8, 9, 23]] = False  # where the stage before pads to
    pruner.load_state_dict(pruner.state_dict())
    small = compacted(network, pruner)
    assert small.blocks[3].conv2.out_channels == 13
    assert small.blocks[3].shortcut[1].padding == (0, 0, 0, 0, 2, 3)
    assert small.blocks[6].conv2.out_channels == 29
    assert all(block.sum.keep is None for block in small.blocks)


def test_original_is_left_as_it_was_and_modes_are_carried_on():
    network = build("vgg11_bn").train()
    network.features[1].eval()
    pruner = pruned(network, 0.5)
    with unchanged(network):
        small = compact(network, pruner)
    assert small.training
    assert not small.features[1].training
    assert small.features[2].training


# Single weights


def test_paper_network_with_90_percent_of_its_dense_layer_gone():
    network = models.build("conv4")
    pruner = WeightPruner(network, "dense", 0.9, target="largest")
    pruner.prune(1, 1)
    counts = cost(compacted(network, pruner))
    assert counts["parameters"] == 1_250_858  # no unit is gone as a whole
    assert counts["nonzero"] == 189_175


def test_units_without_weights_are_cut_and_constants_folded():
    network = build("conv4")  # 16 * 36 inputs, 128 dense units
    with torch.no_grad():
        network.dense.weight[:20] = 0  # constant: relu(bias), of both signs
        network.fc.weight[:, 10:30] = 0  # not read
        network.dense.weight[:, :36] = 0  # a filter that is not read
    assert (network.dense.bias[:10] > 0).any()
    assert (network.dense.bias[:10] < 0).any()
    small = compacted(network)
    assert small.dense.weight.shape == (98, 15 * 36)
    assert small.fc.weight.shape == (10, 98)
    assert small.features[8].out_channels == 15
    constant = network.dense.bias[:10].relu() @ network.fc.weight[:, :10].T
    torch.testing.assert_close(small.fc.bias, network.fc.bias + constant)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("padding", "filters"), [(0, 3), (1, 5)])
def test_constant_filters_are_folded_into_convolutions_without_padding_only(padding, filters, bias):
    """With padding the two that are not 0 stay, as they end at the border."""
    torch.manual_seed(0)
    last = nn.Conv2d(6, 4, 3, padding=padding, bias=bias)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), last)
    network[0].weight.data[:3] = 0
    network[0].bias.data[:3] = torch.tensor([1.0, 0.5, -1.0])
    small = compacted(network)
    assert small[0].out_channels == filters
    assert (small[2].bias is not None) == (bias or not padding)


# Networks of one's own


def first_filters(conv: nn.Conv2d) -> Tensor:
    return torch.arange(conv.out_channels).float()


def test_plain_residual_network_with_the_same_channels_pruned_everywhere():
    torch.manual_seed(0)
    network = randomised(Plus(10, 3))
    small = compacted(network, pruned(network, 0.5, target="largest", score=first_filters))
    assert set(widths(small).values()) == {4}
    assert not any(layer._forward_hooks for layer in small.modules())
    assert not any(hasattr(layer, "kept_channels") for layer in small.modules())


def sequential(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *layers)


@pytest.mark.parametrize("norm", [True, False])
def test_depthwise_convolutions_and_slopes_of_each_channel_are_cut(norm):
    expand = (nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), nn.Hardswish())
    depthwise = (nn.Conv2d(12, 12, 3, 2, 1, groups=12, bias=False), nn.BatchNorm2d(12))
    again = (nn.Conv2d(12, 12, (1, 3), groups=12), nn.ReLU(), nn.Conv2d(12, 6, 1))
    head = (nn.Flatten(), nn.Linear(6 * 15 * 13, 3))
    block = (*expand, *depthwise, nn.PReLU(12), gate(12), *again)
    network = randomised(sequential(*block, *head))
    nn.init.uniform_(network[8].weight, -0.5, 0.5)
    small = compacted(network, pruned(network, 0.5, layers=["0", "3", "12"], norm=norm))
    if norm:
        assert widths(small) == {"0": 4, "3": 6, "6": 6, "9.conv": 6, "10": 6, "12": 3}
        assert small[6].groups == small[6].in_channels == small[10].groups == 6
        assert small[7].num_features == small[8].num_parameters == 6
    assert parameters(compact(small)) == parameters(small)


def test_a_mask_on_a_layer_of_torch_is_cut():
    block = Apply(
        lambda net, x: net.relu(net.b(F.relu(net.a(x))) + x) * 2,
        a=nn.Conv2d(8, 8, 3, padding=1),
        b=nn.Conv2d(8, 8, 3, padding=1),
        relu=nn.ReLU(),
    )
    network = sequential(block, nn.Conv2d(8, 4, 3))
    pruner = pruned(network, 0.5, target="largest", score=first_filters, layers=["0", "3.b"])
    assert block.relu.kept_channels.shape == (1, 8, 1, 1)
    small = compacted(network, pruner)
    assert widths(small) == {"0": 4, "3.a": 8, "3.b": 4, "4": 4}
    assert not hasattr(small[3].relu, "kept_channels")
    pruner = pruned(network, 0.25, target="smallest", score=first_filters, layers=["3.b"])
    compacted(network, pruner)


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("mobilenet_v2", 0.7),
        ("mobilenet_v3_small", 0.8),
        ("squeezenet1_0", 0.5),
        ("resnext50_32x4d", 1),  # what its grouped convolutions read stays
    ],
)
def test_networks_of_torchvision(name, share):
    torch.manual_seed(0)
    network = randomised(torchvision.models.get_model(name, weights=None, num_classes=5))
    layers = [n for n, layer in prunable_layers(network).items() if not layer.masks]
    small = compacted(network, pruned(network, 0.5, layers=layers), size=64)
    assert parameters(small) < share * parameters(network)


def shared() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    layers[1].weight = layers[0].weight
    return layers


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (Apply(lambda net, x: x.cumsum(1)), "'cumsum' in '3'"),
        (Apply(lambda net, x: x.mean(1, keepdim=True)), "'mean' in '3'"),
        (nn.GroupNorm(2, 8), r"'3' \(GroupNorm\)"),
        (nn.ConvTranspose2d(8, 8, 3), r"'3' \(ConvTranspose2d\)"),
        (nn.Linear(30, 8), r"'3' \(Linear\)"),
        (
            Apply(lambda net, x: net.conv(net.conv(x)), conv=nn.Conv2d(8, 8, 3)),
            r"'3\.conv' is used more than once",
        ),
        (Apply(lambda net, x: x if x.sum() > 0 else -x), "torch.fx"),
        (shared(), r"3\.0\.weight.*3\.1\.weight"),
        (prune.identity(nn.Conv2d(8, 8, 3), "weight"), "'3'.* weight"),
        (parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), "'3'.* weight"),
        (nn.Conv2d(9, 8, 3), r"\(2, 3, 32, 32\)"),
        (
            nn.Sequential(Apply(lambda net, x: x.view(-1, 7200)), nn.Linear(7200, 2)),
            r"\(2, 3, 32, 32\)",
        ),
    ],
)
def test_networks_that_are_not_understood(layer, named):
    network = sequential(layer)
    with torch.no_grad():
        for tensor in (network[0].weight, network[0].bias, network[1].weight, network[1].bias):
            tensor[:4] = 0
    with pytest.raises(CompactError, match=named):
        compact(network)


def test_what_is_not_understood_is_left_alone_where_nothing_pruned_reaches_it():
    network = sequential(nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    small = compacted(network, pruned(network, 0.5, layers=["4"]))
    assert widths(small) == {"0": 8, "4": 4, "6": 4}


def test_hooks_that_change_an_output():
    network = sequential()
    network[2].register_forward_hook(lambda layer, inputs, output: output + 1)
    with pytest.raises(CompactError, match="would not be the same network"):
        compact(network)


def modes(training: nn.Module, evaluation: nn.Module) -> nn.Sequential:
    """A network with layers of its own in each mode."""
    layer = Apply(
        lambda net, x: (net.of_training if net.training else net.of_evaluation)(x),
        of_training=training,
        of_evaluation=evaluation,
    )
    return sequential(layer, nn.Conv2d(8, 4, 3))


def test_layers_that_one_mode_alone_runs():
    for network, named in (
        (modes(nn.BatchNorm2d(8), nn.BatchNorm2d(8)), r"'3\.of_evaluation', '3\.of_training'"),
        (modes(nn.Conv2d(8, 8, 1), nn.Identity()), r"'3\.of_training'"),
    ):
        with pytest.raises(CompactError, match=named):
            compact(network, pruned(network, 0.5, layers=["0"]))
    network = modes(nn.Dropout(), nn.Identity())
    small = compacted(network, pruned(network, 0.5, layers=["0"]))
    assert small.train()(torch.rand(2, 3, 8, 8)).shape == (2, 4, 4, 4)


def test_a_wrong_cut_is_never_returned(monkeypatch):
    network = build("vgg11_bn")
    pruner = pruned(network, 0.5)
    everything = lambda layer, values: torch.ones(len(values)).bool()  # noqa: E731
    monkeypatch.setattr(cut, "foldable", everything)
    with pytest.raises(CompactError, match="would not be the same network"):
        compact(network, pruner)


def test_pruners_that_do_not_hold():
    network = build("vgg11_bn")
    pruner = pruned(network, 0.5)
    network.features[0].weight.data += 1
    with pytest.raises(CompactError, match=r"'features\.0\.weight' is not zero"):
        compact(network, pruner)
    with pytest.raises(CompactError, match=r"another network.*'features\.0\.weight'"):
        compact(build("resnet20"), pruner)


# What they cost


def test_cost_against_counts_by_hand():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, bias=False),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    network[0].bias.data.zero_()
    counts = cost(network, (2, 3, 8, 8))
    assert counts["parameters"] == 27 * 4 + 4 + 36 * 6 + 24 * 5 + 5
    assert counts["nonzero"] == counts["parameters"] - 4
    assert counts["multiply_adds"] == 64 * 27 * 4 + 4 * 36 * 6 + 24 * 5


def test_bytes_of_tensors_stored_densely_and_sparsely():
    network = build("conv4")
    dense, tensors = cost(network), network.state_dict().values()
    whole = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    assert dense["bytes_dense"] == pytest.approx(whole, abs=256 * len(tensors))
    assert dense["bytes_sparse"] == dense["bytes_dense"]
    WeightPruner(network, "dense", 0.9).prune(1, 1)
    counts, weights = cost(network), network.dense.weight.numel()
    assert counts["bytes_dense"] == dense["bytes_dense"]
    saved = weights * 9 // 10 * 4 - weights / 8
    assert counts["bytes_dense"] - counts["bytes_sparse"] == pytest.approx(saved, abs=200)
    assert counts["bytes_gzipped"] < counts["bytes_sparse"]


def test_table_of_costs():
    dense, masked = build("vgg11_bn"), build("vgg11_bn").train()
    small = compact(masked, pruned(masked, 0.5))
    table = cost_table({"dense": dense, "masked": masked, "compact": small}, (1, 4), repeats=2)
    assert list(table.index) == ["dense", "masked", "compact"]
    assert list(table) == [*cost(dense), "ms_batch_1", "ms_batch_4"]
    assert (table > 0).all(axis=None)
    assert table.parameters.dtype == int
    assert masked.training
    for column in ("parameters", "multiply_adds", "bytes_dense"):
        assert table[column]["dense"] == table[column]["masked"] > table[column]["compact"]
    assert table.nonzero["masked"] < table.nonzero["dense"]
    assert table.bytes_sparse["compact"] <= table.bytes_sparse["masked"] < table.bytes_sparse.dense


def test_attention_is_counted_whole():
    """Its products are those of the formula: projections in and out, scores, and their values."""
    width, tokens = 16, 12
    network = nn.Sequential(
        nn.Flatten(2), nn.TransformerEncoderLayer(width, 2, 32, batch_first=True), nn.Flatten()
    )
    network.append(nn.Linear(tokens * width, 10))
    products = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * 32
    counted = cost(network.eval(), (1, tokens, 4, 4))
    assert counted["multiply_adds"] == products + tokens * width * 10
    assert torch.backends.mha.get_fastpath_enabled()
