"""The plot forms: their pictures on fixed frames, what they say, and their colours."""

from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from PIL import Image

from paperlib import experiments, plots, stats
from paperlib.plots.style import MARKERS

METHODS = {
    "No Pruning": "No Pruning",
    "Prune_S 1%": "Prune_S",
    "Prune_S 13%": "Prune_S",
    "Prune_L 13%": "Prune_L",
}
EPOCHS, SEEDS = 12, 3


@pytest.fixture(autouse=True)
def clean():
    with plt.rc_context():
        plots.use_style()
        yield
    plt.close("all")


def chance(count: int) -> np.ndarray:
    return np.random.RandomState(count).standard_normal(count)


def run_frame() -> pd.DataFrame:
    """One row a run of two networks: the less stable, the better."""
    rows = [
        {"network": network, "method": METHODS[label], "label": label, "seed": seed, "less": less}
        for network in ("VGG11", "ResNet18")
        for less, label in enumerate(METHODS)
        for seed in range(SEEDS)
    ]
    frame = pd.DataFrame(rows)
    less, noise = 0.4 * frame.less + 0.1 * chance(len(rows)), 0.2 * chance(len(rows) + 1)[1:]
    frame["run"] = frame[["network", "label", "seed"]].astype(str).agg(" ".join, axis=1)
    return frame.assign(mean_stability=100 - less, best_accuracy=84 + less + noise, gap=16 - less)


def epoch_frame(runs: pd.DataFrame) -> pd.DataFrame:
    """One row an epoch: accuracy rises, and falls at every third epoch's event."""
    frame = runs.merge(pd.DataFrame({"epoch": range(EPOCHS)}), "cross")
    pre = frame.best_accuracy - 30 * np.exp(-frame.epoch / 2) + 0.2 * chance(len(frame))
    event = (frame.epoch % 3 == 2) & (frame.method != "No Pruning")
    drop = (100 - frame.mean_stability) * event * np.where(frame.epoch == 5, 3, 1)
    return frame.assign(pre=pre, post=pre - drop, removed=4 * event, trained=True)


def method_frame(column: str, values: tuple[float, ...]) -> pd.DataFrame:
    """One row a run of three methods at each value of a column."""
    rows = [
        {"method": method, "label": method, column: value, "seed": seed, "steep": steep}
        for steep, method in enumerate(("Prune_S", "Prune_R", "Prune_L"), 1)
        for value in values
        for seed in range(SEEDS)
    ]
    frame = pd.DataFrame(rows)
    loss = frame.steep * frame[column] ** 0.5 / 3 + 0.1 * chance(len(frame))
    return frame.assign(mean_stability=100 - loss, best_accuracy=80 - loss + chance(len(frame)))


def spectrum_frame() -> pd.DataFrame:
    """One row an eigenvalue, as `measures.spectra` and a plan give it."""
    runs = RUNS[RUNS.network == "VGG11"]
    frame = runs.merge(pd.DataFrame({"rank": range(1, 9)}), "cross")
    sizes = (10 + frame.seed + 4 * frame.less) / frame["rank"]
    return frame.assign(magnitude=sizes, eigenvalue=sizes * np.where(frame["rank"] % 3 == 2, -1, 1))


def contrast(
    claim, estimate, low, high, kind="co-primary", outcome="accuracy", verdict="supported"
):
    values = {"estimate": estimate, "low": low, "high": high, "p": 0.03, "holm": np.nan, "n": 10}
    values |= {"power": 0.876, "sign_flip": 0.02}
    names = {"contrast": f"a - b ({outcome})", "kind": kind, "outcome": outcome, "note": ""}
    return {"claim": claim, "verdict": verdict, "runs": "10 of 10", **values, **names}


RUNS = run_frame()
VGG = RUNS[RUNS.network == "VGG11"]
BY_EPOCH = epoch_frame(RUNS)
LARGE = BY_EPOCH[(BY_EPOCH.label == "Prune_L 13%") & (BY_EPOCH.network == "VGG11")]
BY_RATE = method_frame("rate", (1.3, 6.4, 12.9, 18.0, 45.0, 90.0))
FRACTIONS = (50, 70, 90, 98)
WHOLE = pd.DataFrame({"method": "No Pruning", "fraction": 0, "best_accuracy": [80.0, 81, 82]})
BY_FRACTION = pd.concat([WHOLE, method_frame("fraction", FRACTIONS)], ignore_index=True)
SPECTRA = spectrum_frame()
EDGES = np.logspace(-4, 0, 41)
HUMP = np.round(1000 * np.exp(-(((np.arange(40) - 25) / 6) ** 2)))
COUNTS = {"before": HUMP, "after": HUMP * (np.arange(40) < 24), "end": HUMP / 4}
T = 4.302653  # Student's, of 3 seeds
GAINS = {
    "Prune_L - Dropout": stats.Fitted(0.5, 0.3 / T, 2),
    "Prune_L - Prune_S": stats.Fitted(-0.3, 0.8 / T, 2),
    "Prune_L - No Pruning": stats.Fitted(0.1, np.nan, 0),
}
COSTS = pd.DataFrame(
    {"nonzero": [1000, 150, 150], "bytes": [4321.0, 4321.0, 800.0], "ms": [0.5, 0.6, 0.45]},
    index=["dense", "masked", "compact"],
)
COLORS = {"dense": "black", "masked": "tan", "compact": plots.PALETTE["Prune_L"]}
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
LAYERS = np.exp(-((np.linspace(-5, 5, 40) - np.array([[0], [-0.5], [1]])) ** 2)) / 2
PAIRS = [("mean_stability", "gap"), ("gap", "best_accuracy")]
# What draws one panel, and whole figures.
PANELS = {
    "events": lambda ax: plots.events(ax, LARGE[LARGE.seed == 0], plots.PALETTE["Prune_L"]),
    "by_fraction": lambda ax: plots.by_fraction(ax, BY_FRACTION, "best_accuracy"),
    "by_setting": lambda ax: plots.by_setting(ax, VGG, "best_accuracy"),
    "differences": lambda ax: plots.differences(ax, GAINS, "points"),
    "magnitudes": lambda ax: plots.magnitudes([ax], EDGES, {"Prune_L": COUNTS}),
    "shares": lambda ax: plots.shares(ax, COSTS, dict(zip(COSTS, COSTS, strict=True)), COLORS),
    "bars_by_rank": lambda ax: plots.bars_by_rank(ax, SPECTRA, 5),
    "lines": lambda ax: plots.lines(ax, SPECTRA, "rank", "magnitude"),
}
FIGURES = {
    "tradeoff": lambda: plots.tradeoff(BY_EPOCH, RUNS),
    "rates": lambda: plots.rates(BY_RATE),
    "pairs": lambda: plots.pairs(RUNS, PAIRS),
    "forest": lambda: plots.forest(CLAIMS),
}


@pytest.mark.parametrize("form", [*PANELS, "densities", *FIGURES])
@pytest.mark.mpl_image_compare(
    baseline_dir="baseline", style="default", tolerance=1.5, savefig_kwargs={"dpi": 50}
)
def test_picture(form):
    """The figure is its image in baseline/, given --mpl.

    Releases of matplotlib and FreeType draw text of different size and shape, and the layout
    follows it: so no text, no legends, and axes in fixed places. Other markers, colours or no
    bands differ by more than 1.5 (the root mean square of 0..255).
    """
    plots.use_style()  # after pytest-mpl has reset the style
    plt.rcParams["figure.constrained_layout.use"] = False
    if form in FIGURES:
        figure = FIGURES[form]()
    elif form == "densities":
        figure, axes = plots.panels(3, 2, panel=(3.4, 0.8), sharex=True)
        plots.densities(axes, {"untrained": LAYERS, "trained": LAYERS[::-1]}, reach=5)
    else:
        figure, [[ax]] = plots.panels(1, 1)
        PANELS[form](ax)
    figure.subplots_adjust(0.05, 0.05, 0.95, 0.95)
    for legend in [*figure.legends, *(ax.get_legend() for ax in figure.axes)]:
        if legend:
            legend.remove()
    for text in figure.findobj(Text):
        text.set_visible(False)
    return figure


def one() -> plt.Axes:
    return plots.panels(1, 1)[1][0][0]


def test_pairs_leave_out_runs_that_lack_a_value():
    runs = VGG.assign(delta_w=np.where(VGG.seed == 0, np.nan, VGG.mean_stability))
    title = plots.pairs(runs, [("mean_stability", "delta_w")]).axes[0].get_title()
    assert f"n = {(VGG.seed > 0).sum()}" in title
    assert "r = 1.00" in title


@pytest.mark.parametrize("runs", [VGG[:2], VGG.assign(gap=1.0), VGG.assign(gap=VGG.seed % 2)])
def test_no_correlation_of_fewer_than_three_different_values(runs):
    ax = one()
    plots.scatter(ax, runs, "mean_stability", "gap", plots.looks(runs))
    assert f"n = {len(runs)}" in ax.get_title()
    assert "r = " not in ax.get_title()
    assert not ax.lines
    rates = runs.assign(rate=3.0, method="Prune_S", best_accuracy=runs.gap)
    both = plots.rates(rates).axes[2]
    assert not both.containers
    assert any(f"n = {len(runs)}" in text.get_text() for text in both.texts)


def test_epochs_count_from_1_and_a_band_needs_three_seeds():
    ax, mine = one(), BY_EPOCH[BY_EPOCH.network == "VGG11"]
    plots.dynamics(ax, mine, names={"Prune_L 13%": "the long name"})
    for line, label in zip(ax.lines, METHODS, strict=True):
        x, y = line.get_data()
        assert list(x) == list(range(1, EPOCHS + 1))
        expected = mine[mine.label == label].groupby("epoch").post.mean()
        assert list(y) == pytest.approx(expected.tolist())
    names = [text.get_text() for text in ax.legend().get_texts()]
    assert names == [*list(METHODS)[:3], "the long name"]
    plots.dynamics(two := one(), mine[mine.seed < 2])
    areas = [sum(len(band.get_paths()) for band in a.collections) for a in (ax, two)]
    assert areas == [len(METHODS), 0]


def test_the_tradeoff_has_no_pruning_as_a_line():
    left, right, *_ = plots.tradeoff(BY_EPOCH, RUNS).axes
    assert "n = 9" in left.get_title()
    unpruned = VGG[VGG.method == "No Pruning"].best_accuracy.mean()
    assert [*left.lines[0].get_ydata()] == pytest.approx([unpruned] * 2)
    low, high = left.get_ylim()
    assert low < unpruned < high
    stability = VGG[VGG.label == "Prune_L 13%"].mean_stability.mean()
    last = right.get_legend().get_texts()[-1].get_text()
    assert last == f"Prune_L 13% ({stability:.1f}%)"


def test_noise_has_a_panel_for_each_duration_with_the_controls():
    noise = [("Zeroing", "Zeroing 8"), ("Zeroing", "Zeroing 177"), ("Gaussian", "Gaussian 8")]
    parts = [LARGE, *(LARGE.assign(method=method, label=label) for method, label in noise)]
    figure = plots.noise(pd.concat(parts), ["Zeroing", "Gaussian"], ["Prune_L"])
    for ax, (method, label) in zip(figure.axes, noise, strict=True):
        assert ax.get_title() == label
        assert [line.get_label() for line in ax.lines] == ["Prune_L 13%", method]
        assert all(len(line.get_xdata()) == EPOCHS - 1 for line in ax.lines)
        assert len({line.get_marker() for line in ax.lines}) == 2


def test_the_event_marked_is_the_least_stable():
    ax = one()
    worst = plots.events(ax, LARGE[LARGE.seed == 0].sample(frac=1, random_state=0), "red")
    assert worst.epoch == 5
    assert worst.stability == pytest.approx(100 * worst.post / worst.pre)
    before, after, ring = (dots.get_offsets() for dots in ax.collections)
    assert list(before[:, 0]) == list(after[:, 0]) == [3, 6, 9, 12]
    assert (before[:, 1] > after[:, 1]).all()
    assert ring.tolist() == [[6, worst.post]]


def test_events_are_those_of_one_run_in_training():
    with pytest.raises(ValueError, match="VGG11 Prune_L 13% 1"):
        plots.events(one(), LARGE, "red")
    scratch = LARGE[LARGE.seed == 0].assign(trained=False)
    with pytest.raises(ValueError, match="without pruning events"):
        plots.events(one(), scratch, "red")


def test_a_scatter_gives_r_of_networks_with_events_apart():
    runs = VGG.assign(events=(VGG.method != "No Pruning").astype(int))
    among = runs[runs.events > 0]
    r = np.corrcoef(among.mean_stability, among.best_accuracy)[0, 1]
    plots.scatter(ax := one(), runs, "mean_stability", "best_accuracy", plots.looks(runs))
    assert f"r = {r:.2f}, n = {len(among)}" in ax.get_title().splitlines()[-1]
    plots.scatter(ax := one(), among, "mean_stability", "best_accuracy", plots.looks(runs))
    assert len(ax.get_title().splitlines()) == 1


def test_runs_at_0_belong_to_every_line():
    plots.by_fraction(ax := one(), BY_FRACTION, "best_accuracy")
    assert [line.get_label() for line in ax.lines] == ["Prune_S", "Prune_R", "Prune_L"]
    for line in ax.lines:
        mine = BY_FRACTION[BY_FRACTION.method == line.get_label()]
        means = [WHOLE.best_accuracy.mean(), *mine.groupby("fraction").best_accuracy.mean()]
        at = sorted(zip(*line.get_data(), strict=True), reverse=True)
        assert [y for _, y in at] == pytest.approx(means)
        left = [100, *(100 - np.array(FRACTIONS))]
        assert [x for x, _ in at] == pytest.approx(left, rel=0.06)  # bars are side by side
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "50", "70", "90", "98"]
    left, right = ax.get_xlim()
    assert left > 100 > 2 > right  # more removed is further right


def test_magnitudes_are_percent_of_the_weights_left():
    plots.magnitudes([ax := one()], EDGES, {"Prune_L": COUNTS})
    for moment, outline in zip(COUNTS, ax.patches, strict=False):
        values, edges, _ = outline.get_data()
        assert values == pytest.approx(100 * COUNTS[moment] / COUNTS[moment].sum())
        assert np.array_equal(edges, EDGES)


# Okabe and Ito (2008), which can be told apart by all kinds of colour vision.
OKABE_ITO = "#000000 #E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7"
GREY, WINE = "#5F5F5F", "#882255"  # the latter from Tol's muted colours, in place of yellow


def test_colours_can_be_told_apart():
    colors = list(plots.PALETTE.values())
    assert len(set(colors)) == len(colors) - 1
    assert plots.PALETTE["Restored"] == plots.PALETTE["Zeroing"]  # in no figure together
    assert set(colors) <= {*OKABE_ITO.split(), GREY, WINE}


def test_a_method_looks_alike_everywhere():
    """One colour and first marker by method; all settings of a panel differ in marker."""
    for name in experiments.FIGURES:
        plan = experiments.plan(name, experiments.Scale("paper", seeds=1))
        for _, mine in plan.groupby("network"):
            looks = plots.looks(mine)
            for method, label in mine[["method", "label"]].itertuples(index=False):
                assert looks[label]["color"] == plots.PALETTE[method]
            for method, group in mine.groupby("method"):
                assert looks[group.label.iloc[0]]["marker"] == MARKERS[method]
            if len(looks) <= 8:  # else a line is a method
                assert len({look["marker"] for look in looks.values()}) == len(looks)


def test_methods_of_the_users_differ():
    methods = ["No Pruning", "Mine", "Mine", "Another"]
    looks = plots.looks(pd.DataFrame({"method": methods, "label": list("abcd")}))
    mine = [looks[label] for label in "bcd"]
    assert {look["color"] for look in mine} == {plots.PALETTE["Yours"]}
    assert len({look["marker"] for look in mine}) == len({look["linestyle"] for look in mine}) == 3


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


def test_tables():
    verdict = plots.verdict(CLAIMS)
    estimates = verdict["estimate [95%]"]
    assert estimates.loc["R1"].tolist() == ["-1.40 [-1.90, -1.10]"]
    assert estimates.loc["T2"].tolist() == ["-3.00"]
    beside = verdict.reset_index(level="power").loc["R1", ["power", "p", "p (sign flip)"]]
    assert beside.to_numpy().tolist() == [["0.88", "0.03", "0.02"]]
    none = verdict.loc[("T3", "incomplete", slice(None), "", "none tested")]
    assert none[["estimate [95%]", "p"]].to_numpy().tolist() == [["", ""]]
    columns = ["gate", "network", "setting", "passed", "text"]
    rows = [
        ("G3", "VGG11", "smallest 4", "passed", "good"),
        ("G3", "VGG11", "largest 40", "failed", "too low"),
        ("G1", "VGG11", "none", "not applicable", "augmented"),
    ]
    gates = plots.gates(pd.DataFrame(rows, columns=columns))
    assert gates.loc[("G3", "VGG11")].tolist() == [1, 1, 0, "largest 40: too low"]
    assert gates.loc[("G1", "VGG11")].tolist() == [0, 0, 1, ""]
    mine = RUNS[(RUNS.network == "ResNet18") & (RUNS.label == "Prune_L 13%")].gap
    row = plots.numbers(RUNS, {"gap": "gap (%)"}).loc[("ResNet18", "Prune_L 13%")].tolist()
    assert row == [round(mine.mean(), 2), round(mine.std(), 2), SEEDS]
    lacking = VGG.assign(delta_w=VGG.gap.where(VGG.seed > 0))
    assert set(plots.numbers(lacking, {"gap": "gap", "delta_w": "delta_w"})["n"]) == {SEEDS - 1}


LOADED = SimpleNamespace(
    name="figure-5", scale=SimpleNamespace(profile="smoke"), stamp="profile smoke, G3 fails: a - b"
)


def test_files_say_what_they_show_and_hold_no_date(tmp_path, monkeypatch):
    contents = []
    for folder in (tmp_path / "one", tmp_path / "other"):
        monkeypatch.setenv("PAPERLIB_FIGURES", str(folder))
        figure, [[ax]] = plots.panels(1, 1)
        ax.plot([1, 2])
        ax.set(xlabel="epoch", ylabel="accuracy")
        plots.save(figure, LOADED, note="spans scaled")
        assert figure.get_suptitle() == "profile smoke, G3 fails: a - b, spans scaled"
        files = [folder / f"smoke/figure-5.{kind}" for kind in ("pdf", "png")]
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]
    with Image.open(files[1]) as image:
        assert LOADED.stamp in image.text["Description"]
        assert matplotlib.__version__ in image.text["Description"]
        assert "accuracy against epoch" in image.text["Comment"]
    table = plots.numbers(RUNS, {"gap": "gap (%)"})
    path = plots.save_table(table, LOADED, "table-C1")
    assert path == folder / "smoke/table-C1.csv"
    read = pd.read_csv(path, header=[0, 1], index_col=[0, 1])
    assert read.to_numpy() == pytest.approx(table.to_numpy(dtype=float), abs=1e-4)
