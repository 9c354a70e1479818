"""The network and the pruner of a run, from its configuration or its record."""

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from paperlib import data, models
from paperlib.batches import Batches
from paperlib.config import Config, FilterPruning, WeightPruning
from paperlib.devices import full_float32
from paperlib.diagnostics import HISTOGRAM_IMAGES, normalised_outputs
from paperlib.loop import logits_of
from paperlib.loss import check_repeatable
from paperlib.noise import FilterNoise
from paperlib.pruning import FilterPruner, Pruner, WeightPruner
from paperlib.runs import RunRecord
from paperlib.store.code import code_checksum
from paperlib.streams import seeded

SIZES = (8, 16, 28, 32, 48, 64, 96, 128, 224)  # sizes of square images that an error may suggest


def resolve(spec: str) -> Callable:
    """Return the object that "package.module:name" names.

    Raises:
        ValueError: There is none.
    """
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


def make_pruner(config: Config, model: nn.Module) -> Pruner:
    """Return a run's pruner, or the noise that replaces it."""
    p, chance = config.pruning, torch.Generator()
    if p is None:
        return Pruner()
    if isinstance(p, WeightPruning):
        return WeightPruner(model, p.layers, p.fractions, p.target, p.schedule, p.mu, chance)
    score = resolve(p.score) if ":" in p.score else p.score
    pruner = FilterPruner(model, p.fractions, score, p.target, p.layers, chance, p.norm)
    if config.noise is None:
        return pruner
    return FilterNoise(model, pruner, config.noise.kind, config.noise.passes, torch.Generator())


def try_pruner(config: Config) -> None:
    """Make a run's network and pruner, and prune once if the score is the user's own function.

    Raises:
        ValueError: A name is unknown, or its code has no checksum (`store.code`), or the run's
            layers cannot be pruned.
        Exception: Of any kind, from the user's code.
    """
    model = build(config)
    pruner = make_pruner(config, model)
    if isinstance(config.pruning, FilterPruning) and ":" in config.pruning.score:
        with seeded(config.seed, "check"):
            if not config.pruning.scratch:  # as after a training batch
                for parameter in model.parameters():
                    parameter.grad = torch.randn_like(parameter)
            getattr(pruner, "pruner", pruner).prune(1, 1)
    code_checksum(config)  # of code that is imported by now


def events_of(pruning: FilterPruning | WeightPruning | None) -> dict[int, tuple]:
    """Return by epoch the event and the number of events, in the form that pruners take."""
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
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        options |= {"momentum": config.momentum}
    kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.Adam
    return kind(model.parameters(), fused=True, **options)


def check_images(
    config: Config, shape: Sequence[int], classes: int, device: torch.device, count: int = 0
) -> None:
    """Check that a run's network takes images of this shape and returns logits of each alone.

    Args:
        config: The run's configuration.
        shape: Channels, height and width of the images.
        classes: The number of classes.
        device: Where the run trains.
        count: How many of them there are for training.

    Raises:
        ValueError: The network does not take these images, or cannot be trained on a last batch of
            one, or its logits are not (images, classes), or are random, or depend on the other
            images of a batch.
    """
    channels, height, width = shape
    model = build(config, classes, channels).to(device).eval()

    def tried(height: int, width: int) -> Exception | None:
        images = torch.zeros(2, channels, height, width, device=device)
        try:
            with torch.no_grad(), seeded(config.seed, "check"):
                found = tuple(logits_of(model(images), 2).shape)
            if found != (2, classes):
                raise ValueError(f"its logits are {found} for 2 images, {classes} classes")
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            return error
        return None

    if error := tried(height, width):
        fitting = [f"{size}x{size}" for size in SIZES if tried(size, size) is None]
        raise ValueError(
            f"{config.model} cannot take images of {width}x{height} in {config.data!r} ({error}); "
            f"of these sizes it takes {', '.join(fitting) or 'none'}"
        ) from error
    with torch.no_grad(), full_float32(), seeded(config.seed, "check"):
        images = torch.randn(4, *shape, device=device)
        passes = [logits_of(model(x), len(x)) for x in (images, images, images[:2])]
        if count % config.batch == 1 or config.batch == 1:
            try:
                build(config, classes, channels).to(device).train()(images[:1])
            except Exception as error:  # of any kind, from the network's code
                raise ValueError(
                    f"{config.model} cannot be trained on a single image, and the last batch of an "
                    f"epoch is one ({count} images in batches of {config.batch}): {error}"
                ) from error
    if passes[0].isfinite().all():  # else its loss will show it
        check_repeatable(config.model, *passes)


def initial_network(record: RunRecord) -> nn.Module:
    """Return the network of a record with the initial weights of its seed."""
    counted = record.provenance
    return build(record.config, counted.get("classes", 10), counted.get("channels", 3))


def pruned_network(record: RunRecord) -> tuple[nn.Module, WeightPruner]:
    """Return a network at its initial weights, and its pruner with the record's final masks.

    A record with histograms keeps the masks of single weights, not the weights. Quantities that
    depend on the masks alone, such as sizes and times, are those of the trained network.

    Raises:
        ValueError: The record has no such masks, or masks of another size.
    """
    model = initial_network(record)
    pruner, title = make_pruner(record.config, model), record.config.title
    if not isinstance(pruner, WeightPruner):
        raise ValueError(f"the record of {title} is not of single weights pruned")
    state = {}
    for name, mask in pruner.masks.items():
        packed = record.arrays.get(f"kept.{name}", np.empty(0, np.uint8))
        if len(packed) != math.ceil(mask.numel() / 8):
            raise ValueError(
                f"the record of {title} has {len(packed)} bytes of a mask of {name!r}, which is "
                f"{tuple(mask.shape)}; a run has masks if it was made with histograms=True"
            )
        kept = torch.from_numpy(np.unpackbits(packed, count=mask.numel()).astype(bool))
        state[f"mask.{name}"] = kept.view(mask.shape)
    pruner.load_state_dict(state)
    return model, pruner


def imagenet_outputs(config: Config) -> dict[str, np.ndarray]:
    """Return `normalised_outputs` of VGG19 on training images of a run's data set (figure B1).

    The images are the first of the whole data set, or spread over one sorted by class, even if the
    run takes a subset.

    Returns:
        The histograms by name: "untrained", and "trained" with torchvision's ImageNet weights.

    Raises:
        RuntimeError: The weights cannot be downloaded; the message names their address.
    """
    from torchvision.models import VGG19_BN_Weights, vgg19_bn

    with seeded(config.seed, "weights"):
        untrained, trained = vgg19_bn(), vgg19_bn()
    weights = VGG19_BN_Weights.IMAGENET1K_V1
    try:
        state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except OSError as error:
        raise RuntimeError(f"cannot download {weights.url}: {error}") from error
    trained.load_state_dict(state)
    dataset = data.load(config.data)
    images, mean, std = dataset.train_images, dataset.mean, dataset.std
    first, _ = Batches(images, dataset.train_labels, mean, std, "cpu").first(HISTOGRAM_IMAGES)
    networks = {"untrained": untrained, "trained": trained}
    return {name: normalised_outputs(network, first) for name, network in networks.items()}
