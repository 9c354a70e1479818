"""The run store: one record a run, found by the identity of its configuration.

    STORE/records/IDENTITY.parquet, .npz   the records, see `records`
    STORE/failed/IDENTITY.json             why a run failed
    STORE/checkpoints/, claims/            unfinished runs, see `checkpoints` and `lease`
    STORE/data/                            decoded images

The files of many runs in results/ are a second, read-only layer. A run is looked up there if its
record in records/ is missing or damaged.

Imports no torch.
"""

import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pandas as pd
import pyarrow as pa

from paperlib import measures
from paperlib.config import Config, to_dict
from paperlib.store import provenance, records
from paperlib.store.paths import default_path, results_path
from paperlib.store.provenance import images_path
from paperlib.store.records import (
    UNREADABLE,
    DamagedRecord,
    RunRecord,
    StoreError,
    write_whole,
)

# Parts of the configuration that are columns of `Store.runs`.
PLAIN = ("data", "model", "width", "optimizer", "learning_rate", "epochs", "precision", "seed")


class Mismatch(StoreError):
    """A record was made with other data or code than the run has now; the message names both."""


class Store:
    """A folder of run records; the module's docstring describes its layout.

    Methods that take runs accept identities and configurations. If a record is asked for by its
    configuration, it is compared with the present data and code of that configuration (`Mismatch`).

    Args:
        path: The folder; None is PAPERLIB_RUNS, or `runs` in the checkout.
        results: The read-only layer: a file of many runs, or a folder of such files; None is
            PAPERLIB_RESULTS, or `results`.
    """

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        results: str | os.PathLike | None = None,
    ) -> None:
        self.path = Path(path).expanduser() if path is not None else default_path()
        self.results = Path(results).expanduser() if results is not None else results_path()

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    def __contains__(self, run: str | Config) -> bool:
        """Return whether a run has a whole record. Raises Mismatch."""
        return bool(self.whole([run]))

    # Reading

    def find(self, runs: Iterable[str | Config]) -> dict[str, RunRecord | StoreError]:
        """Return the record of each run, or the DamagedRecord or Mismatch of its refusal.

        Every record is checked. Runs without a record are left out. Two configurations of one
        identity, as with two folders of one name, are both compared.
        """
        layer, found = self._layer(), dict[str, RunRecord | StoreError]()
        differs = provenance.comparison(self.path / "data")
        for item in runs:
            run = _identity(item)
            record = found.get(run)
            try:
                record = record or records.read(self._file(run)) or layer.get(run)
            except DamagedRecord as error:
                record = layer.get(run, error)
            if isinstance(item, Config) and isinstance(record, RunRecord):
                problem = differs(item, record.provenance)
                if problem is not None:
                    refused = f"the record of {item.title} in {self.path} is refused: {problem}"
                    record = Mismatch(refused)
            if record is not None:
                found[run] = record
        return found

    def whole(self, runs: Iterable[str | Config]) -> set[str]:
        """Return the identities of the runs that have a whole record. Raises Mismatch."""
        found = self.find(runs)
        for problem in found.values():
            if isinstance(problem, Mismatch):
                raise problem
        return {run for run, record in found.items() if isinstance(record, RunRecord)}

    def records(self, runs: Iterable[str | Config] | None = None) -> list[RunRecord]:
        """Return the records of `runs`, by default of all in the store.

        Raises:
            KeyError: A run has no record.
            DamagedRecord, Mismatch: A run's record cannot be used.
        """
        runs = self.identities() if runs is None else list(runs)
        found, result = self.find(runs), []
        for run in map(_identity, runs):
            record = found.get(run)
            if record is None:
                raise KeyError(f"no run {run} in {self.path}")
            if not isinstance(record, RunRecord):
                raise record
            mine = replace(record, epochs=record.epochs.copy(), provenance=dict(record.provenance))
            mine.arrays = {name: array.copy() for name, array in record.arrays.items()}
            result.append(mine)  # the layer is kept
        return result

    def read(self, run: str | Config) -> RunRecord:
        """Return one record. Raises the errors of `records`."""
        return self.records([run])[0]

    def own(self) -> list[str]:
        """Return the runs with a record in the store itself, even a damaged one."""
        return sorted(path.stem for path in (self.path / "records").glob("[!.]*.parquet"))

    def identities(self) -> list[str]:
        """Return the runs with a record here or in the read-only layer, even a damaged one."""
        return sorted(self._layer().keys() | set(self.own()))

    def epochs(self, runs: Iterable[str | Config] | None = None) -> pd.DataFrame:
        """Return one row an epoch of each run, keyed by `run`."""
        return self.frames(runs)[0]

    def runs(self, runs: Iterable[str | Config] | None = None) -> pd.DataFrame:
        """Return one row a run: its summary and its configuration, keyed by `run`."""
        return self.frames(runs)[1]

    def frames(
        self, runs: Iterable[str | Config] | None = None
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return `epochs` and `runs`, each run once. Raises the errors of `records`."""
        once = {_identity(run): run for run in (self.identities() if runs is None else runs)}
        every = self.records(once.values())
        if not every:
            return pd.DataFrame({"run": []}, dtype=str), pd.DataFrame({"run": []}, dtype=str)
        tables = [pa.table(records.columns_of(record)) for record in every]
        epochs = pa.concat_tables(tables, promote_options="permissive").to_pandas()
        names = pd.Series([record.run for record in every])
        epochs["run"] = names.repeat([len(record.epochs) for record in every]).array
        about = pd.DataFrame(map(_summary, every))
        return epochs, about[["run"]].merge(measures.summarize(epochs)).merge(about)

    # Writing

    def check_writable(self) -> None:
        """Raise StoreError if records cannot be written here."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise StoreError(f"cannot write to the run store {self.path}: {error}") from error

    def write(self, record: RunRecord) -> None:
        """Write a record, whole or not at all, and remove the note of an earlier failure.

        Raises:
            StoreError: The record cannot be written.
        """
        records.write(self._file(record.run), record)
        self._failed_file(record.run).unlink(missing_ok=True)

    def remove(self, run: str) -> None:
        """Remove the store's own record of a run."""
        for path in (self._file(run), self._file(run).with_suffix(".npz")):
            path.unlink(missing_ok=True)

    def add(self, record: RunRecord) -> str:
        """Take over a run of another store. A whole record is never replaced.

        Returns:
            The outcome: "new", "mended" (ours was damaged), "same", or "different" (it has other
            numbers than ours, which stay).

        Raises:
            StoreError: The record cannot be written.
        """
        ours = self.find([record.run]).get(record.run)
        if isinstance(ours, RunRecord):
            return "same" if record.same_numbers(ours) else "different"
        self.write(record)
        return "mended" if ours else "new"

    # Failures

    def fail(self, config: Config, error: BaseException | str) -> None:
        """Note the failure of a run and its reason. Raises StoreError."""
        content = {"config": to_dict(config), "error": str(error)}
        write_whole(self._failed_file(config.identity), json.dumps(content, indent=1).encode())

    def failure(self, run: str) -> str | None:
        """Return the reason of a run's failure; None if it did not fail."""
        try:
            return json.loads(self._failed_file(run).read_text())["error"]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except UNREADABLE:
            return "the note of this failure is damaged"

    def failures(self) -> dict[str, str]:
        """Return the reason of each failure, by run."""
        runs = sorted(path.stem for path in (self.path / "failed").glob("[!.]*.json"))
        return {run: why for run in runs if (why := self.failure(run)) is not None}

    # Files

    def _file(self, run: str) -> Path:
        return self.path / "records" / f"{run}.parquet"

    def _failed_file(self, run: str) -> Path:
        return self.path / "failed" / f"{run}.json"

    def _layer(self) -> dict[str, RunRecord | StoreError]:
        """Return the read-only layer's records, as `find`. Later files replace earlier ones."""
        layer: dict[str, RunRecord | StoreError] = {}
        if self.results is not None:
            files = sorted(self.results.glob("*.parquet"))
            for path in [self.results] if self.results.is_file() else files:
                state = path.stat()
                layer |= _results_file(path, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        return layer


@lru_cache(maxsize=32)
def _results_file(path: Path, *state: int) -> dict[str, RunRecord | StoreError]:
    """Read a file of results, once a process as long as its size and times stay the same."""
    try:
        return records.read_many(path)
    except UNREADABLE as error:
        warnings.warn(f"{path} cannot be read and is left out: {error}", stacklevel=2)
        return {}


def _identity(run: str | Config) -> str:
    return run if isinstance(run, str) else run.identity


def by_identity(configs: Iterable[Config]) -> dict[str, Config]:
    """Return configurations by identity. Equal runs appear once.

    Raises:
        StoreError: Two configurations of one identity name different folders of images.
    """
    known: dict[str, Config] = {}
    for config in configs:
        first = known.setdefault(config.identity, config)
        if images_path(first.data) != images_path(config.data):
            raise StoreError(
                f"a run is known by the last part of the path of its images: rename one of "
                f"{first.data!r} and {config.data!r}"
            )
    return known


def _summary(record: RunRecord) -> dict[str, object]:
    about = record.provenance
    return {
        "run": record.run,
        **{name: getattr(record.config, name) for name in PLAIN},
        "device": about.get("device"),
        "parameters": about.get("parameters", math.nan) - about.get("held", 0),
    }
