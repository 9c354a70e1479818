"""Noise on chosen filters instead of their removal (arXiv 1906.03728, figure 5 and appendix D).

Filters are chosen as for pruning, and none twice, but they stay in the network: for a number of
forward passes after the event their weights are disturbed, then they train on.

>>> import torch
>>> from torch import nn
>>> from paperlib.pruning import FilterPruner
>>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
>>> pruner = FilterPruner(network, fractions=[0.5], target="largest", norm=False)
>>> noise = FilterNoise(network, pruner, "zeroing", passes=0)
>>> noise.prune(event=1, events=2)
2
>>> count = lambda: int((network[0].weight.flatten(1) == 0).all(1).sum())
>>> before, _, after = count(), network(torch.rand(4, 3, 8, 8)), count()
>>> before, after
(0, 2)
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from paperlib.pruning import FilterPruner, Pruner, PruningError
from paperlib.pruning.pruners import PassHook
from paperlib.pruning.zeros import Entries

KINDS = ("zeroing", "gaussian", "restored")
OF_NORMS = {  # by the names in `state_dict`
    "scale": "weight",
    "shift": "bias",
    "running_mean": "running_mean",
    "running_var": "running_var",
}

# A layer's noise from its latest event until the pass that ends it: "filters" (n,), the indices of
# those it acts on; "passes", (), since then; and by names of `FilterNoise._tensors` the values that
# will be restored.
Span = dict[str, Tensor]


class FilterNoise(Pruner):
    """Disturbs the filters that a pruner chooses, and stands in for that pruner in training.

    Each layer counts the network's forward passes, training and evaluation alike, from its own
    latest event on; an event that chooses nothing in a layer is none. With N = `passes` and before
    each pass, in place:

    - zeroing: passes 1 to N + 1, the weights of the filters chosen at the latest event are zero.
    - gaussian: passes 1 to N + 1, normal noise is added to them, and so accumulates. Its standard
      deviation is that (unbiased, as torch's) of the weights of the layer's first filter never
      chosen so far, read at that pass; there is one, as a fraction to prune is below 1.
    - restored: passes 1 to N, all filters chosen so far have weights, and scale and shift of the
      norms that follow, zero; before pass N + 1 these and their running statistics get back the
      values they had at the latest event. Filters that an earlier event still holds at zero then
      have none to restore: they stay zero, so events should be further apart than N passes.

    A new event replaces what is left of its layer's noise. Biases of convolutions, and the
    optimizer's state, are left alone. A backward pass must be done before the next forward pass,
    which changes weights.

    Args:
        model: the network.
        pruner: chooses, on the same network; made with norm=False, since batch norm stays. It draws
            random choices from its own generator.
        kind: "zeroing", "gaussian" or "restored".
        passes: N, at least 0.
        generator: a CPU generator for Gaussian noise, drawn on the CPU in float32 so that all
            devices see the same; not part of `state_dict`.

    Raises PruningError on a value that cannot be used, and names the valid ones.
    """

    def __init__(
        self,
        model: nn.Module,
        pruner: FilterPruner,
        kind: str,
        passes: int,
        generator: torch.Generator | None = None,
    ) -> None:
        if kind not in KINDS:
            raise PruningError(f"unknown noise {kind!r}: one of {', '.join(KINDS)}")
        if passes < 0:
            raise PruningError(f"noise passes must be at least 0, got {passes}")
        if pruner.norm:
            raise PruningError("noise leaves batch norm alone: its pruner needs norm=False")
        for name, layer in pruner.layers.items():
            if kind == "restored" and layer.leak:
                raise PruningError(f"filters of {name!r} cannot be set to zero: {layer.leak}")
        self.pruner, self.kind, self.passes, self.generator = pruner, kind, passes, generator
        self.masks, self.layers = pruner.masks, pruner.layers
        self.removed = False
        self._spans: dict[str, Span] = {}
        pruner.unhook()
        self._hook = PassHook(self.before_pass)
        model.register_forward_pre_hook(self._hook)

    def prune(self, event: int | Sequence[int | None], events: int | Sequence[int | None]) -> int:
        """One event, as for `FilterPruner.prune`; returns how many filters were chosen."""
        if self.removed:
            return self.pruner.prune(event, events)
        chosen = self.pruner.choose(event, events)
        for name, filters in chosen.items():
            span = {"passes": torch.tensor(0), "filters": filters}
            if self.kind == "restored":
                span["filters"] = gone = (~self.masks[name]).nonzero().squeeze(1)
                for key, (tensor, entries) in self._tensors(name).items():
                    span[key] = tensor.detach().index_select(0, entries.of(gone))
            self._spans[name] = span
        return sum(len(filters) for filters in chosen.values())

    def remove(self) -> None:
        """End all noise and set the weights of all filters chosen so far to zero for good."""
        self._spans.clear()
        self.removed = True
        self.pruner.hold()

    def hold(self) -> None:
        """Set chosen filters to zero again, after an optimizer step, once they are removed."""
        if self.removed:
            self.pruner.hold()

    def held(self) -> dict[str, Tensor]:
        """Return what `FilterPruner.held` does once filters are removed; before that, nothing."""
        return self.pruner.held() if self.removed else {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the pruner's state and the noise still to come, as named tensors."""
        state = self.pruner.state_dict() | {"noise.removed": torch.tensor(self.removed)}
        for name, span in self._spans.items():
            state |= {f"noise.{key}.{name}": tensor.clone() for key, tensor in span.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resume from a `state_dict`; weights are the network's own state, and are left alone."""
        self.removed = bool(state["noise.removed"])
        self._spans.clear()
        if self.removed:
            self.pruner.load_state_dict(state)
            return
        self.pruner.load_masks(state)
        for name, mask in self.masks.items():
            span = {}
            for key in ("passes", "filters", *self._tensors(name)):
                if f"noise.{key}.{name}" in state:
                    span[key] = state[f"noise.{key}.{name}"].clone().to(mask.device)
            if span:
                self._spans[name] = span | {"passes": span["passes"].cpu()}

    @property
    def due(self) -> bool:
        """True if the pruner that chooses observes the pass that follows."""
        return self.pruner.due

    @property
    def busy(self) -> bool:
        """True if noise is still to come."""
        return bool(self._spans)

    @torch.no_grad()
    def before_pass(self, training: bool) -> None:
        """Disturb the weights, and have the pruner that chooses count the pass."""
        self.pruner.before_pass(training)
        # In forward order: the order of draws must not depend on that of events.
        for name in [name for name in self.masks if name in self._spans]:
            span = self._spans[name]
            span["passes"] += 1
            self._disturb(name, span)
            if span["passes"] > self.passes:
                del self._spans[name]
            # Autocast may hold copies of the weights as they were before.
            torch.clear_autocast_cache()

    def _disturb(self, name: str, span: Span) -> None:
        tensors, filters = self._tensors(name), span["filters"]
        weight, _ = tensors["weight"]
        if self.kind == "gaussian":
            first = self.masks[name].int().argmax(0, keepdim=True)
            shape = (len(filters), *weight.shape[1:])
            noise = torch.randn(shape, generator=self.generator, dtype=torch.float32)
            noise = noise.to(weight) * weight.index_select(0, first).std()
            weight.index_add_(0, filters, noise)
        elif self.kind == "zeroing":
            weight.index_fill_(0, filters, 0)
        else:
            for key, (tensor, entries) in tensors.items():
                if span["passes"] > self.passes:
                    tensor.index_copy_(0, entries.of(filters), span[key])
                elif not key.startswith("running"):
                    tensor.index_fill_(0, entries.of(filters), 0)

    def _tensors(self, name: str) -> dict[str, tuple[Tensor, Entries]]:
        """Return what noise may change of a layer, and where a filter's entries are in it."""
        layer = self.layers[name]
        found = {"weight": (layer.conv.weight, layer.zeroed(False)[name])}
        norms = [e for e in layer.entries.values() if not isinstance(e.module, nn.Conv2d)]
        for i, entries in enumerate(norms):
            for key, of_norm in OF_NORMS.items():
                tensor = getattr(entries.module, of_norm, None)
                if tensor is not None:
                    found[f"{key}.{i}" if i else key] = (tensor, entries)
        return found
