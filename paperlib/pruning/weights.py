"""The pruner of single weights (arXiv 1805.01930)."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from paperlib.pruning.layers import (
    PruningError,
    check_network,
    check_order,
    check_values,
    parameter_owners,
    weight_refusal,
)
from paperlib.pruning.pruners import Pruner, as_list
from paperlib.pruning.scores import check_target, kept_weights, select


class WeightPruner(Pruner):
    """Prune single weights of layers by magnitude, event by event (arXiv 1805.01930).

    Args:
        model: Any network.
        layer: The name of an nn.Linear or nn.Conv2d, or several names in the order of definition.
        fraction: The share of weights that is pruned after the last event, in [0, 1), for every
            layer, or one entry a layer.
        target: Which magnitudes are pruned: "largest", "smallest" or "random".
        schedule: "linear" or "annealing"; see `kept_weights`.
        mu: For "annealing", at least 0.
        generator: A CPU generator for target "random".

    Attributes:
        masks: By name of layer, bool of the weights' shape, True where a weight is kept.
        layers: The layers by name.
        fractions: The fractions by name of layer.

    Raises:
        PruningError: A value or layer cannot be used. Raised before anything is changed.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | Sequence[str],
        fraction: float | Sequence[float],
        target: str = "largest",
        schedule: str = "linear",
        mu: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        check_target(target, generator)
        check_network(model)
        check_values(model)
        names = [layer] if isinstance(layer, str) else as_list(layer, "layers")
        each: Any = [fraction] * len(names) if isinstance(fraction, Real | str) else fraction
        fractions = as_list(each, "fractions")
        if len(fractions) != len(names):
            raise PruningError(f"{len(fractions)} fractions for {len(names)} layers")
        for f in fractions:
            kept_weights(1, f, 1, 1, schedule, mu)  # raises if a value is invalid
        self.layers = _weighted(model, names)
        self.fractions = dict(zip(names, fractions, strict=True))
        self.target, self.schedule, self.mu, self.generator = target, schedule, mu, generator
        self.masks = {
            name: torch.ones(module.weight.shape, dtype=torch.bool, device=module.weight.device)
            for name, module in self.layers.items()
        }

    @torch.no_grad()
    def prune(self, event: Any, events: Any) -> int:
        """Prune every layer at one event (1-based); return how many weights were removed."""
        chosen = {}
        for name, module in self.layers.items():
            mask = self.masks[name].view(-1)
            kept = kept_weights(
                mask.numel(), self.fractions[name], event, events, self.schedule, self.mu
            )
            count = int(mask.sum()) - kept
            if count > 0:
                magnitudes = module.weight.detach().reshape(-1).abs()
                if not magnitudes.isfinite().all():
                    raise PruningError(f"the weight of {name!r} is not finite")
                chosen[name] = select(magnitudes, mask, count, self.target, self.generator)
        for name, indices in chosen.items():
            self.masks[name].view(-1)[indices] = False
        self.hold()
        return sum(len(indices) for indices in chosen.values())

    @torch.no_grad()
    def hold(self) -> None:
        """Set every pruned weight to zero. Call this after each optimizer step."""
        for name, mask in self.masks.items():
            self.layers[name].weight.masked_fill_(~mask, 0)

    def held(self) -> dict[str, Tensor]:
        """Return, by name of parameter, a bool tensor of its shape: True where it is held at 0."""
        return {f"{name}.weight": ~mask for name, mask in self.masks.items()}


def _weighted(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the named layers; raise PruningError if one cannot be pruned."""
    known = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    owners = parameter_owners(model)
    for name in names:
        if name not in known:
            can = ", ".join(known) or "none, as the network has no nn.Linear and no nn.Conv2d"
            raise PruningError(f"no prunable layer {name!r}: one of {can}")
        base = nn.Linear if isinstance(known[name], nn.Linear) else nn.Conv2d
        if why := weight_refusal(known[name], base, owners, "weight"):
            raise PruningError(f"cannot prune {name!r}: {why}")
    check_order(names, list(known))
    return {name: known[name] for name in names}
