"""Stability of events and the summary of runs."""

import math

import numpy as np
import pandas as pd
import pytest

from paperlib.instability import stability, summarize


def epochs(post, pre=None, removed=0, train=90.0, run="a", scratch=False) -> pd.DataFrame:
    """One row an epoch of a run; each argument is a list by epoch, or one value for all."""
    frame = pd.DataFrame({"run": run, "epoch": range(len(post)), "pre": pre or post, "post": post})
    frame["trained"] = (frame.epoch > 0) | (not scratch)
    return frame.assign(removed=removed, train_accuracy=train, seconds=0.5)


@pytest.mark.parametrize(
    ("pre", "post", "percent"),
    [(80, 80, 100), (80, 60, 75), (0.8, 0.2, 25), (50, 0, 0), (40, 50, 125), (0.5, 0.495, 99)],
)
def test_stability_in_percent(pre, post, percent):
    assert stability(pre, post) == pytest.approx(percent)
    assert isinstance(stability(pre, post), float)


def test_accuracies_of_different_shapes():
    with pytest.raises(ValueError, match=r"\(2,\), \(1,\)"):
        stability([80, 70], [40])


@pytest.mark.filterwarnings("error")
def test_stability_where_there_was_no_accuracy():
    assert math.isnan(stability(0, 0))
    assert np.isnan(stability([0, 50], [10, 50])).tolist() == [True, False]


SUMMARIES = {
    "the primary outcome leaves out the last epoch": (
        epochs([95, 70, 72, 77, 10], pre=[99, 80, 80, 80, 80], removed=[0, 1, 0, 0, 1]),
        {"accuracy": (70 + 72 + 77) / 3},
    ),
    "without events": (
        epochs([50, 70, 60]),
        {"events": 0, "mean_stability": 100, "best_accuracy": 70, "best_epoch": 1}
        | {"last_accuracy": 60, "seconds": 1.5},
    ),
    "scratch pruning is no event": (
        epochs(
            *([95, 50, 80, 70], [99, 50, 80, 70], [12, 0, 0, 0], [math.nan, 40, 85, 90]),
            scratch=True,
        ),
        {"events": 0, "mean_stability": 100, "best_accuracy": 80, "best_epoch": 2, "gap": 5},
    ),
    "mean stability is over events": (
        epochs([40, 60, 70, 60, 80, 40], pre=[50, 80, 70, 80, 100, 80], removed=[0, 3, 2, 1, 4, 0]),
        {"events": 4, "mean_stability": (75 + 100 + 75 + 80) / 4},  # which is not their median
    ),
    "the best counts from the last event on": (
        epochs([95, 90, 60, 70, 75, 74], pre=[95, 99, 98, 70, 75, 74], removed=[0, 2, 4, 0, 0, 0]),
        {"best_accuracy": 75, "best_epoch": 4},
    ),
    "an event in the last epoch": (
        epochs([50, 85, 83], pre=[50, 85, 90], removed=[0, 0, 2]),
        {"best_accuracy": 83, "best_epoch": 2},
    ),
    "the gap is that of the best epoch": (
        epochs([50, 80, 70], pre=[50, 88, 70], removed=[0, 1, 0], train=[55, 91, 99]),
        {"gap": 91 - 80},
    ),
}


@pytest.mark.parametrize("name", SUMMARIES)
def test_summaries(name):
    frame, expected = SUMMARIES[name]
    row = summarize(frame).iloc[0]
    assert {key: row[key] for key in expected} == pytest.approx(expected)


@pytest.mark.parametrize("scratch", [False, True])
def test_no_primary_outcome_of_fewer_than_four_trained_epochs(scratch):
    for count in range(1, 7):
        row = summarize(epochs([50.0] * count, scratch=scratch)).iloc[0]
        assert math.isnan(row.accuracy) == (count - scratch < 4)


def test_several_runs_at_once():
    frames = {
        "b": epochs([50, 70, 60], pre=[50, 70, 80], removed=[0, 0, 1], run="b"),
        "a": epochs([99, 98], run="a"),
        "c": epochs([10, 20, 40, 30], pre=[20, 20, 40, 30], removed=[1, 0, 0, 0], run="c"),
    }
    alone = pd.concat([summarize(frame) for frame in frames.values()]).sort_values("run")
    shuffled = pd.concat(frames.values()).sample(frac=1, random_state=0)
    together = summarize(shuffled.reset_index(drop=True)).sort_values("run")
    pd.testing.assert_frame_equal(together.reset_index(drop=True), alone.reset_index(drop=True))
    assert alone.set_index("run").mean_stability.to_dict() == {"a": 100, "b": 75, "c": 50}
    assert alone.set_index("run").accuracy.dropna().to_dict() == {"c": pytest.approx(70 / 3)}
