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


def test_the_primary_outcome_leaves_out_the_last_epoch():
    row = summary(epochs([95, 70, 72, 77, 10], pre=[99, 80, 80, 80, 80], removed=[0, 1, 0, 0, 1]))
    assert row.accuracy == pytest.approx((70 + 72 + 77) / 3)


@pytest.mark.parametrize(("count", "scratch"), [(3, False), (1, False), (4, True)])
def test_no_primary_outcome_of_fewer_than_four_trained_epochs(count, scratch):
    row = summary(
        epochs([50.0 + i for i in range(count)], scratch=scratch),
        epochs([1, 2, 3, 4, 5], run="b"),
    )
    assert math.isnan(row.accuracy)
    longer = summary(epochs([50.0 + i for i in range(count + 1)], scratch=scratch))
    assert math.isnan(longer.accuracy) == (count == 1)


def test_a_run_without_events():
    row = summary(epochs([50, 70, 60]))
    assert (row.events, row.mean_stability) == (0, 100)
    assert (row.best_accuracy, row.best_epoch) == (70, 1)
    assert row.last_accuracy == 60
    assert row.seconds == 1.5


def test_scratch_pruning_is_no_event():
    row = summary(
        epochs(
            [95, 50, 80, 70],
            pre=[99, 50, 80, 70],
            removed=[12, 0, 0, 0],
            train=[math.nan, 40, 85, 90],
            scratch=True,
        )
    )
    assert (row.events, row.mean_stability) == (0, 100)
    assert (row.best_accuracy, row.best_epoch, row.gap) == (80, 2, 5)


def test_mean_stability_is_over_events():
    row = summary(epochs([40, 60, 70, 60, 80], pre=[50, 80, 70, 80, 80], removed=[0, 3, 0, 1, 0]))
    assert row.events == 2
    assert row.mean_stability == pytest.approx((75 + 75) / 2)


def test_best_accuracy_counts_from_the_last_event_on():
    frame = epochs(
        [95, 90, 60, 70, 75, 74], pre=[95, 99, 98, 70, 75, 74], removed=[0, 2, 4, 0, 0, 0]
    )
    row = summary(frame)
    assert (row.best_accuracy, row.best_epoch) == (75, 4)


def test_the_last_event_itself_counts_after_pruning():
    row = summary(epochs([50, 85, 80], pre=[50, 90, 80], removed=[0, 2, 0]))
    assert (row.best_accuracy, row.best_epoch) == (85, 1)
    row = summary(epochs([50, 85, 83], pre=[50, 85, 90], removed=[0, 0, 2]))
    assert (row.best_accuracy, row.best_epoch) == (83, 2)


def test_gap_is_taken_at_the_best_epoch_after_its_event():
    row = summary(epochs([50, 80, 70], pre=[50, 88, 70], removed=[0, 1, 0], train=[55, 91, 99]))
    assert row.gap == 91 - 80


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
