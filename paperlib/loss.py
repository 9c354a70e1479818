"""The mean cross-entropy of a network as a function of its weights, and its derivatives.

`flatness` measures this function: in evaluation mode, in float32 or float64, without randomness. A
ValueError is raised before any long work if a network is not such a function, or if autograd does
not give the derivatives of its loss.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from numbers import Integral
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from paperlib import devices
from paperlib.loop import logits_of

log = logging.getLogger(__name__)

PROBED = 2  # images that derivatives are checked on
STEPS = (1e-8, 1e-9, 1e-6, 1e-5, 1e-4)  # relative steps of finite differences, in float64
COARSE = (1e-2, 1e-3)  # the same in float32
AGREEMENT = 1e-3  # largest relative difference between two computations of a derivative

Held = Mapping[str, Tensor]  # by name of parameter
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
        chunk: Images in one batch; by default 64 on the CPU, where larger ones leave the caches,
            and 512 elsewhere.
        size: P, the number of all parameters, held or not.
        free: (F,) indices of the coordinates that are not held.

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
        for name, value in (("images", images), ("labels", labels)):
            _require_tensor(name, value)
        shape, kinds = tuple(labels.shape), (images.dtype, labels.dtype)
        _require(
            len(images) > 0 and shape == (len(images),), f"{len(images)} images, labels {shape}"
        )
        numbers = images.is_floating_point() and not labels.is_floating_point()
        _require(numbers, f"images must be floats and labels integers, got {kinds}")
        self.model, self.name = model, type(model).__name__
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        types = {p.dtype for p in parameters.values()}
        real = bool(types) and all(each.is_floating_point for each in types)
        _require(real, f"the parameters of {self.name} must be real floats, got {types or None}")
        dtype = torch.float64 if torch.float64 in types else torch.float32
        self.weights = _raised(parameters, dtype)
        self.buffers = _raised(dict(model.named_buffers()), dtype)
        self.held = _checked_held(self.weights, held or {})
        self.like = next(iter(self.weights.values()))
        self.images, self.labels = images.to(self.like), labels.to(self.like.device, torch.long)
        whole = chunk is None or (isinstance(chunk, Integral) and chunk > 0)
        _require(whole, f"chunk must be a number of images or None, got {chunk!r}")
        self.chunk = int(chunk or (64 if self.like.device.type == "cpu" else 512))
        none = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in self.weights.items()}
        held_flat = torch.cat([mask.flatten() for mask in (none | self.held).values()])
        self.size, self.free = len(held_flat), (~held_flat).nonzero().flatten()
        self._check()

    @property
    def pieces(self) -> list[tuple[Tensor, Tensor]]:
        """The images and labels, in chunks."""
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

    def filled(self, vectors: Tensor) -> Tensor:
        """Return vectors (..., F) over the free coordinates as (..., P), zero elsewhere."""
        whole = vectors.new_zeros(*vectors.shape[:-1], self.size)
        return whole.index_copy_(-1, self.free, vectors)

    def picked(self, vectors: Tensor) -> Tensor:
        """Return the free coordinates (..., F) of vectors (..., P)."""
        return vectors[..., self.free]

    def within(self, weights: Weights, function: Callable[[], T]) -> T:
        """Return function() while the network has these weights, and a fresh copy of its buffers.

        A backward pass must also run in here, because it runs checkpointed parts again.
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

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Compute in evaluation mode and full float32, by repeatable kernels with derivatives.

        Afterwards all settings are as before.
        """
        contexts: list[AbstractContextManager] = [
            torch.enable_grad(),
            torch.autocast(self.like.device.type, enabled=False),
            devices.switched(torch.backends.cudnn, benchmark=False, deterministic=True),
            devices.full_float32(),
            devices.plain_attention(),
            *(devices.switched(module, training=False) for module in self.model.modules()),
        ]
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            yield

    def few(self, dtype: torch.dtype) -> "Loss":
        """Return the loss of the first `PROBED` images alone, in at least this precision."""
        few = copy.copy(self)
        few.weights, few.buffers = _raised(self.weights, dtype), _raised(self.buffers, dtype)
        few.images, few.labels = self.images[:PROBED].to(dtype), self.labels[:PROBED]
        return few

    def _check(self) -> None:
        """Raise ValueError unless logits depend on their image alone and labels are classes."""
        x, _ = self.pieces[0]
        with self.measuring(), torch.no_grad():
            with _FullPrecision():
                logits = self.logits(self.weights, x)
            again, alone = self.logits(self.weights, x), self.logits(self.weights, x[:2])
        last, least, most = logits.shape[1] - 1, int(self.labels.min()), int(self.labels.max())
        labelled = least >= 0 and most <= last
        _require(labelled, f"labels must be within 0 and {last}, got {least} to {most}")
        finite = bool(logits.isfinite().all())
        _require(finite, f"the logits of {self.name} are not all finite")
        check_repeatable(self.name, logits, again, alone)

    def check_derivatives(self, order: int) -> None:
        """Check on two images that u.Hv = v.Hu, and derivatives against finite differences.

        Differences are taken in float64. In float32 they are too coarse beside the kinks of ReLU.
        If a network cannot compute in float64, a warning is logged, and only its gradient is
        compared, with coarse differences. Derivatives are wrong if a custom autograd function has a
        wrong backward, or none that can be differentiated again, or if a part of the network runs
        without gradients.

        Args:
            order: 1 checks the gradient; 2 checks the Hessian, too.

        Raises:
            ValueError: The network cannot be differentiated, or autograd's derivatives are not
                those of the loss.
        """
        few, wide = self.few(self.like.dtype), self.few(torch.float64)
        with self.measuring():
            try:
                found = _along(few, 0.0, order)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                often = "once" if order == 1 else "twice"
                message = f"{self.name} cannot be differentiated {often}: {error}"
                raise ValueError(message) from error
            right = order == 1 or _close(found[4], found[5], math.sqrt(abs(found[3] * found[6])))
            try:
                wide.evaluate(wide.weights)
                # A kink within the step spoils a comparison, but not every time.
                matches = (_match(wide, step, order) for step in STEPS)
            except Exception as error:  # of any kind: the network's own code runs
                text = "%s does not compute in float64: its gradient is checked roughly (%s)"
                log.warning(text, self.name, error)
                matches = (_match(few, step, 1, 50 * AGREEMENT, 1e-2) for step in COARSE)
            computed = [n for n, module in self.model.named_modules() if is_parametrized(module)]
            also = f", or the parametrization of {', '.join(computed)}," if computed else ""
            _require(
                right and any(matches),
                f"the derivatives that autograd gives for {self.name} disagree with its loss or "
                f"each other: a custom autograd function{also} may have a wrong backward, or a "
                "part may run without gradients (torch.no_grad, detach). Parameters that are no "
                "coordinates belong in `held`",
            )


def check_repeatable(name: str, logits: Tensor, again: Tensor, alone: Tensor) -> None:
    """Raise ValueError unless a network's logits in evaluation mode depend on their image alone.

    Args:
        name: The network's name.
        logits: (N, classes), of one pass.
        again: (N, classes), of a second pass of the same images.
        alone: (2, classes), of a pass of the first two.
    """
    size = float(logits.abs().max())
    _require(
        torch.allclose(logits, again, rtol=0, atol=1e-5 * size),
        f"{name} is random in evaluation mode: two passes of the same images differ "
        "(functional dropout needs training=self.training)",
    )
    _require(
        torch.allclose(logits[:2], alone, rtol=0, atol=1e-3 * size),
        f"{name} mixes the images of a batch in evaluation mode: the logits of an "
        "image depend on the others (batch norm needs track_running_stats=True)",
    )


def _require(valid: bool, message: str) -> None:
    if not valid:
        raise ValueError(message)


def _require_tensor(name: str, value: object) -> None:
    _require(isinstance(value, Tensor), f"{name} must be a tensor, got {type(value).__name__}")


class _Within(nn.Module):
    """Calls a function while `functional_call` has exchanged the tensors of a network."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], T]) -> T:
        return function()


class _FullPrecision(TorchFunctionMode):
    """Raises ValueError at the operation where a network computes in less than float32."""

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


def _raised(tensors: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors, with floats of lower precision than `dtype` raised to it."""
    raised = {}
    for name, tensor in tensors.items():
        low = tensor.is_floating_point() and tensor.dtype.itemsize < dtype.itemsize
        raised[name] = tensor.to(dtype) if low else tensor
    return raised


def _checked_held(weights: Weights, held: Held) -> dict[str, Tensor]:
    """Return `held` on the weights' device, or raise ValueError."""
    kind = type(held).__name__
    _require(isinstance(held, Mapping), f"held must be masks as pruner.held() gives, got {kind}")
    for name, mask in held.items():
        _require_tensor(f"held[{name!r}]", mask)
        _require(name in weights, f"held: the model has no parameter {name!r}")
        shape, found = tuple(weights[name].shape), (mask.dtype, tuple(mask.shape))
        _require(found == (torch.bool, shape), f"held[{name!r}] must be bool {shape}, got {found}")
    return {name: mask.to(weights[name].device) for name, mask in held.items()}


def _match(
    loss: Loss, step: float, order: int, agreement: float = AGREEMENT, floor: float = 0.0
) -> bool:
    """Return whether derivatives along random directions agree with central differences."""
    seed = round(1 / step)
    down, up = (_along(loss, at, 1, seed) for at in (-step, step))
    here = _along(loss, 0.0, order, seed)
    right = _close((up[0] - down[0]) / (2 * step), here[1], floor, agreement)
    if order == 1 or not right:
        return right
    return _close((up[1] - down[1]) / (2 * step), here[3], 1e-4 * abs(here[1]))


def _close(a: float, b: float, scale: float, agreement: float = AGREEMENT) -> bool:
    return abs(a - b) <= agreement * max(abs(a), abs(b), scale)


def _along(loss: Loss, step: float, order: int, seed: int = 0) -> list[float]:
    """Return the total loss at w + step * u, g.u and g.v; for order 2 also uHu, uHv, vHu, vHv.

    u and v are random relative changes of the weights, so that pruned weights stay zero.
    """
    flat = torch.cat([w.flatten() for w in loss.weights.values()])
    flat, chance = loss.filled(loss.picked(flat)), torch.Generator().manual_seed(seed)
    u, v = (flat * torch.randn(len(flat), generator=chance).to(flat) for _ in range(2))
    s, t = (torch.full_like(flat[0], at, requires_grad=True) for at in (step, 0.0))
    weights = loss.moved(s * u + t * v)

    def compute() -> list[float]:
        value = loss.total(weights, loss.images, loss.labels)
        found = list(torch.autograd.grad(value, (s, t), create_graph=order == 2))
        if order == 2:
            for slope in found[:]:
                found += torch.autograd.grad(slope, (s, t), retain_graph=True)
        return [float(x.detach()) for x in (value, *found)]

    return loss.within(weights, compute)
