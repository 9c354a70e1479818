"""Forms with a dot a run: one measure against another, and one measure by setting."""

import re
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paperlib import stats
from paperlib.plots.curves import dynamics
from paperlib.plots.style import NAMES, PANEL, Look, grid, legend_below, looks, p_value, panels
from paperlib.stats import FEWEST


def dots(ax: Axes, x: pd.Series, y: pd.Series, look: Look, label: str = "") -> None:
    """Draw the dots of one setting."""
    shown = {"color": look["color"], "marker": look["marker"], "label": label}
    size = 60 if look["marker"] == "*" else 22  # a star fills little of its box
    ax.scatter(x, y, s=size, edgecolor="white", linewidth=0.5, zorder=3, **shown)


def scatter(
    ax: Axes, runs: pd.DataFrame, x: str, y: str, style: Mapping[str, Look], title: str = ""
) -> None:
    """Draw a dot a run by `label`, and a regression line with its 95% band.

    The title gives Pearson's r and Kendall's tau, or says that there are fewer than three different
    values. If a column events says that some runs had none, it gives r of the others, too. The line
    needs four runs, and its band seven. The y axis is fitted to the dots: the band may leave it.

    Args:
        ax: The panel.
        runs: Columns label, `x` and `y`, a row a run. Runs that lack a value are left out.
        x: The column on the x axis.
        y: The column on the y axis.
        style: The looks by label, as `looks` returns them.
        title: A line above the correlations.
    """
    runs = runs.dropna(subset=[x, y])
    for label, group in runs.groupby("label", sort=False):
        dots(ax, group[x], group[y], style[label], label)
    r, tau = stats.pearson(runs[x], runs[y]), stats.kendall(runs[x], runs[y], resamples=0)
    if np.isnan(r.value):
        words = f"n = {r.n}: fewer than {FEWEST} different values, no correlation"
    else:
        words = (
            f"r = {r.value:.2f} (p = {p_value(r.p)}), $\\tau$ = {tau.value:.2f}"
            f" (p = {p_value(tau.p)}), n = {r.n}"
        )
        inner = runs[runs.events > 0] if "events" in runs else runs
        if 0 < len(inner) < len(runs):
            among = stats.pearson(inner[x], inner[y])
            words += f"\namong networks with events: r = {among.value:.2f}, n = {among.n}"
    if r.n > FEWEST and not np.isnan(r.value):
        limits = ax.get_ylim()
        ci = 95 if r.n > 2 * FEWEST else None
        look = {"scatter": False, "color": "0.35", "line_kws": {"linewidth": 1}}
        sns.regplot(runs, x=x, y=y, ax=ax, ci=ci, seed=0, **look)
        ax.set_ylim(limits)
    ax.set(xlabel=NAMES.get(x, x), ylabel=NAMES.get(y, y))
    ax.set_title("\n".join(filter(None, [title, words])), fontsize=7.5)


def pairs(
    runs: pd.DataFrame, axes: Iterable[tuple[str, str]], by: str = "network", columns: int = 2
) -> Figure:
    """Draw a scatter for each group of runs and each pair of columns.

    Args:
        runs: Columns method, label, `by` and the columns of the pairs, a row a run.
        axes: The pairs (x, y).
        by: The column whose values have panels of their own.
        columns: Panels in a row.
    """
    cells = [(name, group, x, y) for name, group in runs.groupby(by, sort=False) for x, y in axes]
    figure, flat = grid(len(cells), columns)
    style = looks(runs)
    for ax, (name, group, x, y) in zip(flat, cells, strict=True):
        scatter(ax, group, x, y, style, name)
    legend_below(figure)
    return figure


def tradeoff(epochs: pd.DataFrame, runs: pd.DataFrame) -> Figure:
    """Draw mean stability against best accuracy, and test accuracy by epoch; a row a network.

    In the first panel, No Pruning is a dashed line at its mean.
    """
    networks = runs.network.unique()
    figure, axes = panels(len(networks), 2, (PANEL[0] + 0.8, PANEL[1]))
    for (left, right), network in zip(axes, networks, strict=True):
        mine = runs[runs.network == network]
        is_pruned = mine.method != "No Pruning"
        unpruned = mine.best_accuracy[~is_pruned].mean()
        left.axhline(unpruned, color="black", ls="--", lw=1)
        look: Look = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        left.annotate("No Pruning, mean", (1, unpruned), (0, 2), ha="right", fontsize=7, **look)
        scatter(left, mine[is_pruned], "mean_stability", "best_accuracy", looks(mine))
        mean_stability = mine.groupby("label", sort=False).mean_stability.mean()
        names = {label: f"{label} ({value:.1f}%)" for label, value in mean_stability.items()}
        dynamics(right, epochs[epochs.network == network], names=names)
        right.set_title(network)
        # Beside the panel: within it, it would hide how far accuracy falls at the last events.
        right.legend(title="setting (mean stability)", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def by_setting(
    ax: Axes, runs: pd.DataFrame, y: str, names: Mapping[str, str] | None = None
) -> None:
    """Draw a dot a run by `label`, and to its right the mean with its 95% interval.

    Thin lines join the runs of one seed. An interval needs three seeds.

    Args:
        ax: The panel.
        runs: Columns method, label, seed and `y`, a row a run.
        y: The column on the y axis.
        names: Names of labels on the x axis, if they differ.
    """
    style = looks(runs)
    wide = runs.pivot(index="seed", columns="label", values=y)[list(style)]
    means = stats.band(runs, "label", y).set_index("label")
    at = np.arange(len(style))
    shift = 0.3 * (np.arange(len(wide)) + 0.5) / len(wide) - 0.3  # equal values stay apart
    ax.plot(np.add.outer(at, shift), wide.T, color="0.85", lw=0.7, zorder=1)
    for i, (label, look) in enumerate(style.items()):
        dots(ax, i + shift, wide[label], look)
        value, low, high, _ = means.loc[label]
        error, color = [[value - low], [high - value]], look["color"]
        ax.errorbar(i + 0.2, value, error, fmt="_", ms=7, color=color, lw=1.2, capsize=2.5)
    ticks = [(names or {}).get(label, re.sub(r" (?=\d)", "\n", label)) for label in style]
    ax.set_xticks(at, ticks, fontsize=7)
    ax.set(xlim=(-0.5, len(at) - 0.5), ylabel=NAMES[y])
