"""The mask belongs to the network: its copies, files, graphs and compiled forms have it, too."""

import copy
import io
from functools import partial

import pytest
import torch
from pruned_networks import generator, images, network, unchanged, with_varied_norms
from torch import nn
from torchvision.models import mobilenetv2, resnet
from torchvision.models.feature_extraction import create_feature_extractor

from paperlib import compact, models
from paperlib.noise import FilterNoise
from paperlib.pruning import FilterPruner, prunable_layers
from paperlib.pruning.masks import mask_of

X = images(2, double=False)
BLOCKS = {  # from 8 channels to 8
    "basic": partial(resnet.BasicBlock, 8, 8),
    "bottleneck": partial(resnet.Bottleneck, 8, 2),
    "inverted": partial(mobilenetv2.InvertedResidual, 8, 8, 1, 2),
    "ours": partial(models.BasicBlock, 8, 8, 1, False),
}


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2), nn.ReLU(), BLOCKS[kind](), BLOCKS[kind]()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    return with_varied_norms(nn.Sequential(*layers)).eval()


def pruner_of(model: nn.Module, *, events: int = 1, score: str = "l2") -> FilterPruner:
    """Prunes more than half of the last two layers that end the branch of a residual block."""
    ends = [name for name, layer in prunable_layers(model).items() if layer.masks][-2:]
    pruner = FilterPruner(model, [0.6] * len(ends), score, "largest", ends)
    for event in range(1, events + 1):
        assert pruner.prune(event, 2) > 0
    return pruner


def assert_same(a: nn.Module, b: nn.Module) -> None:
    with torch.no_grad():
        assert torch.allclose(a(X), b(X), rtol=1e-5, atol=1e-6)


def saved_whole(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "torch.save": saved_whole,
    "symbolic_trace": torch.fx.symbolic_trace,
    "feature extractor": lambda model: (
        lambda images: create_feature_extractor(model, {"6": "out"})(images)["out"]
    ),
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "exported": lambda model: torch.export.export(model, (X,)).module(),
    "graph of a copy": lambda model: torch.fx.symbolic_trace(copy.deepcopy(model)),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", BLOCKS)
def test_copies_are_the_same_function(kind, way):
    model = made(kind)
    pruner_of(model)
    with torch.no_grad():
        assert not torch.allclose(model(X), made(kind)(X), rtol=1e-3)
    assert_same(model, COPIES[way](model))


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_copy_stays_as_it_was_when_the_original_is_pruned_on(kind):
    model = made(kind)
    pruner = pruner_of(model, events=0)
    never = copy.deepcopy(model)
    pruner.prune(1, 2)
    best, traced = copy.deepcopy(model), copy.deepcopy(torch.fx.symbolic_trace(model))
    with torch.no_grad():
        then = best(X)
        pruner.prune(2, 2)
        assert torch.equal(best(X), then)
        assert torch.allclose(traced(X), then, atol=1e-6)
        assert not torch.allclose(model(X), then, rtol=1e-3)
        assert torch.equal(never(X), made(kind)(X))


@pytest.mark.parametrize("kind", BLOCKS)
def test_state_of_a_pruned_network_in_a_fresh_one(kind):
    model, fresh = made(kind), made(kind)
    pruner = pruner_of(model)
    if kind == "ours":
        fresh.load_state_dict(model.state_dict())
        assert_same(model, fresh)
    else:
        with pytest.raises(RuntimeError, match="kept_channels"):
            fresh.load_state_dict(model.state_dict())
        # Its pruner's state tells it where masks go.
        fresh = made(kind)
    second = pruner_of(fresh, events=0)
    second.load_state_dict(pruner.state_dict())
    fresh.load_state_dict(model.state_dict())
    assert_same(model, fresh)
    assert pruner.prune(2, 2) == second.prune(2, 2) > 0
    assert_same(model, fresh)
    # The other way round, what is missing is named.
    with pytest.raises(RuntimeError, match=r"keep|kept"):
        model.load_state_dict(made(kind).state_dict())


@pytest.mark.parametrize("kind", ["basic", "inverted", "ours"])
def test_a_network_compiled_before_it_is_pruned(kind):
    torch._dynamo.reset()
    model = made(kind)
    fast = torch.compile(model, backend="eager")
    with torch.no_grad():
        fast(X)
        pruner = pruner_of(model, events=0)
        for event in (1, 2):
            pruner.prune(event, 2)
            with torch.compiler.set_stance("force_eager"):
                expected = model(X)
            assert torch.allclose(fast(X), expected, atol=1e-6)


def given_by(block: nn.Module, model: nn.Module) -> torch.Tensor:
    """The block's output where the network is run."""
    seen = []
    with block.register_forward_hook(lambda module, inputs, out: seen.append(out)):
        model(X)
    return seen[0]


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("kind", ["basic", "ours"])
def test_a_second_pruner_leaves_the_masks_of_the_first(kind, at_once):
    model = made(kind)
    second = FilterPruner(model, [0.5], target="largest", layers=["3.conv2"]) if at_once else None
    first = pruner_of(model)
    second = second or FilterPruner(model, [0.5], target="largest", layers=["3.conv2"])
    before = copy.deepcopy(second.state_dict())
    second.prune(1, 1)
    gone = ~first.masks["3.conv2"] | ~second.masks["3.conv2"]
    assert gone.sum() > (~second.masks["3.conv2"]).sum()
    for pruner in (first, second, first):
        pruner.hold()
        out = given_by(model[3], model)
        assert not out[:, gone].any()
        assert out[:, ~gone].any()
    second.load_state_dict(before)
    (mask,) = first.layers["3.conv2"].masks.values()
    assert torch.equal(mask_of(mask.module) == 1, first.masks["3.conv2"])


@pytest.mark.parametrize("kind", ["basic", "ours"])
def test_hold_makes_masks_zero_again_after_weights_of_before(kind):
    model = made(kind)
    pruner = pruner_of(model)
    state = copy.deepcopy(model.state_dict())
    pruner.prune(2, 2)
    model.load_state_dict(state)
    for name, parameter in model.named_parameters():
        if (gone := pruner.held().get(name)) is not None:
            parameter.data[gone] = 0
    with pytest.raises(compact.CompactError, match=r"residual sum.*hold\(\)"):
        compact.compact(model, pruner)
    pruner.hold()
    out = given_by(model[3], model)
    assert not out[:, ~pruner.masks["3.conv2"]].any()
    compact.compact(model, pruner)


# What watches a network stays with it


@pytest.mark.parametrize(
    "way", [copy.deepcopy, saved_whole, lambda model: copy.deepcopy(torch.fx.symbolic_trace(model))]
)
def test_passes_of_a_copy_leave_the_scores_of_the_original(way):
    model = made("ours").train()
    pruner = pruner_of(model, events=0, score="activation")
    for _ in range(14):
        model(X)
    other = way(model).train()
    before = copy.deepcopy(pruner.state_dict())
    for _ in range(25):
        other(X)
    torch.testing.assert_close(pruner.state_dict(), before, rtol=0, atol=0)
    assert before["passes"] == 14
    for _ in range(6):
        model(X)
    assert pruner.activation.passes == 20
    assert not pruner.activation.scores["3.conv2"].equal(before["score.3.conv2"])


@pytest.mark.parametrize("kind", ["zeroing", "gaussian", "restored"])
def test_a_copy_of_a_network_with_noise_leaves_the_original(kind):
    model = network("vgg11_bn", double=False).eval()
    chooser = FilterPruner(model, [0.5], target="largest", norm=False)
    noise = FilterNoise(model, chooser, kind, 5, generator())
    noise.prune(1, 1)
    model(X)
    left = copy.deepcopy(noise.state_dict())
    with unchanged(model):
        for other in (copy.deepcopy(model), saved_whole(model)):
            for _ in range(8):
                other(X)
    torch.testing.assert_close(noise.state_dict(), left, rtol=0, atol=0)
