"""The papers' measures of accuracies and losses that have been computed; imports no torch.

Instability, delta_w and TIC are defined in arXiv 1906.03728, section 3 and appendix E. The frames
are those that figures 6 and E1 to E5 are drawn from. They are made of the arrays of records, which
`diagnostics.measured_flatness` describes. Losses are mean cross-entropies in nats.
"""

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from paperlib.instability import stability as stability
from paperlib.instability import summarize as summarize

if TYPE_CHECKING:
    from paperlib.runs import RunRecord

RISE = 0.1  # nats


def delta_w(losses: ArrayLike, epsilons: ArrayLike, loss: float, rise: float = RISE) -> float:
    """Return the smallest |eps| at which any direction's loss has risen by `rise`.

    The loss is linear between neighbouring points of a side of a direction, from eps = 0 outward.
    A loss that is not finite has risen at its point.

    Args:
        losses: (D, E), at w + eps v for D directions.
        epsilons: (E,), of both signs.
        loss: The loss at the weights themselves.
        rise: The rise that counts, in nats; positive.

    Returns:
        The distance, or NaN where no loss rises so far.
    """
    rises, epsilons = np.asarray(losses, float) - loss, np.asarray(epsilons, float)
    found = [np.nan]
    for sign, row in itertools.product((1, -1), rises):
        outward = np.argsort(sign * epsilons)[(epsilons * sign <= 0).sum() :]
        distances = np.append(0, sign * epsilons[outward])
        heights = np.append(0, row[outward])
        risen = np.flatnonzero(~(heights < rise))
        if len(risen):
            last, first = risen[0] - 1, risen[0]
            step = np.interp(rise, heights[[last, first]], distances[[last, first]])
            found.append(step if np.isfinite(heights[first]) else distances[first])
    return float(np.fmin.reduce(found))


def tic(covariance_trace: float, eigenvalues: ArrayLike) -> float:
    """Return Tr(C) / Tr(H), where Tr(H) is the sum of the Hessian's leading eigenvalues."""
    return float(covariance_trace / np.asarray(eigenvalues, float).sum())


def flatness(records: Iterable["RunRecord"]) -> pd.DataFrame:
    """Make a frame with one row a run.

    Columns: run; curvature, the sum of the leading eigenvalues; noise, Tr(C); tic; delta_w.
    """
    rows = []
    for record in records:
        arrays = record.arrays
        eigenvalues, noise = arrays["eigenvalues"], float(arrays["noise"])
        curvature = float(eigenvalues.sum(dtype=float))
        distance = delta_w(arrays["losses"], arrays["epsilons"], unperturbed(record))
        rows.append((record.run, curvature, noise, tic(noise, eigenvalues), distance))
    return pd.DataFrame(rows, columns=["run", "curvature", "noise", "tic", "delta_w"])


def spectra(records: Iterable["RunRecord"]) -> pd.DataFrame:
    """Make a frame with one row an eigenvalue.

    Columns: run; rank, 1 for the largest magnitude; eigenvalue; magnitude.
    """
    values = {r.run: pd.Series(r.arrays["eigenvalues"].astype(float)) for r in records}
    frame = pd.concat(values, names=["run", "rank"]).rename("eigenvalue").reset_index()
    return frame.assign(rank=frame["rank"] + 1, magnitude=frame.eigenvalue.abs())


def rises(records: Iterable["RunRecord"]) -> pd.DataFrame:
    """Make a frame with one row a point.

    Columns: run; direction, 0 for that of the largest eigenvalue; epsilon; rise of the loss.
    """
    frames = []
    for record in records:
        along = pd.DataFrame(record.arrays["losses"].T - unperturbed(record))
        along.insert(0, "epsilon", record.arrays["epsilons"])
        along.insert(0, "run", record.run)
        frames.append(along.melt(["run", "epsilon"], var_name="direction", value_name="rise"))
    frame = pd.concat(frames, ignore_index=True).astype({"direction": int})
    return frame[["run", "direction", "epsilon", "rise"]]


def unperturbed(record: "RunRecord") -> float:
    """Return the test loss at the weights themselves, which is that at eps = 0 in any direction."""
    return float(record.arrays["losses"][0, np.abs(record.arrays["epsilons"]).argmin()])
