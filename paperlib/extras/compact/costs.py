"""The costs of a network: parameters, multiply-adds, bytes, milliseconds."""

import gzip
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from paperlib import devices
from paperlib.extras.compact.channels import CompactError
from paperlib.extras.compact.network import example_input
from paperlib.pruning.graph import in_mode

_ENTRY = 128  # approximate bytes of a tensor's entry in a file's header


def cost(model: nn.Module, example: Sequence[int] = (1, 3, 32, 32)) -> dict[str, int]:
    """Count a network's parameters, multiply-adds and bytes.

    Args:
        model: The network.
        example: The shape of an input.

    Returns:
        parameters: all of them. nonzero: those that are not zero. multiply_adds: those of
        convolutions, dense layers and attention for one image; zeros count like other values.
        bytes_dense: the size of a safetensors file of the network's tensors. bytes_sparse: the size
        of such a file in which a tensor is stored as its nonzero values, in order, and a bitmap of
        their places, if that is smaller. bytes_gzipped: the size of the latter, gzipped.
    """
    counter = FlopCounterMode(display=False)
    with in_mode(model, False), torch.no_grad(), devices.plain_attention(), counter:
        model(example_input(model, example))
    sparse = _encoded(model)
    parameters = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "nonzero": sum(int(p.count_nonzero()) for p in parameters),
        "multiply_adds": counter.get_total_flops() // 2 // example[0],
        "bytes_dense": len(_encoded(model, sparse=False)),
        "bytes_sparse": len(sparse),
        "bytes_gzipped": len(gzip.compress(sparse, mtime=0)),
    }


def cost_table(
    networks: Mapping[str, nn.Module],
    batches: Sequence[int] = (1, 128),
    repeats: int = 20,
    image: Sequence[int] = (3, 32, 32),
) -> pd.DataFrame:
    """Measure the costs and times of several networks on the CPU.

    The networks are timed in turns, so a busy machine slows all of them alike.

    Args:
        networks: Networks by name.
        batches: The batch sizes to time.
        repeats: How many times each network is timed at each batch size.
        image: The shape (channels, height, width) of an image.

    Returns:
        One row a network, by name. Columns: those of `cost`, and ms_batch_N for each N in
        `batches`, the median time of a batch in milliseconds.

    Raises:
        CompactError: A network is not on the CPU.
    """
    table = pd.DataFrame({name: cost(model, (1, *image)) for name, model in networks.items()}).T
    for batch in batches:
        table[f"ms_batch_{batch}"] = _latencies(list(networks.values()), batch, repeats, image)
    return table


def _encoded(model: nn.Module, sparse: bool = True) -> bytes:
    """Return a network's tensors as a safetensors file, with their shapes and types in its header.

    A sparse tensor is stored as NAME:values and NAME:bitmap.
    """
    stored, entries = {}, {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        there = tensor.flatten() != 0
        size = int(there.sum()) * tensor.itemsize + math.ceil(tensor.numel() / 8) + _ENTRY
        entries[name] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype)}
        if sparse and size < tensor.numel() * tensor.itemsize:
            stored[f"{name}:values"] = tensor.flatten()[there]
            stored[f"{name}:bitmap"] = torch.from_numpy(np.packbits(there.numpy()))
        else:
            stored[name] = tensor.clone()
    return safetensors.torch.save(stored, {"tensors": json.dumps(entries)})


@torch.inference_mode()
def _latencies(
    networks: Sequence[nn.Module], batch: int, repeats: int, image: Sequence[int]
) -> list[float]:
    inputs = [example_input(network, (batch, *image)) for network in networks]
    if any(x.device.type != "cpu" for x in inputs):
        raise CompactError("times are measured on the CPU: move the network there first")
    seconds: list[list[float]] = [[] for _ in networks]
    for network, x, times in [*zip(networks, inputs, seconds, strict=True)] * (repeats + 1):
        with in_mode(network, False):
            start = time.perf_counter()
            network(x)
            times.append(time.perf_counter() - start)
    return [1000 * statistics.median(times[1:]) for times in seconds]  # the first pass is a warm-up
