"""What figures 6 and E1 to E5 are drawn from: tidy frames of the flatness measured in runs.

Definitions of arXiv 1906.03728, section 3 and appendix E. Reads the arrays of records, which
`training.measured_flatness` describes; imports no torch. Losses are mean cross-entropies in nats.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from paperlib.runs import RunRecord

RISE = 0.1


def delta_w(losses: ArrayLike, epsilons: ArrayLike, loss: float, rise: float = RISE) -> float:
    """The smallest |eps| at which any direction's loss has risen by at least `rise`.

    losses: (D, E) at epsilons (E,), both signs. loss: that of the weights themselves. NaN where it
    never rises so far. A loss that is not a number has risen.
    """
    risen = ~(np.asarray(losses, float) - loss < rise).all(0)
    distances = np.abs(np.asarray(epsilons, float))[risen]
    return float(distances.min()) if len(distances) else np.nan


def tic(covariance_trace: float, eigenvalues: ArrayLike) -> float:
    """TIC, Tr(C) / Tr(H), from the gradients' covariance and the Hessian's leading eigenvalues."""
    return float(covariance_trace / np.asarray(eigenvalues, float).sum())


def measures(records: Iterable[RunRecord]) -> pd.DataFrame:
    """One row a run: curvature, Tr(H) over the leading eigenvalues; noise, Tr(C); tic; delta_w."""
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


def spectra(records: Iterable[RunRecord]) -> pd.DataFrame:
    """One row an eigenvalue: run, rank (1 is the largest by magnitude), eigenvalue, magnitude."""
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


def rises(records: Iterable[RunRecord]) -> pd.DataFrame:
    """One row a point: run, direction (0: the largest eigenvalue), epsilon, rise of the loss."""
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


def unperturbed(record: RunRecord) -> float:
    """The test loss of the weights themselves: at eps = 0, the same along every direction."""
    return float(record.arrays["losses"][0, np.abs(record.arrays["epsilons"]).argmin()])
