"""Records once they are there: lists, export, import, and the removal of leftovers.

Imports no torch.
"""

import io
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pandas as pd

from paperlib.config import Config, from_dict
from paperlib.store import checkpoints, records
from paperlib.store.records import UNREADABLE, DamagedRecord, Entry, StoreError, write_whole
from paperlib.store.store import Store

YOUNG_SECONDS = 3600.0  # a half-written file of this age may still be written
HALF_WRITTEN = re.compile(r"\..+\.[0-9a-f]{32}")  # as `write_whole` names it


def table(store: Store, runs: Iterable[str | Config] | None = None) -> pd.DataFrame:
    """Return one row a run as `Store.runs`, and its title; damaged records have only `damaged`."""
    found = store.find(store.identities() if runs is None else runs)
    whole = [entry for entry in found.values() if isinstance(entry, Entry)]
    frame = store.runs([entry.run for entry in whole])
    frame["title"] = [from_dict(entry.content["config"]).title for entry in whole]
    damaged = {run: str(error) for run, error in found.items() if isinstance(error, StoreError)}
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
    known = set(store.identities()) | set(store.failures())
    matching = sorted(run for run in known if run.startswith(start))
    if len(matching) != 1:
        raise StoreError(f"{len(matching)} runs start with {start!r} in {store.path}")
    (run,) = matching
    entry = store.find([run]).get(run)
    if not isinstance(entry, Entry):
        return {"run": run, "failure": store.failure(run), "damaged": str(entry) if entry else None}
    rows = json.loads(entry.epochs.to_json(orient="records", double_precision=15))
    title = from_dict(entry.content["config"]).title
    return {"run": run, "title": title, **entry.content, "rows": rows}


def export(store: Store, file: Path, runs: Iterable[str | Config] | None = None) -> int:
    """Write runs to one Parquet file, and read it again to check it.

    The file keeps only the last part of a path to images, as identities do.

    Returns:
        The number of runs.

    Raises:
        KeyError, DamagedRecord, Mismatch: As `Store.read`.
        StoreError: There are no runs, or the file cannot be written.
    """
    entries = [entry.portable() for entry in store.entries(runs)]
    if not entries:
        raise StoreError(f"there are no runs to export in {store.path}")
    content = records.packed(entries, store.arrays)
    for error in records.read_many(io.BytesIO(content)).values():
        if isinstance(error, StoreError):
            raise StoreError(f"cannot export: {error}")
    write_whole(Path(file).expanduser(), content)
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
    path, results = (source, None) if source.is_dir() else (source.parent / "no runs", source)
    other = Store(path, results or source / "no results")
    found = other.find(other.identities())
    if not found:
        raise StoreError(f"{source} is no run store or file of runs, or an empty one")
    rows = []
    for run, entry in sorted(found.items()):
        try:
            if not isinstance(entry, Entry):
                raise entry
            outcome = store.add(entry, other.arrays(entry))
        except DamagedRecord as error:
            outcome = f"damaged: {error}"
        rows.append({"run": run, "outcome": outcome})
    return pd.DataFrame(rows)


def leftovers(store: Store, wanted: Callable[[Config], bool] = lambda _: True) -> dict[Path, str]:
    """Find the files of a store that no run can use, and say why; records before their arrays.

    These are damaged records, checkpoints and notes of failures of runs that are done, checkpoints
    that were set aside, and files left half-written YOUNG_SECONDS ago or earlier.

    Args:
        store: The store.
        wanted: Whether a configuration is of use. Records, checkpoints and notes of others are
            leftovers, too.
    """
    return dict(_leftovers(Store(store.path, store.path / "no results"), store, wanted))


def _leftovers(
    own: Store, store: Store, wanted: Callable[[Config], bool]
) -> Iterator[tuple[Path, str]]:
    found = own.find(own.own())
    for run, entry in found.items():
        why = "a record of no present setting" if isinstance(entry, Entry) else "a damaged record"
        if not isinstance(entry, Entry) or not _is_wanted(entry.content, wanted):
            for path in sorted((own.path / "records").glob(f"{run}.*"), reverse=True):
                yield path, why
    for folder, kind in (("failed", "a note of a failure"), ("checkpoints", "a checkpoint")):
        for path in sorted((own.path / folder).glob("[!.]*")):
            run = path.name.partition(".")[0]
            content = checkpoints.describe(own.path, run)
            if folder == "failed":
                try:
                    content = json.loads(path.read_text())
                except UNREADABLE:
                    content = None
            if store.whole([run]):
                yield path, f"{kind} of a run that is done"
            elif folder == "checkpoints" and path != checkpoints.file(own.path, run):
                yield path, f"{kind} that was set aside"
            elif not _is_wanted(content, wanted):
                yield path, f"{kind} of no present setting"
    for path in sorted(own.path.glob("*/*")):
        lonely = path.suffix == ".npz" and path.parent.name == "records" and path.stem not in found
        old = path.stat().st_mtime < time.time() - YOUNG_SECONDS
        if old and (lonely or HALF_WRITTEN.fullmatch(path.name)):
            yield path, "left half-written"


def _is_wanted(content: dict | None, wanted: Callable[[Config], bool]) -> bool:
    try:
        return wanted(from_dict((content or {})["config"]))
    except (KeyError, ValueError):  # unreadable, or of a configuration of another version
        return False
