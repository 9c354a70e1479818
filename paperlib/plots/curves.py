"""Forms with a line a setting: by epoch, by iterative pruning rate, by fraction, by rank."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from paperlib import stats
from paperlib.instability import stability
from paperlib.plots.style import (
    ACCURACY,
    BEHIND_TEXT,
    EPOCH,
    HATCHES,
    LINES,
    Look,
    focus,
    looks,
    rate_axis,
)


def dynamics(
    ax: Axes,
    epochs: pd.DataFrame,
    style: Mapping[str, Look],
    names: Mapping[str, str] | None = None,
    y: str = "post",
    ylabel: str = ACCURACY,
) -> None:
    """Draw the mean of `y` by epoch (counted from 1) and its 95% band over seeds, by `label`.

    Args:
        ax: The panel.
        epochs: Columns label, epoch (0-based), seed and `y`.
        style: By label, as `looks` returns it.
        names: Names of labels in the legend, where they differ.
        y: The column.
        ylabel: Axis label.
    """
    for label, group in epochs.groupby("label", sort=False):
        look = style[label]
        line = stats.band(group.assign(epoch=group.epoch + 1), "epoch", y)
        ax.plot(
            line.epoch,
            line["mean"],
            color=look["color"],
            linestyle=look["linestyle"],
            linewidth=1.2,
            marker=look["marker"],
            markersize=3.5,
            markevery=max(1, len(line) // 8),
            label=(names or {}).get(label, label),
        )
        ax.fill_between(line.epoch, line.low, line.high, color=look["color"], alpha=0.15, lw=0)
    ax.set(xlabel=EPOCH, ylabel=ylabel)


def events(ax: Axes, epochs: pd.DataFrame, color: str) -> pd.Series:
    """Draw one run's test accuracy just before and just after every event; mark the largest drop.

    Args:
        ax: The panel.
        epochs: The rows of one run.
        color: Of the line.

    Returns:
        The row of the event of lowest stability, with its `stability` in percent.

    Raises:
        ValueError: The run has no events.
    """
    frame = epochs.sort_values("epoch")
    at = (frame.epoch + 1).repeat(2)
    ax.plot(at, frame[["pre", "post"]].to_numpy().ravel(), color=color, lw=1, zorder=2)
    pruned = frame[frame.removed > 0]
    if pruned.empty:
        raise ValueError("a run without pruning events has no instability to show")
    pruned = pruned.assign(stability=stability(pruned.pre, pruned.post), at=pruned.epoch + 1)
    ax.scatter(pruned["at"], pruned.pre, s=14, color="0.2", label="just before", zorder=3)
    open_dots: dict[str, Any] = {"facecolor": "white", "edgecolor": color, "zorder": 3}
    ax.scatter(pruned["at"], pruned.post, s=16, label="just after", **open_dots)
    worst = pruned.loc[pruned.stability.idxmin()]
    right_half = worst["at"] > (at.min() + at.max()) / 2
    ax.annotate(
        f"instability ({worst.pre:.1f} - {worst.post:.1f}) / {worst.pre:.1f}"
        f" = {1 - worst.stability / 100:.2f}",
        (worst["at"], 0.2 * worst.pre + 0.8 * worst.post),
        (-6 if right_half else 6, 0),
        textcoords="offset points",
        ha="right" if right_half else "left",
        va="center",
        fontsize=7,
        bbox=BEHIND_TEXT,
        zorder=4,
    )
    ax.set(xlabel=EPOCH, ylabel=ACCURACY)
    return worst


def lines(
    ax: Axes, frame: pd.DataFrame, x: str, y: str, xlabel: str, ylabel: str, log: bool = False
) -> None:
    """Draw the mean of `y` at every `x` and its 95% band over seeds, by `label`.

    The axis is fitted to the means: bands of few seeds may leave it.

    Args:
        ax: The panel.
        frame: Columns label, method, `x` and `y`.
        x: The column on the x axis.
        y: The column on the y axis.
        xlabel: Label of the x axis.
        ylabel: Label of the y axis.
        log: Whether y is logarithmic.
    """
    style = looks(frame)
    for label, group in frame.groupby("label", sort=False):
        line = stats.band(group, x, y)
        look = {key: style[label][key] for key in ("color", "linestyle")}
        ax.plot(line[x], line["mean"], **look, linewidth=1.2, label=label)
        ax.fill_between(line[x], line.low, line.high, color=look["color"], alpha=0.12, lw=0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    means = frame.groupby(["label", x])[y].mean()
    if log:
        ax.set(yscale="log", ylim=(means.min() / 1.3, means.max() * 1.3))
    else:
        focus(ax, means)


def by_rate(ax: Axes, runs: pd.DataFrame, y: str, style: Mapping[str, Look], ylabel: str) -> None:
    """Draw the mean of `y` and its 95% interval by iterative pruning rate, a line a method.

    The axis is fitted to the means: intervals of few seeds may leave it.
    """
    lines = {method: stats.band(g, "rate", y) for method, g in runs.groupby("method", sort=False)}
    _bands(ax, lines, "rate", style)
    rate_axis(ax)
    ax.set_ylabel(ylabel)


def inset_by_rate(
    ax: Axes, runs: pd.DataFrame, y: str, style: Mapping[str, Look], rates: int
) -> None:
    """Draw the lowest rates of `by_rate` once more, larger, in the corner that lines leave free."""
    inside = ax.inset_axes((0.13, 0.12, 0.45, 0.42))
    low = sorted(runs.rate.unique())[:rates]
    by_rate(inside, runs[runs.rate.isin(low)], y, style, "")
    inside.set_xticks(low, [f"{rate:.2g}" for rate in low])
    inside.set(xlabel="", xlim=(low[0] / 1.2, low[-1] * 1.2))
    inside.tick_params(labelsize=6)


def correlation_by_rate(
    ax: Axes, estimates: Mapping[float, stats.Estimate], ylabel: str, limit: float = 1.05
) -> None:
    """Draw a correlation with its interval at each iterative pruning rate."""
    rates = list(estimates)
    values = pd.DataFrame([vars(e) for e in estimates.values()], index=rates)
    ax.axhline(0, color="0.7", linewidth=0.8)
    errors = [values.value - values.low, values.high - values.value]
    ax.errorbar(rates, values.value, errors, fmt="o", ms=4, color="0.2", capsize=2, lw=1)
    rate_axis(ax)
    ax.set(ylabel=ylabel, ylim=(-limit, limit))


def by_fraction(
    ax: Axes, runs: pd.DataFrame, y: str, style: Mapping[str, Look], ylabel: str
) -> None:
    """Draw the mean of `y` and its 95% interval by the fraction removed, a line a method.

    The axis is logarithmic in the share that is left. It is fitted to the means: intervals of few
    seeds may leave it.

    Args:
        ax: The panel.
        runs: Columns method, `fraction` in percent and `y`; runs at 0 belong to all lines.
        y: The column.
        style: By method, as `looks` returns it.
        ylabel: Axis label.
    """
    whole, pruned = runs[runs.fraction == 0], runs[runs.fraction > 0]
    lines = {}
    for method, group in pruned.groupby("method", sort=False):
        line = stats.band(pd.concat([whole, group]), "fraction", y)
        lines[method] = line.assign(left=100 - line.fraction)
    _bands(ax, lines, "left", style)
    removed = np.sort(runs.fraction.unique())
    ax.set_xscale("log")
    ax.set_xticks(100 - removed, [f"{fraction:g}" for fraction in removed])
    ax.minorticks_off()
    ax.set_xlim(110, 0.9 * (100 - removed[-1]))
    ax.set(xlabel="weights of the layer removed (%)", ylabel=ylabel)


def _bands(ax: Axes, lines: Mapping[str, pd.DataFrame], x: str, style: Mapping[str, Look]) -> None:
    """Draw a line and a band a method, from frames with columns `x`, mean, low and high."""
    for method, line in lines.items():
        look = style[method]
        plain = {"color": look["color"], "marker": look["marker"], "markersize": 3}
        ax.plot(line[x], line["mean"], **plain, linewidth=1.2, label=method)
        ax.fill_between(line[x], line.low, line.high, color=look["color"], alpha=0.15, lw=0)
    focus(ax, pd.concat([line["mean"] for line in lines.values()]), margin=0.3)


def bars_by_rank(ax: Axes, spectra: pd.DataFrame, ranks: int, ylabel: str) -> None:
    """Draw the mean eigenvalue, signed, of the leading ranks with its 95% interval, by `label`."""
    style = looks(spectra)
    width = 0.8 / len(style)
    for i, (label, group) in enumerate(spectra.groupby("label", sort=False)):
        line = stats.band(group[group["rank"] <= ranks], "rank", "eigenvalue")
        ax.bar(
            line["rank"] + (i - (len(style) - 1) / 2) * width,
            line["mean"],
            width,
            yerr=[line["mean"] - line.low, line.high - line["mean"]],
            error_kw={"linewidth": 0.6},
            color=style[label]["color"],
            hatch=HATCHES[LINES.index(style[label]["linestyle"])],
            edgecolor="white",
            linewidth=0.3,
            label=label,
        )
    ax.axhline(0, color="0.3", linewidth=0.6)
    ax.set(xlabel="rank by magnitude", ylabel=ylabel, xticks=range(1, ranks + 1))
    focus(ax, [0, *spectra[spectra["rank"] <= ranks].groupby(["label", "rank"]).eigenvalue.mean()])
