"""The settings of arXiv 1906.03728, on the generalization-stability tradeoff.

All epochs are 0-based. Sections and figures are those of the paper.
"""

from paperlib.config import Config, FilterPruning, Flatness
from paperlib.papers.noise_spans import noise_for
from paperlib.papers.settings import METHODS, NO_PRUNING, SCRATCH, Figure, Schedule, Setting, seeded

FOLDER = "tradeoff-2020"

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

VGG_FRACTIONS = (0.3, 0.3, 0.3, 0.9)
VGG_FIRST, VGG_LAST = (3, 4, 5, 6), (150, 150, 150, 275)
RESNET_FRACTIONS = (0.25, 0.4, 0.25, 0.95)
RESNET_FIRST, RESNET_LAST = (7, 8, 9, 10), (150, 150, 170, 275)
TABLE_C1_FRACTIONS = (0.25, 0.8, 0.25, 0.95)

# Figure 2's six settings of VGG11 are measured for figures 6 and E in the runs other figures share.
FLATNESS = Flatness(epoch=314)
MEASURED = (("smallest", 4), ("smallest", 40), ("random", 40), ("largest", 40))


def _setting(
    network: str,
    name: str,
    base: Config,
    schedule: Schedule,
    fractions: tuple[float, ...],
    target: str,
    score: str,
    norm: bool = True,
) -> Setting:
    pruning = FilterPruning(fractions, schedule.epochs, score, target, norm=norm)
    return Setting(network, METHODS[target], name, base.with_(pruning=pruning), schedule)


def _vgg(target: str, period: int, score: str = "l2", norm: bool = True) -> Setting:
    measured = (target, period) in MEASURED and score == "l2" and norm
    base = VGG11.with_(flatness=FLATNESS if measured else None)
    name = f"{target} {period}" + ("" if norm else " weights")
    schedule = Schedule(VGG_FIRST, VGG_LAST, period)
    return _setting("VGG11", name, base, schedule, VGG_FRACTIONS, target, score, norm)


def _resnet18(
    target: str,
    period: int,
    score: str = "activation",
    fractions: tuple[float, ...] = RESNET_FRACTIONS,
    first: tuple[int, ...] = RESNET_FIRST,
) -> Setting:
    schedule = Schedule(first, RESNET_LAST, period)
    return _setting("ResNet18", f"{target} {period}", RESNET18, schedule, fractions, target, score)


def _noise(kind: str, batches: int, method: str, evaluation_batch: int = 128) -> Setting:
    noise = noise_for(kind, batches, evaluation_batch=evaluation_batch)
    config = VGG_PRUNE_WEIGHTS.config.with_(noise=noise)
    return Setting("VGG11", method, f"{kind} {batches}", config, VGG_PRUNE_WEIGHTS.schedule)


def _all_convolutions(
    model: str, network: str, layers: int, fraction: float, span: tuple[int, int], period: int
) -> Setting:
    name = f"smallest {period}" if period > 1 else f"smallest {fraction:.2f}"
    schedule = Schedule((span[0],) * layers, (span[1],) * layers, period)
    base = SGD.with_(model=model)
    return _setting(network, name, base, schedule, (fraction,) * layers, "smallest", "l1")


def _table_f1(target: str) -> Setting:
    schedule = Schedule((2500,), (3500,), 750)
    return _setting("ResNet18", f"{target} 750", TABLE_F1, schedule, (0.7,), target, "l1")


VGG_NO_PRUNING = Setting(
    "VGG11", NO_PRUNING, "none", VGG11.with_(histograms=True, flatness=FLATNESS)
)
RESNET_NO_PRUNING = Setting("ResNet18", NO_PRUNING, "none", RESNET18)
VGG_SCRATCH = Setting(
    "VGG11",
    SCRATCH,
    "scratch",
    VGG11.with_(pruning=FilterPruning(VGG_FRACTIONS, scratch=True), flatness=FLATNESS),
)
# Figures 5 and D2 mask the weights only: batch norm stays.
VGG_PRUNE_WEIGHTS = _vgg("largest", 40, norm=False)

FIGURE_2_VGG = seeded(
    10,
    (
        VGG_NO_PRUNING,
        _vgg("smallest", 4),
        _vgg("smallest", 40),
        _vgg("random", 40),
        _vgg("largest", 40),
        VGG_SCRATCH,
    ),
)
FIGURE_2_RESNET = (
    RESNET_NO_PRUNING,
    _resnet18("smallest", 4),
    _resnet18("smallest", 40),
    _resnet18("largest", 40),
)
PERIODS = (4, 20, 40, 60, 100, 200, 300)
FIGURE_3 = seeded(3, tuple(_vgg(target, period) for target in METHODS for period in PERIODS))
FIGURE_4 = tuple(
    _all_convolutions(model, network, layers, 0.1, (40, 100), period)
    for model, network, layers in (
        ("resnet18", "ResNet18", 16),
        ("resnet20", "ResNet20", 18),
        ("resnet56", "ResNet56", 54),
    )
    for period in (30, 60)
)
# The control, Prune_L of the weights only, and the longest spans have ten registered seeds.
SPANS = {"zeroing": (0, 51, 1106), "gaussian": (0, 51, 1106), "restored": (89, 630, 1220, 2480)}
NOISE_CONTROLS = seeded(10, (VGG_NO_PRUNING, VGG_PRUNE_WEIGHTS))


def _spans(kind: str, method: str, evaluation_batch: int = 128) -> tuple[Setting, ...]:
    settings = tuple(_noise(kind, span, method, evaluation_batch) for span in SPANS[kind])
    return (*settings[:-1], *seeded(10, settings[-1:]))


FIGURE_5 = (*NOISE_CONTROLS, *_spans("zeroing", "Zeroing"), *_spans("gaussian", "Gaussian"))
FIGURE_D2 = (*NOISE_CONTROLS, *_spans("restored", "Zeroing", evaluation_batch=256))
FIGURE_B2 = (
    VGG_NO_PRUNING,
    _vgg("smallest", 4, "ebn"),
    _vgg("smallest", 40, "ebn"),
    _vgg("largest", 40, "ebn"),
    RESNET_NO_PRUNING,
    _resnet18("smallest", 4, "ebn_signed", first=VGG_FIRST),
    _resnet18("smallest", 40, "ebn_signed", first=VGG_FIRST),
    _resnet18("largest", 40, "ebn_signed", first=VGG_FIRST),
)
FIGURE_C3 = (
    Setting("ResNet18", NO_PRUNING, "none", SGD.with_(model="resnet18")),
    _all_convolutions("resnet18", "ResNet18", 16, 0.06, (24, 100), 1),
    _all_convolutions("resnet18", "ResNet18", 16, 0.10, (24, 100), 1),
)
TABLE_C1 = tuple(
    _resnet18(target, period, fractions=TABLE_C1_FRACTIONS)
    for target, period in (("smallest", 4), ("smallest", 40), ("largest", 40))
)
TABLE_F1 = Config(
    data="cifar100",
    model="resnet18",
    optimizer="adam",
    learning_rate=0.0001,
    milestones=(2000,),
    epochs=4000,
    augment=True,
)
TABLE_F1_SETTINGS = seeded(
    3,
    (
        Setting("ResNet18", NO_PRUNING, "none", TABLE_F1),
        Setting(
            "ResNet18",
            SCRATCH,
            "scratch",
            TABLE_F1.with_(pruning=FilterPruning((0.7,), target="largest", scratch=True)),
        ),
        _table_f1("smallest"),
        _table_f1("largest"),
    ),
)


def _figure(
    name: str,
    title: str,
    settings: tuple[Setting, ...],
    seeds: int = 10,
    notebook: str | None = None,
) -> Figure:
    return Figure(name, title, seeds, settings, f"{FOLDER}/{notebook or name}")


FIGURES = (
    _figure(
        "figure-1",
        "What instability is: test accuracy before and after each pruning event",
        seeded(1, (_vgg("largest", 40),)),
        seeds=1,
    ),
    _figure(
        "figure-2",
        "Less stable pruning, better generalization",
        FIGURE_2_VGG + FIGURE_2_RESNET,
    ),
    _figure("figure-3", "Accuracy and stability by iterative pruning rate", FIGURE_3, seeds=5),
    _figure("figure-4", "Stability, accuracy and generalization gap of three ResNets", FIGURE_4),
    _figure("figure-5", "Noise instead of pruning: zeroing and Gaussian", FIGURE_5),
    _figure("figure-6", "Less stable pruning, flatter minima", FIGURE_2_VGG),
    _figure(
        "figure-B1",
        "Normalised batch-norm outputs, untrained and trained",
        seeded(1, (VGG_NO_PRUNING,)),
        seeds=1,
    ),
    _figure("figure-B2", "Figure 2 with filters scored by their expected activation", FIGURE_B2),
    _figure(
        "figure-C1",
        "Stability against accuracy at each iterative pruning rate",
        FIGURE_3,
        seeds=5,
        notebook="figure-3",
    ),
    _figure("figure-C2", "Figure 3 with Kendall's tau", FIGURE_3, seeds=5, notebook="figure-3"),
    _figure("figure-C3", "All of ResNet18's filters, pruned a little every epoch", FIGURE_C3),
    _figure("figure-D2", "Zeroing for a while, then restoring", FIGURE_D2),
    *(
        _figure(f"figure-E{number}", title, FIGURE_2_VGG, notebook="figure-E")
        for number, title in enumerate(
            (
                "The leading eigenvalues by setting",
                "The spectrum by rank",
                "How far the loss stays low: delta_w",
                "The loss along the leading eigenvectors",
                "The information criterion TIC",
                "Stability and accuracy of all six settings",
            ),
            start=1,
        )
    ),
    _figure("table-C1", "More of ResNet18 pruned", TABLE_C1),
    _figure("table-F1", "Pruning late in a very long training", TABLE_F1_SETTINGS),
)
