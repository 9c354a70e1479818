"""The benchmarks compare the same network, count right, and run to their end; no test of times."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import gpu, precision, training
from benchmarks import sweep as records
from paperlib import data, experiments, sweep
from paperlib import training as ours
from paperlib.runs import Store

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", training.SETTINGS)
@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_the_ordinary_network_is_the_pruned_one(name, mode):
    config = training.setting(name, width=1 / 4)
    ours, pruner = training.pruned(config)
    ordinary = training.masked(config)
    assert any(not mask.all() for mask in pruner.masks.values())
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = ours.train(mode)(x)
    torch.testing.assert_close(ordinary.train(mode)(x), expected, atol=1e-4, rtol=1e-4)
    for module in ordinary.modules():  # by masks alone: nothing is zero in itself
        if isinstance(module, torch.nn.Conv2d):
            assert module.weight.flatten(1).any(1).all()


def test_operations_of_a_step_are_those_counted_by_hand():
    forward = {
        "first": 32 * 27 * 32 * 32,
        "second": 32 * 9 * 32 * 30 * 30,
        "third": 64 * 9 * 32 * 15 * 15,
        "fourth": 64 * 9 * 64 * 13 * 13,
        "dense": 2304 * 512,
        "last": 512 * 10,
    }
    # Forward, and the gradients of weights and of inputs; not of the images.
    products = 3 * sum(forward.values()) - forward["first"]
    assert training.step_flops(training.setting("conv4")) == 2 * products


def test_images_are_written_as_data_takes_them():
    with training.written_images(40, 20) as spec:
        dataset = data.load(spec)
    assert dataset.train_images.shape == (40, 3, 32, 32)
    assert dataset.train_labels.bincount().tolist() == [4] * 10
    assert dataset.test_labels.bincount().tolist() == [2] * 10


def test_events_are_in_the_first_epochs():
    config = training.with_events(training.setting("vgg11_bn"), 3, 5)
    assert config.pruning.epochs == ((0, 1, 2),) * 4
    assert config.epochs == 5
    config = training.with_events(training.setting("conv4"), 3)
    assert (config.pruning.epochs, config.epochs) == ((0, 1, 2), 3)


def test_a_process_that_fails_is_said():
    config = training.setting("conv4", width=1 / 16)
    with pytest.raises(RuntimeError, match="no kind"):
        training.at_once(1, kind="no kind", config=config, train=32, test=32, threads=1)


def test_training_tables(tmp_path, capsys):
    out = tmp_path / "bench.json"
    small = "--networks conv4 --width 0.0625 --batches 1 --rounds 1 --product 64"
    small += " --tested 250 --counts 1 2 --seconds 0.1"
    small = [*small.split(), "--out", str(out)]
    results = training.main(small)
    assert json.loads(out.read_text()) == results
    assert set(results) == {"machine", "speed", "memory", "evaluation", "whole", "runs"}
    speed = {(row["loop"], row["precision"], row.get("runs")): row for row in results["speed"]}
    assert speed["ordinary", "float32", 1]["training x"] == 1
    for runs in {1, sweep.default_jobs()}:
        assert speed["paperlib", "float32", runs]["of peak"] > 0
    native = training.precisions(CPU)["bfloat16"]
    assert ("note" in speed["paperlib", "bfloat16", None if not native else 1]) is not native
    assert "not native" in capsys.readouterr().out or native


def test_runs_at_once():
    small = "--only runs --networks resnet20 --width 0.0625 --counts 1 2 --seconds 0.1"
    rows = training.main(small.split())["runs"]
    native = [name for name, is_native in training.precisions(CPU).items() if is_native]
    assert [(row["precision"], row["runs"]) for row in rows] == [
        (p, n) for p in native for n in (1, 2)
    ]
    for row in rows:
        assert row["threads"] == max(1, sweep.default_jobs() // row["runs"])
        assert row["training"] > row["whole epoch"] > 0


def test_all_that_a_gpu_is_for_runs_without_one(tmp_path):
    out = tmp_path / "gpu.json"
    results = gpu.main(["--device", "cpu", "--tiny", "--minutes", "9", "--out", str(out)])
    assert json.loads(out.read_text()) == results
    assert set(results) == {"machine", "summary", *gpu.PARTS}
    for name in gpu.PARTS:
        assert results[name], name
        assert not [row for row in results[name] if gpu.NOTE in row], name
    loops = {row["loop"] for row in results["epochs"]}
    assert loops >= {"matrix product", "ordinary, 2 workers", "captured", "plain", "training.run"}
    native = [name for name, is_native in training.precisions(CPU).items() if is_native]
    rows = [row for row in results["runs"] if str(row.get("of", "")).endswith("160 images")]
    assert sorted(row["precision"] for row in rows) == sorted(native)
    for row in rows:
        hours = row["minutes of 60 runs"] / 60
        assert hours == pytest.approx(60 * 325 * 160 / row["images a second"] / 3600)
    for row in results["agreement"]:  # here of the CPU's quick loop
        assert row["captured losses"] == pytest.approx(row["losses"], rel=1e-3)
        assert row["agrees"]
    assert results["summary"].keys() == {
        *(f"minutes of 60 runs, training, {name}" for name in native),
        "minutes of 60 runs, flatness, one by one",
        *(f"times the quickest ordinary epoch, {name}" for name in native),
    }
    for name in native:
        (row,) = (row for row in rows if row["precision"] == name)
        key = f"minutes of 60 runs, training, {name}"
        assert results["summary"][key] == row["minutes of 60 runs"]


@pytest.mark.parametrize("apart", [0.0, 0.05, 0.9])
def test_speed_of_runs_at_once_whatever_their_phase(apart):
    """Four runs, an epoch of each every two seconds; their first two epochs take longer."""
    ends = [[5 + i * apart, *(9 + i * apart + 2 * n for n in range(4))] for i in range(4)]
    assert gpu.epochs_a_second(ends) == pytest.approx(4 / 2)


def test_runs_that_were_not_at_once_have_no_speed_at_once(tmp_path, monkeypatch):
    class Short(ours.QuickLoop):
        first = None

        def launch(self, *rest):
            Short.first = Short.first or self
            if self is Short.first:
                raise torch.OutOfMemoryError("out of memory")
            return (yield from super().launch(*rest))

    def make_loop(config, model, optimizer, pruner, device, fast):
        loop = make(config, model, optimizer, pruner, device)
        return Short(model, optimizer, pruner, loop.autocast)

    make = ours.make_loop
    plan = gpu.tiny({"device": "cpu", "data": "digits", "end": 0.0, "cache": str(tmp_path)})
    config = plan.config("conv4").with_(data="digits", train_per_class=4, test_per_class=2)
    config = training.with_events(config, 1, 4)
    configs = [config.with_(seed=seed) for seed in range(2)]
    assert gpu.at_once(plan, configs, 40)["images a second"] > 0
    monkeypatch.setattr(ours, "make_loop", make_loop)
    with pytest.raises(torch.OutOfMemoryError, match="came after them"):
        gpu.at_once(plan, configs, 40)


def test_a_part_that_hangs_costs_its_share(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(gpu, "perform", lambda name, plan, take: given.update({name: plan.end}))
    start = time.time()
    out = str(tmp_path / "gpu.json")
    gpu.main(["--device", "cpu", "--tiny", "--minutes", "10", "--out", out])
    assert given["epochs"] == pytest.approx(start + 210, abs=30)
    assert given["more_runs"] == pytest.approx(start + 600 - gpu.SPARE, abs=30)


def test_what_does_not_fit_into_the_time_is_left_out(tmp_path):
    plan = gpu.tiny({"device": "cpu", "data": "digits", "end": time.time(), "cache": str(tmp_path)})
    rows = []
    gpu.perform("agreement", plan, rows.append)
    assert len(rows) == 4 + (plan.precisions[0] != "float32")
    assert all(row[gpu.NOTE].startswith("left out") for row in rows)
    rows.clear()
    gpu.perform("epochs", replace(plan, end=time.time() - gpu.SPARE), rows.append)
    assert rows[-1][gpu.NOTE] == "stopped: the time was up"


def test_pairs_of_precisions(tmp_path):
    store = Store(tmp_path / "runs", tmp_path / "none")
    for name, shift in (("float32", 0.0), ("bfloat16", 0.5)):
        plan = experiments.plan("figure-R2", "smoke", precision=name)
        chosen = plan[plan.method.isin(["Prune_L", "No Pruning"])]
        for i, config in enumerate(chosen.config[: 4 if name == "float32" else 3]):
            record = records.record(config, 12, False)
            record.epochs["removed"] = 0
            record.epochs["post"] = 50.0 + i + shift * (i + 1)
            store.write(record)
    arguments = ["--profile", "smoke", "--runs", str(store.path)]
    found = precision.main(["figure-R2", *arguments, "--out", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text()) == found
    rows = found["figure-R2"]["pairs"]
    changes = sorted(row["best_accuracy bfloat16"] - row["best_accuracy float32"] for row in rows)
    assert changes == [0.5, 1.0, 1.5]
    assert found["figure-R2"]["changes"]["best test accuracy"].startswith("1.00 [")
    (row,) = found["figure-R2"]["differences"]
    assert row["float32"].endswith("n = 1")
    assert row["difference"].startswith("No Pruning - Prune_L")
    assert row["change"].startswith("-1.00")  # half a point less one and a half
    (row,) = found["figure-R2"]["correlations"]
    assert row["network"] == "conv4"
    assert row["float32"].endswith("n = 1")  # of what is pruned
    assert precision.main(["figure-R1", "--runs", str(tmp_path / "empty")]) == {}


def test_precisions_compare_flatness_too(tmp_path):
    store = Store(tmp_path / "runs", tmp_path / "none")
    stability = {"No Pruning": 100.0, "Prune_S": 90.0, "Prune_R": 80.0, "Prune_L": 60.0}
    for name, sign in (("float32", 1), ("bfloat16", -1)):
        plan = experiments.plan("figure-6", "smoke", seeds=1, precision=name)
        chosen = plan.drop_duplicates("method")
        for method, config in zip(chosen.method, chosen.config, strict=True):
            record = records.record(config, 12, False)
            record.epochs[["removed", "pre", "post"]] = 0, 50.0, 50.0
            if method in stability:
                if method != "No Pruning":
                    record.epochs.loc[3, ["removed", "post"]] = 1, 0.5 * stability[method]
                trace = sign * stability[method]
                record.arrays.update(
                    eigenvalues=np.array([2 * trace, -trace]),
                    noise=np.array(-trace),
                    epsilons=np.array([-0.1, 0.0, 0.1]),
                    losses=np.ones((1, 3)),
                    accuracies=np.ones((1, 3)),
                )
                store.write(record)
    arguments = ["figure-6", "--profile", "smoke", "--seeds", "1", "--runs", str(store.path)]
    rows = precision.main(arguments)["figure-6"]["correlations"]
    assert [row["with"] for row in rows] == ["best test accuracy, pruned runs", "Tr(H)", "Tr(C)"]
    assert rows[0]["float32"].endswith("n = 3")
    assert rows[1]["float32"] == rows[2]["bfloat16"] == "1.00 [1.00, 1.00], n = 4"
    assert rows[2]["float32"] == rows[1]["bfloat16"] == "-1.00 [-1.00, -1.00], n = 4"
