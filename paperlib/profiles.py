"""The profiles: the papers' experiments at four scales.

A profile changes the scale only, never the settings that are compared, though it may leave some
out. One rule shortens every schedule by a factor. It keeps the optimizer steps between events, the
ratio of doses between settings and the steps after the last event as large as the scale allows
(docs/evidence.md).
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from paperlib.config import Config, FilterPruning, Flatness
from paperlib.papers.noise_spans import steps, training_batches, with_noise
from paperlib.papers.settings import METHODS, Figure, Schedule, Setting

TRADEOFF_EPOCHS = 325  # of all networks that the 2020 paper trains with Adam, except Table F1's


@dataclass(frozen=True)
class Profile:
    """A scale to run the settings at. None keeps the paper's value.

    Attributes:
        name: "smoke", "demo", "small" or "paper".
        data: The data set.
        train_per_class: Training images of each class.
        test_per_class: Test images of each class.
        batch: Images of a training step.
        epochs: The length of a run, by the paper's length.
        factors: The divisor of a schedule's epochs, by the paper's length of a run. By default, a
            schedule is shortened as its run is.
        first: The epoch of the first event in every layer of the networks trained with Adam for
            325 epochs.
        widths: The width, by the network's name in a configuration.
        seeds: The number of seeds, at most the paper's; None takes the paper's, 0 the number
            registered for each setting.
        choosing: The number of a setting's choosing seeds; None takes all.
        left_out: Settings that this scale does not show, as (network, name) pairs.
        flatness: The measurement of flatness, for settings that have one.
        alone: Figures that measure nothing beside accuracy, and so share no run with figures that
            do: those runs were made on another device (docs/evidence.md, amendments).
    """

    name: str
    data: str | None = None
    train_per_class: int | None = None
    test_per_class: int | None = None
    batch: int | None = None
    epochs: dict[int, int] = field(default_factory=dict)
    factors: dict[int, float] = field(default_factory=dict)
    first: int | None = None
    widths: dict[str, float] = field(default_factory=dict)
    seeds: int | None = None
    choosing: int | None = None
    left_out: frozenset[tuple[str, str]] = frozenset()
    flatness: Flatness | None = None
    alone: frozenset[str] = frozenset()

    def shown(self, figure: Figure) -> tuple[Setting, ...]:
        """Return the settings of a figure that this scale shows."""
        return tuple(s for s in figure.settings if (s.network, s.name) not in self.left_out)

    def seeds_of(self, figure: Figure, setting: Setting, count: int | None = None) -> range:
        """Return the seeds that compare a setting; `count` replaces the profile's number."""
        if count is None:
            limit = figure.seeds
            count = setting.seeds if self.seeds == 0 else min(self.seeds or limit, limit)
        return range(count)

    def factor(self, length: int) -> float:
        """Return the divisor of a schedule's epochs, from the paper's length of the run."""
        return self.factors.get(length, length / self.epochs.get(length, length))

    def scale(
        self, setting: Setting, data: str | None = None, precision: str | None = None
    ) -> Config:
        """Return a setting's configuration at this scale.

        Args:
            setting: A setting at the paper's scale.
            data: A data set in place of the profile's.
            precision: "bfloat16" or "float32", in place of the paper's float32.
        """
        config, paper = setting.config, setting.schedule
        pruning, noise = config.pruning, config.noise
        if paper is not None and pruning is not None:
            schedule = self.schedule(paper, config.epochs)
            layers: Any = schedule.epochs
            of_filters = isinstance(pruning, FilterPruning)
            pruning = replace(pruning, epochs=layers if of_filters else layers[0])
        small = config.with_(
            data=data or self.data or config.data,
            precision=precision or config.precision,
            train_per_class=self.train_per_class,
            test_per_class=self.test_per_class,
            width=self.widths.get(config.model, config.width),
            epochs=self.epochs.get(config.epochs, config.epochs),
            batch=self.batch or config.batch,
            milestones=tuple(round(m / self.factor(config.epochs)) for m in config.milestones),
            pruning=pruning,
            flatness=config.flatness and (self.flatness or config.flatness),
            noise=None,
        )
        if noise is None or paper is None:
            return small
        # Noise lasts for the same share of the steps from one event to the next.
        share = schedule.period * steps(small) / (paper.period * steps(config))
        batches = training_batches(config)
        batches = max(1, round(batches * share)) if batches else 0
        return with_noise(small, noise.kind, batches, noise.evaluation_batch)

    def schedule(self, paper: Schedule, length: int) -> Schedule:
        """Return a schedule at this scale: its period, first and last epochs are shortened.

        A period is at least 1 epoch. If the profile sets `first`, all layers of the networks
        trained with Adam for 325 epochs start together, because the paper's stagger is short
        against its periods.

        Args:
            paper: The schedule at the paper's scale.
            length: The paper's length of the run, in epochs.
        """
        factor = self.factor(length)
        together = self.first if length == TRADEOFF_EPOCHS else None
        first = (round(epoch / factor) if together is None else together for epoch in paper.first)
        last = (math.floor(epoch / factor) for epoch in paper.last)
        return Schedule(tuple(first), tuple(last), max(1, round(paper.period / factor)))


# Settings that demo does not show: (network, name).
_LEFT_OUT = frozenset(
    [
        *(("VGG11", f"{target} {n}") for target in METHODS for n in (20, 60, 200, 300)),
        *(("VGG11", f"{kind} 51") for kind in ("zeroing", "gaussian")),
        *(("VGG11", f"restored {span}") for span in (630, 1220)),
        *(("ResNet56", f"smallest {period}") for period in (30, 60)),
        *(("conv4", f"{target} {n}") for target in METHODS for n in (0.7, 0.8, 0.95)),
        ("ResNet18", "smallest 4"),
    ]
)

PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            "smoke",
            data="digits",
            train_per_class=10,
            test_per_class=10,
            batch=32,
            epochs={325: 12, 165: 12, 150: 12, 4000: 12},
            first=1,
            widths={
                "vgg11_bn": 1 / 16,
                "resnet18": 1 / 16,
                "resnet20": 0.5,
                "resnet56": 0.5,
                "conv4": 1 / 8,
            },
            seeds=2,
            choosing=1,
            flatness=Flatness(11, images=20, eigenvalues=5, directions=3, step=0.1),
        ),
        # Chosen from some thirty trial runs of one seed. This is the narrowest and shortest scale
        # at which VGG11's pruned networks learn the training images again, with doses a factor of
        # 5.7 apart. Their loss stays above G3's limit. ResNet18 trained with Adam, which keeps 4 of
        # 64 filters, does not recover (G2). ResNet56 is left out: it falls apart in batches of 8.
        Profile(
            "demo",
            data="digits",
            train_per_class=20,
            test_per_class=20,
            batch=8,
            epochs={325: 50, 165: 50, 150: 45, 4000: 80},
            factors={150: 5, 4000: 62.5},
            first=3,
            widths={"vgg11_bn": 1 / 4, "resnet18": 1 / 8, "resnet20": 1 / 2, "conv4": 1 / 4},
            seeds=2,
            choosing=1,
            left_out=_LEFT_OUT,
            flatness=Flatness(
                47, images=20, eigenvalues=10, directions=3, reach=0.08, step=0.004, test_images=100
            ),
        ),
        Profile(
            "small",
            data="cifar10-jpeg",
            train_per_class=1000,
            batch=32,
            epochs={325: 65, 165: 33, 150: 45, 4000: 80},
            factors={150: 5},
            first=3,
            widths={"vgg11_bn": 1 / 4, "resnet18": 1 / 4},
            seeds=0,
            flatness=Flatness(
                62,
                images=256,
                eigenvalues=50,
                directions=5,
                reach=0.1,
                step=0.005,
                test_images=2000,
            ),
            alone=frozenset(
                ("figure-3", "figure-5", "figure-B2", "figure-C1", "figure-C2", "figure-D2")
            ),
        ),
        Profile("paper"),
    )
}
