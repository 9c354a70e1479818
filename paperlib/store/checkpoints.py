"""Checkpoints: everything needed to resume a run bit for bit, at an epoch's end.

    STORE/checkpoints/IDENTITY.safetensors

The file's tensors are weights and buffers, the state of optimizer and pruner, and the rows and
arrays so far. Its metadata is a description (`describe`) and a checksum of everything. Random
streams need no state: each is drawn anew at each epoch's start (see `training`). A network may keep
state in parameters and buffers only. On a CPU, with the same number of threads, a resumed run ends
with the same numbers as one that was never stopped.

The file is written whole, under a temporary name first. It is removed when the run's record is
written. Reading a description imports no torch.
"""

import hashlib
import io
import json
import math
import os
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from paperlib.config import Config, to_dict
from paperlib.store.lease import Claim, Claimed
from paperlib.store.provenance import version
from paperlib.store.records import write_whole

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

Rows = list[dict]
Arrays = dict[str, np.ndarray]
# To be raised if the same configuration gives other numbers, or the file gets another meaning.
VERSION = 3
SECONDS = 10.0
SHARE = 0.02


class Stopped(RuntimeError):
    """A run's time was up; it resumes from its checkpoint the next time."""


class UnusableCheckpoint(RuntimeError):
    """A run cannot resume from this checkpoint; the message says why."""


def file(store: str | os.PathLike, run: str) -> Path:
    """Return the place of a run's checkpoint in the store at path `store`."""
    return Path(store) / "checkpoints" / f"{run}.safetensors"


def describe(store: str | os.PathLike, run: str) -> dict | None:
    """Return the description of a run's checkpoint; None if there is none that can be read.

    Only the file's head is read. Nothing is verified.

    Returns:
        run, config, epochs (the number done), seconds (spent on them), device, threads, earlier
        (the same of the processes that it was resumed from), data and source (checksums, or None),
        version, paperlib, torch.
    """
    try:
        with safe_open(file(store, run), "numpy") as content:
            return dict(json.loads(content.metadata()["paperlib"]))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def progress(store: str | os.PathLike, run: str) -> int | None:
    """Return the number of epochs done by a run's checkpoint; None without one."""
    return (describe(store, run) or {}).get("epochs")


def discard(store: str | os.PathLike, run: str) -> None:
    """Remove a run's checkpoint, and any that was set aside or left half-written.

    In a store that is read-only they stay.
    """
    folder = file(store, run).parent
    for left in (*folder.glob(f"{run}.*"), *folder.glob(f".{run}.*")):
        with suppress(OSError):
            left.unlink(missing_ok=True)


class Checkpoint:
    """The checkpoint of one run: restored at its start, written when that is worth its time.

    Args:
        store: The store's path.
        config: The run's configuration.
        claim: Its `check` is called before anything is written.
        data: The checksum of the run's images.
        source: The checksum of the code of a score or network that the configuration names. A
            checkpoint of another data or source is not restored. None is not compared.
        until: When the run has to stop, by `time.time`.
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
        self.until, self.checksums = until, {"data": data, "source": source}
        self.earlier: list[dict] = []
        self._cost, self._since = 0.0, time.monotonic()

    def restore(
        self, model: "nn.Module", optimizer: "Optimizer", pruner: Any
    ) -> tuple[Rows, Arrays] | None:
        """Bring model, optimizer and pruner, all made anew, to the checkpoint's state.

        Returns:
            The rows and arrays so far; None without a checkpoint.

        Raises:
            UnusableCheckpoint: The file is damaged, or of another configuration, version, data or
                source. Model, optimizer and pruner are then of no use.
        """
        if not self.path.exists():
            return None
        about, tensors = self._verified()
        try:
            if pruner is not None:
                # First: holding pruned filters may add buffers to the model.
                pruner.load_state_dict(_under("pruner", tensors))
            _fill(_state(model), _under("model", tensors))
            _fill_optimizer(optimizer, model, _under("optimizer", tensors))
            columns = {name: tensors[f"row.{name}"].tolist() for name in about["columns"]}
            rows = [
                dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
            ]
            with np.load(io.BytesIO(tensors["arrays"].numpy().tobytes())) as stored:
                arrays = dict(stored)
            part = {name: about[name] for name in ("epochs", "device", "threads")}
            self.earlier = [*about["earlier"], part]
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise UnusableCheckpoint(f"its state does not fit: {error!r}") from error
        return rows, arrays

    def set_aside(self, reason: Exception) -> None:
        """Rename the file and warn that the run starts afresh."""
        self.claim.check()
        aside = self.path.replace(self.path.with_suffix(".damaged"))
        told = f"{self.path} is set aside as {aside.name}, and {self.config.title} starts afresh"
        warnings.warn(f"{told}: {reason}", stacklevel=2)

    def save_when_due(
        self,
        model: "nn.Module",
        optimizer: "Optimizer",
        pruner: Any,
        rows: Rows,
        arrays: Arrays,
        measured: float = 0.0,
    ) -> None:
        """Save at an epoch's end, if that is worth its time or the run's time is up.

        It is due SECONDS after the last one, and late enough that writing takes no more than a
        SHARE of the time; also if the epoch's measurements took `measured` >= SECONDS. If a
        checkpoint cannot be written, as on a full disk, the run continues with a warning.

        Raises:
            Stopped: The run's time is up. The checkpoint is written.
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
            warnings.warn(f"{self.config.title} has no new checkpoint: {error}", stacklevel=2)
        self._since = time.monotonic()
        self._cost = self._since - start
        if stops:
            raise Stopped(f"the time of {self.config.title} was up after {len(rows)} epochs")

    def save(
        self, model: "nn.Module", optimizer: "Optimizer", pruner: Any, rows: Rows, arrays: Arrays
    ) -> None:
        """Write the run's state after `len(rows)` epochs.

        Raises:
            StoreError: The file cannot be written.
            Lost: Another process took the run over.
        """
        import torch
        from safetensors.torch import save

        about = {
            **_versions(),
            "run": self.config.identity,
            "config": to_dict(self.config),
            "epochs": len(rows),
            "seconds": sum(row["seconds"] for row in rows),
            "columns": list(rows[0]),
            "device": next(model.parameters()).device.type,
            "threads": torch.get_num_threads(),
            "earlier": self.earlier,
            **self.checksums,
        }
        description, tensors = json.dumps(about), _tensors(model, optimizer, pruner, rows, arrays)
        metadata = {"paperlib": description, "checksum": _checksum(description, tensors)}
        content = save(tensors, metadata)
        self.claim.check()
        write_whole(self.path, content)

    def _verified(self) -> tuple[dict, "dict[str, Tensor]"]:
        """Read the file, and compare it with its checksum and with the run."""
        try:
            with safe_open(self.path, "pt") as content:
                metadata = content.metadata()
                tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            if _checksum(metadata["paperlib"], tensors) != metadata["checksum"]:
                raise ValueError("its content does not match its checksum")
            there = json.loads(metadata["paperlib"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UnusableCheckpoint(f"it is damaged: {error}") from error
        here = _versions() | {"run": self.config.identity} | self.checksums
        for name, ours in here.items():
            if ours is not None and there[name] != ours:
                raise UnusableCheckpoint(f"it is of another {name}: {there[name]}, not {ours}")
        return there, tensors


def _versions() -> dict[str, object]:
    return {"version": VERSION, "paperlib": version("paperlib"), "torch": version("torch")}


def _tensors(
    model: "nn.Module", optimizer: "Optimizer", pruner: Any, rows: Rows, arrays: Arrays
) -> "dict[str, Tensor]":
    """Copy a run's whole state to the CPU, under names that start with its part."""
    import torch

    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    parts = {
        "model": _state(model),
        "pruner": pruner.state_dict() if pruner is not None else {},
        "optimizer": {
            f"{key}.{names[parameter]}": value
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
            if value is not None
        },
        "row": {name: torch.from_numpy(np.array([row[name] for row in rows])) for name in rows[0]},
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    tensors = {"arrays": torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)}
    for part, of_part in parts.items():
        for name, tensor in of_part.items():
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            tensors[f"{part}.{name}"] = copy.copy_(tensor.detach())
    return tensors


def _checksum(description: str, tensors: "dict[str, Tensor]") -> str:
    import torch

    digest = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _under(part: str, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    prefix = f"{part}."
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _state(model: "nn.Module") -> "dict[str, Tensor]":
    """Return parameters and all buffers, also those that state_dict leaves out."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _fill(tensors: "dict[str, Tensor]", stored: "dict[str, Tensor]") -> None:
    """Copy into existing tensors, which keep their memory format."""
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
    """Fill the optimizer's state; its averages get the memory format of their parameters.

    The optimizer's own method gives them another. Fused optimizers go through parameters and
    averages in order of memory, so the two must agree.
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
