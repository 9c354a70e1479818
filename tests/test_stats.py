"""Correlations, means and differences, against scipy and against the formulas written out."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import optimize
from scipy import stats as scipy_stats
from statsmodels.stats.meta_analysis import combine_effects

from paperlib import stats
from paperlib.stats import Estimate, Fitted

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


# Tests that decide claims

DIFFERENCES = np.array([0.3, -0.1, 0.8, 0.5, -0.4, 0.9, 0.2])


@pytest.mark.parametrize("level", [0.90, 0.95, 0.975])
def test_a_fitted_mean_has_scipys_interval(level):
    fitted = stats.fitted_mean(DIFFERENCES)
    result = scipy_stats.ttest_1samp(DIFFERENCES, 0.1)
    assert fitted.interval(level) == pytest.approx(tuple(result.confidence_interval(level)))
    assert fitted.p(0.1) == pytest.approx(result.pvalue)


def test_fits_of_many_data_sets_are_those_of_each():
    values = np.random.default_rng(0).normal(0, 1, (4, 3, 6))
    covariate = np.arange(6.0) ** 2
    means, intercepts = stats.fitted_mean(values), stats.fitted_intercept(values, covariate)
    for at in np.ndindex(4, 3):
        alone = stats.fitted_mean(values[at])
        assert (means.value[at], means.error[at]) == pytest.approx(alone[:2])
        alone = stats.fitted_intercept(values[at], covariate)
        assert (intercepts.value[at], intercepts.error[at]) == pytest.approx(alone[:2])
    assert means.p().shape == (4, 3)


@pytest.mark.parametrize("values", [[], [2.0]])
def test_no_interval_of_one_value(values):
    fitted = stats.fitted_mean(np.array(values))
    assert np.isnan([*fitted.interval(), fitted.p()]).all()


def test_no_p_of_equal_values():
    fitted = stats.fitted_mean(np.full(4, 2.0))
    assert fitted.interval() == (2, 2)
    assert math.isnan(fitted.p())


def test_an_intercept_against_least_squares():
    covariate = np.array([0.5, 1.0, -0.2, 0.9, 0.3, 1.4, 0.6])
    fitted = stats.fitted_intercept(DIFFERENCES, covariate)
    result = sm.OLS(DIFFERENCES, sm.add_constant(covariate)).fit()
    assert (fitted.value, fitted.error) == pytest.approx((result.params[0], result.bse[0]))
    assert fitted.p() == pytest.approx(result.pvalues[0])
    assert fitted.interval() == pytest.approx(tuple(result.conf_int()[0]))


@pytest.mark.parametrize("covariate", [np.ones(7), np.arange(2.0)])
def test_no_intercept_without_a_line(covariate):
    fitted = stats.fitted_intercept(DIFFERENCES[: len(covariate)], covariate)
    assert np.isnan([fitted.value, *fitted.interval(), fitted.p()]).all()


@pytest.mark.parametrize("values", [DIFFERENCES, DIFFERENCES[:2], np.array([1.0, 1, 1, 1, -1])])
def test_sign_flips_against_scipy(values):
    result = scipy_stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert stats.sign_flip(values) == pytest.approx(result.pvalue)


def test_sign_flips_of_all_the_same_sign():
    assert stats.sign_flip(np.arange(1.0, 11)) == 2 / 2**10
    assert math.isnan(stats.sign_flip(np.array([])))
    assert math.isnan(stats.sign_flip(np.ones(40)))


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
    result = stats.random_effects(effects, 1 / a - 1 / (a + b) + 1 / c - 1 / (c + d))
    assert result.fitted[:2] == pytest.approx((-0.7145, 0.1808), abs=5e-5)
    assert result.fitted.interval() == pytest.approx((-1.1084, -0.3206), abs=1e-4)
    assert result.fitted.p() == pytest.approx(0.0019, abs=5e-5)
    assert (result.between, result.i_squared) == pytest.approx((0.3132, 92.22), abs=5e-3)


@pytest.mark.parametrize("seed", range(5))
def test_random_effects_maximise_the_restricted_likelihood(seed):
    rng = np.random.default_rng(seed)
    variances = rng.uniform(0.01, 0.5, 8)
    effects = rng.normal(0.3, np.sqrt(0.3 + variances))

    def minus_likelihood(between: float) -> float:
        w = 1 / (variances + between)
        center = np.average(effects, weights=w)
        return -np.log(w).sum() + np.log(w.sum()) + (w * (effects - center) ** 2).sum()

    best = optimize.minimize_scalar(minus_likelihood, bounds=(0, 20), method="bounded").x
    result = stats.random_effects(effects, variances)
    assert result.between == pytest.approx(best, abs=1e-4)
    w = 1 / (variances + result.between)
    line = sm.WLS(effects, np.ones(8), weights=w).fit()
    assert result.fitted[:2] == pytest.approx((line.params[0], line.bse[0]))
    assert result.fitted.interval() == pytest.approx(tuple(line.conf_int()[0]))


def test_random_effects_that_do_not_differ():
    effects, variances = np.array([0.5, 0.52, 0.49, 0.55]), np.array([0.1, 0.2, 0.15, 0.1])
    result = stats.random_effects(effects, variances)
    expected = combine_effects(effects, variances, use_t=True)
    assert (result.between, result.i_squared) == (0, 0)
    assert result.fitted.value == pytest.approx(expected.mean_effect_re)
    assert result.fitted.error == pytest.approx(expected.sd_eff_w_re_hksj)


@pytest.mark.parametrize(
    ("effects", "variances"), [([1.0], [1.0]), ([1.0, 2.0], [1.0, 0.0]), ([], [])]
)
def test_no_random_effects_of_one_or_without_variance(effects, variances):
    result = stats.random_effects(effects, variances)
    assert np.isnan([result.fitted.value, *result.fitted.interval(), result.between]).all()


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
    statistic, lower, higher = stats.permuted_tau(stability, accuracy, draws=20_000)
    assert statistic == pytest.approx(observed)
    assert lower == pytest.approx(np.mean(np.array(taus) <= observed + 1e-9), abs=0.015)
    assert higher == pytest.approx(np.mean(np.array(taus) >= observed - 1e-9), abs=0.015)
    assert stats.permuted_tau(stability, accuracy, 100) == stats.permuted_tau(
        stability, accuracy, 100
    )


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


def test_a_seed_that_is_not_whole_is_left_out_of_permutations():
    rng = np.random.default_rng(0)
    stability, accuracy = 99 + rng.normal(0, 1, (2, 2, 4, 3))
    accuracy[:, 1, 2] = np.nan
    accuracy[1, 0] = np.nan
    whole = [scipy_stats.kendalltau(*(v[0][[0, 2, 3]].mean(0) for v in (stability, accuracy)))]
    whole += [scipy_stats.kendalltau(stability[1][2:].mean(0), accuracy[1][2:].mean(0))]
    stability[np.isnan(accuracy)] = np.nan
    statistic = stats.permuted_tau(stability, accuracy, 50)[0]
    assert statistic == pytest.approx(sum(result.statistic for result in whole))


def balanced(settings: int = 4, seeds: int = 6) -> pd.DataFrame:
    """Settings and seeds crossed; x within settings has no part that seeds share."""
    rng = np.random.default_rng(1)
    within = rng.normal(0, 1, (settings, seeds))
    within -= within.mean(0) + within.mean(1, keepdims=True) - within.mean()
    x = 3 * np.arange(settings)[:, None] + within
    y = 80 - 0.5 * x + rng.normal(0, 2, (settings, 1)) + rng.normal(0, 1, (1, seeds))
    y += rng.normal(0, 0.3, (settings, seeds))
    index = pd.MultiIndex.from_product([list("abcd")[:settings], range(seeds)])
    frame = pd.DataFrame({"x": x.ravel(), "y": y.ravel()}, index=index)
    return frame.rename_axis(["setting", "seed"]).reset_index()


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


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("change", [{"y": 80.0}, {"x": 99.0}])
def test_a_model_without_a_solution_has_no_slopes(change):
    slopes = stats.mixed_slopes(balanced().assign(**change), "y", "x")
    assert set(slopes) == {"between", "within"}
    assert all(slope is None or isinstance(slope, Fitted) for slope in slopes.values())


def test_kendalls_tau_of_few_means_is_exact():
    assert stats.kendall_tau([1, 2, 3], [3, 2, 1]) == pytest.approx((-1, 1 / 3))


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
