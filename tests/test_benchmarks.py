"""The benchmarks compare the same network, count right, and run to their end; no test of times."""

import json

import pytest
import torch

from benchmarks import gpu, pilots, training
from paperlib import data

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
    first, second = 32 * 27 * 32 * 32, 32 * 9 * 32 * 30 * 30
    third, fourth = 64 * 9 * 32 * 15 * 15, 64 * 9 * 64 * 13 * 13
    forward = first + second + third + fourth + 2304 * 512 + 512 * 10
    # Forward, and the gradients of weights and of inputs; not of the images.
    products = 3 * forward - first
    assert training.step_flops(training.setting("conv4")) == 2 * products


def test_images_are_written_as_data_takes_them():
    with training.written_images(40, 20) as spec:
        dataset = data.load(spec)
    assert dataset.train_images.shape == (40, 3, 32, 32)
    assert dataset.train_labels.bincount().tolist() == [4] * 10
    assert dataset.test_labels.bincount().tolist() == [2] * 10


def test_training_on_a_cpu(tmp_path):
    out = tmp_path / "bench.json"
    small = "--networks conv4 --width 0.0625 --batches 1 --rounds 1 --out"
    results = training.main([*small.split(), str(out)])
    assert json.loads(out.read_text()) == results
    ordinary, *ours = results["speed"]
    assert ordinary["x"] == 1
    assert [row["precision"] for row in ours] == training.precisions(CPU)


def test_everything_for_a_gpu_runs_without_one(tmp_path):
    out = tmp_path / "gpu.json"
    results = gpu.main(["--device", "cpu", "--tiny", "--rounds", "1", "--out", str(out)])
    assert json.loads(out.read_text()) == results
    assert {row["loop"] for row in results["epochs"]} == {"ordinary", "plain", "captured"}
    for row in results["together"]:
        runs = -(-60 // row["runs"]) * row["runs"]
        hours = runs * 325 * 160 / row["images a second"] / 3600
        assert row["minutes of 60 runs"] == pytest.approx(60 * hours)


def test_pilots_train_and_tell_gates_and_minutes(tmp_path, capsys):
    pilots.main(["--profile", "smoke", "--only", "conv4", "--runs", str(tmp_path)])
    told = capsys.readouterr().out
    assert "2 of 2 pilot runs" in told
    assert {line.split()[0] for line in told.splitlines() if line.startswith("G")} <= {"G1", "G2"}
    assert "minutes of one" in told
