"""A run's configuration: frozen data, and its identity, a hash of its canonical JSON.

Fields at their default are left out of the JSON, so that a field added later (with the default
that means "as before") changes no identity. All epochs are 0-based, all fractions in [0, 1).
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import PurePath
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the value and what is valid."""


def _check(valid: bool, message: str) -> None:
    if not valid:
        raise ConfigError(message)


def _check_fractions(fractions: tuple[float, ...]) -> None:
    _check(len(fractions) > 0, "pruning needs the fraction of at least one layer")
    for fraction in fractions:
        _check(0 <= fraction < 1, f"a fraction to prune must be in [0, 1), got {fraction}")


def _check_one_of(what: str, value: Any, valid: Iterable[str]) -> None:
    valid = tuple(valid)
    _check(value in valid, f"unknown {what} {value!r}: one of {', '.join(valid)}")


def schedule(first: int, last: int, period: int) -> tuple[int, ...]:
    """The epochs of one layer's events: every `period`-th from `first` to `last`, both included."""
    _check(
        0 <= first <= last, f"a schedule needs 0 <= first <= last, got first {first}, last {last}"
    )
    _check(period >= 1, f"a schedule's period must be at least 1 epoch, got {period}")
    return tuple(range(first, last + 1, period))


@dataclass(frozen=True)
class FilterPruning:
    """Whole filters are pruned (arXiv 1906.03728).

    fractions, epochs: one entry a layer; `epochs[i]` are the epochs at whose end layer i has an
    event. scratch: one event before any training instead (then `epochs` is empty). norm: batch
    norm's scale and shift of a pruned filter count as zero; False masks the weights only.
    score may be "package.module:function", a function of the convolution.
    """

    fractions: tuple[float, ...]
    epochs: tuple[tuple[int, ...], ...] = ()
    score: str = "l2"
    target: str = "smallest"
    layers: tuple[str, ...] | None = None
    scratch: bool = False
    norm: bool = True

    def __post_init__(self) -> None:
        _freeze(self)
        _check_fractions(self.fractions)
        if self.scratch:
            _check(not self.epochs, "scratch pruning happens before training: it takes no epochs")
        else:
            _check_event_epochs(self.epochs)
            _check(
                len(self.epochs) == len(self.fractions),
                f"{len(self.fractions)} fractions need as many schedules, got {len(self.epochs)}",
            )
        if self.layers is not None:
            _check(
                len(self.layers) == len(self.fractions),
                f"{len(self.fractions)} fractions for {len(self.layers)} layers",
            )

    @property
    def rate(self) -> float:
        """Iterative pruning rate in percent an event, of the layer that loses most (section 3)."""
        most = max(range(len(self.fractions)), key=lambda i: self.fractions[i])
        events = 1 if self.scratch else len(self.epochs[most])
        return 100 * self.fractions[most] / events


@dataclass(frozen=True)
class WeightPruning:
    """Single weights of layers are pruned by magnitude (arXiv 1805.01930)."""

    layers: tuple[str, ...]
    fractions: tuple[float, ...]
    epochs: tuple[int, ...]
    target: str = "largest"
    schedule: str = "linear"
    mu: float = 0.0

    def __post_init__(self) -> None:
        _freeze(self)
        _check_fractions(self.fractions)
        _check_event_epochs((self.epochs,))
        _check(
            len(self.layers) == len(self.fractions),
            f"{len(self.fractions)} fractions for {len(self.layers)} layers",
        )
        _check(self.mu >= 0, f"mu must be at least 0, got {self.mu}")

    @property
    def rate(self) -> float:
        """Percent of the layer that loses most, an event."""
        return 100 * max(self.fractions) / len(self.epochs)


@dataclass(frozen=True)
class Noise:
    """Noise on the chosen filters instead of their removal (arXiv 1906.03728, figures 5 and D2).

    kind: "zeroing", "gaussian" or "restored". passes: N of `noise.FilterNoise`, in forward passes
    from the event on, evaluation included. evaluation_batch: images in a pass of evaluation.
    """

    kind: str
    passes: int
    evaluation_batch: int = 128

    def __post_init__(self) -> None:
        _check_one_of("noise", self.kind, ("zeroing", "gaussian", "restored"))
        _check(self.passes >= 0, f"noise passes must be at least 0, got {self.passes}")


@dataclass(frozen=True)
class Flatness:
    """What is measured at the end of `epoch`, on the first `images` test images (figures 6, E).

    test_images: sharpness is measured on so many of the test images, None for all.
    """

    epoch: int
    images: int = 512
    eigenvalues: int = 100
    directions: int = 10
    reach: float = 0.40
    step: float = 0.01
    test_images: int | None = None

    def __post_init__(self) -> None:
        _check(self.images >= 1, f"flatness needs at least one image, got {self.images}")
        _check(
            0 < self.directions <= self.eigenvalues,
            f"{self.directions} directions need as many of the {self.eigenvalues} eigenvalues",
        )
        _check(
            0 < self.step <= self.reach,
            f"a step must be positive and within the reach {self.reach}, got {self.step}",
        )

    @property
    def epsilons(self) -> tuple[float, ...]:
        """Every `step` from -`reach` to `reach`."""
        steps = round(self.reach / self.step)
        return tuple(n * self.step for n in range(-steps, steps + 1))


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's numbers.

    data: what `data.load` takes. train_per_class, test_per_class: subsets, None for all. model:
    a name of `models.MODELS`, or "package.module:function". learning_rate is multiplied by 0.1 at
    each milestone: a milestone of 150 makes 150 the first epoch at the lower rate. histograms:
    whether batch norm's outputs are measured before and after training or, where single weights
    are pruned, those weights' magnitudes before, after and at the end. precision: "float32" (in
    full, without TF32 on a GPU), or "bfloat16" for autocast.
    """

    data: str = "cifar10"
    train_per_class: int | None = None
    test_per_class: int | None = None
    model: str = "vgg11_bn"
    width: float = 1.0
    dropout: float | tuple[float, float] = 0.0
    optimizer: str = "adam"
    learning_rate: float = 0.001
    momentum: float = 0.0
    weight_decay: float = 0.0
    milestones: tuple[int, ...] = ()
    epochs: int = 325
    batch: int = 128
    augment: bool = False
    pruning: FilterPruning | WeightPruning | None = None
    noise: Noise | None = None
    flatness: Flatness | None = None
    histograms: bool = False
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        _freeze(self)
        _check_one_of("optimizer", self.optimizer, ("adam", "sgd"))
        _check_one_of("precision", self.precision, ("float32", "bfloat16"))
        for name in ("epochs", "batch"):
            _check(
                getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}"
            )
        _check(self.learning_rate > 0, f"learning_rate must be positive, got {self.learning_rate}")
        _check(self.width > 0, f"width must be positive, got {self.width}")
        last = max((max(e) for e in _events(self.pruning)), default=0)
        _check(last < self.epochs, f"an event at epoch {last} of a run of {self.epochs} epochs")
        if self.flatness is not None:
            epoch = self.flatness.epoch
            _check(0 <= epoch < self.epochs, f"flatness at epoch {epoch} of {self.epochs}")
        if self.noise is not None:
            _check(
                isinstance(self.pruning, FilterPruning) and not self.pruning.scratch,
                "noise needs the filter pruning whose choice of filters it follows",
            )

    @property
    def identity(self) -> str:
        """16 hexadecimal digits; equal for configurations that give the same numbers.

        Of a path to images only the last part counts, so that records move between machines.
        """
        text = json.dumps(to_dict(self.portable), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def portable(self) -> "Config":
        """The same configuration, with only the last part of a path to images."""
        kind, _, path = self.data.partition(":")
        return self.with_(data=f"{kind}:{PurePath(path).name}") if path else self

    @property
    def title(self) -> str:
        """A short name for people, in errors and progress bars."""
        what = ""
        if self.pruning is not None:
            what = f" {self.pruning.target} {self.pruning.rate:.2g}%"
        if self.noise is not None:
            what += f" {self.noise.kind} {self.noise.passes}"
        return f"{self.model}{what} seed {self.seed} ({self.identity})"

    def with_(self, **changes: Any) -> "Config":
        """The same configuration but for `changes`."""
        return replace(self, **changes)


_TYPES = {kind.__name__: kind for kind in (FilterPruning, WeightPruning, Noise, Flatness)}


def to_dict(config: Any) -> dict:
    """Plain JSON types; fields at their default are left out, nested types named."""
    out = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        if type(value) in _TYPES.values():
            value = {"type": type(value).__name__, **to_dict(value)}
        out[field.name] = value
    return out


def from_dict(content: Mapping) -> Config:
    """The inverse of `to_dict`; raises ConfigError on a field or kind it does not know."""
    try:
        return Config(**{name: _nested(value) for name, value in content.items()})
    except (TypeError, KeyError) as error:
        raise ConfigError(f"not a configuration of this version: {error}") from error


def _nested(value: Any) -> Any:
    if isinstance(value, Mapping):
        content = dict(value)
        return _TYPES[content.pop("type")](**content)
    return value


def _events(pruning: FilterPruning | WeightPruning | None) -> tuple[tuple[int, ...], ...]:
    if pruning is None:
        return ()
    return pruning.epochs if isinstance(pruning, FilterPruning) else (pruning.epochs,)


def _check_event_epochs(layers: tuple[tuple[int, ...], ...]) -> None:
    for epochs in layers:
        rising = all(a < b for a, b in pairwise(epochs))
        _check(
            bool(epochs) and epochs[0] >= 0 and rising,
            f"a layer's event epochs must be rising and at least 0, got {epochs}",
        )


def _freeze(config: Any) -> None:
    """Lists become tuples and whole numbers in float fields floats, so that equals hash alike."""
    for field in fields(config):
        value = _tupled(getattr(config, field.name))
        if field.type is float:
            value = float(value)
        elif field.name in ("fractions", "dropout") and isinstance(value, tuple):
            value = tuple(map(float, value))
        object.__setattr__(config, field.name, value)


def _tupled(value: Any) -> Any:
    return tuple(_tupled(v) for v in value) if isinstance(value, list | tuple) else value
