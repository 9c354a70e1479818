"""The network and the pruner of a run, from its configuration or its record."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from paperlib import data, models
from paperlib.batches import Batches
from paperlib.config import Config, FilterPruning, WeightPruning
from paperlib.diagnostics import HISTOGRAM_IMAGES, normalised_outputs
from paperlib.loop import logits_of
from paperlib.noise import FilterNoise
from paperlib.pruning import FilterPruner, Pruner, WeightPruner
from paperlib.runs import RunRecord
from paperlib.streams import seeded

SIZES = (8, 16, 28, 32, 48, 64, 96, 128, 224)  # of square images, to name some that fit


AnyPruner = Pruner | FilterPruner | FilterNoise | WeightPruner


def resolve(spec: str) -> Callable:
    """Return the object that "package.module:name" names; raise ValueError if there is none."""
    module, _, name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot find {spec!r}: {error}") from error


def build(config: Config, classes: int = 10, channels: int = 3) -> nn.Module:
    """Return a run's network, with the initial weights of its seed."""
    with seeded(config.seed, "weights"):
        if ":" in config.model:
            return resolve(config.model)(num_classes=classes, in_channels=channels)
        return models.build(config.model, classes, channels, config.width, config.dropout)


def make_pruner(config: Config, model: nn.Module) -> AnyPruner:
    """Return a run's pruner, or the noise that replaces it."""
    p = config.pruning
    chance = torch.Generator()
    if isinstance(p, WeightPruning):
        return WeightPruner(model, p.layers, p.fractions, p.target, p.schedule, p.mu, chance)
    if not isinstance(p, FilterPruning):
        return Pruner()
    score = resolve(p.score) if ":" in p.score else p.score
    pruner = FilterPruner(model, p.fractions, score, p.target, p.layers, chance, p.norm)
    if config.noise is None:
        return pruner
    return FilterNoise(model, pruner, config.noise.kind, config.noise.passes, torch.Generator())


def events_of(pruning: FilterPruning | WeightPruning | None) -> dict[int, tuple]:
    """Return, by epoch, the event and the number of events as pruners take them."""
    if pruning is None:
        return {}
    if isinstance(pruning, WeightPruning):
        return {epoch: (i + 1, len(pruning.epochs)) for i, epoch in enumerate(pruning.epochs)}
    if pruning.scratch:
        return {0: (1, 1)}
    counts, layers = [len(epochs) for epochs in pruning.epochs], pruning.epochs
    return {
        epoch: ([es.index(epoch) + 1 if epoch in es else None for es in layers], counts)
        for epoch in sorted({e for epochs in layers for e in epochs})
    }


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Return Adam or SGD over all parameters, fused."""
    common: dict[str, Any] = {
        "lr": config.learning_rate,
        "weight_decay": config.weight_decay,
        "fused": True,
    }
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=config.momentum, **common)
    return torch.optim.Adam(model.parameters(), **common)


def check_images(
    config: Config, shape: tuple[int, int, int], classes: int, device: torch.device
) -> None:
    """Check that a run's network takes images of this shape and returns logits.

    The networks of `models` are tried without memory or arithmetic (torch's meta device).

    Args:
        config: The run's configuration.
        shape: Channels, height and width of the images.
        classes: The number of classes.
        device: Where the run trains.

    Raises:
        ValueError: The network does not take these images, or returns no (images, classes).
    """
    ours = ":" not in config.model
    with torch.device("meta") if ours else torch.device("cpu"):
        model = build(config, classes, shape[0])
    model = model if ours else model.to(device)
    where = torch.device("meta") if ours else device

    def tried(height: int, width: int) -> Exception | None:
        images = torch.zeros(2, shape[0], height, width, device=where)
        try:
            with torch.no_grad(), seeded(config.seed, "check"):
                found = logits_of(model.eval()(images), 2)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            return error
        if found.shape != (2, classes):
            return ValueError(
                f"its logits are {tuple(found.shape)} for 2 images, {classes} classes"
            )
        return None

    error = tried(*shape[1:])
    if error is not None:
        size = f"{shape[2]}x{shape[1]}"
        fitting = [f"{s}x{s}" for s in SIZES if tried(s, s) is None]
        valid = f"of these sizes it takes {', '.join(fitting)}" if fitting else "it takes none"
        raise ValueError(
            f"{config.model} cannot take images of {size} in {config.data!r} ({error}); {valid}"
        ) from error


def initial_network(record: RunRecord) -> nn.Module:
    """Return the network of a record with the initial weights of its seed."""
    counted = record.provenance
    return build(record.config, counted.get("classes", 10), counted.get("channels", 3))


def pruned_network(record: RunRecord) -> tuple[nn.Module, WeightPruner]:
    """Return a network at its initial weights, and its pruner with the record's final masks.

    A record with histograms keeps the masks of single weights, not the weights. Whatever depends
    on the masks alone, such as sizes and times, is that of the trained network.

    Raises:
        ValueError: The record has no such masks, or those of another network.
    """
    run = f"the record of {record.config.title}"
    if not isinstance(record.config.pruning, WeightPruning):
        raise ValueError(f"{run} is not of single weights pruned")
    model = initial_network(record)
    pruner = make_pruner(record.config, model)
    assert isinstance(pruner, WeightPruner)
    state = {}
    for name, mask in pruner.masks.items():
        packed = record.arrays.get(f"kept.{name}")
        if packed is None:
            raise ValueError(f"{run} has no mask of {name!r}: it was not made with histograms=True")
        if len(packed) != math.ceil(mask.numel() / 8):
            shape = tuple(mask.shape)
            raise ValueError(f"{run} has a mask of {len(packed)} bytes of {name!r}, not of {shape}")
        kept = torch.from_numpy(np.unpackbits(packed, count=mask.numel()).astype(bool))
        state[f"mask.{name}"] = kept.view(mask.shape)
    pruner.load_state_dict(state)
    return model, pruner


def imagenet_outputs(config: Config) -> dict[str, np.ndarray]:
    """Return `normalised_outputs` of VGG19 on a run's first training images (figure B1).

    Returns:
        "untrained", and "trained" with torchvision's ImageNet weights.

    Raises:
        RuntimeError: The weights cannot be downloaded.
    """
    trained = models.pretrained_vgg19_bn()
    dataset = data.load(config.data)
    images = Batches(
        dataset.train_images, dataset.train_labels, dataset.mean, dataset.std, torch.device("cpu")
    )
    first, _ = images.first(HISTOGRAM_IMAGES)
    with seeded(config.seed, "weights"):
        untrained = models.build("vgg19_bn", num_classes=1000)
    networks = {"untrained": untrained, "trained": trained}
    return {name: normalised_outputs(network, first) for name, network in networks.items()}
