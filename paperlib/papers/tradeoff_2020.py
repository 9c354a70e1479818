"""The settings of arXiv 1906.03728, on the generalization-stability tradeoff.

All epochs are 0-based. Sections and figures are those of the paper.
"""

from dataclasses import replace

from paperlib.config import Config, FilterPruning, Flatness
from paperlib.papers.noise_spans import with_noise
from paperlib.papers.settings import METHODS, NO_PRUNING, SCRATCH, Figure, Schedule, Setting, seeded

ADAM = Config(optimizer="adam", learning_rate=0.001, milestones=(150, 300), epochs=325)
SGD = Config(
    optimizer="sgd",
    learning_rate=0.1,
    momentum=0.9,
    weight_decay=0.0001,
    milestones=(83, 125),
    epochs=165,
    augment=True,
)
VGG11 = ADAM.with_(model="vgg11_bn")
RESNET18 = ADAM.with_(model="resnet18")
LATE = RESNET18.with_(
    data="cifar100", learning_rate=0.0001, milestones=(2000,), epochs=4000, augment=True
)

# One entry for each of the last four convolutions.
VGG_FRACTIONS = (0.3, 0.3, 0.3, 0.9)
VGG_FIRST, VGG_LAST = (3, 4, 5, 6), (150, 150, 150, 275)
RESNET_FRACTIONS = (0.25, 0.4, 0.25, 0.95)
RESNET_FIRST, RESNET_LAST = (7, 8, 9, 10), (150, 150, 170, 275)
TABLE_C1_FRACTIONS = (0.25, 0.8, 0.25, 0.95)

# Figures 6 and E measure flatness in runs of Figure 2's six settings of VGG11. Other figures share
# these runs.
FLATNESS = Flatness(epoch=314)
MEASURED = (("smallest", 4), ("smallest", 40), ("random", 40), ("largest", 40))
PERIODS = (4, 20, 40, 60, 100, 200, 300)
THREE = (("smallest", 4), ("smallest", 40), ("largest", 40))  # targets and periods


def _pruned(
    network: str,
    base: Config,
    target: str,
    score: str,
    fractions: tuple[float, ...],
    schedule: Schedule,
    norm: bool = True,
) -> Setting:
    pruning = FilterPruning(fractions, schedule.epochs, score, target, norm=norm)
    name = f"{target} {schedule.period}" + ("" if norm else " weights")
    return Setting(network, METHODS[target], name, base.with_(pruning=pruning), schedule)


def _vgg(target: str, period: int, score: str = "l2", norm: bool = True) -> Setting:
    measured = (target, period) in MEASURED and score == "l2" and norm
    base = VGG11.with_(flatness=FLATNESS if measured else None)
    schedule = Schedule(VGG_FIRST, VGG_LAST, period)
    return _pruned("VGG11", base, target, score, VGG_FRACTIONS, schedule, norm)


def _resnet18(
    target: str,
    period: int,
    score: str = "activation",
    fractions: tuple[float, ...] = RESNET_FRACTIONS,
    first: tuple[int, ...] = RESNET_FIRST,
) -> Setting:
    schedule = Schedule(first, RESNET_LAST, period)
    return _pruned("ResNet18", RESNET18, target, score, fractions, schedule)


def _all_layers(network: str, count: int, fraction: float, first: int, period: int) -> Setting:
    base = SGD.with_(model=network.lower())
    schedule = Schedule((first,) * count, (100,) * count, period)
    return _pruned(network, base, "smallest", "l1", (fraction,) * count, schedule)


def _noise(kind: str, method: str, evaluation_batch: int = 128) -> tuple[Setting, ...]:
    """Return the settings of a kind of noise, one a span. The longest has ten registered seeds."""
    base, settings = VGG_PRUNE_WEIGHTS, []
    for span in SPANS[kind]:
        config = with_noise(base.config, kind, span, evaluation_batch)
        settings.append(Setting("VGG11", method, f"{kind} {span}", config, base.schedule))
    return (*settings[:-1], *seeded(10, settings[-1]))


def _unpruned(network: str, base: Config) -> Setting:
    return Setting(network, NO_PRUNING, "none", base)


def _scratch(network: str, base: Config, pruning: FilterPruning) -> Setting:
    return Setting(network, SCRATCH, "scratch", base.with_(pruning=pruning))


VGG_NO_PRUNING = _unpruned("VGG11", VGG11.with_(histograms=True, flatness=FLATNESS))
VGG_SCRATCH = _scratch(
    "VGG11", VGG11.with_(flatness=FLATNESS), FilterPruning(VGG_FRACTIONS, scratch=True)
)
# Figures 5 and D2 mask the weights only. Batch norm stays.
VGG_PRUNE_WEIGHTS = _vgg("largest", 40, norm=False)
RESNET_NO_PRUNING = _unpruned("ResNet18", RESNET18)

FIGURE_2_VGG = seeded(10, VGG_NO_PRUNING, *(_vgg(*setting) for setting in MEASURED), VGG_SCRATCH)
FIGURE_2 = (*FIGURE_2_VGG, RESNET_NO_PRUNING, *(_resnet18(*setting) for setting in THREE))
FIGURE_3 = seeded(3, *(_vgg(target, period) for target in METHODS for period in PERIODS))
FIGURE_4 = tuple(
    _all_layers(network, layers, fraction=0.1, first=40, period=period)
    for network, layers in (("ResNet18", 16), ("ResNet20", 18), ("ResNet56", 54))
    for period in (30, 60)
)
SPANS = {"zeroing": (0, 51, 1106), "gaussian": (0, 51, 1106), "restored": (89, 630, 1220, 2480)}
NOISE_CONTROLS = seeded(10, VGG_NO_PRUNING, VGG_PRUNE_WEIGHTS)
FIGURE_5 = (*NOISE_CONTROLS, *_noise("zeroing", "Zeroing"), *_noise("gaussian", "Gaussian"))
FIGURE_D2 = (*NOISE_CONTROLS, *_noise("restored", "Restored", evaluation_batch=256))
FIGURE_B2 = (
    VGG_NO_PRUNING,
    *(_vgg(*setting, score="ebn") for setting in THREE),
    RESNET_NO_PRUNING,
    *(_resnet18(*setting, score="ebn_signed", first=VGG_FIRST) for setting in THREE),
)
TABLE_C1 = tuple(_resnet18(*setting, fractions=TABLE_C1_FRACTIONS) for setting in THREE)
FIGURE_C3 = (
    _unpruned("ResNet18", SGD.with_(model="resnet18")),
    *(
        replace(_all_layers("ResNet18", 16, fraction, 24, 1), name=f"smallest {fraction:.2f}")
        for fraction in (0.06, 0.10)
    ),
)
TABLE_F1 = seeded(
    3,
    _unpruned("ResNet18", LATE),
    _scratch("ResNet18", LATE, FilterPruning((0.7,), target="largest", scratch=True)),
    *(
        _pruned("ResNet18", LATE, target, "l1", (0.7,), Schedule((2500,), (3500,), 750))
        for target in ("smallest", "largest")
    ),
)
FIGURE_1, FIGURE_B1 = seeded(1, _vgg("largest", 40)), seeded(1, VGG_NO_PRUNING)

# Name, seeds, settings, title.
_TABLE = (
    (
        "figure-1",
        1,
        FIGURE_1,
        "What instability is: test accuracy before and after each pruning event",
    ),
    ("figure-2", 10, FIGURE_2, "Stability against accuracy"),
    ("figure-3", 5, FIGURE_3, "Accuracy and stability by iterative pruning rate"),
    ("figure-4", 10, FIGURE_4, "Stability, accuracy and generalization gap of three ResNets"),
    ("figure-5", 10, FIGURE_5, "Noise instead of pruning: zeroing and Gaussian"),
    ("figure-6", 10, FIGURE_2_VGG, "Stability against flatness"),
    ("figure-B1", 1, FIGURE_B1, "Normalised batch-norm outputs, untrained and trained"),
    ("figure-B2", 10, FIGURE_B2, "Figure 2 with filters scored by their expected activation"),
    ("figure-C1", 5, FIGURE_3, "Stability against accuracy at each iterative pruning rate"),
    ("figure-C2", 5, FIGURE_3, "Figure 3 with Kendall's tau"),
    ("figure-C3", 10, FIGURE_C3, "All of ResNet18's filters, pruned a little every epoch"),
    ("figure-D2", 10, FIGURE_D2, "Zeroing for a while, then restoring"),
    ("figure-E1", 10, FIGURE_2_VGG, "The leading eigenvalues by setting"),
    ("figure-E2", 10, FIGURE_2_VGG, "The spectrum by rank"),
    ("figure-E3", 10, FIGURE_2_VGG, "How far the loss stays low: delta_w"),
    ("figure-E4", 10, FIGURE_2_VGG, "The loss along the leading eigenvectors"),
    ("figure-E5", 10, FIGURE_2_VGG, "The information criterion TIC"),
    ("figure-E6", 10, FIGURE_2_VGG, "Stability and accuracy of all six settings"),
    ("table-C1", 10, TABLE_C1, "More of ResNet18 pruned"),
    ("table-F1", 10, TABLE_F1, "Pruning late in a very long training"),
)
# Figures that share a notebook with others.
_NOTEBOOKS = dict.fromkeys(("figure-C1", "figure-C2"), "figure-3")
_NOTEBOOKS |= {f"figure-E{number}": "figure-E" for number in range(1, 7)}
FIGURES = tuple(Figure(*row, f"tradeoff-2020/{_NOTEBOOKS.get(row[0], row[0])}") for row in _TABLE)
