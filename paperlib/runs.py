"""The run store: one record a run, found by the identity of its configuration.

    STORE/records/IDENTITY.parquet   one row an epoch; configuration and provenance in its metadata
    STORE/records/IDENTITY.npz       arrays measured in the run, where there are any
    STORE/failed/IDENTITY.json       why a run failed
    STORE/checkpoints/, claims/      unfinished runs: see `checkpoints` and `locks`
    STORE/progress/IDENTITY          how many epochs a run that is being done has behind it
    STORE/index.parquet              copies of many records, to open them quickly: see `Store`
    STORE/data/                      decoded images

Below it lies a layer that is only read: the files of many runs in results/ (`results_path`). A run
that is not in records/, or damaged there, is looked up in these.

A file is written under another name and then renamed, so a record is whole or it is not there; the
arrays go first. The record holds checksums of both. Reading imports no torch.
"""

import hashlib
import io
import json
import os
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from paperlib import instability, packs
from paperlib.config import Config, ConfigError, from_dict, to_dict
from paperlib.packs import UNREADABLE, Entry

_METADATA = b"paperlib"
INDEXED = 64  # so many records that are not in the index yet are worth writing it anew
SETTLED = 2_000_000_000  # nanoseconds; a file may change again within one tick of its clock


class StoreError(RuntimeError):
    """A run store that cannot be read or written."""


class DamagedRecord(StoreError):
    """A record that is there but cannot be trusted; the message names its file."""


@dataclass
class RunRecord:
    """One finished run.

    epochs: one row an epoch, columns as `instability.summarize` takes them, and train_loss,
    test_loss, learning_rate, seconds. arrays: what was measured in the run, by name. provenance:
    versions, device, commit and the like.
    """

    config: Config
    epochs: pd.DataFrame
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    provenance: dict[str, object] = field(default_factory=dict)

    @property
    def run(self) -> str:
        return self.config.identity

    @property
    def parameters(self) -> float:
        """How many parameters are left at the end: all less those held at zero; NaN if unknown."""
        return parameters_left(self.provenance)

    def summary(self) -> pd.Series:
        """The run's row of `instability.summarize`."""
        return instability.summarize(self.epochs.assign(run=self.run)).iloc[0]


def default_path() -> Path:
    """PAPERLIB_RUNS, or `runs` in the checkout the working directory lies in, or in that itself."""
    return _beside_notebooks("PAPERLIB_RUNS", "runs")


def figures_path() -> Path:
    """PAPERLIB_FIGURES, or `figures` in the checkout the working directory lies in, or in that."""
    return _beside_notebooks("PAPERLIB_FIGURES", "figures")


def results_path() -> Path | None:
    """PAPERLIB_RESULTS, or `results` in the checkout, as above or the package's; None without."""
    if os.environ.get("PAPERLIB_RESULTS"):
        return Path(os.environ["PAPERLIB_RESULTS"])
    beside = _beside_notebooks("PAPERLIB_RESULTS", "results")
    there = [path for path in (beside, Path(__file__).parents[1] / "results") if path.is_dir()]
    return there[0] if there else None


def _beside_notebooks(variable: str, name: str) -> Path:
    if os.environ.get(variable):
        return Path(os.environ[variable])
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "notebooks").is_dir() and (folder / "paperlib").is_dir():
            return folder / name
    return here / name


class Store:
    """A folder of run records; see the module's docstring for its layout.

    results: the folder of the layer below, `results_path()` where None is given.

    Every record is checked against its checksums before its numbers are used. The index holds
    copies of records that were found whole, and stands for a record as long as the record's files
    have the size, times and inode they had then. It may be deleted at any time; damaged, it is
    written anew; and whoever writes it last loses nobody anything but time.
    """

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        results: str | os.PathLike | None = None,
    ) -> None:
        self.path = Path(path) if path is not None else default_path()
        self.results = Path(results) if results is not None else results_path()
        self._known: dict[str, tuple[str, Entry]] = {}
        self._index_read = ""

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    def __contains__(self, run: str) -> bool:
        """Whether a run's record is there and can be read, whole."""
        return run in self.whole([run])

    def whole(self, runs: Iterable[str]) -> set[str]:
        """Those of `runs` whose records are there and can be read, whole."""
        return {run for run, found in self.find(runs).items() if isinstance(found, Entry)}

    def check_writable(self) -> None:
        """Raise StoreError where records cannot be written here."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path) as file:
                file.write(bytes(4096))
                file.flush()
        except OSError as error:
            raise StoreError(f"cannot write to the run store {self.path}: {error}") from error

    def write(self, record: RunRecord) -> None:
        """Write a record, whole or not at all; an older failure of the run is forgotten.

        Raises StoreError where it cannot be written, or where a better record of the run is there:
        one of more epochs, or with arrays that this one lacks.
        """
        columns = {name: record.epochs[name].to_numpy() for name in record.epochs}
        content = {
            "config": to_dict(record.config),
            "provenance": record.provenance,
            "epochs": packs.digest(columns),
            "about": packs.text_digest(record.provenance),
        }
        arrays = None
        if record.arrays:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **record.arrays)
            arrays = buffer.getvalue()
            content["arrays"] = hashlib.sha256(arrays).hexdigest()
        entry = Entry(record.run, json.dumps(content), columns)
        there = self.find([record.run]).get(record.run)
        if isinstance(there, Entry) and _worth(entry) < _worth(there):
            raise StoreError(f"a better record of run {record.run} is in {self.path} already")
        self.put(entry, arrays)

    def put(self, entry: Entry, arrays: bytes | None) -> None:
        """Write a record's files in place of those that are there. Raises StoreError."""
        if arrays is not None:
            write_whole(self._arrays_file(entry.run), arrays)
        table = pa.table(entry.columns).replace_schema_metadata({_METADATA: entry.about})
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        write_whole(self._file(entry.run), sink.getvalue())
        self._failed_file(entry.run).unlink(missing_ok=True)

    def add(self, entry: Entry, arrays: bytes | None) -> str:
        """Take over a run of another store; never in place of a better or a different one.

        Returns what became of it: "new", "mended" (ours was damaged), "better" (ours was shorter,
        or without its arrays), "same" or, with other numbers than ours, "different".
        """
        ours = self.find([entry.run]).get(entry.run)
        if ours is None or isinstance(ours, DamagedRecord):
            self.put(entry, arrays)
            return "new" if ours is None else "mended"
        if entry.count == ours.count and not entry.same_numbers(ours):
            return "different"
        if _worth(entry) > _worth(ours):
            self.put(entry, arrays)
            return "better"
        return "same" if entry.count == ours.count else "shorter"

    def read(self, run: str) -> RunRecord:
        """One record. Raises KeyError where there is none, DamagedRecord where it is not whole."""
        entry = self.find([run]).get(run)
        if entry is None:
            raise KeyError(f"no run {run} in {self.path}")
        if isinstance(entry, DamagedRecord):
            raise entry
        content = entry.content
        arrays = {}
        if entry.has_arrays:
            with np.load(io.BytesIO(self.arrays(entry)), allow_pickle=False) as stored:
                arrays = dict(stored)
        elif "arrays" in content:
            arrays = _LeftOut(run)
        return RunRecord(from_dict(content["config"]), entry.epochs, arrays, content["provenance"])

    def arrays(self, entry: Entry) -> bytes | None:
        """A run's npz file, checked, or None where it has none. Raises DamagedRecord."""
        if not entry.has_arrays:
            return None
        checksum = entry.content["arrays"]
        problem = None
        try:
            content = self._arrays_file(entry.run).read_bytes()
            if hashlib.sha256(content).hexdigest() == checksum:
                return content
            problem = f"{self._arrays_file(entry.run)} does not match its record"
        except OSError as error:
            problem = f"{self._arrays_file(entry.run)}: {error}"
        for path, pack in self._layer():
            if entry.run in pack.entries:
                try:
                    return packs.read_arrays(path, entry)
                except UNREADABLE as error:
                    problem = f"{path}: {error}"
        raise DamagedRecord(problem)

    def fail(self, config: Config, error: BaseException | str) -> None:
        """Record that a run failed, and why."""
        content = {"config": to_dict(config), "error": str(error)}
        write_whole(self._failed_file(config.identity), json.dumps(content, indent=1).encode())

    def failure(self, run: str) -> str | None:
        """Why a run failed, or None."""
        try:
            return json.loads(self._failed_file(run).read_text())["error"]
        except FileNotFoundError:
            return None
        except (*UNREADABLE, NotADirectoryError):
            return "the note of this failure is damaged"

    def failures(self) -> dict[str, str]:
        """Why each run failed that did."""
        runs = sorted(path.stem for path in (self.path / "failed").glob("[!.]*.json"))
        return {run: self.failure(run) for run in runs}

    def identities(self) -> list[str]:
        """Of all runs that have a record here or in the layer below, damaged ones too."""
        below = {run for _, pack in self._layer() for run in pack.entries}
        return sorted(below.union(self.own()))

    def own(self) -> list[str]:
        """Of all runs that have a record in the store itself, damaged ones too."""
        try:
            names = os.listdir(self.path / "records")
        except (FileNotFoundError, NotADirectoryError):
            return []
        kind = ".parquet"
        return sorted(n.removesuffix(kind) for n in names if n.endswith(kind) and n[0] != ".")

    def records(self, runs: Iterable[str] | None = None) -> list[RunRecord]:
        """The records of `runs`, or all there are."""
        return [self.read(run) for run in (self.identities() if runs is None else runs)]

    def epochs(self, runs: Iterable[str] | None = None) -> pd.DataFrame:
        """One row an epoch of each run, keyed by `run`."""
        return epochs_frame(self.entries(runs))

    def runs(self, runs: Iterable[str] | None = None) -> pd.DataFrame:
        """One row a run: its summary and its configuration, keyed by `run`."""
        return self.frames(runs)[1]

    def frames(self, runs: Iterable[str] | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
        """`epochs` and `runs`."""
        entries = self.entries(runs)
        epochs = epochs_frame(entries)
        return epochs, runs_frame(entries, epochs)

    def entries(self, runs: Iterable[str] | None = None) -> list[Entry]:
        """The runs' records but for their arrays. Raises KeyError and DamagedRecord as `read`."""
        runs = self.identities() if runs is None else list(runs)
        found = self.find(runs)
        for run in runs:
            if run not in found:
                raise KeyError(f"no run {run} in {self.path}")
            if isinstance(found[run], DamagedRecord):
                raise found[run]
        return [found[run] for run in runs]

    def find(self, runs: Iterable[str]) -> dict[str, Entry | DamagedRecord]:
        """What there is of `runs`: a whole record but for its arrays, or what is wrong with it.

        Runs that have no record are left out. Each record, its arrays too, is checked, or was and
        has not changed since.
        """
        runs = list(dict.fromkeys(runs))
        if len(runs) >= INDEXED:
            self._read_index()
        found: dict[str, Entry | DamagedRecord] = {}
        new = 0
        for run in runs:
            signature = self._signature(run)
            if not signature:
                continue
            known = self._known.get(run)
            if known is not None and known[0] == signature:
                found[run] = known[1]
                continue
            try:
                entry = self._read_file(run)
            except FileNotFoundError:
                continue
            except DamagedRecord as error:
                found[run] = error
                continue
            found[run] = entry
            if signature == self._signature(run) and _settled(signature):
                self._known[run] = (signature, entry)
                new += 1
        if new >= INDEXED:
            self._write_index()
        if any(not isinstance(found.get(run), Entry) for run in runs):
            for _, pack in self._layer():
                for run in runs:
                    if run in pack.entries and not isinstance(found.get(run), Entry):
                        found[run] = pack.entries[run]
        return {run: found[run] for run in runs if run in found}

    def _read_file(self, run: str) -> Entry:
        """A record of the store itself, checked, its arrays too."""
        path = self._file(run)
        try:
            content = path.read_bytes()
            file = pq.ParquetFile(pa.BufferReader(content))
            about = file.schema_arrow.metadata[_METADATA].decode()
            if from_dict(json.loads(about)["config"]).identity != run:
                raise ValueError("it holds another run")
            table = file.read()
            entry = Entry(run, about, {n: table[n].to_numpy() for n in table.column_names})
            entry.check()
            # Older records have none.
            provenance = packs.text_digest(entry.content["provenance"])
            if entry.content.get("about", provenance) != provenance:
                raise ValueError("its provenance does not match its checksum")
            if entry.has_arrays:
                arrays = self._arrays_file(run).read_bytes()
                if hashlib.sha256(arrays).hexdigest() != entry.content["arrays"]:
                    raise ValueError(f"{self._arrays_file(run)} does not match its record")
        except (*UNREADABLE, AttributeError, ConfigError) as error:
            if isinstance(error, FileNotFoundError) and not path.exists():
                raise
            raise DamagedRecord(f"{path} is not a whole record: {error}") from error
        return entry

    def _signature(self, run: str) -> str:
        """What changes with a record's files; empty where there is no record."""
        folder = f"{self.path}{os.sep}records{os.sep}{run}"
        record = _stamp(f"{folder}.parquet")
        return record and f"{record}, {_stamp(f'{folder}.npz')}"

    @property
    def _index_file(self) -> Path:
        return self.path / "index.parquet"

    def _read_index(self) -> None:
        stamp = _stamp(self._index_file)
        if stamp in ("", self._index_read):
            return
        self._index_read = stamp
        try:
            pack = packs.read(self._index_file)
        except UNREADABLE:
            return  # it will be written anew
        for run, signature in pack.signatures.items():
            self._known[run] = (signature, pack.entries[run])

    def _write_index(self) -> None:
        valid = {
            run: known for run, known in self._known.items() if self._signature(run) == known[0]
        }
        entries = [entry for _, entry in valid.values()]
        signatures = {run: signature for run, (signature, _) in valid.items()}
        sink = io.BytesIO()
        packs.write(sink, entries, signatures=signatures, compression="none")
        try:
            write_whole(self._index_file, sink.getvalue())
        except StoreError:
            return  # a store that is only read has none
        self._index_read = _stamp(self._index_file)

    def _layer(self) -> list[tuple[Path, packs.Pack]]:
        """The files of the layer below, as far as they are whole; warns of what is not."""
        if self.results is None:
            return []
        return [(path, _pack(path)) for path in sorted(self.results.glob("*.parquet"))]

    def _file(self, run: str) -> Path:
        return self.path / "records" / f"{run}.parquet"

    def _arrays_file(self, run: str) -> Path:
        return self.path / "records" / f"{run}.npz"

    def _failed_file(self, run: str) -> Path:
        return self.path / "failed" / f"{run}.json"


class _LeftOut(dict):
    """The arrays of a run that came without: asking for one says so."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self.run = run

    def __missing__(self, name: str) -> np.ndarray:
        raise StoreError(f"the arrays of run {self.run} were left out when it was exported")


def _worth(entry: Entry) -> tuple[int, bool]:
    return entry.count, entry.has_arrays


def _settled(signature: str) -> bool:
    """Whether files are old enough for a change to show in their times."""
    times = [int(time) for part in signature.split(", ") for time in part.split()[1:3]]
    return max(times) < time.time_ns() - SETTLED


def _stamp(path: str | os.PathLike) -> str:
    """What changes with a file; empty where there is none."""
    try:
        about = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    return f"{about.st_size} {about.st_mtime_ns} {about.st_ctime_ns} {about.st_ino}"


_packs: dict[Path, tuple[str, packs.Pack]] = {}


def _pack(path: Path) -> packs.Pack:
    """A file of results, read once a process as long as it does not change."""
    stamp = _stamp(path)
    if path in _packs and _packs[path][0] == stamp:
        return _packs[path][1]
    try:
        pack = packs.read(path)
    except UNREADABLE as error:
        warnings.warn(f"{path} cannot be read and is left out: {error}", stacklevel=2)
        pack = packs.Pack()
    for run, problem in pack.damaged.items():
        warnings.warn(f"{path}: run {run} is damaged and left out: {problem}", stacklevel=2)
    _packs[path] = (stamp, pack)
    return pack


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


def epochs_frame(entries: Iterable[Entry]) -> pd.DataFrame:
    """The epochs of all runs in one frame, keyed by `run`."""
    entries = list(entries)
    if not entries:
        return pd.DataFrame({"run": []})
    kinds = {tuple((n, c.dtype) for n, c in entry.columns.items()) for entry in entries}
    if len(kinds) > 1:
        frames = [entry.epochs.assign(run=entry.run) for entry in entries]
        return pd.concat(frames, ignore_index=True)
    names = [name for name, _ in kinds.pop()]
    columns = {name: np.concatenate([e.columns[name] for e in entries]) for name in names}
    runs = pd.Series([entry.run for entry in entries])
    rows = np.repeat(np.arange(len(entries)), [entry.count for entry in entries])
    return pd.DataFrame(columns).assign(run=runs.take(rows).array)


def runs_frame(entries: Iterable[Entry], epochs: pd.DataFrame) -> pd.DataFrame:
    """One row a run: its summary, from `epochs_frame`, then its configuration and device."""
    entries = list(entries)
    if not entries:
        return pd.DataFrame({"run": []})
    plain = ("data", "model", "width", "optimizer", "learning_rate", "epochs", "precision", "seed")
    default = {field.name: field.default for field in fields(Config) if field.name in plain}
    rows = []
    for entry in entries:
        config, about = entry.content["config"], entry.content["provenance"]
        rows.append(
            {"run": entry.run}
            | {name: config.get(name, default[name]) for name in plain}
            | {"device": about.get("device"), "parameters": parameters_left(about)}
        )
    about = pd.DataFrame(rows)
    return about[["run"]].merge(instability.summarize(epochs)).merge(about)


def parameters_left(provenance: dict[str, object]) -> float:
    """How many parameters are left at the end: all less those held at zero; NaN if unknown."""
    return provenance.get("parameters", np.nan) - provenance.get("held", 0)
