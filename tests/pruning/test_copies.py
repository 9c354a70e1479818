"""The mask belongs to the network: its copies, files, graphs and compiled forms have it, too."""

import copy
import io
from collections.abc import Callable
from functools import partial

import pytest
import torch
from pruned_networks import generator, images, network, unchanged, with_varied_norms
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck

from paperlib import models
from paperlib.noise import FilterNoise
from paperlib.pruning import FilterPruner, prunable_layers


def small(block: Callable[[], nn.Module]) -> nn.Module:
    """A network of two such blocks, from 8 channels to 8."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2), nn.ReLU(), block(), block(), nn.AdaptiveAvgPool2d(1)]
    return with_varied_norms(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 10))).eval()


def ours() -> nn.Module:
    torch.manual_seed(0)
    return models.ResNet(2, (8, 16), False, 10, 3, 0.0).eval()


NETWORKS = {
    "basic": lambda: small(partial(BasicBlock, 8, 8)),
    "bottleneck": lambda: small(partial(Bottleneck, 8, 2)),
    "inverted": lambda: small(partial(InvertedResidual, 8, 8, 1, 2)),
    "ours": ours,
}


def pruner_of(model: nn.Module, *, events: int = 1, score: str = "l2") -> FilterPruner:
    """Prunes more than half of the last two layers that end the branch of a residual block."""
    ends = [name for name, layer in prunable_layers(model).items() if layer.masks][-2:]
    pruner = FilterPruner(model, [0.6] * len(ends), score, "largest", ends)
    for event in range(1, events + 1):
        assert pruner.prune(event, 2) > 0
    return pruner


def x(seed: int = 0) -> torch.Tensor:
    return images(2, seed, double=False)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    with torch.no_grad():
        assert torch.allclose(a(x()), b(x()), rtol=1e-5, atol=1e-6)


def saved_whole(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def extracted(model: nn.Module) -> nn.Module:
    *_, last = (name for name, _ in model.named_children())
    extractor = create_feature_extractor(model, {last: "out"})
    return lambda images: extractor(images)["out"]


COPIES = {
    "deepcopy": copy.deepcopy,
    "torch.save": saved_whole,
    "symbolic_trace": torch.fx.symbolic_trace,
    "feature extractor": extracted,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "exported": lambda model: torch.export.export(model, (x(),)).module(),
    "graph of a copy": lambda model: torch.fx.symbolic_trace(copy.deepcopy(model)),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", NETWORKS)
def test_copies_are_the_same_function(kind, way):
    model = NETWORKS[kind]()
    dense = copy.deepcopy(model)
    pruner_of(model)
    with torch.no_grad():
        assert not torch.allclose(model(x()), dense(x()), rtol=1e-3)
    assert_same(model, COPIES[way](model))


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_copy_stays_as_it_was_when_the_original_is_pruned_on(kind):
    model = NETWORKS[kind]()
    pruner = pruner_of(model, events=0)
    never = copy.deepcopy(model)
    pruner.prune(1, 2)
    best = copy.deepcopy(model)
    traced = copy.deepcopy(torch.fx.symbolic_trace(model))
    with torch.no_grad():
        then = best(x()), never(x())
        pruner.prune(2, 2)
        assert torch.equal(best(x()), then[0])
        assert torch.allclose(traced(x()), then[0], atol=1e-6)
        assert torch.equal(never(x()), then[1])
        assert not torch.allclose(model(x()), then[0], rtol=1e-3)
        assert_same(never, NETWORKS[kind]())


@pytest.mark.parametrize("kind", NETWORKS)
def test_state_of_a_pruned_network_in_a_fresh_one(kind):
    model = NETWORKS[kind]()
    pruner = pruner_of(model)
    fresh = NETWORKS[kind]()
    if kind == "ours":
        fresh.load_state_dict(model.state_dict())
        assert_same(model, fresh)
    else:
        with pytest.raises(RuntimeError, match="kept_channels"):
            fresh.load_state_dict(model.state_dict())
        # Its pruner's state tells it where masks go.
        fresh = NETWORKS[kind]()
    second = pruner_of(fresh, events=0)
    second.load_state_dict(pruner.state_dict())
    fresh.load_state_dict(model.state_dict())
    assert_same(model, fresh)
    assert pruner.prune(2, 2) == second.prune(2, 2) > 0
    assert_same(model, fresh)
    # The other way round, what is missing is named.
    with pytest.raises(RuntimeError, match=r"keep|kept"):
        model.load_state_dict(NETWORKS[kind]().state_dict())


@pytest.mark.parametrize("kind", ["basic", "inverted", "ours"])
def test_a_network_compiled_before_it_is_pruned(kind):
    torch._dynamo.reset()
    model = NETWORKS[kind]()
    fast = torch.compile(model, backend="eager")
    with torch.no_grad():
        fast(x())
        pruner = pruner_of(model, events=0)
        for event in (1, 2):
            pruner.prune(event, 2)
            with torch.compiler.set_stance("force_eager"):
                expected = model(x())
            assert torch.allclose(fast(x()), expected, atol=1e-6)


def test_a_second_pruner_leaves_the_masks_of_the_first():
    for make in (NETWORKS["basic"], ours):
        model = make()
        first = pruner_of(model)
        name = list(first.masks)[-1]
        second = FilterPruner(model, [0.5], target="largest", layers=[name])
        second.prune(1, 1)
        gone = ~first.masks[name] | ~second.masks[name]
        assert gone.sum() > (~second.masks[name]).sum()
        block = model.get_submodule(name.rpartition(".")[0])
        seen = []
        block.register_forward_hook(lambda module, inputs, out, seen=seen: seen.append(out))
        model(x())
        assert not seen[0][:, gone].any()
        assert seen[0][:, ~gone].any()


# What watches a network stays with it


@pytest.mark.parametrize(
    "way", [copy.deepcopy, saved_whole, lambda model: copy.deepcopy(torch.fx.symbolic_trace(model))]
)
def test_passes_of_a_copy_leave_the_scores_of_the_original(way):
    model = network("resnet20", double=False)
    pruner = pruner_of(model, events=0, score="activation")
    for seed in range(14):
        model.train()(x(seed))
    other = way(model).train()
    before = copy.deepcopy(pruner.state_dict())
    for seed in range(25):
        other(x(seed))
    torch.testing.assert_close(pruner.state_dict(), before, rtol=0, atol=0)
    assert before["passes"] == 14
    for seed in range(6):
        model(x(seed))
    assert pruner.activation.passes == 20
    assert not pruner.activation.scores["blocks.8.conv2"].equal(before["score.blocks.8.conv2"])


@pytest.mark.parametrize("kind", ["zeroing", "gaussian", "restored"])
def test_a_copy_of_a_network_with_noise_leaves_the_original(kind):
    model = network("vgg11_bn", double=False).eval()
    chooser = FilterPruner(model, [0.5], target="largest", norm=False)
    noise = FilterNoise(model, chooser, kind, 5, generator())
    noise.prune(1, 1)
    model(x())
    left = copy.deepcopy(noise.state_dict())
    with unchanged(model):
        for other in (copy.deepcopy(model), saved_whole(model)):
            for _ in range(8):
                other(x())
    torch.testing.assert_close(noise.state_dict(), left, rtol=0, atol=0)
