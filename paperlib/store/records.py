"""The formats of records: one run in two files, or many runs in one.

A run is a Parquet file with one row an epoch, and an npz file where arrays were measured. The
Parquet file's metadata holds JSON: the configuration, the provenance, and checksums of everything,
the npz file included. So damaged bytes and files of different runs are noticed. Many runs are one
Parquet file of all their epochs. There a run's first row holds the same JSON in the column `about`,
the names and types of its columns in `columns`, and its npz file in `arrays`.

Imports no torch.
"""

import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from paperlib.config import Config, from_dict, to_dict

# Raised while a damaged Parquet, npz or JSON file is read. A ConfigError is a ValueError.
UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError),
    pa.ArrowException,
)


class StoreError(RuntimeError):
    """A run store cannot be read or written."""


class DamagedRecord(StoreError):
    """A record cannot be trusted; the message names its file."""


@dataclass
class RunRecord:
    """One finished run.

    Attributes:
        config: Its configuration.
        epochs: One row an epoch; the columns that `measures.summarize` takes, and train_loss,
            test_loss, learning_rate and seconds.
        arrays: What was measured in the run, by name.
        provenance: Versions, device, commit, and checksums of data and code.
    """

    config: Config
    epochs: pd.DataFrame
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> str:
        """The run's identity."""
        return self.config.identity


@dataclass(frozen=True)
class Entry:
    """One record as its files hold it.

    Attributes:
        run: The run's identity.
        about: JSON of config, provenance, and checksums: `epochs` of the columns, `about` of the
            provenance, and `arrays` of the npz file, if there is one.
        columns: One number an epoch, by name.
        npz: The content of that npz file.
    """

    run: str
    about: str
    columns: dict[str, np.ndarray]
    npz: bytes | None

    @cached_property
    def content(self) -> dict[str, Any]:
        """The JSON of `about`, parsed."""
        return json.loads(self.about)

    @property
    def count(self) -> int:
        """The number of epochs."""
        return len(next(iter(self.columns.values()), ()))

    def check(self) -> "Entry":
        """Return itself. Raise ValueError if anything in it is not the original."""
        if (held := from_dict(self.content["config"]).identity) != self.run:
            raise ValueError(f"it holds run {held}, not {self.run}")
        provenance = _text_digest(self.content["provenance"])
        now = {"numbers": digest(self.columns), "provenance": provenance, "arrays": None}
        if self.npz is not None:
            now["arrays"] = hashlib.sha256(self.npz).hexdigest()
        then = {"numbers": self.content["epochs"], "arrays": self.content.get("arrays")}
        then["provenance"] = self.content.get("about", provenance)  # older records have none
        for name, checksum in then.items():
            if now[name] != checksum:
                raise ValueError(f"its {name} do not match their checksum")
        return self

    def record(self) -> RunRecord:
        """Return it for people."""
        arrays: dict[str, np.ndarray] = {}
        if self.npz is not None:
            with np.load(io.BytesIO(self.npz), allow_pickle=False) as stored:
                arrays = dict(stored)
        config, about = from_dict(self.content["config"]), self.content["provenance"]
        return RunRecord(config, pd.DataFrame(self.columns), arrays, about)

    def portable(self) -> "Entry":
        """Return the same record with only the last part of a path to images."""
        config = to_dict(from_dict(self.content["config"]).portable)
        return replace(self, about=json.dumps(self.content | {"config": config}))

    def same_numbers(self, other: "Entry") -> bool:
        """Whether both hold the same numbers, apart from the seconds that an epoch took."""
        mine, others = (
            (digest(entry.columns | {"seconds": np.empty(0)}), entry.content.get("arrays"))
            for entry in (self, other)
        )
        return mine == others


def digest(columns: Mapping[str, np.ndarray]) -> str:
    """Return a checksum of columns: their names, types and bytes."""
    checksum = hashlib.sha256()
    for name, column in columns.items():
        column = np.ascontiguousarray(column)
        checksum.update(f"{name} {column.dtype.str} {column.shape}".encode())
        checksum.update(column.data)
    return checksum.hexdigest()


def _text_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def serialized(record: RunRecord) -> Entry:
    """Return a record as a file will hold it."""
    columns = {name: record.epochs[name].to_numpy() for name in record.epochs}
    content = {
        "config": to_dict(record.config),
        "provenance": record.provenance,
        "epochs": digest(columns),
        "about": _text_digest(record.provenance),
    }
    npz = None
    if record.arrays:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **record.arrays)  # type: ignore[arg-type]
        npz = buffer.getvalue()
        content["arrays"] = hashlib.sha256(npz).hexdigest()
    return Entry(record.run, json.dumps(content), columns, npz)


# One run


def write(path: Path, entry: Entry) -> None:
    """Write a record at `path`, and before it the npz file beside it. Raises StoreError."""
    if entry.npz is not None:
        write_whole(path.with_suffix(".npz"), entry.npz)
    table = pa.table(entry.columns).replace_schema_metadata({"paperlib": entry.about})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False)
    write_whole(path, sink.getvalue())


def read(path: Path) -> Entry | None:
    """Read the record at `path` and check it; None where there is none.

    Raises:
        DamagedRecord: The record or its npz file is damaged, missing in part, or of another run.
    """
    if not path.exists():
        return None
    try:
        file = pq.ParquetFile(pa.BufferReader(path.read_bytes()))
        about = file.schema_arrow.metadata[b"paperlib"].decode()
        table = file.read(use_threads=False)  # twice as quick as with threads
        columns = {name: table[name].to_numpy() for name in table.column_names}
        has_arrays = json.loads(about).get("arrays") is not None
        npz = path.with_suffix(".npz").read_bytes() if has_arrays else None
        return Entry(path.stem, about, columns, npz).check()
    except UNREADABLE as error:
        raise DamagedRecord(f"{path} is not a whole record: {error}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Put `content` at `path`, whole or not at all. Raises StoreError where it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with whole.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(whole, path)
        except BaseException:
            whole.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error}") from error


# Many runs


def packed(entries: Iterable[Entry]) -> bytes:
    """Return the content of one file of many runs.

    A column whose type differs between runs gets one that holds both.
    """
    tables = []
    for entry in sorted(entries, key=lambda entry: entry.run):
        kinds = {name: column.dtype.str for name, column in entry.columns.items()}
        rest = [None] * (entry.count - 1)  # only a run's first row has these:
        heads = {
            "about": pa.array([entry.about, *rest], pa.string()),
            "columns": pa.array([json.dumps(kinds), *rest], pa.string()),
            "arrays": pa.array([entry.npz, *rest], pa.binary()),
        }
        tables.append(pa.table({"run": [entry.run] * entry.count, **entry.columns, **heads}))
    table, sink = pa.concat_tables(tables, promote_options="permissive"), io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_many(path: Path) -> dict[str, Entry | StoreError]:
    """Read all of a file's runs: each record, checked, or the DamagedRecord it is refused for.

    Raises:
        ValueError, or another of UNREADABLE: The file is damaged as a whole, or of another kind.
    """
    table = pq.read_table(path).to_pandas()
    if not {"run", "about", "columns", "arrays"} <= set(table):
        raise ValueError("it has no columns run, about, columns and arrays: not a file of runs")
    found: dict[str, Entry | StoreError] = {}
    for run, rows in table.groupby("run"):
        try:
            kinds = json.loads(rows["columns"].iloc[0])
            columns = {name: rows[name].to_numpy().astype(kind) for name, kind in kinds.items()}
            npz = b"".join(rows["arrays"].dropna()) or None
            found[str(run)] = Entry(str(run), rows["about"].iloc[0], columns, npz).check()
        except UNREADABLE as error:
            found[str(run)] = DamagedRecord(f"run {run} in {path} is damaged: {error}")
    return found
