"""The mean cross-entropy of a network as a function of its weights, and its derivatives.

`flatness` measures this function: in evaluation mode, in float32 or float64, without randomness. A
network for which it is not such a function, or whose derivatives by autograd are not those of the
loss, is refused by a ValueError before any long work.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from paperlib import devices
from paperlib.loop import logits_of

log = logging.getLogger(__name__)

PROBED = 2  # images that derivatives are checked on
STEPS = (1e-8, 1e-9, 1e-10)  # relative steps of finite differences, in float64
AGREEMENT = 1e-3  # largest relative difference between two ways to a derivative

Held = Mapping[str, Tensor]
Weights = Mapping[str, Tensor]
T = TypeVar("T")


class Loss:
    """The mean cross-entropy of a network over some images, as a function of its weights.

    Attributes:
        model: The network. It is called with other weights and buffers; its own are not touched.
        weights: The parameters by name, detached, all of one precision, float32 at least. A tied
            parameter counts once, by its first name, as in `named_parameters`.
        buffers: The buffers by name. Every call gets a fresh copy of them.
        held: Parameter name -> bool tensor, True where pruning holds the parameter at zero.
        images: (N, ...) floats, on the network's device.
        labels: (N,) integers.
        chunk: Images that go through the network at once; by default 64 on the CPU, where larger
            ones leave the caches, and 512 elsewhere.
        size: P, how many numbers the parameters are, held or not.
        free: Indices of the coordinates that are not held, or None where none is held.

    Raises:
        ValueError: Bad input; or a network that is random in evaluation mode, computes in low
            precision, or mixes the images of a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        held: Held | None = None,
        chunk: int | None = None,
    ) -> None:
        if not len(images) or labels.shape != (len(images),):
            raise ValueError(f"{len(images)} images, but labels of shape {tuple(labels.shape)}")
        if not images.is_floating_point() or labels.is_floating_point():
            raise ValueError(
                f"images must be floats and labels integers, got {images.dtype} and {labels.dtype}"
            )
        self.model, self.name = model, type(model).__name__
        self.weights, self.buffers = _in_full_precision(model)
        self.held = _checked_held(self.weights, held or {})
        self.like = next(iter(self.weights.values()))
        self.images, self.labels = images.to(self.like), labels.to(self.like.device, torch.long)
        self.chunk = chunk or (64 if self.like.device.type == "cpu" else 512)
        self.size = sum(w.numel() for w in self.weights.values())
        self.free: Tensor | None = None
        if any(mask.any() for mask in self.held.values()):
            none = {n: torch.zeros_like(w, dtype=torch.bool) for n, w in self.weights.items()}
            masks = [mask.flatten() for mask in (none | self.held).values()]
            self.free = (~torch.cat(masks)).nonzero().flatten()
        self._check()

    @property
    def pieces(self) -> list[tuple[Tensor, Tensor]]:
        """Images and labels, by chunks."""
        chunks = self.images.split(self.chunk), self.labels.split(self.chunk)
        return list(zip(*chunks, strict=True))

    def moved(self, step: Tensor) -> dict[str, Tensor]:
        """Return the weights after a step (P,)."""
        steps = zip(self.weights.items(), self.split(step), strict=True)
        return {name: w + by for (name, w), by in steps}

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return a vector (P,) as tensors of the parameters' shapes."""
        pieces = flat.split([w.numel() for w in self.weights.values()])
        return [p.view(w.shape) for p, w in zip(pieces, self.weights.values(), strict=True)]

    def within(self, weights: Weights, function: Callable[[], T]) -> T:
        """Return function() while the network has these weights, and a fresh copy of its buffers.

        A checkpointed part runs again in a backward pass, so that also takes place in here.
        """
        buffers = {name: b.clone() for name, b in self.buffers.items()}
        tensors = {f"model.{name}": t for name, t in (dict(weights) | buffers).items()}
        return functional_call(_Within(self.model), tensors, (function,))

    def logits(self, weights: Weights, images: Tensor) -> Tensor:
        """Return the network's logits (N, classes) at these weights."""
        return self.within(weights, lambda: logits_of(self.model(images), len(images)))

    def total(self, weights: Weights, images: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of these images' cross-entropies at these weights."""
        return F.cross_entropy(self.logits(weights, images), labels, reduction="sum")

    def evaluate(self, weights: Weights) -> tuple[float, float]:
        """Return the mean loss, and the accuracy in percent, at these weights."""
        loss = correct = 0.0
        with self.measuring(), torch.no_grad():
            for x, y in self.pieces:
                logits = self.logits(weights, x)
                loss += float(F.cross_entropy(logits, y, reduction="sum"))
                correct += float((logits.argmax(1) == y).sum())
        return loss / len(self.labels), 100 * correct / len(self.labels)

    def gradients(
        self,
        weights: Weights,
        images: Tensor,
        labels: Tensor,
        graph: bool = False,
        over: int = 1,
    ) -> tuple[Tensor, ...]:
        """Return the gradient of these images' total loss, divided by `over`, a tensor a parameter.

        The weights require gradients. With `graph` the gradient can be differentiated again.
        """

        def compute() -> tuple[Tensor, ...]:
            total, leaves = self.total(weights, images, labels) / over, list(weights.values())
            return torch.autograd.grad(total, leaves, create_graph=graph, materialize_grads=True)

        return self.within(weights, compute)

    def products(
        self, weights: Weights, gradients: Sequence[Tensor], direction: Tensor, keep: bool = False
    ) -> Tensor:
        """Return the derivative (P,) of gradient-dot-direction, from `gradients` with a graph.

        Args:
            weights: Those of the gradient.
            gradients: See the method.
            direction: (P,).
            keep: Whether to keep the graph.
        """
        pairs = zip(gradients, self.split(direction), strict=True)
        curved = [(g, v) for g, v in pairs if g.requires_grad]
        compute = partial(
            torch.autograd.grad,
            [g for g, _ in curved],
            list(weights.values()),
            [v for _, v in curved],
            retain_graph=keep,
            materialize_grads=True,
        )
        return torch.cat([p.flatten() for p in self.within(weights, compute)])

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Compute in evaluation mode and full float32, by repeatable kernels with derivatives.

        Attention is computed by the plain kernel: the other ones have no second derivative. All is
        as it was afterwards.
        """
        modes = {module: module.training for module in self.model.modules()}
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(self.like.device.type, enabled=False))
            stack.enter_context(
                devices.switched(torch.backends.cudnn, benchmark=False, deterministic=True)
            )
            stack.enter_context(devices.full_float32())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            fast = torch.backends.mha.get_fastpath_enabled()
            stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
            torch.backends.mha.set_fastpath_enabled(False)
            stack.callback(lambda: [setattr(m, "training", mode) for m, mode in modes.items()])
            self.model.eval()
            yield

    def few(self) -> "Loss":
        """Return the loss of the first `PROBED` images alone."""
        few = copy.copy(self)
        few.images, few.labels = self.images[:PROBED], self.labels[:PROBED]
        return few

    def _check(self) -> None:
        """Raise ValueError unless the network is a function of each image, and labels classes."""
        x, _ = self.pieces[0]
        with self.measuring(), torch.no_grad():
            with _FullPrecision():
                logits = self.logits(self.weights, x)
            again, alone = self.logits(self.weights, x), self.logits(self.weights, x[:2])
        last = logits.shape[1] - 1
        if self.labels.min() < 0 or self.labels.max() > last:
            raise ValueError(
                f"labels must be within 0 and {last}, "
                f"got {int(self.labels.min())} to {int(self.labels.max())}"
            )
        if not logits.isfinite().all():
            raise ValueError(f"the logits of {self.name} are not all finite")
        size = float(logits.abs().max())
        if not torch.allclose(logits, again, rtol=0, atol=1e-5 * size):
            raise ValueError(
                f"{self.name} is random in evaluation mode: two passes of the same images differ "
                "(functional dropout needs training=self.training)"
            )
        if not torch.allclose(logits[:2], alone, rtol=0, atol=1e-3 * size):
            raise ValueError(
                f"{self.name} mixes the images of a batch in evaluation mode: the logits of an "
                "image depend on the others (batch norm needs track_running_stats=True)"
            )

    def check_derivatives(self, order: int) -> None:
        """Check on two images that u.Hv = v.Hu, and derivatives against finite differences.

        Differences are taken in float64; in float32 they are too coarse beside the kinks of ReLU.
        For a network that cannot compute in float64 a warning is logged instead. Derivatives are
        wrong where a custom autograd function has a wrong backward, or none that can be
        differentiated again, and where a part of the network runs without gradients.

        Args:
            order: 1 checks the gradient; 2 checks the Hessian, too.

        Raises:
            ValueError: The network cannot be differentiated, or autograd's derivatives are not
                those of the loss.
        """
        few, chance = self.few(), torch.Generator().manual_seed(0)
        with self.measuring():
            u, v = _direction(few, chance), _direction(few, chance)
            try:
                (_, _, hu), (_, _, hv) = _along(few, u, 0, order), _along(few, v, 0, order)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                often = "once" if order == 1 else "twice"
                message = f"{self.name} cannot be differentiated {often}: {error}"
                raise ValueError(message) from error
            right = _agree(u @ hv, v @ hu, (u * hv).norm())
            wide = _in_float64(few)
            try:
                wide.evaluate(wide.weights)
            except Exception as error:  # of any kind: the network's own code runs
                log.warning("derivatives of %s are not checked by differences: %s", few.name, error)
            else:
                # A kink within the step spoils a comparison, but not every time.
                right &= any(_match(wide, _direction(wide, chance), s, order) for s in STEPS)
        if not right:
            raise ValueError(
                f"the derivatives that autograd gives for {self.name} disagree with its loss or "
                "each other: a custom autograd function may have a wrong backward, or a part may "
                "run without gradients (torch.no_grad, detach). Parameters that are no coordinates "
                "belong in `held`"
            )


class _Within(nn.Module):
    """Calls a function while `functional_call` has exchanged the tensors of a network."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], T]) -> T:
        return function()


class _FullPrecision(TorchFunctionMode):
    """Refuses a network that computes in lower precision than float32, where it does."""

    def __torch_function__(
        self, function: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and out.dtype.itemsize < 4:
            raise ValueError(
                f"the network computes in {out.dtype} ({function.__name__}): the measures need "
                "float32, so take conversions and autocast out of its forward"
            )
        return out


def _in_full_precision(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return parameters and buffers by name, detached, in float32 at least.

    Those that need no conversion share the model's memory.
    """
    parameters = dict(model.named_parameters())
    kinds = {p.dtype for p in parameters.values()}
    if not kinds or not all(kind.is_floating_point for kind in kinds):
        raise ValueError(f"the parameters of the network must be real floats, got {kinds or None}")
    dtype = torch.float64 if torch.float64 in kinds else torch.float32
    buffers = {
        name: b.to(dtype) if b.is_floating_point() and b.dtype.itemsize < dtype.itemsize else b
        for name, b in model.named_buffers()
    }
    return {name: p.detach().to(dtype) for name, p in parameters.items()}, buffers


def _checked_held(weights: Weights, held: Held) -> dict[str, Tensor]:
    """Return `held` on the weights' device, or raise ValueError."""
    for name, mask in held.items():
        if name not in weights:
            raise ValueError(f"held: the model has no parameter {name!r}")
        if mask.shape != weights[name].shape or mask.dtype != torch.bool:
            raise ValueError(
                f"held[{name!r}] must be bool of shape {tuple(weights[name].shape)}, "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )
    return {name: mask.to(weights[name].device) for name, mask in held.items()}


def _in_float64(loss: Loss) -> Loss:
    """Return the same loss with weights, buffers and images in float64."""
    wide = copy.copy(loss)
    wide.weights = {name: w.double() for name, w in loss.weights.items()}
    wide.buffers = {
        name: b.double() if b.is_floating_point() else b for name, b in loss.buffers.items()
    }
    wide.images = loss.images.double()
    return wide


def _direction(loss: Loss, chance: torch.Generator) -> Tensor:
    """Return a random relative change (P,) of the weights, so that pruned weights stay zero."""
    steps = []
    for name, w in loss.weights.items():
        step = w * torch.randn(w.shape, generator=chance, device="cpu").to(w)
        steps.append(step.masked_fill(loss.held[name], 0) if name in loss.held else step)
    return torch.cat([step.flatten() for step in steps])


def _along(loss: Loss, direction: Tensor, step: float, order: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the total loss at w + step * direction, its gradient (P,) and H * direction (P,).

    The last is zero where order is 1.
    """
    weights = {n: w.requires_grad_() for n, w in loss.moved(step * direction).items()}
    gradients = loss.gradients(weights, loss.images, loss.labels, graph=order == 2)
    gradient = torch.cat([g.flatten() for g in gradients])
    curvature = torch.zeros_like(gradient)
    if order == 2:
        curvature = loss.products(weights, gradients, direction)
    with torch.no_grad():
        value = loss.total(weights, loss.images, loss.labels)
    return value, gradient.detach(), curvature


def _match(loss: Loss, direction: Tensor, step: float, order: int) -> bool:
    """Return whether derivatives along a direction are those of central differences."""
    _, gradient, curvature = _along(loss, direction, 0, order)
    up, gradient_up, _ = _along(loss, direction, step, 1)
    down, gradient_down, _ = _along(loss, direction, -step, 1)
    slope, terms = gradient @ direction, (gradient * direction).norm()
    right = _agree((up - down) / (2 * step), slope, terms)
    if order == 1 or not right:
        return right
    return _agree((gradient_up - gradient_down) / (2 * step), curvature, 1e-4 * gradient.norm())


def _agree(a: Tensor, b: Tensor, terms: Tensor) -> bool:
    """Return whether a = b, but for a small part of their size or that of the terms they sum."""
    return bool((a - b).norm() <= AGREEMENT * torch.stack([a.norm(), b.norm(), terms]).max())
