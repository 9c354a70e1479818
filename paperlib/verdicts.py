"""How a claim gets its verdict: contrasts, their intervals, and the first rule that applies.

| verdict | when |
| --- | --- |
| incomplete | fewer runs than registered: nothing else is computed |
| not testable | a gate of the claim fails |
| no premise | the effect that the claim explains is not there |
| supported | every co-primary 95% interval excludes its null value in the claim's direction |
| contradicted | a co-primary interval at level 1 - .05/m, of m, lies wholly on the other side |
| mixed | so, but another co-primary is supported |
| negligible | every co-primary 90% interval of accuracies lies within delta of 0 |
| undecided | otherwise, or where more than one pair in ten has a run whose loss was not finite |

A claim's runs come as a frame, see `claims.load`; a `Part` of it, the runs of one network, makes
contrasts, which are paired by seed. Which contrasts a claim has: `claims_2020`, `claims_2018`. No
torch.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from paperlib import stats
from paperlib.gates import Gate, separation
from paperlib.stats import LEVEL, Fitted

MOST_DROPPED = 0.1
POWER_DRAWS = 2000
DELTA = {"conv4": 1.0}  # a difference that matters, in points; 0.5 for the other networks
OTHER_DELTA = 0.5
PRIMARY, SECONDARY, PREMISE, ADJUSTED, DESCRIBED = KINDS = (
    "co-primary",
    "secondary",
    "premise",
    "adjusted",
    "described",
)


@dataclass(frozen=True)
class Contrast:
    """One comparison, with its numbers.

    Attributes:
        name: such as "Prune_L 13% - No Pruning".
        kind: one of `KINDS`; only co-primary contrasts (for T4 the adjusted, too) decide.
        outcome: what is compared, such as "accuracy" in percent.
        fitted: the estimate; its standard error is NaN where it has no interval.
        n: pairs of runs, or what else the estimate is of; registered: how many were planned.
        sign: 1 or -1, the claim's direction.
        null: the value that the interval must exclude.
        margin: where not None, the claim is that the difference is smaller than this.
        p: of the t test against `null`, two-sided. sign_flip: exact p of the sign-flip test.
            holm: p of a secondary contrast, corrected by Holm within the claim.
        p_against: of a co-primary permutation test, whose `p` is one-sided: p of the other side.
    """

    name: str
    kind: str
    outcome: str
    fitted: Fitted
    n: int
    registered: int
    sign: int = 1
    null: float = 0.0
    margin: float | None = None
    p: float = math.nan
    sign_flip: float = math.nan
    holm: float = math.nan
    p_against: float | None = None
    note: str = ""

    @property
    def dropped(self) -> int:
        """Pairs without a number, since a run's loss was not finite."""
        return self.registered - self.n

    @property
    def supported(self) -> bool:
        """Whether its 95% interval excludes the null value in the claim's direction."""
        if self.p_against is not None:
            return self.p < (1 - LEVEL) / 2
        return bool(_supports(self.fitted, self.sign, self.null, self.margin))

    def contradicted(self, level: float) -> bool:
        """Whether its interval at this level lies wholly on the other side."""
        if self.p_against is not None:
            return self.p_against < (1 - LEVEL) / 2
        low, high = self.fitted.interval(level)
        if self.margin is not None:
            return bool(low > self.margin or high < -self.margin)
        return bool(high < self.null if self.sign > 0 else low > self.null)

    def within(self, delta: float) -> bool:
        """Whether its 90% interval lies within delta of 0."""
        low, high = self.fitted.interval(0.90)
        return bool(low > -delta and high < delta)


@dataclass(frozen=True)
class Claim:
    """A claim, the runs it is judged by, and its verdict.

    Attributes:
        done, registered: runs that are there, and that there must be.
        contrasts, gates: empty while the claim is incomplete, contrasts also where a gate fails.
        power: the chance of "supported" for a true effect of `effect` at the deviation observed.
        notes: for people.
    """

    name: str
    statement: str
    figures: tuple[str, ...]
    done: int
    registered: int
    verdict: str = ""
    contrasts: tuple[Contrast, ...] = ()
    gates: tuple[Gate, ...] = ()
    power: float = math.nan
    effect: str = ""
    notes: tuple[str, ...] = ()

    @property
    def n(self) -> str:
        """Runs that are there of those registered, such as "39 of 40"."""
        return f"{self.done} of {self.registered}"


def paired(
    name: str,
    differences: np.ndarray,
    outcome: str = "accuracy",
    kind: str = PRIMARY,
    sign: int = 1,
    null: float = 0.0,
    margin: float | None = None,
    note: str = "",
) -> Contrast:
    """The contrast of (registered,) differences, paired by seed; NaN where a pair is dropped."""
    there = differences[~np.isnan(differences)]
    fitted = stats.fitted_mean(there)
    return Contrast(
        name,
        kind,
        outcome,
        fitted,
        len(there),
        len(differences),
        sign,
        null,
        margin,
        p=float(fitted.p(null)),
        sign_flip=stats.sign_flip(there - null),
        note=note,
    )


def verdict(primary: Sequence[Contrast], delta: float | None) -> str:
    """The first verdict that applies to a claim whose runs, gates and premise are there.

    delta: in the contrasts' unit, None where they are not of accuracies.
    """
    if any(c.dropped > MOST_DROPPED * c.registered for c in primary):
        return "undecided"
    if all(c.supported for c in primary):
        return "supported"
    if any(c.contradicted(1 - (1 - LEVEL) / len(primary)) for c in primary):
        return "mixed" if any(c.supported for c in primary) else "contradicted"
    if delta is not None and all(c.within(delta) for c in primary):
        return "negligible"
    return "undecided"


def corrected(contrasts: Iterable[Contrast]) -> tuple[Contrast, ...]:
    """The same contrasts, with p-values of the secondary ones corrected by Holm."""
    contrasts = tuple(contrasts)
    adjusted = stats.holm([c.p if c.kind == SECONDARY else np.nan for c in contrasts])
    return tuple(replace(c, holm=float(p)) for c, p in zip(contrasts, adjusted, strict=True))


def power(
    differences: np.ndarray,
    effects: Sequence[float],
    rule: Callable[[np.ndarray], np.ndarray],
    draws: int = POWER_DRAWS,
) -> float:
    """The chance that a rule supports a claim if the differences have the means `effects`.

    Differences are drawn from a normal distribution with the covariance observed, as many as there
    are complete pairs; seed 0.

    Args:
        differences: (contrasts, seeds), NaN where a pair is dropped.
        rule: from (draws, contrasts, seeds) to (draws,) booleans.

    Returns:
        A share of `draws`; NaN for fewer than 2 complete pairs.
    """
    complete = differences[:, ~np.isnan(differences).any(0)]
    n = complete.shape[1]
    if n < 2:
        return math.nan
    covariance = np.atleast_2d(np.cov(complete))
    rng = np.random.default_rng(0)
    drawn = rng.multivariate_normal(effects, covariance, (draws, n), check_valid="ignore")
    return float(rule(drawn.swapaxes(1, 2)).mean())


def supports_all(primary: Sequence[Contrast]) -> Callable[[np.ndarray], np.ndarray]:
    """The rule by which co-primary contrasts that are paired support a claim, for `power`."""

    def rule(values: np.ndarray) -> np.ndarray:
        return np.all(
            [
                _supports(stats.fitted_mean(values[:, i]), c.sign, c.null, c.margin)
                for i, c in enumerate(primary)
            ],
            axis=0,
        )

    return rule


def _supports(fitted: Fitted, sign: int, null: float, margin: float | None) -> np.ndarray:
    if margin is not None:
        low, high = fitted.interval(0.90)
        return (low > -margin) & (high < margin)
    low, high = fitted.interval()
    return low > null if sign > 0 else high < null


class Part:
    """The runs of one network in some figures, by setting.

    Attributes:
        delta: the difference of accuracies that matters, in points.
        labels: of settings, for people.
    """

    def __init__(self, runs: pd.DataFrame, figures: Sequence[str], network: str) -> None:
        self.figures, self.network = tuple(figures), network
        self.runs = runs[runs.figure.isin(figures) & (runs.network == network)]
        self.delta = DELTA.get(network, OTHER_DELTA)
        once = self.runs.drop_duplicates("setting")
        self.labels = dict(zip(once.setting, once.label, strict=True))
        self._values: dict[tuple[str, bool], dict[str, pd.Series]] = {}

    @property
    def missing(self) -> int:
        """How many registered runs are not there."""
        return int((~self.runs.done).sum())

    def values(self, column: str, choosing: bool = False) -> dict[str, pd.Series]:
        """A column by setting, indexed by seed; NaN where the loss was not finite.

        choosing: of the seeds that only choose dropout, instead of all others.
        """
        if (column, choosing) not in self._values:
            chosen = self.runs[self.runs.choosing == choosing].drop_duplicates(["setting", "seed"])
            values = chosen[column].where(chosen.finite).to_numpy(float)
            seeds = chosen.seed.to_numpy()
            self._values[column, choosing] = {
                setting: pd.Series(values[at], seeds[at])
                for setting, at in chosen.groupby("setting", sort=False).indices.items()
            }
        return self._values[column, choosing]

    def differences(self, a: str, b: str, column: str = "accuracy") -> np.ndarray:
        """(registered,) differences of two settings, for the seeds that both have."""
        first, second = (self.values(column)[setting] for setting in (a, b))
        seeds = first.index.intersection(second.index)
        return first.loc[seeds].to_numpy() - second.loc[seeds].to_numpy()

    def name(self, a: str, b: str) -> str:
        """Of their difference, such as "Prune_L 13% - No Pruning"."""
        return f"{self.labels[a]} - {self.labels[b]}"

    def contrast(self, a: str, b: str, column: str = "accuracy", **how: object) -> Contrast:
        """Setting a less setting b; `how` as `paired` takes it."""
        return paired(self.name(a, b), self.differences(a, b, column), column, **how)

    def by_stability(self, settings: Sequence[str]) -> list[str]:
        """Settings from the least to the most stable, by mean stability over all seeds."""
        values = self.values("mean_stability")
        return sorted(settings, key=lambda setting: values[setting].mean())

    def separation(self, less: str, more: str) -> Gate:
        """G5 of two settings."""
        differences = self.differences(less, more, "mean_stability")
        return separation(self.figures[0], self.network, self.name(less, more), differences)

    def power(
        self,
        pairs: Sequence[tuple[str, str]],
        contrasts: Sequence[Contrast],
        effects: Sequence[float],
    ) -> float:
        """`power` of co-primary contrasts of accuracy, one for each pair, with the same seeds."""
        differences = np.stack([self.differences(*pair) for pair in pairs])
        return power(differences, effects, supports_all(contrasts))


def start(
    name: str,
    statement: str,
    parts: Sequence[Part],
    gates: Iterable[Gate],
    of: Sequence[str] = (),
    settings: Iterable[str] = (),
) -> Claim:
    """A claim with its gates; its verdict is empty where the contrasts have to decide.

    of, settings: as `gates_of` takes them.
    """
    runs = pd.concat([part.runs for part in parts]).drop_duplicates("run")
    figures = tuple(dict.fromkeys(figure for part in parts for figure in part.figures))
    claim = Claim(name, statement, figures, int(runs.done.sum()), len(runs))
    if claim.done < claim.registered or not claim.registered:
        return replace(claim, verdict="incomplete")
    return gated(claim, *gates_of(parts, gates, of, settings))


def gates_of(
    parts: Sequence[Part], gates: Iterable[Gate], of: Sequence[str], settings: Iterable[str] = ()
) -> list[Gate]:
    """Those gates that are called one of `of`, in the parts' figures and networks.

    A gate that fails is added for each of `settings` that the parts do not have.
    """
    places = {(figure, part.network) for part in parts for figure in part.figures}
    found = [g for g in gates if g.gate in of and (g.figure, g.network) in places]
    have = {setting for part in parts for setting in part.labels}
    figure, network = parts[0].figures[0], parts[0].network
    text = "the profile has no such setting of its own"
    return found + [
        Gate("settings", network, figure, setting, False, math.nan, text)
        for setting in settings
        if setting not in have
    ]


def gated(claim: Claim, *gates: Gate) -> Claim:
    """The same claim with more gates: not testable where one of them all fails."""
    gates = (*claim.gates, *gates)
    failed = any(gate.passed is False for gate in gates)
    return replace(claim, gates=gates, verdict="not testable" if failed else "")


def finish(
    claim: Claim, contrasts: Iterable[Contrast], delta: float | None, **more: object
) -> Claim:
    """The claim with its contrasts, corrected by Holm, and the verdict of the co-primary ones.

    delta: as `verdict` takes it. more: further fields of the claim.
    """
    contrasts = corrected(contrasts)
    primary = [contrast for contrast in contrasts if contrast.kind == PRIMARY]
    return replace(claim, contrasts=contrasts, verdict=verdict(primary, delta), **more)
