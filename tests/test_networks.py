"""The network and pruner of a run, and of its record."""

import numpy as np
import pandas as pd
import pytest
import torch
from small import PRUNED, SCRATCH, TWO_LAYERS, VGG, WEIGHTS

from paperlib import networks
from paperlib.config import FilterPruning, WeightPruning
from paperlib.runs import RunRecord, Store
from paperlib.training import run


@pytest.mark.parametrize(
    ("pruning", "first", "last", "at"),
    [
        (SCRATCH.pruning, 0, 0, {0: (1, 1)}),
        (
            PRUNED.pruning,
            1,
            2,
            {1: ([1, 1, None, 1], [1, 2, 1, 2]), 2: ([None, 2, 1, 2], [1, 2, 1, 2])},
        ),
        (FilterPruning((0.5, 0.5), ((4, 6), (2, 9))), 2, 9, {2: ([None, 1], [2, 2])}),
        (WEIGHTS.pruning, 0, 2, {0: (1, 2), 2: (2, 2)}),
        (WeightPruning(("dense",), (0.5,), (3, 5, 8)), 3, 8, {5: (2, 3)}),
    ],
)
def test_events_by_epoch(pruning, first, last, at):
    events = networks.events_of(pruning)
    assert (min(events), max(events)) == (first, last)
    assert {epoch: events[epoch] for epoch in at} == at


def test_a_run_without_events():
    assert networks.events_of(None) == {}


# A network from its record


@pytest.mark.parametrize("config", [WEIGHTS, WEIGHTS.with_(pruning=TWO_LAYERS)])
def test_a_network_from_its_record(tmp_path, config):
    config, store = config.with_(histograms=True), Store(tmp_path)
    kept = []
    run(
        config,
        store,
        "cpu",
        lambda m: kept.append({k: v.clone() for k, v in m.pruner.masks.items()}),
    )
    model, pruner = networks.pruned_network(store.read(config.identity))
    assert list(pruner.masks) == list(config.pruning.layers)
    for name, mask in pruner.masks.items():
        assert torch.equal(mask, kept[-1][name])
    initial = dict(networks.build(config).named_parameters())
    held = pruner.held()
    for name, parameter in model.named_parameters():
        gone = held.get(name, torch.zeros_like(parameter, dtype=torch.bool))
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
        (
            WEIGHTS,
            {"kept.dense": np.zeros(3, np.uint8)},
            r"3 bytes of a mask of 'dense', which is \(32, 144\)",
        ),
    ],
)
def test_a_record_without_masks(config, arrays, message):
    with pytest.raises(ValueError, match=message):
        networks.pruned_network(RunRecord(config, pd.DataFrame(), arrays))
