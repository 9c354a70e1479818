"""Checkpoints: everything needed to resume a run bit for bit, at an epoch's end.

    STORE/checkpoints/IDENTITY.safetensors

The file's tensors are weights and buffers, the state of optimizer and pruner, and the rows and
arrays so far. Its metadata is a description (`describe`) and a checksum of everything. Random
streams need no state: each is drawn anew at each epoch's start (see `training`). A network may keep
state in parameters and buffers only. On a CPU, with the same number of threads, a resumed run ends
with the same numbers as one that was never stopped.

The file is written whole, and removed when the run's record is written. Reading a description
imports no torch.
"""

import hashlib
import io
import json
import math
import os
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open

from paperlib.config import Config, to_dict
from paperlib.store.lease import Claim
from paperlib.store.provenance import version
from paperlib.store.records import write_whole

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

Rows = list[dict]
Arrays = dict[str, np.ndarray]
Parts = tuple["nn.Module", "Optimizer", Any]  # network, optimizer, and pruner or None
# Increase this if a configuration gives other numbers, or if the file gets another meaning.
VERSION = 3
SECONDS = 10.0
SHARE = 0.02


class Stopped(RuntimeError):
    """A run's time was up; it resumes from its checkpoint the next time."""


class UnusableCheckpoint(RuntimeError):
    """A run cannot resume from this checkpoint; the message gives the file and the reason."""


def file(store: str | os.PathLike, run: str) -> Path:
    """Return the place of a run's checkpoint in the store at path `store`."""
    return Path(store) / "checkpoints" / f"{run}.safetensors"


def describe(store: str | os.PathLike, run: str) -> dict | None:
    """Return the description of a run's checkpoint; None if there is none, or it is unreadable.

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
    """Remove a run's checkpoint, and half-written ones. In a read-only store they stay."""
    for left in file(store, run).parent.glob(f"*{run}.*"):
        with suppress(OSError):
            left.unlink(missing_ok=True)


@dataclass
class Checkpoint:
    """The checkpoint of one run: restored at its start, written when that is worth its time.

    Attributes:
        store: The store's path.
        config: The run's configuration.
        claim: The claim on the run. Its `check` is called before anything is written.
        made_of: The checksums `data` and `source`: of the run's images, and of the code that it
            names. A checkpoint with others is not restored. A checksum of None is not compared.
        until: The time at which the run has to stop, by `time.time`.
        earlier: The processes that the run was resumed from: epochs, device and threads.
    """

    store: str | os.PathLike
    config: Config
    claim: Claim
    made_of: dict[str, str | None]
    until: float = math.inf
    earlier: list[dict] = field(default_factory=list)
    _cost: float = 0.0
    _since: float = field(default_factory=lambda: time.monotonic())

    @property
    def _inputs(self) -> dict[str, object]:
        """Versions, identity and checksums that a checkpoint of this run must have."""
        return _versions() | {"run": self.config.identity} | self.made_of

    def restore(self, parts: Parts) -> tuple[Rows, Arrays] | None:
        """Bring a run's parts, all made anew, to the checkpoint's state.

        Returns:
            The rows and arrays so far; None without a checkpoint.

        Raises:
            UnusableCheckpoint: The file is damaged, or of another configuration, version, data or
                source. The parts cannot be used afterwards.
        """
        path = file(self.store, self.config.identity)
        if not path.exists():
            return None
        model, optimizer, pruner = parts
        try:
            about, stored = self._read(path)
            if pruner is not None:
                # This comes first: holding pruned filters may add buffers to the model.
                pruner.load_state_dict(stored["pruner"])
            _fill(_state(model), stored["model"])
            _fill_optimizer(optimizer, dict(model.named_parameters()), stored["optimizer"])
            rows = pd.DataFrame({name: stored["row"][name].numpy() for name in about["columns"]})
            with np.load(io.BytesIO(stored["arrays"][""].numpy().tobytes())) as content:
                arrays = dict(content)
            part = {name: about[name] for name in ("epochs", "device", "threads")}
            self.earlier = [*about["earlier"], part]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise UnusableCheckpoint(f"{path} cannot be used: {error}") from error
        return rows.to_dict("records"), arrays

    def save_when_due(self, parts: Parts, rows: Rows, arrays: Arrays) -> None:
        """Save at an epoch's end, if a checkpoint is due or the run's time is up.

        A checkpoint is due SECONDS after the last one, or later, so that writing takes no more than
        a SHARE of the time.

        Raises:
            Stopped: The run's time is up. The checkpoint is written.
            StoreError: The file cannot be written.
            Lost: Another process took the run over.
        """
        start, stops = time.monotonic(), time.time() >= self.until
        if stops or start - self._since >= max(SECONDS, self._cost / SHARE):
            self._save(parts, rows, arrays)
            self._since = time.monotonic()
            self._cost = self._since - start
        if stops:
            raise Stopped(f"the time of {self.config.title} was up after {len(rows)} epochs")

    def _save(self, parts: Parts, rows: Rows, arrays: Arrays) -> None:
        import torch
        from safetensors.torch import save

        about = self._inputs | {
            "config": to_dict(self.config),
            "epochs": len(rows),
            "seconds": sum(row["seconds"] for row in rows),
            "columns": list(rows[0]),
            "device": next(parts[0].parameters()).device.type,
            "threads": torch.get_num_threads(),
            "earlier": self.earlier,
        }
        description, tensors = json.dumps(about), _tensors(parts, rows, arrays)
        metadata = {"paperlib": description, "checksum": _checksum(description, tensors)}
        content = save(tensors, metadata)
        self.claim.check()
        write_whole(file(self.store, self.config.identity), content)

    def _read(self, path: Path) -> tuple[dict, "dict[str, dict[str, Tensor]]"]:
        """Read the file's description, and its tensors by part; check that they fit the run."""
        with safe_open(path, "pt") as content:
            metadata = content.metadata()
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        if _checksum(metadata["paperlib"], tensors) != metadata["checksum"]:
            raise ValueError("it is damaged: its content does not match its checksum")
        about = json.loads(metadata["paperlib"])
        for name, ours in self._inputs.items():
            if ours is not None and about[name] != ours:
                raise ValueError(f"it is of another {name}: {about[name]}, not {ours}")
        stored: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            stored[part][rest] = tensor
        return about, stored


def _versions() -> dict[str, object]:
    return {"version": VERSION, "paperlib": version("paperlib"), "torch": version("torch")}


def _state(model: "nn.Module") -> "dict[str, Tensor]":
    """Return all parameters and buffers, even those that `state_dict` leaves out."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _tensors(parts: Parts, rows: Rows, arrays: Arrays) -> "dict[str, Tensor]":
    """Copy a run's whole state to the CPU. Names start with the part of the run."""
    import torch

    model, optimizer, pruner = parts
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    tensors = {f"model.{name}": tensor for name, tensor in _state(model).items()}
    if pruner is not None:
        tensors |= {f"pruner.{name}": tensor for name, tensor in pruner.state_dict().items()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if value is not None:
                tensors[f"optimizer.{key}.{names[parameter]}"] = value
    for name in rows[0]:
        tensors[f"row.{name}"] = torch.from_numpy(np.array([row[name] for row in rows]))
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    tensors["arrays"] = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    contiguous = torch.contiguous_format
    return {k: t.detach().cpu().clone(memory_format=contiguous) for k, t in tensors.items()}


def _checksum(description: str, tensors: "dict[str, Tensor]") -> str:
    import torch

    digest = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _fill(tensors: "dict[str, Tensor]", stored: "dict[str, Tensor]") -> None:
    """Copy into existing tensors, which keep their memory format."""
    import torch

    ours, theirs = ({k: (t.shape, t.dtype) for k, t in each.items()} for each in (tensors, stored))
    if ours != theirs:
        raise ValueError(f"its state does not fit: {dict(ours.items() ^ theirs.items())}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(stored[name])


def _fill_optimizer(
    optimizer: "Optimizer", parameters: "dict[str, Tensor]", stored: "dict[str, Tensor]"
) -> None:
    """Fill the optimizer's state. Its averages get the memory format of their parameters.

    The optimizer's own `load_state_dict` would give them another format. Fused optimizers go
    through parameters and averages in order of memory, so the two must agree.
    """
    import torch

    for name, value in stored.items():
        key, _, of = name.partition(".")
        parameter = parameters[of]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        optimizer.state[parameter][key] = value.to(parameter.device)
