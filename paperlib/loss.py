"""The mean cross-entropy of a network as a function of its weights.

`flatness` measures this function: in evaluation mode, in float32 or float64, without randomness. A
network for which it is not such a function is refused by a ValueError before any long work.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from paperlib import devices

Held = Mapping[str, Tensor]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Loss:
    """The mean cross-entropy of a network over some images, as a function of its weights.

    Attributes:
        model: The network. It is called with other weights and buffers; its own are not touched.
        weights: The parameters by name, detached, all of one precision. A tied parameter counts
            once, by its first name, as in `named_parameters`.
        buffers: The buffers by name. Every call gets a fresh copy of them.
        held: Parameter name -> bool tensor, True where pruning holds the parameter at zero.
        images: (N, ...) floats.
        labels: (N,) integers.
        chunk: Images that go through the network at once.
    """

    model: nn.Module
    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    held: dict[str, Tensor]
    images: Tensor
    labels: Tensor
    chunk: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        held: Held | None = None,
        chunk: int | None = None,
    ) -> "Loss":
        """Make the loss of a network, after the checks that need no gradients.

        Parameters of lower precision than float32 are converted, and the network computes in
        float32. Images and labels are moved to the network's device. `chunk` is by default 64 on
        the CPU, where larger ones leave the caches, and 512 elsewhere.

        Raises:
            ValueError: Bad input; or a network that is random in evaluation mode, computes in low
                precision, or mixes the images of a batch.
        """
        weights, buffers = _in_full_precision(model)
        _check_data(images, labels, chunk)
        like = next(iter(weights.values()))
        loss = cls(
            model,
            weights,
            buffers,
            _checked_held(weights, held),
            images.to(like),
            labels.to(like.device, torch.long),
            chunk or (64 if like.device.type == "cpu" else 512),
        )
        _check_function(loss)
        check_finite(loss.evaluate(weights)[0])
        return loss

    @property
    def name(self) -> str:
        """The network's class, for messages."""
        return type(self.model).__name__

    @property
    def size(self) -> int:
        """P, how many numbers the parameters are, held or not."""
        return sum(w.numel() for w in self.weights.values())

    @property
    def free(self) -> Tensor | None:
        """Indices of the coordinates that are not held, or None where none is held."""
        if not any(mask.any() for mask in self.held.values()):
            return None
        masks = [
            self.held.get(name, torch.zeros_like(w, dtype=torch.bool)).flatten()
            for name, w in self.weights.items()
        ]
        return (~torch.cat(masks)).nonzero().flatten()

    @property
    def pieces(self) -> list[tuple[Tensor, Tensor]]:
        """Images and labels, by chunks."""
        chunks = self.images.split(self.chunk), self.labels.split(self.chunk)
        return list(zip(*chunks, strict=True))

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return a vector (P,) as tensors of the parameters' shapes."""
        pieces = flat.split([w.numel() for w in self.weights.values()])
        return [p.view(w.shape) for p, w in zip(pieces, self.weights.values(), strict=True)]

    def within(self, weights: dict[str, Tensor], function: Callable[[], T]) -> T:
        """Return function() while the network has these weights, and a fresh copy of its buffers.

        A checkpointed part runs again in a backward pass, so that also takes place in here.
        """
        buffers = {name: b.clone() for name, b in self.buffers.items()}
        tensors = {f"model.{name}": t for name, t in (weights | buffers).items()}
        return functional_call(_Within(self.model), tensors, (function,))

    def logits(self, weights: dict[str, Tensor], images: Tensor) -> Tensor:
        """Return the network's logits (N, classes) at these weights."""
        return _logits(self.within(weights, lambda: self.model(images)), len(images))

    def total(self, weights: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of these images' cross-entropies at these weights."""
        return F.cross_entropy(self.logits(weights, images), labels, reduction="sum")

    def evaluate(self, weights: dict[str, Tensor]) -> tuple[float, float]:
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

        Nothing is compiled, and attention is computed by the plain kernel: compiled code and the
        other kernels have no second derivative. All is as it was afterwards.
        """
        modes = {module: module.training for module in self.model.modules()}
        device = next(iter(self.weights.values())).device.type
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(device, enabled=False))
            stack.enter_context(
                devices.switched(torch.backends.cudnn, benchmark=False, deterministic=True)
            )
            stack.enter_context(devices.full_float32())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            fast = torch.backends.mha.get_fastpath_enabled()
            stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
            torch.backends.mha.set_fastpath_enabled(False)
            if "torch._dynamo" in sys.modules:  # else nothing is compiled; it is slow to import
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.callback(lambda: [setattr(m, "training", mode) for m, mode in modes.items()])
            self.model.eval()
            yield


class _Within(nn.Module):
    """Calls a function while `functional_call` has exchanged the tensors of a network."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], T]) -> T:
        return function()


def check_finite(loss: float | Tensor) -> None:
    """Raise ValueError where the loss is infinite or not a number."""
    if not math.isfinite(loss):
        raise ValueError(f"the loss is not finite: {float(loss)}")


class _FullPrecision(TorchFunctionMode):
    """Refuses a network that computes in lower precision than float32, where it does."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and out.dtype.itemsize < 4:
            raise ValueError(
                f"the network computes in {out.dtype} ({function.__name__}): the measures need "
                "float32, so take conversions and autocast out of its forward"
            )
        return out


def _logits(output: object, images: int) -> Tensor:
    """Return the logits (N, classes) of a network's output, or raise ValueError."""
    logits = output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif not isinstance(output, Tensor):
        logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            "the network must return logits (N, classes), alone or as `logits` of an object or "
            f"dict, got {type(output).__name__}"
        )
    if logits.dim() != 2 or len(logits) != images:
        raise ValueError(f"logits must be ({images}, classes), got {tuple(logits.shape)}")
    return logits


def _in_full_precision(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return parameters and buffers by name, detached, in float32 at least.

    Those that need no conversion share the model's memory.
    """
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ValueError("the model has no parameters")
    for name, p in parameters.items():
        if not p.is_floating_point():
            raise ValueError(f"parameters must be real floats, but {name!r} is {p.dtype}")
    devices = {str(p.device) for p in parameters.values()}
    if len(devices) > 1:
        raise ValueError(f"parameters must be on one device, got {sorted(devices)}")
    double = any(p.dtype == torch.float64 for p in parameters.values())
    dtype = torch.float64 if double else torch.float32
    buffers = {
        name: b.to(dtype) if b.is_floating_point() and b.dtype.itemsize < dtype.itemsize else b
        for name, b in model.named_buffers()
    }
    return {name: p.detach().to(dtype) for name, p in parameters.items()}, buffers


def _check_data(images: Tensor, labels: Tensor, chunk: int | None) -> None:
    """Raise ValueError unless these are float images, a label each, and a chunk size."""
    if len(images) == 0:
        raise ValueError("no images")
    if labels.shape != (len(images),):
        raise ValueError(f"{len(images)} images, but labels of shape {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floats, normalised, got {images.dtype}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")


def _checked_held(weights: dict[str, Tensor], held: Held | None) -> dict[str, Tensor]:
    """Return `held` on the weights' device, or raise ValueError."""
    for name, mask in (held or {}).items():
        if name not in weights:
            raise ValueError(f"held: the model has no parameter {name!r}")
        if mask.shape != weights[name].shape or mask.dtype != torch.bool:
            raise ValueError(
                f"held[{name!r}] must be bool of shape {tuple(weights[name].shape)}, "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )
    return {name: mask.to(weights[name].device) for name, mask in (held or {}).items()}


def _check_function(loss: Loss) -> None:
    """Raise ValueError unless the network is a function of each image, and labels are classes."""
    x, y = loss.pieces[0]
    devices = [x.device] if x.device.type == "cuda" else []
    with loss.measuring(), torch.no_grad(), torch.random.fork_rng(devices):
        before = _random_states(devices)
        try:
            with _FullPrecision():
                logits = loss.logits(loss.weights, x)
        except RuntimeError as error:
            low = {str(p.dtype) for p in loss.model.parameters() if p.dtype.itemsize < 4}
            if not low or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"{loss.name} has weights in {', '.join(low)} and cannot compute in float32, in "
                f"which they are measured: {error}"
            ) from error
        again = loss.logits(loss.weights, x)
        after = _random_states(devices)
        alone = loss.logits(loss.weights, x[:2])
    classes = logits.shape[1]
    if loss.labels.min() < 0 or loss.labels.max() >= classes:
        raise ValueError(
            f"labels must be within 0 and {classes - 1}, "
            f"got {int(loss.labels.min())} to {int(loss.labels.max())}"
        )
    check_finite(F.cross_entropy(logits, y))
    drawn = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    size = float(logits.abs().max())
    if drawn or not torch.allclose(logits, again, rtol=0, atol=1e-5 * size):
        raise ValueError(
            f"{loss.name} is random in evaluation mode: two passes of the same images differ "
            "or draw random numbers (functional dropout needs training=self.training)"
        )
    if not torch.allclose(logits[:2], alone, rtol=0, atol=1e-3 * size):
        raise ValueError(
            f"{loss.name} mixes the images of a batch in evaluation mode: the logits of an "
            "image depend on the others (batch norm needs track_running_stats=True)"
        )


def _random_states(devices: list[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]
