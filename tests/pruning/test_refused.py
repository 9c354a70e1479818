"""Layers and networks that cannot be pruned are refused by name, before anything is changed."""

import pytest
import torch
import torch.nn.functional as F
from pruned_networks import Apply, assert_refused, images, small_net, unchanged
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from paperlib.pruning import FilterPruner, PruningError, WeightPruner, prunable_layers


def layered(*last: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), *last)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Halved()) or layer,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.2),
    "structured": lambda layer: prune.ln_structured(layer, "weight", 0.5, 2, 0),
    "no parameter": lambda layer: delattr(layer, "weight") or setattr(layer, "weight", 0) or layer,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", COMPUTED.values(), ids=COMPUTED)
def test_weights_that_are_computed(way):
    net, linear = layered(way(nn.Conv2d(6, 6, 3))), nn.Sequential(way(nn.Linear(6, 6)))
    assert_refused(r"'2'.* weight", FilterPruner, net, [0.5])
    assert_refused(r"'2'.* weight", FilterPruner, net, [0.5], layers=["2"], norm=False)
    assert_refused(r"'2'.* weight", WeightPruner, net, ["0", "2"], 0.5)
    assert_refused(r"'0'.* weight", WeightPruner, linear, "0", 0.5)
    assert FilterPruner(net, [0.5], layers=["0"]).prune(1, 1) == 3


def tied(name: str, other: str, share) -> nn.Sequential:
    """Two convolutions with norms, of which two parameters are one."""
    net = layered(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))
    layer, _, tensor = other.partition(".")
    setattr(net[int(layer)], tensor, share(net.get_parameter(name)))
    return net


class Shifted(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("net", "layers", "named"),
    [
        *(
            (tied("2.weight", "4.weight", share), None, r"2\.weight.*4\.weight")
            for share in (lambda w: w, lambda w: nn.Parameter(w.data))
        ),
        (tied("3.bias", "5.bias", lambda bias: bias), None, r"3\.bias.*5\.bias"),
        (
            Apply(
                lambda net, x: F.conv_transpose2d(net.conv(x).relu(), net.conv.weight),
                conv=nn.Conv2d(3, 6, 3),
            ),
            ["conv"],
            r"conv\.weight",
        ),
        (layered(prune.identity(nn.BatchNorm2d(6), "bias")), ["0"], r"'0'.*'2'.* bias"),
        (layered(Shifted(6)), ["0"], r"'0'.*'2' \(Shifted\)"),
        (Apply(lambda net, x: x if x.sum() > 0 else -x), None, "Apply"),
    ],
)
def test_networks_whose_weights_or_norms_are_not_a_layers_own(net, layers, named):
    assert_refused(named, FilterPruner, net, [0.5], layers=layers)


def test_layers_without_weights_yet():
    net = layered(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(2, 1))
    assert_refused("'5'", FilterPruner, net, [0.5])
    assert_refused("'2'", WeightPruner, net, "2", 0.5)
    assert list(prunable_layers(net)) == ["0"]
    net(images(size=8, double=False))
    assert list(prunable_layers(net)) == ["0", "2", "5"]


@pytest.mark.parametrize("target", ["smallest", "random"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["0.weight", "0.bias", "1.weight", "1.bias"])
def test_parameters_that_are_not_finite(where, value, target):
    net = small_net()
    pruner = FilterPruner(net, [0.5], "l2", target, ["0"])
    net.get_parameter(where).data.view(-1)[2] = value
    with unchanged(net), pytest.raises(PruningError, match="'0'"):
        pruner.prune(1, 1)
    assert pruner.masks["0"].all()
    assert_refused("'0'", FilterPruner, net, [0.5], "l2", target, ["0"])
    if where == "0.weight":
        assert_refused("'0'", WeightPruner, net, "0", 0.5, target)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda net: torch.compile(net, backend="eager"), "compiled"),
        (lambda net: net.compile(backend="eager") or net, "compiled"),
        (lambda net: nn.Sequential(*net[:2], torch.compile(net[2], backend="eager")), "compiled"),
        (torch.jit.script, "compiled"),
        (lambda net: torch.jit.trace(net, images(size=8, double=False)), "compiled"),
        (lambda net: net.to("meta"), r"'0\.weight'.*meta"),
        (lambda net: "x", "'x'"),
        (lambda net: None, "None"),
        (lambda net: nn.Conv2d, "Conv2d"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_is_compiled_or_has_no_values_or_is_no_network(make, named):
    net = make(layered(nn.Conv2d(6, 6, 3)))
    assert_refused(named, FilterPruner, net, [0.5])
    assert_refused(named, WeightPruner, net, "0", 0.5)


def test_a_network_in_a_wrapper_for_several_devices():
    net = nn.DataParallel(layered(nn.Conv2d(6, 6, 3)))
    assert_refused(r"model\.module", FilterPruner, net, [0.5])
    assert FilterPruner(net.module, [0.5]).prune(1, 1) == 3


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Padded(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight, bias) + 1


def patched() -> nn.Conv2d:
    conv = nn.Conv2d(6, 6, 3)
    conv.forward = lambda x: F.conv2d(x, conv.weight + 1)
    return conv


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.ConvTranspose2d(6, 6, 3),
        lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(6, 6, 3)),
        lambda: nn.Sequential(nn.Unflatten(1, (6, 1)), nn.Conv3d(6, 6, (1, 3, 3))),
        lambda: Apply(lambda m, x: F.conv2d(x, m.w), w=nn.Parameter(torch.rand(6, 6, 3, 3))),
        lambda: Standardised(6, 6, 3),
        lambda: Padded(6, 6, 3),
        patched,
        lambda: torch.ao.nn.quantized.Conv2d(6, 6, 3),
        lambda: torch.ao.nn.qat.Conv2d(
            6, 6, 3, qconfig=torch.ao.quantization.get_default_qat_qconfig("x86")
        ),
    ],
)
def test_convolutions_of_another_kind(make):
    """They are never pruned, and none before them is pruned in their stead."""
    net = layered(nn.Conv2d(6, 6, 1), nn.ReLU(), make())
    name = "4.1" if isinstance(net[4], nn.Sequential) else "4"
    for layers in (None, [name]):
        assert_refused(f"'{name}'", FilterPruner, net, [0.5], layers=layers)
    assert_refused(f"'{name}'", WeightPruner, net, name, 0.5)
    assert FilterPruner(net, [0.5], layers=["0"]).prune(1, 1) == 3


def test_classes_made_of_layers_are_layers():
    conv, batch, groups, dense = (
        type(layer.__name__, (layer,), {"extra": True})
        for layer in (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm, nn.Linear)
    )
    torch.manual_seed(0)
    net = nn.Sequential(
        *(conv(3, 6, 3, padding=1), batch(6), nn.ReLU(), conv(6, 6, 3, padding=1), groups(2, 6)),
        *(nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), dense(216, 2)),
    )
    for norm in (net[1], net[4]):
        nn.init.uniform_(norm.bias, 0.5, 1)
    assert list(prunable_layers(net)) == ["0", "3", "6"]
    assert_refused("'3'", FilterPruner, net, [0.5, 0.5], "ebn", layers=["0", "3"])
    pruner = FilterPruner(net, [0.3, 0.5, 0.5])
    assert pruner.fractions == {"0": 0.3, "3": 0.5, "6": 0.5}
    pruner.prune(1, 1)
    for name, reader in (("0", 3), ("3", 6)):
        seen = net[:reader](images(size=8, double=False))
        assert not seen[:, ~pruner.masks[name]].any()
        assert seen[:, pruner.masks[name]].any()
    weights = WeightPruner(net, ["6", "9"], 0.5)
    weights.prune(1, 1)
    assert weights.masks["9"].sum() == 216


def add_one(module, *values):
    """A hook of any kind."""
    return values[-1][0] + 1 if isinstance(values[-1], tuple) else values[-1] + 1


@pytest.mark.parametrize(
    ("register", "named"),
    [
        *((lambda net, at=at: net[at].register_forward_hook(add_one), f"'{at}'") for at in (0, 2)),
        (lambda net: net[1].register_forward_hook(add_one, with_kwargs=True), "'1'"),
        (lambda net: net[1].register_forward_pre_hook(add_one), "'1'"),
        (lambda net: net[3].register_forward_pre_hook(add_one), "'3'"),
        (lambda net: net[3].register_forward_pre_hook(add_one, with_kwargs=True), "'3'"),
        (lambda net: nn.modules.module.register_module_forward_hook(add_one), "every"),
        (lambda net: nn.modules.module.register_module_forward_pre_hook(add_one), "every"),
    ],
)
def test_hooks_that_may_change_what_is_read(register, named):
    net = layered(nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3))
    handle = register(net)
    try:
        assert_refused(rf"'0'.*{named}", FilterPruner, net, [0.5], layers=["0"])
        FilterPruner(net, [0.5], layers=["0"], norm=False)
    finally:
        handle.remove()
    for _ in "ab":  # the hooks of one pruner do not keep the next one out
        FilterPruner(net, [0.5], "activation", layers=["0"])


@pytest.mark.parametrize("at", [1, 2, 3])
def test_forward_passes_that_were_replaced(at):
    net = layered(nn.MaxPool2d(2), nn.Conv2d(6, 4, 3))
    forward = net[at].forward
    net[at].forward = lambda x: forward(x + 1)
    assert_refused(rf"'0'.*'{at}'", FilterPruner, net, [0.5], layers=["0"])
