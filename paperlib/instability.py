"""Instability: how far test accuracy falls when filters or weights are pruned.

Definitions of arXiv 1906.03728, section 3. Stability is in percent.
"""

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

OUTCOME_EPOCHS = 3


def stability(pre: ArrayLike, post: ArrayLike) -> np.ndarray | float:
    """Return 100 * (1 - instability) percent, where instability = (pre - post) / pre.

    Args:
        pre: Test accuracy just before an event, of any shape, in any unit.
        post: Test accuracy just after it, of the same shape, in the same unit.

    Returns:
        An array of the same shape, a float for numbers; NaN where pre is 0.

    Raises:
        ValueError: The shapes differ.
    """
    pre, post = np.asarray(pre, float), np.asarray(post, float)
    if pre.shape != post.shape:
        raise ValueError(f"accuracies before and after differ in shape: {pre.shape}, {post.shape}")
    with np.errstate(divide="ignore", invalid="ignore"):
        percent = np.where(pre > 0, 100 * (1 - (pre - post) / pre), np.nan)
    return percent if percent.ndim else float(percent)


def summarize(epochs: pd.DataFrame) -> pd.DataFrame:
    """Make a frame with one row a run from a frame with one row an epoch.

    Args:
        epochs: Columns: run; epoch, 0-based; trained, False for the epoch that scratch pruning
            takes; train_accuracy; pre and post, test accuracy before and after the epoch's event;
            removed, the filters or weights pruned at its end, 0 without an event; seconds. All
            accuracies are in percent.

    Returns:
        Columns: run; events, the number of events in trained epochs; mean_stability over them, in
        percent, 100 without any; accuracy, the primary outcome, which is the mean post of the three
        trained epochs before the last trained one, NaN if fewer than four were trained;
        best_accuracy, the highest post of a trained epoch from the last event on; best_epoch, the
        first epoch that reaches it; gap, train minus test accuracy there; last_accuracy, the last
        post; seconds, the sum.
    """
    frame = epochs.sort_values(["run", "epoch"], ignore_index=True)
    event = frame.trained & (frame.removed > 0)
    events = frame[event]
    by_run = events.assign(stability=stability(events.pre, events.post)).groupby("run")
    last_event = frame.run.map(by_run.epoch.max()).fillna(-1)
    eligible = frame[frame.trained & (frame.epoch >= last_event)]
    from_end = frame.trained[::-1].groupby(frame.run[::-1]).cumsum()  # 1 at the last trained epoch
    in_outcome = frame.trained & from_end.between(2, OUTCOME_EPOCHS + 1)
    outcome = frame[in_outcome].groupby("run").post
    best = eligible.loc[eligible.groupby("run").post.idxmax()].set_index("run")
    out = pd.DataFrame(index=pd.Index(frame.run.unique(), name="run"))
    out["events"] = by_run.size().reindex(out.index, fill_value=0)
    out["mean_stability"] = by_run.stability.mean().reindex(out.index)
    out.loc[out.events == 0, "mean_stability"] = 100.0
    out["accuracy"] = outcome.mean().where(outcome.size() == OUTCOME_EPOCHS)
    out["best_accuracy"] = best.post
    out["best_epoch"] = best.epoch
    out["gap"] = best.train_accuracy - best.post
    out["last_accuracy"] = frame.groupby("run").post.last()
    out["seconds"] = frame.groupby("run").seconds.sum()
    return out.reset_index()
