"""Forms with a line a setting: mean and 95% interval over seeds. An interval needs three seeds."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paperlib import stats
from paperlib.instability import stability
from paperlib.plots.style import LINES, NAMES, Look, focus, grid, legend_below, looks, panels
from paperlib.stats import FEWEST, band

HATCHES = ("", "////", "....", "xxxx")
CORRELATIONS = {"pearson": "Pearson's r", "kendall": "Kendall's $\\tau$"}
INSET_RATES = 4  # rates in the inset of figure 3
ASIDE = 1.05  # factor on x by which the bars of two lines are apart
DIPS = 0.06  # share of the means in figures 5 and D2 that may leave the panels


def lines(
    ax: Axes,
    frame: pd.DataFrame,
    x: str,
    y: str,
    by: str = "label",
    names: Mapping[str, str] | None = None,
    start: float = -np.inf,
    bars: bool = False,
) -> None:
    """Draw the mean of `y` at every `x` and its 95% interval over seeds, a line a setting.

    Intervals are bands, and the y axis is fitted to the means: bands of few seeds may leave it.

    Args:
        ax: The panel.
        frame: Columns method, `by`, `x` and `y`, a row a seed.
        x: The column on the x axis.
        y: The column on the y axis.
        by: The column that names the lines.
        names: Names of lines in the legend, if they differ.
        start: The y axis is fitted to the means from this x on.
        bars: Intervals are bars, side by side on a logarithmic x axis, and the y axis is fitted to
            them.
    """
    shown = [frame[frame[x] >= start].groupby([by, x])[y].mean()]
    for i, (name, look) in enumerate(looks(frame, by).items()):
        line, label = band(frame[frame[by] == name], x, y), (names or {}).get(name, name)
        size: Look = {"linewidth": 1.2, "markersize": 3.5, "markevery": max(1, len(line) // 8)}
        at = line[x] * ASIDE ** (i - 1) if bars else line[x]
        ax.plot(at, line["mean"], label=label, **look, **size)
        if bars:
            ax.vlines(at, line.low, line.high, color=look["color"], linewidth=0.8)
            shown += [line.low, line.high]
        else:
            ax.fill_between(at, line.low, line.high, color=look["color"], alpha=0.15, lw=0)
    ax.set(xlabel=NAMES.get(x, x), ylabel=NAMES.get(y, y))
    focus(ax, pd.concat(shown))


def dynamics(
    ax: Axes,
    epochs: pd.DataFrame,
    y: str = "post",
    names: Mapping[str, str] | None = None,
    start: float | None = None,
) -> None:
    """Draw `lines` by epoch, counted from 1.

    Args:
        ax: The panel.
        epochs: Columns method, label, epoch (0-based) and `y`, a row an epoch of a seed.
        y: The column on the y axis.
        names: As for `lines`.
        start: The y axis is fitted to the epochs from this one on, by default to the last two
            thirds.
    """
    if start is None:
        start = epochs.epoch.max() / 3
    lines(ax, epochs.assign(epoch=epochs.epoch + 1), "epoch", y, names=names, start=start + 1)


def noise(epochs: pd.DataFrame, kinds: Sequence[str], beside: Sequence[str]) -> Figure:
    """Draw Figure 5 or D2: test accuracy by epoch, a panel a duration, at most three in a row.

    The last epoch is left out, since the chosen filters are set to zero for good on it. The panels
    share their axes. The deepest dips may leave them.

    Args:
        epochs: Columns method, label, epoch, seed and post.
        kinds: Methods. Each begins a row.
        beside: Methods that every panel shows.
    """
    epochs = epochs[epochs.epoch < epochs.epoch.max()]
    names: dict[str, str] = {}
    for kind in kinds:
        names |= dict.fromkeys(epochs[epochs.method == kind].label, kind)
    durations = len(names) // len(kinds)
    columns = durations if durations <= 3 else -(-durations // 2)
    figure, axes = grid(len(names), columns, (3, 2.2), sharex=True, sharey=True)
    for ax, label in zip(axes, names, strict=True):
        dynamics(ax, epochs[(epochs.label == label) | epochs.method.isin(beside)], names=names)
        ax.set_title(label)
        ax.label_outer()
    late = epochs[epochs.epoch > epochs.epoch.max() / 3].groupby(["label", "epoch"]).post.mean()
    focus(axes[0], late.clip(lower=late.quantile(DIPS)))
    legend_below(figure, "the number is how long noise lasts, in training batches")
    return figure


def rates(runs: pd.DataFrame, correlation: str = "pearson") -> Figure:
    """Draw Figure 3: accuracy, stability and their correlation by iterative pruning rate.

    Args:
        runs: Columns method, rate, mean_stability and best_accuracy, a row a run.
        correlation: "pearson", or "kendall" for Figure C2.
    """
    figure, [[accuracy, stability, both]] = panels(1, 3)
    lines(accuracy, runs, "rate", "best_accuracy", by="method", bars=True)
    lines(stability, runs, "rate", "mean_stability", by="method", bars=True)
    lowest = sorted(runs.rate.unique())[:INSET_RATES]
    if runs.rate.nunique() > INSET_RATES:
        inside = stability.inset_axes((0.13, 0.12, 0.45, 0.42))
        low = runs[runs.rate.isin(lowest)]
        lines(inside, low, "rate", "mean_stability", by="method", bars=True)
        inside.set(xlabel="", ylabel="")
        _log_axis(inside, lowest, [f"{rate:.2g}" for rate in lowest])
        inside.tick_params(labelsize=6)
    for rate, group in runs.groupby("rate"):
        r = getattr(stats, correlation)(group.mean_stability, group.best_accuracy)
        if np.isnan(r.value):
            words = f"n = {r.n}: fewer than {FEWEST} different values"
            both.annotate(words, (rate, 0), rotation=90, ha="center", va="center", fontsize=6.5)
        else:
            error = [[r.value - r.low], [r.high - r.value]]
            both.errorbar(rate, r.value, error, fmt="o", ms=4, color="0.2", capsize=2, lw=1)
    both.axhline(0, color="0.7", linewidth=0.8)
    ylabel = f"{CORRELATIONS[correlation]}, stability and accuracy"
    both.set(xlabel=NAMES["rate"], ylabel=ylabel, ylim=(-1.05, 1.05))
    for ax in (accuracy, stability, both):
        _log_axis(ax, (1, 3, 10, 30, 90))
    legend_below(figure)
    return figure


def by_fraction(ax: Axes, runs: pd.DataFrame, y: str) -> None:
    """Draw `lines` by the fraction removed, a line a method, on a log axis of the share left.

    Args:
        ax: The panel.
        runs: Columns method, fraction (percent) and `y`. Runs at fraction 0 belong to all lines.
        y: The column on the y axis.
    """
    whole, pruned = runs[runs.fraction == 0], runs[runs.fraction > 0]
    frame = pd.concat([*(whole.assign(method=m) for m in pruned.method.unique()), pruned])
    lines(ax, frame.assign(left=100 - frame.fraction), "left", y, by="method", bars=True)
    removed = sorted(runs.fraction.unique())
    _log_axis(ax, [100 - fraction for fraction in removed], [f"{f:g}" for f in removed])
    ax.set_xlim(110, 0.9 * (100 - removed[-1]))


def _log_axis(ax: Axes, at: Sequence[float], names: Sequence[object] | None = None) -> None:
    """Make x logarithmic, with ticks at some values only."""
    ax.set_xscale("log")
    ax.set_xticks(at, [str(name) for name in names or at])
    ax.minorticks_off()


def events(ax: Axes, epochs: pd.DataFrame, color: str) -> pd.Series:
    """Draw one run's test accuracy just before and just after every event; mark the largest drop.

    Args:
        ax: The panel.
        epochs: The rows of one run.
        color: The color of the line.

    Returns:
        The row of the event with the lowest stability, with a column stability in percent.

    Raises:
        ValueError: The rows are of several runs, or the run has no events with a stability.
    """
    if len(runs := epochs.run.unique()) > 1:
        raise ValueError(f"events are of one run, got {len(runs)}: {', '.join(runs)}")
    frame = epochs.sort_values("epoch").assign(at=epochs.epoch + 1)
    ax.plot(frame["at"].repeat(2), frame[["pre", "post"]].to_numpy().ravel(), color=color, lw=1)
    pruned = frame[frame.trained & (frame.removed > 0)]
    pruned = pruned.assign(stability=stability(pruned.pre, pruned.post)).dropna(subset="stability")
    if pruned.empty:
        raise ValueError("a run without pruning events has no instability to show")
    worst = pruned.loc[pruned.stability.idxmin()]
    drop = f"({worst.pre:.1f} - {worst.post:.1f}) / {worst.pre:.1f}"
    words = f"instability {drop} = {1 - worst.stability / 100:.2f}"
    at = pruned["at"]
    ax.scatter(at, pruned.pre, s=14, color="0.2", label="just before", zorder=3)
    ax.scatter(at, pruned.post, 16, "white", edgecolor=color, label="just after", zorder=3)
    ax.scatter(worst["at"], worst.post, 70, "none", edgecolor="0.2", linewidth=1.2, label=words)
    ax.set(xlabel=NAMES["epoch"], ylabel=NAMES["post"])
    return worst


def bars_by_rank(ax: Axes, spectra: pd.DataFrame, ranks: int) -> None:
    """Draw by label the mean signed eigenvalue of each leading rank with its 95% interval.

    Args:
        ax: The panel.
        spectra: Columns method, label, rank and eigenvalue, a row an eigenvalue.
        ranks: The number of ranks.
    """
    spectra = spectra[spectra["rank"] <= ranks]
    style = looks(spectra)
    width = 0.8 / len(style)
    for i, (label, look) in enumerate(style.items()):
        line = band(spectra[spectra.label == label], "rank", "eigenvalue")
        at = line["rank"] + (i - (len(style) - 1) / 2) * width
        hatch = HATCHES[LINES.index(look["linestyle"])]
        fill = {"color": look["color"], "hatch": hatch, "edgecolor": "white", "linewidth": 0.3}
        ax.bar(at, line["mean"], width, label=label, **fill)
        ax.vlines(at, line.low, line.high, color="black", linewidth=0.6)
    ax.axhline(0, color="0.3", linewidth=0.6)
    ax.set(xlabel=NAMES["rank"], ylabel="eigenvalue", xticks=range(1, ranks + 1))
    focus(ax, [0, *spectra.groupby(["label", "rank"]).eigenvalue.mean()])
