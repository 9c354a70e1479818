"""Correlations, means and paired differences, each with its interval. No plotting, no torch."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

LEVEL = 0.95


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


def _named(estimate: Estimate) -> dict[str, float]:
    return {
        "mean": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "n": estimate.n,
    }


def _tails() -> tuple[float, float]:
    return 50 * (1 - LEVEL), 50 * (1 + LEVEL)
