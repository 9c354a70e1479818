"""Figure R-6's numbers: sizes and times of the dense network, the masked one, and the compact one.

They are measured once and kept in results/, since times differ between machines. Reading them
needs no torch.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from paperlib.runs import results_path

if TYPE_CHECKING:
    from paperlib.experiments import Loaded

DENSE = "No Pruning"
REPEATS = 20


def sizes(loaded: "Loaded") -> pd.DataFrame:
    """Return the table that results/ holds for a profile, or else measure it on this machine.

    Args:
        loaded: Figure R-6's runs.

    Returns:
        Rows (method, form), with form "dense", "masked" or "compact". Columns: those of
        `compact.cost_table`; inputs and units of the dense layer.
    """
    path = kept(loaded.scale.profile)
    if path is not None and path.exists() and not (loaded.scale.data or loaded.scale.precision):
        return pd.read_csv(path, index_col=["method", "form"])
    return measure(loaded)


def kept(profile: str) -> Path | None:
    """Return the path of a profile's table in results/, existing or not; None without results/."""
    folder = results_path()
    return folder / f"sizes-{profile}.csv" if folder is not None else None


def measure(loaded: "Loaded") -> pd.DataFrame:
    """Measure sizes and times of the first seed's networks, on one core of this machine.

    Each network is rebuilt from its seed's initial weights with the zeros that training left.
    Sizes and times depend only on where the zeros are.
    """
    import torch

    from paperlib.compact import compact, cost_table
    from paperlib.networks import initial_network, pruned_network

    networks = {}
    records = {record.run: record for record in loaded.records}
    for row in loaded.plan.drop_duplicates("method").itertuples():
        if row.method == DENSE:
            networks[row.method, "dense"] = initial_network(records[row.run])
        else:
            masked, pruner = pruned_network(records[row.run])
            networks[row.method, "masked"] = masked
            networks[row.method, "compact"] = compact(masked, pruner)
    shapes = [network.get_parameter("dense.weight").shape for network in networks.values()]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        table = cost_table({" ".join(key): net for key, net in networks.items()}, repeats=REPEATS)
    finally:
        torch.set_num_threads(threads)
    table.index = pd.MultiIndex.from_tuples(list(networks), names=["method", "form"])
    units, inputs = zip(*shapes, strict=True)
    return table.assign(inputs=inputs, units=units)
