"""The claims of arXiv 1805.01930, R1 to R4: as `claims.tradeoff_2020`. No torch."""

from dataclasses import replace

import numpy as np

from paperlib.claims.gates import UNPRUNED
from paperlib.claims.verdicts import OUTCOMES, SECONDARY, Findings, Part, Rule

CONV4 = "conv4"
LARGE, SMALL = "largest 0.9", "smallest 0.9"
FRACTIONS = ("0.5", "0.7", "0.8", "0.9", "0.95", "0.98")
DROPOUTS = ("dropout 0.25/0", "dropout 0/0.5", "dropout 0.25/0.5")  # the lowest rates first


def r1(part: Part) -> Findings:
    """Prune_L - Prune_S > 0 and Prune_L - No Pruning > 0; then each fraction of R-3."""
    pairs = (LARGE, SMALL), (LARGE, UNPRUNED)
    yield from (part.contrast(*pair) for pair in pairs)
    fractions = Part(part.everything, ("figure-R3",), CONV4)
    if missing := (~fractions.runs.done).sum():
        yield f"secondary contrasts wait for {missing} runs of figure-R3"
        return
    yield from (part.contrast(*pair, "best_accuracy", SECONDARY) for pair in pairs)
    for fraction in FRACTIONS:
        for other in (f"smallest {fraction}", UNPRUNED):
            if {f"largest {fraction}", other} <= set(fractions.labels):
                yield fractions.contrast(f"largest {fraction}", other, kind=SECONDARY)


def r2(part: Part) -> Findings:
    """Prune_L - the best dropout > 0. Seeds of their own choose it; on a tie the lower rates."""
    chosen = {setting: part.values(setting, "accuracy", choosing=True) for setting in DROPOUTS}
    if not all(map(len, chosen.values())):
        yield part.lacks("", "the profile has no seeds to choose the dropout by")
        return
    means = {s: np.nan_to_num(chosen[s].mean().round(9), nan=-np.inf) for s in DROPOUTS}
    best = max(DROPOUTS, key=lambda setting: means[setting])
    yield f"dropout at its best: {part.labels[best]}"
    for kind, outcome in OUTCOMES:
        yield part.contrast(LARGE, best, outcome, kind)


def r3(part: Part) -> Findings:
    """R2, at the size that is arithmetic: 84.9% fewer parameters at width 1."""
    yield from r2(part)
    left, whole = (part.values(s, "parameters").mean() for s in (LARGE, UNPRUNED))
    yield f"{100 * (1 - left / whole):.1f}% fewer parameters"


def r4(part: Part) -> Findings:
    """Prune_S and No Pruning are equivalent, within delta (a point)."""
    yield part.contrast(SMALL, UNPRUNED, margin=part.delta)
    yield part.contrast(SMALL, UNPRUNED, "best_accuracy", SECONDARY)


R1 = Rule(
    name="R1",
    statement="Pruning large weights instead of small ones improves generalization.",
    figures=("figure-R1",),
    network=CONV4,
    gates=("G1", "G2"),
    settings=(LARGE, SMALL, UNPRUNED),
    findings=r1,
    beside=("figure-R3",),
)
R2 = Rule(
    name="R2",
    statement="So pruned, the network classifies more accurately than with dropout at its best.",
    figures=("figure-R1", "figure-R4"),
    network=CONV4,
    gates=("G2",),
    settings=(LARGE, *DROPOUTS),
    findings=r2,
    shown=("figure-R2",),
)
R3 = replace(
    R2,
    name="R3",
    statement="It does so with 85% fewer parameters.",
    settings=(*R2.settings, UNPRUNED),
    findings=r3,
    shown=("figure-R2", "figure-R6"),
)
R4 = Rule(
    name="R4",
    statement="Pruning 90% of the weights, the small ones, leaves accuracy about unchanged.",
    figures=("figure-R1",),
    network=CONV4,
    gates=("G2",),
    settings=(SMALL, UNPRUNED),
    findings=r4,
    effect="none, within 1 point",
)
RULES = (R1, R2, R3, R4)
