"""Forms for contrasts: differences with their intervals, and the forest plot of the claims."""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paperlib import stats
from paperlib.claims.contrasts import DECIDING
from paperlib.claims.verdicts import DELTA, OTHER_DELTA
from paperlib.plots.style import p_value, panels

POINTS, LOGS = "difference (points of accuracy)", "difference of logarithms"
# Outcomes that are logarithms, and the end of a row's name.
LOG_OUTCOMES = {"log_curvature": ", Tr(H)", "log_noise": ", Tr(C)"}
# Colours of the verdicts that say yes or no, which no method has. All others are grey.
COLORS = {"supported": "#117733", "contradicted": "#AA4499"}
ROW = 0.24  # inches


def differences(ax: Axes, estimates: Mapping[str, stats.Fitted], xlabel: str) -> None:
    """Draw estimates with their intervals, one below the other, and a line at zero."""
    ax.axvline(0, color="0.7", linewidth=0.8)
    for y, e in enumerate(estimates.values()):
        _interval(ax, y, e.value, *e.interval(), "0.2")
    _rows(ax, list(estimates))
    ax.set_xlabel(xlabel)


def forest(claims: pd.DataFrame) -> Figure:
    """Draw the contrasts that decide claims, with their 95% intervals: a forest plot.

    Each claim has a heading with its verdict in words. The grey band is the range of differences
    too small to matter. A claim without contrasts has only its heading.

    Args:
        claims: A row a contrast, as `claims.to_frame` and `Loaded.claims` return it.

    Returns:
        The figure, a panel a unit.
    """
    shown = claims[claims.kind.isin(DECIDING) | claims.kind.isna()]
    is_log = shown.outcome.isin(LOG_OUTCOMES)
    parts = [(POINTS, shown[~is_log]), (LOGS, shown[is_log])]
    parts = [(unit, rows) for unit, rows in parts if len(rows)]
    heights = [rows.kind.count() + rows.claim.nunique() + 1 for _, rows in parts]
    size = (6.4, ROW * sum(heights) / len(heights) + 0.4)
    figure, axes = panels(len(heights), 1, panel=size, height_ratios=heights)
    for [ax], (unit, rows) in zip(axes, parts, strict=True):
        _forest_panel(ax, rows, unit)
    return figure


def _forest_panel(ax: Axes, rows: pd.DataFrame, unit: str) -> None:
    """Draw the contrasts of one unit below the headings of their claims."""
    names: list[str] = []
    headings: dict[int, str] = {}
    ax.axvline(0, color="0.5", linewidth=0.8)
    for claim, group in rows.groupby("claim", sort=False):
        verdict = group.verdict.iloc[0]
        color = COLORS.get(verdict, "0.3")
        headings[len(names)] = color
        names.append(f"{claim}: {verdict} ({group.runs.iloc[0]} runs)")
        delta = DELTA["conv4"] if claim.startswith("R") else OTHER_DELTA
        for row in group[group.kind.notna()].itertuples():
            y = len(names)
            if math.isnan(row.low):
                tested = "" if math.isnan(row.p) else f", p = {p_value(row.p)} by permutation"
                _beside(ax, y, f"{row.estimate:.2f}{tested}")
            else:
                _interval(ax, y, row.estimate, row.low, row.high, color)
                if unit == POINTS:
                    ax.fill_between([-delta, delta], y - 0.5, y + 0.5, color="0.9", lw=0, zorder=0)
            adjusted = ", adjusted for loss" if row.kind == "adjusted" else ""
            names.append(f"{row.contrast}{LOG_OUTCOMES.get(row.outcome, '')}{adjusted}")
    _rows(ax, names)
    for i, color in headings.items():
        ax.get_yticklabels()[i].set(fontweight="bold", color=color)
    if rows.kind.isna().all():
        ax.set(xlim=(-1, 1), xticks=[])
    ax.set_xlabel("no contrast is tested" if rows.kind.isna().all() else unit)


def _interval(ax: Axes, y: float, value: float, low: float, high: float, color: str) -> None:
    """Draw an estimate and its interval, and write its numbers beside the panel."""
    ax.plot([low, high], [y, y], color=color, lw=1.2)
    ax.plot(value, y, "o", ms=4.5, color=color)
    interval = "" if math.isnan(low) else f" [{low:+.2f}, {high:+.2f}]"
    _beside(ax, y, f"{value:+.2f}{interval}")


def _beside(ax: Axes, y: float, words: str) -> None:
    ax.annotate(words, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=7)


def _rows(ax: Axes, names: list[str]) -> None:
    """Name the rows on the y axis, the first on top."""
    ax.set_yticks(np.arange(len(names)), names, fontsize=7)
    ax.set_ylim(len(names) - 0.4, -0.8)
    ax.spines["left"].set_visible(False)
    ax.tick_params("y", length=0)
