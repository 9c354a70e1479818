"""The papers' measures of accuracies and losses that have been computed; imports no torch.

Instability, delta_w and TIC are defined in arXiv 1906.03728, section 3 and appendix E. The frames
are those that figures 6 and E1 to E5 are drawn from. They are made of the arrays of records, which
`training.measured_flatness` describes. Losses are mean cross-entropies in nats.
"""

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
    """Return the smallest |eps| at which any direction's loss has risen by at least `rise`.

    Args:
        losses: (D, E), at w + eps v for D directions; NaN counts as risen.
        epsilons: (E,), of both signs.
        loss: The loss at the weights themselves.
        rise: The rise that counts, in nats.

    Returns:
        The distance, or NaN where no loss rises so far.
    """
    risen = ~(np.asarray(losses, float) - loss < rise).all(0)
    distances = np.abs(np.asarray(epsilons, float))[risen]
    return float(distances.min()) if len(distances) else np.nan


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
        rows.append(
            {
                "run": record.run,
                "curvature": float(eigenvalues.sum(dtype=float)),
                "noise": noise,
                "tic": tic(noise, eigenvalues),
                "delta_w": delta_w(arrays["losses"], arrays["epsilons"], unperturbed(record)),
            }
        )
    return pd.DataFrame(rows)


def spectra(records: Iterable["RunRecord"]) -> pd.DataFrame:
    """Make a frame with one row an eigenvalue.

    Columns: run; rank, 1 for the largest magnitude; eigenvalue; magnitude.
    """
    frames = [
        pd.DataFrame(
            {
                "run": record.run,
                "rank": np.arange(1, len(values) + 1),
                "eigenvalue": values,
                "magnitude": np.abs(values),
            }
        )
        for record in records
        for values in [record.arrays["eigenvalues"].astype(float)]
    ]
    return pd.concat(frames, ignore_index=True)


def rises(records: Iterable["RunRecord"]) -> pd.DataFrame:
    """Make a frame with one row a point.

    Columns: run; direction, 0 for that of the largest eigenvalue; epsilon; rise of the loss.
    """
    frames = []
    for record in records:
        losses, epsilons = record.arrays["losses"], record.arrays["epsilons"]
        directions, points = losses.shape
        frames.append(
            pd.DataFrame(
                {
                    "run": record.run,
                    "direction": np.repeat(np.arange(directions), points),
                    "epsilon": np.tile(epsilons, directions),
                    "rise": (losses - unperturbed(record)).ravel(),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def unperturbed(record: "RunRecord") -> float:
    """Return the test loss at the weights themselves, which is that at eps = 0 in any direction."""
    return float(record.arrays["losses"][0, np.abs(record.arrays["epsilons"]).argmin()])
