"""Gates, on epochs made by hand whose answers are known."""

import numpy as np
import pandas as pd
import pytest

from paperlib import experiments
from paperlib.claims import gates
from paperlib.config import Config, FilterPruning, WeightPruning

ADAM = Config(model="vgg11_bn", milestones=(8, 18), epochs=20)
SGD = ADAM.with_(optimizer="sgd", augment=True, model="resnet20")
CONV4 = Config(model="conv4", milestones=(), epochs=20)


def filters(*epochs: int, fraction: float = 0.9, scratch: bool = False) -> FilterPruning:
    of_layers = () if scratch else ((epochs[0],), epochs)
    return FilterPruning((0.3, fraction), of_layers, scratch=scratch)


def run(config: Config, setting: str, seed: int = 0, network: str = "VGG11", figure: str = "f"):
    """A registered run's row."""
    config = config.with_(seed=seed)
    about = {"figure": figure, "network": network, "setting": setting, "label": setting}
    return about | {"seed": seed, "choosing": False, "run": config.identity, "config": config}


def history(row: dict, **columns: object) -> pd.DataFrame:
    """A run's epochs: learned from epoch 5 on, at 80% test accuracy, unless `columns` differ.

    Columns are numbers, lists, or dicts of the epochs that differ.
    """
    config = row["config"]
    epochs = np.arange(config.epochs)
    events = getattr(config.pruning, "epochs", ())
    if events and isinstance(config.pruning, FilterPruning):
        events = events[-1]
    frame = pd.DataFrame({"run": row["run"], "epoch": epochs, "train_loss": 0.001})
    frame = frame.assign(pre=80.0, post=80.0, removed=10.0 * np.isin(epochs, events))
    frame["train_accuracy"] = np.where(epochs < 5, 90.0, 100.0)
    for name, values in columns.items():
        if isinstance(values, dict):
            frame.loc[list(values), name] = list(values.values())
        else:
            frame[name] = values
    return frame


def evaluate(*runs_and_epochs) -> dict[tuple[str, str], gates.Gate]:
    runs = pd.DataFrame([row for row, _ in runs_and_epochs])
    results = gates.evaluate(runs, pd.concat([epochs for _, epochs in runs_and_epochs]))
    return {(gate.gate, gate.setting): gate for gate in results}


def alone(gate: str, config: Config, setting: str, **columns: object) -> gates.Gate:
    row = run(config, setting)
    return evaluate((row, history(row, **columns)))[gate, setting]


def once(epoch: int) -> list[float]:
    return [100.0 if e == epoch else 90.0 for e in range(20)]


@pytest.mark.parametrize(
    ("config", "accuracy", "passed", "number"),
    [
        (ADAM, once(0), True, 100),
        (ADAM, once(10), True, 100),  # 55% of 20 epochs: the first 11
        (ADAM, once(11), False, 90),
        (ADAM, 99.9, True, 99.9),
        (ADAM, 99.89, False, 99.89),
        (CONV4, [*[100.0] * 17, 98, 97.5, 98.5], True, 98),
        (CONV4, [*[100.0] * 17, 98, 97.5, 98.4], False, 97.966667),
        (SGD, 50.0, None, np.nan),  # augmented
    ],
)
def test_g1_the_unpruned_network_learns(config, accuracy, passed, number):
    gate = alone("G1", config, "none", train_accuracy=accuracy)
    assert gate.passed is passed
    assert gate.number == pytest.approx(number, nan_ok=True)


def of_seeds(*accuracies: float) -> dict[tuple[str, str], gates.Gate]:
    """Gates of an unpruned setting and of a pruned one; a training accuracy for each seed."""
    settings = {"none": ADAM, "S": ADAM.with_(pruning=filters(3, 11))}
    return evaluate(
        *(
            (row := run(config, name, seed), history(row, train_accuracy=accuracy))
            for name, config in settings.items()
            for seed, accuracy in enumerate(accuracies)
        )
    )


@pytest.mark.parametrize(
    ("accuracies", "passed"),
    [
        ((100.0, 99.7), False),  # one seed learns, one does not; their mean does not
        ((100.0, 99.85), True),
        ((99.98, 99.92, 99.8), True),  # their mean is 99.9 but for rounding
    ],
)
def test_gates_are_of_means_over_seeds(accuracies, passed):
    found = of_seeds(*accuracies)
    assert found["G1", "none"].number == pytest.approx(np.mean(accuracies))
    for gate in (("G1", "none"), ("G2", "S"), ("G3", "S")):
        assert found[gate].passed is passed


# G2: events at 3, 7, 11, 15; the milestone is 8

PRUNED = ADAM.with_(pruning=filters(3, 7, 11, 15))
LONG = ADAM.with_(epochs=40, milestones=(8,), pruning=filters(*range(8, 27, 2)))  # 10 events
DROP = {12: 50, 13: 50, 14: 50}  # after the event at 11; `pre` of 15 is of before the next
END = dict.fromkeys(range(16, 20), 50)
# Each window is judged by its own event: 80, then 79.8, then 79.6 at the end.
DRIFT = dict.fromkeys(range(12, 16), 79.8) | dict.fromkeys(range(16, 20), 79.6)
# 70.4 - 0.3 is 70.10000000000001.
ROUNDED = dict.fromkeys(range(16), 70.4) | dict.fromkeys(range(16, 20), 70.1)


@pytest.mark.parametrize(
    ("config", "columns", "number"),
    [
        (PRUNED, {"pre": {4: 10, 5: 10, 6: 10, 7: 10}}, 100),  # before the milestone
        (ADAM.with_(pruning=filters(8)), {"pre": {8: 80.4}}, 0),  # on it
        (PRUNED, {"pre": DROP | {15: 79.7}}, 100),
        (PRUNED, {"pre": DROP | {15: 79.69}}, 50),
        (PRUNED, {"pre": DROP | {13: 79.7, 15: 79.65}}, 100),  # earlier in the window
        (PRUNED, {"pre": END | {17: 79.7}}, 100),
        (PRUNED, {"pre": END | {17: 79.69}}, 50),
        (PRUNED, {"pre": DRIFT}, 100),
        (PRUNED, {"pre": ROUNDED}, 100),
        (PRUNED, {"train_accuracy": {15: 99.8}}, 50),
        (PRUNED, {"train_accuracy": {19: 99.8}}, 50),
        (PRUNED, {"train_accuracy": {14: 99.8, 16: 99.8}}, 100),  # not a window's last epoch
        (LONG, {"train_accuracy": {12: 99}}, 90),
        (LONG, {"train_accuracy": {12: 99, 14: 99}}, 80),
    ],
)
def test_g2_recovery_from_nine_events_in_ten(config, columns, number):
    gate = alone("G2", config, "S", **columns)
    assert (gate.passed, gate.number) == (number >= 90, number)


@pytest.mark.parametrize(
    ("pruning", "setting"),
    [
        (filters(3, 7), "before the milestone"),
        (filters(*range(3, 16)), "every epoch"),
        (filters(scratch=True), "before training"),
    ],
)
def test_g2_where_it_does_not_apply(pruning, setting):
    gate = alone("G2", ADAM.with_(pruning=pruning), setting, train_accuracy=10.0, pre={19: 0})
    assert gate.passed is None


@pytest.mark.parametrize(
    "config",
    [
        SGD.with_(pruning=filters(3, 7)),
        CONV4.with_(pruning=WeightPruning(("dense",), (0.9,), (0, 1, 2))),
        ADAM.with_(model="resnet18", augment=True, pruning=filters(3, 7)),
    ],
    ids=["SGD", "conv4", "F1"],
)
@pytest.mark.parametrize(("rise", "passed"), [(0.5, True), (0.51, False), (-3, True)])
def test_g2_of_other_networks_is_that_accuracy_no_longer_rises(config, rise, passed):
    """Epochs 16 to 18 against 13 to 15; the last and those before do not matter."""
    post = {19: 0.0, 12: 0.0} | {e: 80 + rise + (e - 17) for e in (16, 17, 18)}
    gate = alone("G2", config, "S", post=post, train_accuracy=50.0)
    assert (gate.passed, gate.number) == (passed, pytest.approx(rise))
    assert alone("G3", config, "S", train_accuracy=50.0).passed is None


@pytest.mark.parametrize(
    ("accuracy", "loss", "passed"),
    [(99.9, 0.02, True), (99.89, 0.001, False), (100, 0.021, False), (100, np.nan, False)],
)
@pytest.mark.parametrize("pruning", [filters(3, 11), filters(scratch=True)], ids=["S", "scratch"])
def test_g3_at_the_end(accuracy, loss, passed, pruning):
    config = ADAM.with_(pruning=pruning)
    gate = alone("G3", config, "S", train_accuracy={19: accuracy}, train_loss={19: loss, 18: 9})
    assert (gate.passed, gate.number) == (passed, accuracy)


@pytest.mark.parametrize(
    ("counts", "fractions", "ratio", "passed"),
    [
        ((10,), (0.9,), np.nan, None),
        ((10, 2), (0.9, 0.9), 5, True),
        ((9, 2), (0.9, 0.9), 4.5, False),
        ((9, 2), (0.45, 0.9), 9, True),
        ((1, 1), (0.9, 0.9), 1, False),
    ],
)
def test_g4_is_the_ratio_of_doses_in_the_last_layer(counts, fractions, ratio, passed):
    rows = [
        run(ADAM.with_(pruning=filters(*range(n), fraction=f)), f"S {n} {f} {i}", i)
        for i, (n, f) in enumerate(zip(counts, fractions, strict=True))
    ]
    rows.append(run(ADAM.with_(pruning=filters(scratch=True)), "scratch"))
    rows.append(run(SGD.with_(pruning=filters(*range(15))), "S of a network that need not learn"))
    gate = evaluate(*[(row, history(row)) for row in rows])["G4", ""]
    assert (gate.passed, gate.number) == (passed, pytest.approx(ratio, nan_ok=True))


@pytest.mark.parametrize("profile", experiments.PROFILES)
@pytest.mark.parametrize("figure", ["figure-5", "figure-D2"])
def test_the_share_of_noise_at_every_profile(figure, profile):
    """And not with 300 passes more: a fifth of small's 2,504 batches in place of 7%."""
    plan = experiments.plan(figure, profile).assign(figure=figure)
    for row in plan.drop_duplicates("setting").to_dict("records"):
        noise = row["config"].noise
        for more in (0, 300) if noise is not None else ():
            longer = type(noise)(noise.kind, noise.passes + more, noise.evaluation_batch)
            row |= {"config": row["config"].with_(noise=longer)}
            passed = None if row["setting"].endswith(" 0") else not more
            assert evaluate((row, history(row)))["share", row["label"]].passed is passed


def test_each_network_of_each_figure_has_its_own():
    config = ADAM.with_(pruning=filters(3, 11))
    rows = [run(config, "S"), run(config, "S", figure="g")]
    rows += [run(SGD.with_(pruning=filters(3)), "S", network="ResNet20")]
    histories = [history(rows[0], train_loss=1.0), history(rows[2])]
    results = gates.evaluate(pd.DataFrame(rows), pd.concat(histories))
    g3 = {(g.figure, g.network): g.passed for g in results if g.gate == "G3"}
    assert g3 == {("f", "VGG11"): False, ("g", "VGG11"): False, ("f", "ResNet20"): None}
    table = gates.table(results)
    assert len(table) == len(results) == 9
    assert set(table[table.gate == "G3"].passed) == {"failed", "not applicable"}


def test_runs_that_are_not_there_have_no_gates():
    rows = [run(ADAM, "none"), run(ADAM.with_(pruning=filters(3, 11)), "S")]
    results = gates.evaluate(pd.DataFrame(rows), history(rows[0]))
    assert {(gate.gate, gate.setting) for gate in results} == {("G1", "none"), ("G4", "")}
    empty = gates.evaluate(pd.DataFrame(rows), pd.DataFrame({"run": []}))
    assert {gate.gate for gate in empty} == {"G4"}


def test_settings_with_noise_are_no_doses():
    plan = experiments.plan("figure-5", "small").assign(figure="figure-5")
    empty = pd.DataFrame({"run": []})
    (g4,) = (gate for gate in gates.evaluate(plan, empty) if gate.gate == "G4")
    assert g4.passed is None


def test_choosing_seeds_are_in_no_gate():
    rows = [run(ADAM, "none"), run(ADAM, "none", 10) | {"choosing": True}]
    found = evaluate((rows[0], history(rows[0])), (rows[1], history(rows[1], train_accuracy=0.0)))
    assert found["G1", "none"].number == 100
