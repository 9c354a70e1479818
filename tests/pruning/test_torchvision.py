"""torchvision's networks: a pruned filter is zero where it is used, or its layer is refused.

Where a filter is used is found by trial: with the outputs of all other mixing layers held as they
were, noise on the filter's output changes just those channels of the next layers' inputs that it
reaches. Run with `-s` for a table.
"""

import random
from functools import partial
from itertools import takewhile

import pytest
import torch
import torchvision
from pruned_networks import assert_refused, generator
from torch import Tensor, nn

from paperlib.pruning import FilterPruner, prunable_layers

NETWORKS = {  # and the size of their images
    "alexnet": 64,
    "vgg11": 32,
    "squeezenet1_0": 32,
    "googlenet": 32,
    "densenet121": 32,
    "resnet18": 32,
    "resnet50": 32,
    "inception_v3": 75,
    "mobilenet_v3_small": 32,
    "shufflenet_v2_x0_5": 32,
    "resnext50_32x4d": 32,
    "efficientnet_b0": 32,
}
TRIED = 4  # layers of each


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    slow = name in ("googlenet", "inception_v3", "vgg11")
    options = {"init_weights": False} if slow else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
        if isinstance(module, nn.BatchNorm2d | nn.Conv2d) and module.bias is not None:
            nn.init.uniform_(module.bias, 0.1, 0.5)
    return model.eval()


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


@torch.no_grad()
def passed(model: nn.Module, x: Tensor, change=lambda name: None) -> tuple[dict, dict]:
    """Inputs and outputs of the mixing layers by name; `change` may give other outputs."""
    inputs, outputs = {}, {}

    def hook(name, module, arguments, output):
        inputs[name], outputs[name] = arguments[0].clone(), output.clone()
        return change(name)

    dense = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    mixing = {n: m for n, m in convolutions(model).items() if not m.groups == m.in_channels > 1}
    handles = [m.register_forward_hook(partial(hook, n)) for n, m in (dense | mixing).items()]
    model(x)
    for handle in handles:
        handle.remove()
    return inputs, outputs


def used(x: Tensor) -> Tensor:
    """Which channels (N, C, H, W) or features (N, F) are not zero."""
    return x.transpose(0, 1).flatten(1).any(1)


class Trial:
    """A dense network on images, with the inputs and outputs of its mixing layers."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x
        self.inputs, self.outputs = passed(model, x)
        self.size = 10 * max(1, *(float(output.abs().max()) for output in self.outputs.values()))

    def reached(self, conv: str, filters: Tensor | slice) -> dict[str, Tensor]:
        """By name of layer, which channels or features of its input these filters reach."""

        def held(name: str) -> Tensor:
            output = self.outputs[name].clone()
            if name == conv:
                # Positive and large, so that ReLU lets it pass.
                output[:, filters] += self.size * torch.rand_like(output[:, filters])
            return output

        inputs, _ = passed(self.model, self.x, held)
        differs = {name: used(seen - self.inputs[name]) for name, seen in inputs.items()}
        return {name: channels for name, channels in differs.items() if channels.any()}

    def reached_later(self, layers: list[str], conv: str, reader: str) -> Tensor:
        """Which channels of a layer's input a layer after `conv` reaches: a shortcut adds there."""
        found = torch.zeros(self.inputs[reader].shape[1], dtype=torch.bool)
        for name in takewhile(lambda name: name != reader, layers[layers.index(conv) + 1 :]):
            found |= self.reached(name, slice(None)).get(reader, torch.zeros_like(found))
        return found


@pytest.mark.parametrize("name", NETWORKS)
def test_zero_where_used_or_refused(name):
    model, x = network(name), torch.randn(2, 3, NETWORKS[name], NETWORKS[name])
    layers = list(prunable_layers(model))
    trial = Trial(model, x)
    chance = random.Random(0)
    tried = sorted(chance.sample(layers, min(TRIED, len(layers))), key=layers.index)
    pruner = FilterPruner(model, [0.4] * len(tried), "l1", "random", tried, generator())
    reached = {n: trial.reached(n, filters) for n, filters in pruner.choose(1, 1).items()}
    pruner.hold()
    inputs, _ = passed(model, x)
    zero = 0
    for conv, readers in reached.items():
        assert readers or conv == layers[-1], f"{conv} reaches no layer"
        for reader, channels in readers.items():
            lost = channels & used(inputs[reader])
            if lost.any():
                lost &= ~trial.reached_later(layers, conv, reader)
            assert not lost.any(), f"{reader} reads filters of {conv}"
            zero += int(channels.sum())
    others = [n for n in convolutions(model) if n not in layers]
    for other in chance.sample(others, min(2, len(others))):
        assert_refused(f"'{other}'", FilterPruner, model, [0.5], layers=[other])
    print(
        f"\n{name:20} {len(convolutions(model)):3} convolutions, {len(layers):3} prunable, "
        f"{len(others):3} refused; {len(tried)} tried, {zero:4} channels zero where they are read"
    )
