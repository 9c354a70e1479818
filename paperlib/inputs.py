"""Where a run comes from: its images, the code that it names, their checksums, the machine."""

import hashlib
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from paperlib import checkpoints, data, provenance
from paperlib.config import Config, FilterPruning
from paperlib.pruning import Pruner
from paperlib.runs import RunRecord, Store, StoreError


class ChangedInputs(StoreError):
    """A record made with other data or code than there is now; the message names both."""


def images_of(config: Config, root: Path | None = None) -> data.Dataset:
    """Return a run's images: one subset for all seeds, which differ in the network only."""
    checksum = provenance.known_checksum(config.data, root)
    return _subset(config.data, root, checksum, config.train_per_class, config.test_per_class)


@lru_cache(maxsize=1)
def _subset(
    spec: str, root: Path | None, checksum: str | None, training: int | None, test: int | None
) -> data.Dataset:
    """Load images once for all runs of a process."""
    return data.load(spec, root).subset(training, test)


def source_checksum(config: Config) -> str | None:
    """Return the checksum of the code of the score and network that a run names.

    Of two it is the checksum of both; None without any.
    """
    specs = [config.model]
    if isinstance(config.pruning, FilterPruning):
        specs.append(config.pruning.score)
    found = [checksum for checksum in map(provenance.source_checksum, specs) if checksum]
    if len(found) < 2:
        return found[0] if found else None
    return hashlib.sha256("/".join(found).encode()).hexdigest()


def checksums(config: Config, images: str | None) -> dict[str, str | None]:
    """Return the checksums of a run's data, given that of its images, and of its code."""
    return {"data": images or None, "source": source_checksum(config)}


def described(device: torch.device, model: nn.Module, pruner: Pruner) -> dict[str, object]:
    """Return the machine, the versions, and the size of the network, for a record."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return provenance.describe(device.type, name, torch.get_num_threads()) | {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held": int(sum(mask.sum() for mask in pruner.held().values())),
    }


def stored(config: Config, store: Store) -> RunRecord:
    """Return the store's record of a run.

    Raises:
        ChangedInputs: Its data, or the code of a score or network that it names, have changed
            since. They are compared where both checksums are known.
        KeyError: There is no record.
        DamagedRecord: It cannot be read.
    """
    record = store.read(config.identity)
    try:
        images = provenance.known_checksum(config.data, store.path / "data")
    except data.DataError:  # something else is in the place of the data
        images = None
    for name, now in checksums(config, images).items():
        then = record.provenance.get(name)
        if then and now and then != now:
            inputs = f"data {config.data!r}" if name == "data" else "code of its score or network"
            raise ChangedInputs(
                f"the record of {config.title} in {store.path} was made with other {inputs}, of "
                f"checksum {then}; the present one has {now}. Choose another run folder with "
                "--runs, or remove the record"
            )
    return record


def finished(config: Config, store: Store | None) -> RunRecord | None:
    """Return the store's record of a run if there is one, and remove a checkpoint left beside it.

    Raises:
        ChangedInputs: As `stored`.
    """
    if store is None or config.identity not in store:
        return None
    checkpoints.discard(store.path, config.identity)  # its writer may have died before that
    return stored(config, store)
