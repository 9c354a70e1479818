"""The claims of arXiv 1805.01930, R1 to R4, in the form of `tradeoff_2020`. Imports no torch."""

import numpy as np

from paperlib.claims.contrasts import OUTCOMES
from paperlib.claims.gates import UNPRUNED
from paperlib.claims.verdicts import Findings, Part, Rule

CONV4 = "conv4"
LARGE, SMALL = "largest 0.9", "smallest 0.9"
FRACTIONS = ("0.5", "0.7", "0.8", "0.9", "0.95", "0.98")
DROPOUTS = ("dropout 0.25/0", "dropout 0/0.5", "dropout 0.25/0.5")  # the lowest rates first


class R1(Rule):
    """Prune_L - Prune_S > 0 and Prune_L - No Pruning > 0. Secondary: each fraction of R-3."""

    statement = "Pruning large weights instead of small ones improves generalization."
    figures = ("figure-R1",)
    network = CONV4
    beside = ("figure-R3",)
    gates = ("G1", "G2")
    settings = (LARGE, SMALL, UNPRUNED)

    def _findings(self, part: Part, *networks: Part) -> Findings:
        for other in (SMALL, UNPRUNED):
            yield part.contrast(LARGE, other)
        fractions = Part(part.everything, self.beside, CONV4)
        if missing := (~fractions.runs.done).sum():
            yield f"secondary contrasts wait for {missing} runs of figure-R3"
            return
        for other in (SMALL, UNPRUNED):
            yield part.contrast(LARGE, other, "best_accuracy", "secondary")
        for fraction in FRACTIONS:
            for other in (f"smallest {fraction}", UNPRUNED):
                if {f"largest {fraction}", other} <= set(fractions.labels):
                    yield fractions.contrast(f"largest {fraction}", other, kind="secondary")


class R2(Rule):
    """Prune_L - the best dropout > 0. It is chosen on other seeds; on a tie by the lower rates."""

    statement = "A network pruned of its large weights beats dropout at its best."
    figures = ("figure-R1", "figure-R4")
    network = CONV4
    shown: tuple[str, ...] = ("figure-R2",)
    gates: tuple[str, ...] = ("G2",)
    settings: tuple[str, ...] = (LARGE, *DROPOUTS)

    def _findings(self, part: Part, *networks: Part) -> Findings:
        chosen = {s: part.values(s, "accuracy", choosing=True) for s in DROPOUTS}
        if any(accuracies.empty for accuracies in chosen.values()):
            yield part.lacks("", "the profile has no seeds to choose the dropout by")
        best = max(
            DROPOUTS, key=lambda setting: np.nan_to_num(round(float(chosen[setting].mean()), 9))
        )
        yield f"dropout at its best: {part.labels[best]}"
        for kind, outcome in OUTCOMES.items():
            yield part.contrast(LARGE, best, outcome, kind)


class R3(R2):
    """R2, with the size noted beside it: arithmetic gives 84.9% fewer parameters at width 1."""

    statement = "With 85% fewer parameters, such a network beats dropout at its best."
    shown = ("figure-R2", "figure-R6")
    gates = ()
    settings = (*R2.settings, UNPRUNED)

    def _findings(self, part: Part, *networks: Part) -> Findings:
        yield from super()._findings(part)
        left, whole = (part.values(s, "parameters").mean() for s in (LARGE, UNPRUNED))
        yield f"{100 * (1 - left / whole):.1f}% fewer parameters"


class R4(Rule):
    """Prune_S and No Pruning are equivalent within delta, a point."""

    statement = "Pruning the smallest 90% of the weights leaves accuracy about unchanged."
    figures = ("figure-R1",)
    network = CONV4
    gates = ("G2",)
    settings = (SMALL, UNPRUNED)
    effect = "none, within 1 point"

    def _findings(self, part: Part, *networks: Part) -> Findings:
        yield part.contrast(SMALL, UNPRUNED, region=part.alike)
        yield part.contrast(SMALL, UNPRUNED, "best_accuracy", "secondary")


RULES = (R1(), R2(), R3(), R4())
