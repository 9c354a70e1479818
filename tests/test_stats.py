"""Correlations, means and differences, against scipy and against the formulas written out."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import optimize
from scipy import stats as scipy_stats

from paperlib import stats

X = [1.0, 2.0, 4.0, 5.0, 7.0, 8.0]
Y = [9.0, 7.0, 8.0, 4.0, 5.0, 1.0]
BOTH = pytest.mark.parametrize("correlation", [stats.pearson, stats.kendall])


def test_pearson_with_fishers_interval():
    x, y = np.array(X) - np.mean(X), np.array(Y) - np.mean(Y)
    r = (x @ y) / math.sqrt((x @ x) * (y @ y))
    half = 1.959964 / math.sqrt(len(X) - 3)
    t = r * math.sqrt((len(X) - 2) / (1 - r * r))
    p = 2 * scipy_stats.t.sf(abs(t), len(X) - 2)
    low, high = math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)
    assert stats.pearson(X, Y) == pytest.approx((r, low, high, p, 6), rel=1e-6)


def test_kendall_by_counting_pairs():
    x, y = [1, 2, 2, 3, 4, 5], [6, 5, 3, 3, 4, 1]
    pairs = [(i, j) for i in range(6) for j in range(i)]
    signs = [np.sign((x[i] - x[j]) * (y[i] - y[j])) for i, j in pairs]
    untied = [sum(v[i] != v[j] for i, j in pairs) for v in (x, y)]
    expected = sum(signs) / math.sqrt(untied[0] * untied[1])
    assert stats.kendall(x, y).value == pytest.approx(expected)


@pytest.mark.parametrize(("how", "seed"), [({}, 0), ({"seed": 1}, 1)])
def test_kendalls_interval_is_of_95_percent(how, seed):
    x, y = np.random.default_rng(1).normal(size=(2, 12))
    drawn = np.random.default_rng(seed).integers(12, size=(1000, 12))
    taus = [scipy_stats.kendalltau(x[i], y[i]).statistic for i in drawn]
    interval = stats.kendall(x, y, **how)[1:3]
    assert interval == pytest.approx(tuple(np.percentile(taus, [2.5, 97.5])))


@BOTH
@pytest.mark.parametrize(
    ("x", "y"),
    [([], []), ([1], [2]), ([1, 2], [3, 4]), ([1, 1, 1, 1], X[:4]), (X[:4], [0, 1, 0, 1])],
)
def test_no_correlation_of_fewer_than_three_different_values(correlation, x, y):
    *numbers, n = correlation(x, y)
    assert np.isnan(numbers).all()
    assert n == len(x)


@BOTH
def test_three_pairs_have_no_interval(correlation):
    estimate = correlation([1, 2, 3], [1, 3, 2])
    assert estimate.value == pytest.approx(0.5 if correlation is stats.pearson else 1 / 3)
    assert np.isnan([estimate.low, estimate.high]).all()
    assert stats.kendall([1, 2, 3], [3, 2, 1]).p == pytest.approx(1 / 3)  # exact: 2 of 6 orders


RUNS = pd.DataFrame(
    {
        "seed": [0, 1, 2, 3, 0, 1, 2, 3, 0, 1],
        "method": ["L"] * 4 + ["S"] * 4 + ["R"] * 2,
        "accuracy": [80.0, 85.0, 90.0, 70.0, 79.0, 83.0, 87.0, 66.0, 1.0, 2.0],
    }
)


def test_differences_are_paired_by_seed():
    pairs = [("L", "S"), ("S", "L"), ("L", "R")]
    shuffled = RUNS.sample(frac=1, random_state=0)
    found = stats.paired_differences(shuffled, "accuracy", "method", pairs)
    two = found.pop("L - R")
    assert two.value == 81
    assert np.isnan(two.interval()).all()  # two pairs have none
    expected = {"L - S": [1, 2, 3, 4], "S - L": [-1, -2, -3, -4]}
    assert found == {name: stats.fitted_mean(np.array(v)) for name, v in expected.items()}


def test_a_band_of_three_values_or_more():
    """Runs that lack a value do not count."""
    rows = [(1, 50.0), (0, 10.0), (0, 20.0), (1, 70.0), (1, np.nan), (0, 60.0), (2, 5.0)]
    frame = pd.DataFrame(rows, columns=["epoch", "post"])
    line = stats.band(frame, "epoch", "post")
    low, high = scipy_stats.ttest_1samp([10, 20, 60], 0).confidence_interval()
    expected = [(0, 30, low, high, 3), (1, 60, np.nan, np.nan, 2), (2, 5, np.nan, np.nan, 1)]
    assert list(line) == ["epoch", "mean", "low", "high", "n"]
    assert line.to_numpy() == pytest.approx(np.array(expected), nan_ok=True)


DIFFERENCES = np.array([0.3, -0.1, 0.8, 0.5, -0.4, 0.9, 0.2])
COVARIATE = np.array([0.5, 1.0, -0.2, 0.9, 0.3, 1.4, 0.6])


@pytest.mark.parametrize("level", [0.90, 0.95, 0.975])
@pytest.mark.parametrize(
    ("fitted", "design"),
    [
        (stats.fitted_mean(DIFFERENCES), np.ones(7)),
        (stats.fitted_intercept(DIFFERENCES, COVARIATE), sm.add_constant(COVARIATE)),
    ],
    ids=["mean", "intercept"],
)
def test_fits_against_least_squares(fitted, design, level):
    result = sm.OLS(DIFFERENCES, design).fit()
    assert fitted[:2] == pytest.approx((result.params[0], result.bse[0]))
    assert fitted.interval(level) == pytest.approx(tuple(result.conf_int(1 - level)[0]))
    assert fitted.p(0.1) == pytest.approx(sm.OLS(DIFFERENCES - 0.1, design).fit().pvalues[0])


def test_fits_of_many_data_sets_are_those_of_each():
    values = np.random.default_rng(0).normal(0, 1, (4, 3, 7))
    for fit in (stats.fitted_mean, lambda v: stats.fitted_intercept(v, COVARIATE)):
        fitted = fit(values)
        for at in np.ndindex(4, 3):
            assert (fitted.value[at], fitted.error[at]) == pytest.approx(fit(values[at])[:2])
        assert fitted.p().shape == (4, 3)


@pytest.mark.parametrize(
    "fitted",
    [
        stats.fitted_mean(np.array([])),
        stats.fitted_mean(np.array([2.0])),
        stats.fitted_intercept(DIFFERENCES, np.ones(7)),
        stats.fitted_intercept(DIFFERENCES[:2], COVARIATE[:2]),
    ],
)
def test_no_interval_without_degrees_of_freedom_or_a_line(fitted):
    assert np.isnan([*fitted.interval(), fitted.p()]).all()


def test_power_of_a_t_test_by_simulation():
    fitted = stats.fitted_mean(DIFFERENCES)
    deviation = fitted.error * math.sqrt(7)
    drawn = np.random.default_rng(0).normal(0.4, deviation, (20_000, 7))
    found = (stats.fitted_mean(drawn).interval()[0] > 0).mean()
    assert stats.power_of_t(0.4, fitted) == pytest.approx(found, abs=0.012)
    assert math.isnan(stats.power_of_t(0.4, stats.fitted_mean(np.ones(3))))


@pytest.mark.parametrize("values", [DIFFERENCES, DIFFERENCES[:2], np.array([1.0, 1, 1, 1, -1])])
def test_sign_flips_by_counting(values):
    flipped = abs(np.array(list(itertools.product((1, -1), repeat=len(values)))) @ values)
    expected = np.mean(flipped >= abs(values.sum()) - 1e-9)
    assert stats.sign_flip(values) == pytest.approx(expected)
    assert np.isnan([stats.sign_flip(np.ones(n)) for n in (0, 40)]).all()


def test_sign_flips_of_accuracies_tie_as_their_integers_do():
    """Means of three accuracies of 10,000 images are multiples of 1/300 of a point."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        first, second = rng.integers(22_400, 22_600, (2, 8))
        expected = stats.sign_flip((first - second).astype(float))
        assert stats.sign_flip(first / 300 - second / 300) == expected


def test_holm_by_hand():
    adjusted = stats.holm([0.03, np.nan, 0.01, 0.5, 0.02])
    assert adjusted == pytest.approx([0.06, np.nan, 0.04, 0.5, 0.06], nan_ok=True)
    assert np.isnan(stats.holm([np.nan, np.nan])).all()


# Colditz et al. (1994): tuberculosis, and no tuberculosis, of those vaccinated and not.
VACCINATED = [
    *[(4, 119, 11, 128), (6, 300, 29, 274), (3, 228, 11, 209), (62, 13536, 248, 12619)],
    *[(33, 5036, 47, 5761), (180, 1361, 372, 1079), (8, 2537, 10, 619)],
    *[(505, 87886, 499, 87892), (29, 7470, 45, 7232), (17, 1699, 65, 1600)],
    *[(186, 50448, 141, 27197), (5, 2493, 3, 2338), (27, 16886, 29, 17825)],
]


def test_random_effects_of_a_published_example():
    """The numbers of metafor's rma(measure="RR", test="knha") for its data set dat.bcg."""
    a, b, c, d = np.array(VACCINATED).T
    effects = np.log(a / (a + b)) - np.log(c / (c + d))
    variances = 1 / a - 1 / (a + b) + 1 / c - 1 / (c + d)
    fitted, between, i_squared = stats.random_effects(effects, variances)
    assert fitted[:2] == pytest.approx((-0.7145, 0.1808), abs=5e-5)
    assert fitted.interval() == pytest.approx((-1.1084, -0.3206), abs=1e-4)
    assert fitted.p() == pytest.approx(0.0019, abs=5e-5)
    assert (between, i_squared) == pytest.approx((0.3132, 92.22), abs=5e-3)


@pytest.mark.parametrize(("seed", "differ"), [(0, True), (3, True), (4, True), (1, False)])
def test_random_effects_maximise_the_restricted_likelihood(seed, differ):
    rng = np.random.default_rng(seed)
    variances = rng.uniform(0.01, 0.5, 8)
    effects = rng.normal(0.3, np.sqrt(0.3 + variances))

    def minus_likelihood(between: float) -> float:
        w = 1 / (variances + between)
        center = np.average(effects, weights=w)
        return -np.log(w).sum() + np.log(w.sum()) + (w * (effects - center) ** 2).sum()

    best = optimize.minimize_scalar(minus_likelihood, bounds=(0, 20), method="bounded").x
    fitted, between, i_squared = stats.random_effects(effects, variances)
    assert between == pytest.approx(best, abs=1e-4)
    assert [between > 0, i_squared > 0] == [differ, differ]
    line = sm.WLS(effects, np.ones(8), weights=1 / (variances + between)).fit()
    assert fitted[:2] == pytest.approx((line.params[0], line.bse[0]))
    assert fitted.interval() == pytest.approx(tuple(line.conf_int()[0]))


def test_permutations_against_all_of_them():
    """1 rate, 2 seeds, 3 targets: 36 permutations."""
    stability = np.array([[[99.0, 97, 95], [99.5, 96, 95.5]]])
    accuracy = np.array([[[80.0, 81, 80.5], [79, 80.2, 83]]])
    means = stability.mean(1)[0]
    orders = list(itertools.permutations(range(3)))
    taus = [
        scipy_stats.kendalltau(means, accuracy[0, 0, list(a)] + accuracy[0, 1, list(b)]).statistic
        for a, b in itertools.product(orders, orders)
    ]
    observed = scipy_stats.kendalltau(means, accuracy.mean(1)[0]).statistic
    lower, higher = (np.mean(sign * np.array(taus) <= sign * observed + 1e-9) for sign in (1, -1))
    found = stats.permuted_tau(stability, accuracy, draws=20_000)
    assert found == pytest.approx((observed, lower, higher), abs=0.015)
    assert stats.permuted_tau(stability, accuracy, draws=20_000) == found


def test_permutations_stay_within_rate_and_seed():
    """Rates and seeds may differ as they like: only targets are exchanged."""
    rng = np.random.default_rng(0)
    stability = 99 - np.arange(3.0) + rng.normal(0, 0.1, (7, 3, 3))
    accuracy = rng.normal(80, 1, (7, 3, 3))
    shifted = accuracy + 50 * rng.normal(0, 1, (7, 3, 1))
    assert stats.permuted_tau(stability, accuracy, 500) == pytest.approx(
        stats.permuted_tau(stability, shifted, 500)
    )
    linked = accuracy - 5 * stability
    assert stats.permuted_tau(stability, linked, 500) == pytest.approx((-7, 1 / 501, 1))
    assert stats.permuted_tau(stability, -linked, 500) == pytest.approx((7, 1, 1 / 501))


def test_a_seed_that_lacks_a_target_is_left_out_of_permutations():
    rng = np.random.default_rng(13)  # with which no other way to leave it out gives the same
    stability, accuracy = 99 + rng.normal(0, 1, (2, 2, 4, 3))
    accuracy[:, 1, 2] = np.nan
    accuracy[1, 0] = np.nan
    whole = [scipy_stats.kendalltau(*(v[0][[0, 2, 3]].mean(0) for v in (stability, accuracy)))]
    whole += [scipy_stats.kendalltau(*(v[1][2:].mean(0) for v in (stability, accuracy)))]
    stability[np.isnan(accuracy)] = np.nan
    statistic = stats.permuted_tau(stability, accuracy, 50)[0]
    assert statistic == pytest.approx(sum(result.statistic for result in whole))


def test_means_that_tie_but_for_rounding():
    stability, accuracy = np.array([[[3.0, 2, 1]] * 2]), np.array([[[0.1, 0.3, 1], [0.2, 0.0, 1]]])
    assert stats.permuted_tau(stability, accuracy, 10)[0] == pytest.approx(-2 / 3)


def balanced() -> pd.DataFrame:
    """Settings and seeds crossed; x within settings has no part that seeds share."""
    rng = np.random.default_rng(1)
    within = rng.normal(0, 1, (4, 6))
    within -= within.mean(0) + within.mean(1, keepdims=True) - within.mean()
    x = 3 * np.arange(4)[:, None] + within
    y = 80 - 0.5 * x + rng.normal(0, 2, (4, 1)) + rng.normal(0, 1, (1, 6))
    y += rng.normal(0, 0.3, (4, 6))
    index = pd.MultiIndex.from_product([list("abcd"), range(6)], names=["setting", "seed"])
    return pd.DataFrame({"x": x.ravel(), "y": y.ravel()}, index=index).reset_index()


def test_slopes_between_and_within_settings():
    """In a balanced design: of the settings' means, and with settings and seeds held constant."""
    frame = balanced()
    slopes = stats.mixed_slopes(frame, "y", "x")
    means = frame.groupby("setting")[["x", "y"]].mean()
    between = scipy_stats.linregress(means.x, means.y)
    assert slopes["between"][:2] == pytest.approx((between.slope, between.stderr), rel=5e-3)
    assert slopes["between"].p() == pytest.approx(between.pvalue, rel=5e-3)
    held = sm.OLS.from_formula("y ~ x + C(setting) + C(seed)", frame).fit()
    assert slopes["within"][:2] == pytest.approx((held.params["x"], held.bse["x"]), rel=5e-3)
    assert slopes["within"].freedom == 24 - 4 - 6


def test_distance_to_normal_of_a_shifted_normal():
    """The total variation between two normals d apart is 2 Phi(d / 2) - 1."""
    edges = np.linspace(-8, 8, 4001)
    rows = [np.diff(scipy_stats.norm.cdf(edges, d)) / np.diff(edges) for d in (0, 1, 3)]
    distances = stats.distance_to_normal(np.stack(rows), 8)
    expected = 2 * scipy_stats.norm.cdf([0, 0.5, 1.5]) - 1
    assert distances == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
def test_quantiles_of_what_a_histogram_counted(q):
    values = np.exp(np.random.default_rng(0).normal(-4, 1, 100_000))
    counts, edges = np.histogram(values, np.logspace(-6, 1, 141))
    quantile = stats.histogram_quantile(counts, edges, q)
    assert quantile == pytest.approx(np.quantile(values, q), rel=0.02)
    assert math.isnan(stats.histogram_quantile(0 * counts, edges, q))
