"""Stability of events and the summary of runs."""

import math

import numpy as np
import pandas as pd
import pytest

from paperlib.instability import stability, summarize


def epochs(
    post: list[float],
    pre: list[float] | None = None,
    removed: list[int] | None = None,
    train: list[float] | None = None,
    run: str = "a",
    scratch: bool = False,
) -> pd.DataFrame:
    count = len(post)
    return pd.DataFrame(
        {
            "run": run,
            "epoch": range(count),
            "trained": [not scratch or i > 0 for i in range(count)],
            "train_accuracy": train or [90.0] * count,
            "pre": pre or post,
            "post": post,
            "removed": removed or [0] * count,
            "seconds": [0.5] * count,
        }
    )


def summary(*frames: pd.DataFrame, run: str = "a") -> pd.Series:
    return summarize(pd.concat(frames, ignore_index=True)).set_index("run").loc[run]


@pytest.mark.parametrize(
    ("pre", "post", "percent"),
    [(80, 80, 100), (80, 60, 75), (0.8, 0.2, 25), (50, 0, 0), (40, 50, 125), (0.5, 0.495, 99)],
)
def test_stability_in_percent(pre, post, percent):
    assert stability(pre, post) == pytest.approx(percent)
    assert stability(pre, post) == pytest.approx(100 * (1 - (pre - post) / pre))
    assert isinstance(stability(pre, post), float)


@pytest.mark.filterwarnings("error")
def test_stability_where_there_was_no_accuracy():
    assert math.isnan(stability(0, 0))
    assert math.isnan(stability(0, 10))
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
            [95, 50, 80, 70],
            pre=[99, 50, 80, 70],
            removed=[12, 0, 0, 0],
            train=[math.nan, 40, 85, 90],
            scratch=True,
        ),
        {"events": 0, "mean_stability": 100, "best_accuracy": 80, "best_epoch": 2, "gap": 5},
    ),
    "mean stability is over events": (
        epochs([40, 60, 70, 60, 80], pre=[50, 80, 70, 80, 80], removed=[0, 3, 0, 1, 0]),
        {"events": 2, "mean_stability": 75},
    ),
    "the best counts from the last event on": (
        epochs([95, 90, 60, 70, 75, 74], pre=[95, 99, 98, 70, 75, 74], removed=[0, 2, 4, 0, 0, 0]),
        {"best_accuracy": 75, "best_epoch": 4},
    ),
    "the last event counts after pruning": (
        epochs([50, 85, 80], pre=[50, 90, 80], removed=[0, 2, 0]),
        {"best_accuracy": 85, "best_epoch": 1},
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
    row = summary(frame)
    assert {key: row[key] for key in expected} == pytest.approx(expected)


@pytest.mark.parametrize(("count", "scratch"), [(3, False), (1, False), (4, True)])
def test_no_primary_outcome_of_fewer_than_four_trained_epochs(count, scratch):
    row = summary(
        epochs([50.0 + i for i in range(count)], scratch=scratch),
        epochs([1, 2, 3, 4, 5], run="b"),
    )
    assert math.isnan(row.accuracy)
    longer = summary(epochs([50.0 + i for i in range(count + 1)], scratch=scratch))
    assert math.isnan(longer.accuracy) == (count == 1)


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
