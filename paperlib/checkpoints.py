"""What an unfinished run goes on from: all that its further numbers hang on, at an epoch's end.

    STORE/checkpoints/IDENTITY.safetensors

Weights and buffers, the optimizer's and the pruner's state, the rows and arrays so far are its
tensors; a description (`describe`) and a checksum of everything its metadata. What is random needs
no state: every stream is drawn anew at each epoch's start (see `training`). On a CPU, with as many
threads, a run that goes on from here ends with the same numbers, bit for bit, as one never stopped.
So a network may keep state in parameters and buffers only.

The file is written whole, under another name first. It goes when the run's record is written.
Reading a description imports no torch.
"""

import hashlib
import io
import json
import math
import os
import struct
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paperlib.config import Config, ConfigError, from_dict, to_dict
from paperlib.locks import Claim, Claimed
from paperlib.provenance import version
from paperlib.runs import write_whole

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

# To be raised whenever the same configuration gives other numbers, or the file another meaning.
VERSION = 3
SECONDS = 10.0
SHARE = 0.02
_HEADER_LIMIT = 100_000_000


class Stopped(RuntimeError):
    """A run whose time was up; it goes on from its checkpoint when it is begun again."""


class UnusableCheckpoint(RuntimeError):
    """A checkpoint that a run cannot go on from; the message says why."""


def file(store: str | os.PathLike, run: str) -> Path:
    """Where a run's checkpoint lies, or would, in the store at path `store`."""
    return Path(store) / "checkpoints" / f"{run}.safetensors"


def describe(store: str | os.PathLike, run: str) -> dict | None:
    """The description of a run's checkpoint; None where there is none that can be read.

    run, config, epochs (how many are done), seconds (spent on them), device, threads, earlier
    (the same of processes it went on from), data and source (checksums, or None), version,
    paperlib, torch. Only the file's head is read, and nothing verified.
    """
    try:
        with file(store, run).open("rb") as content:
            return dict(json.loads(_metadata(content.read)["paperlib"]))
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None


def progress(store: str | os.PathLike, run: str) -> int | None:
    """How many epochs of an unfinished run are done, by its checkpoint; None without one."""
    epochs = (describe(store, run) or {}).get("epochs")
    return epochs if isinstance(epochs, int) else None


def discard(store: str | os.PathLike, run: str) -> None:
    """Remove a run's checkpoint, where there is one, and what was set aside or left half-written.

    What cannot be removed stays: a store may be read-only.
    """
    path = file(store, run)
    for left in (*path.parent.glob(f"{run}.*"), *path.parent.glob(f".{run}.*")):
        with suppress(OSError):
            left.unlink(missing_ok=True)


class Checkpoint:
    """The checkpoint of one run: restored at its start, written when it is worth it.

    Args:
        store: the store's path.
        config: the run's configuration.
        claim: its `check` is called before anything is written.
        data: the checksum of the run's images.
        source: the checksum of the code of a score or network that the configuration names.
            A checkpoint made with another data or source is not restored; None is not compared.
        until: when the run has to stop, by `time.time`.
    """

    def __init__(
        self,
        store: str | os.PathLike,
        config: Config,
        claim: Claim,
        *,
        data: str | None = None,
        source: str | None = None,
        until: float = math.inf,
    ) -> None:
        self.path, self.config, self.claim = file(store, config.identity), config, claim
        self.until = until
        self.checksums = {"data": data, "source": source}
        self.earlier: list[dict] = []
        self._usable = True
        self._cost, self._since = 0.0, time.monotonic()

    def restore(
        self, model: "nn.Module", optimizer: "Optimizer", pruner: Any
    ) -> tuple[list[dict], dict[str, np.ndarray]] | None:
        """Bring all three, made anew, to where the run was; returns its rows and arrays so far.

        None without a checkpoint: all stays as it is. Raises UnusableCheckpoint where the file is
        damaged, or of another configuration, version, data or source; the three are then of no use.
        """
        if not self._usable:
            return None
        for half_written in self.path.parent.glob(f".{self.path.name}.*"):
            half_written.unlink(missing_ok=True)
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UnusableCheckpoint(f"it cannot be read: {error}") from error
        about, tensors = self._verified(content)
        try:
            if pruner is not None:
                # First: holding what is pruned may add buffers, the keep of a residual sum.
                pruner.load_state_dict(_under("pruner", tensors))
            _fill(_state(model), _under("model", tensors))
            _fill_optimizer(optimizer, model, _under("optimizer", tensors))
            columns = [tensors[f"row.{name}"].tolist() for name in about["columns"]]
            rows = [
                dict(zip(about["columns"], row, strict=True)) for row in zip(*columns, strict=True)
            ]
            with np.load(io.BytesIO(tensors["arrays"].numpy().tobytes())) as stored:
                arrays = dict(stored)
            part = {name: about[name] for name in ("epochs", "device", "threads")}
            self.earlier = [*about["earlier"], part]
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise UnusableCheckpoint(f"its state does not fit: {error!r}") from error
        return rows, arrays

    def set_aside(self, reason: Exception) -> None:
        """Rename the file and warn: the run starts afresh."""
        aside = self.path.with_name(f"{self.config.identity}.damaged.safetensors")
        self.claim.check()
        self._usable = False
        try:
            os.replace(self.path, aside)
            what = f"is set aside as {aside.name}"
        except OSError as error:
            what = f"cannot be set aside ({error})"
        warnings.warn(
            f"{self.path} {what}, and {self.config.title} starts afresh: {reason}", stacklevel=2
        )

    def save_when_due(
        self,
        model: "nn.Module",
        optimizer: "Optimizer",
        pruner: Any,
        rows: list[dict],
        arrays: dict[str, np.ndarray],
        measured: float = 0.0,
    ) -> None:
        """At an epoch's end, `save` where that is worth its time.

        It is due once `SECONDS` have gone since the last one, and so many that writing takes no
        more than a `SHARE` of the time; and after a measurement that took `measured` seconds, once
        that is `SECONDS`. A checkpoint that cannot be written, as on a full disk, is a warning:
        the run goes on, and the one before stays. Raises Stopped, after it, where the time is up.
        """
        start, stops = time.monotonic(), time.time() >= self.until
        due = start - self._since >= max(SECONDS, self._cost / SHARE) or measured >= SECONDS
        if not (due or stops):
            return
        try:
            self.save(model, optimizer, pruner, rows, arrays)
        except Claimed:
            raise
        except Exception as error:
            warnings.warn(f"{self.config.title} goes on without: {error}", stacklevel=2)
        self._since = time.monotonic()
        self._cost = self._since - start
        if stops:
            raise Stopped(f"the time of {self.config.title} was up after {len(rows)} epochs")

    def save(
        self,
        model: "nn.Module",
        optimizer: "Optimizer",
        pruner: Any,
        rows: list[dict],
        arrays: dict[str, np.ndarray],
    ) -> None:
        """Write the run's state after `len(rows)` epochs.

        Raises StoreError where it cannot, and `locks.Lost` where the run is another process's.
        """
        import torch
        from safetensors.torch import save

        names = {parameter: name for name, parameter in model.named_parameters()}
        parts = {
            "model": _state(model),
            "pruner": pruner.state_dict() if pruner is not None else {},
            "optimizer": {
                f"{key}.{names[parameter]}": value
                for parameter, state in optimizer.state.items()
                for key, value in state.items()
                if value is not None
            },
            "row": {
                name: torch.from_numpy(np.array([row[name] for row in rows])) for name in rows[0]
            },
        }
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        tensors = {"arrays": torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)}
        for part, of_part in parts.items():
            for name, tensor in of_part.items():
                tensors[f"{part}.{name}"] = torch.empty(
                    tensor.shape, dtype=tensor.dtype, device="cpu"
                ).copy_(tensor.detach())
        about = (
            _versions()
            | {
                "run": self.config.identity,
                "config": to_dict(self.config),
                "epochs": len(rows),
                "seconds": sum(row["seconds"] for row in rows),
                "columns": list(rows[0]),
                "device": next(model.parameters()).device.type,
                "threads": torch.get_num_threads(),
                "earlier": self.earlier,
            }
            | self.checksums
        )
        description = json.dumps(about)
        metadata = {"paperlib": description, "checksum": _checksum(description, tensors)}
        content = save(tensors, metadata)
        self.claim.check()
        write_whole(self.path, content)

    def _verified(self, content: bytes) -> tuple[dict, "dict[str, Tensor]"]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            metadata = _metadata(io.BytesIO(content).read)
            tensors = load(content)
            whole = _checksum(metadata["paperlib"], tensors) == metadata["checksum"]
            about = json.loads(metadata["paperlib"])
        except (ValueError, KeyError, TypeError, struct.error, SafetensorError) as error:
            raise UnusableCheckpoint(f"it is damaged: {error}") from error
        if not whole:
            raise UnusableCheckpoint("it is damaged: its content does not match its checksum")
        for name, ours in _versions().items():
            if about[name] != ours:
                what = "the format" if name == "version" else name
                raise UnusableCheckpoint(f"it is of {what} {about[name]}, and this is {ours}")
        try:
            run = from_dict(about["config"]).identity
        except ConfigError as error:
            raise UnusableCheckpoint(f"it is of another version: {error}") from error
        if run != self.config.identity:
            raise UnusableCheckpoint(f"it is of another configuration, {run}")
        for name, ours in self.checksums.items():
            if ours is not None and about[name] != ours:
                raise UnusableCheckpoint(
                    f"it was made with {name} of checksum {about[name]}, and this has {ours}"
                )
        return about, tensors


def _versions() -> dict[str, object]:
    return {"version": VERSION, "paperlib": version("paperlib"), "torch": version("torch")}


def _metadata(read) -> dict[str, str]:
    """The metadata of a safetensors file: 8 bytes say how long the JSON is that follows them."""
    (length,) = struct.unpack("<Q", read(8))
    if length > _HEADER_LIMIT:
        raise ValueError(f"a header of {length} bytes")
    return json.loads(read(length))["__metadata__"]


def _checksum(description: str, tensors: "dict[str, Tensor]") -> str:
    import torch

    digest = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _under(part: str, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    prefix = f"{part}."
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _state(model: "nn.Module") -> "dict[str, Tensor]":
    """Parameters and all buffers, those too that state_dict leaves out."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _fill(tensors: "dict[str, Tensor]", stored: "dict[str, Tensor]") -> None:
    """Copy into tensors that are there: their memory format stays."""
    import torch

    if tensors.keys() != stored.keys():
        raise ValueError(f"tensors differ: {sorted(tensors.keys() ^ stored.keys())}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.shape != stored[name].shape or tensor.dtype != stored[name].dtype:
                raise ValueError(f"{name} has another shape or type")
            tensor.copy_(stored[name])


def _fill_optimizer(
    optimizer: "Optimizer", model: "nn.Module", stored: "dict[str, Tensor]"
) -> None:
    """Not by the optimizer's own method, which gives its averages another memory format.

    Fused optimizers go through parameter and averages in order of memory, so these must agree.
    """
    import torch

    parameters = dict(model.named_parameters())
    for name, value in stored.items():
        key, _, parameter_name = name.partition(".")
        parameter = parameters[parameter_name]
        if value.shape == parameter.shape:
            new = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        else:
            new = value.to(parameter.device, copy=True)
        optimizer.state[parameter][key] = new
