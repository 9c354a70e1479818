"""Whole figures of several panels that only one notebook draws."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from paperlib import stats
from paperlib.plots.curves import by_rate, correlation_by_rate, dynamics, inset_by_rate, lines
from paperlib.plots.scatters import scatter
from paperlib.plots.style import BEST, STABILITY, focus, looks, panels, settled

CORRELATIONS = {
    "pearson": (stats.pearson, "Pearson's r, stability and accuracy"),
    "kendall": (stats.kendall, "Kendall's $\\tau$, stability and accuracy"),
}
REACH, DIRECTIONS = 0.13, 9  # of figure E4


def rates(runs: pd.DataFrame, correlation: str = "pearson") -> Figure:
    """Draw Figure 3: accuracy, stability and their correlation by iterative pruning rate.

    Args:
        runs: Columns method, rate, mean_stability and best_accuracy, a row a run.
        correlation: "pearson", or "kendall" for Figure C2.
    """
    measure, ylabel = CORRELATIONS[correlation]
    style = looks(runs, by="method")
    estimates = {
        rate: measure(group.mean_stability, group.best_accuracy)
        for rate, group in runs.groupby("rate")
    }
    figure, [[accuracy, stability, of_both]] = panels(1, 3)
    by_rate(accuracy, runs, "best_accuracy", style, BEST)
    by_rate(stability, runs, "mean_stability", style, STABILITY)
    inset_by_rate(stability, runs, "mean_stability", style, rates=4)
    correlation_by_rate(of_both, estimates, ylabel)
    accuracy.legend()
    return figure


def rate_scatters(runs: pd.DataFrame, columns: int = 4) -> Figure:
    """Draw Figure C1: stability against accuracy, a panel an iterative pruning rate."""
    style = looks(runs, by="method")
    groups = list(runs.assign(label=runs.method).groupby("rate"))
    figure, grid = panels(-(-len(groups) // columns), min(columns, len(groups)))
    axes = [ax for row in grid for ax in row]
    for ax, (rate, group) in zip(axes, groups, strict=False):
        xlabel = f"{STABILITY}, {rate:.2g}% an event"
        scatter(ax, group, "mean_stability", "best_accuracy", style, xlabel, BEST)
    for ax in axes[len(groups) :]:
        ax.remove()
    axes[0].legend()
    return figure


def noise(epochs: pd.DataFrame, kinds: Sequence[str], beside: Sequence[str]) -> Figure:
    """Draw Figure 5 or D2: test accuracy by epoch, a panel a kind of noise.

    The last epoch is left out, since the chosen filters are set to zero for good on it.

    Args:
        epochs: Columns method, label, epoch, seed and post.
        kinds: Methods, one a panel.
        beside: Methods that every panel shows.
    """
    epochs = epochs[epochs.epoch < epochs.epoch.max()]
    figure, [axes] = panels(1, len(kinds))
    for ax, kind in zip(axes, kinds, strict=True):
        shown = epochs[epochs.method.isin([*beside, kind])]
        dynamics(ax, shown, looks(shown))
        focus(ax, settled(shown))
        ax.set_title(kind)
        below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.22), "ncols": 2}
        ax.legend(title="noise in training batches", title_fontsize=7, **below)
    return figure


def early_and_late(epochs: pd.DataFrame) -> Figure:
    """Draw Figure R-1: test accuracy by epoch, and larger after the last pruning event."""
    last, end = epochs[epochs.removed > 0].epoch.max(), epochs.epoch.max()
    figure, [[whole, after]] = panels(1, 2, panel=(3.7, 2.7))
    for ax, start in [(whole, end / 4), (after, (last + end) / 2)]:
        dynamics(ax, epochs, looks(epochs))
        focus(ax, epochs[epochs.epoch >= start].groupby(["label", "epoch"]).post.mean())
    whole.axvline(last + 1, color="0.5", lw=0.8, ls=":", label="last pruning event")
    handles = whole.get_legend_handles_labels()
    after.legend(*handles, loc="upper left", bbox_to_anchor=(1, 1))
    after.set(xlim=(last + 1, end + 1), title="after the last event")
    return figure


def rises(along: pd.DataFrame) -> Figure:
    """Draw Figure E4: how the test loss rises along each leading eigenvector.

    Args:
        along: Columns label, method, direction, epsilon and rise, as `measures.rises` and a plan
            give them.
    """
    along = along[(along.epsilon.abs() < REACH) & (along.direction < DIRECTIONS)]
    rows = -(-along.direction.nunique() // 3)
    figure, grid = panels(rows, 3, panel=(2.3, 1.9), sharey=True)
    axes = [ax for row in grid for ax in row]
    directions = list(along.groupby("direction"))
    for ax, (direction, group) in zip(axes, directions, strict=False):
        lines(ax, group, "epsilon", "rise", "$\\epsilon$ along the eigenvector", "")
        ax.set_title(f"eigenvector {direction}")
    for ax in axes[len(directions) :]:
        ax.remove()
    figure.supylabel("rise of the test loss (nats)", fontsize=8.5)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure
