"""What `experiments.load` gives a figure, from records alone."""

from collections.abc import Iterable

import numpy as np
import pytest
import small

from paperlib import experiments, overview, sweep
from paperlib.config import Config
from paperlib.experiments import Scale
from paperlib.runs import Store


def write(store: Store, configs: Iterable[Config], loss: float = 0.01) -> None:
    for config in configs:
        arrays = {}
        if config.flatness is not None:
            epsilons = np.array(config.flatness.epsilons)
            arrays = {"eigenvalues": np.array([4, -1.0]), "noise": np.array(7.0)}
            arrays |= {"epsilons": epsilons, "losses": np.stack([0.5 + epsilons**2 * 40] * 2)}
        accuracy = np.linspace(50, 100, config.epochs)
        store.write(small.record(config, arrays, train_accuracy=accuracy, train_loss=loss))


@pytest.fixture(autouse=True)
def no_profile(monkeypatch):
    monkeypatch.delenv("PAPERLIB_PROFILE", raising=False)


def test_a_complete_figure(store):
    write(store, experiments.plan("figure-E1", "smoke").config)
    figure = experiments.load("figure-E1", "smoke", store=store)
    assert figure.complete
    assert [r.run for r in figure.records] == figure.plan.run.tolist()
    assert figure.epochs.groupby("run").size().eq(12).all()
    assert figure.runs.run.tolist() == figure.plan.run.tolist()
    assert set(figure.runs.curvature) == {3.0}
    assert set(figure.runs.noise) == {7.0}
    assert figure.runs.tic.to_numpy() == pytest.approx(7 / 3)
    assert figure.runs.delta_w.between(0.01, 1).all()
    epochs = figure.settings.loc["epochs"]
    assert (set(epochs.loc["paper"]), set(epochs.loc["smoke"])) == ({325}, {12})
    assert set(figure.gates.gate) == {"G1", "G2", "G3", "G4"}
    assert figure.claims.claim.unique().tolist() == ["T4"]
    done, registered = figure.claims.runs[0].split(" of ")
    assert done == registered  # of this scale
    assert all(word in figure.stamp for word in ("smoke", "digits", "2 seeds", "G1"))


def test_a_stamp_names_three_settings_whose_gates_fail_and_counts_the_others(store):
    write(store, experiments.plan("figure-3", "demo").config, loss=1.0)
    figure = experiments.load("figure-3", "demo", store=store)
    failed = figure.gates[figure.gates.passed == "failed"]
    where = (failed.network + " " + failed.setting).unique()
    assert len(where) > 3
    assert [name in figure.stamp for name in where] == [True] * 3 + [False] * (len(where) - 3)
    assert f"and {len(where) - 3} more" in figure.stamp
    assert all(gate in figure.stamp for gate in failed.gate)


def test_a_stamp_names_what_differs_from_the_profile(store):
    change = {"data": "cifar10", "precision": "bfloat16"}
    scale = Scale("smoke", **change)
    write(store, experiments.plan("figure-1", scale).config)
    figure = experiments.load("figure-1", "smoke", store=store, train=False, **change)
    for stamp in (figure.stamp, overview.Judged(scale, ()).stamp):
        assert all(word in stamp for word in ("smoke", "cifar10", "bfloat16"))


def test_a_figure_with_runs_missing(store):
    plan = experiments.plan("figure-R1", "smoke")
    write(store, plan.config[1:])
    figure = experiments.load("figure-R1", "smoke", store=store, train=False)
    assert not figure.complete
    assert figure.runs.run.tolist() == plan.run[1:].tolist()
    assert f"{len(plan) - 1} of {len(plan)} runs" in figure.stamp
    assert set(figure.claims.verdict) == {"incomplete"}
    assert "curvature" not in figure.runs


def test_small_is_shown_where_it_is_complete_and_demo_else(store, monkeypatch):
    assert experiments.resolve("figure-1", store=store) == Scale("demo")
    write(store, experiments.plan("figure-1", "small").config)
    assert experiments.load("figure-1", store=store).scale == Scale("small")
    assert experiments.resolve("figure-1", data="cifar10", store=store) == Scale("demo", "cifar10")
    # Fewer seeds than are registered: nothing is shown before all are there.
    write(store, experiments.plan("figure-R5", Scale("small", seeds=3)).config)
    assert experiments.resolve("figure-R5", seeds=3, store=store) == Scale("demo", seeds=3)
    monkeypatch.setenv("PAPERLIB_PROFILE", "paper")
    assert experiments.resolve("figure-1", store=store) == Scale("paper")
    assert experiments.resolve("figure-1", "smoke", store=store) == Scale("smoke")


def test_small_is_shown_for_the_networks_that_are_complete(store):
    plan = experiments.plan("figure-2", "small")
    vgg = plan[plan.network == "VGG11"]
    write(store, [*vgg.config, plan[plan.network == "ResNet18"].config.iloc[0]])
    scale = experiments.resolve("figure-2", store=store)
    assert scale == Scale("small", networks=("VGG11",))
    figure = experiments.load("figure-2", store=store, train=False)
    assert figure.complete
    assert figure.plan.run.tolist() == vgg.run.tolist()
    assert set(figure.settings.columns.get_level_values("network")) == {"VGG11"}
    assert "ResNet18" in figure.stamp
    # The claims count what is registered, of the networks that are not shown, too.
    whole = experiments.load("figure-2", "small", store=store, train=False)
    assert figure.claims.runs.tolist() == whole.claims.runs.tolist()
    queued = [config.identity for config in experiments.queue(scale, ["figure-2"])]
    assert sorted(queued) == sorted(vgg.run)


def test_what_is_missing_is_trained_if_asked(store, monkeypatch):
    monkeypatch.setattr(sweep, "execute", lambda configs, store: write(store, configs))
    assert experiments.load("figure-1", "smoke", seeds=1, store=store).complete
    assert store.identities() == experiments.plan("figure-1", "smoke").run[:1].tolist()
    with pytest.raises(ValueError, match="'figure-9'"):
        experiments.load("figure-9", store=store)
