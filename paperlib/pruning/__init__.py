"""Pruning of filters and weights: scores, targets, schedules and masks.

Filters are pruned as in arXiv 1906.03728, single weights as in arXiv 1805.01930. A pruned parameter
is set to zero, and `hold()` sets it to zero again after every optimizer step. The forward pass of a
pruned network is that of a dense one, in which only residual sums are masked.

Any network can be pruned in the same way, residual or not:

>>> import torch
>>> from torch import nn
>>> from paperlib.pruning import FilterPruner
>>> network = nn.Sequential(
...     nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
... )
>>> pruner = FilterPruner(network, fractions=[0.5, 0.25], score="l1", target="largest")
>>> pruner.prune(event=1, events=2), pruner.prune(event=2, events=2)
(2, 3)
>>> {name: int(kept.sum()) for name, kept in pruner.masks.items()}
{'0': 4, '3': 3}
"""

from paperlib.pruning.layers import PruningError, prunable_layers
from paperlib.pruning.pruners import FilterPruner, Pruner
from paperlib.pruning.scores import (
    SCORES,
    TARGETS,
    expected_activation,
    kept_filters,
    kept_weights,
    select,
)
from paperlib.pruning.weights import WeightPruner

__all__ = [
    "SCORES",
    "TARGETS",
    "FilterPruner",
    "Pruner",
    "PruningError",
    "WeightPruner",
    "expected_activation",
    "kept_filters",
    "kept_weights",
    "prunable_layers",
    "select",
]
