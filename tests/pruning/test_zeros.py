"""A pruned filter is exactly zero where it is used, in whatever way the network is written."""

import operator

import pytest
import torch
import torch.nn.functional as F
import torchvision
from pruned_networks import Apply, assert_refused, gate, images, unchanged
from random_networks import scale
from torch import nn
from torch.utils.checkpoint import checkpoint

from paperlib.models import ResidualSum
from paperlib.pruning import FilterPruner, prunable_layers

X = images(double=False, size=8)


class Net(nn.Module):
    """Convolutions `a` and `b`, what is between them, a dense layer, and layers for either."""

    def __init__(
        self, between=lambda n, x: x, after=lambda n, x: x.mean((2, 3)), channels=6, pixels=1
    ):
        super().__init__()
        torch.manual_seed(0)
        self.between, self.after = between, after
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(channels, 6, 3, padding=1)
        self.head = nn.Linear(6 * pixels, 2)
        self.norm, self.other, self.joined = (nn.BatchNorm2d(n) for n in (6, 6, 12))
        self.groups = nn.GroupNorm(3, 6)
        self.instances = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
        self.plain = nn.BatchNorm2d(6, affine=False)
        self.of_batch = nn.BatchNorm2d(6, affine=False, track_running_stats=False)
        self.features, self.means = nn.BatchNorm1d(6 * 64), nn.BatchNorm1d(6)
        self.c, self.one = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 1, 1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.transposed = nn.ConvTranspose2d(6, 6, 2, 2, output_padding=1, groups=6)
        self.wide = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.spread = nn.ConvTranspose2d(6, 12, 2, groups=6)
        self.rows, self.gate = nn.Linear(8, 8), nn.Linear(6, 6)
        self.pools = nn.Sequential(nn.Dropout(0.2), nn.AvgPool2d(2), nn.Upsample(scale_factor=2))
        self.bias = nn.Parameter(torch.ones(6, 1, 1))
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 1:
                    parameter.uniform_(0.5, 1.5)
            for name, buffer in self.named_buffers():
                if "running" in name:
                    buffer.uniform_(0.5, 1.5)

    def forward(self, x):
        return self.head(self.after(self, self.b(self.between(self, self.a(x)))))


def reads(net: nn.Module, name: str) -> list[torch.Tensor]:
    """What a layer reads, each time that it is called, of a few images."""
    seen = []
    hook = net.get_submodule(name).register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].detach().clone())
    )
    net(X)
    hook.remove()
    return seen


def pruned(net: nn.Module, layers: list[str], **options) -> FilterPruner:
    pruner = FilterPruner(net, [0.5] * len(layers), layers=layers, **options)
    assert pruner.prune(1, 1) > 0
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    net.train()(X).square().sum().backward()
    optimizer.step()
    pruner.hold()
    return pruner


def assert_zero(net: nn.Module, pruner: FilterPruner, layer: str, reader: str, at=None) -> None:
    """The filters of `layer` are zero where `reader` reads them: at the same channels, or `at`."""
    lost = ~pruner.masks[layer] if at is None else at(~pruner.masks[layer])
    for training in (True, False):
        (seen,) = reads(net.train(training), reader)
        assert not seen[:, lost].any()
        assert seen[:, ~lost].any()


# From the convolution to the next one


BETWEEN = {
    "norm, dropout, pool": lambda n, x: n.pools(n.norm(x)),
    "sigmoid, then norm": lambda n, x: n.norm(x.sigmoid()),
    "bias, then norm": lambda n, x: n.norm(x + n.bias),
    "resized": lambda n, x: n.instances(F.interpolate(x, x.shape[-2:], mode="bicubic").abs()),
    "norm without affine, of the batch": lambda n, x: n.of_batch(x).relu(),
    "two norms": lambda n, x: n.norm(x) * n.other(x),
    "norm after norm": lambda n, x: n.groups(F.silu(n.norm(x))),
    "depthwise with bias": lambda n, x: n.norm(n.depthwise(x).relu()),
    "transposed depthwise": lambda n, x: n.transposed(x).relu(),
    "hard swish by hand": lambda n, x: x * F.relu6(x + 3) / 6,
    "gate by a dense layer": lambda n, x: (
        x * n.gate(F.adaptive_avg_pool2d(x, 1).flatten(1)).view(x.size(0), 6, 1, 1)
    ),
    "gate that is expanded": lambda n, x: (
        x * n.gate(x.mean((2, 3)))[..., None, None].sigmoid().expand_as(x)
    ),
    "means expanded": lambda n, x: x.mean((2, 3), keepdim=True).expand(-1, -1, 8, 8) + x,
    "sizes looked up": lambda n, x: n.norm(x).view(x.size(0), x.size(1), -1, x.shape[3]),
    "odd pixels, padded": lambda n, x: F.pad(x[:, :, ::2, 1::2], (2, 2, 2, 2)),
    "local response": lambda n, x: F.local_response_norm(F.celu(x), 3),
    "checkpointed": lambda n, x: checkpoint(lambda x: n.norm(x).relu(), x, use_reentrant=False),
}


def half(lost):
    return torch.cat([torch.zeros(6, dtype=torch.bool), lost])


JOINED = {
    "with norm": (lambda n, x: n.joined(torch.cat((n.c(x).relu(), x.relu()), dim=1)), half),
    "twice": (lambda n, x: torch.cat([x, x], dim=-3), lambda lost: torch.cat([lost, lost])),
    "halves turned": (
        lambda n, x: torch.cat([x[:, 3:], x[:, :3], x[:, [1, 0, 2, 3, 4, 5]]], 1),
        lambda lost: torch.cat([lost.roll(3), lost[[1, 0, 2, 3, 4, 5]]]),
    ),
    "norm of what is spread": (lambda n, x: n.joined(torch.cat([n.one(x) * n.c(x), x], 1)), half),
    "expanded": (
        lambda n, x: n.joined(torch.cat([x[:, :1].expand(-1, 6, -1, -1), x], 1)),
        lambda lost: torch.cat([lost[:1].expand(6), lost]),
    ),
    "padded": (lambda n, x: F.pad(x, (0, 0, 0, 0, 2, 4)), lambda lost: F.pad(lost, (2, 4))),
}


HEADS = {
    "torch.flatten": (lambda n, x: torch.flatten(n.norm(x), 1), 64),
    "view": (lambda n, x: x.view(x.size(0), -1), 64),
    "reshape": (lambda n, x: F.relu(x).reshape(-1, 6 * 64), 64),
    "norm of features": (lambda n, x: n.features(x.flatten(1)).relu(), 64),
    "norm of means": (lambda n, x: n.means(F.adaptive_avg_pool2d(x, 1).flatten(1)), 1),
    "sum of pixels": (lambda n, x: x.sum(-1).sum(-1), 1),
    "squeezed": (lambda n, x: F.adaptive_avg_pool2d(x, 1).abs().squeeze(-1).squeeze(2), 1),
    "squeezed at once": (lambda n, x: x.mean((2, 3), keepdim=True).squeeze(), 1),
    "unsqueezed": (lambda n, x: x.mean((-2, -1))[:, :, None].flatten(1), 1),
}


@pytest.mark.parametrize("name", [*BETWEEN, *JOINED])
def test_zero_where_the_next_convolution_reads(name):
    between, at = JOINED.get(name) or (BETWEEN[name], None)
    net = Net(between, channels=12 if at else 6)
    pruner = pruned(net, ["a"])
    assert_zero(net, pruner, "a", "b", at)
    if at is half:
        assert pruner.held()["joined.bias"].tolist() == half(~pruner.masks["a"]).tolist()


@pytest.mark.parametrize("name", HEADS)
def test_zero_where_a_dense_layer_reads(name):
    after, pixels = HEADS[name]
    net = Net(after=after, pixels=pixels)
    assert_zero(net, pruned(net, ["b"]), "b", "head", lambda lost: lost.repeat_interleave(pixels))


def test_parameters_that_are_held_are_those_that_must_be():
    pruner = pruned(net := Net(BETWEEN["depthwise with bias"]), ["a"])
    names = {"a.weight", "a.bias", "depthwise.bias", "norm.weight", "norm.bias"}
    assert set(pruner.held()) == names
    for name, zero in pruner.held().items():
        assert not net.get_parameter(name)[zero].any()


REFUSED = {
    "sigmoid": (lambda n, x: x.sigmoid(), "sigmoid"),
    "parameter": (lambda n, x: F.relu(x - n.a.bias.view(-1, 1, 1)), "a.bias"),
    "a number of it": (lambda n, x: x + (x - x).mean((2, 3)).amax(-1).item(), "amax"),
    "matrix": (lambda n, x: x @ x.transpose(2, 3), "transpose"),
    "dense over rows": (lambda n, x: n.rows(x), "rows"),
    "no affine": (lambda n, x: n.plain(x), "plain"),
    "group norm of spoilt": (lambda n, x: n.groups(x.cos()), "cos"),
    "in place": (lambda n, x: [x.sigmoid_(), x][1], "sigmoid_"),
    "in place, detached": (lambda n, x: [x.detach().sigmoid_(), x][1], "sigmoid_"),
    "in place, of a view": (lambda n, x: [x[:, :, 1:].add_(1), x][1], "add_"),
    "into another": (lambda n, x: torch.add(x, x, out=x), "add"),
    "rows of some channels": (lambda n, x: n.rows(x.view(-1, 8)).view(x.shape), "view"),
    "multiplier": (lambda n, x: n.wide(x)[:, :6], "wide"),
    "transposed multiplier": (lambda n, x: n.spread(x)[:, :6], "spread"),
    "division": (lambda n, x: x / n.c(x), "truediv"),
    "as weights": (lambda n, x: F.conv2d(n.c(x), x[:, :, :1, :1]), "conv2d"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_with_nothing_changed(name):
    between, named = REFUSED[name]
    net = Net(between)
    with unchanged(net):
        assert_refused(rf"'a'.*{named}", FilterPruner, net, [0.5], layers=["a"])
    assert "a" not in prunable_layers(net)
    assert FilterPruner(net, [0.5], layers=["b"]).prune(1, 1) == 3


def test_a_size_that_is_stated_is_of_an_image_that_is_tried_or_the_layer_is_refused():
    for size, prunable in ((28, True), (30, False)):
        net = Net(after=lambda n, x, s=size: x.reshape(-1, 6 * s**2), pixels=size**2)
        assert ("b" in prunable_layers(net)) == prunable
        assert "a" in prunable_layers(net)


def test_a_norm_of_two_layers_is_not_zeroed_for_one():
    net = Net(lambda n, x: n.norm(x).relu(), lambda n, x: n.norm(x).mean((2, 3)))
    assert_refused("'norm'", FilterPruner, net, [0.5], layers=["a"])


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("mode_of_norm", [True, False])
def test_training_and_evaluation_are_both_followed(mode, mode_of_norm):
    class TwoHeads(Net):
        def forward(self, x):
            a = self.a(x)
            out = self.b(a.relu())
            return (out, self.c(self.norm(a))) if self.training == mode_of_norm else out

    net = TwoHeads().train(mode)
    pruner = FilterPruner(net, [0.5], layers=["a"])
    assert net.training == mode
    pruner.prune(1, 1)
    assert "norm.bias" in pruner.held()
    assert not reads(net.train(mode_of_norm), "c")[0][:, ~pruner.masks["a"]].any()


# Residual sums


class Block(nn.Module):
    """A branch of two convolutions, what follows it, a sum, and what follows that."""

    def __init__(self, add=operator.add, end=None, then=F.relu, side=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.add, self.end, self.then, self.side = add, end or nn.Identity(), then, side

    def forward(self, x):
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        shortcut = x if self.side is None else self.side(x)
        return self.then(self.add(self.end(out), shortcut))


class Add(nn.Module):
    def forward(self, a, b):
        return a.add(b)


# Other sums, and other layers before and after them, are in random_networks.py.
SUMS = {
    "weighted": lambda a, b: torch.add(a, b, alpha=0.5),
    "mean of three": lambda a, b: torch.stack((a, b, b)).mean(0),
    "module": Add(),
    "kwargs": lambda a, b: torch.add(other=a, input=b),
}
ENDS = {
    "scale": lambda: scale(6),
    "pool and dropout": lambda: nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Dropout(0.3)),
    "stochastic depth": lambda: torchvision.ops.StochasticDepth(0.5, "row"),
    "drop block": lambda: nn.Dropout2d(0.5),
    "squeeze and excitation": lambda: torchvision.ops.SqueezeExcitation(6, 3),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6),
}
THENS = {
    "relu, dropout": lambda x: F.dropout(x.relu(), 0.0),
    "module": nn.ReLU(),
    "scaled": lambda x: 0.5 * F.leaky_relu(x),
}


def residual(**options) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [Block(**options), Block()]
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), *blocks, nn.Conv2d(6, 2, 1))


BLOCKS = (
    {f"sum {name}": {"add": add} for name, add in SUMS.items()}
    | {f"end {name}": {"end": end()} for name, end in ENDS.items()}
    | {f"then {name}": {"then": then} for name, then in THENS.items()}
    | {"projection": {"side": nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))}}
)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_shortcut_adds_nothing_to_a_pruned_filter(name):
    net = residual(**BLOCKS[name])
    pruner = pruned(net, ["2.conv1", "2.conv2", "3.conv1", "3.conv2"])
    assert_zero(net, pruner, "2.conv2", "3.conv1")
    assert_zero(net, pruner, "2.conv1", "2.conv2")
    assert_zero(net, pruner, "3.conv2", "4")
    assert set(prunable_layers(net)) - {"2.end.fc1"} == {"0", *pruner.masks, "4"}


def test_norms_behind_a_sum_are_zero_too():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), Block(then=nn.Identity()), nn.BatchNorm2d(6)]
    layers += [Block(then=nn.Identity()), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)]
    for norm in (layers[2], layers[4]):
        nn.init.uniform_(norm.bias, 0.5, 1)
    net = nn.Sequential(*layers)
    pruner = pruned(net, ["1.conv2", "3.conv2"])
    assert_zero(net, pruner, "1.conv2", "3.conv1")
    assert_zero(net, pruner, "3.conv2", "5")


# What comes before a convolution at the end, with one block in several places.
SHARED = {
    "twice": lambda block: [block, block],
    "thrice": lambda block: [block, nn.ReLU(), block, block],
    "apart": lambda block: [block, nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), block],
}


@pytest.mark.parametrize("add", [operator.add, ResidualSum(), lambda a, b: b.add(a)])
@pytest.mark.parametrize("name", SHARED)
def test_blocks_that_are_called_more_than_once(name, add):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), *SHARED[name](Block(add)), nn.Conv2d(6, 2, 1))
    pruner = pruned(net, ["1.conv1", "1.conv2"])
    assert_zero(net, pruner, "1.conv2", f"{len(net) - 1}")
    if name != "apart":
        for later in reads(net, "1.conv1")[1:]:
            assert not later[:, ~pruner.masks["1.conv2"]].any()


def test_a_sum_that_no_module_returns_is_refused():
    def inline(add):
        convs = {name: nn.Conv2d(3, 3, 1) for name in ("conv1", "conv2")}
        return Apply(lambda m, x: m.conv2(torch.relu(m.add(m.conv1(x), x))), add=add, **convs)

    for net, name in (
        (inline(operator.add), "conv1"),
        (nn.Sequential(inline(operator.add)), "0.conv1"),
    ):
        assert_refused(rf"'{name}'.*ResidualSum", FilterPruner, net, [0.5], layers=[name])
    net = inline(ResidualSum())
    assert_zero(net, pruned(net, ["conv1"]), "conv1", "conv2")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"add": lambda a, b: operator.iadd(a, b).relu() + a}, "iadd"),
        ({"then": gate(6)}, "add"),
    ],
)
def test_a_sum_that_is_also_used_within_its_block_is_refused(options, named):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), Block(**options))
    assert_refused(rf"'1\.conv2'.*{named}", FilterPruner, net, [0.5], layers=["1.conv2"])


@pytest.mark.parametrize(
    ("net", "name"),
    [
        (nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=3), nn.Conv2d(6, 2, 1)), "1"),
        (nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 1)), "1"),
        (residual(**BLOCKS["projection"]), "2.side.0"),
    ],
)
def test_layers_that_are_passed_over_are_named_when_asked_for(net, name):
    assert name not in prunable_layers(net)
    count = len(prunable_layers(net))
    assert name not in FilterPruner(net, [0.5] * count).masks
    assert_refused(f"'{name}'", FilterPruner, net, [0.5], layers=[name])
