"""A run's configuration: frozen data, and its identity, a hash of its canonical JSON.

Fields at their default are left out of the JSON, so that a field added later (with the default
that means "as before") changes no identity. All epochs are 0-based, all fractions in [0, 1).
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from numbers import Real
from pathlib import Path
from types import UnionType
from typing import Any, get_args


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the value and what is valid."""


def _require(valid: bool, message: str) -> None:
    if not valid:
        raise ConfigError(message)


class _Settings:
    """Settings whose fields have their declared types, so that equal ones hash alike."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            name = f"{type(self).__name__}.{field.name}"
            value = _converted(getattr(self, field.name), field.type, name)
            object.__setattr__(self, field.name, value)
        self._check()

    def _check(self) -> None:
        """Raise ConfigError unless the settings can be run."""

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            _require(value >= least, f"{name} must be at least {least}, got {value}")

    def _one_of(self, name: str, *valid: str) -> None:
        value = getattr(self, name)
        _require(value in valid, f"unknown {name} {value!r}: one of {', '.join(valid)}")


class _Pruning(_Settings):
    """The settings that both kinds of pruning share."""

    fractions: tuple[float, ...]
    layers: tuple[str, ...] | None

    @property
    def schedules(self) -> tuple[tuple[int, ...], ...]:
        """For each layer, the epochs of its events."""
        raise NotImplementedError

    @property
    def rate(self) -> float:
        """Percent pruned an event, of the layer that loses most (arXiv 1906.03728, section 3)."""
        most = max(self.fractions)
        return 100 * most / len(self.schedules[self.fractions.index(most)])

    def _check(self) -> None:
        fractions, layers = self.fractions, self.layers
        valid = len(fractions) > 0 and all(0 <= fraction < 1 for fraction in fractions)
        _require(valid, f"pruning needs fractions in [0, 1), a layer each, got {fractions}")
        for given in (layers, self.schedules):
            same = given is None or len(given) == len(fractions)
            _require(same, f"{len(fractions)} fractions need as many layers, got {given}")
        for epochs in self.schedules:
            rising = len(epochs) > 0 and all(a < b for a, b in pairwise((-1, *epochs)))
            _require(rising, f"a layer's event epochs must be rising from 0 on, got {epochs}")


@dataclass(frozen=True)
class FilterPruning(_Pruning):
    """Whole filters are pruned (arXiv 1906.03728).

    Attributes:
        fractions: How much of each layer is pruned in all.
        epochs: For each layer, the epochs at whose end it has an event.
        score: A name of `pruning.SCORES`, or "package.module:function" of the convolution.
        target: "smallest", "largest" or "random".
        layers: Names of convolutions in forward order; None for the last ones.
        scratch: One event before any training instead; then `epochs` is empty.
        norm: Batch norm's scale and shift of a pruned filter are zero, too.
    """

    fractions: tuple[float, ...]
    epochs: tuple[tuple[int, ...], ...] = ()
    score: str = "l2"
    target: str = "smallest"
    layers: tuple[str, ...] | None = None
    scratch: bool = False
    norm: bool = True

    @property
    def schedules(self) -> tuple[tuple[int, ...], ...]:
        """For each layer, the epochs of its events."""
        return ((0,),) * len(self.fractions) if self.scratch else self.epochs

    def _check(self) -> None:
        empty = not (self.scratch and self.epochs)
        _require(empty, f"scratch=True is an event of its own: no others, got {self.epochs}")
        super()._check()


@dataclass(frozen=True)
class WeightPruning(_Pruning):
    """Single weights of layers are pruned by magnitude (arXiv 1805.01930).

    Attributes:
        layers: Names of layers.
        fractions: How much of each layer is pruned in all.
        epochs: At whose end all layers have an event.
        target: "smallest", "largest" or "random".
        schedule: "linear" or "annealing", of the fraction over the events.
        mu: Of the annealing.
    """

    layers: tuple[str, ...]
    fractions: tuple[float, ...]
    epochs: tuple[int, ...]
    target: str = "largest"
    schedule: str = "linear"
    mu: float = 0.0

    @property
    def schedules(self) -> tuple[tuple[int, ...], ...]:
        """For each layer, the epochs of its events, the same for all."""
        return (self.epochs,) * len(self.fractions)

    def _check(self) -> None:
        self._at_least(0, "mu")
        super()._check()


@dataclass(frozen=True)
class Noise(_Settings):
    """Noise on the chosen filters instead of their removal (arXiv 1906.03728, figures 5 and D2).

    Attributes:
        kind: "zeroing", "gaussian" or "restored".
        passes: N of `noise.FilterNoise`, in forward passes after the event, evaluation included.
        evaluation_batch: Images in a pass of evaluation.
    """

    kind: str
    passes: int
    evaluation_batch: int = 128

    def _check(self) -> None:
        self._one_of("kind", "zeroing", "gaussian", "restored")
        self._at_least(0, "passes")
        self._at_least(1, "evaluation_batch")


@dataclass(frozen=True)
class Flatness(_Settings):
    """Flatness is measured at the end of one epoch (figures 6 and E1 to E5).

    Attributes:
        epoch: When.
        images: How many test images curvature and noise are measured on; all if there are fewer.
        eigenvalues: How many of the Hessian.
        directions: How many eigenvectors sharpness is measured along.
        reach: How far along them, both ways.
        step: From one point to the next.
        test_images: How many test images sharpness is measured on; None for all.
    """

    epoch: int
    images: int = 512
    eigenvalues: int = 100
    directions: int = 10
    reach: float = 0.40
    step: float = 0.01
    test_images: int | None = None

    def _check(self) -> None:
        self._at_least(1, "images", "directions")
        if self.test_images is not None:
            self._at_least(1, "test_images")
        most = self.directions <= self.eigenvalues
        _require(most, f"{self.directions} directions of {self.eigenvalues} eigenvalues")
        valid = 0 < self.step <= self.reach
        _require(valid, f"a step must be within 0 and the reach {self.reach}, got {self.step}")

    @property
    def epsilons(self) -> tuple[float, ...]:
        """Every `step` from -`reach` to `reach`, as far as they go."""
        steps = math.floor(self.reach / self.step + 1e-9)
        return tuple(n * self.step for n in range(-steps, steps + 1))


@dataclass(frozen=True)
class Config(_Settings):
    """Everything that decides a run's numbers.

    Attributes:
        data: A data set as `data.load` takes it.
        train_per_class: Training images of a class; None for all.
        test_per_class: Test images of a class; None for all.
        model: A name of `models.MODELS`, or "package.module:function".
        width: Factor on the number of filters; a function does not get it.
        dropout: As for `models.build`; 0 for a function.
        optimizer: "adam" or "sgd".
        learning_rate: At the start.
        momentum: Of SGD.
        weight_decay: Of both optimizers.
        milestones: The first epochs at a learning rate that is lower by a factor of 10.
        epochs: In all.
        batch: Images of a training batch.
        augment: Whether training images are cropped and flipped at random.
        pruning: Of filters, of single weights, or None.
        noise: On the chosen filters, instead of their removal.
        flatness: Whether and when it is measured.
        histograms: Whether batch norm's outputs are measured before and after training or, if
            single weights are pruned, those weights' magnitudes before, after and at the end.
        precision: "float32", without TF32 on a GPU, or "bfloat16" for autocast.
        seed: Of all streams of randomness.
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

    def _check(self) -> None:
        self._one_of("optimizer", "adam", "sgd")
        self._one_of("precision", "float32", "bfloat16")
        self._at_least(1, "epochs", "batch")
        for name in ("learning_rate", "width"):
            value = getattr(self, name)
            _require(value > 0, f"{name} must be positive, got {value}")
        function = ":" in self.model
        _require(not (function and self.dropout), f"{self.model} takes no dropout from outside")
        schedules = self.pruning.schedules if self.pruning else ()
        last = max((epochs[-1] for epochs in schedules), default=0)
        _require(last < self.epochs, f"an event at epoch {last} of a run of {self.epochs} epochs")
        at = self.flatness.epoch if self.flatness else 0
        _require(0 <= at < self.epochs, f"flatness at epoch {at} of {self.epochs}")
        follows = isinstance(self.pruning, FilterPruning) and not self.pruning.scratch
        needs = "noise needs the filter pruning whose choice of filters it follows"
        _require(self.noise is None or follows, f"{needs}, got {self.pruning}")

    @property
    def identity(self) -> str:
        """16 hexadecimal digits, equal for configurations that give the same numbers.

        Only the last part of a path to images counts, so that records can move between machines.
        """
        text = json.dumps(to_dict(self.portable), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def portable(self) -> "Config":
        """The same configuration, with only the last part of a path to images."""
        kind, _, path = self.data.partition(":")
        if not path:
            return self
        return self.with_(data=f"{kind}:{Path(os.path.expanduser(path)).absolute().name}")

    @property
    def title(self) -> str:
        """A short name for people, in errors and progress bars."""
        p, noise = self.pruning, self.noise
        dropped = f" dropout {self.dropout}" if self.dropout else ""
        pruned = f" {p.target} {p.rate:.2g}%" if p else ""
        noised = f" {noise.kind} {noise.passes}" if noise else ""
        return f"{self.model}{dropped}{pruned}{noised} seed {self.seed} ({self.identity})"

    def with_(self, **changes: Any) -> "Config":
        """Return the configuration with some changes."""
        return replace(self, **changes)


_TYPES = {kind.__name__: kind for kind in (FilterPruning, WeightPruning, Noise, Flatness)}


def to_dict(config: Any) -> dict:
    """Return plain JSON types; fields at their default are left out, nested types are named."""
    out = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if type(value) in _TYPES.values():
            value = {"type": type(value).__name__, **to_dict(value)}
        if value != field.default:
            out[field.name] = value
    return out


def from_dict(content: Mapping) -> Config:
    """Return the configuration of a dict of `to_dict`; raise ConfigError on an unknown field."""
    values: dict[str, Any] = dict(content)
    try:
        for name, value in content.items():
            if isinstance(value, Mapping):
                nested = dict(value)
                values[name] = _TYPES[nested.pop("type")](**nested)
        return Config(**values)
    except (TypeError, KeyError) as error:
        raise ConfigError(f"not a configuration of this version: {error}") from error


def _converted(value: Any, kind: Any, name: str) -> Any:
    """Convert what people pass to a declared type: numpy's numbers, arrays, ranges, lists.

    Args:
        value: The value.
        kind: A type, a union of types, or a tuple of a type.
        name: Of the field, for messages.

    Raises:
        ConfigError: The value is of another type. True and False are no numbers.
    """
    if hasattr(value, "tolist"):  # numpy, pandas and torch
        value = value.tolist()
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    for each in kinds:
        items = get_args(each)
        if items and isinstance(value, list | tuple | range):
            if items[-1] is ... or len(items) == len(value):
                return tuple(_converted(item, items[0], name) for item in value)
        elif each in (int, float):
            number = isinstance(value, Real) and not isinstance(value, bool)
            if number and math.isfinite(value) and (each is float or value == int(value)):
                return each(value)
        elif not items and isinstance(value, each):
            return value
    wanted = " or ".join(str(k) if get_args(k) else k.__name__ for k in kinds)
    raise ConfigError(f"{name} takes {wanted}, got {value!r} of type {type(value).__name__}")
