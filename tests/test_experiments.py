"""The settings against the papers', and the profiles that scale them."""

import json
import math
from dataclasses import fields, replace
from itertools import pairwise

import pandas as pd
import pytest

from paperlib import experiments
from paperlib.config import Config, FilterPruning, Flatness, Noise, WeightPruning, to_dict
from paperlib.experiments import FIGURES, PROFILES, Scale
from paperlib.models import build, scaled
from paperlib.papers.noise_spans import images_of, steps, training_batches
from paperlib.papers.settings import Setting
from paperlib.plans import LAST_FILTERS, TIERS
from paperlib.pruning import kept_filters, kept_weights, prunable_layers

# The papers' settings, written out as (network, name, method, config)

ADAM = Config("cifar10", batch=128, optimizer="adam", learning_rate=0.001, weight_decay=0)
ADAM = ADAM.with_(milestones=(150, 300), epochs=325, augment=False)
SGD = ADAM.with_(optimizer="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.0001)
SGD = SGD.with_(milestones=(83, 125), epochs=165, augment=True)
LATE = ADAM.with_(data="cifar100", model="resnet18", learning_rate=0.0001)
LATE = LATE.with_(milestones=(2000,), epochs=4000, augment=True)
CONV4 = ADAM.with_(model="conv4", milestones=(), epochs=150)
VGG, RESNET = ADAM.with_(model="vgg11_bn"), ADAM.with_(model="resnet18")
METHOD = {"smallest": "Prune_S", "random": "Prune_R", "largest": "Prune_L"}
S, R, L = METHOD


def epochs(first, last, period) -> tuple:
    return tuple(tuple(range(a, b + 1, period)) for a, b in zip(first, last, strict=True))


def vgg(target, period, score="l2", norm=True):
    events = epochs((3, 4, 5, 6), (150, 150, 150, 275), period)
    pruning = FilterPruning((0.3, 0.3, 0.3, 0.9), events, score, target, norm=norm)
    name = f"{target} {period}" + ("" if norm else " weights")
    return "VGG11", name, METHOD[target], VGG.with_(pruning=pruning)


def resnet(target, period, score, fractions=(0.25, 0.4, 0.25, 0.95), first=(7, 8, 9, 10)):
    events = epochs(first, (150, 150, 170, 275), period)
    pruning = FilterPruning(fractions, events, score, target)
    return "ResNet18", f"{target} {period}", METHOD[target], RESNET.with_(pruning=pruning)


def everywhere(network, layers, fraction, first, period, name):
    pruning = FilterPruning(
        (fraction,) * layers, epochs([first] * layers, [100] * layers, period), "l1", "smallest"
    )
    return network, name, "Prune_S", SGD.with_(model=network.lower(), pruning=pruning)


def noise(method, kind, batches, passes, evaluation_batch=128):
    config = vgg(L, 40, norm=False)[-1]
    noised = config.with_(noise=Noise(kind, passes, evaluation_batch))
    return "VGG11", f"{kind} {batches}", method, noised


def late(name, method, **pruning):
    return "ResNet18", name, method, LATE.with_(pruning=FilterPruning((0.7,), **pruning))


def weights(target, fraction=0.9):
    pruning = WeightPruning(("dense",), (fraction,), tuple(range(100)), target, "linear")
    return "conv4", f"{target} {fraction:g}", METHOD[target], CONV4.with_(pruning=pruning)


def dropout(after_pool, after_dense):
    name = f"dropout {after_pool:g}/{after_dense:g}"
    return "conv4", name, "Dropout", CONV4.with_(dropout=(after_pool, after_dense))


def whole(network, config):
    return network, "none", "No Pruning", config


ONE_OF_EACH = ((S, 4), (S, 40), (L, 40))
PERIODS = (4, 20, 40, 60, 100, 200, 300)
VGG_NONE, RESNET_NONE = whole("VGG11", VGG), whole("ResNet18", RESNET)
SCRATCH = VGG.with_(pruning=FilterPruning((0.3, 0.3, 0.3, 0.9), score="l2", scratch=True))
SIX = [
    VGG_NONE,
    *(vgg(S, 4), vgg(S, 40), vgg(R, 40), vgg(L, 40)),
    ("VGG11", "scratch", "Scratch", SCRATCH),
]
FIGURE_3 = [vgg(target, period) for target in METHOD for period in PERIODS]
NOISE_CONTROLS = [VGG_NONE, vgg(L, 40, norm=False)]
SPANS = ((0, 0), (51, 129), (1106, 1500))
RESTORED = ((89, 129), (630, 750), (1220, 1500), (2480, 3000))
RESNETS = (("ResNet18", 16), ("ResNet20", 18), ("ResNet56", 54))
LATE_EVENTS = {"epochs": epochs((2500,), (3500,), 750), "score": "l1"}
NONE, *PRUNED = [whole("conv4", CONV4), weights(S), weights(R), weights(L)]
DROPOUTS = [dropout(0.25, 0), dropout(0, 0.5), dropout(0.25, 0.5)]
FIGURES_E = [f"figure-E{number}" for number in range(1, 7)]
FRACTIONS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
PAPER = {
    "figure-1": [vgg(L, 40)],
    "figure-2": [*SIX, RESNET_NONE, *(resnet(*s, "activation") for s in ONE_OF_EACH)],
    **dict.fromkeys(("figure-3", "figure-C1", "figure-C2"), FIGURE_3),
    "figure-4": [
        everywhere(*network, 0.1, 40, period, f"smallest {period}")
        for network in RESNETS
        for period in (30, 60)
    ],
    "figure-5": [
        *NOISE_CONTROLS,
        *(noise("Zeroing", "zeroing", *n) for n in SPANS),
        *(noise("Gaussian", "gaussian", *n) for n in SPANS),
    ],
    "figure-D2": [*NOISE_CONTROLS, *(noise("Restored", "restored", *n, 256) for n in RESTORED)],
    "figure-B1": [VGG_NONE],
    "figure-B2": [
        VGG_NONE,
        *(vgg(*s, "ebn") for s in ONE_OF_EACH),
        RESNET_NONE,
        *(resnet(*s, "ebn_signed", first=(3, 4, 5, 6)) for s in ONE_OF_EACH),
    ],
    "table-C1": [resnet(*s, "activation", (0.25, 0.8, 0.25, 0.95)) for s in ONE_OF_EACH],
    "figure-C3": [
        whole("ResNet18", SGD.with_(model="resnet18")),
        *(everywhere("ResNet18", 16, f, 24, 1, f"smallest {f:.2f}") for f in (0.06, 0.10)),
    ],
    "table-F1": [
        whole("ResNet18", LATE),
        late("scratch", "Scratch", score="l2", target="largest", scratch=True),
        late("smallest 750", "Prune_S", target="smallest", **LATE_EVENTS),
        late("largest 750", "Prune_L", target="largest", **LATE_EVENTS),
    ],
    **dict.fromkeys(("figure-6", *FIGURES_E), SIX),
    **{name: [NONE, DROPOUTS[-1], *PRUNED] for name in ("figure-R1", "figure-R2")},
    "figure-R3": [NONE, *(weights(t, fraction) for t in METHOD for fraction in FRACTIONS)],
    "figure-R4": [NONE, *DROPOUTS],
    "figure-R5": PRUNED,
    "figure-R6": [NONE, *PRUNED],
}
SMALLER = [name for name in PROFILES if name != "paper"]


def shown(profile: str, *figures: str) -> list[Setting]:
    """The settings that a profile shows in some figures, in all of them by default."""
    chosen = [FIGURES[name] for name in figures or FIGURES]
    return [s for figure in chosen for s in PROFILES[profile].shown(figure)]


def scale(profile: str, setting: Setting) -> Config:
    return PROFILES[profile].scale(setting)


def unmeasured(config: Config) -> Config:
    return config.with_(flatness=None, histograms=False)


@pytest.mark.parametrize("name", FIGURES)
def test_the_papers_settings(name):
    settings = experiments.figure(name).settings
    mine = [(s.network, s.name, s.method, unmeasured(s.config)) for s in settings]
    for setting, papers in zip(mine, PAPER[name], strict=True):
        assert setting == papers
    assert len({setting[:2] for setting in mine}) == len(mine)
    for s in settings:
        assert scale("paper", s) == s.config


def test_where_flatness_and_histograms_are_measured():
    configs = {s.config for s in shown("paper")}
    flat = {c for c in configs if c.flatness is not None}
    assert {unmeasured(c) for c in flat} == {config for *_, config in SIX}
    assert len(flat) == 6
    assert {c.flatness for c in flat} == {Flatness(314, 512, 100, 10, 0.4, 0.01)}
    histograms = {unmeasured(c) for c in configs if c.histograms}
    assert histograms == {VGG, *(config for *_, config in PRUNED)}


def removals(config: Config) -> list[dict[int, int]]:
    """Of each layer: how many filters or weights go at the end of each epoch with an event."""
    pruning = config.pruning
    if pruning is None or getattr(pruning, "scratch", False):
        return []
    if isinstance(pruning, WeightPruning):
        sizes = [6 * 6 * scaled(64, config.width) * scaled(512, config.width)]
        events, kept_of = [pruning.epochs], kept_weights
    else:
        stages = {"vgg11_bn": (512,), "resnet18": (64, 128, 256, 512)}
        blocks = {"resnet20": 6, "resnet56": 18}.get(config.model, 4)
        stages = stages.get(config.model, (16, 32, 64))
        sizes = [scaled(stage, config.width) for stage in stages for _ in range(blocks)]
        sizes, events, kept_of = sizes[-len(pruning.epochs) :], pruning.epochs, kept_filters
    layers = []
    for size, fraction, when in zip(sizes, pruning.fractions, events, strict=True):
        left = [size] + [kept_of(size, fraction, i + 1, len(when)) for i in range(len(when))]
        layers.append({e: a - b for e, (a, b) in zip(when, pairwise(left), strict=True)})
    return layers


def events_of(config: Config) -> list[int]:
    """Epochs on which anything is removed."""
    return sorted({e for layer in removals(config) for e, gone in layer.items() if gone})


# docs/evidence.md: the epochs of the first layers' events (each schedule once) and of the last
# layer's, a run's events, steps after the last, rate in percent, the paper's events of both layers.
EVERY_8 = ([(3, 11, 19, 27)], range(3, 52, 8), 7, 4069)
VGG_40 = {"VGG11 largest 40": (*EVERY_8, 12.9, (4, 7))}
RESNET_40 = {f"ResNet18 {target} 40": (*EVERY_8, 13.6, (4, 7)) for target in (S, L)}
RESNET_4 = ([range(3, 31), range(3, 35)], range(3, 56), 53, 2817, 1.8)
ROWS = {
    "figure-3": {
        f"VGG11 {target} {period}": row
        for target in METHOD
        for period, row in {
            4: ([range(3, 31)], range(3, 56), 53, 2817, 1.7, (37, 68)),
            20: ([range(3, 28, 4)], range(3, 56, 4), 14, 2817, 6.4, (8, 14)),
            40: (*EVERY_8, 12.9, (4, 7)),
            60: ([(3, 15, 27)], range(3, 52, 12), 5, 4069, 18, (3, 5)),
            100: ([(3, 23)], (3, 23, 43), 3, 6573, 30, (2, 3)),
            200: ([(3,)], (3, 43), 2, 6573, 45, (1, 2)),
            300: ([(3,)], (3,), 1, 19093, 90, (1, 1)),
        }.items()
    },
    "figure-2": {"ResNet18 smallest 4": (*RESNET_4, (36, 67)), **RESNET_40, **VGG_40},
    "figure-B2": {"ResNet18 smallest 4": (*RESNET_4, (37, 68)), **RESNET_40, **VGG_40},
    "table-C1": {"ResNet18 smallest 4": (*RESNET_4, (36, 67)), **RESNET_40},
    "figure-5": {"VGG11 largest 40 weights": VGG_40["VGG11 largest 40"]},
    "figure-4": {
        f"{network} smallest {period}": row
        for network, _ in RESNETS
        for period, row in {
            30: ([(8, 14, 20)], (8, 14, 20), 3, 3756, 3.33, (3, 3)),
            60: ([(8, 20)], (8, 20), 2, 3756, 5, (2, 2)),
        }.items()
    },
    "figure-C3": {
        "ResNet18 smallest 0.10": ([range(5, 21)], range(5, 21), 12, 3756, 0.62, (77, 77)),
        "ResNet18 smallest 0.06": ([range(5, 21)], range(5, 21), 9, 3756, 0.38, (77, 77)),
    },
    "table-F1": {"ResNet18 largest 750": ([], (50, 65), 2, 4382, 35, (2, 2))},
    "figure-R1": {"conv4 largest 0.9": ([], range(20), 20, 7825, 4.5, (100, 100))},
}


@pytest.mark.parametrize("name", ROWS)
def test_events_at_small(name):
    settings = {f"{s.network} {s.name}": s for s in shown("small", name)}
    for setting, (first, last, count, after, rate, papers) in ROWS[name].items():
        config, paper = scale("small", settings[setting]), settings[setting]
        layers, theirs = config.pruning.epochs, paper.config.pruning.epochs
        if isinstance(config.pruning, WeightPruning):
            layers, theirs = (layers,), (theirs,)
        assert [*dict.fromkeys(layers[:-1]), layers[-1]] == [*map(tuple, first), tuple(last)]
        assert (len(theirs[0]), len(theirs[-1])) == papers
        events = events_of(config)
        assert (len(events), (config.epochs - 1 - events[-1]) * 313) == (count, after)
        assert config.pruning.rate == pytest.approx(rate, abs=0.05 if rate > 1 else 0.01)
    noised = [s for s in shown("small", "figure-5", "figure-D2") if s.config.noise]
    chosen = {scale("small", setting).with_(noise=None) for setting in noised}
    assert len(chosen) == 1
    assert chosen <= {scale("small", s) for s in shown("small", "figure-5")}


@pytest.mark.parametrize("profile", ["small", "paper"])
def test_85_percent_fewer_parameters(profile):
    for setting in shown(profile, "figure-R1"):
        gone = sum(sum(layer.values()) for layer in removals(scale(profile, setting)))
        assert 1_250_858 - gone == (189_175 if setting.config.pruning else 1_250_858)


def test_what_small_is():
    assert not PROFILES["small"].left_out
    lengths = {325: (65, (30, 60)), 165: (33, (17, 25)), 150: (45, ()), 4000: (80, (40,))}
    for setting in shown("small"):
        config = scale("small", setting)
        assert (config.epochs, config.milestones) == lengths[setting.config.epochs]
        assert config.width == (0.25 if config.model in ("vgg11_bn", "resnet18") else 1)
        assert (config.data, config.train_per_class) == ("cifar10-jpeg", 1000)
        assert (config.test_per_class, config.batch) == (None, 32)
        if config.flatness is not None:
            assert config.flatness == Flatness(62, 256, 50, 5, 0.10, 0.005, 2000)


@pytest.mark.parametrize("profile", SMALLER)
def test_a_profile_changes_scale_only(profile):
    scaled_fields = {"data", "train_per_class", "test_per_class", "width", "epochs", "batch"}
    scaled_fields |= {"milestones", "pruning", "noise", "flatness"}
    for setting in shown(profile):
        paper, small = setting.config, scale(profile, setting)
        for field in {f.name for f in fields(Config)} - scaled_fields:
            assert getattr(small, field) == getattr(paper, field)
        assert small.epochs < paper.epochs
        assert small.width <= paper.width
        factor = PROFILES[profile].factor(paper.epochs)
        for milestone, original in zip(small.milestones, paper.milestones, strict=True):
            assert abs(milestone - original / factor) < 0.51
        assert (small.noise and small.noise.kind) == (paper.noise and paper.noise.kind)
        assert bool(events_of(small)) == bool(events_of(paper))
        if events_of(small):
            assert small.pruning == replace(paper.pruning, epochs=small.pruning.epochs)
        if small.flatness is not None:
            assert max(events_of(small), default=0) < small.flatness.epoch < small.epochs


@pytest.mark.parametrize("model", LAST_FILTERS)
def test_the_last_filters_are_those_of_the_networks(model):
    *_, last = prunable_layers(build(model, 10)).values()
    assert LAST_FILTERS[model] == last.filters


def registered(name: str, network: str, setting: str) -> int:
    """Seeds of a setting at small (docs/evidence.md, "The number of seeds is fixed")."""
    if name in ("figure-1", "figure-B1", "figure-R6"):
        return 1
    if name in ("figure-3", "figure-C1", "figure-C2", "figure-R3", "table-F1"):
        return 3
    ten = {"largest 40 weights", "zeroing 1106", "gaussian 1106", "restored 2480"}
    ten |= {"none"} if name in ("figure-5", "figure-D2") else set()
    if network == "conv4" or setting in ten:
        return 10
    return 10 if network == "VGG11" and name in ("figure-2", "figure-6", *FIGURES_E) else 5


@pytest.mark.parametrize("name", FIGURES)
def test_seeds(name):
    papers = {"figure-3": 5, "figure-C1": 5, "figure-C2": 5}.get(name, 10)
    papers = 1 if name in ("figure-1", "figure-B1", "figure-R6") else papers
    for profile in ("small", "paper"):
        settings = experiments.plan(name, profile).groupby(["network", "setting"])
        assert len(settings) == len(PAPER[name])
        for (network, setting), runs in settings:
            count = registered(name, network, setting) if profile == "small" else papers
            assert runs.seed[~runs.choosing].tolist() == list(range(count))
            choosing = name == "figure-R4" and setting.startswith("dropout")
            assert runs.seed[runs.choosing].tolist() == [10, 11, 12, 13, 14] * choosing


def test_another_number_of_seeds():
    usual, plan = (experiments.plan("figure-3", Scale("demo", seeds=n)) for n in (None, 12))
    assert set(plan.seed) == set(range(12))
    assert set(usual.run) < set(plan.run)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", ["zeroing", "gaussian", "restored"])
def test_noise_lasts_for_the_papers_share_of_the_time_between_events(kind, profile):
    settings = [s for s in shown(profile, "figure-5", "figure-D2") if s.name.startswith(kind)]
    configs = [scale(profile, setting) for setting in settings]
    spans = [training_batches(config) for config in configs]
    for setting, config, batches in zip(settings, configs, spans, strict=True):
        (train, test), papers = images_of(config), int(setting.name.split()[1])
        (gap,) = {b - a for a, b in pairwise(config.pruning.epochs[-1])}
        steps, evaluation = math.ceil(train / config.batch), math.ceil(test / 128)
        share = gap * steps * papers / 15_640
        assert abs(batches - share) <= 0.5 or (batches == 1 and 0 < share < 1)
        assert config.noise.passes < gap * (steps + 2 * evaluation)
    assert profile == "smoke" or len(set(spans)) == len(spans) >= 2
    if profile == "small":
        assert spans == ([14, 101, 195, 397] if kind == "restored" else [0, 8, 177])


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", FIGURES)
def test_every_plan(name, profile):
    plan = experiments.plan(name, profile)
    assert plan.run.is_unique
    unseeded = plan.config.map(lambda config: config.with_(seed=0))
    assert (unseeded.groupby([plan.network, plan.label]).nunique() == 1).all()
    without = plan.method.isin(["No Pruning", "Scratch", "Dropout"])
    assert plan.rate.isna().equals(without)
    most = [max(c.pruning.fractions) if c.pruning else 0 for c in plan.config]
    assert plan.fraction.tolist() == pytest.approx([100 * fraction for fraction in most])


@pytest.mark.parametrize("profile", ["demo", "small", "paper"])
def test_configurations_that_give_the_same_numbers_are_one_run(profile):
    def what_counts(config: Config) -> Config:
        pruning = config.pruning
        if isinstance(pruning, FilterPruning) and pruning.target == "random":
            pruning = replace(pruning, score="l2")
        return unmeasured(config).with_(pruning=pruning)

    sharing = [name for name in FIGURES if name not in PROFILES[profile].alone]
    plans = pd.concat([experiments.plan(name, profile) for name in sharing])
    contents = {c.identity: json.dumps(to_dict(c), sort_keys=True) for c in plans.config}
    assert len(set(contents.values())) == len(contents)
    assert len({what_counts(c) for c in plans.config}) == plans.run.nunique()
    assert (plans[~plans.choosing].groupby("run").seed.nunique() == 1).all()


@pytest.mark.parametrize("profile", PROFILES)
def test_the_queue_has_every_run_once_by_tier_and_seed(profile):
    plans = pd.concat([experiments.plan(f, profile).assign(figure=f) for f in FIGURES])
    queue = experiments.queue(profile)
    assert sorted(config.identity for config in queue) == sorted(set(plans.run))
    first: dict[str, int] = {}
    for number, tier in enumerate(TIERS):
        for figure, _, network in (part.partition(":") for part in tier):
            mine = (plans.figure == figure) & ((plans.network == network) | (not network))
            for run in plans.run[mine]:
                first.setdefault(run, number)
    order = [(first[config.identity], config.seed) for config in queue]
    assert order == sorted(order)


@pytest.mark.parametrize("name", ["figure-2", "figure-D2", "table-F1"])
def test_another_precision_or_data_set(name):
    changed = {"precision": "bfloat16", "data": "images:/a/cifar.zip"}
    plan, other = experiments.plan(name), experiments.plan(name, Scale("small", **changed))
    assert other.config.tolist() == [config.with_(**changed) for config in plan.config]
    assert not set(plan.run) & set(other.run)
    table = experiments.table(name, Scale("small", **changed))
    for field, value in changed.items():
        assert set(table[field]["small"]) == {value}
        assert value not in set(table[field]["paper"])


def test_annotate():
    """A run that serves several settings appears once for each."""
    plan = experiments.plan("figure-2", Scale("demo", seeds=1))
    both = pd.concat([plan, plan[plan.setting == "largest 40"].assign(setting="another")])
    frame = pd.DataFrame({"run": [*plan.run, "0" * 16], "seed": 99, "post": range(len(plan) + 1)})
    out = experiments.annotate(frame, both)
    assert list(out) == [*both.columns.drop("config"), "post"]
    assert out.post.tolist() == both.index.tolist()
    assert (out.seed == 0).all()


@pytest.mark.parametrize(
    ("name", "setting", "between", "after", "dose"),
    [
        ("figure-2", "VGG11 Prune_S 1.7%", (1564, 313), (19_550, 2817), (6.8, 2.2)),
        ("figure-2", "VGG11 Prune_L 13%", (15_640, 2504), (30_498, 4069), (65.7, 16.4)),
        ("figure-3", "VGG11 Prune_R 90%", ("one event",) * 2, (124_338, 19_093), (460, 115)),
        ("figure-2", "ResNet18 Prune_S 14%", (15_640, 2504), (28_934, 4069), (69.4, 17.3)),
        ("figure-4", "ResNet56 Prune_S 5%", (23_460, 3756), (25_024, 3756), (3, 3)),
        ("table-F1", "ResNet18 Prune_L 35%", (293_250, 4695), (292_859, 4382), (179, 44.5)),
        ("figure-R1", "conv4 Prune_L 90%", (391, 313), (19_550, 7825), None),
    ],
)
def test_tables_show_steps_and_doses(name, setting, between, after, dose):
    row = experiments.table(name, "small").loc[tuple(setting.split(" ", 1))]
    columns = {"steps between a layer's events": between, "steps after the last event": after}
    if dose is not None:
        columns["dose (filters an event, last layer)"] = dose
    for column, expected in columns.items():
        assert (row[column]["paper"], row[column]["small"]) == expected


@pytest.mark.parametrize(("profile", "shared"), [("small", False), ("demo", True)])
@pytest.mark.parametrize("name", ["figure-3", "figure-5", "figure-D2"])
def test_figures_that_stand_alone(name, profile, shared):
    """At small, the runs of Figure 2 that others could share were made on another device."""
    mine, measured = experiments.plan(name, profile), experiments.plan("figure-2", profile)
    plain = {c.with_(flatness=None, histograms=False).identity for c in measured.config}
    assert bool(set(mine.run) & set(measured.run)) == shared
    assert set(mine.run) & (set(measured.run) if shared else plain)


@pytest.mark.parametrize(
    ("data", "train_per_class", "expected"),
    [
        ("cifar10", None, 391),
        ("cifar10-jpeg", 1000, 79),
        ("cifar100", 400, 313),
        ("cifar100", 1000, 391),
        ("digits", None, 8),
    ],
)
def test_steps_of_an_epoch(data, train_per_class, expected):
    assert steps(Config(data=data, train_per_class=train_per_class)) == expected
