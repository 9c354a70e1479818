"""Records once they are there: lists, export, import, and the removal of leftovers.

Imports no torch.
"""

import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import pandas as pd

from paperlib.config import Config, from_dict
from paperlib.store import checkpoints, records
from paperlib.store.records import UNREADABLE, Entry, StoreError, write_whole
from paperlib.store.store import Store

YOUNG_SECONDS = 3600.0  # a half-written file of this age may still be written


def table(store: Store, runs: Iterable[str | Config] | None = None) -> pd.DataFrame:
    """Return one row a run as `Store.runs`, and its title; damaged records have only `damaged`."""
    found = store.find(store.identities() if runs is None else runs)
    damaged = {run: str(error) for run, error in found.items() if isinstance(error, StoreError)}
    frame = store.runs([run for run in found if run not in damaged])
    whole = (entry for entry in found.values() if isinstance(entry, Entry))
    frame["title"] = [from_dict(entry.content["config"]).title for entry in whole]
    broken = pd.DataFrame({"run": list(damaged), "damaged": list(damaged.values())})
    return frame if broken.empty else pd.concat([frame, broken], ignore_index=True)


def describe(store: Store, start: str) -> dict:
    """Return all about a run except its arrays, as JSON; also of one that failed or is damaged.

    Args:
        store: The store.
        start: The start of the run's identity.

    Raises:
        StoreError: No run's identity starts so, or several do.
    """
    failures = store.failures()
    matching = [r for r in {*store.identities(), *failures} if r.startswith(start)]
    if len(matching) != 1:
        raise StoreError(f"{len(matching)} runs start with {start!r} in {store.path}")
    (run,) = matching
    entry = store.find([run]).get(run)
    if not isinstance(entry, Entry):
        return {"run": run, "failure": failures.get(run), "damaged": str(entry) if entry else None}
    rows = json.loads(pd.DataFrame(entry.columns).to_json(orient="records", double_precision=15))
    title = from_dict(entry.content["config"]).title
    return {"run": run, "title": title, **entry.content, "rows": rows}


def export(store: Store, file: Path, runs: Iterable[str | Config] | None = None) -> int:
    """Write runs to one Parquet file; return their number.

    The file keeps only the last part of a path to images, as identities do.

    Raises:
        KeyError, DamagedRecord, Mismatch: As `Store.entries`.
        StoreError: There are no runs, or the file cannot be written.
    """
    entries = [entry.portable() for entry in store.entries(runs)]
    if not entries:
        raise StoreError(f"there are no runs to export in {store.path}")
    write_whole(Path(file).expanduser(), records.packed(entries))
    return len(entries)


def merge(store: Store, source: Path) -> pd.DataFrame:
    """Take over the runs of an exported file or of another store.

    Returns:
        One row a run: run and outcome. The outcome is that of `Store.add`, or "damaged: ..." for a
        run that is not taken.

    Raises:
        StoreError: `source` is neither.
    """
    source = Path(source).expanduser()
    nothing = source / "nothing"
    other = Store(source, nothing) if source.is_dir() else Store(nothing, source)
    rows = [
        {
            "run": run,
            "outcome": store.add(entry) if isinstance(entry, Entry) else f"damaged: {entry}",
        }
        for run, entry in sorted(other.find(other.identities()).items())
    ]
    if not rows:
        raise StoreError(f"{source} is no run store or file of runs, or an empty one")
    return pd.DataFrame(rows)


def leftovers(store: Store, wanted: Callable[[Config], bool] = lambda _: True) -> list[Path]:
    """Find the files of a store that no run can use; records before their arrays.

    These are damaged records, checkpoints and notes of failures of runs that are done, and files
    left half-written YOUNG_SECONDS ago or earlier.

    Args:
        store: The store.
        wanted: Whether a configuration is of use. Records, checkpoints and notes of others are
            leftovers, too.
    """
    own = Store(store.path, store.path / "no results")
    found, done = own.find(own.own()), store.whole(store.identities())
    young, unused = time.time() - YOUNG_SECONDS, []
    for path in sorted(own.path.glob("*/*"), reverse=True):
        folder, run = path.parent.name, path.name.partition(".")[0]
        content: dict | None = None
        if not run or (folder == "records" and run not in found):
            if path.stat().st_mtime < young:
                unused.append(path)
            continue
        if folder == "records":
            content = getattr(found[run], "content", None)
        elif folder == "checkpoints" and run not in done:
            content = checkpoints.describe(own.path, run)
        elif folder == "failed" and run not in done:
            with suppress(*UNREADABLE):
                content = json.loads(path.read_text())
        elif folder not in ("checkpoints", "failed"):
            continue
        try:
            if not wanted(from_dict((content or {})["config"])):
                unused.append(path)
        except (KeyError, ValueError):  # done or damaged, or the configuration of another version
            unused.append(path)
    return unused
