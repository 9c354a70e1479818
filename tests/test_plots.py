"""The plot forms: their pictures on fixed frames, what they say, and their colours."""

import re
from functools import wraps
from itertools import combinations, pairwise

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from paperlib import experiments, plots, provenance, stats
from paperlib.config import Config

IMAGE = {"baseline_dir": "baseline", "style": "default", "tolerance": 1.5}


def picture(test):
    """Compares the figure a test returns with its image in baseline/, given --mpl.

    Releases of matplotlib and FreeType draw text of different size and shape, and the layout
    follows it: so no text, no legends, and axes in fixed places. What is left is the same in
    matplotlib 3.10 and 3.11, while other markers, colours or no bands differ by more than 1.5 (the
    root mean square of 0..255).
    """

    @pytest.mark.mpl_image_compare(**IMAGE, savefig_kwargs={"dpi": 50})
    @wraps(test)
    def drawn():
        plots.use_style()  # after pytest-mpl has reset the style
        plt.rcParams["figure.constrained_layout.use"] = False
        figure = test()
        figure.subplots_adjust(0.05, 0.05, 0.95, 0.95)
        for ax in figure.axes:
            if ax.get_legend():
                ax.get_legend().remove()
        for text in figure.findobj(Text):
            text.set_visible(False)
        return figure

    return drawn


METHODS = {"No Pruning": None, "Prune_S 1%": 1.3, "Prune_S 13%": 13.0, "Prune_L 13%": 13.0}
EPOCHS, SEEDS = 12, 3


@pytest.fixture(autouse=True)
def clean():
    with plt.rc_context():
        plots.use_style()
        yield
    plt.close("all")


def wave(*numbers: float) -> float:
    """Something between -1 and 1 that looks like chance and never changes."""
    return float(
        np.sin(sum(n * k for n, k in zip(numbers, (12.9898, 78.233, 37.719), strict=False)))
    )


def run_frame(networks=("VGG11", "ResNet18")) -> pd.DataFrame:
    """One row a run: the less stable, the better."""
    rows = []
    for i, network in enumerate(networks):
        for j, (label, rate) in enumerate(METHODS.items()):
            for seed in range(SEEDS):
                less = 0.4 * j + 0.2 * wave(i, j, seed)
                rows.append(
                    {
                        "network": network,
                        "method": label.rsplit(" ", label.endswith("%"))[0],
                        "label": label,
                        "rate": rate,
                        "seed": seed,
                        "mean_stability": 100 - less,
                        "best_accuracy": 84 + i + less + 0.2 * wave(seed, j, i),
                        "gap": 16 - i - less + 0.3 * wave(j, seed, i),
                    }
                )
    return pd.DataFrame(rows)


def epoch_frame(runs: pd.DataFrame) -> pd.DataFrame:
    """One row an epoch: accuracy rises, and falls at every third epoch's event."""
    frames = []
    for run in runs.itertuples():
        epoch = np.arange(EPOCHS)
        rise = run.best_accuracy - 30 * np.exp(-epoch / 2)
        removed = np.where((epoch % 3 == 2) & (run.method != "No Pruning"), 4, 0)
        drop = (100 - run.mean_stability) * (removed > 0) * np.where(epoch == 5, 3, 1)
        noise = [0.3 * wave(run.seed, e, run.Index) for e in epoch]
        frames.append(
            pd.DataFrame({"epoch": epoch, "pre": rise + noise, "removed": removed}).assign(
                post=rise + noise - drop,
                network=run.network,
                method=run.method,
                label=run.label,
                seed=run.seed,
            )
        )
    return pd.concat(frames, ignore_index=True)


RATES = (1.3, 6.4, 12.9, 18.0, 45.0, 90.0)


def rate_frame() -> pd.DataFrame:
    """One row a run of each method at each rate."""
    return pd.DataFrame(
        {
            "method": method,
            "rate": rate,
            "seed": seed,
            "mean_stability": 100 - steep * rate**0.5 + 0.3 * wave(i, j, seed),
            "best_accuracy": 85 + 0.1 * steep * j - 0.2 * wave(i, j, seed),
        }
        for i, (method, steep) in enumerate([("Prune_S", 0.3), ("Prune_R", 0.8), ("Prune_L", 1.6)])
        for j, rate in enumerate(RATES)
        for seed in range(SEEDS)
    )


FRACTIONS = (50, 70, 90, 98)


def fraction_frame() -> pd.DataFrame:
    """One row a run of three methods at each fraction, and the unpruned ones."""
    rows = [
        {"method": method, "fraction": fraction, "steep": steep}
        for method, steep in [("Prune_S", 1), ("Prune_R", 2), ("Prune_L", 4)]
        for fraction in FRACTIONS
    ]
    rows.insert(0, {"method": "No Pruning", "fraction": 0, "steep": 0})
    return pd.DataFrame(
        row
        | {
            "label": row["method"],
            "seed": seed,
            "best_accuracy": 80 - row["steep"] * row["fraction"] / 50 + 0.4 * wave(i, seed),
        }
        for i, row in enumerate(rows)
        for seed in range(SEEDS)
    )


EDGES = np.logspace(-4, 0, 41)


def magnitude_counts() -> dict[str, np.ndarray]:
    """Before: a hump; after: its lower half; at the end: the same, spread out."""
    x = np.arange(40)
    before = np.round(1000 * np.exp(-(((x - 25) / 6) ** 2)))
    after = np.where(x < 24, before, 0)
    return {"before": before, "after": after, "end": np.convolve(after, np.ones(9) / 9, "same")}


COSTS = pd.DataFrame(
    {"nonzero": [1000, 150, 150], "bytes": [4321.0, 4321.0, 800.0], "ms": [0.5, 0.6, 0.45]},
    index=["dense", "masked", "compact"],
)
COST_COLORS = {"dense": "black", "masked": "tan", "compact": plots.PALETTE["Prune_L"]}

RUNS = run_frame()
PICTURE_EPOCHS = epoch_frame(RUNS)
BY_RATE = rate_frame()
BY_METHOD = plots.looks(BY_RATE.assign(label=BY_RATE.method))
BY_FRACTION = fraction_frame()
GAINS = {
    "Prune_L - Dropout": stats.Estimate(0.5, 0.2, 0.8, 0.01, 3),
    "Prune_L - Prune_S": stats.Estimate(-0.3, -1.1, 0.5, 0.3, 3),
    "Prune_L - No Pruning": stats.Estimate(0.1, np.nan, np.nan, np.nan, 1),
}


# Pictures


@picture
def test_scatter():
    figure, [[ax]] = plots.panels(1, 1)
    mine = RUNS[(RUNS.network == "VGG11") & (RUNS.method != "No Pruning")]
    style = plots.looks(RUNS)
    plots.scatter(ax, mine, "mean_stability", "best_accuracy", style, plots.STABILITY, plots.BEST)
    return figure


@picture
def test_dynamics():
    figure, [[ax]] = plots.panels(1, 1)
    mine = PICTURE_EPOCHS[PICTURE_EPOCHS.network == "VGG11"]
    plots.dynamics(ax, mine, plots.looks(mine))
    plots.focus(ax, mine[mine.epoch > 4].post)
    ax.legend()
    return figure


@picture
def test_tradeoff():
    return plots.tradeoff(PICTURE_EPOCHS, RUNS)[0]


@picture
def test_stability_against():
    pruned = RUNS[RUNS.method != "No Pruning"]
    columns = {"best_accuracy": plots.BEST, "gap": plots.GAP}
    return plots.stability_against(pruned, columns)[0]


@picture
def test_by_rate():
    figure, [[accuracy, stability]] = plots.panels(1, 2)
    plots.by_rate(accuracy, BY_RATE, "best_accuracy", BY_METHOD, plots.BEST)
    plots.by_rate(stability, BY_RATE, "mean_stability", BY_METHOD, plots.STABILITY)
    plots.inset_by_rate(stability, BY_RATE, "mean_stability", BY_METHOD, rates=4)
    accuracy.legend()
    return figure


@picture
def test_correlation_by_rate():
    figure, [[ax]] = plots.panels(1, 1)
    values = [-0.1, 0.3, -0.4, -0.6, -0.8, -0.7]
    estimates = {
        rate: stats.Estimate(r, r - 0.15, r + 0.1 * i, 0.05, 15)
        for i, (rate, r) in enumerate(zip(RATES, values, strict=True))
    }
    plots.correlation_by_rate(ax, estimates, "Pearson's r")
    return figure


@picture
def test_events():
    figure, [[ax]] = plots.panels(1, 1)
    mine = PICTURE_EPOCHS[(PICTURE_EPOCHS.label == "Prune_L 13%") & (PICTURE_EPOCHS.seed == 0)]
    plots.events(ax, mine[mine.network == "VGG11"], plots.PALETTE["Prune_L"])
    return figure


@picture
def test_densities():
    centers = np.linspace(-5, 5, 41)[:-1] + 0.125

    def layer(mean: float, deviation: float) -> np.ndarray:
        return np.exp(-(((centers - mean) / deviation) ** 2) / 2) / deviation / np.sqrt(2 * np.pi)

    columns = {
        "untrained": np.stack([layer(0, 1), layer(0.1, 1), layer(-0.2, 0.9)]),
        "trained": np.stack([layer(0, 1), layer(-0.5, 0.7), layer(-1, 0.5)]),
    }
    figure, axes = plots.panels(3, 2, panel=(3.4, 0.8), sharex=True)
    plots.densities(axes, columns, reach=5)
    return figure


@picture
def test_by_fraction():
    figure, [[ax]] = plots.panels(1, 1)
    plots.by_fraction(ax, BY_FRACTION, "best_accuracy", plots.looks(BY_FRACTION), plots.BEST)
    return figure


@picture
def test_by_setting():
    figure, [[ax]] = plots.panels(1, 1)
    mine = RUNS[RUNS.network == "VGG11"]
    plots.by_setting(ax, mine, "best_accuracy", plots.looks(mine), plots.BEST)
    return figure


@picture
def test_differences():
    figure, [[ax]] = plots.panels(1, 1)
    plots.differences(ax, GAINS, "points")
    return figure


@picture
def test_magnitudes():
    figure, [[ax]] = plots.panels(1, 1)
    names = {"before": "before", "after": "after", "end": "end"}
    plots.magnitudes(ax, EDGES, magnitude_counts(), names, plots.PALETTE["Prune_L"])
    return figure


@picture
def test_shares():
    figure, [[ax]] = plots.panels(1, 1)
    columns = {"nonzero": "parameters", "bytes": "bytes", "ms": "ms"}
    plots.shares(ax, COSTS, columns, "dense", COST_COLORS)
    return figure


# What a picture says


def spectrum_frame() -> pd.DataFrame:
    """One row an eigenvalue, as `landscape.spectra` and a plan give it."""
    runs = run_frame(("VGG11",))
    ranks = pd.DataFrame({"rank": range(1, 9)})
    frame = runs[["network", "method", "label", "seed"]].merge(ranks, how="cross")
    sizes = [
        (10 + seed + 3 * wave(i, seed)) / rank
        for i, (rank, seed) in enumerate(zip(frame["rank"], frame.seed, strict=True))
    ]
    signs = np.where(frame["rank"] % 3 == 2, -1, 1)
    return frame.assign(magnitude=sizes, eigenvalue=sizes * signs)


@picture
def test_pairs():
    runs = run_frame(("VGG11",))
    runs["curvature"] = 2 * runs.mean_stability + [wave(i) for i in range(len(runs))]
    names = dict.fromkeys(("mean_stability", "curvature", "best_accuracy"), "")
    axes = [("mean_stability", "curvature"), ("curvature", "best_accuracy")]
    return plots.pairs(runs, axes, names)[0]


@picture
def test_bars_by_rank():
    figure, [[ax]] = plots.panels(1, 1)
    plots.bars_by_rank(ax, spectrum_frame(), 5, "")
    return figure


@picture
def test_lines():
    figure, [[linear, log]] = plots.panels(1, 2)
    plots.lines(linear, spectrum_frame(), "rank", "eigenvalue", "", "")
    plots.lines(log, spectrum_frame(), "rank", "magnitude", "", "", log=True)
    return figure


def test_pairs_leave_out_runs_that_lack_a_value():
    runs = run_frame(("VGG11",))
    runs["delta_w"] = np.where(runs.seed == 0, np.nan, runs.mean_stability)
    names = dict.fromkeys(("mean_stability", "delta_w"), "")
    figure, estimates = plots.pairs(runs, [("mean_stability", "delta_w")], names)
    r = estimates["mean_stability", "delta_w"]
    assert r.n == (runs.seed > 0).sum()
    assert r.value == pytest.approx(1)
    assert f"n = {r.n}" in figure.axes[0].get_title()


def test_the_scatter_says_its_correlations():
    _, [[ax]] = plots.panels(1, 1)
    mine = RUNS[RUNS.network == "VGG11"]
    shown = (plots.STABILITY, plots.BEST)
    r = plots.scatter(ax, mine, "mean_stability", "best_accuracy", plots.looks(mine), *shown)
    assert r == stats.pearson(mine.mean_stability, mine.best_accuracy)
    tau = stats.kendall(mine.mean_stability, mine.best_accuracy)
    title = ax.get_title()
    for part in (f"r = {r.value:.2f}", f"= {tau.value:.2f}", f"n = {len(mine)}"):
        assert part in title
    assert (ax.get_xlabel(), ax.get_ylabel()) == shown
    assert len(ax.collections[0].get_offsets()) == SEEDS


@pytest.mark.parametrize("count", [1, 2])
def test_a_scatter_of_too_few_runs(count):
    _, [[ax]] = plots.panels(1, 1)
    few = RUNS[:count]
    r = plots.scatter(ax, few, "mean_stability", "best_accuracy", plots.looks(few), "x", "y")
    assert np.isnan(r.value)
    assert f"n = {count}" in ax.get_title()
    assert not ax.lines


def test_epochs_count_from_1():
    _, [[ax]] = plots.panels(1, 1)
    mine = PICTURE_EPOCHS[PICTURE_EPOCHS.network == "VGG11"]
    plots.dynamics(ax, mine, plots.looks(mine), {"Prune_L 13%": "the long name"})
    for line, label in zip(ax.lines, METHODS, strict=True):
        x, y = line.get_data()
        assert list(x) == list(range(1, EPOCHS + 1))
        expected = mine[mine.label == label].groupby("epoch").post.mean()
        assert list(y) == pytest.approx(expected.tolist())
    names = [text.get_text() for text in ax.legend().get_texts()]
    assert names == [*list(METHODS)[:3], "the long name"]


def test_the_tradeoff_leaves_no_pruning_out_of_its_scatter():
    figure, estimates = plots.tradeoff(PICTURE_EPOCHS, RUNS)
    assert list(estimates) == ["VGG11", "ResNet18"]
    assert [e.n for e in estimates.values()] == [9, 9]
    lines = figure.axes[1]
    assert lines.get_title() == "VGG11"
    stability = RUNS[(RUNS.network == "VGG11") & (RUNS.label == "Prune_L 13%")].mean_stability
    names = [text.get_text() for text in lines.get_legend().get_texts()]
    assert names[0] == "No Pruning (100.0%)"
    assert names[-1] == f"Prune_L 13% ({stability.mean():.1f}%)"


def test_the_event_marked_is_the_least_stable():
    _, [[ax]] = plots.panels(1, 1)
    mine = PICTURE_EPOCHS[(PICTURE_EPOCHS.label == "Prune_L 13%") & (PICTURE_EPOCHS.seed == 0)]
    mine = mine[mine.network == "VGG11"].sample(frac=1, random_state=0)
    worst = plots.events(ax, mine, "red")
    assert worst.epoch == 5
    assert worst.stability == pytest.approx(100 * worst.post / worst.pre)
    before, after = (dots.get_offsets() for dots in ax.collections)
    assert list(before[:, 0]) == list(after[:, 0]) == [3, 6, 9, 12]
    assert (before[:, 1] > after[:, 1]).all()


def test_runs_at_0_belong_to_every_line():
    _, [[ax]] = plots.panels(1, 1)
    plots.by_fraction(ax, BY_FRACTION, "best_accuracy", plots.looks(BY_FRACTION), plots.BEST)
    whole = BY_FRACTION[BY_FRACTION.fraction == 0].best_accuracy.mean()
    assert [line.get_label() for line in ax.lines] == ["Prune_S", "Prune_R", "Prune_L"]
    for line in ax.lines:
        mine = BY_FRACTION[BY_FRACTION.method == line.get_label()]
        means = [whole, *mine.groupby("fraction").best_accuracy.mean()]
        at = dict(zip(*line.get_data(), strict=True))
        expected = dict(zip([100, *(100 - np.array(FRACTIONS))], means, strict=True))
        assert at == pytest.approx(expected)
        assert line.get_color() == plots.PALETTE[line.get_label()]
    assert ax.get_xscale() == "log"
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "50", "70", "90", "98"]
    left, right = ax.get_xlim()
    assert left > 100 > 2 > right  # more removed is further right


def test_a_setting_shows_every_run_and_its_mean():
    _, [[ax]] = plots.panels(1, 1)
    mine = RUNS[RUNS.network == "VGG11"].sample(frac=1, random_state=1)
    order = list(mine.label.unique())
    plots.by_setting(
        ax, mine, "best_accuracy", plots.looks(mine), plots.BEST, {order[1]: "another"}
    )
    names = [order[0], "another", *order[2:]]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == names
    dots = [dots for dots in ax.collections if len(dots.get_offsets()) == SEEDS]
    for i, (label, shown) in enumerate(zip(order, dots, strict=True)):
        values = mine[mine.label == label].set_index("seed").best_accuracy.sort_index()
        x, y = np.array(shown.get_offsets()).T
        assert y.tolist() == values.tolist()
        assert len(set(x)) == SEEDS
        assert np.all(np.abs(x - i) < 0.5)
        estimate = stats.mean(values)
        (bar,) = ax.containers[i].lines[2]
        assert bar.get_segments()[0][:, 1] == pytest.approx([estimate.low, estimate.high])
    joined = ax.lines[:SEEDS]
    for seed, line in enumerate(joined):
        by_label = mine[mine.seed == seed].set_index("label").best_accuracy
        assert line.get_ydata().tolist() == by_label[order].tolist()


def test_a_setting_of_one_run_has_no_interval():
    _, [[ax]] = plots.panels(1, 1)
    one = RUNS[(RUNS.network == "VGG11") & (RUNS.seed == 0)]
    plots.by_setting(ax, one, "best_accuracy", plots.looks(one), plots.BEST)
    assert not any(container.has_yerr for container in ax.containers)


def test_differences_say_their_numbers():
    _, [[ax]] = plots.panels(1, 1)
    plots.differences(ax, GAINS, "points")
    ticks = dict(zip(ax.get_yticks(), [t.get_text() for t in ax.get_yticklabels()], strict=True))
    assert [ticks[y] for y in sorted(ticks, reverse=True)] == list(GAINS)  # the first on top
    shown = [text.get_text() for text in ax.texts]
    assert shown == ["+0.50 [+0.20, +0.80]", "-0.30 [-1.10, +0.50]", "+0.10"]
    dots = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"]
    assert dots == [0.5, -0.3, 0.1]


def test_magnitudes_are_percent_of_what_was_there():
    _, [[ax]] = plots.panels(1, 1)
    counts = magnitude_counts()
    names = {"before": "then", "after": "later", "end": "now"}
    plots.magnitudes(ax, EDGES, counts, names, "red")
    outlines = {
        patch.get_label(): patch for patch in ax.patches if patch.get_label() in names.values()
    }
    assert list(outlines) == ["then", "later", "now"]
    for moment, name in names.items():
        values, edges, _ = outlines[name].get_data()
        assert values == pytest.approx(100 * counts[moment] / counts["before"].sum())
        assert np.array_equal(edges, EDGES)
    assert ax.get_xscale() == "log"


def test_a_common_range_holds_the_counts():
    edges = np.arange(11.0)
    one, other = np.zeros(10), np.zeros(10)
    one[[2, 5]], other[7] = [4, 500], 500
    assert plots.common_range(edges, [one, other], left_out=0.001) == (2, 8)
    assert plots.common_range(edges, [one, other], left_out=0.01) == (5, 8)


def test_shares_say_percent_and_values():
    _, [[ax]] = plots.panels(1, 1)
    plots.shares(ax, COSTS, {"bytes": "size", "ms": "time"}, "dense", COST_COLORS)
    bars = {bars.get_label(): [bar.get_width() for bar in bars] for bars in ax.containers[:2]}
    assert bars == {"masked": [pytest.approx(100)], "compact": [pytest.approx(100 * 800 / 4321)]}
    widths = [bar.get_width() for bars in ax.containers for bar in bars]
    assert widths == pytest.approx([100, 100 * 800 / 4321, 120, 90])
    assert [text.get_text() for text in ax.texts] == ["4,321", "800", "0.6", "0.45"]
    ticks = [tick.get_text() for tick in ax.get_yticklabels()]
    assert ticks == ["size\ndense: 4,321", "time\ndense: 0.5"]
    low, high = ax.get_ylim()
    assert low > high  # the first column on top


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123456, "0.0123"), (0.5, "0.5"), (27.14, "27.1"), (189_175, "189,175"), (100.4, "100")],
)
def test_readable_numbers(value, text):
    assert plots.readable(value) == text


@pytest.mark.parametrize(
    ("p", "text"), [(0.25, "0.25"), (0.032, "0.03"), (0.0002, "0.0002"), (2e-8, "2e-08")]
)
def test_p_values(p, text):
    assert plots.p_value(p) == text


# Colours

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
SEEN_BY = {
    "most people": np.eye(3),
    "protanopes": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopes": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
}
XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def lab(color: str, seen: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of a colour as someone sees it."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = XYZ @ np.clip(seen @ linear, 0, 1) / XYZ.sum(axis=1)
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("people", SEEN_BY)
def test_colours_can_be_told_apart(people):
    seen = {method: lab(color, SEEN_BY[people]) for method, color in plots.PALETTE.items()}
    for a, b in combinations(seen, 2):
        assert np.linalg.norm(seen[a] - seen[b]) > 15, (a, b)


def test_one_colour_a_method():
    assert len(set(plots.PALETTE.values())) == len(plots.PALETTE)
    methods = {s.method for figure in experiments.FIGURES.values() for s in figure.settings}
    assert methods <= set(plots.PALETTE)


@pytest.mark.parametrize("name", experiments.FIGURES)
def test_a_method_looks_alike_everywhere(name):
    """One colour by method; settings of one method differ in line or marker."""
    plan = experiments.plan(name, experiments.Scale("paper", seeds=1))
    for _, mine in plan.groupby("network"):
        looks = plots.looks(mine)
        for method, label in mine[["method", "label"]].itertuples(index=False):
            assert looks[label]["color"] == plots.PALETTE[method]
        if name not in ("figure-3", "figure-C1", "figure-C2", "figure-R3"):  # a line a method
            assert len({tuple(look.values()) for look in looks.values()}) == len(looks)


def test_the_first_of_a_method_is_solid():
    looks = plots.looks(RUNS)
    assert [look["linestyle"] for look in looks.values()] == ["-", "-", "--", "-"]
    assert list(looks) == list(METHODS)


# Files


def plan(data: str = "digits", seeds: int = 3, **options) -> pd.DataFrame:
    configs = [Config(data=data, seed=seed, **options) for seed in range(seeds)]
    return pd.DataFrame({"seed": range(seeds), "config": configs})


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        (plan(), "profile smoke, 3 seeds, data digits, noise spans scaled"),
        (
            plan("images:/a/b/my_images.zip", 1),
            "profile smoke, 1 seed, data my_images.zip, noise spans scaled",
        ),
        (
            plan(precision="bfloat16"),
            "profile smoke, 3 seeds, data digits, bfloat16, noise spans scaled",
        ),
    ],
)
def test_a_figure_says_what_it_shows(tmp_path, shown, words):
    figure, _ = plots.panels(1, 1)
    files = plots.save(figure, "figure-5", "smoke", shown, "noise spans scaled", tmp_path)
    assert files == [tmp_path / "smoke" / f"figure-5.{kind}" for kind in ("pdf", "png")]
    assert figure.get_suptitle() == words
    pdf = files[0].read_bytes()
    assert pdf.startswith(b"%PDF")
    (subject,) = re.findall(rb"/Subject \((.*?)\)", pdf)
    with Image.open(files[1]) as image:
        described = image.text["Description"]
        assert image.text["Title"] == "figure-5"
    for text in (subject.decode(), described):
        assert text.startswith(words)
        assert f"matplotlib {matplotlib.__version__}" in text
        assert f"pandas {pd.__version__}" in text
        assert "python 3." in text
        assert provenance.commit() is None or f"commit {provenance.commit()}" in text


def test_files_go_where_figures_go(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERLIB_FIGURES", str(tmp_path / "elsewhere"))
    figure, _ = plots.panels(1, 1)
    for path in plots.save(figure, "figure-1", "demo", plan()):
        assert path.parent == tmp_path / "elsewhere" / "demo"
        assert path.stat().st_size > 1000


TABLE = stats.summary(RUNS, {"best_accuracy": "best test accuracy (%)", "gap": "gap (%)"})


def test_a_table_in_files(tmp_path):
    shown = plan("images:my_images.zip")
    files = plots.save_table(TABLE, "table-C1", "small", shown, "100% made up", tmp_path)
    assert files == [tmp_path / "small" / f"table-C1.{kind}" for kind in ("csv", "tex")]
    read = pd.read_csv(files[0], header=[0, 1], index_col=0)
    assert read.index.tolist() == list(METHODS)
    assert read.to_numpy() == pytest.approx(TABLE.to_numpy(dtype=float), abs=1e-4)
    tex = files[1].read_text()
    for word in ("profile small", "3 seeds", r"\toprule", r"\bottomrule", "No Pruning"):
        assert word in tex
    rows = [line for line in tex.splitlines() if line.endswith(r"\\")]
    assert len(rows) == len(TABLE) + 3


def test_a_table_is_valid_latex(tmp_path):
    """An unescaped % hides the rest of its line, an unescaped _ is an error."""
    shown = plan("images:my_images.zip")
    tex = plots.save_table(TABLE, "table-C1", "small", shown, "100% made up", tmp_path)[1]
    for line in tex.read_text().splitlines():
        assert not re.search(r"(?<!\\)[%_#]", line), line


# Axes


def test_rates_are_on_a_log_axis():
    _, [[ax]] = plots.panels(1, 1)
    plots.by_rate(ax, BY_RATE, "mean_stability", BY_METHOD, plots.STABILITY)
    assert ax.get_xscale() == "log"
    assert [line.get_label() for line in ax.lines] == ["Prune_S", "Prune_R", "Prune_L"]
    assert [line.get_color() for line in ax.lines] == [
        plots.PALETTE[method] for method in ("Prune_S", "Prune_R", "Prune_L")
    ]
    for line in ax.lines:
        assert list(line.get_xdata()) == list(RATES)
    plots.inset_by_rate(ax, BY_RATE, "mean_stability", BY_METHOD, rates=4)
    (inside,) = ax.child_axes
    assert list(inside.lines[0].get_xdata()) == list(RATES[:4])


def test_correlations_show_their_intervals():
    _, [[ax]] = plots.panels(1, 1)
    estimates = {
        1.0: stats.Estimate(-0.5, -0.9, 0.2, 0.1, 9),
        10.0: stats.Estimate(0.1, -0.3, 0.4, 0.7, 9),
    }
    plots.correlation_by_rate(ax, estimates, "r")
    bars = [segment.tolist() for segment in ax.collections[0].get_segments()]
    expected = [[[1, -0.9], [1, 0.2]], [[10, -0.3], [10, 0.4]]]
    assert np.array(bars) == pytest.approx(np.array(expected))
    assert ax.get_ylim() == (-1.05, 1.05)


def test_densities_put_the_deepest_layer_on_top():
    rows = np.stack([np.full(10, height) for height in (0.1, 0.2, 0.3)])
    _, axes = plots.panels(3, 1, panel=(3.4, 0.8))
    plots.densities(axes, {"trained": rows}, reach=5)
    heights = [ax.collections[0].get_paths()[0].vertices[:, 1].max() for [ax] in axes]
    assert heights == pytest.approx([0.3, 0.2, 0.1])
    assert all(a > b for a, b in pairwise(heights))
    assert [ax.get_ylabel() for [ax] in axes] == ["3", "2", "1"]
    normal = axes[0][0].lines[0]
    assert max(normal.get_ydata()) == pytest.approx(0.3521, abs=1e-4)
