"""The one look of all figures: colours, line styles, sizes in inches, fonts as in print.

One colour a method throughout (the colour-blind-safe palette of Okabe and Ito). Settings of one
method are told apart by line style and marker.
"""

from collections.abc import Iterable
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Look = dict[str, Any]

PALETTE = {
    "No Pruning": "#000000",
    "Prune_S": "#0072B2",
    "Prune_R": "#009E73",
    "Prune_L": "#D55E00",
    "Scratch": "#5F5F5F",
    "Zeroing": "#CC79A7",
    "Gaussian": "#56B4E9",
    "Dropout": "#E69F00",
    "Yours": "#F0E442",
}
LINES = ("-", "--", ":", "-.")
HATCHES = ("", "////", "....", "xxxx")
MARKERS = ("o", "^", "s", "D")
PANEL = (3.4, 2.7)
BEHIND_TEXT: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}
STABILITY = "mean stability (%)"
ACCURACY = "test accuracy (%)"
BEST = "best test accuracy (%)"
GAP = "generalization gap (%)"
EPOCH = "epoch"
# Axis labels of the measures of a run, by column.
NAMES = {
    "mean_stability": STABILITY,
    "best_accuracy": BEST,
    "accuracy": "test accuracy near the end (%)",
    "gap": GAP,
    "curvature": "curvature, Tr(H)",
    "noise": "noise, Tr(C)",
    "tic": "TIC, Tr(C) / Tr(H)",
    "delta_w": r"$\delta_w$ (smallest $|\epsilon|$, loss + 0.1)",
}


def use_style() -> None:
    """Set seaborn's ticks with sizes for print, and show tables in full.

    Call this once at the top of a notebook.
    """
    for option in ("display.max_colwidth", "display.max_columns", "display.max_rows"):
        pd.set_option(option, None)
    sns.set_theme(
        context="paper",
        style="ticks",
        rc={
            "figure.dpi": 110,
            "savefig.dpi": 200,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 9,
            "axes.labelsize": 8.5,
            "legend.fontsize": 7,
            "legend.frameon": False,
            "pdf.fonttype": 42,
        },
    )


def panels(
    rows: int, columns: int, panel: tuple[float, float] = PANEL, **options: Any
) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure with a grid of axes of one size in inches; the axes as a nested list."""
    size = (panel[0] * columns, panel[1] * rows + 0.3)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    return figure, axes.tolist()


def looks(frame: pd.DataFrame, by: str = "label") -> dict[str, Look]:
    """Return colour, line style and marker of every setting.

    Args:
        frame: Columns method and `by`, in the order of the legend.
        by: The column that names settings; "method" where a line is a method.
    """
    seen: dict[str, int] = {}
    out = {}
    pairs = frame[[by, "method"]].drop_duplicates().to_numpy()
    for label, method in pairs:
        nth = seen.get(method, 0)
        seen[method] = nth + 1
        out[label] = {
            "color": PALETTE[method],
            "linestyle": LINES[nth % len(LINES)],
            "marker": MARKERS[nth % len(MARKERS)],
        }
    return out


def focus(ax: Axes, values: Iterable[float], margin: float = 0.12) -> None:
    """Limit the y axis to the given values and a margin, so that early epochs may leave it."""
    series = pd.Series(values, dtype=float).dropna()
    low, high = series.min(), series.max()
    room = max(high - low, 0.5) * margin
    ax.set_ylim(low - room, high + room)


def settled(epochs: pd.DataFrame, share: float = 1 / 3) -> pd.Series:
    """Return mean test accuracies after the first `share` of the epochs, to `focus` an axis on."""
    late = epochs[epochs.epoch > epochs.epoch.max() * share]
    return late.groupby(["label", "epoch"]).post.mean()


def rate_axis(ax: Axes) -> None:
    """Make x the logarithmic axis of iterative pruning rates."""
    ax.set_xscale("log")
    ax.set_xticks([1, 3, 10, 30, 90], ["1", "3", "10", "30", "90"])
    ax.minorticks_off()
    ax.set_xlabel("iterative pruning rate (%)")


def p_value(p: float) -> str:
    """Return a p-value as it is read: 0.03, 2e-05."""
    return f"{p:.1g}" if p < 0.01 else f"{p:.2f}"


def readable(value: float) -> str:
    """Return a number of any size in few characters: 0.34, 27.1, 189,175."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
