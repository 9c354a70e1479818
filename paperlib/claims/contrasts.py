"""Contrasts: comparisons of settings, with their estimates and intervals. Imports no torch."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from paperlib import stats
from paperlib.stats import LEVEL, Fitted

LOG_EFFECT = 0.1  # effect that power is computed for, if an outcome is a logarithm: a tenth
Kind = Literal["co-primary", "premise", "adjusted", "secondary", "described"]
ABOVE, BELOW = (0.0, math.inf), (-math.inf, 0.0)
DECIDING: tuple[Kind, ...] = ("co-primary", "premise", "adjusted")
OUTCOMES: dict[Kind, str] = {"co-primary": "accuracy", "secondary": "best_accuracy"}


@dataclass(frozen=True)
class Contrast:
    """One comparison, with its numbers.

    Attributes:
        name: A name such as "Prune_L 13% - No Pruning".
        kind: One of `DECIDING`, or of the kinds that decide nothing.
        outcome: The column that is compared, such as "accuracy" in percent.
        fitted: The estimate. Its standard error is NaN if it has no interval.
        n: The number of pairs; for contrasts that are not paired, of runs, settings or seeds.
        registered: The number planned.
        region: The claim is that the value lies between these two: above or below a null value, or
            for equivalence between two finite values.
        p: Two-sided p of the t test against `null`. For a permutation test, which has no interval,
            twice the smaller one-sided p.
        sign_flip: Exact p of the sign-flip test.
        holm: Holm's adjusted p of a secondary contrast, within the claim.
        note: A remark for people.
        pairs: One row a registered pair: its difference, NaN if it is dropped, and the covariate
            that it is adjusted for, if any. Empty if the contrast is not paired.
    """

    name: str
    kind: Kind
    outcome: str
    fitted: Fitted
    n: int
    registered: int
    region: tuple[float, float] = ABOVE
    p: float = math.nan
    sign_flip: float = math.nan
    holm: float = math.nan
    note: str = ""
    pairs: pd.DataFrame = field(default_factory=pd.DataFrame, compare=False, repr=False)

    @property
    def dropped(self) -> int:
        """Pairs without a number: a loss was not finite, or a measure has no logarithm (T4)."""
        return self.registered - self.n

    @property
    def null(self) -> float:
        """The null value of p and of the sign-flip test."""
        return self.region[0] if self.region[1] == math.inf else 0.0

    @property
    def level(self) -> float:
        """The level of the interval that supports the claim: 90% for equivalence."""
        return LEVEL if math.inf in map(abs, self.region) else 0.90

    def interval(self, level: float) -> tuple[float, float]:
        """Return Student's t interval; for a permutation test the estimate if p < 5%, else all."""
        if not np.isnan(self.fitted.error):
            return self.fitted.interval(level)
        value = self.fitted.value
        return (value, value) if self.p < 1 - LEVEL else (-math.inf, math.inf)

    def supported_by(self, interval: tuple[Any, Any]) -> np.ndarray:
        """Return for each interval whether it lies within the claim's region."""
        return (interval[0] > self.region[0]) & (interval[1] < self.region[1])

    @property
    def supported(self) -> bool:
        """Whether its interval lies within the claim's region."""
        return bool(self.supported_by(self.interval(self.level)))

    def contradicted(self, level: float) -> bool:
        """Return whether its interval at this level lies wholly outside the claim's region."""
        low, high = self.interval(level)
        return bool(low > self.region[1] or high < self.region[0])

    def within(self, delta: float) -> bool:
        """Return whether it compares accuracies and its 90% interval lies within delta of 0."""
        low, high = self.fitted.interval(0.90)
        return self.outcome == "accuracy" and bool(low > -delta and high < delta)

    @property
    def effect(self) -> float:
        """The true effect for power: a point, a tenth, or 0 if the claim is no difference."""
        if self.region not in (ABOVE, BELOW):
            return 0.0
        size = LOG_EFFECT if self.outcome.startswith("log_") else 1.0
        return size if self.region == ABOVE else -size


def paired(
    name: str,
    differences: pd.Series,
    outcome: str = "accuracy",
    kind: Kind = "co-primary",
    covariate: pd.Series | None = None,
    region: tuple[float, float] = ABOVE,
    note: str = "",
) -> Contrast:
    """Return the contrast of differences that are paired by seed.

    Args:
        name: As for `Contrast`, like outcome, kind, region and note.
        differences: (registered,) by seed, NaN if a pair is dropped.
        outcome: As for `Contrast`.
        kind: As for `Contrast`.
        covariate: (registered,) another paired difference. The estimate is then for a difference of
            0 in it, and there is no sign-flip test.
        region: As for `Contrast`.
        note: As for `Contrast`.
    """
    pairs = pd.DataFrame({"difference": differences})
    if covariate is not None:
        pairs["covariate"] = covariate
    there, *beside = pairs.dropna().to_numpy().T
    fitted = stats.fitted_intercept(there, *beside) if beside else stats.fitted_mean(there)
    if len(there) and np.ptp(there) < stats.TIE:  # equal, as of few images: no deviation to see
        fitted = fitted._replace(error=math.nan)
    contrast = Contrast(
        name, kind, outcome, fitted, len(there), len(pairs), region, note=note, pairs=pairs
    )
    null = contrast.null
    flipped = math.nan if beside else stats.sign_flip(there - null)
    if region not in (ABOVE, BELOW):
        (low, high), (least, most) = fitted.interval(contrast.level), region
        note = f"{contrast.level:.0%} interval [{low:+.2f}, {high:+.2f}] to lie above {least:g}"
        note += f", p against {null:g}" if most == math.inf else f" and below {most:g}"
    return replace(contrast, p=float(fitted.p(null)), sign_flip=flipped, note=note)
