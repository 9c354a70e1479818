"""The settings of arXiv 1805.01930, on weight pruning as a regularizer.

The claims are those of the abstract and introduction, the only parts of the paper at hand. The
network is inferred from the abstract's "85% fewer parameters". The tests of the claims are ours.
"""

from dataclasses import replace

from paperlib.config import Config, WeightPruning
from paperlib.papers.settings import DROPOUT, METHODS, NO_PRUNING, Figure, Schedule, Setting, seeded

# The dense layer of conv4 holds 94.3% of its parameters; 90% of it is 85% of the network.
CONV4 = Config(model="conv4", optimizer="adam", learning_rate=0.001, epochs=150)
CONV4_DROPOUT = (0.25, 0.5)
CONV4_FRACTION = 0.9
CONV4_EVENTS = Schedule((0,), (99,), 1)
FRACTIONS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
# Dropout's best rates are chosen on these seeds, and compared with pruning on the others.
CHOOSING = (10, 11, 12, 13, 14)


def _conv4(target: str, fraction: float = CONV4_FRACTION) -> Setting:
    pruning = WeightPruning(("dense",), (fraction,), CONV4_EVENTS.epochs[0], target)
    config = CONV4.with_(pruning=pruning, histograms=fraction == CONV4_FRACTION)
    return Setting("conv4", METHODS[target], f"{target} {fraction:g}", config, CONV4_EVENTS)


def _dropout(after_pool: float, after_dense: float) -> Setting:
    config = CONV4.with_(dropout=(after_pool, after_dense))
    return Setting("conv4", DROPOUT, f"dropout {after_pool:g}/{after_dense:g}", config)


CONV4_NO_PRUNING = Setting("conv4", NO_PRUNING, "none", CONV4)
CONV4_TARGETS = tuple(_conv4(target) for target in METHODS)
DROPOUTS = (_dropout(CONV4_DROPOUT[0], 0), _dropout(0, CONV4_DROPOUT[1]), _dropout(*CONV4_DROPOUT))

FIGURE_R1 = seeded(10, CONV4_NO_PRUNING, DROPOUTS[-1], *CONV4_TARGETS)
BY_FRACTION = (_conv4(target, fraction) for target in METHODS for fraction in FRACTIONS)
FIGURE_R3 = seeded(3, CONV4_NO_PRUNING, *BY_FRACTION)
CHOSEN = (replace(setting, choosing=CHOOSING) for setting in DROPOUTS)
FIGURE_R4 = seeded(10, CONV4_NO_PRUNING, *CHOSEN)
FIGURE_R5 = seeded(10, *CONV4_TARGETS)
FIGURE_R6 = seeded(1, CONV4_NO_PRUNING, *CONV4_TARGETS)

# Name, seeds, settings, title.
_TABLE = (
    ("figure-R1", 10, FIGURE_R1, "Pruning large weights against dropout, by epoch"),
    (
        "figure-R2",
        10,
        FIGURE_R1,
        "Pruning large weights against dropout: accuracy and parameters",
    ),
    ("figure-R3", 10, FIGURE_R3, "Best accuracy by the fraction of the layer removed"),
    ("figure-R4", 10, FIGURE_R4, "Dropout at its best"),
    ("figure-R5", 10, FIGURE_R5, "Where the weights went"),
    ("figure-R6", 1, FIGURE_R6, "What 85% fewer parameters buys"),
)
FIGURES = tuple(Figure(*row, f"regularization-2018/{row[0]}") for row in _TABLE)
