"""Forms for contrasts: differences with their intervals, and the forest plot of the claims."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paperlib import stats
from paperlib.claims.verdicts import DECIDING, DELTA, OTHER_DELTA
from paperlib.plots.style import BEHIND_TEXT, p_value, panels

POINTS, LOGS = "difference (points of accuracy)", "difference of logarithms"
UNITS = {
    "accuracy": POINTS,
    "best_accuracy": POINTS,
    "log_curvature": LOGS,
    "log_noise": LOGS,
    "delta_w": r"difference of $\delta_w$",
}
OUTCOMES = {
    "accuracy": "",
    "best_accuracy": ", best",
    "log_curvature": ", Tr(H)",
    "log_noise": ", Tr(C)",
    "delta_w": "",
}
# Of the verdicts that say yes or no; all others are grey.
COLORS = {"supported": "#0072B2", "contradicted": "#D55E00"}
ROW = 0.26  # inches


def differences(ax: Axes, estimates: Mapping[str, stats.Estimate], xlabel: str) -> None:
    """Draw estimates with their intervals, one below the other, and a line at zero."""
    at = np.arange(len(estimates))[::-1]
    ax.axvline(0, color="0.7", linewidth=0.8)
    for y, e in zip(at, estimates.values(), strict=True):
        _interval(ax, float(y), e.value, e.low, e.high, "0.2")
    _rows(ax, at, list(estimates))
    ax.set_xlabel(xlabel)


def forest(claims: pd.DataFrame, kinds: Sequence[str] = DECIDING) -> Figure:
    """Draw the contrasts of claims with their 95% intervals: a forest plot.

    Each claim has a heading with its verdict in words. The grey band is the range of differences
    too small to matter. A claim without contrasts has its heading only.

    Args:
        claims: A row a contrast, as `claims.to_frame` and `Loaded.claims` give it.
        kinds: The kinds of contrast to show; by default those that decide a verdict.

    Returns:
        The figure, a panel a unit.
    """
    shown = claims[claims.kind.isin(kinds) | claims.kind.isna()]
    shown = shown.assign(unit=shown.outcome.map(UNITS).fillna(POINTS))
    units = {unit: rows for unit, rows in shown.groupby("unit", sort=False) if len(rows)}
    heights = [rows.kind.count() + rows.claim.nunique() + 1 for rows in units.values()] or [1]
    figure, axes = panels(
        len(heights),
        1,
        panel=(6.4, ROW * sum(heights) / len(heights) + 0.4),
        height_ratios=heights,
    )
    for [ax], (unit, rows) in zip(axes, units.items(), strict=False):
        _forest_panel(ax, rows, unit)
    return figure


def _forest_panel(ax: Axes, rows: pd.DataFrame, unit: str) -> None:
    """Draw the contrasts of one unit below the headings of their claims."""
    names: list[str] = []
    headings: list[int] = []
    drawn = []
    for claim, group in rows.groupby("claim", sort=False):
        first = group.iloc[0]
        headings.append(len(names))
        names.append(f"{claim}: {first.verdict} ({first.runs} runs)")
        for row in group[group.kind.notna()].itertuples():
            drawn.append((len(names), claim, first.verdict, row))
            adjusted = ", adjusted for loss" if row.kind == "adjusted" else ""
            names.append(f"{row.contrast}{OUTCOMES.get(row.outcome, '')}{adjusted}")
    at = np.arange(len(names))[::-1]
    ax.axvline(0, color="0.5", linewidth=0.8)
    for i, claim, verdict, row in drawn:
        y, color = float(at[i]), COLORS.get(verdict, "0.3")
        if unit == POINTS and not math.isnan(row.low):
            delta = DELTA["conv4"] if claim.startswith("R") else OTHER_DELTA
            ax.fill_between([-delta, delta], y - 0.5, y + 0.5, color="0.9", lw=0, zorder=0)
        if math.isnan(row.low):
            words = f"{row.estimate:.2f}, p = {p_value(row.p)} by permutation"
            ax.annotate(words, (0, y), ha="center", va="center", fontsize=7, bbox=BEHIND_TEXT)
        else:
            _interval(ax, y, row.estimate, row.low, row.high, color)
    _rows(ax, at, names)
    for i in headings:
        ax.get_yticklabels()[i].set(fontweight="bold", color=COLORS.get(_verdict(names[i]), "0.2"))
    if not drawn:
        ax.set(xlim=(-1, 1), xticks=[])
    ax.set_xlabel(unit if drawn else "no contrast is tested")


def _verdict(heading: str) -> str:
    return heading.partition(": ")[2].partition(" (")[0]


def _interval(ax: Axes, y: float, value: float, low: float, high: float, color: str) -> None:
    """Draw an estimate and its interval, and write its numbers above."""
    ax.plot([low, high], [y, y], color=color, lw=1.2)
    ax.plot(value, y, "o", ms=4.5, color=color)
    interval = "" if math.isnan(low) else f" [{low:+.2f}, {high:+.2f}]"
    ax.annotate(
        f"{value:+.2f}{interval}",
        (value, y),
        (0, 4),
        textcoords="offset points",
        ha="center",
        fontsize=6.5,
        bbox=BEHIND_TEXT | {"pad": 0.2},
    )


def _rows(ax: Axes, at: np.ndarray, names: list[str]) -> None:
    """Name the rows on the y axis, the first on top."""
    ax.set_yticks(at, names, fontsize=7)
    ax.set_ylim(-0.6, len(at) - 0.2)
    ax.spines["left"].set_visible(False)
    ax.tick_params("y", length=0)
