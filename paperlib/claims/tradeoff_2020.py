"""The claims of arXiv 1906.03728, T1 to T5, as registered in docs/evidence.md. Imports no torch.

`_findings` yields the contrasts of a claim: first those that decide, then the others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pandas as pd

from paperlib import stats
from paperlib.claims.contrasts import BELOW, OUTCOMES, Contrast, Kind, paired
from paperlib.claims.gates import UNPRUNED
from paperlib.claims.verdicts import Findings, Part, Rule
from paperlib.stats import Fitted

VGG, RESNET18 = "VGG11", "ResNet18"
DOSE_AND_TARGET = ("smallest 4", "smallest 40", "largest 40")
PRUNE_WEIGHTS = "largest 40 weights"
RESTORED = "restored 2480"
NOISE = ("zeroing", "gaussian")
SPANS = (0, 51, 1106)
PERIODS = (4, 20, 40, 60, 100, 200, 300)
TARGETS = ("smallest", "random", "largest")
# T2's networks: figure, network and settings. T2 compares the least with the most stable setting,
# or the two of a pair in this order.
NETWORKS = (
    ("figure-2", RESNET18, DOSE_AND_TARGET),
    ("figure-B2", VGG, DOSE_AND_TARGET),
    ("figure-B2", RESNET18, DOSE_AND_TARGET),
    ("table-C1", RESNET18, DOSE_AND_TARGET),
    *(("figure-4", n, ("smallest 60", "smallest 30")) for n in (RESNET18, "ResNet20", "ResNet56")),
    ("figure-C3", RESNET18, ("smallest 0.10", "smallest 0.06")),
)
POWER_DRAWS = 300  # of T2


class Tradeoff(Rule):
    """A claim about VGG11."""

    network = VGG


class T1(Tradeoff):
    """The least stable setting - the most stable > 0, and the least stable - No Pruning > 0.

    Secondary: the other pairs, and accuracy on mean stability between and within settings.
    """

    statement = "Pruning's benefit to generalization grows with its instability."
    figures = ("figure-2",)
    gates = ("G1", "G2", "G3", "G4")
    settings: tuple[str, ...] = (*DOSE_AND_TARGET, UNPRUNED)
    compared: Sequence[str] = DOSE_AND_TARGET
    shown = ("figure-E6",)

    def _findings(self, part: Part, *networks: Part) -> Findings:
        order = part.by_stability(self.compared)
        least, most = order[0], order[-1]
        yield part.separation(least, most)
        pairs = (least, most), (least, UNPRUNED)
        for kind, outcome in OUTCOMES.items():
            yield from (part.contrast(*pair, outcome, kind) for pair in pairs)
        for a, b in combinations([*order, UNPRUNED], 2):
            if (a, b) not in pairs:
                apart = b == UNPRUNED or part.separation(a, b).passed
                note = "" if apart else "mean stabilities not told apart (G5)"
                yield part.contrast(a, b, kind="secondary", note=note)
        yield from _slopes(part, self.compared)


def _slopes(part: Part, settings: Sequence[str]) -> Iterator[Contrast]:
    """Yield slopes of accuracy on mean stability, and Kendall's tau of the settings' means."""
    frame = part.runs[part.runs.setting.isin(settings) & ~part.runs.choosing]
    registered, frame = len(frame), frame[frame.finite]
    for kind, slope in stats.mixed_slopes(frame, "accuracy", "mean_stability").items():
        name, p = f"accuracy on mean stability, {kind} settings", float(slope.p())
        note, counts = "did not converge" if np.isnan(slope.value) else "", (len(frame), registered)
        yield Contrast(name, "secondary", "accuracy", slope, *counts, BELOW, p, note=note)
    means = frame.groupby("setting")[["mean_stability", "accuracy"]].mean()
    tau = stats.kendall(means.mean_stability, means.accuracy, resamples=0)
    name, fitted = "Kendall's tau of the settings' means", Fitted(tau.value, np.nan, 0)
    yield Contrast(name, "described", "accuracy", fitted, tau.n, tau.n, BELOW, tau.p)


class T2(Tradeoff):
    """Figure 3 is tested by permutation, and the networks of other figures by random effects.

    T2 is supported if both tests support it.
    """

    statement = "The tradeoff holds across a wide variety of pruning settings."
    figures = ("figure-3",)
    gates = ("G2", "G3", "G4")
    settings = tuple(f"{target} {PERIODS[0]}" for target in TARGETS)
    networks = NETWORKS
    shown = ("figure-C1", "figure-C2")
    draws = 10_000

    def _findings(self, part: Part, *networks: Part) -> Findings:
        yield _permuted(part, self.draws, "accuracy", "co-primary")
        yield from _together(networks, "accuracy", "co-primary")
        yield _permuted(part, self.draws, "best_accuracy", "secondary")
        yield _together(networks, "best_accuracy", "secondary")[0]

    def power(self, part: Part, contrasts: Sequence[Contrast]) -> float:
        """Return the chance that both of T2's tests, which share no run, find an effect of 1 point.

        In Figure 3 the effect is between the least and the most stable target of each rate, with
        the deviation observed. In the other networks it is their mean, with the standard error
        observed.
        """
        stability, accuracy = _by_rate(part, "mean_stability"), _by_rate(part, "accuracy")
        lost = np.isnan(accuracy).any(2, keepdims=True)
        stability, accuracy = (np.where(lost, np.nan, x) for x in (stability, accuracy))
        rates, _, targets = accuracy.shape
        residuals = accuracy - np.nanmean(accuracy, 1, keepdims=True)
        residuals -= residuals.mean(2, keepdims=True)
        freedom = (np.isfinite(residuals[..., 0]).sum() - rates) * (targets - 1)
        deviation = np.sqrt(np.nansum(residuals**2) / freedom)
        rank = np.nanmean(stability, 1, keepdims=True).argsort(2).argsort(2)
        noise = np.random.default_rng(0).standard_normal((POWER_DRAWS, *accuracy.shape))
        drawn = np.where(lost, np.nan, 0.5 - rank / (targets - 1) + deviation * noise)
        found = [stats.permuted_tau(stability, values, 499)[1] < 0.025 for values in drawn]
        _, together = (c.fitted for c in contrasts if c.kind == "co-primary")
        return float(np.mean(found) * stats.power_of_t(1.0, together))


def _by_rate(part: Part, column: str) -> np.ndarray:
    """Return a column of Figure 3 as (rates, seeds, targets), for the rates of all targets."""
    of_rates = [[f"{target} {period}" for target in TARGETS] for period in PERIODS]
    rates = [
        pd.concat([part.values(setting, column) for setting in settings], axis=1)
        for settings in of_rates
        if set(settings) <= set(part.labels)
    ]
    return np.stack(rates)


def _permuted(part: Part, draws: int, column: str, kind: Kind) -> Contrast:
    """Compare Figure 3's targets. The co-primary test is one-sided at half of 5%."""
    stability, accuracy = _by_rate(part, "mean_stability"), _by_rate(part, column)
    statistic, lower, higher = stats.permuted_tau(stability, accuracy, draws)
    whole = ~np.isnan(accuracy).any(-1)
    name = "Figure 3: Kendall's tau of targets, summed over rates"
    fitted, p = Fitted(statistic, np.nan, 0), min(1.0, 2 * min(lower, higher))
    return Contrast(name, kind, column, fitted, int(whole.sum()), whole.size, BELOW, p)


def _together(networks: Sequence[Part], column: str, kind: Kind) -> list[Contrast]:
    """Return the summary of the networks, then the contrast of each as description."""
    each = []
    for part in networks:
        order = part.settings if len(part.settings) == 2 else part.by_stability(part.settings)
        contrast = part.contrast(order[0], order[-1], column, "described")
        each.append(replace(contrast, name=f"{part.network}: {contrast.name}"))
    used = [c for c in each if c.fitted.error > 0]
    effects, variances = [c.fitted.value for c in used], [c.fitted.error**2 for c in used]
    fitted, between, i_squared = stats.random_effects(effects, variances)
    name = f"{len(used)} networks together"
    counts = sum(c.n for c in used), sum(c.registered for c in each)
    plain = float(stats.fitted_mean(np.array(effects)).p())
    note = (
        f"I squared {i_squared:.0f}%, tau {between**0.5:.2f} points, plain t test p = {plain:.2g}"
    )
    return [Contrast(name, kind, column, fitted, *counts, p=float(fitted.p()), note=note), *each]


class T3(Tradeoff):
    """Longest zeroing - No Pruning > 0, and longest Gaussian - No Pruning > 0.

    Secondary: the trend over spans, and noise - Prune_L above -delta.
    """

    statement = "Pruning regularizes like noise injection."
    figures = ("figure-5",)
    gates = ("G1", "share")
    settings = (*(f"{n} {span}" for n, span in product(NOISE, SPANS)), UNPRUNED, PRUNE_WEIGHTS)

    def _findings(self, part: Part, *networks: Part) -> Findings:
        longest = {noise: f"{noise} {SPANS[-1]}" for noise in NOISE}
        for kind, outcome in OUTCOMES.items():
            yield from (part.contrast(s, UNPRUNED, outcome, kind) for s in longest.values())
        spans = np.log10(1 + np.array(SPANS))
        weights = (spans - spans.mean()) / ((spans - spans.mean()) ** 2).sum()
        for noise, setting in longest.items():
            of_spans = [part.values(f"{noise} {span}", "accuracy") for span in SPANS]
            slopes = pd.concat(of_spans, axis=1, join="inner") @ weights
            name = f"{noise}: accuracy on log10(1 + the paper's training batches)"
            yield paired(name, slopes, kind="secondary")
            yield part.contrast(setting, PRUNE_WEIGHTS, kind="secondary", region=part.not_worse)


class T4(Tradeoff):
    """Log Tr(H) and log Tr(C) of the less stable setting are lower, also adjusted for loss.

    Secondary: delta_w. Described: pruned against unpruned, which is not T4.
    """

    statement = "Less stable pruning leads to flatter models."
    figures = ("figure-6",)
    gates = ("G1", "G3", "G4")
    settings = (*DOSE_AND_TARGET, UNPRUNED)
    effect = "a tenth of Tr(H) and Tr(C)"  # not 1 point: these are no accuracies
    shown = ("figure-E1", "figure-E2", "figure-E3", "figure-E4", "figure-E5")

    def _findings(self, part: Part, *networks: Part) -> Findings:
        positive = part.runs[["curvature", "noise", "train_loss"]].where(lambda v: v > 0)
        part.runs = part.runs.assign(**np.log(positive).add_prefix("log_"))
        order = part.by_stability(DOSE_AND_TARGET)
        pair = less, more = order[0], order[-1]
        yield part.separation(less, more)
        outcomes = "log_curvature", "log_noise"
        yield from (part.contrast(*pair, outcome, region=BELOW) for outcome in outcomes)
        loss = part.differences(*pair, "log_train_loss")
        for outcome in outcomes:
            note = "adjusted for log training loss"
            yield part.contrast(*pair, outcome, "adjusted", region=BELOW, covariate=loss, note=note)
        yield part.contrast(*pair, "delta_w", "secondary")
        for setting, outcome in product(pair, outcomes):
            yield part.contrast(setting, UNPRUNED, outcome, "described", region=BELOW)


class T5(Tradeoff):
    """Restored - No Pruning > 0, and the lower limit of restored - Prune_L above -delta.

    The premise is that Prune_L is better than No Pruning.
    """

    statement = "The benefit does not depend on parameters being removed for good."
    figures = ("figure-D2",)
    gates = ("G1",)
    settings = (RESTORED, UNPRUNED, PRUNE_WEIGHTS)
    effect = "1 point over No Pruning, none against Prune_L"

    def _findings(self, part: Part, *networks: Part) -> Findings:
        yield part.contrast(PRUNE_WEIGHTS, UNPRUNED, kind="premise")
        for kind, outcome in OUTCOMES.items():
            yield part.contrast(RESTORED, UNPRUNED, outcome, kind)
            yield part.contrast(RESTORED, PRUNE_WEIGHTS, outcome, kind, region=part.not_worse)


RULES = (T1(), T2(), T3(), T4(), T5())
