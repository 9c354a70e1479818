"""Widgets to look at runs: any two measures of a figure's network, and a run's history.

The picture is an image in a widget. The kernel draws nothing into the page.
"""

import io
import itertools
from collections.abc import Sequence

import ipywidgets as widgets
import pandas as pd
from matplotlib.figure import Figure

from paperlib import experiments, plots
from paperlib.runs import Store

PLACE = ["profile", "figure", "network"]
MOST_NAMES = 10  # settings in a legend; with more, the legend has methods


def frames(
    profiles: Sequence[str] = ("small", "demo"), store: Store | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the epochs and runs of all figures, for networks whose runs a store has in full.

    So no part of a comparison is shown early. Nothing is trained.

    Args:
        profiles: The profiles to look for.
        store: The store; None for the default one.

    Returns:
        (epochs, runs), each with the columns of `experiments.plan`, profile and figure. Figures of
        one run are left out, and of those in one notebook all but the first. If flatness was
        measured in any run, runs has its measures, too.
    """
    store, plans = store or Store(), []
    names: dict[str, str] = {}
    for name, figure in experiments.FIGURES.items():
        names.setdefault(figure.notebook, name)
    for profile, name in itertools.product(profiles, names.values()):
        plan = experiments.plan(name, profile)
        complete = plan.network.isin(experiments.complete_networks(plan, store))
        if complete.sum() != 1:
            plans.append(plan[complete].assign(profile=profile, figure=name))
    return experiments.frames(pd.concat(plans, ignore_index=True), store)


class Explorer(widgets.VBox):
    """A scatter of two measures that are chosen, and the history of the run that is chosen.

    Attributes:
        place: The choice of a (profile, figure, network). All choices have a `value`.
        x: The choice of the measure on the x axis.
        y: The choice of the measure on the y axis.
        run: The choice of a run.
        picture: The image.
        words: A description of the picture.
    """

    def __init__(self, epochs: pd.DataFrame, runs: pd.DataFrame) -> None:
        """Show the runs of `frames`, or say that there are none."""
        self._epochs, self._runs = epochs, runs
        places = runs[PLACE].drop_duplicates().itertuples(index=False)
        options = [(f"{p.figure}, {p.network}, {p.profile}", tuple(p)) for p in places]
        measured = [c for c in plots.NAMES if c in runs and runs[c].nunique() > 1]
        self.place = widgets.Dropdown(options=options, description="runs of")
        self.x = widgets.Dropdown(options=measured, description="x")
        self.y = widgets.Dropdown(options=measured[1:] + measured[:1], description="y")
        self.run = widgets.Select(description="run", rows=6)
        self.picture, self.words = widgets.Image(format="png"), widgets.HTML()
        choices = [self.place, self.x, self.y, self.run]
        super().__init__([*choices, self.picture, self.words])
        if runs.empty:
            self.words.value = "No figure has all its runs yet: draw one first."
            return
        for choice in choices:
            choice.observe(self._narrow if choice is self.place else self._draw, "value")
        self._narrow()

    @property
    def shown(self) -> pd.DataFrame:
        """The runs of the chosen profile, figure and network."""
        place = pd.Series(self.place.value or ("", "", ""), PLACE)
        return self._runs[(self._runs[PLACE] == place).all(axis=1)]

    def _narrow(self, change: object = None) -> None:
        """Offer the runs of another place."""
        self.run.options = [(f"{r.label}, seed {r.seed}", r.run) for r in self.shown.itertuples()]
        self.run.index = 0

    def _draw(self, change: object = None) -> None:
        if self.run.value is None:
            return
        shown, x, y = self.shown, self.x.value, self.y.value
        chosen = shown[shown.run == self.run.value].iloc[0]
        figure = Figure(figsize=(8.6, 3.1), layout="constrained")
        left, right = figure.subplots(1, 2)
        by = "label" if shown.label.nunique() <= MOST_NAMES else "method"
        in_order = shown.sort_values("method", key=lambda m: m.map(list(plots.PALETTE).index))
        for label, look in plots.looks(in_order, by).items():
            group = shown[shown[by] == label]
            plots.dots(left, group[x], group[y], look, label)
        left.scatter(chosen[x], chosen[y], s=90, facecolor="none", edgecolor="black")
        left.set(xlabel=plots.NAMES[x], ylabel=plots.NAMES[y], title=self.place.label)
        left.legend(loc="upper left", bbox_to_anchor=(1, 1))
        same = ["run", *PLACE]
        history = self._epochs[(self._epochs[same] == chosen[same]).all(axis=1)]
        if chosen.events:
            plots.events(right, history, plots.PALETTE[chosen.method])
        else:
            plots.dynamics(right, history, start=0)
        right.legend()
        right.set_title(f"{chosen.label}, seed {chosen.seed}")
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=110)
        self.picture.value = content.getvalue()
        values = ", ".join(f"{column} {chosen[column]:.4g}" for column in (x, y))
        self.words.value = f"{len(shown)} runs. {chosen.label}, seed {chosen.seed}: {values}."
