"""The claims of arXiv 1906.03728, T1 to T5, as they are registered in docs/evidence.md. No torch.

Each claim is a `verdicts.Rule`. The function of its name yields what is compared: first what
decides, then what stands beside it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pandas as pd

from paperlib import stats
from paperlib.claims.gates import UNPRUNED
from paperlib.claims.verdicts import (
    ADJUSTED,
    DESCRIBED,
    OUTCOMES,
    PREMISE,
    PRIMARY,
    SECONDARY,
    Contrast,
    Findings,
    Part,
    Rule,
    paired,
)
from paperlib.stats import Fitted

VGG, RESNET18 = "VGG11", "ResNet18"
DOSE_AND_TARGET = ("smallest 4", "smallest 40", "largest 40")
PRUNE_WEIGHTS = "largest 40 weights"
RESTORED = "restored 2480"
NOISE = ("zeroing", "gaussian")
SPANS = (0, 51, 1106)
PERIODS = (4, 20, 40, 60, 100, 200, 300)
TARGETS = ("smallest", "random", "largest")
# T2's networks by figure; the settings whose least and most stable are compared, or a pair.
NETWORKS = (
    ("figure-2", RESNET18, DOSE_AND_TARGET),
    ("figure-B2", VGG, DOSE_AND_TARGET),
    ("figure-B2", RESNET18, DOSE_AND_TARGET),
    ("table-C1", RESNET18, DOSE_AND_TARGET),
    *(("figure-4", n, ("smallest 60", "smallest 30")) for n in (RESNET18, "ResNet20", "ResNet56")),
    ("figure-C3", RESNET18, ("smallest 0.10", "smallest 0.06")),
)
PERMUTATIONS = 10_000
POWER_DRAWS = 300  # of T2


def t1(part: Part, settings: Sequence[str] = DOSE_AND_TARGET) -> Findings:
    """The least stable setting - the most stable > 0, and the least stable - No Pruning > 0.

    Then the other pairs, and accuracy on mean stability between and within settings.
    """
    order = part.by_stability(settings)
    least, most = order[0], order[-1]
    yield part.separation(least, most)
    pairs = (least, most), (least, UNPRUNED)
    for kind, outcome in OUTCOMES:
        yield from (part.contrast(*pair, outcome, kind) for pair in pairs)
    for a, b in combinations([*order, UNPRUNED], 2):
        if (a, b) not in pairs:
            apart = b == UNPRUNED or part.separation(a, b).passed
            note = "" if apart else "mean stabilities not told apart (G5)"
            yield part.contrast(a, b, kind=SECONDARY, note=note)
    yield from _slopes(part, settings)


def _slopes(part: Part, settings: Sequence[str]) -> Iterator[Contrast]:
    """Accuracy on mean stability between and within settings, and Kendall's tau of their means."""
    frame = part.runs[part.runs.setting.isin(settings) & ~part.runs.choosing]
    registered, frame = len(frame), frame[frame.finite]
    for kind, slope in stats.mixed_slopes(frame, "accuracy", "mean_stability").items():
        fitted = slope or Fitted(np.nan, np.nan, 0)
        name, note = (
            f"accuracy on mean stability, {kind} settings",
            "" if slope else "did not converge",
        )
        p = float(fitted.p())
        counts = len(frame), registered
        yield Contrast(name, SECONDARY, "accuracy", fitted, *counts, sign=-1, p=p, note=note)
    means = frame.groupby("setting")[["mean_stability", "accuracy"]].mean()
    tau = stats.kendall(means.mean_stability, means.accuracy)
    name, fitted = "Kendall's tau of the settings' means", Fitted(tau.value, np.nan, 0)
    yield Contrast(name, DESCRIBED, "accuracy", fitted, tau.n, tau.n, sign=-1, p=tau.p)


def t2(part: Part, *networks: Part, draws: int = PERMUTATIONS) -> Findings:
    """Figure 3 by permutation, and the networks of other figures by random effects.

    Supported if both are.
    """
    periods = _periods(part)
    if not periods:
        yield part.lacks(f"{TARGETS[0]} {PERIODS[0]}")
        return
    yield _permuted(part, draws, "accuracy", PRIMARY)
    yield from _together(networks, "accuracy", PRIMARY)
    yield _permuted(part, draws, "best_accuracy", SECONDARY)
    yield _together(networks, "best_accuracy", SECONDARY)[0]


def _periods(part: Part) -> list[int]:
    """Return the periods that the profile has for every target."""
    return [p for p in PERIODS if {f"{target} {p}" for target in TARGETS} <= set(part.labels)]


def _by_rate(part: Part, column: str) -> np.ndarray:
    """Return Figure 3 as (rates, seeds, targets)."""
    rates = [
        pd.concat([part.values(f"{target} {period}", column) for target in TARGETS], axis=1)
        for period in _periods(part)
    ]
    return np.stack(rates)


def _permuted(part: Part, draws: int, column: str, kind: str) -> Contrast:
    stability, accuracy = _by_rate(part, "mean_stability"), _by_rate(part, column)
    statistic, p, p_against = stats.permuted_tau(stability, accuracy, draws)
    whole = ~np.isnan(accuracy).any(-1)
    contrast = Contrast(
        "Figure 3: Kendall's tau of targets, summed over rates",
        kind,
        column,
        Fitted(statistic, np.nan, 0),
        n=int(whole.sum()),
        registered=whole.size,
        sign=-1,
        p=p,
        p_against=p_against,
    )
    if kind == PRIMARY:
        return contrast
    return replace(contrast, p=min(1.0, 2 * min(p, p_against)), p_against=None)


def _together(networks: Sequence[Part], column: str, kind: str) -> list[Contrast]:
    """Return the networks' summary, then each network's contrast as description."""
    each = []
    settings = {(figure, network): of for figure, network, of in NETWORKS}
    for part in networks:
        order: Sequence[str] = settings[part.figures[0], part.network]
        if len(order) > 2:
            order = part.by_stability(order)
        contrast = part.contrast(order[0], order[-1], column, DESCRIBED)
        each.append(replace(contrast, name=f"{part.network}: {contrast.name}"))
    used, summary = _summary(each)
    together = Contrast(
        f"{len(used)} networks together: less - more stable",
        kind,
        column,
        summary.fitted,
        n=sum(c.n for c in used),
        registered=sum(c.registered for c in each),
        p=float(summary.fitted.p()),
        note=f"I squared {summary.i_squared:.0f}%, tau {summary.between**0.5:.2f} points",
    )
    return [together, *each]


def _summary(contrasts: Sequence[Contrast]) -> tuple[list[Contrast], stats.RandomEffects]:
    """Return those networks' contrasts that have an interval, and their summary."""
    used = [c for c in contrasts if c.kind == DESCRIBED and c.fitted.error > 0]
    effects, variances = [c.fitted.value for c in used], [c.fitted.error**2 for c in used]
    return used, stats.random_effects(effects, variances)


def power_of_t2(part: Part, contrasts: Sequence[Contrast]) -> float:
    """Return the chance that both of T2's tests, which share no run, find an effect of 1 point.

    In Figure 3, between the least and the most stable target of each rate; in the other networks
    in the mean, with the variances observed within and between them.
    """
    stability, accuracy = _by_rate(part, "mean_stability"), _by_rate(part, "accuracy")
    rng = np.random.default_rng(0)
    residuals = accuracy - np.nanmean(accuracy, 1, keepdims=True)
    residuals = residuals - residuals.mean(2, keepdims=True)
    rates, seeds, targets = accuracy.shape
    freedom = np.isfinite(residuals[..., 0]).sum() - rates
    deviation = np.sqrt(np.nansum(residuals**2) / (freedom * (targets - 1)))
    rank = np.nanmean(stability, 1).argsort(1).argsort(1)
    means = 0.5 - rank[:, None, :] / (targets - 1)
    by_rate = means + deviation * rng.standard_normal((POWER_DRAWS, rates, seeds, targets))
    found = [stats.permuted_tau(stability, drawn, 499)[1] < 0.025 for drawn in by_rate]
    used, summary = _summary(contrasts)
    variances = np.array([c.fitted.error**2 for c in used])
    freedom = np.array([c.fitted.freedom for c in used])
    together = []
    for _ in range(POWER_DRAWS):
        effects = 1 + rng.normal(0, np.sqrt(summary.between + variances))
        drawn = variances * rng.chisquare(freedom) / freedom
        together.append(stats.random_effects(effects, drawn).fitted.interval()[0] > 0)
    return float(np.mean(found) * np.mean(together))


def t3(part: Part) -> Findings:
    """Longest zeroing - No Pruning > 0, and longest Gaussian - No Pruning > 0.

    Then the trend over spans, and whether noise is not worse than Prune_L by delta.
    """
    for kind, outcome in OUTCOMES:
        for noise in NOISE:
            yield part.contrast(f"{noise} {SPANS[-1]}", UNPRUNED, outcome, kind)
    spans = np.log10(1 + np.array(SPANS))
    weights = (spans - spans.mean()) / ((spans - spans.mean()) ** 2).sum()
    for noise in NOISE:
        of_spans = [part.values(f"{noise} {span}", "accuracy") for span in SPANS]
        slopes = pd.concat(of_spans, axis=1, join="inner") @ weights
        name = f"{noise}: accuracy on log10(1 + the paper's training batches)"
        yield paired(name, slopes, kind=SECONDARY)
        longest = f"{noise} {SPANS[-1]}"
        yield part.contrast(longest, PRUNE_WEIGHTS, kind=SECONDARY, null=-part.delta)


def t4(part: Part) -> Findings:
    """Log Tr(H) and log Tr(C) of the less stable setting are lower, adjusted for loss, too.

    Then delta_w, and pruned against unpruned, which is not T4.
    """
    positive = part.runs[["curvature", "noise", "train_loss"]].where(lambda v: v > 0)
    part.runs = part.runs.assign(**np.log(positive).add_prefix("log_"))
    order = part.by_stability(DOSE_AND_TARGET)
    pair = less, more = order[0], order[-1]
    yield part.separation(less, more)
    outcomes = "log_curvature", "log_noise"
    yield from (part.contrast(*pair, outcome, sign=-1) for outcome in outcomes)
    loss = part.differences(*pair, "log_train_loss")
    for outcome in outcomes:
        note = "adjusted for log training loss"
        yield part.contrast(*pair, outcome, ADJUSTED, sign=-1, covariate=loss, note=note)
    yield part.contrast(*pair, "delta_w", SECONDARY)
    for setting, outcome in product(pair, outcomes):
        yield part.contrast(setting, UNPRUNED, outcome, DESCRIBED, sign=-1)


def t5(part: Part) -> Findings:
    """Restored - No Pruning > 0, and the lower limit of restored - Prune_L above -delta.

    The premise is that Prune_L is better than No Pruning.
    """
    yield part.contrast(PRUNE_WEIGHTS, UNPRUNED, kind=PREMISE)
    for kind, outcome in OUTCOMES:
        yield part.contrast(RESTORED, UNPRUNED, outcome, kind)
        yield part.contrast(RESTORED, PRUNE_WEIGHTS, outcome, kind, null=-part.delta)


T1 = Rule(
    name="T1",
    statement="Pruning's benefit to generalization grows with its instability.",
    figures=("figure-2",),
    network=VGG,
    gates=("G1", "G2", "G3", "G4"),
    settings=(*DOSE_AND_TARGET, UNPRUNED),
    findings=t1,
    shown=("figure-E6",),
)
T2 = Rule(
    name="T2",
    statement="The tradeoff holds across a wide variety of pruning settings.",
    figures=("figure-3",),
    network=VGG,
    gates=("G2", "G3", "G4"),
    settings=(),
    findings=t2,
    power=power_of_t2,
    networks=NETWORKS,
    shown=("figure-C1", "figure-C2"),
)
T3 = Rule(
    name="T3",
    statement="Pruning regularizes like noise injection.",
    figures=("figure-5",),
    network=VGG,
    gates=("G1", "share"),
    settings=(*(f"{kind} {span}" for kind in NOISE for span in SPANS), UNPRUNED, PRUNE_WEIGHTS),
    findings=t3,
)
T4 = Rule(
    name="T4",
    statement="Less stable pruning leads to flatter models.",
    figures=("figure-6",),
    network=VGG,
    gates=("G1", "G3", "G4"),
    settings=(*DOSE_AND_TARGET, UNPRUNED),
    findings=t4,
    effect="a tenth of Tr(H) and Tr(C)",  # they have no points
    shown=tuple(f"figure-E{number}" for number in range(1, 6)),
)
T5 = Rule(
    name="T5",
    statement="The benefit does not depend on parameters being removed for good.",
    figures=("figure-D2",),
    network=VGG,
    gates=("G1",),
    settings=(RESTORED, UNPRUNED, PRUNE_WEIGHTS),
    findings=t5,
    effect="1 point over No Pruning, none against Prune_L",
)
RULES = (T1, T2, T3, T4, T5)
