"""How a claim gets its verdict: contrasts, their intervals, and the first rule that applies.

| verdict | when |
| --- | --- |
| incomplete | fewer runs than registered: nothing else is computed |
| not testable | a gate of the claim fails |
| no premise | the effect that the claim explains is not there |
| supported | every co-primary 95% interval excludes its null value in the claim's direction |
| not apart from training loss | so, but not once adjusted for training loss (T4) |
| contradicted | a co-primary interval at level 1 - .05/m, of m, lies wholly on the other side |
| mixed | so, but another co-primary is supported |
| negligible | every co-primary 90% interval of accuracies lies within delta of 0 |
| undecided | otherwise, or where more than one pair in ten has a run whose loss was not finite |

A `Rule` is a claim as registered. It judges a frame of runs (`claims.load`) and gives a `Claim`. A
`Part` of that frame, the runs of one network, makes contrasts, which are paired by seed. No torch.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from paperlib import stats
from paperlib.claims.gates import Gate, separation
from paperlib.stats import LEVEL, Fitted

MOST_DROPPED = 0.1
POWER_DRAWS = 2000
LOG_EFFECT = 0.1  # for power: a tenth, where an outcome is a logarithm
DELTA = {"conv4": 1.0}  # a difference that matters, in points; 0.5 for the other networks
OTHER_DELTA = 0.5
FEWEST_NETWORKS = 3
PRIMARY, SECONDARY, PREMISE, ADJUSTED, DESCRIBED = (
    "co-primary",
    "secondary",
    "premise",
    "adjusted",
    "described",
)
DECIDING = (PRIMARY, PREMISE, ADJUSTED)
# The primary outcome and the paper's, which is secondary.
OUTCOMES = ((PRIMARY, "accuracy"), (SECONDARY, "best_accuracy"))


@dataclass(frozen=True)
class Contrast:
    """One comparison, with its numbers.

    Attributes:
        name: Such as "Prune_L 13% - No Pruning".
        kind: One of `DECIDING`, which decide, or "secondary" or "described".
        outcome: The column that is compared, such as "accuracy" in percent.
        fitted: The estimate; its standard error is NaN where it has no interval.
        n: Pairs of runs, or what else the estimate is of.
        registered: How many were planned.
        sign: 1 or -1, the claim's direction.
        null: The value that the interval must exclude.
        margin: Where not None, the claim is that the difference is smaller than this.
        p: Of the t test against `null`, two-sided.
        sign_flip: Exact p of the sign-flip test.
        holm: p of a secondary contrast, corrected by Holm within the claim.
        p_against: Of a co-primary permutation test, whose `p` is one-sided: p of the other side.
        note: For people.
        pairs: One row a registered pair: its difference, NaN where it is dropped, and the covariate
            that it is adjusted for, if any. None where the contrast is not paired.
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
    pairs: pd.DataFrame | None = field(default=None, compare=False, repr=False)

    @property
    def dropped(self) -> int:
        """Pairs without a number, since a run's loss was not finite."""
        return self.registered - self.n

    @property
    def supported(self) -> bool:
        """Whether its 95% interval excludes the null value in the claim's direction."""
        if self.p_against is not None:
            return self.p < (1 - LEVEL) / 2
        return bool(self.supported_by(self.fitted))

    def supported_by(self, fitted: Fitted) -> np.ndarray:
        """Return whether estimates like `fitted` would support the claim."""
        if self.margin is not None:
            low, high = fitted.interval(0.90)
            return (low > -self.margin) & (high < self.margin)
        low, high = fitted.interval()
        return low > self.null if self.sign > 0 else high < self.null

    def contradicted(self, level: float) -> bool:
        """Return whether its interval at this level lies wholly on the other side."""
        if self.p_against is not None:
            return self.p_against < (1 - LEVEL) / 2
        low, high = self.fitted.interval(level)
        if self.margin is not None:
            return bool(low > self.margin or high < -self.margin)
        return bool(high < self.null if self.sign > 0 else low > self.null)

    def within(self, delta: float) -> bool:
        """Return whether it is of accuracies and its 90% interval lies within delta of 0."""
        low, high = self.fitted.interval(0.90)
        return self.outcome == "accuracy" and bool(low > -delta and high < delta)

    @property
    def effect(self) -> float:
        """The true effect that power is of: a point, a tenth, or none where that is the claim."""
        if self.margin is not None or self.null:
            return 0.0
        return self.sign * (LOG_EFFECT if self.outcome.startswith("log_") else 1.0)


def paired(
    name: str,
    differences: pd.Series,
    outcome: str = "accuracy",
    kind: str = PRIMARY,
    sign: int = 1,
    null: float = 0.0,
    margin: float | None = None,
    covariate: pd.Series | None = None,
    note: str = "",
) -> Contrast:
    """Return the contrast of (registered,) differences by seed; NaN where a pair is dropped.

    covariate: another paired difference. The estimate is then for a difference of 0 in it.
    """
    pairs = pd.DataFrame({"difference": differences})
    if covariate is not None:
        pairs["covariate"] = covariate
    there = pairs.dropna()
    fitted = _fit(there.difference.to_numpy(), there)
    flipped = math.nan if covariate is not None else stats.sign_flip(there.difference - null)
    counts = len(there), len(pairs)
    numbers = {"p": float(fitted.p(null)), "sign_flip": flipped, "note": note, "pairs": pairs}
    return Contrast(name, kind, outcome, fitted, *counts, sign, null, margin, **numbers)


def _fit(values: np.ndarray, pairs: pd.DataFrame) -> Fitted:
    """Fit (..., pairs) differences: their mean, or the intercept where there is a covariate."""
    if "covariate" in pairs:
        return stats.fitted_intercept(values, pairs.covariate.to_numpy())
    return stats.fitted_mean(values)


def verdict(contrasts: Sequence[Contrast], delta: float) -> str:
    """Return the first verdict that applies to a claim whose runs and gates are there.

    delta: the difference of accuracies that matters, in points.
    """
    of = {kind: [c for c in contrasts if c.kind == kind] for kind in DECIDING}
    primary = of[PRIMARY]
    if not all(c.supported for c in of[PREMISE]):
        return "no premise"
    if any(c.dropped > MOST_DROPPED * c.registered for c in primary):
        return "undecided"
    if all(c.supported for c in primary):
        apart = all(c.supported for c in of[ADJUSTED])
        return "supported" if apart else "not apart from training loss"
    if any(c.contradicted(1 - (1 - LEVEL) / len(primary)) for c in primary):
        return "mixed" if any(c.supported for c in primary) else "contradicted"
    return "negligible" if all(c.within(delta) for c in primary) else "undecided"


def power(contrasts: Sequence[Contrast], draws: int = POWER_DRAWS) -> float:
    """Return the chance that paired contrasts support their claim if each has its true `effect`.

    Differences are drawn from a normal distribution with the covariance observed, as many as there
    are complete pairs; seed 0. Covariates stay as they are, and explain nothing.

    Args:
        contrasts: The co-primary ones, and the adjusted ones (all or none) in the same order.
        draws: How many sets of differences.

    Returns:
        A share of `draws`; NaN for fewer than 2 complete pairs.
    """
    primary = [c for c in contrasts if c.kind == PRIMARY]
    adjusted = [c for c in contrasts if c.kind == ADJUSTED]
    columns = [c.pairs.difference for c in primary] + [c.pairs.covariate for c in adjusted]
    pairs = pd.concat(columns, axis=1, join="inner").dropna().to_numpy()
    n, m = len(pairs), len(primary)
    if n < 2:
        return math.nan
    covariance = np.atleast_2d(np.cov(pairs[:, :m].T))
    effects = [c.effect for c in primary]
    rng = np.random.default_rng(0)
    drawn = rng.multivariate_normal(effects, covariance, (draws, n), check_valid="ignore")
    supported = np.ones(draws, bool)
    for i, contrast in enumerate(primary):
        supported &= contrast.supported_by(stats.fitted_mean(drawn[..., i]))
    for i, contrast in enumerate(adjusted):
        fitted = stats.fitted_intercept(drawn[..., i], pairs[:, m + i])
        supported &= contrast.supported_by(fitted)
    return float(supported.mean())


@dataclass(frozen=True)
class Claim:
    """A claim, the runs it is judged by, and its verdict.

    Attributes:
        name: Such as "T1".
        statement: The claim in a sentence.
        figures: Those whose runs decide it.
        done: Runs that are there.
        registered: Runs that there must be.
        verdict: See the module.
        contrasts: Empty while the claim is incomplete, and where a gate fails.
        gates: Empty while the claim is incomplete.
        power: The chance of "supported" for a true effect of `effect` at the deviation observed.
        effect: For people.
        notes: For people.
    """

    name: str
    statement: str
    figures: tuple[str, ...]
    done: int
    registered: int
    verdict: str = "incomplete"
    contrasts: tuple[Contrast, ...] = ()
    gates: tuple[Gate, ...] = ()
    power: float = math.nan
    effect: str = ""
    notes: tuple[str, ...] = ()

    @property
    def n(self) -> str:
        """Runs that are there of those registered, such as "39 of 40"."""
        return f"{self.done} of {self.registered}"


class Part:
    """The runs of one network in some figures, by setting.

    Attributes:
        delta: The difference of accuracies that matters, in points.
        labels: Of settings, for people.
    """

    def __init__(self, runs: pd.DataFrame, figures: Sequence[str], network: str) -> None:
        """Take the part of `runs`, a frame as `claims.load` returns it."""
        self.figures, self.network = tuple(figures), network
        self.everything = runs
        self.runs = runs[runs.figure.isin(figures) & (runs.network == network)]
        self.delta = DELTA.get(network, OTHER_DELTA)
        self.labels = dict(zip(self.runs.setting, self.runs.label, strict=True))

    def values(self, setting: str, column: str, choosing: bool = False) -> pd.Series:
        """Return a column of a setting by seed; NaN where the loss was not finite.

        choosing: of the seeds that only choose dropout, instead of all others.
        """
        runs = self.runs[(self.runs.setting == setting) & (self.runs.choosing == choosing)]
        runs = runs.drop_duplicates("seed").set_index("seed")
        return runs[column].where(runs.finite).astype(float)

    def differences(self, a: str, b: str, column: str = "accuracy") -> pd.Series:
        """Return (registered,) differences of two settings, for the seeds that both have."""
        first, second = self.values(a, column), self.values(b, column)
        seeds = first.index.intersection(second.index)
        return first.loc[seeds] - second.loc[seeds]

    def name(self, a: str, b: str) -> str:
        """Return the name of their difference, such as "Prune_L 13% - No Pruning"."""
        return f"{self.labels[a]} - {self.labels[b]}"

    def contrast(
        self, a: str, b: str, column: str = "accuracy", kind: str = PRIMARY, **how: Any
    ) -> Contrast:
        """Return the contrast of setting a less setting b; `how` as `paired` takes it."""
        return paired(self.name(a, b), self.differences(a, b, column), column, kind, **how)

    def by_stability(self, settings: Sequence[str]) -> list[str]:
        """Sort settings from the least to the most stable, by mean stability over all seeds."""
        return sorted(settings, key=lambda setting: self.values(setting, "mean_stability").mean())

    def separation(self, less: str, more: str) -> Gate:
        """Evaluate G5 of two settings."""
        differences = self.differences(less, more, "mean_stability").to_numpy()
        return separation(self.figures[0], self.network, self.name(less, more), differences)

    def lacks(self, setting: str, text: str = "the profile has no such setting of its own") -> Gate:
        """Return the gate that fails where the profile lacks what the claim needs."""
        return Gate("settings", self.network, self.figures[0], setting, False, math.nan, text)

    def gates(self, found: Iterable[Gate], names: Sequence[str], settings: Iterable[str]) -> list:
        """Return those gates of `names` that are this part's, and one for each setting it lacks."""
        mine = [g for g in found if g.gate in names and g.network == self.network]
        mine = [g for g in mine if g.figure in self.figures]
        return mine + [self.lacks(setting) for setting in settings if setting not in self.labels]


Findings = Iterator[Gate | Contrast | str]


@dataclass(frozen=True)
class Rule:
    """A claim as it is registered.

    Attributes:
        name: Such as "T1".
        statement: The claim in a sentence.
        figures: Those whose runs decide it.
        network: Of these runs.
        gates: Names of those that must not fail.
        settings: Those that a profile must have.
        findings: A generator of what is compared, from the part: gates (the first that fails ends
            it), then the contrasts that decide, then the others; texts are notes.
        effect: What power is of, for people.
        power: In place of `power` where contrasts are not paired, from the part and the contrasts.
        networks: T2's, as figure, network and settings. `findings` takes those as further parts
            whose gates pass. Where fewer than `FEWEST_NETWORKS` do, the claim is not testable.
        beside: Figures that secondary contrasts read.
        shown: Figures that show the same runs.
    """

    name: str
    statement: str
    figures: tuple[str, ...]
    network: str
    gates: tuple[str, ...]
    settings: tuple[str, ...]
    findings: Callable[..., Findings]
    effect: str = "1 point"
    power: Callable[[Part, Sequence[Contrast]], float] | None = None
    networks: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    beside: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """The figures whose runs it reads."""
        figures = [*self.figures, *(figure for figure, *_ in self.networks), *self.beside]
        return tuple(dict.fromkeys(figures))

    def judge(self, runs: pd.DataFrame, gates: Iterable[Gate], secondary: bool = True) -> Claim:
        """Judge the claim.

        Args:
            runs: As `claims.load` returns them.
            gates: As `gates.evaluate` returns them.
            secondary: Without it, only what decides is computed: no other contrast and no power.
        """
        part, gates = Part(runs, self.figures, self.network), list(gates)
        networks = [(Part(runs, (f,), network), settings) for f, network, settings in self.networks]
        parts = [part, *(network for network, _ in networks)]
        needed = pd.concat([p.runs for p in parts]).drop_duplicates("run")
        figures = tuple(dict.fromkeys(figure for p in parts for figure in p.figures))
        claim = Claim(self.name, self.statement, figures, int(needed.done.sum()), len(needed))
        if claim.done < claim.registered or not claim.registered:
            return claim
        found = part.gates(gates, self.gates, self.settings)
        untestable = any(gate.passed is False for gate in found)
        kept, notes, contrasts = [], [], []
        for network, settings in networks:
            its = network.gates(gates, self.gates, settings)
            failed = [gate.gate for gate in its if gate.passed is False]
            found += its
            if failed:
                place = f"{network.network} of {network.figures[0]}"
                notes.append(f"{place} is left out: {failed[0]} fails")
            else:
                kept.append(network)
        untestable |= bool(networks) and len(kept) < FEWEST_NETWORKS
        findings = self.findings(part, *kept)
        while not untestable and (finding := next(findings, None)) is not None:
            if isinstance(finding, Gate):
                found.append(finding)
                untestable = finding.passed is False
            elif isinstance(finding, str):
                notes.append(finding)
            elif secondary or finding.kind in DECIDING:
                contrasts.append(finding)
            else:
                break
        claim = replace(claim, gates=tuple(found), notes=tuple(notes))
        if untestable:
            return replace(claim, verdict="not testable")
        return self._decided(claim, part, contrasts, secondary)

    def _decided(
        self, claim: Claim, part: Part, contrasts: list[Contrast], with_power: bool
    ) -> Claim:
        """Return the claim with its contrasts, corrected by Holm, its verdict and its power."""
        corrected = stats.holm([c.p if c.kind == SECONDARY else math.nan for c in contrasts])
        claim = replace(
            claim,
            verdict=verdict(contrasts, part.delta),
            contrasts=tuple(
                replace(c, holm=float(p)) for c, p in zip(contrasts, corrected, strict=True)
            ),
        )
        if not with_power:
            return claim
        chance = self.power(part, contrasts) if self.power else power(contrasts)
        return replace(claim, power=chance, effect=self.effect)
