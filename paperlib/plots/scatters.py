"""Forms with a dot a run: one measure against another, and one measure by setting."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paperlib import stats
from paperlib.plots.curves import dynamics
from paperlib.plots.style import BEST, PANEL, STABILITY, Look, focus, looks, p_value, panels


def scatter(
    ax: Axes,
    runs: pd.DataFrame,
    x: str,
    y: str,
    style: Mapping[str, Look],
    xlabel: str,
    ylabel: str,
) -> stats.Estimate:
    """Draw a dot a run by `label`, and a regression line with its 95% band.

    The title gives Pearson's r and Kendall's tau. The line needs four runs. The axes are fitted to
    the dots: the band of few runs may leave them.

    Args:
        ax: The panel.
        runs: Columns label, `x` and `y`, a row a run.
        x: The column on the x axis.
        y: The column on the y axis.
        style: By label, as `looks` returns it.
        xlabel: Label of the x axis.
        ylabel: Label of the y axis.

    Returns:
        Pearson's r with its interval.
    """
    for label, group in runs.groupby("label", sort=False):
        look = style[label]
        ax.scatter(
            group[x],
            group[y],
            s=22,
            color=look["color"],
            marker=look["marker"],
            edgecolor="white",
            linewidth=0.5,
            label=label,
            zorder=3,
        )
    r, tau = stats.pearson(runs[x], runs[y]), stats.kendall(runs[x], runs[y])
    if r.n > 3 and r.value == r.value:
        limits = ax.get_ylim()
        sns.regplot(
            runs, x=x, y=y, ax=ax, scatter=False, color="0.35", line_kws={"linewidth": 1}, seed=0
        )
        ax.set_ylim(limits)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(
        f"r = {r.value:.2f} (p = {p_value(r.p)}), $\\tau$ = {tau.value:.2f}"
        f" (p = {p_value(tau.p)}), n = {r.n}",
        fontsize=7.5,
    )
    return r


def tradeoff(epochs: pd.DataFrame, runs: pd.DataFrame) -> tuple[Figure, dict[str, stats.Estimate]]:
    """Draw mean stability against best accuracy, and test accuracy by epoch; a row a network.

    No Pruning is in the second panel only.

    Returns:
        The figure, and Pearson's r by network.
    """
    networks = runs.network.unique()
    figure, axes = panels(len(networks), 2, (PANEL[0] + 0.8, PANEL[1]))
    estimates = {}
    for (left, right), network in zip(axes, networks, strict=True):
        mine, lines = runs[runs.network == network], epochs[epochs.network == network]
        style = looks(mine)
        pruned = mine[mine.method != "No Pruning"]
        estimates[network] = scatter(
            left, pruned, "mean_stability", "best_accuracy", style, STABILITY, BEST
        )
        mean_stability = mine.groupby("label", sort=False).mean_stability.mean()
        names = {label: f"{label} ({value:.1f}%)" for label, value in mean_stability.items()}
        dynamics(right, lines, style, names)
        last = lines.epoch.max()
        focus(right, lines[lines.epoch > last / 3].groupby(["label", "epoch"]).post.mean())
        right.set_title(network)
        # Beside the panel: within it, it would hide how far accuracy falls at the last events.
        title = "setting (mean stability)"
        right.legend(title=title, title_fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure, estimates


def stability_against(
    runs: pd.DataFrame, columns: Mapping[str, str]
) -> tuple[Figure, dict[tuple[str, str], stats.Estimate]]:
    """Draw mean stability against other measures: a row a network, a column a measure.

    Args:
        runs: A row a run.
        columns: Column of `runs` -> its axis label.

    Returns:
        The figure, and Pearson's r by network and column.
    """
    networks = runs.network.unique()
    figure, axes = panels(len(networks), len(columns))
    estimates = {}
    for row, network in zip(axes, networks, strict=True):
        mine = runs[runs.network == network]
        for ax, (column, label) in zip(row, columns.items(), strict=True):
            estimates[network, column] = scatter(
                ax, mine, "mean_stability", column, looks(mine), STABILITY, label
            )
        row[0].legend(title=network, title_fontsize=7)
    return figure, estimates


def pairs(
    runs: pd.DataFrame, axes: Iterable[tuple[str, str]], names: Mapping[str, str], columns: int = 2
) -> tuple[Figure, dict[tuple[str, str], stats.Estimate]]:
    """Draw a panel for each pair of columns (x, y) of `runs`; runs that lack one are left out.

    Args:
        runs: A row a run.
        axes: The pairs.
        names: Column -> axis label.
        columns: Panels in a row.

    Returns:
        The figure, and Pearson's r by pair.
    """
    axes = list(axes)
    figure, grid = panels(-(-len(axes) // columns), min(columns, len(axes)))
    style = looks(runs)
    estimates = {}
    for ax, (x, y) in zip([ax for row in grid for ax in row], axes, strict=True):
        there = runs[runs[[x, y]].notna().all(axis=1)]
        estimates[x, y] = scatter(ax, there, x, y, style, names[x], names[y])
    grid[0][0].legend()
    return figure, estimates


def by_setting(
    ax: Axes,
    runs: pd.DataFrame,
    y: str,
    style: Mapping[str, Look],
    ylabel: str,
    names: Mapping[str, str] | None = None,
) -> None:
    """Draw a dot a run by `label`, and to its right the mean with its 95% interval.

    Thin lines join the runs of one seed.

    Args:
        ax: The panel.
        runs: Columns label, seed and `y`, a row a run.
        y: The column.
        style: By label, as `looks` returns it.
        ylabel: Axis label.
        names: Names of labels on the axis, where they differ.
    """
    wide = runs.pivot(index="seed", columns="label", values=y)[runs.label.unique()]
    at = np.arange(wide.shape[1])
    shift = 0.3 * (np.arange(len(wide)) + 0.5) / len(wide) - 0.3  # equal values stay apart
    ax.plot(np.add.outer(at, shift), wide.T, color="0.85", lw=0.7, zorder=1)
    for i, label in enumerate(wide):
        color, marker = style[label]["color"], style[label]["marker"]
        dots: dict[str, Any] = {
            "s": 18,
            "color": color,
            "marker": marker,
            "edgecolor": "white",
            "linewidth": 0.5,
        }
        ax.scatter(i + shift, wide[label], **dots, zorder=3)
        mean = stats.mean(wide[label].dropna())
        error = [[mean.value - mean.low], [mean.high - mean.value]] if mean.n > 1 else None
        ax.errorbar(i + 0.2, mean.value, error, fmt="_", ms=7, color=color, lw=1.2, capsize=2.5)
    ax.set_xticks(at, [(names or {}).get(label, label) for label in wide], fontsize=7)
    ax.set(xlim=(-0.5, len(at) - 0.5), ylabel=ylabel)
