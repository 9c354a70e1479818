"""Settings of one's own: which runs they are, and their verdict on runs with a known truth."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from paperlib import experiments, overview, own, sizes

SEEDS = 10
SCORE = "my_pruning:unlike"


@pytest.fixture(scope="module")
def plan() -> pd.DataFrame:
    return own.settings("small", SCORE, "largest", seeds=SEEDS)


def measured(plan: pd.DataFrame, effect: float, learned: float = 100.0):
    """Epochs and runs in which each percent of instability adds `effect` points of accuracy."""
    rng = np.random.default_rng(0)
    less = {"none": 0, "smallest 4": 1, "smallest 40": 2, "largest 40": 5, "yours": 4}
    frames, rows = [], []
    for run in plan.itertuples():
        instability = less[run.setting] + 0.1 * rng.standard_normal()
        accuracy = 80 + effect * instability + 0.3 * rng.standard_normal()
        rows.append((run.run, accuracy, accuracy + 1, 100 - max(instability, 0), "cpu"))
        epoch = np.arange(run.config.epochs)
        pruning = run.config.pruning
        events = pruning.epochs[-1] if pruning is not None else ()
        curves = {"pre": accuracy, "post": accuracy, "train_accuracy": learned, "train_loss": 0.01}
        removed = np.where(np.isin(epoch, events), 4, 0)
        frames.append(pd.DataFrame({"run": run.run, "epoch": epoch, **curves, "removed": removed}))
    columns = ["run", "accuracy", "best_accuracy", "mean_stability", "device"]
    return pd.concat(frames), pd.DataFrame(rows, columns=columns)


def test_only_the_score_differs_from_figure_2(plan):
    figure_2 = experiments.plan("figure-2", experiments.Scale("small", seeds=SEEDS))
    assert set(plan.run[plan.setting != "yours"]) < set(figure_2.run)
    mine = plan[plan.setting == "yours"].set_index("seed").config
    largest = plan[plan.setting == "largest 40"].set_index("seed").config
    for seed in range(SEEDS):
        pruning = replace(largest[seed].pruning, score=SCORE)
        assert mine[seed] == largest[seed].with_(pruning=pruning)
    assert plan.run.is_unique


@pytest.mark.parametrize("target", ["smallest", "largest"])
def test_a_network_of_ones_own_is_in_every_setting(target):
    without = own.settings("smoke", model="my_pruning:small_net", seeds=1)
    plan = own.settings("smoke", "l1", target, model="my_pruning:small_net", seeds=1)
    assert plan.setting.tolist() == [*without.setting, "yours"]
    assert {config.model for config in plan.config} == {"my_pruning:small_net"}
    assert plan.network.unique().tolist() == ["small_net"]
    assert list(plan.run) == [config.identity for config in plan.config]
    (mine,) = plan.config[plan.setting == "yours"]
    assert mine.pruning.target == target


def test_layers_of_ones_own():
    layers = ("0", "3", "6", "10")
    plan = own.settings("smoke", "l1", model="my_pruning:small_net", seeds=1, layers=layers)
    pruned = plan[plan.setting != "none"]
    assert {config.pruning.layers for config in pruned.config} == {layers}
    assert plan.run.is_unique


WRONG = [("target", "small"), ("target", "random"), ("data", "imagenet"), ("data", "images:/nope")]


@pytest.mark.parametrize(
    ("name", "wrong"), [*WRONG, ("model", "VGG11"), ("score", "my_pruning.unlike")]
)
def test_unknown_names_are_refused(name, wrong):
    valid = {"target": "largest", "data": "digits", "model": "resnet18", "score": "l1"}
    own.settings("smoke", **valid)
    with pytest.raises(ValueError, match=wrong) as error:
        own.settings("smoke", **valid | {name: wrong})
    assert valid[name] in str(error.value)


@pytest.mark.parametrize(
    ("effect", "verdict"), [(0.5, "supported"), (-0.5, "contradicted"), (0, "negligible")]
)
def test_the_verdict_is_the_truth(plan, effect, verdict):
    claim = own.judge(plan, *measured(plan, effect))
    assert claim.verdict == verdict
    least_most, least_none = (contrast.fitted.value for contrast in claim.contrasts)
    assert least_most == pytest.approx(4 * effect, abs=0.5)  # Prune_L against Prune_S, period 4
    assert least_none == pytest.approx(5 * effect, abs=0.5)


def test_a_network_that_does_not_learn_cannot_be_judged(plan):
    claim = own.judge(plan, *measured(plan, 0.5, learned=99.0))
    assert claim.verdict == "not testable"
    assert {gate.gate for gate in claim.gates if gate.passed is False} == {"G1", "G2", "G3"}


def test_a_plan_without_comparison_is_refused(plan):
    found = measured(plan, 0.5)
    for few in (plan[plan.setting != "none"], plan[plan.setting.isin(["none", "yours"])]):
        with pytest.raises(ValueError, match="'none'"):
            own.judge(few, *found)


def test_a_run_that_is_missing_leaves_no_verdict(plan):
    epochs, runs = measured(plan, 0.5)
    claim = own.judge(plan, epochs, runs[1:])
    assert (claim.verdict, claim.done) == ("incomplete", claim.registered - 1)


def test_the_overview_names_every_claim_and_links_its_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERLIB_RUNS", str(tmp_path))
    monkeypatch.setenv("PAPERLIB_RESULTS", str(tmp_path / "none"))
    judged = overview.judged("smoke")
    assert list(judged.summary.index) == [claim.name for claim in judged.claims]
    rows = judged.index().splitlines()[2:]
    for claim, row in zip(judged.claims, rows, strict=True):
        assert claim.verdict == "incomplete"
        for figure in claim.figures:
            assert f"({experiments.FIGURES[figure].notebook}.ipynb)" in row
    links = overview.figures()
    assert all(f"({f.notebook}.ipynb)" in links for f in experiments.FIGURES.values())


def test_a_table_of_sizes_that_is_kept_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERLIB_RESULTS", str(tmp_path))
    rows = {"method": ["No Pruning", "Prune_L"], "form": ["dense", "compact"]}
    table = pd.DataFrame(rows | {"ms_batch_1": [0.5, 0.4]}).set_index(["method", "form"])
    table.to_csv(sizes.kept("small"))
    loaded = SimpleNamespace(scale=experiments.Scale("small"), plan=None, records=None)
    pd.testing.assert_frame_equal(sizes.sizes(loaded), table)


def test_a_setting_of_ones_own_is_compared(plan):
    """Where it is the least stable one, on a network of any name."""
    epochs, runs = measured(plan, 0.5)
    mine = plan.run[plan.setting == "yours"]
    runs.loc[runs.run.isin(mine), "mean_stability"] -= 5
    claim = own.judge(plan.assign(network="small_net"), epochs, runs)
    assert [contrast.name.split()[0] for contrast in claim.contrasts] == ["Yours", "Yours"]
