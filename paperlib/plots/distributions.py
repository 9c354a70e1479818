"""Forms for histograms and for shares of a whole."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy.stats import norm

from paperlib.plots.style import BEHIND_TEXT, PALETTE, readable

if TYPE_CHECKING:
    from paperlib.runs import RunRecord

MOMENTS = {"before": ("-", "0.45"), "after": ("--", None), "end": ("-", None)}


def densities(
    figure_axes: list[list[Axes]], columns: Mapping[str, np.ndarray], reach: float
) -> None:
    """Draw a column of histograms a name, the deepest layer on top, over the standard normal.

    Args:
        figure_axes: A row a layer, a column a name.
        columns: Name -> (layers, bins) densities in [-reach, reach], the deepest layer last.
        reach: In standard deviations.
    """
    for column, (name, rows) in enumerate(columns.items()):
        layers, bins = rows.shape
        centers = (np.arange(bins) + 0.5) * 2 * reach / bins - reach
        for row in range(layers):
            ax = figure_axes[row][column]
            ax.fill_between(centers, rows[layers - 1 - row], color=PALETTE["Prune_S"], alpha=0.5)
            ax.plot(centers, norm.pdf(centers), color="black", lw=0.8, label="standard normal")
            ax.set(xlim=(-reach, reach), ylim=(0, 1), yticks=[])
            ax.set_ylabel(f"{layers - row}", rotation=0, labelpad=8)
        figure_axes[0][column].set_title(name)
        figure_axes[-1][column].set_xlabel("normalised output (standard deviations)")
    figure_axes[0][0].legend(loc="upper left", fontsize=6)


def magnitudes(
    ax: Axes,
    edges: np.ndarray,
    counts: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    color: str,
) -> None:
    """Draw histograms of weight magnitudes on a log axis, in percent of the weights at first.

    Args:
        ax: The panel.
        edges: (bins + 1,).
        counts: (bins,) by moment: "before" the first event, "after" the last, at the "end" of
            training, which is filled.
        names: Names of the moments in the legend.
        color: Of the last two.
    """
    whole = counts["before"].sum()
    for moment, (line, shade) in MOMENTS.items():
        values, shade = 100 * counts[moment] / whole, shade or color
        ax.stairs(values, edges, color=shade, ls=line, lw=1.2, label=names[moment])
        if moment == "end":
            ax.stairs(values, edges, color=shade, alpha=0.2, fill=True, lw=0)
    ax.set_xscale("log")
    ax.set(xlabel="weight magnitude", ylabel="weights (%, a bin)")


def weight_counts(
    methods: Mapping[str, str], records: Iterable["RunRecord"], layer: str = "dense"
) -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]:
    """Return histograms of a layer's weight magnitudes, mean over seeds.

    Args:
        methods: Run -> method.
        records: With the arrays "edges" and "MOMENT.LAYER".
        layer: The layer.

    Returns:
        edges (bins + 1,), and by method and moment counts (bins,).
    """
    found: dict[str, list[RunRecord]] = {}
    for record in records:
        found.setdefault(methods[record.run], []).append(record)
    edges = next(iter(found.values()))[0].arrays["edges"]
    counts = {
        method: {m: np.mean([r.arrays[f"{m}.{layer}"] for r in of], axis=0) for m in MOMENTS}
        for method, of in found.items()
    }
    return edges, counts


def common_range(
    edges: np.ndarray, counts: Iterable[np.ndarray], left_out: float = 0.001
) -> tuple[float, float]:
    """Return limits (low, high) that hold all counts but a share of the lowest."""
    total = np.sum(list(counts), axis=0)
    low = np.searchsorted(np.cumsum(total), left_out * total.sum())
    return edges[low], edges[total.nonzero()[0][-1] + 1]


def shares(
    ax: Axes,
    table: pd.DataFrame,
    columns: Mapping[str, str],
    baseline: str,
    colors: Mapping[str, str],
) -> None:
    """Draw each row of a table in percent of its row `baseline`: a bar a row and column.

    The bars are labelled with the values themselves.

    Args:
        ax: The panel.
        table: A row a thing, a column a measure.
        columns: Column of `table` -> its name on the axis.
        baseline: The row that is 100%.
        colors: By row.
    """
    others = [name for name in table.index if name != baseline]
    height = 0.8 / len(others)
    for group, column in enumerate(columns):
        for nth, name in enumerate(others):
            value = table.loc[name, column]
            share = 100 * value / table.loc[baseline, column]
            y = group + (nth - (len(others) - 1) / 2) * height
            label = name if group == 0 else None
            ax.barh(y, share, 0.92 * height, color=colors[name], label=label)
            ax.annotate(
                readable(value),
                (share if share < 80 else max(share, 100), y),  # beside the line, not on it
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=6.5,
                bbox=BEHIND_TEXT,
            )
    ax.axvline(100, color=colors[baseline], lw=1, label=baseline)
    values = table.loc[baseline]
    ticks = [f"{name}\n{baseline}: {readable(values[c])}" for c, name in columns.items()]
    ax.set_yticks(range(len(columns)), ticks, fontsize=7)
    ax.invert_yaxis()
    ax.margins(x=0.2)
    ax.set(xlabel=f"% of {baseline}", xlim=(0, None))
