"""A pruned filter is exactly zero where it is used, in whatever way the network is written."""

import operator

import pytest
import torch
import torch.nn.functional as F
import torchvision
from pruned_networks import images
from torch import nn
from torch.utils.checkpoint import checkpoint

from paperlib.models import ResidualSum
from paperlib.pruning import FilterPruner, PruningError, prunable_layers

torch.set_num_threads(1)


class Net(nn.Module):
    """Convolutions `a` and `b`, what is between them, and a dense layer."""

    def __init__(self, between, after=lambda net, x: x.mean((2, 3)), channels: int = 6, **parts):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(channels, 6, 3, padding=1)
        self.head = nn.Linear(6, 2)
        self.between, self.after = between, after
        for name, part in parts.items():
            setattr(self, name, part)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 1:
                    parameter.uniform_(0.5, 1.5)
            for name, buffer in self.named_buffers():
                if "running" in name:
                    buffer.uniform_(0.5, 1.5)

    def forward(self, x):
        return self.head(self.after(self, self.b(self.between(self, self.a(x)))))


def reads(net: nn.Module, x: torch.Tensor, *names: str) -> list[torch.Tensor]:
    """What the named layers read of images."""
    seen = {}
    hooks = [
        net.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen.setdefault(name, inputs[0].clone())
        )
        for name in names
    ]
    net(x)
    for hook in hooks:
        hook.remove()
    return [seen[name].detach() for name in names]


def pruned(net: nn.Module, layers: list[str], **options) -> FilterPruner:
    pruner = FilterPruner(net, [0.5] * len(layers), layers=layers, **options)
    assert pruner.prune(1, 1) > 0
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    net.train()(images(double=False, size=8)).square().sum().backward()
    optimizer.step()
    pruner.hold()
    return pruner


def assert_zero(net: nn.Module, pruner: FilterPruner, layer: str, reader: str, at=None) -> None:
    """The filters of `layer` are zero where `reader` reads them: at the same channels, or `at`."""
    lost = ~pruner.masks[layer] if at is None else at(~pruner.masks[layer])
    for training in (True, False):
        (seen,) = reads(net.train(training), images(double=False, size=8), reader)
        assert not seen[:, lost].any()
        assert seen[:, ~lost].any()


# From the convolution to the next one


def half(lost):
    return torch.cat([torch.zeros(6, dtype=torch.bool), lost])


MAPPED = nn.Sequential(nn.Dropout(0.2), nn.AvgPool2d(2), nn.Upsample(scale_factor=2))
BETWEEN = {
    "norm, dropout, pool": Net(lambda n, x: n.more(n.norm(x)), norm=nn.BatchNorm2d(6), more=MAPPED),
    "gelu, then norm": Net(lambda n, x: n.norm(F.gelu(x)), norm=nn.GroupNorm(3, 6)),
    "sigmoid, then norm": Net(lambda n, x: n.norm(x.sigmoid()), norm=nn.BatchNorm2d(6)),
    "bias, then norm": Net(
        lambda n, x: n.norm(x + n.bias),
        norm=nn.BatchNorm2d(6),
        bias=nn.Parameter(torch.ones(6, 1, 1)),
    ),
    "resized, then norm": Net(
        lambda n, x: n.norm(F.interpolate(x, size=x.shape[-2:], mode="bicubic").abs()),
        norm=nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    ),
    "norm without affine, of the batch": Net(
        lambda n, x: n.norm(x).relu(),
        norm=nn.BatchNorm2d(6, affine=False, track_running_stats=False),
    ),
    "two norms": Net(
        lambda n, x: n.one(x) * n.two(x), one=nn.BatchNorm2d(6), two=nn.BatchNorm2d(6)
    ),
    "norm after norm": Net(
        lambda n, x: n.two(F.silu(n.one(x))), one=nn.BatchNorm2d(6), two=nn.SyncBatchNorm(6).eval()
    ),
    "depthwise with bias": Net(
        lambda n, x: n.norm(n.depthwise(x).relu()),
        depthwise=nn.Conv2d(6, 6, 3, padding=1, groups=6),
        norm=nn.BatchNorm2d(6),
    ),
    "swish by hand": Net(lambda n, x: x * torch.sigmoid(1.5 * x)),
    "hard swish by hand": Net(lambda n, x: x * F.relu6(x + 3) / 6),
    "gate of its means": Net(
        lambda n, x: n.gate(x.mean((2, 3), keepdim=True)).sigmoid() * x, gate=nn.Conv2d(6, 6, 1)
    ),
    "gate by a dense layer": Net(
        lambda n, x: x * n.gate(F.adaptive_avg_pool2d(x, 1).flatten(1)).view(x.size(0), 6, 1, 1),
        gate=nn.Linear(6, 6),
    ),
    "sizes looked up": Net(
        lambda n, x: n.norm(x).view(x.size(0), x.size(1), -1, x.shape[3]), norm=nn.BatchNorm2d(6)
    ),
    "odd pixels, padded": Net(lambda n, x: F.pad(x[:, :, ::2, 1::2], (2, 2, 2, 2))),
    "local response": Net(lambda n, x: F.local_response_norm(F.celu(x), 3)),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_zero_where_the_next_convolution_reads(name):
    net = BETWEEN[name]
    if name == "norm after norm":
        net.two = nn.BatchNorm2d(6)
    assert_zero(net, pruned(net, ["a"]), "a", "b")


JOINED = {
    "after the input's channels": (lambda n, x: torch.cat([n.c(x), x], 1), half),
    "with norm": (lambda n, x: n.norm(torch.cat((n.c(x).relu(), x.relu()), dim=1)), half),
    "twice": (lambda n, x: torch.cat([x, x], dim=-3), lambda lost: torch.cat([lost, lost])),
    "halves turned": (
        lambda n, x: torch.cat([x[:, 3:], x[:, :3], x[:, [1, 0, 2, 3, 4, 5]]], 1),
        lambda lost: torch.cat([lost.roll(3), lost[[1, 0, 2, 3, 4, 5]]]),
    ),
    "after what is spread": (lambda n, x: n.norm(torch.cat([n.one(x) * n.c(x), x], 1)), half),
    "padded": (lambda n, x: F.pad(x, (0, 0, 0, 0, 2, 4)), lambda lost: F.pad(lost, (2, 4))),
}


@pytest.mark.parametrize("name", JOINED)
def test_zero_among_joined_channels(name):
    between, at = JOINED[name]
    parts = {"c": nn.Conv2d(6, 6, 1)} if name != "padded" else {}
    parts |= {"one": nn.Conv2d(6, 1, 1)} if "spread" in name else {}
    parts |= {"norm": nn.BatchNorm2d(12)} if "norm" in name or "spread" in name else {}
    net = Net(between, channels=12, **parts)
    pruner = pruned(net, ["a"])
    assert_zero(net, pruner, "a", "b", at)
    if "norm" in parts:
        assert pruner.held()["norm.bias"].tolist() == [False] * 6 + (~pruner.masks["a"]).tolist()


HEADS = {
    "flatten": (lambda n, x: x.flatten(1), 64),
    "torch.flatten": (lambda n, x: torch.flatten(n.norm(x), 1), 64),
    "view": (lambda n, x: x.view(x.size(0), -1), 64),
    "reshape": (lambda n, x: F.relu(x).reshape(-1, 6 * 64), 64),
    "norm of features": (lambda n, x: n.features(x.flatten(1)).relu(), 64),
    "norm of means": (lambda n, x: n.means(F.adaptive_avg_pool2d(x, 1).flatten(1)), 1),
    "sum of pixels": (lambda n, x: x.sum(-1).sum(-1), 1),
    "squeezed": (lambda n, x: F.adaptive_avg_pool2d(x, 1).relu().squeeze(-1).squeeze(2), 1),
    "squeezed at once": (lambda n, x: x.mean((2, 3), keepdim=True).squeeze(), 1),
    "unsqueezed": (lambda n, x: x.mean((-2, -1))[:, :, None].flatten(1), 1),
}


@pytest.mark.parametrize("name", HEADS)
def test_zero_where_a_dense_layer_reads(name):
    after, pixels = HEADS[name]
    parts = {"norm": nn.BatchNorm2d(6)} if name == "torch.flatten" else {}
    if name.startswith("norm of"):
        parts = {name.split()[-1]: nn.BatchNorm1d(6 * pixels)}
    net = Net(lambda n, x: x, after, **parts)
    net.head = nn.Linear(6 * pixels, 2)
    pruner = pruned(net, ["b"])
    assert_zero(net, pruner, "b", "head", lambda lost: lost.repeat_interleave(pixels))


def test_parameters_that_are_held_are_those_that_must_be():
    net = BETWEEN["depthwise with bias"]
    names = {"a.weight", "a.bias", "depthwise.bias", "norm.weight", "norm.bias"}
    pruner = FilterPruner(net, [0.5], layers=["a"])
    pruner.prune(1, 1)
    assert set(pruner.held()) == names
    for name, zero in pruner.held().items():
        assert not dict(net.named_parameters())[name][zero].any()


REFUSED = {
    "softmax": (lambda n, x: x.softmax(1), "softmax"),
    "sigmoid": (lambda n, x: x.sigmoid(), "sigmoid"),
    "constant": (lambda n, x: x + 1, "add"),
    "parameter": (lambda n, x: F.relu(x - n.a.bias.view(-1, 1, 1)), "a.bias"),
    "across": (lambda n, x: x - x.mean(1, keepdim=True), "mean"),
    "shuffled": (lambda n, x: x.flip(1), "flip"),
    "a number of it": (lambda n, x: x + (x - x).mean((2, 3)).amax(-1).item(), "amax"),
    "matrix": (lambda n, x: x @ x.transpose(2, 3), "transpose"),
    "dense over rows": (lambda n, x: n.rows(x), "rows"),
    "layer norm": (lambda n, x: n.layer_norm(x), "layer_norm"),
    "no affine": (lambda n, x: n.plain(x), "plain"),
    "group norm of spoilt": (lambda n, x: n.groups(x.cos()), "cos"),
    "in place": (lambda n, x: [x.sigmoid_(), x][1], "sigmoid_"),
    "in place, detached": (lambda n, x: [x.detach().sigmoid_(), x][1], "sigmoid_"),
    "in place, of a view": (lambda n, x: [x[:, :, 1:].add_(1), x][1], "add_"),
    "into another": (lambda n, x: torch.add(x, x, out=x), "add"),
    "rows of some channels": (lambda n, x: n.rows(x.view(-1, 8)).view(x.shape), "view"),
    "multiplier": (lambda n, x: n.wide(x)[:, :6], "wide"),
    "division": (lambda n, x: x / n.c(x), "truediv"),
    "as weights": (lambda n, x: F.conv2d(n.c(x), x[:, :, :1, :1]), "conv2d"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_with_nothing_changed(name):
    between, named = REFUSED[name]
    net = Net(
        between,
        rows=nn.Linear(8, 8),
        layer_norm=nn.LayerNorm([6, 8, 8]),
        plain=nn.BatchNorm2d(6, affine=False),
        groups=nn.GroupNorm(2, 6),
        wide=nn.Conv2d(6, 12, 3, padding=1, groups=6),
        c=nn.Conv2d(6, 6, 1),
    )
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(PruningError, match=rf"'a'.*{named}"):
        FilterPruner(net, [0.5], layers=["a"])
    assert "a" not in prunable_layers(net)
    assert all(value.equal(before[key]) for key, value in net.state_dict().items())
    pruner = FilterPruner(net, [0.5], layers=["b"])
    assert pruner.prune(1, 1) == 3


def test_a_size_that_is_stated_is_of_an_image_that_is_tried_or_the_layer_is_refused():
    for size, prunable in ((28, True), (30, False)):
        net = Net(lambda n, x: x, lambda n, x, size=size: x.reshape(-1, 6 * size**2))
        net.head = nn.Linear(6 * size**2, 2)
        assert ("b" in prunable_layers(net)) == prunable
        assert "a" in prunable_layers(net)


def test_a_norm_of_two_layers_is_not_zeroed_for_one():
    net = Net(lambda n, x: n.norm(x).relu(), lambda n, x: n.norm(x).mean((2, 3)))
    net.norm = nn.BatchNorm2d(6)
    with pytest.raises(PruningError, match="'norm'"):
        FilterPruner(net, [0.5], layers=["a"])


def test_training_and_evaluation_are_both_followed():
    class TwoHeads(Net):
        def forward(self, x):
            a = self.a(x)
            out = self.b(a.relu())
            return (out, self.aux(self.norm(a))) if self.training else out

    net = TwoHeads(None, norm=nn.BatchNorm2d(6), aux=nn.Conv2d(6, 2, 1))
    for mode in (False, True):
        pruner = FilterPruner(net.train(mode), [0.5], layers=["a"])
        assert net.training == mode
        pruner.prune(1, 1)
        assert "norm.bias" in pruner.held()
        (seen,) = reads(net.train(), images(double=False, size=8), "aux")
        assert not seen[:, ~pruner.masks["a"]].any()


def test_following_a_network_draws_and_changes_nothing():
    class Drawing(Net):
        def forward(self, x):
            return super().forward(x + torch.rand(1, 3, 8, 8)) if self.training else x

    def between(net, x):
        return F.dropout(parametrized(net.norm(x)), training=net.training)

    parametrized = nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 6, 1))
    net = Drawing(between, norm=nn.BatchNorm2d(6), more=parametrized)
    net.b.eval()
    modes, state = [m.training for m in net.modules()], torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.inference_mode():
        FilterPruner(net, [0.5], layers=["a"])
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == modes
    assert all(tensor.equal(before[name]) for name, tensor in net.state_dict().items())


def test_checkpointed_layers_are_followed():
    block = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU())
    net = Net(lambda n, x: checkpoint(n.block, x, use_reentrant=False), block=block)
    assert_zero(net, pruned(net, ["a"]), "a", "b")


# Residual sums


class Block(nn.Module):
    """A branch of two convolutions, what follows it, a sum, and what follows that."""

    def __init__(self, add=operator.add, end=None, then=F.relu, channels: int = 6, side=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.add, self.end, self.then, self.side = add, end or nn.Identity(), then, side

    def forward(self, x):
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        shortcut = x if self.side is None else self.side(x)
        return self.then(self.add(self.end(out), shortcut))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(6, 1, 1) + 0.5)

    def forward(self, x):
        return self.gamma * x


class Add(nn.Module):
    def forward(self, a, b):
        return a.add(b)


def mean_of_three(a, b):
    return torch.stack((a, b, b)).mean(0)


SUMS = {
    "+": operator.add,
    "turned": lambda a, b: b + a,
    "iadd": operator.iadd,
    "torch.add": torch.add,
    "weighted": lambda a, b: torch.add(a, b, alpha=0.5),
    "add_": lambda a, b: a.add_(b),
    "sum": lambda a, b: sum([a, b]),
    "stack": lambda a, b: torch.stack([b, a], dim=2).sum(2),
    "mean of three": mean_of_three,
    "three": lambda a, b: a + b + b.tanh(),
    "nested": lambda a, b: (b + 0.1 * b) + (a + b.abs()),
    "module": Add(),
    "ResidualSum": ResidualSum(),
    "kwargs": lambda a, b: torch.add(other=a, input=b),
}
ENDS = {
    "scale": Scale,
    "pool and dropout": lambda: nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Dropout(0.3)),
    "stochastic depth": lambda: torchvision.ops.StochasticDepth(0.5, "row"),
    "drop block": lambda: nn.Dropout2d(0.5),
    "activation": lambda: nn.PReLU(6),
    "squeeze and excitation": lambda: torchvision.ops.SqueezeExcitation(6, 3),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6),
}
THENS = {
    "nothing": lambda x: x,
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
    # The filters that are kept are the sum's, as before.
    net.eval()
    x = images(double=False, size=8)
    keep, (inputs,) = pruner.masks["2.conv2"], reads(net, x, "2")
    block = net[2]
    branch = block.end(block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(inputs))))))
    shortcut = inputs if block.side is None else block.side(inputs)
    add = operator.add if isinstance(block.add, ResidualSum) else block.add
    expected = block.then(add(branch, shortcut))
    assert torch.allclose(block(inputs)[:, keep], expected[:, keep], atol=1e-6)


def test_norms_behind_a_sum_are_zero_too():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)
            self.bn2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)

        def forward(self, x):
            return x + self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), PreActivation(), PreActivation(), nn.Conv2d(6, 2, 1))
    for norm in (net[1].bn1, net[2].bn1):
        nn.init.uniform_(norm.bias, 0.5, 1)
    pruner = pruned(net, ["0", "1.conv2", "2.conv2"])
    assert_zero(net, pruner, "0", "1.conv1")
    assert_zero(net, pruner, "1.conv2", "2.conv1")
    assert_zero(net, pruner, "2.conv2", "3")


SHARED = {
    "twice": lambda block: nn.Sequential(nn.Conv2d(3, 6, 3), block, block, nn.Conv2d(6, 2, 1)),
    "thrice": lambda block: nn.Sequential(
        nn.Conv2d(3, 6, 3), block, nn.ReLU(), block, block, nn.Conv2d(6, 2, 1)
    ),
    "apart": lambda block: nn.Sequential(
        nn.Conv2d(3, 6, 3), block, nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), block, nn.Conv2d(6, 2, 1)
    ),
}


@pytest.mark.parametrize("add", [operator.add, ResidualSum(), lambda a, b: b.add(a)])
@pytest.mark.parametrize("name", SHARED)
def test_blocks_that_are_called_more_than_once(name, add):
    torch.manual_seed(0)
    net = SHARED[name](Block(add))
    pruner = pruned(net, ["1.conv1", "1.conv2"])
    last = f"{len(net) - 1}"
    assert_zero(net, pruner, "1.conv2", last)
    if name != "apart":
        inputs = []
        net[1].conv1.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        net(images(double=False, size=8))
        for later in inputs[1:]:
            assert not later[:, ~pruner.masks["1.conv2"]].any()


def test_a_sum_that_no_module_returns_is_refused():
    class Inline(nn.Module):
        def __init__(self, add=operator.add):
            super().__init__()
            self.conv1, self.conv2, self.add = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), add

        def forward(self, x):
            return self.conv2(torch.relu(self.add(self.conv1(x), x)))

    for net, name in ((Inline(), "conv1"), (nn.Sequential(Inline()), "0.conv1")):
        with pytest.raises(PruningError, match=rf"'{name}'.*ResidualSum"):
            FilterPruner(net, [0.5], layers=[name])
    net = Inline(ResidualSum())
    pruner = FilterPruner(net, [0.5], layers=["conv1"])
    pruner.prune(1, 1)
    assert_zero(net, pruner, "conv1", "conv2")


def test_a_tensor_that_a_sum_is_written_into_is_not_used_again():
    class Reused(Block):
        def forward(self, x):
            branch = out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            out += x
            return out.relu() + branch

    net = nn.Sequential(nn.Conv2d(3, 6, 3), Reused())
    with pytest.raises(PruningError, match=r"'1\.conv2'.*iadd"):
        FilterPruner(net, [0.5], layers=["1.conv2"])


def test_a_sum_that_is_also_used_within_its_block_is_refused():
    class Peeking(Block):
        def forward(self, x):
            out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x
            return out * self.peek(out).sigmoid()

    block = Peeking()
    block.peek = nn.Conv2d(6, 6, 1)
    with pytest.raises(PruningError, match=r"'1\.conv2'"):
        FilterPruner(nn.Sequential(nn.Conv2d(3, 6, 3), block), [0.5], layers=["1.conv2"])


class Equals(nn.Module):
    """Two convolutions, neither deeper than the other."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        return self.a(x) + self.b(x)


@pytest.mark.parametrize(
    ("net", "name"),
    [
        (nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=3), nn.Conv2d(6, 2, 1)), "1"),
        (nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 1)), "1"),
        (residual(**BLOCKS["projection"]), "2.side.0"),
        (nn.Sequential(nn.Conv2d(3, 6, 1), Equals()), "1.b"),
    ],
)
def test_layers_that_are_passed_over_are_named_when_asked_for(net, name):
    assert name not in prunable_layers(net)
    count = len(prunable_layers(net))
    assert name not in FilterPruner(net, [0.5] * count).masks
    with pytest.raises(PruningError, match=f"'{name}'"):
        FilterPruner(net, [0.5], layers=[name])
