"""The claims of arXiv 1805.01930, R1 to R4: as `claims_2020`. No torch."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd

from paperlib.gates import UNPRUNED, Gate
from paperlib.verdicts import SECONDARY, Claim, Part, finish, gated, start

STATEMENTS = {
    "R1": "Pruning large weights instead of small ones improves generalization.",
    "R2": "So pruned, the network classifies more accurately than with dropout at its best.",
    "R3": "It does so with 85% fewer parameters.",
    "R4": "Pruning 90% of the weights, the small ones, leaves accuracy about unchanged.",
}
CONV4 = "conv4"
FRACTIONS = ("0.5", "0.7", "0.8", "0.9", "0.95", "0.98")
DROPOUTS = ("dropout 0.25/0", "dropout 0/0.5", "dropout 0.25/0.5")  # the lowest rates first


def r1(runs: pd.DataFrame, gates: Iterable[Gate], secondary: bool = True) -> Claim:
    """Figure R-1: pruning the largest weights against the smallest, and No Pruning."""
    part = Part(runs, ("figure-R1",), CONV4)
    large, small = "largest 0.9", "smallest 0.9"
    claim = start("R1", STATEMENTS["R1"], [part], gates, ("G1", "G2"), (large, small, UNPRUNED))
    if claim.verdict:
        return claim
    pairs = [(large, small), (large, UNPRUNED)]
    contrasts = [part.contrast(*pair) for pair in pairs]
    if not secondary:
        return finish(claim, contrasts, part.delta)
    chance = part.power(pairs, contrasts, [1, 1])
    fractions = Part(runs, ("figure-R3",), CONV4)
    if fractions.missing:
        waiting = f"secondary contrasts wait for {fractions.missing} runs of figure-R3"
        claim = replace(claim, notes=(waiting,))
    else:
        contrasts += [part.contrast(*pair, "best_accuracy", kind=SECONDARY) for pair in pairs]
        for fraction, other in product(FRACTIONS, ("smallest", UNPRUNED)):
            second = other if other == UNPRUNED else f"{other} {fraction}"
            if {f"largest {fraction}", second} <= set(fractions.labels):
                pair = (f"largest {fraction}", second)
                contrasts.append(fractions.contrast(*pair, kind=SECONDARY))
    return finish(claim, contrasts, part.delta, power=chance, effect="1 point")


def r2(runs: pd.DataFrame, gates: Iterable[Gate], secondary: bool = True) -> Claim:
    """Figures R-2 and R-4: pruning the largest weights against dropout at its best.

    Seeds of their own choose the dropout; on a tie the lower rates.
    """
    part = Part(runs, ("figure-R1", "figure-R4"), CONV4)
    large = "largest 0.9"
    claim = start("R2", STATEMENTS["R2"], [part], gates, ("G2",), (large, *DROPOUTS))
    if claim.verdict:
        return claim
    choosing = part.values("accuracy", choosing=True)
    if not set(DROPOUTS) <= set(choosing):
        text = "the profile has no seeds to choose the dropout by"
        return gated(claim, Gate("settings", CONV4, "figure-R4", "", False, np.nan, text))
    means = {s: np.nan_to_num(choosing[s].mean().round(9), nan=-np.inf) for s in DROPOUTS}
    best = max(DROPOUTS, key=means.get)
    contrasts = [part.contrast(large, best)]
    chance = np.nan
    if secondary:
        chance = part.power([(large, best)], contrasts, [1])
        contrasts.append(part.contrast(large, best, "best_accuracy", kind=SECONDARY))
    notes = (f"dropout at its best: {part.labels[best]}",)
    return finish(claim, contrasts, part.delta, power=chance, effect="1 point", notes=notes)


def r3(runs: pd.DataFrame, gates: Iterable[Gate], secondary: bool = True) -> Claim:
    """R2, at the size that is arithmetic: 84.9% fewer parameters at width 1."""
    claim = replace(r2(runs, gates, secondary), name="R3", statement=STATEMENTS["R3"])
    if claim.verdict in ("incomplete", "not testable") or "parameters" not in runs:
        return claim
    left = Part(runs, ("figure-R1",), CONV4).values("parameters")
    fewer = 100 * (1 - left["largest 0.9"].mean() / left[UNPRUNED].mean())
    return replace(claim, notes=(*claim.notes, f"{fewer:.1f}% fewer parameters"))


def r4(runs: pd.DataFrame, gates: Iterable[Gate], secondary: bool = True) -> Claim:
    """Figure R-1: pruning the smallest weights is equivalent to No Pruning, within a point."""
    part = Part(runs, ("figure-R1",), CONV4)
    pair = ("smallest 0.9", UNPRUNED)
    claim = start("R4", STATEMENTS["R4"], [part], gates, ("G2",), pair)
    if claim.verdict:
        return claim
    contrasts = [part.contrast(*pair, margin=part.delta)]
    chance = np.nan
    if secondary:
        chance = part.power([pair], contrasts, [0])
        contrasts.append(part.contrast(*pair, "best_accuracy", kind=SECONDARY))
    return finish(claim, contrasts, part.delta, power=chance, effect="none, within 1 point")
