"""Cut the zeros out of a pruned network, and measure the costs of both networks.

In PyTorch a pruned network is as large as a dense one: a pruned filter is a block of zeros. Here
pruned filters are cut out, along with every channel and neuron that no later layer uses.

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
