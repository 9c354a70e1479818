"""A setting and a figure of a paper, and the names that both papers share."""

from dataclasses import dataclass, replace

from paperlib.config import Config

NO_PRUNING, SCRATCH, DROPOUT = "No Pruning", "Scratch", "Dropout"
METHODS = {"smallest": "Prune_S", "random": "Prune_R", "largest": "Prune_L"}


@dataclass(frozen=True)
class Schedule:
    """A schedule of events: in each layer every `period` epochs from `first` to `last`, inclusive.

    Attributes:
        first: 0-based epoch of the first event, one entry a layer.
        last: The last epoch that may have an event, one entry a layer.
        period: Epochs from one event to the next.
    """

    first: tuple[int, ...]
    last: tuple[int, ...]
    period: int

    @property
    def epochs(self) -> tuple[tuple[int, ...], ...]:
        """The epochs of the events, one tuple a layer."""
        return tuple(
            tuple(range(a, b + 1, self.period)) for a, b in zip(self.first, self.last, strict=True)
        )


@dataclass(frozen=True)
class Setting:
    """One curve or one colour of a figure: a method on a network, at the paper's scale.

    Attributes:
        network: "VGG11", "ResNet18" and so on, as the papers write them.
        method: "No Pruning", "Prune_S" and so on.
        name: The same at every profile, and unique within a network of a figure: "none",
            "smallest 40" (target and period in the paper), "zeroing 1106" (kind and span),
            "largest 0.9" (target and fraction), "dropout 0.25/0.5".
        config: The configuration at the paper's scale.
        schedule: The schedule of events at the paper's scale; None without events in training.
        seeds: The number of seeds registered for profile `small` (docs/evidence.md).
        choosing: Further seeds, on which the best of several settings is chosen.
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
        seeds: The number of seeds in the paper.
        settings: Its curves and colours.
        title: One line on its content.
        notebook: Path under notebooks/, without the extension. A notebook may hold several figures.
    """

    name: str
    seeds: int
    settings: tuple[Setting, ...]
    title: str
    notebook: str


def seeded(count: int, *settings: Setting) -> tuple[Setting, ...]:
    """Return the same settings with `count` seeds registered for each."""
    return tuple(replace(setting, seeds=count) for setting in settings)
