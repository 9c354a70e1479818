"""Noise on chosen filters instead of their removal (arXiv 1906.03728, figure 5 and appendix D).

Filters are chosen as for pruning, each at most once, but they stay in the network. Their weights
are disturbed for a number of forward passes after the event. After that they train again.

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
from paperlib.pruning.operations import NORMS
from paperlib.pruning.pruners import PassHook
from paperlib.pruning.scores import whole
from paperlib.pruning.zeros import Entries

KINDS = ("zeroing", "gaussian", "restored")
OF_NORMS = {  # name in `state_dict` -> attribute of the norm
    "scale": "weight",
    "shift": "bias",
    "running_mean": "running_mean",
    "running_var": "running_var",
}

# The noise of a layer, from its latest event until the pass that ends it. "filters", (n,), has the
# indices of the filters that it acts on. "passes", (), counts the passes since the event. The names
# of `FilterNoise._tensors` have the values that will be restored.
Span = dict[str, Tensor]


class FilterNoise(Pruner):
    """Disturb the filters that a pruner chooses, in place of that pruner in training.

    Each layer counts the network's forward passes, training and evaluation alike, from its own
    latest event. An event that chooses no filter of a layer does not count for that layer. With N =
    `passes`, weights change in place, before each pass:

    - zeroing: In passes 1 to N + 1, the weights of the filters chosen at the latest event are zero.
    - gaussian: In passes 1 to N + 1, normal noise is added to these weights, so it accumulates. Its
      standard deviation is that of the weights of the layer's first filter that was never chosen,
      read at that pass (unbiased, as torch's). Such a filter exists, because a fraction to prune is
      below 1.
    - restored: In passes 1 to N, all filters chosen so far have zero weights, and zero scale and
      shift in the norms that follow. Before pass N + 1 these, and the running statistics of the
      norms, get back the values that they had at the latest event. A filter that an earlier event
      still held at zero at that moment stays zero. So events should be further apart than N passes.

    A new event replaces the rest of its layer's noise. Biases of convolutions, and the optimizer's
    state, are left alone. A backward pass must be done before the next forward pass, which changes
    weights.

    Args:
        model: The network.
        pruner: Chooses filters of the same network, with random choices from its own generator. It
            must be made with norm=False, because batch norm stays.
        kind: "zeroing", "gaussian" or "restored".
        passes: N, at least 0.
        generator: A CPU generator for Gaussian noise, which is drawn on the CPU in float32 so that
            all devices see the same. It is not part of `state_dict`.

    Raises:
        PruningError: A value cannot be used; the message names the valid ones.
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
        if whole(passes, "noise passes") < 0:
            raise PruningError(f"noise passes must be at least 0, got {passes}")
        if not isinstance(pruner, FilterPruner):
            raise PruningError(f"noise needs a FilterPruner, got a {type(pruner).__name__}")
        if pruner.norm:
            raise PruningError("noise leaves batch norm alone: its pruner needs norm=False")
        modules = set(model.modules())
        for name, layer in pruner.layers.items():
            if layer.conv not in modules:
                raise PruningError(f"the pruner is of another network: it prunes {name!r} of that")
            if kind == "gaussian" and layer.conv.weight[0].numel() == 1:
                raise PruningError(f"a filter of {name!r} is one weight, which has no deviation")
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
        """Do one event, as for `FilterPruner.prune`; return how many filters were chosen."""
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
        """Set filters to zero again, after an optimizer step, if they are removed."""
        if self.removed:
            self.pruner.hold()

    def held(self) -> dict[str, Tensor]:
        """Return `held` of the pruner if filters are removed, else an empty dict."""
        return self.pruner.held() if self.removed else {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the pruner's state and the noise still to come, as named tensors."""
        state = self.pruner.state_dict() | {"noise.removed": torch.tensor(self.removed)}
        for name, span in self._spans.items():
            state |= {f"noise.{key}.{name}": tensor.clone() for key, tensor in span.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resume from a `state_dict`; only weights of removed filters are changed: set to zero."""
        spans: dict[str, Span] = {}
        for layer, mask in self.masks.items():
            restored = self._tensors(layer) if self.kind == "restored" else ()
            names = {key: f"noise.{key}.{layer}" for key in ("passes", "filters", *restored)}
            missing = [name for name in ("noise.removed", *names.values()) if name not in state]
            if not missing:
                span = {key: state[name].clone().to(mask.device) for key, name in names.items()}
                spans[layer] = span | {"passes": span["passes"].cpu()}
            elif missing != list(names.values()):  # the layer has no noise
                raise PruningError(f"the state of this noise lacks {', '.join(map(repr, missing))}")
        self.removed = bool(state["noise.removed"])
        (self.pruner.load_state_dict if self.removed else self.pruner.load_masks)(state)
        self._spans = {} if self.removed else spans

    @property
    def due(self) -> bool:
        """True if the pruner observes the pass that was announced last."""
        return self.pruner.due

    @property
    def busy(self) -> bool:
        """True if noise is still to come."""
        return bool(self._spans)

    @torch.no_grad()
    def before_pass(self, training: bool) -> None:
        """Disturb the weights, and let the pruner count the pass."""
        self.pruner.before_pass(training)
        # In forward order: the order of draws must not depend on the order of events.
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
        """Return the tensors of a layer that noise may change, and the filters' entries in them."""
        layer = self.layers[name]
        found = {"weight": (layer.conv.weight, layer.zeroed(False)[name])}
        norms = [e for e in layer.entries.values() if isinstance(e.module, NORMS)]
        for i, entries in enumerate(norms):
            for key, of_norm in OF_NORMS.items():
                tensor = getattr(entries.module, of_norm, None)
                if tensor is not None:
                    found[f"{key}.{i}" if i else key] = (tensor, entries)
        return found
