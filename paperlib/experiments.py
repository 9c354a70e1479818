"""The experiments of both papers: which runs a figure needs at a profile, and how they compare.

`plan` lists a figure's runs, `table` shows its settings beside the paper's, and `queue` puts all
runs of a profile in the order in which they are worth having.
"""

import math
from itertools import pairwise

import numpy as np
import pandas as pd

from paperlib.config import Config, FilterPruning, WeightPruning
from paperlib.papers import regularization_2018, tradeoff_2020
from paperlib.papers.noise_spans import images_of, training_batches
from paperlib.papers.settings import Figure
from paperlib.profiles import PROFILES, Profile, steps

FIGURES = {figure.name: figure for figure in (*tradeoff_2020.FIGURES, *regularization_2018.FIGURES)}

# The evidence in order of worth: (figure, network) pairs, None for all networks of a figure.
TIERS = (
    (("figure-6", "VGG11"), ("figure-1", None), ("figure-B1", None)),
    (("figure-R1", None), ("figure-R2", None), ("figure-R4", None), ("figure-R5", None)),
    (("figure-5", None), ("figure-D2", None)),
    (("figure-B2", "VGG11"), ("figure-R6", None)),
    (("figure-3", None), ("figure-R3", None)),
    (
        ("figure-2", "ResNet18"),
        ("figure-B2", "ResNet18"),
        ("table-C1", None),
        ("figure-4", None),
        ("figure-C3", None),
    ),
    (("table-F1", None),),
)
# Filters of the last layer that is pruned, at full width.
LAST_FILTERS = {"vgg11_bn": 512, "resnet18": 512, "resnet20": 64, "resnet56": 64}


def figure(name: str) -> Figure:
    """The figure of that name; ValueError with the valid names where there is none."""
    if name not in FIGURES:
        raise ValueError(f"unknown figure {name!r}: one of {', '.join(FIGURES)}")
    return FIGURES[name]


def profile(name: str) -> Profile:
    """The profile of that name; ValueError with the valid names where there is none."""
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}: one of {', '.join(PROFILES)}")
    return PROFILES[name]


def plan(
    name: str,
    profile_name: str,
    data: str | None = None,
    seeds: int | None = None,
    precision: str | None = None,
) -> pd.DataFrame:
    """Return the runs of a figure, one row each; settings that a profile makes equal appear once.

    Args:
        name: of the figure.
        profile_name: of the profile.
        data: replaces the profile's data set.
        seeds: how many, in place of the profile's number.
        precision: replaces the paper's.

    Returns:
        Columns network, method, setting (its name, the same at every profile), label, rate
        (percent an event, NaN if nothing is pruned in training), fraction (percent of the layer
        that loses most, 0 if nothing is pruned), seed, choosing (True for a seed on which the best
        of several settings is chosen), run (the identity) and config.
    """
    shown, scale = figure(name), profile(profile_name)
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    rows = []
    for setting in scale.shown(shown):
        config = scale.scale(setting, data, precision)
        fractions = config.pruning.fractions if config.pruning is not None else (0,)
        about = {
            "network": setting.network,
            "method": setting.method,
            "setting": setting.name,
            "label": label(setting.method, config),
            "rate": pruning_rate(config),
            "fraction": 100 * max(fractions),
        }
        compared = [(seed, False) for seed in scale.seeds_of(shown, setting, seeds)]
        for seed, choosing in compared + [(s, True) for s in scale.choosing_seeds(setting)]:
            config = config.with_(seed=seed)
            rows.append(
                about
                | {"seed": seed, "choosing": choosing, "run": config.identity, "config": config}
            )
    frame = pd.DataFrame(rows)
    same = frame.config.map(lambda c: c.with_(flatness=None, histograms=False).identity)
    return frame[~same.duplicated()].reset_index(drop=True)


def queue(
    profile_name: str,
    data: str | None = None,
    seeds: int | None = None,
    precision: str | None = None,
) -> list[Config]:
    """Return every run of a profile once, by tier of `TIERS`, then by seed, then by setting."""
    ordered: dict[str, Config] = {}
    for tier in TIERS:
        plans = []
        for name, network in tier:
            frame = plan(name, profile_name, data, seeds, precision)
            plans.append(frame if network is None else frame[frame.network == network])
        runs = pd.concat(plans, ignore_index=True).sort_values("seed", kind="stable")
        for config in runs.config:
            ordered.setdefault(config.identity, config)
    return list(ordered.values())


def annotate(frame: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """A frame keyed by `run` (a store's epochs or runs) with what `runs`, a `plan`, says of each.

    A run that serves several settings appears once for each.
    """
    about = runs.drop(columns="config")
    new = [column for column in frame if column == "run" or column not in about]
    return about.merge(frame[new], on="run")


def pruning_rate(config: Config) -> float:
    """Iterative pruning rate in percent, NaN where nothing is pruned in training."""
    pruning = config.pruning
    if pruning is None or (isinstance(pruning, FilterPruning) and pruning.scratch):
        return math.nan
    return pruning.rate


def label(method: str, config: Config) -> str:
    """A setting's name in a legend.

    "Prune_S 13%" an event where filters go, "Prune_L 90%" in all where weights do, "Zeroing 51"
    training batches, "Dropout 0.25/0.5" after pools and after the dense layer.
    """
    if config.dropout:
        after_pool, after_dense = np.broadcast_to(config.dropout, 2)
        return f"{method} {after_pool:g}/{after_dense:g}"
    if isinstance(config.pruning, WeightPruning):
        return f"{method} {100 * max(config.pruning.fractions):g}%"
    if config.noise is not None:
        images = images_of(config)
        return f"{method} {training_batches(config.noise, config.batch, *images) or '1 pass'}"
    rate = pruning_rate(config)
    return method if math.isnan(rate) else f"{method} {rate:.2g}%"


def table(
    name: str, profile_name: str, data: str | None = None, precision: str | None = None
) -> pd.DataFrame:
    """Return every setting of a figure at the paper's scale and at the profile's, side by side.

    One row a setting; the columns have two levels, "paper" and the profile's name. The rows on
    steps and doses are the numbers that make a miniature faithful (docs/evidence.md).
    """
    shown, scale = figure(name), profile(profile_name)
    sides = {"paper": profile("paper"), profile_name: scale}
    settings = scale.shown(shown)
    columns = {
        side: [
            _described(
                at.scale(s, *((data, precision) if side == profile_name else ())),
                len(at.seeds_of(shown, s)),
            )
            for s in settings
        ]
        for side, at in sides.items()
    }
    index = pd.MultiIndex.from_tuples(
        [(s.network, label(s.method, s.config)) for s in settings], names=["network", "setting"]
    )
    frames = {side: pd.DataFrame(rows, index=index) for side, rows in columns.items()}
    return (
        pd.concat(frames, axis=1)
        .swaplevel(axis=1)
        .sort_index(axis=1, level=0, sort_remaining=False)
    )


def _described(config: Config, seeds: int) -> dict[str, object]:
    """Describe a configuration in the words of the papers."""
    train_images, test_images = images_of(config)
    described = {
        "data": config.data,
        "training images": train_images if config.train_per_class else "all",
        "test images": test_images if config.test_per_class else "all",
        "augmentation": "crop, flip" if config.augment else "none",
        "network": config.model,
        "width": config.width,
        "optimizer": config.optimizer,
        "learning rate": config.learning_rate,
        "momentum": config.momentum,
        "weight decay": config.weight_decay,
        "batch": config.batch,
        "steps an epoch": steps(config, train_images),
        "epochs": config.epochs,
        "dropout": config.dropout,
        "precision": config.precision,
        "milestones": ", ".join(map(str, config.milestones)),
        "seeds": seeds,
    }
    if config.flatness is not None:
        f = config.flatness
        described["flatness"] = (
            f"epoch {f.epoch}, {f.images} images, {f.eigenvalues} eigenvalues; {f.directions} "
            f"directions, eps up to {f.reach:g} by {f.step:g}, on {f.test_images or 'all'} images"
        )
    return described | _described_pruning(config, steps(config, train_images))


def _described_pruning(config: Config, an_epoch: int) -> dict[str, object]:
    pruning = config.pruning
    if pruning is None:
        return {}
    described: dict[str, object] = {
        "target": pruning.target,
        "fractions": ", ".join(f"{f:g}" for f in pruning.fractions),
    }
    filters = isinstance(pruning, FilterPruning)
    if filters:
        described["score"] = pruning.score
        described["held at zero"] = "weights, batch norm" if pruning.norm else "weights"
    else:
        described["layers"] = ", ".join(pruning.layers)
        described["schedule"] = pruning.schedule
    described["rate (% an event)"] = round(pruning.rate, 2)
    if filters and pruning.scratch:
        return described | {"event epochs": "before training"}
    events = pruning.epochs if filters else (pruning.epochs,)
    most = max(range(len(events)), key=lambda i: pruning.fractions[i])
    gaps = [b - a for a, b in pairwise(events[most])]
    described["event epochs"] = _spans(events)
    described["steps between events"] = an_epoch * min(gaps) if gaps else "one event"
    if filters:
        count = round(config.width * LAST_FILTERS[config.model])
        kept = math.ceil(round((1 - pruning.fractions[-1]) * count, 6))
        described["dose (filters an event, last layer)"] = round(
            (count - kept) / len(events[-1]), 1
        )
    last = max(epochs[-1] for epochs in events)
    described["steps after the last event"] = an_epoch * (config.epochs - 1 - last)
    if config.noise is not None:
        batches = training_batches(config.noise, config.batch, *images_of(config))
        described["noise"] = config.noise.kind
        described["noise lasts"] = f"{batches} training batches, N = {config.noise.passes} passes"
    return described


def _spans(layers: tuple[tuple[int, ...], ...]) -> str:
    """Describe event epochs by layer: first to last (events)."""
    return "; ".join(f"{e[0]} to {e[-1]} ({len(e)})" if len(e) > 1 else f"{e[0]}" for e in layers)
