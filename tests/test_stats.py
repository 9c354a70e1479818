"""Correlations, means and differences, against scipy and against the formulas written out."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from paperlib import stats
from paperlib.stats import Estimate

X = [1.0, 2.0, 4.0, 5.0, 7.0, 8.0]
Y = [9.0, 7.0, 8.0, 4.0, 5.0, 1.0]


def numbers(estimate: Estimate) -> list[float]:
    return [estimate.value, estimate.low, estimate.high, estimate.p]


# Correlations


def test_pearson_with_fishers_interval():
    x, y = np.array(X) - np.mean(X), np.array(Y) - np.mean(Y)
    r = (x @ y) / math.sqrt((x @ x) * (y @ y))
    half = 1.959964 / math.sqrt(len(X) - 3)
    t = r * math.sqrt((len(X) - 2) / (1 - r * r))
    p = 2 * scipy_stats.t.sf(abs(t), len(X) - 2)
    expected = [r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half), p]
    estimate = stats.pearson(X, Y)
    assert numbers(estimate) == pytest.approx(expected, rel=1e-6)
    assert estimate.n == 6
    assert numbers(estimate)[::3] == pytest.approx(list(scipy_stats.pearsonr(X, Y)))


def test_kendall_by_counting_pairs():
    x, y = [1, 2, 2, 3, 4, 5], [6, 5, 3, 3, 4, 1]
    pairs = [(i, j) for i in range(6) for j in range(i)]
    signs = [np.sign((x[i] - x[j]) * (y[i] - y[j])) for i, j in pairs]
    untied = [sum(v[i] != v[j] for i, j in pairs) for v in (x, y)]
    estimate = stats.kendall(x, y)
    assert estimate.value == pytest.approx(sum(signs) / math.sqrt(untied[0] * untied[1]))
    result = scipy_stats.kendalltau(x, y)
    assert [estimate.value, estimate.p] == pytest.approx([result.statistic, result.pvalue])
    assert -1 <= estimate.low < estimate.value < estimate.high <= 1
    assert estimate.n == 6


def test_kendalls_interval_covers_what_the_pairs_come_from():
    """Of normal pairs of correlation rho, tau is 2 arcsin(rho) / pi."""
    rng = np.random.default_rng(0)
    rho = 0.5
    inside = 0
    for _ in range(20):
        x, noise = rng.standard_normal((2, 40))
        estimate = stats.kendall(x, rho * x + math.sqrt(1 - rho**2) * noise, resamples=60)
        inside += estimate.low < 2 * math.asin(rho) / math.pi < estimate.high
    assert 15 <= inside <= 20


def test_kendalls_interval_is_the_same_every_time():
    assert stats.kendall(X, Y, 100) == stats.kendall(X, Y, 100)
    assert stats.kendall(X, Y, 100, seed=1) != stats.kendall(X, Y, 100, seed=0)


@pytest.mark.parametrize("correlation", [stats.pearson, stats.kendall])
@pytest.mark.parametrize("sign", [1, -1])
def test_perfect_correlation(correlation, sign):
    estimate = correlation(np.arange(8), sign * np.arange(8.0))
    assert numbers(estimate)[:3] == pytest.approx([sign] * 3)
    assert estimate.p < 0.001


@pytest.mark.parametrize("correlation", [stats.pearson, stats.kendall])
@pytest.mark.parametrize(
    ("x", "y"),
    [([], []), ([1], [2]), ([1, 2], [3, 4]), ([1, 1, 1, 1], X[:4]), (X[:4], [0, 0, 0, 0])],
)
def test_no_correlation_of_few_or_constant_values(correlation, x, y):
    estimate = correlation(x, y)
    assert np.isnan(numbers(estimate)).all()
    assert estimate.n == len(x)


@pytest.mark.parametrize("correlation", [stats.pearson, stats.kendall])
def test_three_pairs_have_no_interval(correlation):
    estimate = correlation([1, 2, 3], [1, 3, 2])
    assert estimate.value == pytest.approx(0.5 if correlation is stats.pearson else 1 / 3)
    assert np.isnan([estimate.low, estimate.high]).all()


# Means and differences


def test_mean_with_students_interval():
    values = [2.0, 4.0, 9.0]
    error = math.sqrt(((2 - 5) ** 2 + (4 - 5) ** 2 + (9 - 5) ** 2) / 2 / 3)
    half = 4.302653 * error
    estimate = stats.mean(values)
    assert numbers(estimate)[:3] == pytest.approx([5, 5 - half, 5 + half], rel=1e-6)
    assert estimate.p == pytest.approx(2 * scipy_stats.t.sf(5 / error, 2))
    assert estimate.n == 3


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], [math.nan] * 4), ([3.0], [3, math.nan, math.nan, math.nan]), ([3, 3], [3, 3, 3])],
)
def test_mean_of_few_or_equal_values(values, expected):
    estimate = stats.mean(values)
    assert numbers(estimate)[: len(expected)] == pytest.approx(expected, nan_ok=True)
    assert math.isnan(estimate.p)
    assert estimate.n == len(values)


RUNS = pd.DataFrame(
    {
        "seed": [0, 1, 2, 3, 0, 1, 2, 3, 0, 1],
        "method": ["L"] * 4 + ["S"] * 4 + ["R"] * 2,
        "accuracy": [80.0, 85.0, 90.0, 70.0, 79.0, 83.0, 87.0, 66.0, 1.0, 2.0],
    }
)


@pytest.mark.parametrize("seed", range(4))
def test_differences_are_paired_by_seed(seed):
    shuffled = RUNS.sample(frac=1, random_state=seed)
    estimate = stats.paired_difference(shuffled, "accuracy", "method", "L", "S")
    assert estimate == stats.mean([1, 2, 3, 4])
    assert estimate.low > 0
    reverse = stats.paired_difference(shuffled, "accuracy", "method", "S", "L")
    assert numbers(reverse) == pytest.approx([-2.5, -estimate.high, -estimate.low, estimate.p])


def test_a_seed_that_lacks_one_side_is_left_out():
    frame = RUNS[~((RUNS.seed == 1) & (RUNS.method == "S"))]
    frame = frame[~((frame.seed == 3) & (frame.method == "L"))]
    assert stats.paired_difference(frame, "accuracy", "method", "L", "S") == stats.mean([1, 3])


def test_differences_of_several_pairs():
    pairs = [("L", "S"), ("S", "L"), ("L", "X")]
    found = stats.paired_differences(RUNS, "accuracy", "method", pairs)
    assert list(found) == ["L - S", "S - L", "L - X"]
    for (a, b), estimate in list(zip(pairs, found.values(), strict=True))[:2]:
        assert estimate == stats.paired_difference(RUNS, "accuracy", "method", a, b)
    assert found["L - X"].n == 0


@pytest.mark.parametrize("b", ["S", "X"])
def test_no_difference_without_pairs(b):
    frame = RUNS[(RUNS.method == "L") | (RUNS.seed > 9)]
    estimate = stats.paired_difference(frame, "accuracy", "method", "L", b)
    assert (estimate.n, math.isnan(estimate.value)) == (0, True)


@pytest.mark.parametrize(
    ("low", "high", "positive", "negative"),
    [
        (0.1, 2, "supported", "contradicted"),
        (-2, -0.1, "contradicted", "supported"),
        (-1, 2, "undecided", "undecided"),
        (0, 2, "undecided", "undecided"),
        (math.nan, math.nan, "undecided", "undecided"),
    ],
)
def test_verdict(low, high, positive, negative):
    estimate = Estimate((low + high) / 2, low, high, 0.5, 3)
    assert stats.verdict(estimate, 1) == positive
    assert stats.verdict(estimate, -1) == negative


# Frames


def test_band_by_epoch():
    rows = [(1, 50.0), (0, 10.0), (0, 20.0), (1, 70.0), (0, 60.0), (2, 5.0)]
    line = stats.band(pd.DataFrame(rows, columns=["epoch", "post"]), "epoch", "post")
    assert list(line) == ["epoch", "mean", "low", "high", "n"]
    assert line.epoch.tolist() == [0, 1, 2]
    assert line.n.tolist() == [3, 2, 1]
    for row, values in zip(line.itertuples(), ([10, 20, 60], [50, 70], [5]), strict=True):
        expected = stats.mean(values)
        assert [row.mean, row.low, row.high] == pytest.approx(numbers(expected)[:3], nan_ok=True)


def test_band_of_nothing():
    line = stats.band(pd.DataFrame({"epoch": [], "post": []}), "epoch", "post")
    assert list(line) == ["epoch", "mean", "low", "high", "n"]
    assert line.empty


def test_summary_keeps_the_order_of_settings():
    runs = RUNS.rename(columns={"method": "label"}).iloc[::-1]
    table = stats.summary(runs, {"accuracy": "best (%)"})
    assert table.index.tolist() == ["R", "S", "L"]
    assert table["n"].tolist() == [2, 4, 4]
    values = RUNS[RUNS.method == "L"].accuracy
    expected = [values.mean(), math.sqrt(((values - values.mean()) ** 2).sum() / 3)]
    assert table.loc["L", "best (%)"].tolist() == pytest.approx(expected)


def test_t_test_with_pooled_variance():
    a, b = [5.0, 6.0, 7.0, 9.0], [3.0, 4.0, 8.0]
    squares = sum((v - np.mean(side)) ** 2 for side in (a, b) for v in side)
    pooled = squares / (len(a) + len(b) - 2)
    t = (np.mean(a) - np.mean(b)) / math.sqrt(pooled * (1 / len(a) + 1 / len(b)))
    expected = (t, 2 * scipy_stats.t.sf(abs(t), 5))
    assert stats.pooled_t_test(a, b) == pytest.approx(expected)
    assert stats.pooled_t_test(b, a) == pytest.approx((-t, expected[1]))


@pytest.mark.parametrize(("a", "b"), [([1.0], [2.0, 3.0]), ([1.0, 2.0], []), ([], [])])
def test_no_t_test_of_one_value(a, b):
    assert np.isnan(stats.pooled_t_test(a, b)).all()


# Distances to the standard normal


def histogram(mean: float, deviation: float, reach: float, bins: int) -> np.ndarray:
    edges = np.linspace(-reach, reach, bins + 1)
    counts = np.diff(scipy_stats.norm.cdf(edges, mean, deviation))
    return counts / counts.sum() / (edges[1] - edges[0])


@pytest.mark.parametrize(("reach", "bins"), [(5.0, 200), (3.0, 10)])
def test_distance_to_normal(reach, bins):
    shapes = [(0, 1), (0.5, 1), (2, 0.5), (reach - 0.1, 0.01)]
    rows = np.stack([histogram(*shape, reach, bins) for shape in shapes])
    distances = stats.distance_to_normal(rows, reach)
    assert distances.shape == (4,)
    assert distances[0] == pytest.approx(0, abs=1e-12)
    assert (np.diff(distances) > 0).all()
    assert 0.9 < distances[3] <= 1


def test_distance_to_normal_of_a_shifted_normal():
    """The total variation between two normals d apart is 2 Phi(d / 2) - 1."""
    distance = stats.distance_to_normal(histogram(1, 1, 8, 4000)[None], 8)
    assert distance == pytest.approx(2 * scipy_stats.norm.cdf(0.5) - 1, abs=1e-3)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
def test_quantiles_of_what_a_histogram_counted(q):
    values = np.exp(np.random.default_rng(0).normal(-4, 1, 100_000))
    counts, edges = np.histogram(values, np.logspace(-6, 1, 141))
    quantile = stats.histogram_quantile(counts, edges, q)
    assert quantile == pytest.approx(np.quantile(values, q), rel=0.02)


def test_quantiles_by_hand():
    edges = np.array([1.0, 10, 100, 1000])
    assert stats.histogram_quantile(np.array([0, 8, 0]), edges) == pytest.approx(10**1.5)
    assert stats.histogram_quantile(np.array([2, 2, 0]), edges) == pytest.approx(10)
    assert stats.histogram_quantile(np.array([1, 1, 2]), edges, 0.75) == pytest.approx(10**2.5)
    assert math.isnan(stats.histogram_quantile(np.array([0, 0, 0]), edges))
