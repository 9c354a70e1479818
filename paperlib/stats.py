"""Correlations, means and paired differences, each with its interval. No plotting, no torch.

The tests that decide claims work along the last axis of their arrays, so that many simulated data
sets cost about as much as one.
"""

import itertools
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import special, stats

LEVEL = 0.95
EXACT_PAIRS = 20  # at most so many for all 2^n sign patterns


@dataclass(frozen=True)
class Estimate:
    """A number with its interval at `LEVEL`, its p-value against zero where it has one, and n."""

    value: float
    low: float
    high: float
    p: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}], n = {self.n}"


def verdict(estimate: Estimate, sign: int) -> str:
    """What an estimate says of a claim that it is positive (sign 1) or negative (sign -1).

    "supported" or "contradicted" where its interval leaves 0 out, else "undecided".
    """
    low, high = sorted((sign * estimate.low, sign * estimate.high))
    return "supported" if low > 0 else "contradicted" if high < 0 else "undecided"


def pearson(x: ArrayLike, y: ArrayLike) -> Estimate:
    """Pearson's r with Fisher's z interval and two-sided p.

    x, y: (n,). All but n is NaN for fewer than 3 pairs or where one side is constant; the
    interval needs 4 pairs.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    n = len(x)
    if n < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Estimate(np.nan, np.nan, np.nan, np.nan, n)
    result = stats.pearsonr(x, y)
    low = high = np.nan
    if n > 3:
        low, high = result.confidence_interval(LEVEL)
    return Estimate(float(result.statistic), float(low), float(high), float(result.pvalue), n)


def kendall(x: ArrayLike, y: ArrayLike, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Kendall's tau-b with a percentile bootstrap interval over the pairs, and two-sided p.

    x, y: (n,). NaN as for `pearson`; resamples in which a side is constant are left out.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    n = len(x)
    if n < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Estimate(np.nan, np.nan, np.nan, np.nan, n)
    result = stats.kendalltau(x, y)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(n, size=(resamples, n))
    order_x, order_y = (np.sign(np.subtract.outer(v, v)) for v in (x, y))
    values = []
    for i in drawn:
        a, b = order_x[np.ix_(i, i)], order_y[np.ix_(i, i)]
        ties = np.sqrt((a * a).sum() * (b * b).sum())
        values.append((a * b).sum() / ties if ties > 0 else np.nan)
    low, high = np.nanpercentile(values, _tails()) if n > 3 else (np.nan, np.nan)
    return Estimate(float(result.statistic), float(low), float(high), float(result.pvalue), n)


def mean(values: ArrayLike) -> Estimate:
    """Mean with Student's t interval, of (n,) values; the interval needs two, p is against 0."""
    values = np.asarray(values, float)
    n = len(values)
    if n < 2:
        return Estimate(float(values.mean()) if n else np.nan, np.nan, np.nan, np.nan, n)
    center, error = values.mean(), stats.sem(values)
    half = error * stats.t.ppf((1 + LEVEL) / 2, n - 1)
    p = stats.ttest_1samp(values, 0).pvalue if error > 0 else np.nan
    return Estimate(float(center), float(center - half), float(center + half), float(p), n)


def paired_difference(frame: pd.DataFrame, value: str, by: str, a: str, b: str) -> Estimate:
    """Mean of value at `by == a` minus value at `by == b`, paired by seed, with its t interval.

    frame: one row a run, columns seed, `by` and `value`. Seeds that lack one side are left out.
    """
    wide = frame[frame[by].isin([a, b])].pivot(index="seed", columns=by, values=value)
    return mean((wide[a] - wide[b]).dropna()) if {a, b} <= set(wide) else mean([])


def paired_differences(
    frame: pd.DataFrame, value: str, by: str, pairs: Iterable[tuple[str, str]]
) -> dict[str, Estimate]:
    """`paired_difference` of each pair (a, b), by "a - b"."""
    return {f"{a} - {b}": paired_difference(frame, value, by, a, b) for a, b in pairs}


def band(frame: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """Mean of `y` with its t interval at every `x`: columns `x`, mean, low, high, n."""
    rows = [{x: at, **_named(mean(group))} for at, group in frame.groupby(x)[y]]
    return pd.DataFrame(rows, columns=[x, "mean", "low", "high", "n"])


def summary(runs: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """Mean and standard deviation over seeds, and n, by `label`.

    columns: column of `runs` -> its name in the table.
    """
    groups = runs.groupby("label", sort=False)
    parts = {name: groups[column].agg(["mean", "std"]) for column, name in columns.items()}
    table = pd.concat(parts, axis=1)
    table["n", ""] = groups.size()
    return table


def pooled_t_test(a: ArrayLike, b: ArrayLike) -> tuple[float, float]:
    """Two-sided t test with pooled variance: (t, p); NaN where a side has fewer than 2 values."""
    if min(len(a), len(b)) < 2:
        return np.nan, np.nan
    result = stats.ttest_ind(a, b, equal_var=True)
    return float(result.statistic), float(result.pvalue)


class Fitted(NamedTuple):
    """An estimate, its standard error and the degrees of freedom of its t; arrays or numbers."""

    value: ArrayLike
    error: ArrayLike
    freedom: float

    def interval(self, level: float = LEVEL) -> tuple[ArrayLike, ArrayLike]:
        """Student's t interval: (low, high), NaN without degrees of freedom."""
        half = _quantile(self.freedom, (1 + level) / 2) * self.error
        return self.value - half, self.value + half

    def p(self, null: float = 0.0) -> ArrayLike:
        """Two-sided p of the t test against `null`; NaN where the standard error is 0."""
        if self.freedom < 1:
            return self.value * np.nan
        with np.errstate(divide="ignore", invalid="ignore"):
            t = (np.asarray(self.value) - null) / np.where(self.error, self.error, np.nan)
        return 2 * special.stdtr(self.freedom, -np.abs(t))


def fitted_mean(values: np.ndarray) -> Fitted:
    """The mean of (..., n) values along the last axis, with its standard error."""
    n = values.shape[-1]
    if n < 2:
        value = values.mean(-1) if n else np.full(values.shape[:-1], np.nan)
        return Fitted(value, value * np.nan, n - 1)
    return Fitted(values.mean(-1), values.std(-1, ddof=1) / math.sqrt(n), n - 1)


def fitted_intercept(values: np.ndarray, covariate: np.ndarray) -> Fitted:
    """The intercept of the least-squares line of (..., n) values on a (n,) covariate."""
    n = len(covariate)
    if n < 3 or np.ptp(covariate) == 0:
        value = np.full(values.shape[:-1], np.nan)
        return Fitted(value, value, n - 2)
    design = np.stack([np.ones(n), covariate], axis=1)
    coefficients = values @ np.linalg.pinv(design).T
    residuals = values - coefficients @ design.T
    variance = (residuals**2).sum(-1) / (n - 2)
    leverage = np.linalg.inv(design.T @ design)[0, 0]
    return Fitted(coefficients[..., 0][()], np.sqrt(variance * leverage), n - 2)


def sign_flip(differences: np.ndarray) -> float:
    """Exact two-sided p of (n,) differences being symmetric about 0: all 2^n sign patterns.

    NaN for no differences, or more than `EXACT_PAIRS`.
    """
    n = len(differences)
    if not 0 < n <= EXACT_PAIRS:
        return np.nan
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    tolerance = 1e-9 * np.abs(differences).sum()
    return float((np.abs(sums) >= abs(np.sum(differences)) - tolerance).mean())


def holm(p: ArrayLike) -> np.ndarray:
    """Holm's adjusted p-values of (m,) p-values; those that are NaN stay so and do not count."""
    from statsmodels.stats.multitest import multipletests

    adjusted = np.array(p, float)
    there = ~np.isnan(adjusted)
    if there.any():
        adjusted[there] = multipletests(adjusted[there], method="holm")[1]
    return adjusted


class RandomEffects(NamedTuple):
    """A random-effects summary: `fitted`, the variance between effects, and I squared (percent)."""

    fitted: Fitted
    between: float
    i_squared: float


def random_effects(effects: ArrayLike, variances: ArrayLike) -> RandomEffects:
    """Summary of (k,) effects with known variances: REML, with Hartung and Knapp's interval.

    REML by the fixed-point iteration of Viechtbauer (2005); t with k - 1 degrees of freedom; I
    squared as Higgins and Thompson (2002) define it from the variance between. All of it is NaN
    for fewer than 2 effects, or where a variance is not positive.
    """
    y, v = np.asarray(effects, float), np.asarray(variances, float)
    k = len(y)
    if k < 2 or not (v > 0).all():
        return RandomEffects(Fitted(np.nan, np.nan, k - 1), np.nan, np.nan)
    between = max(0.0, y.var(ddof=1) - v.mean())
    for _ in range(1000):
        w = 1 / (v + between)
        center = (w * y).sum() / w.sum()
        moment = (w**2 * ((y - center) ** 2 - v)).sum() / (w**2).sum()
        last, between = between, max(0.0, moment + 1 / w.sum())
        if abs(between - last) < 1e-10 * (between + v.mean()):
            break
    w = 1 / (v + between)
    center = (w * y).sum() / w.sum()
    error = math.sqrt((w * (y - center) ** 2).sum() / ((k - 1) * w.sum()))
    u = 1 / v
    typical = (k - 1) * u.sum() / (u.sum() ** 2 - (u**2).sum())
    i_squared = 100 * between / (between + typical)
    return RandomEffects(Fitted(float(center), error, k - 1), float(between), float(i_squared))


def permuted_tau(
    stability: np.ndarray, accuracy: np.ndarray, draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Test that targets with a lower stability have a higher accuracy, at all rates together.

    stability, accuracy: (rates, seeds, targets); NaN for all targets of a seed that is left out.
    The statistic is the sum over rates of Kendall's tau between the targets' means over seeds.
    Accuracies are permuted among targets within rate and seed; stabilities are held.

    Returns the statistic, and the shares of `draws`, the data among them, with one at most and at
    least as high: one-sided p-values for a negative and for a positive link. Ties count in both.
    """
    pairs = list(itertools.combinations(range(accuracy.shape[-1]), 2))
    order = _order(stability, pairs)
    observed = (order * _order(accuracy, pairs)).sum()
    rng = np.random.default_rng(seed)
    lower = higher = 1
    for chunk in np.diff(np.linspace(0, draws, draws // 1000 + 2).astype(int)):
        drawn = rng.permuted(np.broadcast_to(accuracy, (chunk, *accuracy.shape)), axis=-1)
        sums = (order * _order(drawn, pairs)).sum((-2, -1))
        lower += (sums <= observed).sum()
        higher += (sums >= observed).sum()
    return float(observed / len(pairs)), float(lower / (draws + 1)), float(higher / (draws + 1))


def _order(values: np.ndarray, pairs: list[tuple[int, int]]) -> np.ndarray:
    """How the means over seeds of each pair are ordered: (..., rates, pairs) of -1, 0 and 1."""
    there = ~np.isnan(values).any(-1, keepdims=True)
    sums = np.where(there, values, 0).sum(-2)
    first, second = np.transpose(pairs)
    difference = sums[..., first] - sums[..., second]
    tolerance = 1e-9 * np.abs(sums).max(-1, keepdims=True)
    return np.where(np.abs(difference) > tolerance, np.sign(difference), 0)


def mixed_slopes(frame: pd.DataFrame, y: str, x: str) -> dict[str, Fitted | None]:
    """Slopes of `y` on `x` "between" settings and "within" them, in one linear mixed model.

    frame: one row a run, columns setting and seed, which have crossed random intercepts. The model
    is fitted by REML. Degrees of freedom are by containment: settings - 2 between, and runs -
    settings - seeds within. None in place of a slope where the fit did not converge.
    """
    from statsmodels.regression.mixed_linear_model import MixedLM

    means = frame.groupby("setting")[x].transform("mean")
    design = pd.DataFrame(
        {"intercept": 1.0, "between": means - means.mean(), "within": frame[x] - means}
    )
    formula = {name: f"0 + C({name})" for name in ("setting", "seed")}
    settings, seeds = frame.setting.nunique(), frame.seed.nunique()
    freedom = {"between": settings - 2, "within": len(frame) - settings - seeds}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = MixedLM.from_formula(
                f"{y} ~ between + within",
                groups=np.ones(len(frame)),
                vc_formula=formula,
                data=design.assign(**{y: frame[y], "setting": frame.setting, "seed": frame.seed}),
            )
            # This method also converges where a variance is 0.
            result = model.fit(reml=True, method="powell")
    except (np.linalg.LinAlgError, ValueError):
        return dict.fromkeys(freedom)
    slopes = {
        name: Fitted(float(result.params[name]), float(result.bse[name]), freedom[name])
        for name in freedom
    }
    sound = result.converged and all(np.isfinite(slope.error) for slope in slopes.values())
    return slopes if sound else dict.fromkeys(freedom)


def kendall_tau(x: ArrayLike, y: ArrayLike) -> tuple[float, float]:
    """Kendall's tau of (n,) values with its two-sided p, which is exact where there are no ties."""
    result = stats.kendalltau(x, y)
    return float(result.statistic), float(result.pvalue)


def distance_to_normal(densities: np.ndarray, reach: float) -> np.ndarray:
    """Total variation distance of (rows, bins) densities in [-reach, reach] to a standard normal.

    From 0, the same, to 1, nothing in common. Returns (rows,).
    """
    edges = np.linspace(-reach, reach, densities.shape[1] + 1)
    expected = np.diff(stats.norm.cdf(edges))
    measured = densities * (edges[1] - edges[0])
    return 0.5 * (np.abs(measured - expected / expected.sum())).sum(axis=1)


def histogram_quantile(counts: np.ndarray, edges: np.ndarray, q: float = 0.5) -> float:
    """The q-quantile of what a histogram counted, on a log scale within its bin.

    counts: (bins,), edges: (bins + 1,), positive. NaN where nothing was counted.
    """
    below = np.concatenate([[0], np.cumsum(counts)])
    if below[-1] == 0:
        return np.nan
    return float(np.exp(np.interp(q * below[-1], below, np.log(edges))))


def _quantile(freedom: float, q: float) -> float:
    return float(special.stdtrit(freedom, q)) if freedom >= 1 else np.nan


def _named(estimate: Estimate) -> dict[str, float]:
    return {
        "mean": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "n": estimate.n,
    }


def _tails() -> tuple[float, float]:
    return 50 * (1 - LEVEL), 50 * (1 + LEVEL)
