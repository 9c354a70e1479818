"""Measures beside a run. The run's own numbers do not depend on them."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from paperlib.batches import Batches
from paperlib.config import Config, Flatness, WeightPruning
from paperlib.flatness import gradient_covariance_trace, hessian_spectrum, sharpness
from paperlib.loop import PlainLoop, Totals, batch_norms, evaluate, recalibrate
from paperlib.noise import FilterNoise
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
        (8, 200) densities over all channels and pixels in [-5, 5], the deepest layer last.
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
    return np.stack([densities[norm] for norm in norms])


def magnitudes(weight: Tensor) -> np.ndarray:
    """Count the weights other than zero by magnitude, in the bins of `MAGNITUDES`: (140,).

    A bin is a twentieth of a decade. Smaller and larger weights count in the outermost bins.
    """
    sizes = weight.detach().abs().flatten().double().cpu().numpy()
    return np.histogram(np.clip(sizes[sizes > 0], MAGNITUDES[0], MAGNITUDES[-1]), MAGNITUDES)[0]


def histograms(
    config: Config, moment: str, model: nn.Module, pruner: Pruner | None, train: Batches
) -> Arrays:
    """Measure the histograms of a run that asks for them, of pruned weights or of batch norms.

    Args:
        config: The run.
        moment: "untrained"; "before" the first event, "after" the last one; "trained" at the end.
        model: The network.
        pruner: Its pruner; None of the untrained network.
        train: The training images.

    Returns:
        Arrays for the record. If single weights are pruned, `magnitudes` of every pruned layer as
        "before.LAYER", "after.LAYER" and "end.LAYER", their `edges`, and as "kept.LAYER" which
        weights are not pruned, as bits. Otherwise `normalised_outputs`, "untrained" and "trained".
    """
    if not config.histograms:
        return {}
    if not isinstance(config.pruning, WeightPruning):
        of_norms = moment in ("untrained", "trained")
        images, _ = train.first(HISTOGRAM_IMAGES)
        return {moment: normalised_outputs(model, images)} if of_norms else {}
    if not isinstance(pruner, WeightPruner):
        return {}
    name = "end" if moment == "trained" else moment
    found: Arrays = {
        f"{name}.{n}": magnitudes(m.get_parameter("weight")) for n, m in pruner.layers.items()
    }
    if moment == "before":
        found["edges"] = MAGNITUDES
    if moment == "trained":
        found |= {f"kept.{n}": np.packbits(mask.cpu()) for n, mask in pruner.masks.items()}
    return found


def measured_flatness(
    model: nn.Module, test: Batches, flatness: Flatness, held: dict[str, Tensor]
) -> Arrays:
    """Measure how flat the minimum is (figures 6 and E1 to E5); the network stays as it is.

    Args:
        model: The network.
        test: The test images.
        flatness: How many images, eigenvalues, directions and steps.
        held: Parameter name -> bool tensor, True where pruning holds it at zero.

    Returns:
        eigenvalues (k,) by magnitude and noise, Tr(C), on the first test images; epsilons (E,);
        losses and accuracies (D, E) along the eigenvectors of the D algebraically largest
        eigenvalues, on the test set (arXiv 1906.03728, section 3 and appendix E).
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
    """Return the L2 distance of all parameters from initial ones, relative to the norm of these."""
    start = {name: parameter.cpu().double() for name, parameter in initial.named_parameters()}
    moved = torch.zeros((), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        moved += (parameter.cpu().double() - start[name]).square().sum()
    norm = sum(parameter.square().sum() for parameter in start.values())
    return float((moved / norm).sqrt())


class Replica:
    """A second network that takes over a run's state, to measure it without touching the run.

    Network and pruner are built anew. A deep copy would share the run's hooks, and through them
    its counters, scores and noise. As for a checkpoint, a network may keep state in parameters and
    buffers only.

    Args:
        model: A new network on the run's device.
        pruner: Its pruner.
        loop: The run's, for its precision.
        size: Images of a batch of evaluation.
    """

    def __init__(self, model: nn.Module, pruner: Any, loop: PlainLoop, size: int) -> None:
        self.model, self.pruner = model, pruner
        self.loop, self.size = loop, size

    @torch.no_grad()
    def load(self, model: nn.Module, pruner: Any) -> None:
        """Take over the state of the run's network and pruner."""
        self.pruner.load_state_dict(pruner.state_dict())  # first: it may add buffers
        state = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            tensor.copy_(state[name])

    def loss(self, train: Batches) -> Totals:
        """Return the loss on the first `LOSS_IMAGES` training images, without augmentation."""
        images, labels = train.first(LOSS_IMAGES)
        with self._measuring():
            batches = zip(images.split(self.size), labels.split(self.size), strict=True)
            return evaluate(self.model, batches, self.loop.autocast)

    def recalibrated(self, train: Batches, test: Batches) -> Totals:
        """Return the test accuracy with batch norm's running statistics taken anew.

        They are taken from the first `RECALIBRATION_IMAGES` training images, without augmentation,
        and replace the replica's. A last batch of one image is left out, because some batch norms
        cannot train on it. NaN without batch norm.
        """
        if not batch_norms(self.model):
            return Totals(math.nan, math.nan, 1)
        images, _ = train.first(RECALIBRATION_IMAGES)
        batches = list(images.split(RECALIBRATION_BATCH))
        if len(batches) > 1 and len(batches[-1]) == 1:
            batches.pop()
        with self._measuring():
            recalibrate(self.model, batches, self.loop.autocast)
            return evaluate(self.model, test.evaluation(self.size), self.loop.autocast)

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        paused = self.pruner.paused() if isinstance(self.pruner, FilterNoise) else nullcontext()
        with paused, self.loop.kernels(self.model):
            yield
