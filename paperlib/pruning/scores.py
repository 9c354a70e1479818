"""Schedules, scores and targets: the filters or weights that an event prunes."""

import math
import operator
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from paperlib.pruning.layers import PrunableLayer, PruningError

SCORES = ("l2", "l1", "ebn", "ebn_signed", "activation")
TARGETS = ("smallest", "largest", "random")
SCHEDULES = ("linear", "annealing")
OBSERVE_EVERY = 10
OBSERVE_DECAY = 0.9


# Schedules


def kept_filters(filters: int, fraction: float, event: int, events: int) -> int:
    """Return how many of `filters` are kept after `event` (1-based) of `events`.

    Each event prunes the same number but for rounding. The number kept is rounded up (arXiv
    1906.03728).

    Raises:
        PruningError: `fraction` is not in [0, 1), or there is no such event.
    """
    check_fraction(fraction)
    event, events = whole(event, "event"), whole(events, "events")
    if not 1 <= event <= events:
        raise PruningError(f"event must be from 1 to {events}, got {event}")
    final = _final(filters, fraction)
    return final - (filters - final) * (event - events) // events


def kept_weights(
    weights: int, fraction: float, event: int, events: int, schedule: str = "linear", mu: float = 0
) -> int:
    """Return how many of `weights` are kept after `event` (1-based) of `events`.

    Args:
        weights: How many weights there are.
        fraction: The share that is pruned after the last event, in [0, 1).
        event: Which event, from 1.
        events: How many events there are.
        schedule: "linear", as in `kept_filters`, or "annealing", as in Feature Selection with
            Annealing. Annealing is done after half the events.
        mu: For "annealing", at least 0. With a larger mu the first events prune more; mu = 0 is
            linear until half the events.

    Raises:
        PruningError: A value is outside its range.
    """
    if schedule not in SCHEDULES:
        raise PruningError(f"unknown schedule {schedule!r}: one of {', '.join(SCHEDULES)}")
    if mu < 0:
        raise PruningError(f"mu must be at least 0, got {mu}")
    linear = kept_filters(weights, fraction, event, events)
    if schedule == "linear":
        return linear
    final, event, events = _final(weights, fraction), int(event), int(events)
    share = max(0.0, (events - 2 * event) / (2 * event * mu + events))
    return math.ceil(round(final + (weights - final) * share, 6))


def check_fraction(fraction: float) -> None:
    """Raise PruningError unless a fraction to prune is a number in [0, 1)."""
    try:
        valid = 0 <= fraction < 1
    except (TypeError, ValueError, RuntimeError):
        valid = False
    if not valid:
        raise PruningError(f"a fraction to prune must be in [0, 1), got {fraction!r}")


def whole(number: int, what: str) -> int:
    """Return a whole number as an int; raise PruningError, which says what it is, for another."""
    try:
        return operator.index(number)
    except TypeError:
        raise PruningError(f"{what} must be a whole number, got {number!r}") from None


def _final(count: int, fraction: float) -> int:
    # Round first: (1 - 0.7) * 10 is 3.0000000000000004 in floating point, and must give 3.
    return math.ceil(round((1 - fraction) * count, 6))


# Scores


def expected_activation(gamma: Tensor, beta: Tensor, signed: bool = False) -> Tensor:
    """Return E[BN]: the expected value of relu(gamma * z + beta) for z standard normal.

    The formula is that of arXiv 1906.03728, appendix. The result is finite for finite input: it is
    relu(beta) at gamma = 0, and 0 where the probability to be positive is 0.

    Args:
        gamma: The scale of a batch norm, of any shape.
        beta: Its shift, of the same shape.
        signed: Use gamma with its sign in the formula, instead of its magnitude. Where gamma is
            negative, the result is then the expected value of min(gamma * z + beta, 0).

    Returns:
        A tensor of the same shape.
    """
    scale = gamma if signed else gamma.abs()
    alpha = -beta / torch.where(scale == 0, 1, scale)
    positive = 1 - torch.special.ndtr(alpha)
    density = torch.exp(-0.5 * alpha.square()) / math.sqrt(2 * math.pi)
    value = torch.where(positive == 0, 0, positive * beta + density * scale)
    return torch.where(scale == 0, beta.relu(), value)


def check_score(score: str | Callable, layers: Iterable[PrunableLayer]) -> None:
    """Raise PruningError if there is no such score, or it cannot be computed for a layer."""
    if callable(score):
        return
    if score not in SCORES:
        raise PruningError(f"unknown score {score!r}: one of {', '.join(SCORES)}, or a function")
    for layer in layers:
        norm = layer.norm
        scaled = isinstance(norm, _BatchNorm) and norm.weight is not None and norm.bias is not None
        why = None
        if score.startswith("ebn") and not scaled:
            why = "needs a batch norm with scale and shift after convolution {}, which has none"
        elif score == "activation" and layer.output is None:
            why = "cannot see the sum after {}: add with a paperlib.models.ResidualSum() of its own"
        elif score == "activation" and layer.uses > 1:
            why = f"needs a convolution that is called once a pass, and {{}} is called {layer.uses}"
        if why is not None:
            raise PruningError(f"score {score!r} {why.format(repr(layer.name))}")


@torch.no_grad()
def scores_of(
    layer: PrunableLayer, score: str | Callable, activation: "ActivationScore | None"
) -> Tensor:
    """Return the score of each filter of a layer, (filters,).

    Raises:
        PruningError: The user's function fails, or does not return real numbers.
    """
    if callable(score):
        try:
            return torch.as_tensor(score(layer.conv)).to_dense().to(layer.conv.weight.device)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:
            raise PruningError(f"the score of {layer.name!r} fails: {error}") from error
    if activation is not None:
        return activation.scores[layer.name]
    if score in ("l1", "l2"):
        return layer.conv.weight.flatten(1).norm(p=int(score[1]), dim=1)
    gamma, beta = layer.norm.weight.float().cpu(), layer.norm.bias.float().cpu()
    return expected_activation(gamma, beta, signed=score == "ebn_signed")


class ActivationScore:
    """A running mean of each filter's activity before ReLU (arXiv 1906.03728, section 4).

    The activity is the absolute output, summed over batch and pixels, of the layer's norm, or of
    the convolution if it has no norm, or of the sum with the shortcut at the end of a residual
    block. The mean starts at zero. On every tenth forward pass in training mode it becomes
    0.9 * old + 0.1 * new.

    The hooks on the layers refer to this object, and not to the pruner. So a deep copy of the
    network has a copy of this object, and leaves the original's scores alone.
    """

    def __init__(self, layers: Iterable[PrunableLayer]) -> None:
        self.passes = 0
        self.due = False
        self.scores: dict[str, Tensor] = {}
        self._unseen: set[str] = set()
        for layer in layers:
            self.scores[layer.name] = torch.zeros(
                layer.filters, device=layer.conv.weight.device, dtype=torch.float32
            )
            assert layer.output is not None
            layer.output.register_forward_hook(_Observer(self, layer.name))

    def before_pass(self, training: bool) -> None:
        """Count a forward pass; every tenth in training mode is due to be observed."""
        self.passes += training
        self.due = training and self.passes % OBSERVE_EVERY == 0
        self._unseen = set(self.scores) if self.due else set()

    @torch.no_grad()
    def observe(self, name: str, output: Tensor) -> None:
        """Update a layer's score by its output (images, filters, height, width), once a pass."""
        if name in self._unseen:
            self._unseen.discard(name)
            total = output.detach().float().abs().sum(dim=(0, 2, 3))
            self.scores[name].mul_(OBSERVE_DECAY).add_(total, alpha=1 - OBSERVE_DECAY)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the scores and the number of passes, as named tensors."""
        scores = {f"score.{name}": score for name, score in self.scores.items()}
        return scores | {"passes": torch.tensor(self.passes)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resume from a `state_dict`."""
        self.passes = int(state["passes"])
        for name, score in self.scores.items():
            score.copy_(state[f"score.{name}"])


class _Observer:
    """A forward hook that shows a module's output to an `ActivationScore`."""

    watches = True  # the hook changes nothing

    def __init__(self, activation: ActivationScore, name: str) -> None:
        self.activation, self.name = activation, name

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.activation.observe(self.name, output)


# Targets


def check_target(target: str, generator: torch.Generator | None = None) -> None:
    """Raise PruningError if there is no such target, or the generator is none of the CPU's."""
    if target not in TARGETS:
        raise PruningError(f"unknown target {target!r}: one of {', '.join(TARGETS)}")
    of_cpu = isinstance(generator, torch.Generator) and generator.device.type == "cpu"
    if generator is not None and not of_cpu:
        raise PruningError(f"generator must be a torch.Generator of the CPU, got {generator!r}")


def select(
    scores: Tensor | None,
    kept: Tensor,
    count: int,
    target: str,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the indices (count,) of the filters or weights that are pruned next.

    Args:
        scores: (n,), unused if target is "random".
        kept: (n,) bool, True for candidates.
        count: How many are pruned. Of equal scores, the first in position is pruned first.
        target: "smallest", "largest" or "random".
        generator: A CPU generator for "random".
    """
    candidates = kept.nonzero().squeeze(1)
    if target == "random":
        order = torch.randperm(len(candidates), generator=generator).to(candidates.device)
    else:
        assert scores is not None
        order = scores[candidates].sort(descending=target == "largest", stable=True).indices
    return candidates[order[:count]]
