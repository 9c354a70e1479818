"""The formats of records: one run in two files, or many runs in one.

A run is a Parquet file with one row an epoch, and an npz file if arrays were measured. The Parquet
file's metadata holds JSON: the configuration, the provenance, and checksums of everything, the npz
file included. They reveal damaged bytes and files of different runs. Many runs are one Parquet file
of all their epochs. There a run's first row holds the same JSON in the column `about`, the names
and types of its columns in `columns`, and its npz file in `arrays`.

Imports no torch.
"""

import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from paperlib.config import Config, from_dict, to_dict

# Errors of reading a damaged Parquet, npz or JSON file. A ConfigError is a ValueError.
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
        epochs: One row an epoch, with the columns that `measures.summarize` takes, and others such
            as train_loss, test_loss, learning_rate and seconds.
        arrays: The arrays measured in the run, by name.
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

    def same_numbers(self, other: "RunRecord") -> bool:
        """Return whether both hold the same numbers, apart from the seconds that an epoch took."""
        mine, theirs = (
            (digest(columns_of(each) | {"seconds": np.empty(0)}), digest(each.arrays))
            for each in (self, other)
        )
        return mine == theirs


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


def columns_of(record: RunRecord) -> dict[str, np.ndarray]:
    """Return the columns of a record's epochs."""
    return {name: record.epochs[name].to_numpy() for name in record.epochs}


def _serialized(record: RunRecord) -> tuple[str, bytes | None]:
    """Return a record's JSON, and the content of its npz file, None if it has no arrays."""
    content = {
        "config": to_dict(record.config),
        "provenance": record.provenance,
        "epochs": digest(columns_of(record)),
        "about": _text_digest(record.provenance),
    }
    npz = None
    if record.arrays:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **record.arrays)  # type: ignore[arg-type]
        npz = buffer.getvalue()
        content["arrays"] = hashlib.sha256(npz).hexdigest()
    return json.dumps(content), npz


def _parsed(run: str, about: str, columns: dict[str, np.ndarray], npz: bytes | None) -> RunRecord:
    """Return the record that was serialized, unchanged. Raises ValueError."""
    content = json.loads(about)
    config, provenance = from_dict(content["config"]), content["provenance"]
    if config.identity != run:
        raise ValueError(f"it holds run {config.identity}, not {run}")
    of_provenance = _text_digest(provenance)
    checksums = {
        "numbers": (content["epochs"], digest(columns)),
        "provenance": (content.get("about", of_provenance), of_provenance),  # older ones have none
        "arrays": (content.get("arrays"), npz and hashlib.sha256(npz).hexdigest()),
    }
    for name, (then, now) in checksums.items():
        if then != now:
            raise ValueError(f"its {name} do not match their checksum")
    arrays: dict[str, np.ndarray] = {}
    if npz is not None:
        with np.load(io.BytesIO(npz), allow_pickle=False) as stored:
            arrays = dict(stored)
    return RunRecord(config, pd.DataFrame(columns), arrays, provenance)


# One run


def write(path: Path, record: RunRecord) -> None:
    """Write a record to `path`, after its npz file beside it. Raises StoreError."""
    about, npz = _serialized(record)
    if npz is not None:
        write_whole(path.with_suffix(".npz"), npz)
    table = pa.table(columns_of(record)).replace_schema_metadata({"paperlib": about})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False)
    write_whole(path, sink.getvalue())


def read(path: Path) -> RunRecord | None:
    """Read and check the record at `path`; return None if there is none.

    Raises:
        DamagedRecord: The record or its npz file is damaged, incomplete, or of another run.
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
        return _parsed(path.stem, about, columns, npz)
    except UNREADABLE as error:
        raise DamagedRecord(f"{path} is not a whole record: {error}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all. Raises StoreError."""
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


def packed(records: Iterable[RunRecord]) -> bytes:
    """Return the content of one file of many runs.

    If a column's type differs between runs, the file has a type that holds both.
    """
    tables = []
    for record in sorted(records, key=lambda record: record.run):
        (about, npz), columns = _serialized(record), columns_of(record)
        kinds = {name: column.dtype.str for name, column in columns.items()}
        rest = [None] * (len(record.epochs) - 1)  # only a run's first row has these:
        heads = {
            "about": pa.array([about, *rest], pa.string()),
            "columns": pa.array([json.dumps(kinds), *rest], pa.string()),
            "arrays": pa.array([npz, *rest], pa.binary()),
        }
        tables.append(pa.table({"run": [record.run] * len(record.epochs), **columns, **heads}))
    table, sink = pa.concat_tables(tables, promote_options="permissive"), io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_many(path: Path) -> dict[str, RunRecord | StoreError]:
    """Read and check all runs of a file: each is a record, or the DamagedRecord of its refusal.

    Raises:
        ValueError, or another of UNREADABLE: The file is damaged as a whole, or of another kind.
    """
    table = pq.read_table(path).to_pandas()
    if not {"run", "about", "columns", "arrays"} <= set(table):
        raise ValueError("it has no columns run, about, columns and arrays: not a file of runs")
    found: dict[str, RunRecord | StoreError] = {}
    for run, rows in table.groupby("run"):
        try:
            kinds = json.loads(rows["columns"].iloc[0])
            columns = {name: rows[name].to_numpy().astype(kind) for name, kind in kinds.items()}
            npz = b"".join(rows["arrays"].dropna()) or None
            found[str(run)] = _parsed(str(run), rows["about"].iloc[0], columns, npz)
        except UNREADABLE as error:
            found[str(run)] = DamagedRecord(f"run {run} in {path} is damaged: {error}")
    return found
