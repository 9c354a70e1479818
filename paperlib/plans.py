"""Plans: the runs that a figure needs at a scale, and its settings beside the paper's.

`plan` lists a figure's runs, `table` compares its settings with the paper's, and `queue` sorts all
runs of a scale by the worth of their evidence. Users find them in `experiments`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import pandas as pd

from paperlib.config import Config, FilterPruning, WeightPruning
from paperlib.papers import regularization_2018, tradeoff_2020
from paperlib.papers.noise_spans import images_of, steps, training_batches
from paperlib.papers.settings import Figure, Setting
from paperlib.profiles import PROFILES

FIGURES = {figure.name: figure for figure in (*tradeoff_2020.FIGURES, *regularization_2018.FIGURES)}

# The evidence in order of worth: figures, or one network of a figure.
TIERS = (
    ("figure-6:VGG11", "figure-1", "figure-B1"),
    ("figure-R1", "figure-R2", "figure-R4", "figure-R5"),
    ("figure-5", "figure-D2"),
    ("figure-B2:VGG11", "figure-R6"),
    ("figure-3", "figure-R3"),
    ("figure-4", "figure-C3"),
    ("table-F1",),
    ("figure-2:ResNet18", "figure-B2:ResNet18", "table-C1"),
)
# The number of filters of the last pruned layer, at full width.
LAST_FILTERS = {"vgg11_bn": 512, "resnet18": 512, "resnet20": 64, "resnet56": 64}


def figure(name: str) -> Figure:
    """Return the figure of that name.

    Raises:
        ValueError: There is none. The message lists the valid names.
    """
    if name not in FIGURES:
        raise ValueError(f"unknown figure {name!r}: one of {', '.join(FIGURES)}")
    return FIGURES[name]


@dataclass(frozen=True)
class Scale:
    """A profile, and replacements for parts of it.

    Attributes:
        profile: "smoke", "demo", "small" or "paper".
        data: A data set in place of the profile's, such as "cifar10" or "images:PATH".
        seeds: The number of seeds, in place of the profile's.
        precision: "float32" or "bfloat16", in place of the papers' float32.
        networks: Only settings of these networks; None for all.

    Raises:
        ValueError: The profile is unknown, or `seeds` is below 1.
    """

    profile: str = "small"
    data: str | None = None
    seeds: int | None = None
    precision: str | None = None
    networks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise ValueError(f"unknown profile {self.profile!r}: one of {', '.join(PROFILES)}")
        if self.seeds is not None and self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")

    @classmethod
    def of(cls, scale: "Scale | str") -> "Scale":
        """Return the scale itself, or the scale of a named profile."""
        return scale if isinstance(scale, Scale) else cls(scale)

    def settings(self, shown: Figure) -> list[Setting]:
        """Return the settings of a figure that this scale shows."""
        settings = PROFILES[self.profile].shown(shown)
        return [s for s in settings if self.networks is None or s.network in self.networks]


def plan(name: str, scale: Scale | str = "small") -> pd.DataFrame:
    """Return the runs of a figure, one row each.

    Settings that a profile makes equal, measurements apart, appear once.

    Args:
        name: The name of the figure.
        scale: A `Scale`, or the name of a profile.

    Returns:
        Columns network, method, setting (its name, the same at every profile), label, rate
        (percent an event, NaN if nothing is pruned in training), fraction (percent of the layer
        that loses most, 0 if nothing is pruned), seed, choosing (True for a seed on which the best
        of several settings is chosen), run (the identity) and config.

    Raises:
        ValueError: The figure or the profile is unknown.
    """
    shown, scale = figure(name), Scale.of(scale)
    at = PROFILES[scale.profile]
    rows = []
    for setting in scale.settings(shown):
        config = _scaled(name, setting, scale)
        about = {
            "network": setting.network,
            "method": setting.method,
            "setting": setting.name,
            "label": label(setting.method, config),
            "rate": _rate(config),
            "fraction": 100 * max(config.pruning.fractions) if config.pruning else 0,
        }
        compared = at.seeds_of(shown, setting, scale.seeds)
        for seed in (*compared, *setting.choosing[: at.choosing]):
            config = config.with_(seed=seed)
            run = {"choosing": seed not in compared, "run": config.identity, "config": config}
            rows.append(about | {"seed": seed, **run})
    frame = pd.DataFrame(rows)
    same = frame.config.map(lambda c: c.with_(flatness=None, histograms=False).identity)
    return frame[~same.duplicated()].reset_index(drop=True)


def _scaled(name: str, setting: Setting, scale: Scale) -> Config:
    """Return the configuration of a figure's setting at a scale."""
    at = PROFILES[scale.profile]
    config = at.scale(setting, scale.data, scale.precision)
    return config.with_(flatness=None, histograms=False) if name in at.alone else config


def queue(scale: Scale | str = "small", names: Iterable[str] = ()) -> list[Config]:
    """Return every run of a scale once, by tier of `TIERS`, then by seed, then by setting.

    Args:
        scale: A `Scale`, or the name of a profile.
        names: If given, only the runs of these figures, in the order of the names instead of the
            tiers.
    """
    ordered: dict[str, Config] = {}
    for tier in [(name,) for name in names] or TIERS:
        parts = []
        for name, _, network in (part.partition(":") for part in tier):
            runs = plan(name, scale)
            parts.append(runs[runs.network == network] if network else runs)
        for config in pd.concat(parts).sort_values("seed", kind="stable").config:
            ordered.setdefault(config.identity, config)
    return list(ordered.values())


def is_setting(config: Config) -> bool:
    """Return whether any figure has this setting, at any profile and with any seed."""
    return config.with_(seed=0).identity in _settings(config.data, config.precision)


@cache
def _settings(data: str, precision: str) -> set[str]:
    scales = [Scale(profile, data, 1, precision) for profile in PROFILES]
    return {run for name in FIGURES for scale in scales for run in plan(name, scale).run}


def annotate(frame: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Join a frame keyed by `run` (a store's epochs or runs) with a plan's columns on each run.

    A run that serves several settings appears once for each.

    Args:
        frame: A frame with a column `run`.
        runs: A plan, as `plan` returns it.
    """
    about = runs.drop(columns="config")
    new = [column for column in frame if column == "run" or column not in about]
    return about.merge(frame[new], on="run")


def _rate(config: Config) -> float:
    """Return the iterative pruning rate in percent; NaN if nothing is pruned in training."""
    pruning = config.pruning
    scratch = isinstance(pruning, FilterPruning) and pruning.scratch
    return math.nan if pruning is None or scratch else pruning.rate


def label(method: str, config: Config) -> str:
    """Return a setting's name in a legend.

    Examples are "Prune_S 13%" (of the filters, in an event; "weights only" if batch norm stays),
    "Prune_L 90%" (of the weights, in all), "Zeroing 51" (training batches) and "Dropout 0.25/0.5"
    (rates after pools and after the dense layer).
    """
    if config.dropout:
        after_pool, after_dense = np.broadcast_to(config.dropout, 2)
        return f"{method} {after_pool:g}/{after_dense:g}"
    if isinstance(config.pruning, WeightPruning):
        return f"{method} {100 * max(config.pruning.fractions):g}%"
    if config.noise is not None:
        return f"{method} {training_batches(config) or '1 pass'}"
    if math.isnan(rate := _rate(config)):
        return method
    whole = not isinstance(config.pruning, FilterPruning) or config.pruning.norm
    return f"{method} {rate:.2g}%" + ("" if whole else ", weights only")


def table(name: str, scale: Scale | str = "small") -> pd.DataFrame:
    """Return every setting of a figure at the paper's scale and at another one, side by side.

    Args:
        name: The name of the figure.
        scale: A `Scale`, or the name of a profile.

    Returns:
        One row a setting, with its label at `scale`. The columns have two levels: the quantity, and
        "paper" or the profile's name. Steps and doses decide whether a miniature is faithful
        (docs/evidence.md).
    """
    shown, scale = figure(name), Scale.of(scale)
    settings = scale.settings(shown)
    names = [(s.network, label(s.method, _scaled(name, s, scale))) for s in settings]
    index = pd.MultiIndex.from_tuples(names, names=["network", "setting"])
    columns = {}
    for side in (Scale("paper"), scale):
        at, rows = PROFILES[side.profile], []
        for setting in settings:
            config = _scaled(name, setting, side)
            rows.append(_described(config, len(at.seeds_of(shown, setting, side.seeds))))
        columns[side.profile] = pd.DataFrame(rows, index=index)
    both = pd.concat(columns, axis=1).swaplevel(axis=1)
    return both.sort_index(axis=1, level=0, sort_remaining=False)


def _described(config: Config, seeds: int) -> dict[str, object]:
    """Describe a configuration in the papers' words."""
    train_images, test_images = images_of(config)
    described = {
        "data": config.data,
        "training images": train_images if config.train_per_class else "all",
        "test images": test_images if config.test_per_class else "all",
        "augmentation": "crop, flip" if config.augment else "none",
        "network": config.model,
        **_fields(config, "width", "optimizer", "learning_rate", "momentum", "weight_decay"),
        "batch": config.batch,
        "steps an epoch": steps(config),
        **_fields(config, "epochs", "dropout", "precision"),
        "milestones": ", ".join(map(str, config.milestones)),
        "seeds": seeds,
    }
    if config.flatness is not None:
        f = config.flatness
        described["flatness"] = (
            f"epoch {f.epoch}, {f.images} images, {f.eigenvalues} eigenvalues; {f.directions} "
            f"directions, eps up to {f.reach:g} by {f.step:g}, on {f.test_images or 'all'} images"
        )
    return described | _described_pruning(config)


def _fields(config: Config, *names: str) -> dict[str, object]:
    return {name.replace("_", " "): getattr(config, name) for name in names}


def _described_pruning(config: Config) -> dict[str, object]:
    pruning = config.pruning
    if pruning is None:
        return {}
    described: dict[str, object] = {
        "target": pruning.target,
        "fractions": ", ".join(f"{f:g}" for f in pruning.fractions),
    }
    rate = {"rate (% an event)": round(pruning.rate, 2)}
    if isinstance(pruning, FilterPruning):
        events = pruning.epochs
        held = "weights, batch norm" if pruning.norm else "weights"
        held = "nothing" if config.noise else held
        described |= {"score": pruning.score, "held at zero": held, **rate}
        if pruning.scratch:
            return described | {"event epochs": "before training"}
    else:
        events = (pruning.epochs,)
        layers = ", ".join(pruning.layers)
        described |= {"layers": layers, "schedule": pruning.schedule, **rate}
    most = max(range(len(events)), key=lambda i: pruning.fractions[i])
    gaps = [b - a for a, b in pairwise(events[most])]
    described["event epochs"] = "; ".join(
        f"{e[0]} to {e[-1]} ({len(e)})" if len(e) > 1 else f"{e[0]}" for e in events
    )
    described["steps between a layer's events"] = steps(config) * min(gaps) if gaps else "one event"
    if isinstance(pruning, FilterPruning):
        count = round(config.width * LAST_FILTERS[config.model])
        kept = math.ceil(round((1 - pruning.fractions[-1]) * count, 6))
        dose = (count - kept) / len(events[-1])
        described["dose (filters an event, last layer)"] = round(dose, 1)
    last = max(epochs[-1] for epochs in events)
    described["steps after the last event"] = steps(config) * (config.epochs - 1 - last)
    if config.noise is not None:
        passes = config.noise.passes + (config.noise.kind != "restored")
        lasts = f"{training_batches(config)} training batches, {passes} passes in all"
        lasts = "1 pass" if passes == 1 else lasts
        described |= {"noise": config.noise.kind, "noise lasts": lasts}
    return described
