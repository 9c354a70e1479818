"""Work with finished records: lists, export, import, and the removal of leftovers.

Imports no torch.
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pandas as pd

from paperlib.config import Config, from_dict, to_dict
from paperlib.store import checkpoints, records
from paperlib.store.records import UNREADABLE, RunRecord, StoreError, write_whole
from paperlib.store.store import Store

YOUNG_SECONDS = 3600.0  # a half-written file of this age may still be written


def table(store: Store, runs: Iterable[str | Config] | None = None) -> pd.DataFrame:
    """Return the rows of `Store.runs` with a title; damaged records have only run and damaged."""
    found = store.find(store.identities() if runs is None else runs)
    damaged = {run: str(error) for run, error in found.items() if isinstance(error, StoreError)}
    frame = store.runs([run for run in found if run not in damaged])
    frame["title"] = [r.config.title for r in found.values() if isinstance(r, RunRecord)]
    broken = pd.DataFrame({"run": list(damaged), "damaged": list(damaged.values())})
    return frame if broken.empty else pd.concat([frame, broken], ignore_index=True)


def describe(store: Store, start: str) -> tuple[dict, pd.DataFrame]:
    """Return everything about a run except its arrays, even if it failed or is damaged.

    Args:
        store: The store.
        start: The start of the run's identity.

    Returns:
        Identity, title, configuration and origin, or else the failure or damage; and the epochs.

    Raises:
        StoreError: No run's identity starts so, or several do.
    """
    failures = store.failures()
    matching = [run for run in {*store.identities(), *failures} if run.startswith(start)]
    if len(matching) != 1:
        raise StoreError(f"{len(matching)} runs start with {start!r} in {store.path}")
    (run,) = matching
    record = store.find([run]).get(run)
    if not isinstance(record, RunRecord):
        return {"run": run, "wrong": str(record or failures[run])}, pd.DataFrame()
    about = {"config": to_dict(record.config), "provenance": record.provenance}
    return {"run": run, "title": record.config.title, **about}, record.epochs


def export(store: Store, file: Path, runs: Iterable[str | Config] | None = None) -> int:
    """Write runs to one Parquet file; return their number.

    The file keeps only the last part of a path to images, as identities do.

    Args:
        store: The store.
        file: The path of the file, with the suffix .parquet.
        runs: The runs; None for all.

    Raises:
        KeyError, DamagedRecord, Mismatch: As for `Store.records`.
        StoreError: There are no runs, or the file cannot be written or has another suffix.
    """
    if Path(file).suffix != ".parquet":
        raise StoreError(f"runs are written to a .parquet file, not to {file}")
    found = [replace(record, config=record.config.portable) for record in store.records(runs)]
    if not found:
        raise StoreError(f"there are no runs to export in {store.path}")
    write_whole(Path(file).expanduser(), records.packed(found))
    return len(found)


def merge(store: Store, source: Path) -> pd.DataFrame:
    """Take over the runs of an exported file or of another store.

    Args:
        store: The store.
        source: The path of the file or of the other store.

    Returns:
        One row a run: run and outcome. The outcome is that of `Store.add`, or "damaged: ..." for a
        run that is not taken over.

    Raises:
        StoreError: `source` is neither, or holds no run; or the store cannot be written.
    """
    source = Path(source).expanduser()
    nothing = source / "nothing"
    other = Store(source, nothing) if source.is_dir() else Store(nothing, source)
    rows = [
        (run, store.add(found) if isinstance(found, RunRecord) else f"damaged: {found}")
        for run, found in sorted(other.find(other.identities()).items())
    ]
    if not rows:
        raise StoreError(f"{source} is no run store or file of runs, or an empty one")
    return pd.DataFrame(rows, columns=["run", "outcome"])


def leftovers(store: Store, wanted: Callable[[Config], bool] = lambda _: True) -> list[Path]:
    """Find the files of a store that no run can use; records come before their arrays.

    These are damaged records; checkpoints and failure notes that cannot be read, or whose run is
    done; and files half-written, or arrays without a record, for longer than YOUNG_SECONDS.

    Args:
        store: The store.
        wanted: Whether a configuration is of use. The records, checkpoints and failure notes of
            others are leftovers, too.
    """
    own = Store(store.path, store.path / "no results")
    found, done = own.find(own.own()), store.whole(store.identities())
    young, unused = time.time() - YOUNG_SECONDS, []
    for path in sorted(own.path.glob("*/*"), reverse=True):
        folder, run = path.parent.name, path.name.partition(".")[0]
        if not run or (folder == "records" and run not in found):
            useless = path.stat().st_mtime < young
        elif folder == "records":
            record = found[run]
            useless = not isinstance(record, RunRecord) or not wanted(record.config)
        elif folder in ("checkpoints", "failed"):
            useless = run in done or not _is_wanted(path, wanted)
        else:
            continue
        if useless:
            unused.append(path)
    return unused


def _is_wanted(path: Path, wanted: Callable[[Config], bool]) -> bool:
    """Return whether the run of a checkpoint or of a failure note is still wanted."""
    try:
        if path.parent.name == "failed":
            content = json.loads(path.read_text())
        else:
            content = checkpoints.describe(path.parents[1], path.stem)
        return wanted(from_dict(content["config"]))
    except UNREADABLE:  # this includes a configuration of another version
        return False
