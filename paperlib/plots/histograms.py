"""Forms for histograms and for shares of a whole."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy.stats import norm

from paperlib.plots.style import BEHIND_TEXT, PALETTE

if TYPE_CHECKING:
    from paperlib.runs import RunRecord

LEFT_OUT = 0.001
# Moment -> its name, line style and colour (None: the method's).
MOMENTS = {
    "before": ("before the first event", "-", "0.45"),
    "after": ("after the last", "--", None),
    "end": ("at the end", "-", None),
}


def densities(
    figure_axes: list[list[Axes]], columns: Mapping[str, np.ndarray], reach: float
) -> None:
    """Draw a column of histograms a name, the deepest layer on top, over the standard normal.

    Args:
        figure_axes: A row a layer, a column a name.
        columns: Name -> (layers, bins) densities in [-reach, reach], the deepest layer last.
        reach: The end of the bins, in standard deviations.
    """
    for column, (name, layers) in enumerate(columns.items()):
        half_bin = reach / layers.shape[1]
        centers = np.linspace(half_bin - reach, reach - half_bin, layers.shape[1])
        for row, layer in enumerate(layers[::-1]):
            ax = figure_axes[row][column]
            ax.fill_between(centers, layer, color=PALETTE["Prune_S"], alpha=0.5)
            ax.plot(centers, norm.pdf(centers), color="black", lw=0.8, label="standard normal")
            ax.set(xlim=(-reach, reach), ylim=(0, 1), yticks=[])
            ax.set_ylabel(f"{len(layers) - row}", rotation=0, labelpad=8)
        figure_axes[0][column].set_title(name)
        figure_axes[-1][column].set_xlabel("normalised output (standard deviations)")
    figure_axes[0][0].legend(loc="upper left", fontsize=6)


def magnitudes(
    axes: Iterable[Axes], edges: np.ndarray, counts: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """Draw histograms of weight magnitudes on log axes, in percent of the weights that are left.

    The axes show all counts except the lowest magnitudes, a share of `LEFT_OUT`.

    Args:
        axes: The panels, one a method.
        edges: The edges of the bins (bins + 1,).
        counts: Counts (bins,) by method and by moment of `MOMENTS`. The last moment is filled.
    """
    total = np.sum([bins for found in counts.values() for bins in found.values()], axis=0)
    low = np.searchsorted(np.cumsum(total), LEFT_OUT * total.sum())
    limits = edges[low], edges[total.nonzero()[0][-1] + 1]
    for ax, (method, found) in zip(axes, counts.items(), strict=True):
        color = PALETTE[method]
        for moment, (name, line, shade) in MOMENTS.items():
            percent = 100 * found[moment] / found[moment].sum()
            ax.stairs(percent, edges, color=shade or color, ls=line, lw=1.2, label=name)
        ax.stairs(percent, edges, color=color, alpha=0.2, fill=True, lw=0)
        ax.set(xscale="log", xlabel="weight magnitude", ylabel="weights left (%, a bin)")
        ax.set(title=method, xlim=limits)
        ax.legend(loc="upper left")


def weight_counts(
    methods: Mapping[str, str], records: Iterable["RunRecord"]
) -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]:
    """Return histograms of the dense layer's weight magnitudes, mean over seeds.

    Args:
        methods: Run -> method.
        records: Records with the arrays "edges" and "MOMENT.dense".

    Returns:
        The edges (bins + 1,), and counts (bins,) by method and moment.
    """
    found: dict[str, list[RunRecord]] = {}
    for record in records:
        found.setdefault(methods[record.run], []).append(record)
    counts = {
        method: {m: np.mean([r.arrays[f"{m}.dense"] for r in of], axis=0) for m in MOMENTS}
        for method, of in found.items()
    }
    return record.arrays["edges"], counts


def shares(
    ax: Axes, table: pd.DataFrame, columns: Mapping[str, str], colors: Mapping[str, str]
) -> None:
    """Draw each row of a table in percent of its first row: a bar a row and column.

    The bars are labelled with the values themselves.

    Args:
        ax: The panel.
        table: A row for each of the things compared, a column a measure.
        columns: Column of `table` -> its name on the axis.
        colors: Row of `table` -> its colour.
    """
    baseline, *others = table.index
    whole, measures = table.iloc[0], list(columns)
    height = 0.8 / len(others)
    for i, name in enumerate(others):
        values = table.loc[name, measures]
        at = np.arange(len(columns)) + (i - (len(others) - 1) / 2) * height
        percent = 100 * values / whole[measures]
        bars = ax.barh(at, percent, height, color=colors[name], label=name)
        labels = [_readable(value) for value in values]
        ax.bar_label(bars, labels, padding=3, fontsize=6.5, bbox=BEHIND_TEXT)
    ax.axvline(100, color=colors[baseline], lw=1, label=baseline)
    ticks = [f"{name}\n{baseline}: {_readable(whole[c])}" for c, name in columns.items()]
    ax.set_yticks(range(len(columns)), ticks, fontsize=7)
    ax.invert_yaxis()
    ax.margins(x=0.2)
    ax.set(xlabel=f"% of {baseline}", xlim=(0, None))


def _readable(value: float) -> str:
    """Return a number of any size in few characters: 0.34, 27.1, 189,175."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
