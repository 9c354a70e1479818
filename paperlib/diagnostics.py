"""Measures beside a run. The run's own numbers do not depend on them."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from paperlib.batches import Batches
from paperlib.config import Config, ConfigError, Flatness, WeightPruning
from paperlib.flatness import gradient_covariance_trace, hessian_spectrum, sharpness
from paperlib.loop import PlainLoop, batch_norms, evaluate, recalibrate
from paperlib.loss import PROBED, Loss
from paperlib.pruning import Pruner, WeightPruner

HISTOGRAM_IMAGES = 128
LOSS_IMAGES = 1000  # training images whose loss is measured around an event
RECALIBRATION_IMAGES, RECALIBRATION_BATCH = 2000, 128
MAGNITUDES = np.logspace(-6, 1, 141)

Arrays = dict[str, np.ndarray]


@dataclass
class Moment:
    """The end of an epoch, for a callback: the row so far, and the network."""

    epoch: int
    row: dict[str, float]
    model: nn.Module
    pruner: Pruner
    test: Batches
    config: Config


Callback = Callable[[Moment], Arrays | None]


@torch.no_grad()
def normalised_outputs(model: nn.Module, images: Tensor) -> np.ndarray:
    """Return histograms of the last batch norms' outputs before scale and shift.

    They use the statistics of this batch, as in training (arXiv 1906.03728, figure B1). The
    network and its running statistics stay as they are.

    Args:
        model: The network.
        images: (B, C, H, W).

    Returns:
        (8, 200) densities over all channels and pixels in [-5, 5], the deepest layer last. A
        network with fewer batch norms gives fewer rows.

    Raises:
        ConfigError: The network has no batch norm.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)][-8:]
    densities = {}

    def observe(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        outputs = F.batch_norm(inputs[0].float(), None, None, training=True, eps=norm.eps).cpu()
        counts = torch.histc(outputs, 200, -5.0, 5.0)
        densities[norm] = (counts / counts.sum() * 200 / 10.0).numpy()

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with ExitStack() as stack:
        for norm in norms:
            stack.enter_context(norm.register_forward_pre_hook(observe))
        stack.callback(model.train, model.training)
        functional_call(model.train(), buffers, (images,))
    if not densities:
        raise ConfigError(
            f"histograms=True needs batch norm, or pruning of single weights, and "
            f"{type(model).__name__} has no BatchNorm2d that images pass"
        )
    return np.stack([densities[norm] for norm in norms if norm in densities])


def magnitudes(weight: Tensor) -> np.ndarray:
    """Count the weights other than zero by magnitude, in the bins of `MAGNITUDES`: (140,).

    A bin is a twentieth of a decade. Smaller and larger weights count in the outermost bins.
    """
    sizes = weight.detach().abs().flatten().double().cpu().numpy()
    return np.histogram(np.clip(sizes[sizes > 0], MAGNITUDES[0], MAGNITUDES[-1]), MAGNITUDES)[0]


def histograms(
    config: Config, moment: str, model: nn.Module, pruner: Pruner, train: Batches
) -> Arrays:
    """Measure the histograms of a run that asks for them, of pruned weights or of batch norms.

    Args:
        config: The run.
        moment: "untrained"; "before" the first event, "after" the last one; "trained" at the end.
        model: The network.
        pruner: Its pruner.
        train: The training images.

    Returns:
        Arrays for the record. If single weights are pruned, `magnitudes` of every pruned layer as
        "before.LAYER", "after.LAYER" and "end.LAYER"; their "edges"; and "kept.LAYER", a bit a
        weight, 1 if it is not pruned. Otherwise `normalised_outputs` as "untrained" and "trained".
    """
    if not config.histograms:
        return {}
    if not isinstance(config.pruning, WeightPruning):
        if moment not in ("untrained", "trained"):
            return {}
        return {moment: normalised_outputs(model, train.first(HISTOGRAM_IMAGES)[0])}
    if not isinstance(pruner, WeightPruner):
        return {}
    name = "end" if moment == "trained" else moment
    found: Arrays = {"edges": MAGNITUDES} if moment == "before" else {}
    for layer, module in pruner.layers.items():
        found[f"{name}.{layer}"] = magnitudes(module.weight)
        if moment == "trained":
            found[f"kept.{layer}"] = np.packbits(pruner.masks[layer].cpu())
    return found


def check_flatness(model: nn.Module, test: Batches, flatness: Flatness) -> None:
    """Raise ValueError if a network's flatness cannot be measured; its arguments are as below."""
    loss = Loss(model, *test.first(PROBED))
    loss.check_derivatives(order=2)
    if flatness.eigenvalues > loss.size:
        raise ConfigError(f"{flatness.eigenvalues} eigenvalues of {loss.size} parameters")


def measured_flatness(
    model: nn.Module, test: Batches, flatness: Flatness, held: dict[str, Tensor]
) -> Arrays:
    """Measure the flatness of the minimum (figures 6 and E1 to E5). The network stays as it is.

    Args:
        model: The network.
        test: The test images.
        flatness: The numbers of images, eigenvalues and directions, and the steps along these.
        held: Parameter name -> bool tensor, True where pruning holds it at zero.

    Returns:
        eigenvalues (k,) by magnitude and noise, Tr(C), both on `images` of the test images;
        epsilons (E,); losses and accuracies (D, E) along the eigenvectors of the D algebraically
        largest eigenvalues, on `test_images` of them or all (arXiv 1906.03728, section 3 and
        appendix E).
    """
    images, labels = test.first(flatness.images)
    eigenvalues, vectors = hessian_spectrum(model, images, labels, flatness.eigenvalues, held)
    directions = vectors[eigenvalues.argsort(descending=True)[: flatness.directions]]
    del vectors
    noise = gradient_covariance_trace(model, images, labels, held)
    along = test.first(flatness.test_images or len(test.labels))
    losses, accuracies = sharpness(model, *along, directions, flatness.epsilons, held)
    return {
        "eigenvalues": eigenvalues.cpu().numpy(),
        "noise": np.array(noise),
        "epsilons": np.array(flatness.epsilons),
        "losses": losses.numpy(),
        "accuracies": accuracies.numpy(),
    }


@torch.no_grad()
def distance(model: nn.Module, initial: nn.Module) -> float:
    """Return the L2 distance of all parameters from the initial ones, relative to their norm."""
    moved = norm = torch.zeros((), dtype=torch.float64)
    for parameter, start in zip(model.parameters(), initial.parameters(), strict=True):
        before = start.cpu().double()
        moved = moved + (parameter.cpu().double() - before).square().sum()
        norm = norm + before.square().sum()
    return float((moved / norm).sqrt())


def training_loss(model: nn.Module, loop: PlainLoop, train: Batches, size: int) -> float:
    """Return the loss on the first `LOSS_IMAGES` training images, without augmentation.

    Args:
        model: A replica of the run's network.
        loop: The run's loop, for its precision and kernels.
        train: The training images.
        size: Images of a batch.
    """
    images, labels = train.first(LOSS_IMAGES)
    with loop.kernels(model):
        batches = zip(images.split(size), labels.split(size), strict=True)
        return evaluate(model, batches, loop.autocast).read()[0]


def recalibrated(
    model: nn.Module, loop: PlainLoop, train: Batches, size: int, test: Batches
) -> float:
    """Return the test accuracy with batch norm's running statistics taken anew.

    They are taken from the first `RECALIBRATION_IMAGES` training images, without augmentation, in a
    fixed random order: a batch of one class would have statistics of its own. A last batch of one
    image is left out, because some batch norms cannot train on it.

    Args:
        model: A replica of the run's network. Its statistics are replaced.
        loop: The run's loop, for its precision and kernels.
        train: The training images.
        size: Images of a batch of evaluation.
        test: The test images.

    Returns:
        The accuracy in percent, NaN without batch norm.
    """
    if not batch_norms(model):
        return math.nan
    images, _ = train.first(RECALIBRATION_IMAGES)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    batches = list(images[order.to(images.device)].split(RECALIBRATION_BATCH))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches.pop()
    with loop.kernels(model):
        recalibrate(model, batches, loop.autocast)
        return evaluate(model, test.evaluation(size), loop.autocast).read()[1]
