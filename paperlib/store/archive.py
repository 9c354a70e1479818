"""Records once they are there: lists, export, import, and the removal of leftovers.

Imports no torch.
"""

import io
import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from paperlib.config import Config, from_dict
from paperlib.store import checkpoints, records
from paperlib.store.records import UNREADABLE, DamagedRecord, Entry, StoreError, write_whole
from paperlib.store.store import Store

YOUNG_SECONDS = 3600.0  # a half-written file of this age may still be written


def table(store: Store, runs: Iterable[str | Config] | None = None) -> pd.DataFrame:
    """Return one row a run as `Store.runs`, and its title; damaged records have only `damaged`."""
    found = store.find(store.identities() if runs is None else runs)
    whole = [entry for entry in found.values() if isinstance(entry, Entry)]
    frame = store.runs([entry.run for entry in whole])
    titles = {entry.run: from_dict(entry.content["config"]).title for entry in whole}
    frame["title"] = frame.run.map(titles)
    damaged = {run: str(error) for run, error in found.items() if isinstance(error, StoreError)}
    broken = pd.DataFrame({"run": list(damaged), "damaged": list(damaged.values())})
    return frame if broken.empty else pd.concat([frame, broken], ignore_index=True)


def resolve(store: Store, start: str) -> str:
    """Return the run whose identity starts so. Raises StoreError if none does, or several do."""
    known = set(store.identities()) | set(store.failures())
    matching = sorted(run for run in known if run.startswith(start))
    if len(matching) != 1:
        which = f"{len(matching)} runs start with" if matching else "no run starts with"
        raise StoreError(f"{which} {start!r} in {store.path}")
    return matching[0]


def describe(store: Store, run: str) -> dict:
    """Return all about a run except its arrays, as JSON; also of one that failed or is damaged."""
    entry = store.find([run]).get(run)
    if not isinstance(entry, Entry):
        return {"run": run, "failure": store.failure(run), "damaged": str(entry) if entry else None}
    content = entry.content
    return {
        "run": run,
        "title": from_dict(content["config"]).title,
        "config": content["config"],
        "provenance": content["provenance"],
        "arrays": content.get("arrays"),
        "rows": json.loads(entry.epochs.to_json(orient="records", double_precision=15)),
    }


def export(
    store: Store, file: Path, runs: Iterable[str | Config] | None = None, arrays: bool = True
) -> int:
    """Write runs to one Parquet file, and read it again to check it.

    The file keeps only the last part of a path to images, as identities do.

    Returns:
        The number of runs.

    Raises:
        KeyError, DamagedRecord, Mismatch: As `Store.read`.
        StoreError: There are no runs, or the file cannot be written.
    """
    entries = [entry.portable(arrays) for entry in store.entries(runs)]
    if not entries:
        raise StoreError(f"there are no runs to export in {store.path}")
    sink = io.BytesIO()
    records.write_many(sink, entries, store.arrays if arrays else None)
    found = records.read_many(io.BytesIO(sink.getvalue()))
    if problems := [str(error) for error in found.values() if isinstance(error, StoreError)]:
        raise StoreError(f"cannot export: {problems[0]}")
    write_whole(Path(file).expanduser(), sink.getvalue())
    return len(found)


def merge(store: Store, source: Path) -> pd.DataFrame:
    """Take over the runs of an exported file or of another store.

    Returns:
        One row a run: run and outcome. The outcome is that of `Store.add`, or "damaged: ..." for a
        run that is not taken.

    Raises:
        StoreError: `source` is neither.
    """
    source = Path(source).expanduser()
    if source.is_dir():
        other = Store(source, source / "no results")
        found, read_arrays = other.find(other.own()), other.arrays
        if not found:
            raise StoreError(f"{source} is no run store, or an empty one")
    else:
        try:
            found = records.read_many(source)
        except UNREADABLE as error:
            raise StoreError(f"cannot import {source}: {error}") from error

        def read_arrays(entry: Entry) -> bytes | None:
            return records.read_arrays(source, entry)

    rows = []
    for run, entry in sorted(found.items()):
        try:
            if not isinstance(entry, Entry):
                raise entry
            outcome = store.add(entry, read_arrays(entry))
        except (*UNREADABLE, DamagedRecord) as error:
            outcome = f"damaged: {error}"
        rows.append({"run": run, "outcome": outcome})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Leftover:
    """A file of a store that is of no more use, and why."""

    run: str
    why: str
    file: Path

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.file.stat().st_size if self.file.exists() else 0


def leftovers(store: Store, wanted: Callable[[Config], bool] = lambda _: True) -> list[Leftover]:
    """Find the files of a store that no run can use.

    These are damaged records, checkpoints and notes of failures of runs that are done, checkpoints
    that were set aside, files left half-written YOUNG_SECONDS ago or earlier, and files that only
    earlier versions used.

    Args:
        store: The store.
        wanted: Whether a configuration is of use. Records, checkpoints and notes of others are
            leftovers, too.
    """
    own = Store(store.path, store.path / "no results")
    found = own.find(own.own())
    paths = [path for path in sorted(store.path.glob("*/*")) if path.parent.name != "data"]
    done = store.whole({_run(path) for path in paths})

    def why(path: Path) -> str | None:
        run, folder = _run(path), path.parent.name
        lonely = path.suffix == ".npz" and run not in found
        if lonely or folder == "progress" or re.fullmatch(r"\..+\.[0-9a-f]{32}", path.name):
            return "left half-written" if _old(path) else None
        if folder == "claims":
            return "of an earlier version" if path.suffix in (".lock", ".json") else None
        if folder == "records":
            kind, content = "a record", getattr(found.get(run), "content", None)
            if content is None:
                return "a damaged record"
        elif folder in ("failed", "checkpoints"):
            kind = "a note of a failure" if folder == "failed" else "a checkpoint"
            content = _note(path) or checkpoints.describe(store.path, run)
            if run in done:
                return f"{kind} of a run that is done"
            if folder == "checkpoints" and path != checkpoints.file(store.path, run):
                return f"{kind} that was set aside"
        else:
            return None
        return None if _is_wanted(content, wanted) else f"{kind} of no present setting"

    reasons = {path: why(path) for path in paths}
    reasons |= dict.fromkeys(store.path.glob("index.parquet"), "of an earlier version")
    return [Leftover(_run(path), reason, path) for path, reason in reasons.items() if reason]


def remove(unused: Iterable[Leftover]) -> None:
    """Delete the files, records before their arrays."""
    for leftover in sorted(unused, key=lambda leftover: leftover.file.suffix != ".parquet"):
        leftover.file.unlink(missing_ok=True)


def _run(path: Path) -> str:
    return path.name.removeprefix(".")[:16]


def _is_wanted(content: dict | None, wanted: Callable[[Config], bool]) -> bool:
    try:
        return wanted(from_dict((content or {})["config"]))
    except (KeyError, ValueError):  # unreadable, or of a configuration of another version
        return False


def _old(path: Path) -> bool:
    try:
        return path.stat().st_mtime < time.time() - YOUNG_SECONDS
    except FileNotFoundError:
        return False


def _note(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except UNREADABLE:
        return None
