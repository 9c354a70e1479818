"""What is done with records once they are there: export, merging of stores, clearing up.

Imports no torch.
"""

import io
import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from paperlib import checkpoints, experiments, packs
from paperlib.config import Config, ConfigError, from_dict, to_dict
from paperlib.packs import UNREADABLE, Entry
from paperlib.runs import DamagedRecord, Store, StoreError, write_whole

YOUNG = 3600.0  # seconds; a file of which only a part is there may still be written


def table(store: Store, runs: Iterable[str] | None = None) -> pd.DataFrame:
    """One row a run as `Store.runs` gives it, and title; damaged records have only `damaged`."""
    found = store.find(store.identities() if runs is None else runs)
    whole = [entry for entry in found.values() if isinstance(entry, Entry)]
    frame = store.runs([entry.run for entry in whole])
    titles = {entry.run: from_dict(entry.content["config"]).title for entry in whole}
    frame["title"] = frame.run.map(titles)
    damaged = {run: str(e) for run, e in found.items() if isinstance(e, DamagedRecord)}
    broken = pd.DataFrame({"run": list(damaged), "damaged": list(damaged.values())})
    return frame if broken.empty else pd.concat([frame, broken], ignore_index=True)


def resolve(store: Store, start: str) -> str:
    """The run whose identity starts so. Raises StoreError where that is none, or several."""
    known = set(store.identities()) | set(store.failures())
    matching = sorted(run for run in known if run.startswith(start))
    if len(matching) != 1:
        which = f"{len(matching)} runs start with" if matching else "no run starts with"
        raise StoreError(f"{which} {start!r} in {store.path}")
    return matching[0]


def describe(store: Store, run: str) -> dict:
    """All about a run but its arrays, as JSON; also of one that failed or is damaged."""
    (entry,) = store.find([run]).values() or [None]
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


def export(store: Store, file: Path, runs: Iterable[str] | None = None, arrays: bool = True) -> int:
    """Write runs to one Parquet file, and read it again to check it; returns how many they are.

    Of a path to images the file keeps the last part only, as identities do.
    Raises KeyError and DamagedRecord as `Store.read`, StoreError where the file cannot be written.
    """
    entries = [_portable(entry) for entry in store.entries(runs)]
    if not entries:
        raise StoreError(f"there are no runs to export in {store.path}")
    sink = io.BytesIO()
    packs.write(sink, entries, store.arrays if arrays else None)
    pack = packs.read(io.BytesIO(sink.getvalue()))
    if pack.damaged or len(pack.entries) != len(entries):
        raise StoreError(f"cannot export: {pack.damaged or 'a run has no epochs'}")
    write_whole(Path(file), sink.getvalue())
    return len(entries)


def _portable(entry: Entry) -> Entry:
    config = from_dict(entry.content["config"]).portable
    about = json.dumps(entry.content | {"config": to_dict(config)})
    return Entry(entry.run, about, entry.columns)


def merge(store: Store, source: Path) -> pd.DataFrame:
    """Take over the runs of an exported file or of another store: one row a run.

    Columns: run and outcome, as `Store.add` returns it, or "damaged: ..." for what is not taken.
    Raises StoreError where `source` is neither.
    """
    source = Path(source)
    if source.is_dir():
        other = Store(source, source / "no results")
        found: dict = other.find(other.own())
        if not found:
            raise StoreError(f"{source} is no run store, or an empty one")
        read_arrays = other.arrays
    else:
        try:
            pack = packs.read(source)
        except UNREADABLE as error:
            raise StoreError(f"cannot import {source}: {error}") from error
        found = dict(sorted((pack.entries | pack.damaged).items()))

        def read_arrays(entry: Entry) -> bytes | None:
            return packs.read_arrays(source, entry)

    rows = []
    for run, entry in found.items():
        try:
            if not isinstance(entry, Entry):
                raise ValueError(str(entry))
            if from_dict(entry.content["config"]).identity != run:
                raise ValueError("it holds another run")
            outcome = store.add(entry, read_arrays(entry))
        except (*UNREADABLE, ConfigError, DamagedRecord) as error:
            outcome = f"damaged: {error}"
        rows.append({"run": run, "outcome": outcome})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Leftover:
    """Files of a store that are of no more use, and why."""

    run: str
    why: str
    files: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """Their size."""
        return sum(path.stat().st_size for path in self.files if path.exists())


def leftovers(store: Store) -> list[Leftover]:
    """What no current setting refers to, in any profile, with any data, precision or seed.

    Also damaged records, checkpoints and notes of failures of runs that are done or that no
    setting refers to, and what was left half-written an hour ago or earlier.
    """
    own = Store(store.path, store.path / "no results")
    found, settings, out = own.find(own.own()), _Settings(), []
    for run, entry in found.items():
        files = tuple(store.path.glob(f"records/{run}.*"))
        if not isinstance(entry, Entry):
            out.append(Leftover(run, "a damaged record", files))
        elif not settings.refer_to(entry.content["config"]):
            out.append(Leftover(run, "a record no setting refers to", files))
    done = store.whole({path.name[:16] for path in store.path.glob("[cf]*/*")} | found.keys())
    for run in own.failures():
        files = (store.path / "failed" / f"{run}.json",)
        if run in done:
            out.append(Leftover(run, "a failure before it was done", files))
        elif not settings.refer_to(_noted(files[0])):
            out.append(Leftover(run, "a failure no setting refers to", files))
    for path in sorted(store.path.glob("checkpoints/[!.]*")):
        run = path.name[:16]
        if run in done:
            out.append(Leftover(run, "a checkpoint of a run that is done", (path,)))
        elif path != checkpoints.file(store.path, run):
            out.append(Leftover(run, "a checkpoint that was set aside", (path,)))
        elif not settings.refer_to((checkpoints.describe(store.path, run) or {}).get("config")):
            out.append(Leftover(run, "a checkpoint no setting refers to", (path,)))
    for path in sorted([*store.path.glob(".*"), *store.path.glob("[rcfp]*/*")]):
        half = re.fullmatch(r"\.(.+)\.[0-9a-f]{32}", path.name)
        lonely = path.suffix == ".npz" and path.stem not in found
        if (half or lonely or path.parent.name == "progress") and _old(path):
            out.append(Leftover(half[1][:16] if half else path.stem, "left half-written", (path,)))
    return out


def remove(unused: Iterable[Leftover]) -> None:
    """Delete the files; a record first, so that none is left without its arrays."""
    for leftover in unused:
        for path in sorted(leftover.files, key=lambda path: path.suffix != ".parquet"):
            path.unlink(missing_ok=True)


def _old(path: Path) -> bool:
    try:
        return path.stat().st_mtime < time.time() - YOUNG
    except FileNotFoundError:
        return False


def _noted(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())["config"]
    except UNREADABLE:
        return None


class _Settings:
    """All settings of all figures, in every profile."""

    def __init__(self) -> None:
        self._runs: dict[tuple[str, str], set[str]] = {}

    def refer_to(self, content: dict | None) -> bool:
        """Whether a configuration, as `config.to_dict` gives it, is one of them."""
        try:
            config = from_dict(content or {"epochs": 0})
        except ConfigError:
            return False
        return config.with_(seed=0).identity in self._of(config)

    def _of(self, config: Config) -> set[str]:
        key = config.data, config.precision
        if key not in self._runs:
            self._runs[key] = {
                run
                for name in experiments.FIGURES
                for profile in experiments.PROFILES
                for run in experiments.plan(name, experiments.Scale(profile, key[0], 1, key[1])).run
            }
        return self._runs[key]
