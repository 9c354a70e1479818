"""Configurations: their identity, their JSON and what they refuse."""

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from paperlib import config as module
from paperlib import experiments
from paperlib.config import (
    Config,
    ConfigError,
    FilterPruning,
    Flatness,
    Noise,
    WeightPruning,
    from_dict,
    to_dict,
)

FILTERS = FilterPruning((0.3, 0.9), ((3, 7), (4, 8, 12)), "ebn", "largest")
WEIGHTS = WeightPruning(("dense",), (0.5,), (0, 2), schedule="annealing", mu=2.0)
SCRATCH = FilterPruning((0.5,), scratch=True, layers=("conv1",))
CONFIGS = [
    Config(),
    Config(data="digits", train_per_class=5, model="conv4", dropout=(0.25, 0.5), seed=3),
    Config(pruning=FILTERS),
    Config(pruning=WEIGHTS, milestones=(5, 7), optimizer="sgd", momentum=0.9, precision="bfloat16"),
    Config(pruning=SCRATCH),
    Config(pruning=FILTERS, noise=Noise("gaussian", 129), flatness=Flatness(20, directions=5)),
    Config(pruning=replace(FILTERS, norm=False), flatness=Flatness(324)),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip_through_json(config):
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


OTHERS = {  # values unlike the default, where adding 1 to that gives none
    "data": "cifar100",
    "train_per_class": 100,
    "test_per_class": 100,
    "model": "resnet18",
    "dropout": 0.5,
    "optimizer": "sgd",
    "milestones": (150,),
    "pruning": FILTERS,
    "noise": Noise("zeroing", 0),
    "flatness": Flatness(3),
    "precision": "bfloat16",
}


@pytest.mark.parametrize("field", dataclasses.fields(Config), ids=lambda field: field.name)
def test_every_field_is_part_of_the_identity(field):
    name = field.name
    plain = Config(pruning=SCRATCH if name == "pruning" else FILTERS)
    value = OTHERS[name] if name in OTHERS else type(field.default)(field.default + 1)
    changed = plain.with_(**{name: value})
    assert changed.identity != plain.identity
    assert changed.with_(**{name: getattr(plain, name)}).identity == plain.identity


MILESTONES = [3, 4], range(3, 5), pd.Series([3, 4])
EQUAL_PRUNING = [
    (FilterPruning([0.3, 0.9], [[3, 7], [4, 8, 12]], "ebn", "largest"), FILTERS),
    (
        FilterPruning(np.array([0.25, 0.5]), (np.arange(1, 4), range(2))),
        FilterPruning((0.25, 0.5), ((1, 2, 3), (0, 1))),
    ),
    (WeightPruning(["dense"], [0.5], [0, 2], schedule="annealing", mu=2), WEIGHTS),
]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"epochs": 325, "seed": 0, "pruning": None, "weight_decay": 0, "dropout": 0}, {}),
        ({"learning_rate": 1, "width": 2}, {"learning_rate": 1.0, "width": 2.0}),
        ({"dropout": [0, 0.5]}, {"dropout": (0.0, 0.5)}),
        ({"seed": 1.0, "epochs": torch.tensor(5)}, {"seed": 1, "epochs": 5}),
        ({"train_per_class": np.float64(20)}, {"train_per_class": 20}),
        *(({"milestones": m}, {"milestones": (3, 4)}) for m in MILESTONES),
        ({"augment": np.bool_(True), "width": np.float64(0.1)}, {"augment": True, "width": 0.1}),
        ({"flatness": Flatness(np.int32(2))}, {"flatness": Flatness(2)}),
        *(({"pruning": a}, {"pruning": b}) for a, b in EQUAL_PRUNING),
    ],
)
def test_equal_settings_have_one_identity(a, b):
    """Numbers of NumPy and others are plain numbers."""
    a, b = Config(**a), Config(**b)
    assert a == b
    assert a.identity == b.identity
    assert hash(a) == hash(b)
    assert json.dumps(to_dict(a)) == json.dumps(to_dict(b))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("seed", value) for value in (True, "1", 1.5, None, [1])),
        *(("milestones", value) for value in (3, {3}, "34")),
        *(("width", math.inf), ("augment", 1), ("model", None), ("dropout", (0.1,))),
        ("pruning", Noise("zeroing", 1)),
    ],
)
def test_values_of_another_type(field, value):
    with pytest.raises(ConfigError, match=rf"{field}\b.*{re.escape(repr(value))}"):
        Config(**{field: value})


KNOWN = {
    "smoke": "ff8a43db7dc50c69c49196d6cff51d86da867ce757996ea3b50f9f6f14359db2",
    "small": "8cbfb8d7e2273095b8c0fd46849e861e444e3fbd4cc2a370192f8034f0e72397",
    "paper": "2b9e66d77b4eec1bef547c0011861986f39bf611836120a0c3755a84a0ad3a91",
}


@pytest.mark.parametrize("profile", KNOWN)
def test_identities_of_all_runs_stay(profile):
    """Records that were written before are found again."""
    found = {run for name in experiments.FIGURES for run in experiments.plan(name, profile).run}
    known = hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()
    assert known == KNOWN[profile]


def test_identity_is_a_hash_of_canonical_json():
    config = Config(seed=2, data="images:/a/b", width=2, pruning=FilterPruning([0.5], [[1, 2]]))
    pruning = '{"epochs":[[1,2]],"fractions":[0.5],"type":"FilterPruning"}'
    text = f'{{"data":"images:b","pruning":{pruning},"seed":2,"width":2.0}}'
    assert config.identity == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_a_new_field_at_its_default_changes_no_identity(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Larger(Config):
        smoothing: float = 0.0

    @dataclasses.dataclass(frozen=True)
    class LargerPruning(FilterPruning):
        warmup: int = 0

    LargerPruning.__name__ = "FilterPruning"
    for config in CONFIGS:
        assert Larger(**vars(config)).identity == config.identity
        assert Larger(**vars(config), smoothing=0.1).identity != config.identity
    monkeypatch.setattr(module, "_TYPES", module._TYPES | {"larger": LargerPruning})
    larger = Config(pruning=LargerPruning(**vars(FILTERS)))
    assert larger.identity == Config(pruning=FILTERS).identity


def test_only_the_last_part_of_a_path_counts():
    def identities(*paths: str | Path) -> set[str]:
        return {Config(data=f"images:{path}").identity for path in paths}

    (one,) = identities("/a/b/cifar", "/a/b/cifar/", "other/cifar", "~/cifar")
    assert one not in identities("/a/b/cifar.zip", "/a/cifar/b") | {Config(data="cifar").identity}
    assert len(identities("~", Path.home())) == 1
    assert from_dict(to_dict(Config(data="images:/a/b/cifar"))).data == "images:/a/b/cifar"


def test_the_rate_is_that_of_the_layer_that_loses_most():
    assert FILTERS.rate == pytest.approx(30)
    assert FilterPruning((0.9, 0.3), ((3, 7), (4, 8, 12))).rate == pytest.approx(45)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FilterPruning((1.0,), ((1,),)), r"\[0, 1\).* got .1.0"),
        (lambda: FilterPruning((-0.1,), ((1,),)), r"got \(-0.1"),
        (lambda: FilterPruning((math.nan,), ((1,),)), r"FilterPruning.fractions takes .* nan"),
        (lambda: FilterPruning((0.5,)), r"1 fractions .* got \(\)"),
        (lambda: FilterPruning((0.5,), ((1,), (2,))), r"1 fractions .* \(2,\)"),
        (lambda: FilterPruning((0.5,), ((),)), r"rising .* got \(\)"),
        (lambda: FilterPruning((0.5,), ((3, 3),)), r"rising .* got \(3, 3\)"),
        (lambda: FilterPruning((0.5,), ((-1, 3),)), r"rising .* got \(-1, 3\)"),
        (lambda: FilterPruning((0.5,), ((1,),), scratch=True), r"scratch=True.* got \(\(1,"),
        (lambda: replace(FILTERS, layers=("a",)), r"2 fractions .*\('a',\)"),
        (lambda: replace(WEIGHTS, fractions=(2.0,)), r"got \(2.0"),
        (lambda: replace(WEIGHTS, layers=("a", "b")), "1 fractions .*'b'"),
        (lambda: replace(WEIGHTS, mu=-1.0), "mu must be at least 0, got -1.0"),
        (lambda: Noise("salt", 1), "'salt': one of zeroing, gaussian, restored"),
        (lambda: Noise("zeroing", -1), "at least 0, got -1"),
        (lambda: Noise("zeroing", 1, evaluation_batch=0), "at least 1, got 0"),
        (lambda: Flatness(0, images=0), "images must be at least 1, got 0"),
        (lambda: Flatness(0, test_images=0), "test_images must be at least 1, got 0"),
        (lambda: Flatness(0, eigenvalues=5, directions=6), "6 directions"),
        (lambda: Flatness(0, directions=0), "directions .* got 0"),
        (lambda: Flatness(0, step=0.0), "step .* got 0"),
        (lambda: Flatness(0, step=0.5), "step .* 0.4, got 0.5"),
        (lambda: Config(optimizer="lion"), "unknown optimizer 'lion': one of adam, sgd"),
        (lambda: Config(precision="float16"), "'float16': one of float32, bfloat16"),
        (lambda: Config(model="m:f", dropout=0.5), "m:f takes no dropout"),
        (lambda: Config(epochs=0), "epochs must be at least 1, got 0"),
        (lambda: Config(batch=0), "batch must be at least 1, got 0"),
        (lambda: Config(learning_rate=0), "learning_rate must be positive"),
        (lambda: Config(learning_rate=math.nan), "learning_rate.* nan"),
        (lambda: Config(width=-1), "width must be positive, got -1"),
        (lambda: Config(epochs=12, pruning=FILTERS), "event at epoch 12 of a run of 12 epochs"),
        (lambda: Config(epochs=5, flatness=Flatness(5)), "flatness at epoch 5 of 5"),
        (lambda: Config(flatness=Flatness(-1)), "flatness at epoch -1"),
        (lambda: Config(noise=Noise("zeroing", 1)), "noise needs the filter pruning"),
        (lambda: Config(noise=Noise("zeroing", 1), pruning=WEIGHTS), "noise needs"),
        (lambda: from_dict({"smoothing": 1}), "not a configuration of this version.*smoothing"),
        (lambda: from_dict({"noise": {"type": "Salt"}}), "Salt"),
        (lambda: from_dict({"pruning": {"fractions": [0.5]}}), "type"),
        (lambda: from_dict({"flatness": {"type": "Flatness"}}), "epoch"),
        (lambda: from_dict({"epochs": 0}), "at least 1"),
    ],
)
def test_what_cannot_be_run(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_epsilons_stay_within_reach():
    assert Flatness(0, reach=0.4, step=0.15).epsilons == pytest.approx((-0.3, -0.15, 0, 0.15, 0.3))
    assert len(Flatness(0).epsilons) == 81
