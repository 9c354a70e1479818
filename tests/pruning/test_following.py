"""Following a network leaves it as it was, whatever its code does."""

import pytest
import torch
import torch.nn.functional as F
from pruned_networks import assert_refused, unchanged
from test_zeros import Net, X, assert_zero
from torch import nn

from paperlib.pruning import FilterPruner, prunable_layers


def test_following_a_network_draws_and_changes_nothing():
    class Drawing(Net):
        def forward(self, x):
            return super().forward(x + torch.rand(1, 3, 8, 8)) if self.training else x

    net = Drawing(lambda n, x: F.dropout(n.c(n.norm(x)), training=n.training))
    nn.utils.parametrizations.spectral_norm(net.c)
    net.b.eval()
    modes, state = [m.training for m in net.modules()], torch.get_rng_state()
    with unchanged(net), torch.inference_mode():
        FilterPruner(net, [0.5], layers=["a"])
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == modes


class Counting(Net):
    """Changes attributes, buffers and containers of its own in each pass."""

    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("loose", torch.full((2,), torch.nan))
        self.calls, self.seen, self.by_name, self.last = 0, [[]], {"a": {1}}, None

    def forward(self, x):
        self.calls += 1
        self.steps += 1
        self.loose.zero_()
        self.c.weight.data.mul_(0.5)
        for parameter in self.one.parameters():
            parameter.data = parameter.data + 1
        y = self.a(x).relu()
        self.seen[0].append(y)
        self.by_name["a"].add(self.calls)
        self.by_name["b"] = self.last = y
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 2, 3)).detach()
        return self.head(self.after(self, self.b(y)))


class Optional(Net):
    def __init__(self, inner, **options):
        super().__init__(**options)
        self.inner = inner

    def forward(self, x, gate=None, *, features=False, **more):
        out = self.a(x)
        out = self.inner(out) if gate is None and not more else out.relu()
        if more.get("mask") is not None:
            out = out * more["mask"]
        out = self.b(out)
        found = self.head(out.mean((2, 3)))
        return (found, out) if features else found


def test_arguments_keep_their_defaults():
    net = Optional(nn.ReLU())
    pruner = FilterPruner(net, [0.5], layers=["a"])
    pruner.prune(1, 1)
    assert_zero(net, pruner, "a", "b")
    assert_refused("'a': .*Softplus", FilterPruner, Optional(nn.Softplus()), [0.5], layers=["a"])


OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9)
OLD = pytest.mark.skipif(OLD, reason="torch before 2.9 lets no proxy take a buffer's place")


@pytest.mark.parametrize("refused", [pytest.param(False, marks=OLD), True])
def test_following_a_network_takes_back_what_its_code_changes(refused):
    net = Counting(after=lambda n, x: x.mean((2, 3)) if not refused or x.sum() > 0 else x)
    addresses = {name: p.data_ptr() for name, p in net.state_dict().items()}
    attributes = [set(vars(module)) for module in net.modules()]
    with unchanged(net):
        if refused:
            assert_refused("Counting", FilterPruner, net, [0.5], layers=["a"])
        else:
            assert "a" in prunable_layers(net)
            pruner = FilterPruner(net, [0.5], layers=["a"])
    assert (net.calls, net.seen, net.by_name, net.last) == (0, [[]], {"a": {1}}, None)
    assert addresses == {name: p.data_ptr() for name, p in net.state_dict().items()}
    assert attributes == [set(vars(module)) for module in net.modules()]
    net(X)
    assert type(net.mean) is torch.Tensor
    if not refused:
        pruner.prune(1, 1)
        assert_zero(net, pruner, "a", "b")
