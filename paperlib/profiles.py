"""The profiles: the papers' experiments at four scales.

A profile changes scale only, never which settings are compared. One rule shortens every schedule by
a factor. It keeps the optimizer steps between events, the ratio of doses between settings and the
steps after the last event as large as the scale allows (docs/evidence.md).
"""

import math
from dataclasses import dataclass, field, replace

from paperlib.config import Config, FilterPruning, Noise
from paperlib.papers.noise_spans import CIFAR_IMAGES, images_of, noise_for, training_batches
from paperlib.papers.settings import METHODS, Figure, Schedule, Setting

TRADEOFF_EPOCHS = 325  # of all networks that the 2020 paper trains with Adam, but Table F1


@dataclass(frozen=True)
class Profile:
    """A scale to run the settings at. None keeps the paper's value.

    Attributes:
        name: "smoke", "demo", "small" or "paper".
        data: the data set.
        train_per_class, test_per_class: images of each class.
        batch: images of a training step.
        epochs: length of a run, by the paper's length; paper's length / `factor` if not listed.
        factors: the factor of a schedule, by the paper's length, where it is not `factor`.
        factor: all epochs of a schedule are divided by it.
        first: the first event of every layer of VGG11 and of the ResNet18 trained with Adam.
        widths: by network.
        seeds: how many; None takes the paper's, 0 the number registered with each setting.
        choosing: how many of a setting's choosing seeds.
        left_out: settings that this scale does not show, as (network, name) pairs.
        flatness: fields of `Flatness` that replace the paper's.
    """

    name: str
    data: str | None = None
    train_per_class: int | None = None
    test_per_class: int | None = None
    batch: int | None = None
    epochs: dict[int, int] = field(default_factory=dict)
    factors: dict[int, float] = field(default_factory=dict)
    factor: float = 1
    first: int | None = None
    widths: dict[str, float] = field(default_factory=dict)
    seeds: int | None = None
    choosing: int | None = None
    left_out: frozenset[tuple[str, str]] = frozenset()
    flatness: dict[str, float] = field(default_factory=dict)

    def shown(self, figure: Figure) -> tuple[Setting, ...]:
        """Return the settings of a figure that this scale shows."""
        return tuple(s for s in figure.settings if (s.network, s.name) not in self.left_out)

    def seeds_of(self, figure: Figure, setting: Setting, count: int | None = None) -> range:
        """Return the seeds of a setting; `count` replaces the profile's number."""
        if count is None:
            limit = figure.seeds
            count = setting.seeds if self.seeds == 0 else min(self.seeds or limit, limit)
        return range(count)

    def choosing_seeds(self, setting: Setting) -> tuple[int, ...]:
        """Return the seeds on which the best of several settings is chosen."""
        return setting.choosing[: self.choosing]

    def scale(
        self, setting: Setting, data: str | None = None, precision: str | None = None
    ) -> Config:
        """Return a setting's configuration at this scale.

        Args:
            setting: at the paper's scale.
            data: replaces the profile's data set.
            precision: replaces the paper's, "float32".
        """
        config = setting.config
        factor = self.factors.get(config.epochs, self.factor)
        epochs = self.epochs.get(config.epochs, round(config.epochs / factor))
        pruning, flatness = config.pruning, config.flatness
        if setting.schedule is not None:
            layers = self.schedule(setting).epochs
            filters = isinstance(pruning, FilterPruning)
            pruning = replace(pruning, epochs=layers if filters else layers[0])
        if flatness is not None:
            epoch = round(flatness.epoch * (epochs - 1) / (config.epochs - 1))
            flatness = replace(flatness, **{"epoch": epoch, **self.flatness})
        small = config.with_(
            data=data or self.data or config.data,
            precision=precision or config.precision,
            train_per_class=self.train_per_class,
            test_per_class=self.test_per_class,
            width=self.widths.get(config.model, config.width),
            epochs=epochs,
            batch=self.batch or config.batch,
            milestones=tuple(round(m / factor) for m in config.milestones),
            pruning=pruning,
            flatness=flatness,
            noise=None,
        )
        return small if config.noise is None else small.with_(noise=self._noise(setting, small))

    def schedule(self, setting: Setting) -> Schedule:
        """Return a setting's schedule at this scale: its period, first and last epochs shortened.

        A period is at least 1 epoch. Where the profile says so, all layers of the networks trained
        by Adam for 325 epochs start together, as the paper's stagger is short against its periods.
        """
        paper, config = setting.schedule, setting.config
        factor = self.factors.get(config.epochs, self.factor)
        if factor == 1:
            return paper
        together = self.first is not None and config.epochs == TRADEOFF_EPOCHS
        first = [self.first if together else round(epoch / factor) for epoch in paper.first]
        last = [math.floor(epoch / factor) for epoch in paper.last]
        return Schedule(tuple(first), tuple(last), max(1, round(paper.period / factor)))

    def _noise(self, setting: Setting, small: Config) -> Noise:
        """Return noise that lasts for the same share of the steps from one event to the next."""
        noise, images = setting.config.noise, images_of(small)
        share = self.schedule(setting).period * steps(small, images[0])
        share /= setting.schedule.period * steps(setting.config, CIFAR_IMAGES[0])
        batches = training_batches(noise, setting.config.batch, *CIFAR_IMAGES)
        scaled = max(1, round(batches * share)) if batches else 0
        return noise_for(noise.kind, scaled, small.batch, *images, noise.evaluation_batch)


def steps(config: Config, train_images: int) -> int:
    """Return the optimizer steps of an epoch."""
    return math.ceil(train_images / config.batch)


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            "smoke",
            data="digits",
            train_per_class=10,
            test_per_class=10,
            batch=32,
            epochs=dict.fromkeys((325, 165, 150, 4000), 12),
            factors={325: 325 / 12, 165: 165 / 12, 150: 150 / 12, 4000: 4000 / 12},
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
            flatness={"images": 20, "eigenvalues": 5, "directions": 3, "step": 0.1},
        ),
        # Chosen from some thirty trial runs of one seed: the narrowest and shortest scale at which
        # VGG11's pruned networks learn the training images again, with doses a factor of 5.7 apart.
        # Their loss stays above G3's, and ResNet18 trained with Adam, which keeps 4 of 64 filters,
        # does not recover (G2). ResNet56 is left out because it falls apart in batches of 8.
        Profile(
            "demo",
            data="digits",
            train_per_class=20,
            test_per_class=20,
            batch=8,
            epochs={150: 45},
            factors={165: 3.3, 150: 5, 4000: 50},
            factor=6.5,
            first=3,
            widths={"vgg11_bn": 1 / 4, "resnet18": 1 / 8, "resnet20": 1 / 2, "conv4": 1 / 4},
            seeds=2,
            choosing=1,
            left_out=frozenset(
                (network, name)
                for network, names in {
                    "VGG11": (
                        *("zeroing 51", "gaussian 51", "restored 630", "restored 1220"),
                        *(f"{t} {period}" for t in METHODS for period in (20, 60, 200, 300)),
                    ),
                    "ResNet18": ("smallest 4",),
                    "ResNet56": ("smallest 30", "smallest 60"),
                    "conv4": [f"{t} {fraction}" for t in METHODS for fraction in (0.7, 0.8, 0.95)],
                }.items()
                for name in names
            ),
            flatness={
                "images": 20,
                "eigenvalues": 10,
                "directions": 3,
                "reach": 0.08,
                "step": 0.004,
                "test_images": 100,
            },
        ),
        Profile(
            "small",
            data="cifar10-jpeg",
            train_per_class=1000,
            batch=32,
            epochs={150: 45},
            factors={4000: 50},
            factor=5,
            first=3,
            widths={"vgg11_bn": 1 / 4, "resnet18": 1 / 4},
            seeds=0,
            flatness={
                "epoch": 62,
                "images": 256,
                "eigenvalues": 50,
                "directions": 5,
                "reach": 0.10,
                "step": 0.005,
                "test_images": 2000,
            },
        ),
        Profile("paper"),
    )
}
