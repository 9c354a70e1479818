"""The training loop itself: a step, an epoch of steps, an evaluation. The plain reference.

`QuickLoop` does the same faster on a CPU, `graphs.CapturedLoop` on a GPU; both are checked against
this.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperlib import convolutions
from paperlib.data import Batches
from paperlib.pruning import Pruner


@dataclass
class Totals:
    """Sums over a pass of images, on their device: to read them is to wait for it."""

    loss: Tensor
    correct: Tensor
    images: int

    def read(self) -> tuple[float, float]:
        """Mean loss, and accuracy in percent."""
        return float(self.loss) / self.images, 100 * float(self.correct) / self.images


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    hold: Callable[[], None],
    autocast: Callable[[], AbstractContextManager],
    x: Tensor,
    y: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step on a batch; returns the sum of its losses, and how many it classified correctly.

    hold: called after the optimizer, to keep zero what is pruned.
    """
    optimizer.zero_grad(set_to_none=True)
    with autocast():
        logits = model(x)
        loss = F.cross_entropy(logits, y)
    loss.backward()
    optimizer.step()
    hold()
    return loss.detach() * len(y), (logits.detach().argmax(1) == y).sum()


def score(
    model: nn.Module, autocast: Callable[[], AbstractContextManager], x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """As `step`, of a batch that is only looked at."""
    with autocast():
        logits = model(x).float()
        return F.cross_entropy(logits, y, reduction="sum"), (logits.argmax(1) == y).sum()


def train_epoch(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    hold: Callable[[], None],
    autocast: Callable[[], AbstractContextManager],
    order: torch.Generator,
    augment: torch.Generator,
) -> Totals:
    """One pass over the training images, in training mode; nothing in it waits for the device.

    order, augment: CPU generators, of the order of the images and of their augmentation.
    """
    model.train()
    totals = Totals(0.0, 0, 0)
    for x, y in batches.epoch(order, augment):
        loss, correct = step(model, optimizer, hold, autocast, x, y)
        totals.loss += loss
        totals.correct += correct
        totals.images += len(y)
    return totals


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: Callable[[], AbstractContextManager],
) -> Totals:
    """One pass over batches (x, y) in evaluation mode; the network is in training mode after it."""
    model.eval()
    totals = Totals(0.0, 0, 0)
    with torch.inference_mode():
        for x, y in batches:
            loss, correct = score(model, autocast, x, y)
            totals.loss += loss
            totals.correct += correct
            totals.images += len(y)
    model.train()
    return totals


def recalibrate(
    model: nn.Module,
    batches: Iterable[Tensor],
    autocast: Callable[[], AbstractContextManager],
) -> None:
    """Take the running statistics of all batch norms anew: their mean over batches of images.

    All else is in evaluation mode, so that nothing is random. This is PyTorch's cumulative average
    (`momentum=None`), which would wait for the device at every layer.

    Args:
        model: Its batch norms keep another momentum; its training mode is that of evaluation.
        batches: Images, each (B, C, H, W).
        autocast: The precision of the passes.
    """
    norms = batch_norms(model)
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    with torch.inference_mode():
        for i, x in enumerate(batches):
            for norm in norms:
                norm.momentum = 1 / (i + 1)
            with autocast():
                model(x)
    model.eval()


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """All batch norms of a network that keep running statistics."""
    kind = nn.modules.batchnorm._BatchNorm
    return [m for m in model.modules() if isinstance(m, kind) and m.running_mean is not None]


class PlainLoop:
    """A run's way to train and evaluate: by the functions above."""

    draws = True  # random numbers of torch's own, perhaps: of a network nothing else is known

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        pruner: Pruner | None,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        self.model, self.optimizer, self.autocast = model, optimizer, autocast
        self.pruner = pruner or Pruner()

    def train(self, batches: Batches, order: torch.Generator, augment: torch.Generator) -> Totals:
        """One pass over the training images."""
        return train_epoch(
            self.model, batches, self.optimizer, self.pruner.hold, self.autocast, order, augment
        )

    def launch(
        self, batches: Batches, order: torch.Generator, augment: torch.Generator
    ) -> Generator[None, None, Totals]:
        """`train`, which yields where another run may launch its steps: never, where it `draws`."""
        yield from ()
        return self.train(batches, order, augment)

    def evaluate(self, batches: Batches, size: int) -> Totals:
        """One pass over the test images, in batches of `size`."""
        return evaluate(self.model, batches.evaluation(size), self.autocast)


class QuickLoop(PlainLoop):
    """As `PlainLoop`, on a CPU with convolutions of few pixels as products of matrices."""

    def train(self, batches: Batches, order: torch.Generator, augment: torch.Generator) -> Totals:
        """One pass over the training images."""
        with convolutions.quick(self.model):
            return super().train(batches, order, augment)

    def evaluate(self, batches: Batches, size: int) -> Totals:
        """One pass over the test images, in batches of `size`."""
        with convolutions.quick(self.model):
            return super().evaluate(batches, size)
