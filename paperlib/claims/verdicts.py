"""Verdicts of claims: the first rule that applies to their contrasts.

| verdict | condition |
| --- | --- |
| incomplete | there are fewer runs than registered: nothing else is computed |
| not testable | a gate of the claim fails |
| no premise | the effect that the claim explains is not there |
| undecided | more than one in ten pairs of a co-primary contrast were dropped |
| supported | every co-primary 95% interval (90% for equivalence) lies in the claim's region |
| not apart from training loss | the same, but not after adjustment for training loss (T4) |
| contradicted | one of m co-primary intervals, at level 1 - .05/m, lies wholly outside the region |
| mixed | the same, but another co-primary is supported |
| negligible | every co-primary contrast is of accuracies, with a 90% interval within delta of 0 |
| undecided | otherwise |

A `Rule` is a claim as registered. It judges a frame of runs (`claims.load`) and gives a `Claim`. A
`Part` of that frame, the runs of one network, makes contrasts, which are paired by seed. Imports no
torch.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np
import pandas as pd

from paperlib import stats
from paperlib.claims.contrasts import DECIDING, Contrast, Kind, paired
from paperlib.claims.gates import Gate
from paperlib.stats import LEVEL

MOST_DROPPED = 0.1
POWER_DRAWS = 20_000
DELTA = {"conv4": 1.0}  # a difference that matters, in points; 0.5 for the other networks
OTHER_DELTA = 0.5
FEWEST_NETWORKS = 3


def verdict(contrasts: Sequence[Contrast], delta: float) -> str:
    """Return the first verdict that applies to a claim that is complete and testable.

    Args:
        contrasts: The claim's contrasts.
        delta: The difference of accuracies that matters, in points.
    """
    primary = [c for c in contrasts if c.kind == "co-primary"]
    supported = {kind: all(c.supported for c in contrasts if c.kind == kind) for kind in DECIDING}
    if any(c.dropped > MOST_DROPPED * c.registered for c in contrasts if c.kind in DECIDING):
        return "undecided"
    if not supported["premise"]:
        return "no premise"
    if supported["co-primary"]:
        return "supported" if supported["adjusted"] else "not apart from training loss"
    if any(c.contradicted(1 - (1 - LEVEL) / len(primary)) for c in primary):
        return "mixed" if any(c.supported for c in primary) else "contradicted"
    return "negligible" if all(c.within(delta) for c in primary) else "undecided"


def power(contrasts: Sequence[Contrast], draws: int = POWER_DRAWS) -> float:
    """Return the chance that paired contrasts support their claim if each has its true `effect`.

    Differences are drawn with seed 0 from a normal distribution with the covariance observed. A
    premise has to hold, too. Covariates stay as they are, and explain nothing.

    Args:
        contrasts: The claim's contrasts. Adjusted ones, if any, are in the order of the co-primary
            ones.
        draws: The number of data sets, each of as many pairs as are complete.

    Returns:
        The chance, or NaN for fewer than 2 complete pairs.
    """
    primary = [c for c in contrasts if c.kind in ("co-primary", "premise")]
    adjusted = [c for c in contrasts if c.kind == "adjusted"]
    columns = [c.pairs.difference for c in primary] + [c.pairs.covariate for c in adjusted]
    pairs = pd.concat(columns, axis=1, join="inner").dropna().to_numpy()
    n, m = len(pairs), len(primary)
    if n < 2:
        return math.nan
    covariance = np.atleast_2d(np.cov(pairs[:, :m].T))
    drawn = np.random.default_rng(0).multivariate_normal(
        [c.effect for c in primary], covariance, (draws, n), check_valid="ignore"
    )
    fits = [(c, stats.fitted_mean(drawn[..., i])) for i, c in enumerate(primary)]
    for i, contrast in enumerate(adjusted):
        fits.append((contrast, stats.fitted_intercept(drawn[..., i], pairs[:, m + i])))
    supported = [contrast.supported_by(fit.interval(contrast.level)) for contrast, fit in fits]
    return float(np.all(supported, axis=0).mean())


@dataclass(frozen=True)
class Claim:
    """A claim, the number of its runs, and its verdict.

    Attributes:
        name: A name such as "T1".
        statement: The claim in a sentence.
        figures: The figures whose runs decide it.
        done: The number of runs that are there.
        registered: The number of runs that it needs.
        verdict: One of the verdicts in the module's docstring.
        contrasts: Empty while the claim is incomplete, and if a gate fails.
        gates: Empty while the claim is incomplete.
        power: The chance of "supported" for a true effect of `effect` at the deviation observed.
        effect: The effect in words.
        notes: Remarks for people.
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
        """The runs that are there of those registered, such as "39 of 40"."""
        return f"{self.done} of {self.registered}"

    @property
    def failures(self) -> list[str]:
        """The gates that fail, in words."""
        return [
            f"{g.gate} fails: {' '.join((g.figure, g.network, g.setting)).strip()}: {g.text}"
            for g in self.gates
            if g.passed is False
        ]


class Part:
    """The runs of one network in some figures, by setting.

    Attributes:
        delta: The difference of accuracies that matters, in points.
        not_worse: The region of differences above -delta; see `Contrast`.
        alike: The region of differences within delta of 0.
        labels: Setting -> its label for people.
    """

    def __init__(
        self, runs: pd.DataFrame, figures: Sequence[str], network: str, settings: Sequence[str] = ()
    ) -> None:
        """Select the part from `runs` as `claims.load` returns them. It needs the `settings`."""
        self.figures, self.network, self.settings = tuple(figures), network, settings
        self.everything = runs
        self.runs = runs[runs.figure.isin(figures) & (runs.network == network)]
        self.delta = DELTA.get(network, OTHER_DELTA)
        self.not_worse, self.alike = (-self.delta, math.inf), (-self.delta, self.delta)
        self.labels = dict(zip(self.runs.setting, self.runs.label, strict=True))

    def values(self, setting: str, column: str, choosing: bool = False) -> pd.Series:
        """Return a column of a setting by seed; NaN if the loss was not finite.

        Args:
            setting: The setting's name.
            column: The column.
            choosing: Take the seeds that only choose dropout, instead of all others.
        """
        runs = self._by_seed(setting, choosing)
        return runs[column].where(runs.finite).astype(float)

    def _by_seed(self, setting: str, choosing: bool = False) -> pd.DataFrame:
        runs = self.runs[(self.runs.setting == setting) & (self.runs.choosing == choosing)]
        return runs.drop_duplicates("seed").set_index("seed")

    def differences(self, a: str, b: str, column: str = "accuracy") -> pd.Series:
        """Return the differences (registered,) of two settings by seed, for seeds of both."""
        first, second = self.values(a, column).align(self.values(b, column), join="inner")
        return first - second

    def contrast(
        self, a: str, b: str, column: str = "accuracy", kind: Kind = "co-primary", **how: Any
    ) -> Contrast:
        """Return the contrast of setting `a` minus setting `b`; `how` is as for `paired`.

        Its note tells how many of its pairs were made on two kinds of device.
        """
        name = f"{self.labels[a]} - {self.labels[b]}"
        contrast = paired(name, self.differences(a, b, column), column, kind, **how)
        devices = pd.concat([self._by_seed(s).device for s in (a, b)], axis=1, join="inner")
        if mixed := (devices.nunique(axis=1) > 1).sum():
            note = f"{mixed} of {len(devices)} pairs are between two devices"
            contrast = replace(contrast, note="; ".join(filter(None, (contrast.note, note))))
        return contrast

    def by_stability(self, settings: Sequence[str]) -> list[str]:
        """Sort settings from the least to the most stable, by mean stability over all seeds."""
        return sorted(settings, key=lambda setting: self.values(setting, "mean_stability").mean())

    def separation(self, less: str, more: str) -> Gate:
        """Evaluate G5: the mean stabilities of two settings differ, paired by seed."""
        contrast = self.contrast(less, more, "mean_stability")
        value, (low, high) = contrast.fitted.value, contrast.fitted.interval()
        text = f"mean stability differs by {value:.2f} [{low:.2f}, {high:.2f}] percent"
        apart = bool(low > 0 or high < 0)
        return Gate("G5", self.network, self.figures[0], contrast.name, apart, float(value), text)

    def lacks(self, setting: str, text: str = "the profile has no such setting of its own") -> Gate:
        """Return a failed gate: the profile lacks something that the claim needs."""
        return Gate("settings", self.network, self.figures[0], setting, False, math.nan, text)

    def gates(self, found: Iterable[Gate], names: Sequence[str]) -> list[Gate]:
        """Return this part's gates of these names, and a failed one for each setting it lacks."""
        mine = [g for g in found if g.network == self.network and g.figure in self.figures]
        lacking = [setting for setting in self.settings if setting not in self.labels]
        return [g for g in mine if g.gate in names] + [self.lacks(setting) for setting in lacking]


Findings = Iterator[Gate | Contrast | str]


class Rule:
    """A claim as registered. Each claim is a class of the same name.

    Attributes:
        statement: The claim in a sentence.
        figures: The figures whose runs decide it.
        network: The network of these runs.
        gates: The names of the gates that must not fail.
        settings: The settings that a profile must have.
        effect: The effect that power is computed for, in words.
        networks: T2's networks: figure, network and settings.
        beside: Figures that secondary contrasts read.
        shown: Figures that show the same runs.
    """

    statement: str
    figures: tuple[str, ...]
    network: str
    gates: tuple[str, ...]
    settings: tuple[str, ...] = ()
    effect = "1 point"
    networks: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    beside: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The claim's name, such as "T1"."""
        return type(self).__name__

    @property
    def reads(self) -> tuple[str, ...]:
        """The figures whose runs the claim reads."""
        figures = [*self.figures, *(figure for figure, *_ in self.networks), *self.beside]
        return tuple(dict.fromkeys(figures))

    def _findings(self, part: Part, *networks: Part) -> Findings:
        """Yield gates, contrasts and notes from the runs.

        The contrasts that decide come before the others. `judge` stops at the first gate that
        fails. Texts are notes.

        Args:
            part: The runs of `figures` and `network`.
            networks: The parts of `networks` whose gates pass.
        """
        raise NotImplementedError

    def power(self, part: Part, contrasts: Sequence[Contrast]) -> float:
        """Return the chance that the claim is supported if the true effect is `effect`."""
        return power(contrasts)

    def judge(self, runs: pd.DataFrame, gates: Iterable[Gate], secondary: bool = True) -> Claim:
        """Judge the claim.

        Args:
            runs: As `claims.load` returns them.
            gates: As `gates.evaluate` returns them.
            secondary: Also compute the contrasts that do not decide, and the power.
        """
        part = Part(runs, self.figures, self.network, self.settings)
        parts = [part, *(Part(runs, (f,), network, s) for f, network, s in self.networks)]
        needed = pd.concat([each.runs for each in parts]).drop_duplicates("run")
        figures = tuple(dict.fromkeys(figure for each in parts for figure in each.figures))
        claim = Claim(self.name, self.statement, figures, int(needed.done.sum()), len(needed))
        if claim.done < claim.registered or not claim.registered:
            return claim
        found: dict[type, list] = {Gate: [], Contrast: [], str: []}
        kept = []
        for each in parts:
            found[Gate] += (its := each.gates(gates, self.gates))
            failed = [gate.gate for gate in its if gate.passed is False]
            if not failed:
                kept.append(each)
            elif each is not part:
                place = f"{each.network} of {each.figures[0]}"
                found[str].append(f"{place} is left out: {failed[0]} fails")
        testable = part in kept and (len(parts) == 1 or len(kept) > FEWEST_NETWORKS)
        findings = self._findings(*kept) if testable else iter(())
        if not secondary:
            findings = takewhile(lambda f: getattr(f, "kind", "") in ("", *DECIDING), findings)
        for finding in findings:
            found[type(finding)].append(finding)
            if isinstance(finding, Gate) and finding.passed is False:
                testable = False
                break
        claim = replace(claim, gates=tuple(found[Gate]), notes=tuple(found[str]))
        if not testable:
            return replace(claim, verdict="not testable")
        contrasts: list[Contrast] = found[Contrast]
        holm = stats.holm([c.p if c.kind == "secondary" else math.nan for c in contrasts])
        corrected = tuple(replace(c, holm=p) for c, p in zip(contrasts, holm.tolist(), strict=True))
        claim = replace(claim, verdict=verdict(contrasts, part.delta), contrasts=corrected)
        if not secondary:
            return claim
        return replace(claim, power=self.power(part, contrasts), effect=self.effect)
