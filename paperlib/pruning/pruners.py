"""The interface of a pruner, and the pruner of whole filters (arXiv 1906.03728)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from paperlib.pruning.layers import PrunableLayer, PruningError, check_order, survey
from paperlib.pruning.masks import expect_mask, mask_of, set_mask
from paperlib.pruning.scores import (
    ActivationScore,
    check_fraction,
    check_score,
    check_target,
    kept_filters,
    scores_of,
    select,
)
from paperlib.pruning.zeros import Entries


class PassHook:
    """A forward pre-hook of a network that tells something of each pass, unless it is off."""

    def __init__(self, before_pass: Callable[[bool], None]) -> None:
        self.before_pass, self.on = before_pass, True

    def __call__(self, model: nn.Module, inputs: tuple) -> None:
        if self.on:
            self.before_pass(model.training)


class Pruner:
    """The interface that training expects of a pruner; this one prunes nothing.

    A hook on the network calls `before_pass`. Where hooks do not run, as when a captured step is
    replayed, the caller does so, within `by_hand`.

    Attributes:
        due: the next pass is observed.
        busy: `before_pass` changes weights in the passes to come.
    """

    due = busy = False
    _hook: PassHook | None = None

    def hold(self) -> None:
        """Set what is pruned to zero again, after an optimizer step."""

    def held(self) -> dict[str, Tensor]:
        """Return, by name of parameter, a bool tensor of its shape: True where it is held at 0."""
        return {}

    def before_pass(self, training: bool) -> None:
        """Prepare a forward pass, in training mode or not; called once before each."""

    @contextmanager
    def by_hand(self) -> Iterator[None]:
        """Leave `before_pass` to the caller within this context."""
        before = self._hook is not None and self._hook.on
        self._switch(False)
        try:
            yield
        finally:
            self._switch(before)

    def unhook(self) -> None:
        """Leave `before_pass` to the caller from now on."""
        self._switch(False)

    def _switch(self, on: bool) -> None:
        if self._hook is not None:
            self._hook.on = on


class FilterPruner(Pruner):
    """Prunes whole filters of a network's convolutions, event by event (arXiv 1906.03728).

    A pruned filter is exactly zero where it is used: its weights and bias are zero, scale and shift
    of the norms that follow it are, and to the end of a residual branch the shortcut adds nothing.

    Args:
        model: any network that torch.fx can trace, for images (N, C, H, W). Hooks that change a
            layer's output are not seen if they are registered later.
        fractions: the share of each layer's filters that is gone after its last event, in [0, 1).
        score: one of `SCORES`, or a function from the convolution to its scores (filters,).
            "activation" watches the forward passes in training mode from now on.
        target: which scores go: "smallest", "largest" or "random".
        layers: names of convolutions in forward order; None takes as many of the last convolutions
            as there are fractions, grouped ones and those on shortcuts not counted.
        generator: a CPU generator for target "random".
        norm: False masks the convolution's weights only; its bias and all that follows stay.

    Attributes:
        masks: by name of convolution in forward order, bool (filters,), True where one is kept.
        layers: the layers by name.
        fractions: by name of layer.

    Raises PruningError on a value or network that cannot be used, before anything is changed.
    """

    def __init__(
        self,
        model: nn.Module,
        fractions: Sequence[float],
        score: str | Callable[[nn.Conv2d], Tensor] = "l2",
        target: str = "smallest",
        layers: Sequence[str] | None = None,
        generator: torch.Generator | None = None,
        norm: bool = True,
    ) -> None:
        check_target(target)
        for fraction in fractions:
            check_fraction(fraction)
        found = survey(model)
        names = _chosen(model, found, fractions, layers, norm)
        self.layers = {name: found[name] for name in names}
        check_score(score, self.layers.values())
        self.fractions = dict(zip(names, fractions, strict=True))
        self.score, self.target, self.generator, self.norm = score, target, generator, norm
        self.masks = {
            name: torch.ones(layer.filters, dtype=torch.bool, device=layer.conv.weight.device)
            for name, layer in self.layers.items()
        }
        # By name of layer: parameters, by their module, and the indices that are zero in them.
        self._gone: dict[str, list[tuple[nn.Module, str, Tensor]]] = {}
        # By name of module that masks a sum: its mask as it was before this pruner.
        self._before: dict[str, Tensor] = {}
        self._masked = True
        self.activation: ActivationScore | None = None
        if score == "activation":
            self.activation = ActivationScore(self.layers.values())
            self._hook = PassHook(self.activation.before_pass)
            model.register_forward_pre_hook(self._hook)
        for module in {m.module for layer in self._masking() for m in layer.masks.values()}:
            expect_mask(module)

    @property
    def due(self) -> bool:
        """Whether the score "activation" observes the pass that follows."""
        return self.activation is not None and self.activation.due

    def before_pass(self, training: bool) -> None:
        """Count the pass, for the score "activation"."""
        if self.activation is not None:
            self.activation.before_pass(training)

    def choose(
        self, event: int | Sequence[int | None], events: int | Sequence[int]
    ) -> dict[str, Tensor]:
        """Mark the filters that go at one event as pruned, and leave the weights as they are.

        Args:
            event: from 1 on, for every layer, or one entry a layer, None where it has none now.
            events: how many there are, for every layer or one entry a layer.

        Returns:
            The indices of these filters by name of layer.

        Raises PruningError, with nothing changed, on an event that there is not, and on scores and
        parameters that are not finite.
        """
        chosen = {}
        for name, i, n in self._each_layer(event, events):
            layer, mask = self.layers[name], self.masks[name]
            count = int(mask.sum()) - kept_filters(layer.filters, self.fractions[name], i, n)
            if count <= 0:
                continue
            for _, parameter, _ in _parameters(layer, self.norm):
                if not parameter.isfinite().all():
                    raise PruningError(f"layer {name!r} or its norm is not finite")
            scores = None if self.target == "random" else self._checked_scores(name)
            chosen[name] = select(scores, mask, count, self.target, self.generator)
        for name, indices in chosen.items():
            self.masks[name][indices] = False
        self._refresh()
        return chosen

    def prune(self, event: int | Sequence[int | None], events: int | Sequence[int]) -> int:
        """Do one event in every layer, as for `choose`; return how many filters were removed."""
        chosen = self.choose(event, events)
        self.hold()
        return sum(len(indices) for indices in chosen.values())

    @torch.no_grad()
    def hold(self) -> None:
        """Set every pruned parameter to zero; to be called after each optimizer step."""
        for gone in self._gone.values():
            for module, name, indices in gone:
                getattr(module, name).index_fill_(0, indices, 0)
        if not self._masked:
            self._mask_sums()

    def held(self) -> dict[str, Tensor]:
        """Return, by name of parameter, a bool tensor of its shape: True where it is held at 0."""
        out: dict[str, Tensor] = {}
        for name, mask in self.masks.items():
            gone = (~mask).nonzero().squeeze(1)
            for full_name, parameter, entries in _parameters(self.layers[name], self.norm):
                if len(gone):
                    zero = out.setdefault(full_name, torch.zeros_like(parameter, dtype=torch.bool))
                    zero[entries.of(gone)] = True
        return out

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that later events depend on, as named tensors."""
        state = {f"mask.{name}": mask for name, mask in self.masks.items()}
        return state | (self.activation.state_dict() if self.activation is not None else {})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resume from a `state_dict`: what it says is pruned is set to zero."""
        self.load_masks(state)
        self.hold()

    def load_masks(self, state: Mapping[str, Tensor]) -> None:
        """As `load_state_dict`, with the weights left as they are."""
        for name, mask in self.masks.items():
            mask.copy_(state[f"mask.{name}"])
        if self.activation is not None:
            self.activation.load_state_dict(state)
        self._refresh()

    def _refresh(self) -> None:
        """Find the indices that `hold` needs, once an event: they cost no masking at each step."""
        self._gone.clear()
        for name, mask in self.masks.items():
            gone = (~mask).nonzero().squeeze(1)
            if len(gone):
                self._gone[name] = [
                    (entries.module, key, entries.of(gone).to(getattr(entries.module, key).device))
                    for entries in self.layers[name].zeroed(self.norm).values()
                    for key in entries.parameters
                ]
        self._masked = False

    @torch.no_grad()
    def _mask_sums(self) -> None:
        """Bring the masks of residual sums up to date; a sum with nothing pruned gets none."""
        new: dict[str, Tensor] = {}
        for layer in self._masking():
            kept = self.masks[layer.name]
            for name, mask in layer.masks.items():
                if name not in self._before and (layer.name not in self._gone):
                    continue
                if name not in self._before:
                    there, weight = mask_of(mask.module), layer.conv.weight
                    whole = torch.ones(mask.channels, dtype=weight.dtype, device=weight.device)
                    self._before[name] = whole if there is None else there.clone()
                keep = new.setdefault(name, self._before[name].clone())
                for offset in mask.offsets:
                    keep[offset : offset + len(kept)] *= kept.to(keep.device)
        modules = {n: m.module for layer in self._masking() for n, m in layer.masks.items()}
        for name, keep in new.items():
            set_mask(modules[name], keep)
        self._masked = True

    def _masking(self) -> list[PrunableLayer]:
        """The layers that end residual branches, where shortcuts are to be masked."""
        return [layer for layer in self.layers.values() if self.norm and layer.masks]

    def _each_layer(
        self, event: int | Sequence[int | None], events: int | Sequence[int]
    ) -> Iterator[tuple[str, int, int]]:
        n = len(self.layers)
        event = [event] * n if isinstance(event, int) else list(event)
        events = [events] * n if isinstance(events, int) else list(events)
        if len(event) != n or len(events) != n:
            given = len(event) if len(event) != n else len(events)
            raise PruningError(f"an event for {given} layers, but {n} are pruned")
        for name, i, of in zip(self.layers, event, events, strict=True):
            if i is not None:
                yield name, i, of

    def _checked_scores(self, name: str) -> Tensor:
        layer = self.layers[name]
        scores = scores_of(layer, self.score, self.activation)
        scores = torch.as_tensor(scores, device=self.masks[name].device)
        if scores.shape != (layer.filters,):
            raise PruningError(
                f"the score of {name!r} has shape {tuple(scores.shape)}, not ({layer.filters},)"
            )
        if not scores[self.masks[name]].isfinite().all():
            raise PruningError(f"the score of {name!r} is not finite")
        return scores


def _chosen(
    model: nn.Module,
    found: Mapping[str, PrunableLayer],
    fractions: Sequence[float],
    layers: Sequence[str] | None,
    norm: bool,
) -> list[str]:
    """Names of the layers to prune, all of which can be pruned."""
    countable = [name for name, layer in found.items() if not layer.passed_over]
    can = ", ".join(name for name in countable if not found[name].problem(norm))
    if layers is None:
        if len(fractions) > len(countable):
            raise PruningError(
                f"{len(fractions)} fractions, but {type(model).__name__} has {len(countable)} "
                f"prunable convolutions: {', '.join(countable)}"
            )
        names = countable[len(countable) - len(fractions) :]
    else:
        names = list(layers)
    for name in names:
        if name not in found:
            raise PruningError(f"no prunable layer {name!r}: one of {can}")
        if why := found[name].problem(norm):
            instead = (
                "; or mask its weights only, with norm=False" if why is found[name].leak else ""
            )
            raise PruningError(
                f"cannot prune {name!r}: {why}. Choose other layers, among {can or 'none'}{instead}"
            )
    check_order(names, countable)
    if len(names) != len(fractions):
        raise PruningError(f"{len(fractions)} fractions for {len(names)} layers")
    return names


def _parameters(layer: PrunableLayer, norm: bool) -> Iterator[tuple[str, Tensor, Entries]]:
    """The parameters that are zero with a layer's filters: name, parameter, and where."""
    for name, entries in layer.zeroed(norm).items():
        for key in entries.parameters:
            yield f"{name}.{key}", getattr(entries.module, key), entries
