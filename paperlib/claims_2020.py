"""The claims of arXiv 1906.03728, T1 to T5.

Each function takes `runs` as `claims.load` returns them and the results of `gates.evaluate`, and
returns a `Claim`. With `secondary=False` it leaves out secondary contrasts and power, which change
no verdict. No torch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pandas as pd

from paperlib import stats
from paperlib.gates import UNPRUNED, Gate
from paperlib.stats import Fitted
from paperlib.verdicts import (
    ADJUSTED,
    DESCRIBED,
    PREMISE,
    PRIMARY,
    SECONDARY,
    Claim,
    Contrast,
    Part,
    finish,
    gated,
    gates_of,
    paired,
    power,
    start,
    supports_all,
)

STATEMENTS = {
    "T1": "Pruning's benefit to generalization grows with its instability.",
    "T2": "The tradeoff holds across a wide variety of pruning settings.",
    "T3": "Pruning regularizes like noise injection.",
    "T4": "Less stable pruning leads to flatter models.",
    "T5": "The benefit does not depend on parameters being removed for good.",
}
VGG, RESNET18 = "VGG11", "ResNet18"
DOSE_AND_TARGET = ("smallest 4", "smallest 40", "largest 40")
PRUNE_WEIGHTS = "largest 40 weights"
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
FEWEST_NETWORKS = 3
PERMUTATIONS = 10_000
LOG_EFFECT, LOG_EFFECT_TEXT = 0.1, "a tenth of Tr(H) and Tr(C)"  # they have no points
POWER_DRAWS = 300  # of T2


def t1(runs: pd.DataFrame, gates: Iterable[Gate], secondary: bool = True) -> Claim:
    """Figure 2's VGG11: the least stable setting against the most stable, and No Pruning."""
    part = Part(runs, ("figure-2",), VGG)
    settings = (*DOSE_AND_TARGET, UNPRUNED)
    claim = start("T1", STATEMENTS["T1"], [part], gates, ("G1", "G2", "G3", "G4"), settings)
    if claim.verdict:
        return claim
    order = part.by_stability(DOSE_AND_TARGET)
    least, most = order[0], order[-1]
    claim = gated(claim, part.separation(least, most))
    if claim.verdict:
        return claim
    pairs = [(least, most), (least, UNPRUNED)]
    contrasts = [part.contrast(*pair) for pair in pairs]
    if not secondary:
        return finish(claim, contrasts, part.delta)
    chance = part.power(pairs, contrasts, [1, 1])
    contrasts += [part.contrast(*pair, "best_accuracy", kind=SECONDARY) for pair in pairs]
    for a, b in combinations([*order, UNPRUNED], 2):
        if (a, b) not in pairs:
            apart = b == UNPRUNED or part.separation(a, b).passed
            note = "" if apart else "mean stabilities not told apart (G5)"
            contrasts.append(part.contrast(a, b, kind=SECONDARY, note=note))
    contrasts += _slopes(part)
    return finish(claim, contrasts, part.delta, power=chance, effect="1 point")


def _slopes(part: Part) -> list[Contrast]:
    """Accuracy on mean stability between and within settings, and Kendall's tau of their means."""
    of = part.runs.setting.isin(DOSE_AND_TARGET) & ~part.runs.choosing
    frame = part.runs[of & part.runs.finite]
    contrasts = []
    for kind, slope in stats.mixed_slopes(frame, "accuracy", "mean_stability").items():
        fitted = slope or Fitted(np.nan, np.nan, 0)
        contrasts.append(
            Contrast(
                f"accuracy on mean stability, {kind} settings",
                SECONDARY,
                "accuracy",
                fitted,
                len(frame),
                int(of.sum()),
                sign=-1,
                p=float(fitted.p()),
                note="" if slope else "did not converge",
            )
        )
    means = frame.groupby("setting")[["mean_stability", "accuracy"]].mean()
    tau, p = stats.kendall_tau(means.mean_stability, means.accuracy)
    fitted = Fitted(tau, np.nan, 0)
    name = "Kendall's tau of the settings' means"
    count = len(means)
    contrasts.append(Contrast(name, DESCRIBED, "accuracy", fitted, count, count, sign=-1, p=p))
    return contrasts


def t2(
    runs: pd.DataFrame, gates: Iterable[Gate], secondary: bool = True, draws: int = PERMUTATIONS
) -> Claim:
    """Figure 3 by permutation, and eight networks of other figures by random effects.

    A network whose gates fail is left out before its accuracies are read.
    """
    figure_3 = Part(runs, ("figure-3",), VGG)
    networks = [(Part(runs, (figure,), network), of) for figure, network, of in NETWORKS]
    gates, of_claim = list(gates), ("G2", "G3", "G4")
    claim = start("T2", STATEMENTS["T2"], [figure_3, *(part for part, _ in networks)], ())
    if claim.verdict:
        return claim
    periods = [p for p in PERIODS if {f"{t} {p}" for t in TARGETS} <= set(figure_3.labels)]
    needed = [f"{target} {period}" for target in TARGETS for period in periods or PERIODS]
    claim = gated(claim, *gates_of([figure_3], gates, of_claim, needed))
    kept: list[tuple[Part, tuple[str, str]]] = []
    for part, of_network in networks:
        its = gates_of([part], gates, of_claim, of_network)
        failed = [gate.gate for gate in its if gate.passed is False]
        claim = replace(claim, gates=(*claim.gates, *its))
        if failed:
            left_out = f"{part.network} of {part.figures[0]} is left out: {failed[0]} fails"
            claim = replace(claim, notes=(*claim.notes, left_out))
        else:
            order = of_network if len(of_network) == 2 else part.by_stability(of_network)
            kept.append((part, (order[0], order[-1])))
    if claim.verdict or len(kept) < FEWEST_NETWORKS:
        return replace(claim, verdict="not testable")
    contrasts = [_permuted(figure_3, periods, draws), *_together(kept)]
    if not secondary:
        return finish(claim, contrasts, None)
    chance = _power_of_t2(figure_3, periods, contrasts)
    contrasts.append(_permuted(figure_3, periods, draws, "best_accuracy", SECONDARY))
    contrasts += _together(kept, "best_accuracy", SECONDARY)[:1]
    return finish(claim, contrasts, None, power=chance, effect="1 point")


def _by_rate(part: Part, periods: Sequence[int], column: str) -> np.ndarray:
    """Figure 3 as (rates, seeds, targets); NaN for seeds whose three runs are not all finite."""
    values = part.values(column)
    rates = [
        pd.concat([values[f"{target} {period}"] for target in TARGETS], axis=1, join="inner")
        for period in periods
    ]
    cells = pd.concat(rates, keys=periods).unstack(0)
    return cells.to_numpy().reshape(len(cells), len(TARGETS), len(periods)).transpose(2, 0, 1)


def _permuted(
    part: Part,
    periods: Sequence[int],
    draws: int,
    column: str = "accuracy",
    kind: str = PRIMARY,
) -> Contrast:
    stability, accuracy = (_by_rate(part, periods, c) for c in ("mean_stability", column))
    statistic, p, p_against = stats.permuted_tau(stability, accuracy, draws)
    two_sided = kind != PRIMARY
    n = int((~np.isnan(accuracy).any(-1)).sum())
    return Contrast(
        "Figure 3: Kendall's tau of targets, summed over rates",
        kind,
        column,
        Fitted(statistic, np.nan, 0),
        n,
        registered=accuracy.shape[0] * accuracy.shape[1],
        sign=-1,
        p=min(1.0, 2 * min(p, p_against)) if two_sided else p,
        p_against=None if two_sided else p_against,
    )


def _together(
    kept: Sequence[tuple[Part, tuple[str, str]]], column: str = "accuracy", kind: str = PRIMARY
) -> list[Contrast]:
    """The networks' summary, then each network's contrast as description."""
    each = [part.contrast(*pair, column, kind=DESCRIBED) for part, pair in kept]
    each = [replace(c, name=f"{p.network}: {c.name}") for (p, _), c in zip(kept, each, strict=True)]
    used = [c for c in each if c.fitted.error > 0]
    summary = stats.random_effects(
        [c.fitted.value for c in used], [c.fitted.error**2 for c in used]
    )
    together = Contrast(
        f"{len(used)} networks together: less - more stable",
        kind,
        column,
        summary.fitted,
        sum(c.n for c in used),
        sum(c.registered for c in each),
        p=float(summary.fitted.p()),
        note=f"I squared {summary.i_squared:.0f}%, tau {summary.between**0.5:.2f} points",
    )
    return [together, *each]


def _power_of_t2(part: Part, periods: Sequence[int], contrasts: Sequence[Contrast]) -> float:
    """Chance that both of T2's tests, which share no run, find an effect of 1 point.

    In Figure 3, between the least and the most stable target of each rate; in the other networks
    in the mean, with the variances observed within and between them.
    """
    stability, accuracy = (_by_rate(part, periods, c) for c in ("mean_stability", "accuracy"))
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
    each = [c for c in contrasts if c.kind == DESCRIBED and c.fitted.error > 0]
    variances = np.array([c.fitted.error**2 for c in each])
    freedom = np.array([c.fitted.freedom for c in each])
    between = stats.random_effects([c.fitted.value for c in each], variances).between
    together = []
    for _ in range(POWER_DRAWS):
        effects = 1 + rng.normal(0, np.sqrt(between + variances))
        drawn = variances * rng.chisquare(freedom) / freedom
        together.append(stats.random_effects(effects, drawn).fitted.interval()[0] > 0)
    return float(np.mean(found) * np.mean(together))


def t3(runs: pd.DataFrame, gates: Iterable[Gate], secondary: bool = True) -> Claim:
    """Figure 5: the longest zeroing and the longest Gaussian noise against No Pruning."""
    part = Part(runs, ("figure-5",), VGG)
    longest = {kind: f"{kind} {max(SPANS)}" for kind in ("zeroing", "gaussian")}
    settings = [f"{kind} {span}" for kind in longest for span in SPANS]
    settings += [UNPRUNED, PRUNE_WEIGHTS]
    claim = start("T3", STATEMENTS["T3"], [part], gates, ("G1", "share"), settings)
    if claim.verdict:
        return claim
    pairs = [(setting, UNPRUNED) for setting in longest.values()]
    contrasts = [part.contrast(*pair) for pair in pairs]
    if not secondary:
        return finish(claim, contrasts, part.delta)
    chance = part.power(pairs, contrasts, [1, 1])
    contrasts += [part.contrast(*pair, "best_accuracy", kind=SECONDARY) for pair in pairs]
    spans = np.log10(1 + np.array(SPANS))
    weights = (spans - spans.mean()) / ((spans - spans.mean()) ** 2).sum()
    for kind, setting in longest.items():
        of_kind = [part.values("accuracy")[f"{kind} {span}"] for span in SPANS]
        slopes = pd.concat(of_kind, axis=1, join="inner").to_numpy() @ weights
        name = f"{kind}: accuracy on log10(1 + the paper's training batches)"
        contrasts.append(paired(name, slopes, kind=SECONDARY))
        contrasts.append(part.contrast(setting, PRUNE_WEIGHTS, kind=SECONDARY, null=-part.delta))
    return finish(claim, contrasts, part.delta, power=chance, effect="1 point")


def t4(runs: pd.DataFrame, gates: Iterable[Gate], secondary: bool = True) -> Claim:
    """Figure 6: Tr(H) and Tr(C) of T1's pair, and whether training loss explains them."""
    part = Part(runs, ("figure-6",), VGG)
    claim = start(
        "T4", STATEMENTS["T4"], [part], gates, ("G1", "G3", "G4"), (*DOSE_AND_TARGET, UNPRUNED)
    )
    if claim.verdict:
        return claim
    positive = part.runs[["curvature", "noise", "train_loss"]].where(lambda v: v > 0)
    part.runs = part.runs.assign(**np.log(positive).add_prefix("log_"))
    order = part.by_stability(DOSE_AND_TARGET)
    less, more = order[0], order[-1]
    claim = gated(claim, part.separation(less, more))
    if claim.verdict:
        return claim
    outcomes = ("log_curvature", "log_noise")
    contrasts = [part.contrast(less, more, outcome, sign=-1) for outcome in outcomes]
    differences = np.stack([part.differences(less, more, outcome) for outcome in outcomes])
    loss = part.differences(less, more, "log_train_loss")
    adjusted = [_adjusted(c, d, loss) for c, d in zip(contrasts, differences, strict=True)]
    chance = np.nan
    if secondary:
        chance = _power_of_t4(contrasts, differences, loss)
        contrasts.append(part.contrast(less, more, "delta_w", kind=SECONDARY))
        for setting, outcome in product((less, more), outcomes):
            contrasts.append(part.contrast(setting, UNPRUNED, outcome, kind=DESCRIBED, sign=-1))
    claim = finish(claim, [*contrasts, *adjusted], None, power=chance, effect=LOG_EFFECT_TEXT)
    if claim.verdict == "supported" and not all(c.supported for c in adjusted):
        claim = replace(claim, verdict="not apart from training loss")
    return claim


def _adjusted(contrast: Contrast, differences: np.ndarray, covariate: np.ndarray) -> Contrast:
    """The same contrast where the paired difference of the covariate is 0, by least squares."""
    there = ~np.isnan(differences + covariate)
    fitted = stats.fitted_intercept(differences[there], covariate[there])
    return replace(
        contrast,
        kind=ADJUSTED,
        fitted=fitted,
        n=int(there.sum()),
        p=float(fitted.p()),
        sign_flip=np.nan,
        note="adjusted for log training loss",
    )


def _power_of_t4(contrasts: Sequence[Contrast], differences: np.ndarray, loss: np.ndarray) -> float:
    """Power of both contrasts, as they are and adjusted, if training loss explained nothing."""
    there = ~np.isnan(differences.sum(0) + loss)
    as_they_are = supports_all(contrasts)

    def rule(values: np.ndarray) -> np.ndarray:
        high = stats.fitted_intercept(values, loss[there]).interval()[1]
        return as_they_are(values) & (high < 0).all(-1)

    return power(differences[:, there], [-LOG_EFFECT] * len(differences), rule)


def t5(runs: pd.DataFrame, gates: Iterable[Gate], secondary: bool = True) -> Claim:
    """Figure D2: the longest zeroing that is restored, against No Pruning and Prune_L."""
    part = Part(runs, ("figure-D2",), VGG)
    restored = "restored 2480"
    claim = start(
        "T5", STATEMENTS["T5"], [part], gates, ("G1",), (restored, UNPRUNED, PRUNE_WEIGHTS)
    )
    if claim.verdict:
        return claim
    premise = part.contrast(PRUNE_WEIGHTS, UNPRUNED, kind=PREMISE)
    pairs = [(restored, UNPRUNED), (restored, PRUNE_WEIGHTS)]
    contrasts = [part.contrast(*pairs[0]), part.contrast(*pairs[1], null=-part.delta)]
    chance = np.nan
    if secondary:
        chance = part.power(pairs, contrasts, [1, 0])
        contrasts.append(part.contrast(*pairs[0], "best_accuracy", kind=SECONDARY))
        contrasts.append(
            part.contrast(*pairs[1], "best_accuracy", kind=SECONDARY, null=-part.delta)
        )
    effect = "1 point over No Pruning, none against Prune_L"
    claim = finish(claim, [premise, *contrasts], part.delta, power=chance, effect=effect)
    return claim if premise.supported else replace(claim, verdict="no premise")
