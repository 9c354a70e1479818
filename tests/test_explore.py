"""The widgets: each choice is what the picture, the words and the list of runs show."""

import numpy as np
import pandas as pd
import pytest

from paperlib import explore, plots
from paperlib.runs import Store


def is_png(explorer: explore.Explorer) -> bool:
    return bytes(explorer.picture.value[:4]) == b"\x89PNG"


@pytest.fixture
def explorer() -> explore.Explorer:
    runs = pd.DataFrame(
        {
            "run": [f"run {i}" for i in range(6)],
            "profile": ["small"] * 4 + ["demo"] * 2,
            "network": ["VGG11"] * 3 + ["conv4"] * 3,
            "method": ["No Pruning", "Prune_L", "Prune_L"] * 2,
            "label": ["No Pruning", "Prune_L 13%", "Prune_L 13%"] * 2,
            "seed": [0, 0, 1] * 2,
            "mean_stability": [100, 98, 97, 100, 95, 94.0],
            "best_accuracy": [80, 82, 81, 70, 71, 72.0],
            "curvature": [3, 2, 1, np.nan, np.nan, np.nan],
        }
    )
    epoch = pd.DataFrame({"epoch": range(6), "pre": 50.0, "post": 48.0})
    epochs = runs[["run", "method"]].merge(epoch, how="cross")
    pruned = (epochs.method == "Prune_L") & (epochs.epoch == 2)
    epochs["removed"] = np.where(pruned, 4, 0)
    plots.use_style()
    return explore.Explorer(epochs, runs)


def test_each_choice_narrows_what_is_shown(explorer):
    assert list(explorer.shown.run) == ["run 0", "run 1", "run 2"]
    assert [run for _, run in explorer.run.options] == ["run 0", "run 1", "run 2"]
    explorer.network.value = "conv4"
    assert list(explorer.shown.run) == [run for _, run in explorer.run.options] == ["run 3"]
    explorer.profile.value = "demo"
    assert list(explorer.shown.run) == ["run 4", "run 5"]
    assert is_png(explorer)


def test_another_run_or_measure_gives_another_picture(explorer):
    pictures = [bytes(explorer.picture.value)]
    explorer.run.value = "run 2"
    assert "81" in explorer.words.value
    pictures.append(bytes(explorer.picture.value))
    explorer.y.value = "curvature"
    pictures.append(bytes(explorer.picture.value))
    assert len(set(pictures)) == 3


def test_a_place_without_runs_is_no_error(explorer):
    explorer.profile.value = "demo"
    explorer.network.value = "VGG11"
    assert explorer.shown.empty
    assert not explorer.picture.value
    explorer.network.value = "conv4"
    assert is_png(explorer)


def test_an_empty_store(tmp_path):
    epochs, runs = explore.frames(("smoke",), Store(tmp_path))
    assert not explore.Explorer(epochs, runs).picture.value
