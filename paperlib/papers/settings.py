"""A setting and a figure of a paper, and the names that both papers share."""

from dataclasses import dataclass, replace

from paperlib.config import Config, schedule

NO_PRUNING, SCRATCH, DROPOUT = "No Pruning", "Scratch", "Dropout"
METHODS = {"smallest": "Prune_S", "random": "Prune_R", "largest": "Prune_L"}


@dataclass(frozen=True)
class Schedule:
    """When each layer has its events: every `period` epochs from `first` to `last`, inclusive.

    Attributes:
        first: 0-based epoch of the first event, one entry a layer.
        last: the last epoch that may have an event, one entry a layer.
        period: epochs from one event to the next.
    """

    first: tuple[int, ...]
    last: tuple[int, ...]
    period: int

    @property
    def epochs(self) -> tuple[tuple[int, ...], ...]:
        """The epochs of the events, one tuple a layer."""
        return tuple(
            schedule(a, b, self.period) for a, b in zip(self.first, self.last, strict=True)
        )


@dataclass(frozen=True)
class Setting:
    """One curve or one colour of a figure: a method on a network, at the paper's scale.

    Attributes:
        network: "VGG11", "ResNet18" and so on, as the papers write them.
        method: "No Pruning", "Prune_S" and so on.
        name: a name that is the same at every profile and unique within a network: "none",
            "smallest 40" (target and period in the paper), "zeroing 1106" (kind and span),
            "largest 0.9" (target and fraction), "dropout 0.25/0.5".
        config: the configuration at the paper's scale.
        schedule: when it prunes, at the paper's scale; None where it does not prune in training.
        seeds: how many seeds are registered for profile `small` (docs/evidence.md).
        choosing: seeds on which the best of several settings is chosen, apart from the others.
    """

    network: str
    method: str
    name: str
    config: Config
    schedule: Schedule | None = None
    seeds: int = 5
    choosing: tuple[int, ...] = ()


@dataclass(frozen=True)
class Figure:
    """A figure or table of a paper.

    Attributes:
        name: "figure-2", "table-C1" and so on.
        seeds: how many the paper has.
        settings: its curves and colours.
        title: one line on its content.
        notebook: path under notebooks/, without the extension; a notebook may hold several.
    """

    name: str
    seeds: int
    settings: tuple[Setting, ...]
    title: str
    notebook: str


def seeded(count: int, *settings: Setting) -> tuple[Setting, ...]:
    """Return the same settings with `count` seeds registered for each."""
    return tuple(replace(setting, seeds=count) for setting in settings)
