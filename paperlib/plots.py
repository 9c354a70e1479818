"""The few plot forms the figures share, and their one look. Draws from tidy frames, without torch.

One colour a method throughout (the colour-blind-safe palette of Okabe and Ito); rates of a method
are told apart by line style and marker. Sizes in inches, fonts as in print.
"""

import platform
from collections.abc import Iterable
from pathlib import Path, PurePath

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import norm

from paperlib import provenance, stats
from paperlib.instability import stability
from paperlib.runs import figures_path

PALETTE = {
    "No Pruning": "#000000",
    "Prune_S": "#0072B2",
    "Prune_R": "#009E73",
    "Prune_L": "#D55E00",
    "Scratch": "#5F5F5F",
    "Zeroing": "#CC79A7",
    "Gaussian": "#56B4E9",
    "Dropout": "#E69F00",
}
LINES = ("-", "--", ":", "-.")
HATCHES = ("", "////", "....", "xxxx")
MARKERS = ("o", "^", "s", "D")
PANEL = (3.4, 2.7)
BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}
STABILITY = "mean stability (%)"
BEST = "best test accuracy (%)"
GAP = "generalization gap (%)"
FLATNESS = {
    "curvature": "curvature, Tr(H)",
    "noise": "noise, Tr(C)",
    "tic": "TIC, Tr(C) / Tr(H)",
    "delta_w": r"$\delta_w$ (smallest $|\epsilon|$, loss + 0.1)",
}
EPOCH = "epoch"
PACKAGES = ("paperlib", "matplotlib", "numpy", "pandas")


def use_style() -> None:
    """Seaborn's ticks with sizes for print: called once at the top of a notebook."""
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
    rows: int, columns: int, panel: tuple[float, float] = PANEL, **options
) -> tuple[Figure, list[list[Axes]]]:
    """A grid of axes of one size in inches; always a nested list."""
    size = (panel[0] * columns, panel[1] * rows + 0.3)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    return figure, axes.tolist()


def looks(frame: pd.DataFrame) -> dict[str, dict[str, str]]:
    """Colour, line style and marker by `label`: colour tells the method, the rest its rates apart.

    frame: columns label and method, in the order of the legend.
    """
    seen: dict[str, int] = {}
    out = {}
    for label, method in frame[["label", "method"]].drop_duplicates().itertuples(index=False):
        nth = seen.get(method, 0)
        seen[method] = nth + 1
        out[label] = {
            "color": PALETTE[method],
            "linestyle": LINES[nth % len(LINES)],
            "marker": MARKERS[nth % len(MARKERS)],
        }
    return out


def scatter(
    ax: Axes,
    runs: pd.DataFrame,
    x: str,
    y: str,
    style: dict[str, dict[str, str]],
    xlabel: str,
    ylabel: str,
) -> stats.Estimate:
    """A dot a run by `label`, a regression line with its 95% band, Pearson's r and Kendall's tau.

    The line needs four runs.

    Returns Pearson's r with its interval.
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
        sns.regplot(
            runs, x=x, y=y, ax=ax, scatter=False, color="0.35", line_kws={"linewidth": 1}, seed=0
        )
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(
        f"r = {r.value:.2f} (p = {p_value(r.p)}), $\\tau$ = {tau.value:.2f}"
        f" (p = {p_value(tau.p)}), n = {r.n}",
        fontsize=7.5,
    )
    return r


def dynamics(
    ax: Axes,
    epochs: pd.DataFrame,
    style: dict[str, dict[str, str]],
    names: dict[str, str] | None = None,
    y: str = "post",
    ylabel: str = "test accuracy (%)",
) -> None:
    """Mean of `y` by epoch (counted from 1) and its 95% band over seeds, a line a `label`.

    names: what the legend calls a label, where that is more than the label itself.
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


def focus(ax: Axes, values: Iterable[float], margin: float = 0.12) -> None:
    """Limit the y axis to the given values and a margin, so that early epochs may leave it."""
    values = pd.Series(values).dropna()
    low, high = values.min(), values.max()
    room = max(high - low, 0.5) * margin
    ax.set_ylim(low - room, high + room)


def p_value(p: float) -> str:
    """A p-value as it is read: 0.03, 2e-05."""
    return f"{p:.1g}" if p < 0.01 else f"{p:.2f}"


def tradeoff(epochs: pd.DataFrame, runs: pd.DataFrame) -> tuple[Figure, dict[str, stats.Estimate]]:
    """A row a network: mean stability against best accuracy, and test accuracy by epoch.

    No Pruning is in the second panel only. Returns the figure, and Pearson's r by network.
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
    runs: pd.DataFrame, columns: dict[str, str]
) -> tuple[Figure, dict[tuple[str, str], stats.Estimate]]:
    """A row a network, a column a measure: mean stability against it, a dot a run.

    columns: column of `runs` -> its axis label. Returns the figure, and Pearson's r by network
    and column.
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
    runs: pd.DataFrame, axes: Iterable[tuple[str, str]], names: dict[str, str], columns: int = 2
) -> tuple[Figure, dict[tuple[str, str], stats.Estimate]]:
    """A panel a pair of columns (x, y) of `runs`, a dot a run; runs that lack one are left out.

    names: column -> axis label. Returns the figure, and Pearson's r by pair.
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


def bars_by_rank(ax: Axes, spectra: pd.DataFrame, ranks: int, ylabel: str) -> None:
    """Mean eigenvalue, signed, of the leading ranks with its 95% interval, a bar a `label`."""
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


def lines(
    ax: Axes, frame: pd.DataFrame, x: str, y: str, xlabel: str, ylabel: str, log: bool = False
) -> None:
    """Mean of `y` at every `x` (log: on a log axis) and its 95% band over seeds, a line a `label`.

    The axis is fitted to the means: bands of few seeds may leave it.
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


def by_rate(
    ax: Axes, runs: pd.DataFrame, y: str, style: dict[str, dict[str, str]], ylabel: str
) -> None:
    """Mean of `y` and its 95% interval by iterative pruning rate (log axis), a line a method.

    The axis is fitted to the means: intervals of few seeds may leave it.
    """
    lines = {method: stats.band(g, "rate", y) for method, g in runs.groupby("method", sort=False)}
    _bands(ax, lines, "rate", style)
    rate_axis(ax)
    ax.set_ylabel(ylabel)


def by_fraction(
    ax: Axes, runs: pd.DataFrame, y: str, style: dict[str, dict[str, str]], ylabel: str
) -> None:
    """Mean of `y` and its 95% interval by the fraction removed, a line a method.

    runs: `fraction` in percent; the runs at 0 belong to all lines. The axis is logarithmic in what
    is left, and fitted to the means: intervals of few seeds may leave it.
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


def _bands(
    ax: Axes, lines: dict[str, pd.DataFrame], x: str, style: dict[str, dict[str, str]]
) -> None:
    """A line and a band a method, from frames of columns `x`, mean, low and high."""
    for method, line in lines.items():
        look = style[method]
        plain = {"color": look["color"], "marker": look["marker"], "markersize": 3}
        ax.plot(line[x], line["mean"], **plain, linewidth=1.2, label=method)
        ax.fill_between(line[x], line.low, line.high, color=look["color"], alpha=0.15, lw=0)
    focus(ax, pd.concat([line["mean"] for line in lines.values()]), margin=0.3)


def by_setting(
    ax: Axes,
    runs: pd.DataFrame,
    y: str,
    style: dict[str, dict[str, str]],
    ylabel: str,
    names: dict[str, str] | None = None,
) -> None:
    """A dot a run by `label`, and to its right the mean with its 95% interval.

    Thin lines join the runs of one seed. names: what the axis calls a label.
    """
    wide = runs.pivot(index="seed", columns="label", values=y)[runs.label.unique()]
    at = np.arange(wide.shape[1])
    shift = 0.3 * (np.arange(len(wide)) + 0.5) / len(wide) - 0.3  # equal values stay apart
    ax.plot(np.add.outer(at, shift), wide.T, color="0.85", lw=0.7, zorder=1)
    for i, label in enumerate(wide):
        color, marker = style[label]["color"], style[label]["marker"]
        dots = {"s": 18, "color": color, "marker": marker, "edgecolor": "white", "linewidth": 0.5}
        ax.scatter(i + shift, wide[label], **dots, zorder=3)
        mean = stats.mean(wide[label].dropna())
        error = [[mean.value - mean.low], [mean.high - mean.value]] if mean.n > 1 else None
        ax.errorbar(i + 0.2, mean.value, error, fmt="_", ms=7, color=color, lw=1.2, capsize=2.5)
    ax.set_xticks(at, [(names or {}).get(label, label) for label in wide], fontsize=7)
    ax.set(xlim=(-0.5, len(at) - 0.5), ylabel=ylabel)


def differences(ax: Axes, estimates: dict[str, stats.Estimate], xlabel: str) -> None:
    """Paired differences with their intervals, one below the other, and zero."""
    at = np.arange(len(estimates))[::-1]
    ax.axvline(0, color="0.7", linewidth=0.8)
    for y, estimate in zip(at, estimates.values(), strict=True):
        ax.plot([estimate.low, estimate.high], [y, y], color="0.2", lw=1.2)
        ax.plot(estimate.value, y, "o", ms=4.5, color="0.2")
        interval = f" [{estimate.low:+.2f}, {estimate.high:+.2f}]" if estimate.n > 1 else ""
        ax.annotate(
            f"{estimate.value:+.2f}{interval}",
            (estimate.value, y),
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            bbox=BEHIND_TEXT,
        )
    ax.set_yticks(at, list(estimates))
    ax.set(ylim=(-0.5, len(at) - 0.3), xlabel=xlabel)
    ax.spines["left"].set_visible(False)
    ax.tick_params("y", length=0)


def inset_by_rate(
    ax: Axes, runs: pd.DataFrame, y: str, style: dict[str, dict[str, str]], rates: int
) -> None:
    """The lowest rates of `by_rate` once more, larger, in the corner where the lines leave room."""
    inside = ax.inset_axes((0.13, 0.12, 0.45, 0.42))
    low = sorted(runs.rate.unique())[:rates]
    by_rate(inside, runs[runs.rate.isin(low)], y, style, "")
    inside.set_xticks(low, [f"{rate:.2g}" for rate in low])
    inside.set(xlabel="", xlim=(low[0] / 1.2, low[-1] * 1.2))
    inside.tick_params(labelsize=6)


def correlation_by_rate(
    ax: Axes, estimates: dict[float, stats.Estimate], ylabel: str, limit: float = 1.05
) -> None:
    """A correlation with its interval at each iterative pruning rate."""
    rates = list(estimates)
    values = pd.DataFrame([vars(e) for e in estimates.values()], index=rates)
    ax.axhline(0, color="0.7", linewidth=0.8)
    errors = [values.value - values.low, values.high - values.value]
    ax.errorbar(rates, values.value, errors, fmt="o", ms=4, color="0.2", capsize=2, lw=1)
    rate_axis(ax)
    ax.set(ylabel=ylabel, ylim=(-limit, limit))


def rate_axis(ax: Axes) -> None:
    """The logarithmic axis of iterative pruning rates."""
    ax.set_xscale("log")
    ax.set_xticks([1, 3, 10, 30, 90], ["1", "3", "10", "30", "90"])
    ax.minorticks_off()
    ax.set_xlabel("iterative pruning rate (%)")


def events(ax: Axes, epochs: pd.DataFrame, color: str) -> pd.Series:
    """One run's test accuracy just before and just after every event; the largest drop is marked.

    epochs: the rows of one run. Returns the row of the event of lowest stability, with its
    `stability` in percent. Raises ValueError where the run has no events.
    """
    frame = epochs.sort_values("epoch")
    at = (frame.epoch + 1).repeat(2)
    ax.plot(at, frame[["pre", "post"]].to_numpy().ravel(), color=color, lw=1, zorder=2)
    pruned = frame[frame.removed > 0]
    if pruned.empty:
        raise ValueError("a run without pruning events has no instability to show")
    pruned = pruned.assign(stability=stability(pruned.pre, pruned.post), at=pruned.epoch + 1)
    ax.scatter(pruned["at"], pruned.pre, s=14, color="0.2", label="just before", zorder=3)
    open_dots = {"facecolor": "white", "edgecolor": color, "zorder": 3}
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
    ax.set(xlabel=EPOCH, ylabel="test accuracy (%)")
    return worst


def densities(figure_axes: list[list[Axes]], columns: dict[str, np.ndarray], reach: float) -> None:
    """A column of histograms a name, the deepest layer on top, over the standard normal density.

    columns: name -> (layers, bins) densities in [-reach, reach], the deepest layer last.
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


MOMENTS = {"before": ("-", "0.45"), "after": ("--", None), "end": ("-", None)}


def magnitudes(
    ax: Axes, edges: np.ndarray, counts: dict[str, np.ndarray], names: dict[str, str], color: str
) -> None:
    """Histograms of weight magnitudes on a log axis, as percent of the weights that were there.

    edges: (bins + 1,); counts: (bins,) by moment, "before" the first event, "after" the last, at
    the "end" of training; what is left of "before" is filled at the end. names: in the legend.
    """
    whole = counts["before"].sum()
    for moment, (line, shade) in MOMENTS.items():
        values, shade = 100 * counts[moment] / whole, shade or color
        ax.stairs(values, edges, color=shade, ls=line, lw=1.2, label=names[moment])
        if moment == "end":
            ax.stairs(values, edges, color=shade, alpha=0.2, fill=True, lw=0)
    ax.set_xscale("log")
    ax.set(xlabel="weight magnitude", ylabel="weights (%, a bin)")


def common_range(edges: np.ndarray, counts: Iterable[np.ndarray], left_out: float = 0.001) -> tuple:
    """Limits that hold all but a share of the counts below, and all above: (low, high)."""
    total = np.sum(list(counts), axis=0)
    low = np.searchsorted(np.cumsum(total), left_out * total.sum())
    return edges[low], edges[total.nonzero()[0][-1] + 1]


def shares(
    ax: Axes,
    table: pd.DataFrame,
    columns: dict[str, str],
    baseline: str,
    colors: dict[str, str],
) -> None:
    """What each row of a table is of its row `baseline`, in percent: a bar a row and column.

    columns: column of `table` -> what the axis calls it; colors: by row. The bars are labelled
    with the values themselves.
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


def readable(value: float) -> str:
    """A number of any size in few characters: 0.34, 27.1, 189,175."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def stamp(figure: Figure, words: str) -> None:
    """Say on the figure's face what it shows."""
    figure.suptitle(words, x=0.995, ha="right", fontsize=7, color="0.4")


def save(
    figure: Figure,
    name: str,
    profile: str,
    plan: pd.DataFrame,
    note: str = "",
    folder: Path | None = None,
) -> list[Path]:
    """Stamp the figure and write FOLDER/PROFILE/NAME.pdf and .png; returns both paths.

    plan: the runs it shows, for its number of seeds, data and precision. Its face and the metadata
    say profile, seeds, data, precision where it is reduced, and note; the metadata the commit and
    versions too.
    """
    words = _about(profile, plan, note)
    stamp(figure, words)
    versions = {"commit": provenance.commit(), "python": platform.python_version()}
    versions |= {package: provenance.version(package) for package in PACKAGES}
    words = "; ".join([words, *(f"{key} {value}" for key, value in versions.items() if value)])
    target = _folder(profile, folder)
    paths = [target / f"{name}.pdf", target / f"{name}.png"]
    figure.savefig(paths[0], metadata={"Title": name, "Subject": words})
    figure.savefig(paths[1], metadata={"Title": name, "Description": words})
    return paths


def save_table(
    frame: pd.DataFrame,
    name: str,
    profile: str,
    plan: pd.DataFrame,
    note: str = "",
    folder: Path | None = None,
) -> list[Path]:
    """Write a table to FOLDER/PROFILE/NAME.csv and .tex; returns both paths."""
    target = _folder(profile, folder)
    paths = [target / f"{name}.csv", target / f"{name}.tex"]
    frame.to_csv(paths[0], float_format="%.4f")
    caption = _about(profile, plan, note).replace("%", r"\%").replace("_", r"\_")
    paths[1].write_text(frame.to_latex(float_format="%.2f", caption=caption, escape=True))
    return paths


def _about(profile: str, plan: pd.DataFrame, note: str) -> str:
    seeds = plan.seed.nunique()
    config = plan.config.iloc[0]
    data = PurePath(config.data.removeprefix("images:")).name
    precision = "" if config.precision == "float32" else config.precision
    words = [f"profile {profile}", f"{seeds} seed{'s' * (seeds != 1)}", f"data {data}"]
    return ", ".join([*words, *filter(None, [precision, note])])


def _folder(profile: str, folder: Path | None) -> Path:
    target = (folder or figures_path()) / profile
    target.mkdir(parents=True, exist_ok=True)
    return target
