"""The network and pruner of a run, and of its record."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from small import PRUNED, SCRATCH, TWO_LAYERS, VGG, WEIGHTS

from paperlib import networks
from paperlib.config import WeightPruning
from paperlib.runs import RunRecord, Store
from paperlib.training import run


@pytest.mark.parametrize(
    ("pruning", "events"),
    [
        (None, {}),
        (SCRATCH.pruning, {0: (1, 1)}),
        (PRUNED.pruning, {1: ([1, 1, None, 1], [1, 2, 1, 2]), 2: ([None, 2, 1, 2], [1, 2, 1, 2])}),
        (WeightPruning(("dense",), (0.5,), (3, 5)), {3: (1, 2), 5: (2, 2)}),
    ],
)
def test_events_by_epoch(pruning, events):
    assert networks.events_of(pruning) == events


@pytest.mark.parametrize("config", [WEIGHTS, WEIGHTS.with_(pruning=TWO_LAYERS)])
def test_a_network_from_its_record(tmp_path, config):
    config, store, kept = config.with_(histograms=True), Store(tmp_path), []
    run(config, store, "cpu", lambda moment: kept.append(copy.deepcopy(moment.pruner.masks)))
    model, pruner = networks.pruned_network(store.read(config.identity))
    assert list(pruner.masks) == list(config.pruning.layers)
    for name, mask in pruner.masks.items():
        assert torch.equal(mask, kept[-1][name])
    initial = dict(networks.build(config).named_parameters())
    held = pruner.held()
    for name, parameter in model.named_parameters():
        gone = held.get(name, torch.tensor(False))
        assert torch.equal(parameter, initial[name].masked_fill(gone, 0))


def test_a_network_for_other_images_from_its_record():
    kept = np.packbits(np.arange(32 * 144) % 3 == 0)
    about = {"classes": 3, "channels": 1}
    record = RunRecord(WEIGHTS, pd.DataFrame(), {"kept.dense": kept}, about)
    model, pruner = networks.pruned_network(record)
    assert (model.fc.out_features, model.features[0].in_channels) == (3, 1)
    assert torch.equal(pruner.masks["dense"].flatten(), torch.arange(32 * 144) % 3 == 0)
    assert networks.initial_network(record).dense.weight.all()


@pytest.mark.parametrize(
    ("config", "arrays", "message"),
    [
        (VGG, {}, "is not of single weights pruned"),
        (PRUNED, {}, "is not of single weights pruned"),
        (WEIGHTS, {}, "0 bytes of a mask of 'dense'.*histograms=True"),
        (WEIGHTS, {"kept.dense": np.zeros(3, np.uint8)}, r"3 bytes of .*'dense', .* \(32, 144\)"),
    ],
)
def test_a_record_without_masks(config, arrays, message):
    with pytest.raises(ValueError, match=message):
        networks.pruned_network(RunRecord(config, pd.DataFrame(), arrays))
