"""The plot forms: their pictures on fixed frames, what they say, and their colours."""

import subprocess
import sys
from functools import wraps
from itertools import combinations
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from paperlib import experiments, plots, stats

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
BY_FRACTION = fraction_frame()
GAINS = {
    "Prune_L - Dropout": stats.Estimate(0.5, 0.2, 0.8, 0.01, 3),
    "Prune_L - Prune_S": stats.Estimate(-0.3, -1.1, 0.5, 0.3, 3),
    "Prune_L - No Pruning": stats.Estimate(0.1, np.nan, np.nan, np.nan, 1),
}


# Pictures


@picture
def test_tradeoff():
    return plots.tradeoff(PICTURE_EPOCHS, RUNS)[0]


@picture
def test_rates():
    return plots.rates(BY_RATE)


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
    plots.by_fraction(
        ax, BY_FRACTION, "best_accuracy", plots.looks(BY_FRACTION, "method"), plots.BEST
    )
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
    """One row an eigenvalue, as `measures.spectra` and a plan give it."""
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
    plots.by_fraction(
        ax, BY_FRACTION, "best_accuracy", plots.looks(BY_FRACTION, "method"), plots.BEST
    )
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


# Tables


def contrast(
    claim, estimate, low, high, kind="co-primary", outcome="accuracy", verdict="supported"
):
    values = {"estimate": estimate, "low": low, "high": high, "p": 0.03, "holm": np.nan, "n": 10}
    names = {"contrast": f"a - b ({outcome})", "kind": kind, "outcome": outcome, "note": ""}
    return {"claim": claim, "verdict": verdict, "runs": "10 of 10", **values, **names}


CLAIMS = pd.DataFrame(
    [
        contrast("T1", 0.7, 0.2, 1.2),
        contrast("T1", 0.4, 0.1, 0.7),
        contrast("T1", 9.0, 8.0, 10.0, kind="secondary"),
        contrast("T2", -3, np.nan, np.nan, verdict="undecided"),
        {"claim": "T3", "verdict": "incomplete", "runs": "3 of 12"},
        contrast("T4", -0.2, -0.4, 0.1, outcome="log_curvature", verdict="undecided"),
        contrast("T4", -0.1, -0.3, 0.2, "adjusted", "log_curvature", "undecided"),
        contrast("R1", -1.4, -1.9, -1.1, verdict="contradicted"),
    ]
)


@picture
def test_forest():
    return plots.forest(CLAIMS)


def test_the_forest_shows_deciding_contrasts_and_every_verdict():
    points, logs = plots.forest(CLAIMS).axes
    rows = [tick.get_text() for tick in points.get_yticklabels()]
    assert [row.split(":")[0] for row in rows if ":" in row] == ["T1", "T2", "T3", "R1"]
    assert sum("a - b" in row for row in rows) == 4
    for verdict in ("supported", "undecided", "incomplete", "contradicted"):
        assert any(verdict in row for row in rows)
    spans = [line.get_xdata() for line in points.lines if line.get_marker() == "None"][1:]
    assert [list(span) for span in spans] == [[0.2, 1.2], [0.1, 0.7], [-1.9, -1.1]]
    bands = sorted({band.get_paths()[0].vertices[:, 0].max() for band in points.collections})
    assert bands == [0.5, 1.0]  # the paper's networks, and conv4
    assert len(logs.get_yticklabels()) == 3
    assert not logs.collections


def test_verdicts_in_a_table():
    table = plots.verdict(CLAIMS)
    assert table.loc["R1", "estimate [95%]"] == "-1.40 [-1.90, -1.10]"
    assert table.loc["T2", "estimate [95%]"] == "-3.00"
    assert table.loc["T3", ["verdict", "estimate [95%]", "p"]].tolist() == ["incomplete", "", ""]


def test_gates_are_counted():
    columns = ["gate", "network", "setting", "passed", "text"]
    rows = [
        ("G3", "VGG11", "smallest 4", "passed", "good"),
        ("G3", "VGG11", "largest 40", "failed", "too low"),
        ("G1", "VGG11", "none", "not applicable", "augmented"),
    ]
    table = plots.gates(pd.DataFrame(rows, columns=columns))
    assert table.loc[("G3", "VGG11")].tolist() == [1, 1, 0, "largest 40: too low"]
    assert table.loc[("G1", "VGG11")].tolist() == [0, 0, 1, ""]


def test_numbers_are_those_of_pandas():
    table = plots.numbers(RUNS, {"gap": "gap (%)"})
    mine = RUNS[(RUNS.network == "ResNet18") & (RUNS.label == "Prune_L 13%")].gap
    row = table.loc[("ResNet18", "Prune_L 13%")].tolist()
    assert row == [round(mine.mean(), 2), round(mine.std(), 2), SEEDS]


# Files


LOADED = SimpleNamespace(
    name="figure-5", scale=SimpleNamespace(profile="smoke"), stamp="profile smoke, G3 fails: a - b"
)


def test_files_say_what_they_show_and_hold_no_date(tmp_path):
    def save(folder):
        figure, [[ax]] = plots.panels(1, 1)
        ax.plot([1, 2], label="a run")
        ax.set(xlabel="epoch", ylabel="accuracy")
        plots.save(figure, LOADED, note="spans scaled", folder=folder)
        return figure

    figure = save(tmp_path / "one")
    save(tmp_path / "other")
    assert figure.get_suptitle() == "profile smoke, G3 fails: a - b, spans scaled"
    for kind in ("pdf", "png"):
        one, other = (tmp_path / name / "smoke" / f"figure-5.{kind}" for name in ("one", "other"))
        assert one.read_bytes() == other.read_bytes()
    with Image.open(tmp_path / "one/smoke/figure-5.png") as image:
        assert LOADED.stamp in image.text["Description"]
        assert matplotlib.__version__ in image.text["Description"]
        assert "accuracy against epoch" in image.text["Comment"]


def test_tables_and_figures_go_where_figures_go(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERLIB_FIGURES", str(tmp_path))
    table = plots.numbers(RUNS, {"gap": "gap (%)"})
    path = plots.save_table(table, LOADED, "table-C1")
    assert path == tmp_path / "smoke/table-C1.csv"
    read = pd.read_csv(path, header=[0, 1], index_col=[0, 1])
    assert read.to_numpy() == pytest.approx(table.to_numpy(dtype=float), abs=1e-4)
    plots.save(plots.panels(1, 1)[0], LOADED)
    assert (tmp_path / "smoke/figure-5.pdf").read_bytes().startswith(b"%PDF")


def test_drawing_imports_no_torch():
    code = "import sys, paperlib.plots, paperlib.overview; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
