"""The run store: one record a run, found by the identity of its configuration.

    STORE/records/IDENTITY.parquet   one row an epoch; configuration and provenance in its metadata
    STORE/records/IDENTITY.npz       arrays measured in the run, where there are any
    STORE/failed/IDENTITY.json       why a run failed
    STORE/checkpoints/, claims/      unfinished runs: see `checkpoints` and `locks`
    STORE/data/                      decoded images

A file is written under another name and then renamed, so a record is whole or it is not there; the
arrays go first. The record holds checksums of both. Reading imports no torch.
"""

import hashlib
import io
import json
import os
import tempfile
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from paperlib import instability
from paperlib.config import Config, ConfigError, from_dict, to_dict

_METADATA = b"paperlib"


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
        counted = self.provenance
        return counted.get("parameters", np.nan) - counted.get("held", 0)

    def summary(self) -> pd.Series:
        """The run's row of `instability.summarize`."""
        return instability.summarize(self.epochs.assign(run=self.run)).iloc[0]


def default_path() -> Path:
    """PAPERLIB_RUNS, or `runs` in the checkout the working directory lies in, or in that itself."""
    return _beside_notebooks("PAPERLIB_RUNS", "runs")


def figures_path() -> Path:
    """PAPERLIB_FIGURES, or `figures` in the checkout the working directory lies in, or in that."""
    return _beside_notebooks("PAPERLIB_FIGURES", "figures")


def _beside_notebooks(variable: str, name: str) -> Path:
    if os.environ.get(variable):
        return Path(os.environ[variable])
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "notebooks").is_dir() and (folder / "paperlib").is_dir():
            return folder / name
    return here / name


class Store:
    """A folder of run records; see the module's docstring for its layout."""

    def __init__(self, path: str | os.PathLike | None = None) -> None:
        self.path = Path(path) if path is not None else default_path()

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    def __contains__(self, run: str) -> bool:
        """Whether a run's record is there and can be read, whole."""
        try:
            self.read(run)
        except (KeyError, DamagedRecord):
            return False
        return True

    def check_writable(self) -> None:
        """Raise StoreError where records cannot be written here."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise StoreError(f"cannot write to the run store {self.path}: {error}") from error

    def write(self, record: RunRecord) -> None:
        """Write a record, whole or not at all; an older failure of the run is forgotten."""
        content = {
            "config": to_dict(record.config),
            "provenance": record.provenance,
            "epochs": _digest(record.epochs),
        }
        if record.arrays:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **record.arrays)
            content["arrays"] = hashlib.sha256(buffer.getvalue()).hexdigest()
            write_whole(self._arrays_file(record.run), buffer.getvalue())
        table = pa.Table.from_pandas(record.epochs, preserve_index=False)
        table = table.replace_schema_metadata({_METADATA: json.dumps(content)})
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        write_whole(self._file(record.run), sink.getvalue())
        self._failed_file(record.run).unlink(missing_ok=True)

    def read(self, run: str) -> RunRecord:
        """One record. Raises KeyError where there is none, DamagedRecord where it is not whole."""
        content = self._metadata(run)
        if content is None:
            raise KeyError(f"no run {run} in {self.path}")
        try:
            config = from_dict(content["config"])
            epochs = pq.read_table(self._file(run)).to_pandas()
            if _digest(epochs) != content["epochs"]:
                raise ValueError("its numbers do not match their checksum")
            arrays = self._arrays(run, content.get("arrays"))
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise DamagedRecord(f"{self._file(run)}: {error}") from error
        return RunRecord(config, epochs, arrays, content["provenance"])

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
        except (ValueError, KeyError, OSError):
            return "the note of this failure is damaged"

    def identities(self) -> list[str]:
        """Of all runs that have a record here, damaged ones too."""
        return sorted(path.stem for path in (self.path / "records").glob("*.parquet"))

    def records(self, runs: Iterable[str] | None = None) -> list[RunRecord]:
        """The records of `runs`, or all there are."""
        return [self.read(run) for run in (self.identities() if runs is None else runs)]

    def epochs(self, runs: Iterable[str] | None = None) -> pd.DataFrame:
        """One row an epoch of each run, keyed by `run`."""
        return epochs_frame(self.records(runs))

    def runs(self, runs: Iterable[str] | None = None) -> pd.DataFrame:
        """One row a run: its summary and its configuration, keyed by `run`."""
        return runs_frame(self.records(runs))

    def _file(self, run: str) -> Path:
        return self.path / "records" / f"{run}.parquet"

    def _arrays_file(self, run: str) -> Path:
        return self.path / "records" / f"{run}.npz"

    def _failed_file(self, run: str) -> Path:
        return self.path / "failed" / f"{run}.json"

    def _metadata(self, run: str) -> dict | None:
        path = self._file(run)
        if not path.exists():
            return None
        try:
            content = json.loads(pq.read_schema(path).metadata[_METADATA])
            if from_dict(content["config"]).identity != run:
                raise DamagedRecord(f"{path} holds another run")
        except (OSError, ValueError, KeyError, TypeError, ConfigError, pa.ArrowException) as error:
            raise DamagedRecord(f"{path} is not a whole record: {error}") from error
        return content

    def _arrays(self, run: str, checksum: str | None) -> dict[str, np.ndarray]:
        if checksum is None:
            return {}
        content = self._arrays_file(run).read_bytes()
        if hashlib.sha256(content).hexdigest() != checksum:
            raise ValueError(f"{self._arrays_file(run)} does not match its record")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)


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


def _digest(frame: pd.DataFrame) -> str:
    """A checksum of a frame of numbers: names, types and bytes of its columns."""
    digest = hashlib.sha256()
    for name in frame:
        column = np.ascontiguousarray(frame[name])
        digest.update(f"{name} {column.dtype.str} {column.shape}".encode())
        digest.update(column.tobytes())
    return digest.hexdigest()


def epochs_frame(records: Iterable[RunRecord]) -> pd.DataFrame:
    """The epochs of all records in one frame, keyed by `run`."""
    frames = [record.epochs.assign(run=record.run) for record in records]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({"run": []})


def runs_frame(records: Iterable[RunRecord]) -> pd.DataFrame:
    """One row a record: the run's summary, then its configuration and device."""
    records = list(records)
    if not records:
        return pd.DataFrame({"run": []})
    plain = ("data", "model", "width", "optimizer", "learning_rate", "epochs", "precision", "seed")
    about = pd.DataFrame(
        [
            {"run": r.run}
            | {name: getattr(r.config, name) for name in plain}
            | {"device": r.provenance.get("device"), "parameters": r.parameters}
            for r in records
        ]
    )
    summaries = instability.summarize(epochs_frame(records))
    return about[["run"]].merge(summaries).merge(about)
