"""A physically smaller network from a pruned one, and what each of them costs.

PyTorch's pruned networks are as large as dense ones: a pruned filter is a block of zeros. Here they
are cut out, along with every channel and neuron that nothing after it would miss.

>>> from paperlib import models
>>> from paperlib.compact import compact
>>> from paperlib.pruning import FilterPruner
>>> network = models.build("vgg11_bn", width=0.25)
>>> pruner = FilterPruner(network, fractions=[0.5, 0.5])
>>> removed = pruner.prune(event=1, events=1)
>>> compact(network, pruner).features[25]
Conv2d(64, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
"""

from paperlib.extras.compact.channels import CompactError
from paperlib.extras.compact.costs import cost, cost_table
from paperlib.extras.compact.network import compact

__all__ = ["CompactError", "compact", "cost", "cost_table"]
