"""Widgets to look at runs: any two measures, one network, one profile, and a run's history.

The picture is an image that widgets show, so that nothing is drawn by the kernel into a page.
"""

import io
from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paperlib import experiments, measures, plots
from paperlib.runs import Store

NAMES = {**plots.NAMES, "events": "pruning events", "parameters": "parameters left"}
MOST_NAMES = 10  # of settings in a legend; methods where there are more


def frames(
    profiles: Sequence[str] = ("small", "demo"), store: Store | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the epochs and runs of all figures that a store has. Nothing is trained.

    Args:
        profiles: The profiles to look for.
        store: The default one where None.

    Returns:
        (epochs, runs), each with the columns of `experiments.plan` and profile; runs with the
        measures of flatness where they were measured.
    """
    store = store or Store()
    parts = [
        experiments.plan(name, profile).assign(profile=profile)
        for profile in profiles
        for name in experiments.FIGURES
    ]
    plan = pd.concat(parts, ignore_index=True).drop_duplicates(["profile", "run"])
    runs = store.runs()
    there = plan[plan.run.isin(runs.run)] if len(runs) else plan[:0]
    if there.empty:
        return pd.DataFrame(columns=[*plan, "epoch"]), pd.DataFrame(columns=[*plan, *NAMES])
    epochs = experiments.annotate(store.epochs(), there)
    runs = experiments.annotate(runs, there)
    flat = [r for r, c in zip(there.run, there.config, strict=True) if c.flatness is not None]
    if flat:
        runs = runs.merge(measures.flatness(store.records(flat)), "left", on="run")
    return epochs, runs


class Explorer(widgets.VBox):
    """A scatter of two measures that are chosen, and the history of the run that is chosen.

    Attributes:
        x, y, network, profile, run: The choices, each with a `value`.
        picture: The image.
        words: The same in words.
    """

    def __init__(self, epochs: pd.DataFrame, runs: pd.DataFrame) -> None:
        """Show the runs of `frames`, or say that there are none."""
        self._epochs, self._runs = epochs, runs
        measured = [(_plain(c), c) for c in NAMES if _varies(runs, c)]
        self.x = widgets.Dropdown(options=measured, description="x")
        self.y = widgets.Dropdown(options=measured, description="y")
        self.network = widgets.Dropdown(options=list(runs.network.unique()), description="network")
        self.profile = widgets.Dropdown(options=list(runs.profile.unique()), description="profile")
        self.run = widgets.Select(description="run", rows=6)
        self.picture, self.words = widgets.Image(format="png"), widgets.HTML()
        choices = [self.profile, self.network, self.x, self.y, self.run]
        rows = [widgets.HBox(choices[:2]), widgets.HBox(choices[2:4]), self.run]
        super().__init__([*rows, self.picture, self.words])
        if runs.empty:
            self.words.value = "There are no runs yet: draw a figure first."
            return
        self.x.value, self.y.value = "mean_stability", "best_accuracy"
        self._narrow()
        for choice in choices[:2]:
            choice.observe(self._narrow, "value")
        for choice in choices[2:]:
            choice.observe(self._draw, "value")

    @property
    def shown(self) -> pd.DataFrame:
        """The runs of the network and profile that are chosen."""
        mine = self._runs[self._runs.profile == self.profile.value]
        return mine[mine.network == self.network.value]

    def _narrow(self, change: object = None) -> None:
        """Offer the runs of another network or profile."""
        named = [(f"{r.label}, seed {r.seed}", r.run) for r in self.shown.itertuples()]
        self.run.options = named
        self.run.index = 0 if named else None
        self._draw()

    def _draw(self, change: object = None) -> None:
        shown = self.shown
        if shown.empty or self.run.value is None:
            self.picture.value, self.words.value = b"", "No such runs."
            return
        chosen = shown[shown.run == self.run.value].iloc[0]
        figure = Figure(figsize=(8.6, 3.1), layout="constrained")
        left, right = figure.subplots(1, 2)
        x, y = self.x.value, self.y.value
        _dots(left, shown, chosen, x, y)
        _history(right, self._epochs[self._epochs.run == chosen.run], chosen)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=110)
        self.picture.value = content.getvalue()
        values = ", ".join(f"{_plain(c)} {chosen[c]:.4g}" for c in (x, y))
        self.words.value = f"{len(shown)} runs. {chosen.label}, seed {chosen.seed}: {values}."


def _plain(column: str) -> str:
    """Return a measure's name without LaTeX."""
    return NAMES[column].replace("$", "").replace("\\", "")


def _varies(runs: pd.DataFrame, column: str) -> bool:
    return column in runs and runs[column].nunique() > 1


def _dots(ax: Axes, runs: pd.DataFrame, chosen: pd.Series, x: str, y: str) -> None:
    by = "label" if runs.label.nunique() <= MOST_NAMES else "method"
    style = plots.looks(runs, by)
    for label, group in runs.groupby(by, sort=False):
        look: dict[str, Any] = {key: style[label][key] for key in ("color", "marker")}
        ax.scatter(group[x], group[y], s=20, edgecolor="white", lw=0.5, label=label, **look)
    ring: dict[str, Any] = {"facecolor": "none", "edgecolor": "black", "linewidth": 1.2}
    ax.scatter(chosen[x], chosen[y], s=90, **ring)
    ax.set(xlabel=NAMES[x], ylabel=NAMES[y])
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _history(ax: Axes, epochs: pd.DataFrame, chosen: pd.Series) -> None:
    color = plots.PALETTE[chosen.method]
    if (epochs.removed > 0).any():
        plots.events(ax, epochs, color)
    else:
        ax.plot(epochs.epoch + 1, epochs.post, color=color, lw=1)
        ax.set(xlabel=plots.EPOCH, ylabel=plots.ACCURACY)
    ax.set_title(f"{chosen.label}, seed {chosen.seed}")
