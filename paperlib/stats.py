"""Correlations, means and paired differences, each with its interval. No plotting, no torch.

`Fitted` and what follows it decide claims. Where they take several data sets, these are on the
first axes of an array.
"""

import itertools
import math
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

LEVEL = 0.95
FEWEST = 3  # seeds for an interval, and different values for a correlation
EXACT_PAIRS = 16  # at most so many for all 2^n sign patterns
TIE = 1e-9  # values that are closer are equal but for rounding


class Estimate(NamedTuple):
    """A correlation with its interval at `LEVEL`, its p-value against zero, and n."""

    value: float
    low: float
    high: float
    p: float
    n: int


def pearson(x: ArrayLike, y: ArrayLike) -> Estimate:
    """Return Pearson's r with Fisher's z interval and two-sided p.

    Args:
        x: (n,).
        y: (n,).

    Returns:
        All but n is NaN if a side has fewer than `FEWEST` different values. The interval is NaN for
        fewer than 4 pairs.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if _too_few(x, y):
        return Estimate(np.nan, np.nan, np.nan, np.nan, len(x))
    result = stats.pearsonr(x, y)
    low, high = result.confidence_interval(LEVEL) if len(x) > 3 else (np.nan, np.nan)
    return Estimate(float(result.statistic), float(low), float(high), float(result.pvalue), len(x))


def kendall(x: ArrayLike, y: ArrayLike, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Return Kendall's tau-b with two-sided p and a percentile bootstrap interval over the pairs.

    Args:
        x: (n,).
        y: (n,).
        resamples: How many resamples the bootstrap draws. Those in which a side is constant are
            left out.
        seed: Of the bootstrap.

    Returns:
        NaN as for `pearson`. The interval is NaN without resamples, too. The p-value is exact if
        there are no ties and at most 33 pairs, else SciPy's "auto" decides.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if _too_few(x, y):
        return Estimate(np.nan, np.nan, np.nan, np.nan, len(x))
    result, low, high = stats.kendalltau(x, y), np.nan, np.nan
    if resamples and len(x) > 3:
        drawn = np.random.default_rng(seed).integers(len(x), size=(resamples, len(x)))
        values = [stats.kendalltau(x[pairs], y[pairs]).statistic for pairs in drawn]
        low, high = np.nanpercentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Estimate(float(result.statistic), float(low), float(high), float(result.pvalue), len(x))


def _too_few(x: np.ndarray, y: np.ndarray) -> bool:
    return min(len(np.unique(x)), len(np.unique(y))) < FEWEST


class Fitted(NamedTuple):
    """An estimate, its standard error and the degrees of freedom of its t; arrays or numbers."""

    value: Any
    error: Any
    freedom: Any

    def interval(self, level: float = LEVEL) -> tuple[Any, Any]:
        """Return Student's t interval: (low, high), NaN without degrees of freedom."""
        half = stats.t.ppf((1 + level) / 2, self.freedom) * self.error
        return self.value - half, self.value + half

    def p(self, null: float = 0.0) -> Any:
        """Return two-sided p of the t test against `null`; NaN where the standard error is 0."""
        t = (self.value - null) / np.where(self.error > 0, self.error, np.nan)
        return 2 * stats.t.sf(np.abs(t), self.freedom)


def fitted_mean(values: np.ndarray) -> Fitted:
    """Return the mean of (..., n) values along the last axis, with its standard error."""
    n = values.shape[-1]
    value = values.mean(-1) if n else np.full(values.shape[:-1], np.nan)
    error = values.std(-1, ddof=1) / math.sqrt(n) if n > 1 else value * np.nan
    return Fitted(value, error, n - 1)


def paired_differences(
    frame: pd.DataFrame, value: str, by: str, pairs: Iterable[tuple[str, str]]
) -> dict[str, Fitted]:
    """Return the mean of `value` at `by == a` minus that at `by == b` of each pair, by "a - b".

    Seeds that lack one side are left out. There is no interval of fewer than `FEWEST` pairs.

    Args:
        frame: One row a run, with columns seed, `by` and `value`.
        value: The column of the values.
        by: The column that tells the sides of a pair.
        pairs: Pairs (a, b) of entries of `by`.
    """
    wide, found = frame.pivot(index="seed", columns=by, values=value), {}
    for a, b in pairs:
        differences = (wide[a] - wide[b]).dropna().to_numpy()
        mean = fitted_mean(differences)
        enough = len(differences) >= FEWEST
        found[f"{a} - {b}"] = mean if enough else mean._replace(error=np.nan)
    return found


def band(frame: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """Return the mean of `y` with its t interval at every `x`: columns `x`, mean, low, high, n.

    There is no interval of fewer than `FEWEST` values, which would say nothing.
    """
    groups = frame.groupby(x)[y]
    means, n = groups.mean(), groups.count()
    low, high = Fitted(means, groups.sem().where(n >= FEWEST), n - 1).interval()
    return pd.DataFrame({"mean": means, "low": low, "high": high, "n": n}).reset_index()


def fitted_intercept(values: np.ndarray, covariate: np.ndarray) -> Fitted:
    """Return the intercept of the least-squares line of (..., n) values on a (n,) covariate."""
    n = len(covariate)
    if n < 3 or np.ptp(covariate) == 0:
        value = np.full(values.shape[:-1], np.nan)
        return Fitted(value, value, n - 2)
    center = covariate.mean()
    squares = ((covariate - center) ** 2).sum()
    slope = values @ (covariate - center) / squares
    intercept = values.mean(-1) - slope * center
    residuals = values - intercept[..., None] - slope[..., None] * covariate
    variance = (residuals**2).sum(-1) / (n - 2)
    return Fitted(intercept, np.sqrt(variance * (1 / n + center**2 / squares)), n - 2)


def power_of_t(effect: float, fitted: Fitted) -> float:
    """Return the chance that a 95% interval is above 0 if an effect has the error of `fitted`."""
    if not fitted.error > 0:
        return np.nan
    critical = stats.t.ppf((1 + LEVEL) / 2, fitted.freedom)
    return float(stats.nct.sf(critical, fitted.freedom, effect / fitted.error))


def sign_flip(differences: np.ndarray) -> float:
    """Return exact two-sided p of (n,) differences being symmetric about 0: all 2^n sign patterns.

    NaN for fewer than 2 differences, or more than `EXACT_PAIRS`.
    """
    if not 2 <= len(differences) <= EXACT_PAIRS:
        return np.nan
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    # Accuracies are multiples of a small step: sums that tie may differ by rounding.
    return float((np.abs(signs @ differences) >= abs(differences.sum()) - TIE).mean())


def holm(p: ArrayLike) -> np.ndarray:
    """Return Holm's adjusted p-values of (m,) p-values; those that are NaN stay so."""
    from statsmodels.stats.multitest import multipletests

    adjusted = np.array(p, float)
    there = ~np.isnan(adjusted)
    if there.any():
        adjusted[there] = multipletests(adjusted[there], method="holm")[1]
    return adjusted


def random_effects(effects: ArrayLike, variances: ArrayLike) -> tuple[Fitted, float, float]:
    """Summarize (k,) effects with known variances by REML, with Hartung and Knapp's interval.

    statsmodels has no REML here: it is the fixed-point iteration of Viechtbauer (2005). t has k - 1
    degrees of freedom; I squared is as Higgins and Thompson (2002) define it from the variance
    between.

    Returns:
        The summary, the variance between effects, and I squared in percent. All of it is NaN for
        fewer than 2 effects, or where a variance is not positive.
    """
    y, v = np.asarray(effects, float), np.asarray(variances, float)
    k = len(y)
    if k < 2 or not (v > 0).all():
        return Fitted(np.nan, np.nan, k - 1), np.nan, np.nan
    between = max(0.0, y.var(ddof=1) - v.mean())
    for _ in range(1000):
        w = 1 / (v + between)
        center = np.average(y, weights=w)
        moment = np.average((y - center) ** 2 - v, weights=w**2)
        last, between = between, max(0.0, moment + 1 / w.sum())
        if abs(between - last) < 1e-12 * (between + v.mean()):
            break
    error = math.sqrt(np.average((y - center) ** 2, weights=w) / (k - 1))
    u = 1 / v
    typical = (k - 1) * u.sum() / (u.sum() ** 2 - (u**2).sum())
    i_squared = 100 * between / (between + typical)
    return Fitted(float(center), error, k - 1), float(between), float(i_squared)


def permuted_tau(
    stability: np.ndarray, accuracy: np.ndarray, draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Test that targets with a lower stability have a higher accuracy, at all rates together.

    The statistic is the sum over rates of Kendall's tau between the targets' means over seeds.
    Accuracies are permuted among targets within rate and seed; stabilities are held.

    Args:
        stability: (rates, seeds, targets).
        accuracy: (rates, seeds, targets); NaN for all targets of a seed that is left out.
        draws: How many permutations.
        seed: Of the permutations.

    Returns:
        The statistic, and two shares of the draws and the data together: those with a statistic at
        most as high, and those with one at least as high. They are one-sided p-values for a
        negative and for a positive link. Ties count in both.
    """
    order = _order(stability)
    observed = (order * _order(accuracy)).sum()
    copies = np.broadcast_to(accuracy, (draws, *accuracy.shape))
    drawn = np.random.default_rng(seed).permuted(copies, axis=-1)
    sums = (order * _order(drawn)).sum((-2, -1))
    lower, higher = 1 + (sums <= observed).sum(), 1 + (sums >= observed).sum()
    return float(observed / order.shape[-1]), lower / (draws + 1), higher / (draws + 1)


def _order(values: np.ndarray) -> np.ndarray:
    """Return how each pair of targets' means is ordered: (..., rates, pairs) of -1, 0 and 1."""
    there = ~np.isnan(values).any(-1, keepdims=True)
    sums = np.where(there, values, 0).sum(-2)
    first, second = np.transpose(list(itertools.combinations(range(values.shape[-1]), 2)))
    difference = sums[..., first] - sums[..., second]
    tolerance = 1e-9 * np.abs(sums).max(-1, keepdims=True)
    return np.where(np.abs(difference) > tolerance, np.sign(difference), 0)


def mixed_slopes(frame: pd.DataFrame, y: str, x: str) -> dict[str, Fitted]:
    """Fit the slopes of `y` on `x` "between" settings and "within" them, in one mixed model.

    The model is linear and fitted by REML. Degrees of freedom are by containment: settings - 2
    between, and runs - settings - seeds within.

    Args:
        frame: One row a run, with columns setting and seed, which have crossed random intercepts.
        y: A column.
        x: A column.

    Returns:
        "between" and "within"; NaN where the fit did not converge.
    """
    from statsmodels.regression.mixed_linear_model import MixedLM

    means = frame.groupby("setting")[x].transform("mean")
    design = frame.assign(between=means - means.mean(), within=frame[x] - means)
    settings, seeds = frame.setting.nunique(), frame.seed.nunique()
    freedom = {"between": settings - 2, "within": len(frame) - settings - seeds}
    none = dict.fromkeys(freedom, Fitted(np.nan, np.nan, 0))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = MixedLM.from_formula(
                f"{y} ~ between + within",
                groups=np.ones(len(frame)),
                vc_formula={name: f"0 + C({name})" for name in ("setting", "seed")},
                data=design,
            )
            # This method also converges where a variance is 0.
            result = model.fit(reml=True, method="powell")
    except (np.linalg.LinAlgError, ValueError):
        return none
    if not (result.converged and np.isfinite(result.bse[list(freedom)]).all()):
        return none
    return {n: Fitted(float(result.params[n]), float(result.bse[n]), f) for n, f in freedom.items()}


def distance_to_normal(densities: np.ndarray, reach: float) -> np.ndarray:
    """Return the total variation distance of densities in [-reach, reach] to a standard normal.

    The normal is cut off at the same reach. The distance is from 0, the same, to 1, nothing in
    common.

    Args:
        densities: (rows, bins).
        reach: Of the bins, on both sides.

    Returns:
        (rows,).
    """
    edges = np.linspace(-reach, reach, densities.shape[1] + 1)
    expected = np.diff(stats.norm.cdf(edges))
    measured = densities * (edges[1] - edges[0])
    return 0.5 * (np.abs(measured - expected / expected.sum())).sum(axis=1)


def histogram_quantile(counts: np.ndarray, edges: np.ndarray, q: float = 0.5) -> float:
    """Return the q-quantile of what a histogram counted, on a log scale within its bin.

    Args:
        counts: (bins,).
        edges: (bins + 1,), positive.
        q: The share of the counts below.

    Returns:
        NaN where nothing was counted.
    """
    below = np.concatenate([[0], np.cumsum(counts)])
    if below[-1] == 0:
        return np.nan
    return float(np.exp(np.interp(q * below[-1], below, np.log(edges))))
