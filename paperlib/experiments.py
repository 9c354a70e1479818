"""Every setting of both papers, as data, and the profiles that scale them down.

A figure is a tuple of settings at the paper's own scale; a profile turns each into what is run.
`table` shows both side by side, and `plan` lists the runs.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pandas as pd

from paperlib.config import Config, FilterPruning, Flatness, Noise, WeightPruning, schedule

TRADEOFF = "tradeoff-2020"
REGULARIZATION = "regularization-2018"


@dataclass(frozen=True)
class Setting:
    """One curve or one colour of a figure: a method on a network, at the paper's scale."""

    network: str
    method: str
    config: Config


@dataclass(frozen=True)
class Figure:
    """A figure or table of a paper: what it shows, its settings, and how many seeds it has.

    notebook: path under notebooks/, without the extension; one notebook may hold several.
    """

    name: str
    title: str
    seeds: int
    settings: tuple[Setting, ...]
    notebook: str


@dataclass(frozen=True)
class Profile:
    """A scale to run the settings at: less data, narrower networks, fewer epochs and seeds.

    None keeps what the paper has. batch: smaller with the data, so that an epoch still has some
    steps. widths: by network. warmup: epochs trained before the first event at least, where the
    paper trains as many. flatness: fields of `Flatness` in place of the paper's.
    """

    name: str
    data: str | None = None
    train_per_class: int | None = None
    test_per_class: int | None = None
    batch: int | None = None
    epochs: int | None = None
    widths: dict[str, float] = field(default_factory=dict)
    seeds: int | None = None
    warmup: int = 0
    flatness: dict[str, float] = field(default_factory=dict)

    def scale(
        self, config: Config, data: str | None = None, precision: str | None = None
    ) -> Config:
        """The configuration at this scale; `data` and `precision` replace what it would have."""
        data = data or self.data or config.data
        epochs = self.epochs or config.epochs
        small = config.with_(
            data=data,
            precision=precision or config.precision,
            train_per_class=self.train_per_class,
            test_per_class=self.test_per_class,
            width=self.widths.get(config.model, config.width),
            epochs=epochs,
            batch=self.batch or config.batch,
            milestones=tuple(round(m * epochs / config.epochs) for m in config.milestones),
            pruning=self._scaled_pruning(config, epochs),
            flatness=self._scaled_flatness(config, epochs),
            noise=None,
        )
        if config.noise is not None:
            small = small.with_(noise=_scaled_noise(config, small))
        return small

    def _scaled_pruning(self, config: Config, epochs: int):
        pruning = config.pruning
        if isinstance(pruning, FilterPruning) and not pruning.scratch:
            return replace(pruning, epochs=self._scaled_events(pruning.epochs, config, epochs))
        if isinstance(pruning, WeightPruning):
            return replace(
                pruning, epochs=self._scaled_events((pruning.epochs,), config, epochs)[0]
            )
        return pruning

    def _scaled_flatness(self, config: Config, epochs: int) -> Flatness | None:
        if config.flatness is None:
            return None
        epoch = round(config.flatness.epoch * (epochs - 1) / (config.epochs - 1))
        return replace(config.flatness, epoch=epoch, **self.flatness)

    def _scaled_events(
        self, layers: tuple[tuple[int, ...], ...], config: Config, epochs: int
    ) -> tuple[tuple[int, ...], ...]:
        """Event epochs in proportion; layers that start one after the other still do.

        The earliest layer's first event scales, but for the warm-up; the others keep their
        distance to it. From there to the end of training all epochs shrink by one factor. Events
        that fall on the same epoch become one.
        """
        starts = [events[0] for events in layers]
        lead = min(starts)
        scaled_lead = max(round(lead * epochs / config.epochs), min(lead, self.warmup))
        late = max(starts)
        scaled_late = scaled_lead + late - lead
        factor = (epochs - 1 - scaled_late) / (config.epochs - 1 - late)
        if factor <= 0:
            raise ValueError(f"{epochs} epochs are too few for the schedule of {config.title}")
        return tuple(
            tuple(sorted({scaled_lead + e[0] - lead + round((i - e[0]) * factor) for i in e}))
            for e in layers
        )


CIFAR_IMAGES = (50_000, 10_000)


def images_of(config: Config) -> tuple[int, int]:
    """How many training and test images a run sees, of ten classes: CIFAR's where not said."""
    return (
        10 * config.train_per_class if config.train_per_class else CIFAR_IMAGES[0],
        10 * config.test_per_class if config.test_per_class else CIFAR_IMAGES[1],
    )


# The longest span of each kind of noise in the paper, in training batches.
LONGEST_NOISE = {"zeroing": 1106, "gaussian": 1106, "restored": 2480}


def _scaled_noise(config: Config, small: Config) -> Noise:
    """Noise that lasts for the same part of an epoch, but no longer than from event to event.

    All spans of one kind shrink by one factor, which leaves the longest to end before its layer's
    next event, as in the paper; a span keeps one training batch at least.
    """
    noise = config.noise
    batches = training_batches(noise, config.batch, *CIFAR_IMAGES)
    images = images_of(small)
    an_epoch = math.ceil(images[0] / small.batch)
    gap = min(b - a for epochs in small.pruning.epochs for a, b in pairwise(epochs))
    factor = min(
        an_epoch / math.ceil(CIFAR_IMAGES[0] / config.batch),
        gap * an_epoch / LONGEST_NOISE[noise.kind],
    )
    scaled = max(1, round(batches * factor)) if batches else 0
    return noise_for(noise.kind, scaled, small.batch, *images, noise.evaluation_batch)


def noise_for(
    kind: str,
    batches: int,
    batch: int = 128,
    train_images: int = CIFAR_IMAGES[0],
    test_images: int = CIFAR_IMAGES[1],
    evaluation_batch: int = 128,
) -> Noise:
    """Noise that lasts for `batches` training batches from the event on.

    Passes are counted as in the paper: the evaluation after the event, then each epoch's training
    batches and its two evaluations. With no training batch, zeroing and Gaussian noise act on
    the first pass only.
    """
    if batches == 0:
        return Noise(kind, 0, evaluation_batch)
    an_epoch = math.ceil(train_images / batch)
    evaluation = math.ceil(test_images / evaluation_batch)
    whole = (batches - 1) // an_epoch
    passes = evaluation + batches + whole * 2 * evaluation
    # Zeroing and Gaussian noise act on N + 1 passes, restored zeroing on N.
    return Noise(kind, passes - (kind != "restored"), evaluation_batch)


def training_batches(noise: Noise, batch: int, train_images: int, test_images: int) -> int:
    """How many training batches noise lasts for: the inverse of `noise_for`."""
    if noise.passes == 0:
        return 0
    an_epoch = math.ceil(train_images / batch)
    evaluation = math.ceil(test_images / noise.evaluation_batch)
    left = noise.passes + (noise.kind != "restored") - evaluation
    whole, rest = divmod(left, an_epoch + 2 * evaluation)
    return whole * an_epoch + min(rest, an_epoch)


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            "smoke",
            data="digits",
            train_per_class=10,
            test_per_class=10,
            batch=32,
            epochs=12,
            widths={
                "vgg11_bn": 1 / 16,
                "resnet18": 1 / 16,
                "resnet20": 0.5,
                "resnet56": 0.5,
                "conv4": 1 / 8,
            },
            seeds=2,
            warmup=1,
            flatness={"images": 20, "eigenvalues": 5, "directions": 3, "step": 0.1},
        ),
        Profile(
            "demo",
            data="digits",
            train_per_class=15,
            test_per_class=20,
            batch=16,
            epochs=20,
            widths={
                "vgg11_bn": 1 / 4,
                "resnet18": 1 / 8,
                "resnet20": 0.5,
                "resnet56": 0.5,
                "conv4": 1 / 4,
            },
            seeds=3,
            warmup=3,
            flatness={
                "images": 20,
                "eigenvalues": 10,
                "directions": 6,
                "step": 0.05,
                "reach": 0.15,
            },
        ),
        Profile(
            "small",
            data="cifar10",
            train_per_class=1000,
            test_per_class=500,
            epochs=40,
            widths={
                "vgg11_bn": 1 / 4,
                "resnet18": 1 / 4,
                "resnet20": 0.5,
                "resnet56": 0.5,
                "conv4": 1.0,
            },
            seeds=3,
            warmup=3,
            flatness={"images": 256, "step": 0.02, "reach": 0.20},
        ),
        Profile("paper"),
    )
}

ADAM = Config(optimizer="adam", learning_rate=0.001, milestones=(150, 300), epochs=325)
SGD = Config(
    optimizer="sgd",
    learning_rate=0.1,
    momentum=0.9,
    weight_decay=0.0001,
    milestones=(83, 125),
    epochs=165,
    augment=True,
)
VGG11 = ADAM.with_(model="vgg11_bn")
RESNET18 = ADAM.with_(model="resnet18")

VGG_FRACTIONS = (0.3, 0.3, 0.3, 0.9)
VGG_FIRST, VGG_LAST = (3, 4, 5, 6), (150, 150, 150, 275)
RESNET_FRACTIONS = (0.25, 0.4, 0.25, 0.95)
RESNET_FIRST, RESNET_LAST = (7, 8, 9, 10), (150, 150, 170, 275)

NO_PRUNING, SCRATCH, DROPOUT = "No Pruning", "Scratch", "Dropout"
METHODS = {"smallest": "Prune_S", "random": "Prune_R", "largest": "Prune_L"}


def _filters(
    fractions: Iterable[float],
    first: Iterable[int],
    last: Iterable[int],
    period: int,
    target: str,
    score: str,
    norm: bool = True,
) -> FilterPruning:
    epochs = tuple(schedule(a, b, period) for a, b in zip(first, last, strict=True))
    return FilterPruning(tuple(fractions), epochs, score, target, norm=norm)


# Figure 2's six settings of VGG11 are measured for figures 6 and E in the runs other figures share.
FLATNESS = Flatness(epoch=314)
MEASURED = (("smallest", 4), ("smallest", 40), ("random", 40), ("largest", 40))


def _vgg(target: str, period: int, score: str = "l2", norm: bool = True) -> Setting:
    pruning = _filters(VGG_FRACTIONS, VGG_FIRST, VGG_LAST, period, target, score, norm)
    measured = (target, period) in MEASURED and score == "l2" and norm
    flatness = FLATNESS if measured else None
    return Setting("VGG11", METHODS[target], VGG11.with_(pruning=pruning, flatness=flatness))


def _resnet18(
    target: str,
    period: int,
    score: str = "activation",
    fractions: tuple[float, ...] = RESNET_FRACTIONS,
    first: tuple[int, ...] = RESNET_FIRST,
) -> Setting:
    pruning = _filters(fractions, first, RESNET_LAST, period, target, score)
    return Setting("ResNet18", METHODS[target], RESNET18.with_(pruning=pruning))


def _noise(kind: str, batches: int, method: str, evaluation_batch: int = 128) -> Setting:
    noise = noise_for(kind, batches, evaluation_batch=evaluation_batch)
    return Setting("VGG11", method, VGG_PRUNE_WEIGHTS.config.with_(noise=noise))


def _all_convolutions(
    model: str, network: str, layers: int, fraction: float, first: int, last: int, period: int
) -> Setting:
    pruning = _filters(
        [fraction] * layers, [first] * layers, [last] * layers, period, "smallest", "l1"
    )
    return Setting(network, METHODS["smallest"], SGD.with_(model=model, pruning=pruning))


def _table_f1(target: str) -> Setting:
    pruning = _filters((0.7,), (2500,), (3500,), 750, target, "l1")
    return Setting("ResNet18", METHODS[target], TABLE_F1.with_(pruning=pruning))


VGG_NO_PRUNING = Setting("VGG11", NO_PRUNING, VGG11.with_(histograms=True, flatness=FLATNESS))
RESNET_NO_PRUNING = Setting("ResNet18", NO_PRUNING, RESNET18)
VGG_SCRATCH = Setting(
    "VGG11",
    SCRATCH,
    VGG11.with_(pruning=FilterPruning(VGG_FRACTIONS, scratch=True), flatness=FLATNESS),
)
# Figures 5 and D2 mask the weights only: batch norm stays.
VGG_PRUNE_WEIGHTS = _vgg("largest", 40, norm=False)

FIGURE_2_VGG = (
    VGG_NO_PRUNING,
    _vgg("smallest", 4),
    _vgg("smallest", 40),
    _vgg("random", 40),
    _vgg("largest", 40),
    VGG_SCRATCH,
)
FIGURE_2_RESNET = (
    RESNET_NO_PRUNING,
    _resnet18("smallest", 4),
    _resnet18("smallest", 40),
    _resnet18("largest", 40),
)
PERIODS = (4, 20, 40, 60, 100, 200, 300)
FIGURE_3 = tuple(_vgg(target, period) for target in METHODS for period in PERIODS)
FIGURE_4 = tuple(
    _all_convolutions(model, network, layers, 0.1, 40, 100, period)
    for model, network, layers in (
        ("resnet18", "ResNet18", 16),
        ("resnet20", "ResNet20", 18),
        ("resnet56", "ResNet56", 54),
    )
    for period in (30, 60)
)
TABLE_C1_FRACTIONS = (0.25, 0.8, 0.25, 0.95)
TABLE_F1 = Config(
    data="cifar100",
    model="resnet18",
    optimizer="adam",
    learning_rate=0.0001,
    milestones=(2000,),
    epochs=4000,
    augment=True,
)

# The dense layer of conv4 holds 94.3% of its parameters; 90% of it is 85% of the network.
CONV4 = Config(model="conv4", optimizer="adam", learning_rate=0.001, epochs=150)
CONV4_DROPOUT = (0.25, 0.5)
CONV4_FRACTION = 0.9
CONV4_EVENTS = schedule(0, 99, 1)


def _conv4(target: str, fraction: float = CONV4_FRACTION) -> Setting:
    pruning = WeightPruning(("dense",), (fraction,), CONV4_EVENTS, target)
    measured = fraction == CONV4_FRACTION
    return Setting("conv4", METHODS[target], CONV4.with_(pruning=pruning, histograms=measured))


def _dropout(after_pool: float, after_dense: float) -> Setting:
    return Setting("conv4", DROPOUT, CONV4.with_(dropout=(after_pool, after_dense)))


CONV4_NO_PRUNING = Setting("conv4", NO_PRUNING, CONV4)
CONV4_TARGETS = tuple(_conv4(target) for target in METHODS)
FIGURE_R1 = (CONV4_NO_PRUNING, _dropout(*CONV4_DROPOUT), *CONV4_TARGETS)
FIGURE_R3 = (
    CONV4_NO_PRUNING,
    *(
        _conv4(target, fraction)
        for target in METHODS
        for fraction in (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
    ),
)

FIGURES = {
    figure.name: figure
    for figure in (
        Figure(
            "figure-1",
            "What instability is: test accuracy before and after each pruning event",
            seeds=1,
            settings=(_vgg("largest", 40),),
            notebook=f"{TRADEOFF}/figure-1",
        ),
        Figure(
            "figure-2",
            "Less stable pruning, better generalization",
            seeds=10,
            settings=FIGURE_2_VGG + FIGURE_2_RESNET,
            notebook=f"{TRADEOFF}/figure-2",
        ),
        Figure(
            "figure-3",
            "Accuracy and stability by iterative pruning rate",
            seeds=5,
            settings=FIGURE_3,
            notebook=f"{TRADEOFF}/figure-3",
        ),
        Figure(
            "figure-4",
            "Stability, accuracy and generalization gap of three ResNets",
            seeds=10,
            settings=FIGURE_4,
            notebook=f"{TRADEOFF}/figure-4",
        ),
        Figure(
            "figure-5",
            "Noise instead of pruning: zeroing and Gaussian",
            seeds=10,
            settings=(
                VGG_NO_PRUNING,
                VGG_PRUNE_WEIGHTS,
                *(_noise("zeroing", batches, "Zeroing") for batches in (0, 51, 1106)),
                *(_noise("gaussian", batches, "Gaussian") for batches in (0, 51, 1106)),
            ),
            notebook=f"{TRADEOFF}/figure-5",
        ),
        Figure(
            "figure-6",
            "Less stable pruning, flatter minima",
            seeds=10,
            settings=FIGURE_2_VGG,
            notebook=f"{TRADEOFF}/figure-6",
        ),
        Figure(
            "figure-B1",
            "Normalised batch-norm outputs, untrained and trained",
            seeds=1,
            settings=(VGG_NO_PRUNING,),
            notebook=f"{TRADEOFF}/figure-B1",
        ),
        Figure(
            "figure-B2",
            "Figure 2 with filters scored by their expected activation",
            seeds=10,
            settings=(
                VGG_NO_PRUNING,
                _vgg("smallest", 4, "ebn"),
                _vgg("smallest", 40, "ebn"),
                _vgg("largest", 40, "ebn"),
                RESNET_NO_PRUNING,
                *(
                    _resnet18(target, period, "ebn_signed", first=VGG_FIRST)
                    for target, period in (("smallest", 4), ("smallest", 40), ("largest", 40))
                ),
            ),
            notebook=f"{TRADEOFF}/figure-B2",
        ),
        Figure(
            "figure-C1",
            "Stability against accuracy at each iterative pruning rate",
            seeds=5,
            settings=FIGURE_3,
            notebook=f"{TRADEOFF}/figure-3",
        ),
        Figure(
            "figure-C2",
            "Figure 3 with Kendall's tau",
            seeds=5,
            settings=FIGURE_3,
            notebook=f"{TRADEOFF}/figure-3",
        ),
        Figure(
            "figure-C3",
            "All of ResNet18's filters, pruned a little every epoch",
            seeds=10,
            settings=(
                Setting("ResNet18", NO_PRUNING, SGD.with_(model="resnet18")),
                _all_convolutions("resnet18", "ResNet18", 16, 0.06, 24, 100, 1),
                _all_convolutions("resnet18", "ResNet18", 16, 0.10, 24, 100, 1),
            ),
            notebook=f"{TRADEOFF}/figure-C3",
        ),
        Figure(
            "figure-D2",
            "Zeroing for a while, then restoring",
            seeds=10,
            settings=(
                VGG_NO_PRUNING,
                VGG_PRUNE_WEIGHTS,
                *(
                    _noise("restored", batches, "Zeroing", evaluation_batch=256)
                    for batches in (89, 630, 1220, 2480)
                ),
            ),
            notebook=f"{TRADEOFF}/figure-D2",
        ),
        *(
            Figure(
                f"figure-E{number}",
                title,
                seeds=10,
                settings=FIGURE_2_VGG,
                notebook=f"{TRADEOFF}/figure-E",
            )
            for number, title in enumerate(
                (
                    "The leading eigenvalues by setting",
                    "The spectrum by rank",
                    "How far the loss stays low: delta_w",
                    "The loss along the leading eigenvectors",
                    "The information criterion TIC",
                    "Stability and accuracy of all six settings",
                ),
                start=1,
            )
        ),
        Figure(
            "table-C1",
            "More of ResNet18 pruned",
            seeds=10,
            settings=tuple(
                _resnet18(target, period, fractions=TABLE_C1_FRACTIONS)
                for target, period in (("smallest", 4), ("smallest", 40), ("largest", 40))
            ),
            notebook=f"{TRADEOFF}/table-C1",
        ),
        Figure(
            "table-F1",
            "Pruning late in a very long training",
            seeds=10,
            settings=(
                Setting("ResNet18", NO_PRUNING, TABLE_F1),
                Setting(
                    "ResNet18",
                    SCRATCH,
                    TABLE_F1.with_(pruning=FilterPruning((0.7,), target="largest", scratch=True)),
                ),
                _table_f1("smallest"),
                _table_f1("largest"),
            ),
            notebook=f"{TRADEOFF}/table-F1",
        ),
        Figure(
            "figure-R1",
            "Pruning large weights against dropout, by epoch",
            seeds=10,
            settings=FIGURE_R1,
            notebook=f"{REGULARIZATION}/figure-R1",
        ),
        Figure(
            "figure-R2",
            "Pruning large weights against dropout: best accuracy and parameters",
            seeds=10,
            settings=FIGURE_R1,
            notebook=f"{REGULARIZATION}/figure-R2",
        ),
        Figure(
            "figure-R3",
            "Best accuracy by the fraction of the layer removed",
            seeds=10,
            settings=FIGURE_R3,
            notebook=f"{REGULARIZATION}/figure-R3",
        ),
        Figure(
            "figure-R4",
            "Dropout at its best",
            seeds=10,
            settings=(
                CONV4_NO_PRUNING,
                _dropout(CONV4_DROPOUT[0], 0),
                _dropout(0, CONV4_DROPOUT[1]),
                _dropout(*CONV4_DROPOUT),
            ),
            notebook=f"{REGULARIZATION}/figure-R4",
        ),
        Figure(
            "figure-R5",
            "Where the weights went",
            seeds=10,
            settings=CONV4_TARGETS,
            notebook=f"{REGULARIZATION}/figure-R5",
        ),
        Figure(
            "figure-R6",
            "What 85% fewer parameters buys",
            seeds=1,
            settings=(CONV4_NO_PRUNING, *CONV4_TARGETS),
            notebook=f"{REGULARIZATION}/figure-R6",
        ),
    )
}


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
    """The runs of a figure, one row each; settings that a profile makes equal appear once.

    data, seeds (how many), precision: in place of the profile's. Columns: network, method, label,
    rate (percent an event, NaN where nothing is pruned in training), fraction (percent of the
    layer that loses most, 0 where nothing is pruned), seed, run (the identity) and config.
    """
    shown, scale = figure(name), profile(profile_name)
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    count = seeds or min(scale.seeds or shown.seeds, shown.seeds)
    rows = []
    for setting in shown.settings:
        config = scale.scale(setting.config, data, precision)
        rate = pruning_rate(config)
        fractions = config.pruning.fractions if config.pruning is not None else (0,)
        for seed in range(count):
            seeded = config.with_(seed=seed)
            rows.append(
                {
                    "network": setting.network,
                    "method": setting.method,
                    "label": label(setting.method, config),
                    "rate": rate,
                    "fraction": 100 * max(fractions),
                    "seed": seed,
                    "run": seeded.identity,
                    "config": seeded,
                }
            )
    frame = pd.DataFrame(rows)
    same = frame.config.map(lambda c: c.with_(flatness=None, histograms=False).identity)
    return frame[~same.duplicated()].reset_index(drop=True)


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
    """Every setting of a figure, at the paper's scale and at the profile's, side by side.

    One row a setting; the columns have two levels, "paper" and the profile's name.
    """
    shown, scale = figure(name), profile(profile_name)
    count = min(scale.seeds or shown.seeds, shown.seeds)
    columns = {
        "paper": [_described(s.config, shown.seeds) for s in shown.settings],
        profile_name: [
            _described(scale.scale(s.config, data, precision), count) for s in shown.settings
        ],
    }
    index = pd.MultiIndex.from_tuples(
        [(s.network, label(s.method, s.config)) for s in shown.settings],
        names=["network", "setting"],
    )
    frames = {side: pd.DataFrame(rows, index=index) for side, rows in columns.items()}
    return (
        pd.concat(frames, axis=1)
        .swaplevel(axis=1)
        .sort_index(axis=1, level=0, sort_remaining=False)
    )


def _described(config: Config, seeds: int) -> dict[str, object]:
    """A configuration in the words of the papers."""
    pruning = config.pruning
    described = {
        "data": config.data,
        "training images": (config.train_per_class or 0) * 10 or "all",
        "test images": (config.test_per_class or 0) * 10 or "all",
        "augmentation": "crop, flip" if config.augment else "none",
        "network": config.model,
        "width": config.width,
        "optimizer": config.optimizer,
        "learning rate": config.learning_rate,
        "momentum": config.momentum,
        "weight decay": config.weight_decay,
        "batch": config.batch,
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
            f"directions, eps up to {f.reach:g} by {f.step:g}"
        )
    if pruning is None:
        return described
    events = pruning.epochs if isinstance(pruning, FilterPruning) else (pruning.epochs,)
    described["target"] = pruning.target
    described["fractions"] = ", ".join(f"{f:g}" for f in pruning.fractions)
    if isinstance(pruning, FilterPruning):
        described["score"] = pruning.score
        described["held at zero"] = "weights, batch norm" if pruning.norm else "weights"
    else:
        described["layers"] = ", ".join(pruning.layers)
        described["schedule"] = pruning.schedule
    scratch = isinstance(pruning, FilterPruning) and pruning.scratch
    described["event epochs"] = "before training" if scratch else _spans(events)
    described["rate (% an event)"] = round(pruning.rate, 2)
    if config.noise is not None:
        batches = training_batches(config.noise, config.batch, *images_of(config))
        described["noise"] = config.noise.kind
        described["noise lasts"] = f"{batches} training batches, N = {config.noise.passes} passes"
    return described


def _spans(layers: tuple[tuple[int, ...], ...]) -> str:
    """Event epochs by layer, briefly: first to last (events)."""
    return "; ".join(f"{e[0]} to {e[-1]} ({len(e)})" if len(e) > 1 else f"{e[0]}" for e in layers)
