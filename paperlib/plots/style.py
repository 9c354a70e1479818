"""The one look of all figures: colours, line styles, sizes in inches, fonts as in print.

A method has the same colour and marker in all figures; further settings of it differ in line style
and marker. Colours are from the colour-blind-safe palettes of Okabe and Ito and, for a method of
the user's, of Tol; Scratch is grey.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
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
    "Yours": "#882255",
    "Restored": "#CC79A7",  # zeroing, for a while
}
LINES = ("-", "--", ":", "-.")
MARKERS = dict(zip(PALETTE, "osDv<XPp*>", strict=True))
MORE_MARKERS = "^hd8H"  # of further settings of the methods, in their order
PANEL = (3.4, 2.7)
BEHIND_TEXT: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}
# The label of an axis, by the column that it shows.
NAMES = {
    "mean_stability": "mean stability (%)",
    "best_accuracy": "best test accuracy (%)",
    "accuracy": "test accuracy near the end (%)",
    "gap": "generalization gap (points)",
    "curvature": "curvature, Tr(H)",
    "noise": "noise, Tr(C)",
    "tic": "TIC, Tr(C) / Tr(H)",
    "delta_w": r"$\delta_w$ (smallest $|\epsilon|$, loss + 0.1)",
    "epoch": "epoch",
    "events": "pruning events",
    "parameters": "parameters left",
    "pre": "test accuracy (%)",
    "post": "test accuracy (%)",
    "stability": "stability of an event (%)",
    "rate": "iterative pruning rate (%)",
    "left": "weights of the layer removed (%)",
    "rank": "rank by magnitude",
    "magnitude": "|eigenvalue|",
    "epsilon": r"$\epsilon$ along the eigenvector",
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
            "legend.title_fontsize": 7,
            "legend.frameon": False,
            "pdf.fonttype": 42,
        },
    )


def panels(
    rows: int, columns: int, panel: tuple[float, float] = PANEL, **options: Any
) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure, and a grid of axes of one size in inches as a nested list."""
    size = (panel[0] * columns, panel[1] * rows + 0.3)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    return figure, axes.tolist()


def grid(
    count: int, columns: int, panel: tuple[float, float] = PANEL, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Return a figure, and a list of its `count` panels, at most `columns` in a row."""
    figure, rows = panels(-(-count // columns), min(columns, count), panel, **options)
    axes = [ax for row in rows for ax in row]
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def looks(frame: pd.DataFrame, by: str = "label") -> dict[str, Look]:
    """Return the colour, line style and marker of every setting.

    Args:
        frame: Columns method and `by`, in the order of the legend.
        by: The column that names settings; "method" if a line is a method.
    """
    settings = frame.drop_duplicates([by, "method"])
    # Methods that the papers do not have look like further settings of the user's.
    settings = settings.assign(method=settings.method.where(settings.method.isin(PALETTE), "Yours"))
    found, more = {}, itertools.cycle(MORE_MARKERS)
    of_method = settings.groupby("method").cumcount()
    for label, method, nth in zip(settings[by], settings.method, of_method, strict=True):
        marker = next(more) if nth else MARKERS[method]
        line = LINES[nth % len(LINES)]
        found[label] = {"color": PALETTE[method], "linestyle": line, "marker": marker}
    return found


def focus(ax: Axes, values: Iterable[float]) -> None:
    """Limit the y axis to the given values and a margin. Other values may leave it."""
    series = pd.Series(values, dtype=float).dropna()
    low, high = series.min(), series.max()
    room = 0.12 * max(high - low, 0.5)
    is_log = ax.get_yscale() == "log"
    ax.set_ylim((low / 1.3, high * 1.3) if is_log else (low - room, high + room))


def legend_below(figure: Figure, title: str = "") -> None:
    """Put one legend of all panels below the figure, in as many columns as fit."""
    handles: dict[str, Artist] = {}
    for ax in figure.axes:
        found, names = ax.get_legend_handles_labels()
        handles |= dict(zip(names, found, strict=True))
    columns = max(1, int(figure.get_figwidth() / 1.1))
    entries = list(handles.values()), list(handles)
    figure.legend(*entries, loc="outside lower center", ncols=columns, title=title)


def p_value(p: float) -> str:
    """Return a p-value for people: 0.03, 2e-05."""
    return f"{p:.1g}" if p < 0.01 else f"{p:.2f}"
