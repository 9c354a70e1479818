"""The origin of a run: its images, the code that it names, their checksums, the machine."""

from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from paperlib import data
from paperlib.config import Config
from paperlib.pruning import Pruner
from paperlib.runs import RunRecord, Store
from paperlib.store import checkpoints, provenance


def images_of(config: Config, root: Path | None = None) -> data.Dataset:
    """Return a run's images. All seeds have the same subset; they differ in the network only."""
    checksum = provenance.known_checksum(config.data, root)
    return _subset(config.data, root, checksum, config.train_per_class, config.test_per_class)


@lru_cache(maxsize=1)
def _subset(
    spec: str, root: Path | None, checksum: str | None, training: int | None, test: int | None
) -> data.Dataset:
    """Load images, and keep them for the next runs of the process with the same images."""
    return data.load(spec, root).subset(training, test)


def checksums(config: Config, images: data.Dataset) -> dict[str, str | None]:
    """Return the checksums of a run's images, and of its code."""
    return {"data": images.checksum or None, "source": provenance.code_checksum(config)}


def described(device: torch.device, model: nn.Module, pruner: Pruner) -> dict[str, object]:
    """Return the machine, the versions, and the size of the network, for a record."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return provenance.describe(device.type, name, torch.get_num_threads()) | {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held": int(sum(mask.sum() for mask in pruner.held().values())),
    }


def finished(config: Config, store: Store | None) -> RunRecord | None:
    """Return the store's record of a run if there is one, and remove a checkpoint left beside it.

    Raises:
        Mismatch: The record was made with other data or code.
    """
    if store is None or config not in store:
        return None
    checkpoints.discard(store.path, config.identity)  # its writer may have died before it could
    return store.read(config)
