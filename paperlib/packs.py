"""Many runs in one Parquet file: what results/ and exports hold, and a store's index.

One row an epoch, a run's rows together. A run's first row also holds, null elsewhere:

    about      JSON: its configuration, provenance, and checksums of its epochs and arrays
    columns    JSON: which of the columns are its own, and their types
    checksum   of its name and `about`
    arrays     its npz file, where it has one and arrays were asked for
    signature  JSON, in an index only: size, times and inode of the files it was read from

Every run is checked against its checksums when it is read. Imports no torch.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

# What Parquet and JSON files that are damaged raise when they are read.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, pa.ArrowException, MemoryError)
RESERVED = ("run", "about", "columns", "checksum", "arrays", "signature")
GROUP = 512  # runs in a row group: arrays of one run are found without reading all
GROUP_WITH_ARRAYS = 8


@dataclass(frozen=True)
class Entry:
    """One run's record but for its arrays: `about` is the JSON that its record carries."""

    run: str
    about: str
    columns: dict[str, np.ndarray]

    @cached_property
    def content(self) -> dict[str, Any]:
        """What `about` says: config, provenance, epochs and, where there are any, arrays."""
        return json.loads(self.about)

    @property
    def epochs(self) -> pd.DataFrame:
        """One row an epoch."""
        return pd.DataFrame(self.columns)

    @property
    def count(self) -> int:
        """How many epochs it has."""
        return len(next(iter(self.columns.values()), ()))

    @property
    def has_arrays(self) -> bool:
        """Whether arrays belong to it and were not left out."""
        return self.content.get("arrays") is not None

    def check(self) -> None:
        """Raise ValueError where the numbers are not those that `about` was written for."""
        if digest(self.columns) != self.content["epochs"]:
            raise ValueError("its numbers do not match their checksum")

    def without_arrays(self) -> "Entry":
        """The same run, saying that its arrays were left out."""
        if not self.has_arrays:
            return self
        return Entry(self.run, json.dumps(self.content | {"arrays": None}), self.columns)

    def same_numbers(self, other: "Entry") -> bool:
        """Whether both hold the same numbers; the seconds an epoch took are none."""
        mine, others = self.columns, other.columns
        mine = {name: column for name, column in mine.items() if name != "seconds"}
        others = {name: column for name, column in others.items() if name != "seconds"}
        if self.has_arrays and other.has_arrays:
            same = self.content["arrays"] == other.content["arrays"]
        else:
            same = True
        return same and digest(mine) == digest(others)


def digest(columns: Mapping[str, np.ndarray]) -> str:
    """A checksum of columns of numbers: their names, types and bytes."""
    checksum = hashlib.sha256()
    for name, column in columns.items():
        column = np.ascontiguousarray(column)
        checksum.update(f"{name} {column.dtype.str} {column.shape}".encode())
        checksum.update(column.data)
    return checksum.hexdigest()


def text_digest(content: Mapping[str, Any]) -> str:
    """A checksum of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write(
    file: Any,
    entries: Iterable[Entry],
    arrays: Callable[[Entry], bytes | None] | None = None,
    signatures: Mapping[str, str] | None = None,
    compression: str = "zstd",
) -> None:
    """Write runs, in the order of their names, to a path or an open file.

    arrays: gives a run's npz file; None leaves all out, and says so in the file. A column whose
    type differs between runs has one that holds both. Raises ValueError on a column of epochs that
    is named as one of the file's own.
    """
    entries = sorted(entries, key=lambda entry: entry.run)
    if arrays is None and signatures is None:
        entries = [entry.without_arrays() for entry in entries]
    types: dict[str, np.dtype] = {}
    for entry in entries:
        for name, column in entry.columns.items():
            if name not in types or types[name] != column.dtype:
                types[name] = np.result_type(types.get(name, column.dtype), column.dtype)
    if clash := types.keys() & set(RESERVED):
        raise ValueError(f"a column of epochs cannot be named {', '.join(sorted(clash))}")
    fields = [pa.field("run", pa.string())]
    fields += [pa.field(name, pa.from_numpy_dtype(dtype)) for name, dtype in types.items()]
    fields += [pa.field(name, pa.string()) for name in ("about", "columns", "checksum")]
    if arrays is not None:
        fields.append(pa.field("arrays", pa.binary()))
    if signatures is not None:
        fields.append(pa.field("signature", pa.string()))
    schema = pa.schema(fields, {b"paperlib": b'{"pack": 1}'})
    size = GROUP if arrays is None else GROUP_WITH_ARRAYS
    with pq.ParquetWriter(file, schema, compression=compression) as writer:
        for start in range(0, len(entries), size):
            group = [entry for entry in entries[start : start + size] if entry.count]
            firsts = {
                "about": [entry.about for entry in group],
                "columns": [_types(entry) for entry in group],
                "checksum": [_checksum(entry.run, entry.about) for entry in group],
            }
            if arrays is not None:
                firsts["arrays"] = [arrays(entry) for entry in group]
            if signatures is not None:
                firsts["signature"] = [signatures[entry.run] for entry in group]
            writer.write_table(_table(group, types, firsts, schema))


def _table(
    group: list[Entry], types: Mapping[str, np.dtype], firsts: Mapping[str, list], schema: pa.Schema
) -> pa.Table:
    counts = np.array([entry.count for entry in group], int)
    which = np.repeat(np.arange(len(group)), counts)
    is_first = np.ones(len(which), bool)
    is_first[1:] = which[1:] != which[:-1]
    of_all, of_first = pa.array(which), pa.array(which, mask=~is_first)
    columns: dict[str, pa.Array] = {"run": pa.array([entry.run for entry in group]).take(of_all)}
    for name, dtype in types.items():
        there = np.array([name in entry.columns for entry in group], bool)
        parts = [
            entry.columns.get(name, np.zeros(count, dtype)).astype(dtype, copy=False)
            for entry, count in zip(group, counts, strict=True)
        ]
        mask = None if there.all() else ~there[which]
        columns[name] = pa.array(np.concatenate(parts), mask=mask)
    for name, values in firsts.items():
        columns[name] = pa.array(values, schema.field(name).type).take(of_first)
    return pa.table(columns, schema)


def _types(entry: Entry) -> str:
    return json.dumps({name: column.dtype.str for name, column in entry.columns.items()})


def _checksum(run: str, about: str) -> str:
    return hashlib.sha256(f"{run} {about}".encode()).hexdigest()


@dataclass
class Pack:
    """What a file holds: whole runs, and what is wrong with each of the others."""

    entries: dict[str, Entry] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)


def read(path: str | os.PathLike) -> Pack:
    """All of a file's runs, each checked. Raises one of `UNREADABLE` where it is no such file."""
    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    if missing := [name for name in ("run", "about", "columns", "checksum") if name not in names]:
        raise ValueError(f"it has no column {missing[0]}: not a file of runs")
    table = file.read(columns=[name for name in names if name != "arrays"])
    pack = Pack()
    for run, about, make, checksum, signature in _split(table):
        try:
            if _checksum(run, about) != checksum:
                raise ValueError("its configuration does not match its checksum")
            entry = make()
            entry.check()
        except UNREADABLE as error:
            pack.damaged[run] = str(error)
            continue
        pack.entries[run] = entry
        if signature is not None:
            pack.signatures[run] = signature
    return pack


def _split(table: pa.Table) -> Iterator[tuple[str, str, Callable[[], Entry], str, str | None]]:
    """Of each run: its name, `about`, what makes its Entry, `checksum`, and `signature` if any."""
    is_first = table["about"].is_valid().to_numpy()
    starts = np.flatnonzero(is_first)
    stops = np.append(starts[1:], len(is_first))
    firsts = [
        table[name].take(pa.array(starts)).to_pylist()
        if name in table.column_names
        else [None] * len(starts)
        for name in ("run", "about", "columns", "checksum", "signature")
    ]
    numbers = {}
    for name in table.column_names:
        if name not in RESERVED:
            column = table[name]
            numbers[name] = (column.fill_null(0) if column.null_count else column).to_numpy()

    @cache
    def types(columns: str) -> list[tuple[str, np.dtype]]:
        return [(name, np.dtype(kind)) for name, kind in json.loads(columns).items()]

    def entry(run: str, about: str, columns: str, rows: slice) -> Entry:
        mine = {name: numbers[name][rows].astype(t, copy=False) for name, t in types(columns)}
        return Entry(run, about, mine)

    for i, (run, about, columns, checksum, signature) in enumerate(zip(*firsts, strict=True)):
        rows = slice(starts[i], stops[i])
        yield run, about, partial(entry, run, about, columns, rows), checksum, signature


def read_arrays(path: str | os.PathLike, entry: Entry) -> bytes | None:
    """A run's npz file, checked, or None where it has none.

    Raises ValueError, or another of `UNREADABLE`, where it cannot be had.
    """
    if not entry.has_arrays:
        return None
    values = pq.read_table(path, columns=["arrays"], filters=[("run", "==", entry.run)])["arrays"]
    for content in values.drop_null().to_pylist():
        if hashlib.sha256(content).hexdigest() == entry.content["arrays"]:
            return content
    raise ValueError(f"the arrays of run {entry.run} do not match their checksum")
