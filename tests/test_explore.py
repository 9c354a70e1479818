"""The widgets: each choice is what the picture, the words and the list of runs show."""

import numpy as np
import pandas as pd
import pytest

from paperlib import explore, plots
from paperlib.runs import Store


@pytest.fixture
def explorer() -> explore.Explorer:
    runs = pd.DataFrame(
        {
            "run": [f"run {i}" for i in range(6)],
            "profile": ["small"] * 4 + ["demo"] * 2,
            "figure": "figure-2",
            "network": ["VGG11"] * 3 + ["conv4"] * 3,
            "method": ["No Pruning", "Prune_L", "Prune_L"] * 2,
            "label": ["No Pruning", "Prune_L 13%", "Prune_L 13%"] * 2,
            "seed": [0, 0, 1] * 2,
            "events": [0, 1, 1] * 2,
            "mean_stability": [100, 98, 97, 100, 95, 94.0],
            "best_accuracy": [80, 82, 81, 70, 71, 72.0],
            "curvature": [3, 2, 1, 3, 2, 1.0],
        }
    )
    epoch = pd.DataFrame({"epoch": range(6), "pre": 50.0, "post": 48.0})
    epochs = runs[["run", *explore.PLACE, "method", "label", "seed"]].merge(epoch, how="cross")
    pruned = (epochs.method == "Prune_L") & (epochs.epoch == 2)
    epochs["removed"], epochs["trained"] = np.where(pruned, 4, 0), True
    plots.use_style()
    return explore.Explorer(epochs, runs)


def test_each_choice_is_what_is_shown(explorer):
    assert list(explorer.shown.run) == ["run 0", "run 1", "run 2"]
    assert [run for _, run in explorer.run.options] == ["run 0", "run 1", "run 2"]
    pictures = [bytes(explorer.picture.value)]
    explorer.run.value = "run 2"
    assert "81" in explorer.words.value
    pictures.append(bytes(explorer.picture.value))
    explorer.y.value = "curvature"
    pictures.append(bytes(explorer.picture.value))
    explorer.place.value = ("demo", "figure-2", "conv4")
    assert (
        list(explorer.shown.run) == [run for _, run in explorer.run.options] == ["run 4", "run 5"]
    )
    pictures.append(bytes(explorer.picture.value))
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert len(set(pictures)) == 4


def test_an_empty_store(tmp_path):
    epochs, runs = explore.frames(("smoke",), Store(tmp_path))
    explorer = explore.Explorer(epochs, runs)
    assert not explorer.picture.value
    assert explorer.shown.empty
