"""Records with known numbers, for the tests of the store."""

from pathlib import Path

import numpy as np
import pandas as pd

from paperlib.config import Config, FilterPruning
from paperlib.runs import RunRecord, Store
from paperlib.store import archive

PRUNED = Config(pruning=FilterPruning((0.3, 0.9), ((3, 7), (4, 8, 12))), seed=2)
CIFAR10 = "c32a1d4ab5d03f1284b67883e8d87530"  # the md5 of its archive, as its page gives it


def record(
    config: Config = PRUNED, arrays: bool = True, numbers: int | None = None, **provenance: object
) -> RunRecord:
    """A record of random numbers: those of the configuration's seed, or others."""
    rng = np.random.default_rng(config.seed if numbers is None else numbers)
    count = 20
    epochs = pd.DataFrame(
        {
            "epoch": range(count),
            "trained": [False] + [True] * (count - 1),
            "learning_rate": 0.001 * 0.1 ** np.arange(count),
            "train_loss": [np.nan, *rng.random(count - 1)],
            "train_accuracy": 100 * rng.random(count),
            "test_loss": rng.random(count),
            "pre": 100 * rng.random(count),
            "post": 100 * rng.random(count),
            "removed": rng.integers(0, 9, count),
            "seconds": rng.random(count),
        }
    )
    measured = {
        "eigenvalues": rng.standard_normal(100),
        "loss": rng.random((10, 81)).astype(np.float32),
        "chosen": rng.integers(0, 512, (3, 2)),
        "held": rng.random(7) > 0.5,
        "trace": np.float64(rng.random()),
    }
    about = {"device": "cpu", "threads": 2, "commit": None, "torch": "2.8.0"} | provenance
    return RunRecord(config, epochs, measured if arrays else {}, about)


def file(store: Store, run: str, kind: str = "parquet") -> Path:
    return store.path / "records" / f"{run}.{kind}"


def exported(store: Store, folder: Path) -> Store:
    """A store with nothing of its own, above a file of another store's runs."""
    archive.export(store, folder / "results" / "all.parquet")
    return Store(folder / "none", folder / "results")


def same(a: RunRecord, b: RunRecord) -> bool:
    """Whether all is the same, bit for bit."""
    pd.testing.assert_frame_equal(a.epochs, b.epochs, check_exact=True)
    assert a.arrays.keys() == b.arrays.keys()
    for name, array in a.arrays.items():
        assert b.arrays[name].dtype == array.dtype
        assert np.array_equal(b.arrays[name], array)
    return a.config == b.config and a.provenance == b.provenance
