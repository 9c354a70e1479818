"""The training loop: a step, an epoch of steps, an evaluation.

This is the plain reference. The faster loops of `extras.fast` are tested against it.
"""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from paperlib.batches import Batches
from paperlib.pruning import Pruner

T = TypeVar("T")
Precision = Callable[[], AbstractContextManager]  # that of a pass; see `devices.autocast`


@dataclass
class Totals:
    """Sums over a pass of images, kept on their device; reading them waits for the device."""

    loss: Tensor | float = 0.0
    correct: Tensor | float = 0.0
    images: int = 0

    def add(self, loss: Tensor, correct: Tensor, images: int) -> None:
        """Add those of a batch."""
        self.loss += loss
        self.correct += correct
        self.images += images

    def read(self) -> tuple[float, float]:
        """Return the mean loss, and the accuracy in percent."""
        return float(self.loss) / self.images, 100 * float(self.correct) / self.images


def logits_of(output: object, images: int) -> Tensor:
    """Return the logits (N, classes) of a network's output for N images.

    The output is a tensor, or has `logits` as an object or a dict.

    Raises:
        ValueError: There are none.
    """
    found = output.get("logits") if isinstance(output, Mapping) else output
    found = getattr(found, "logits", found)
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != images:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(output).__name__
        raise ValueError(
            f"a network must return logits ({images}, classes), alone or as `logits` of an object "
            f"or dict, and this one returns {shape}"
        )
    return found


def score(model: nn.Module, autocast: Precision, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of a batch's losses, and the number of images classified correctly."""
    with autocast():
        found = logits_of(model(x), len(x)).float()
        return F.cross_entropy(found, y, reduction="sum"), (found.argmax(1) == y).sum()


def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], autocast: Precision
) -> Totals:
    """Test on batches (x, y) in evaluation mode, then return to training mode."""
    model.eval()
    totals = Totals()
    with torch.inference_mode():
        for x, y in batches:
            totals.add(*score(model, autocast, x, y), len(y))
    model.train()
    return totals


def recalibrate(model: nn.Module, batches: Iterable[Tensor], autocast: Precision) -> None:
    """Set the running statistics of all batch norms to their mean over batches of images.

    Everything else is in evaluation mode, so nothing is random.

    Args:
        model: The network. Afterwards it is in evaluation mode and its momenta have changed.
        batches: Images, each (B, C, H, W).
        autocast: The precision of the passes.
    """
    model.eval()
    for norm in batch_norms(model):
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.inference_mode():
        for x in batches:
            with autocast():
                model(x)
    model.eval()


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return all batch norms of a network that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def finish(steps: Generator[Any, None, T]) -> T:
    """Exhaust a generator, and return its value."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class PlainLoop:
    """Train and test a network, step by step.

    Attributes:
        draws: The network may draw from torch's global generators.
    """

    draws = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        pruner: Pruner | None,
        autocast: Precision,
    ) -> None:
        self.model, self.optimizer, self.autocast = model, optimizer, autocast
        self.pruner = pruner or Pruner()

    def kernels(self, model: nn.Module) -> AbstractContextManager:
        """Return the context in which a network is trained and evaluated."""
        return nullcontext()

    def hold(self) -> None:
        """Set pruned weights to zero again, after a step of the optimizer."""
        self.pruner.hold()

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Take one training step on images (B, C, H, W) and labels (B,).

        Returns:
            The sum of the losses, and the number of images classified correctly.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            found = logits_of(self.model(x), len(x))
            loss = F.cross_entropy(found, y)
        loss.backward()
        self.optimizer.step()
        self.hold()
        return loss.detach() * len(y), (found.detach().argmax(1) == y).sum()

    def launch(
        self, batches: Batches, order: torch.Generator, augment: torch.Generator
    ) -> Generator[str | None, None, Totals]:
        """Train on all images once; nothing in it waits for the device.

        Args:
            batches: The training images.
            order: A CPU generator, for the order of the images.
            augment: A CPU generator, for their augmentation.

        Yields:
            Where other runs may launch work: here, nowhere.
        """
        yield from ()
        self.model.train()
        totals = Totals()
        with self.kernels(self.model):
            for x, y in batches.epoch(order, augment):
                totals.add(*self.step(x, y), len(y))
        return totals

    def evaluate(self, batches: Batches, size: int) -> Totals:
        """Test on all images, in batches of `size`."""
        with self.kernels(self.model):
            return evaluate(self.model, batches.evaluation(size), self.autocast)
