"""Instability: how far test accuracy falls when filters or weights are pruned.

Definitions of arXiv 1906.03728, section 3. Accuracies in any one unit; stability in percent.
"""

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

OUTCOME_EPOCHS = 3


def stability(pre: ArrayLike, post: ArrayLike) -> np.ndarray | float:
    """100 * (1 - instability) percent, where instability = (pre - post) / pre.

    pre, post: test accuracy just before and just after an event, same shape. NaN where pre is 0.
    """
    pre, post = np.asarray(pre, float), np.asarray(post, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        percent = np.where(pre > 0, 100 * (1 - (pre - post) / pre), np.nan)
    return percent if percent.ndim else float(percent)


def summarize(epochs: pd.DataFrame) -> pd.DataFrame:
    """One row a run, from one row an epoch.

    epochs: columns run, epoch (0-based), trained (False on the epoch that scratch pruning takes),
    train_accuracy, pre and post (test accuracy before and after the epoch's event; all accuracies
    in percent) and removed (filters or weights pruned at its end, 0 where there is no event).

    Returns, by run: events; mean_stability over them, percent (100 where there are none in
    training); accuracy, the primary outcome: the mean post of the three trained epochs before the
    last, percent, NaN where fewer than four were trained; best_accuracy, the highest post from the
    last event on, percent; best_epoch, the first that reaches it; gap, train minus test accuracy
    there, percent; last_accuracy; seconds.
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
