"""The interface of a pruner, and the pruner of whole filters (arXiv 1906.03728)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from paperlib.devices import switched
from paperlib.pruning.layers import (
    PrunableLayer,
    PruningError,
    check_order,
    check_values,
    survey,
)
from paperlib.pruning.masks import add_mask, mask_of
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

Events = int | Sequence[int | None]


class PassHook:
    """A forward pre-hook of a network that announces each pass while it is on."""

    def __init__(self, before_pass: Callable[[bool], None]) -> None:
        self.before_pass, self.on = before_pass, True

    def __call__(self, model: nn.Module, inputs: tuple) -> None:
        """Announce a pass."""
        if self.on:
            self.before_pass(model.training)


class Pruner:
    """The interface that training expects of a pruner; this one prunes nothing.

    A hook on the network calls `before_pass`. Hooks do not run when a captured step is replayed.
    The caller then calls `before_pass`, within `by_hand`.

    Attributes:
        masks: By name of layer, bool, True where a filter or weight is kept.
        generator: The source of random numbers.
    """

    masks: Mapping[str, Tensor] = {}
    generator: torch.Generator | None = None
    _hook: PassHook | None = None

    @property
    def due(self) -> bool:
        """True if the pass that `before_pass` announced last is observed."""
        return False

    @property
    def busy(self) -> bool:
        """True if `before_pass` will change weights before later passes."""
        return False

    def prune(self, event: Events, events: Events) -> int:
        """Prune at one event; return how many filters or weights were removed."""
        return 0

    def hold(self) -> None:
        """Set pruned parameters to zero again, after an optimizer step."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that later events depend on, generators apart, as named tensors."""
        return {f"mask.{name}": mask for name, mask in self.masks.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resume from a `state_dict`, and set the pruned parameters to zero."""
        self.load_masks(state)
        self.hold()

    def load_masks(self, state: Mapping[str, Tensor]) -> None:
        """Resume from a `state_dict`, and leave the weights as they are."""
        self._check_state(state)
        for name, mask in self.masks.items():
            mask.copy_(state[f"mask.{name}"])

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raise PruningError unless a `state_dict` has the entries of this pruner's own."""
        own = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        given = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in state.items()}
        wrong = [name for name, shape in own.items() if given.get(name) != shape]
        wrong += [name for name in given if name.startswith("mask.") and name not in own]
        if wrong:
            raise PruningError(
                f"the state is of another pruner; missing, of another shape, or of an unknown "
                f"layer: {', '.join(map(repr, wrong))}"
            )

    def held(self) -> dict[str, Tensor]:
        """Return, by name of parameter, a bool tensor of its shape: True where it is held at 0."""
        return {}

    def before_pass(self, training: bool) -> None:
        """Prepare a forward pass, in training mode or not; called once before each."""

    def by_hand(self) -> AbstractContextManager:
        """Return a context in which `before_pass` is left to the caller."""
        return switched(self._hook, on=False) if self._hook else nullcontext()

    def unhook(self) -> None:
        """Leave `before_pass` to the caller from now on."""
        if self._hook is not None:
            self._hook.on = False


class FilterPruner(Pruner):
    """Prune whole filters of a network's convolutions, event by event (arXiv 1906.03728).

    A pruned filter is exactly zero where it is used. Its weights and bias are zero, and so are
    scale and shift of the norms that follow it. At the end of a residual branch the shortcut adds
    nothing to it.

    To resume, make the pruner anew, load its `state_dict`, and then that of the network.

    Args:
        model: Any network that torch.fx can trace, for images (N, C, H, W); other arguments of its
            forward pass keep their defaults. Each mode is traced once, so a choice in Python that
            may come out differently is not noticed: at random, by a counter, or by
            `isinstance(x, Tensor)`, since x is a stand-in then. Neither are hooks that change a
            layer's output, if registered later. If the forward pass states sizes, as
            `x.view(-1, 384)` does, images must be square and of a size in
            `paperlib.pruning.features.SIZES`; `x.flatten(1)` allows any size.
        fractions: The share of each layer's filters that is pruned after its last event, in [0, 1).
        score: One of `SCORES`, or a function from the convolution to its scores (filters,). It is
            called under `torch.no_grad` and may use `conv.weight.grad` of the last backward pass.
            "activation" observes every tenth forward pass in training mode from now on. Its scores
            are equal until the tenth, and it does not prune before the first.
        target: Which scores are pruned: "smallest", "largest" or "random".
        layers: Names of convolutions in forward order. None takes as many of the last convolutions
            as there are fractions, and counts neither grouped ones nor those on shortcuts.
        generator: A CPU generator for target "random".
        norm: False prunes the convolution's weights only; its bias and later modules stay.

    Attributes:
        masks: By name of convolution in forward order, bool (filters,), True where one is kept.
        layers: The layers by name.
        fractions: The fractions by name of layer.

    Raises:
        PruningError: A value or the network cannot be used. Raised before anything is changed.
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
        check_target(target, generator)
        fractions = as_list(fractions, "fractions")
        layers = None if layers is None else as_list(layers, "layers")
        for fraction in fractions:
            check_fraction(fraction)
        found = survey(model)
        check_values(model)
        names = _chosen(model, found, fractions, layers, norm)
        self.layers = {name: found[name] for name in names}
        check_score(score, self.layers.values())
        self.fractions = dict(zip(names, fractions, strict=True))
        self.score, self.target, self.generator, self.norm = score, target, generator, norm
        with torch.inference_mode(False):  # training cannot use tensors of inference mode
            self.masks = {
                name: torch.ones(layer.filters, dtype=torch.bool, device=layer.conv.weight.device)
                for name, layer in self.layers.items()
            }
        # Parameters that have zeros: name, module, name in it, and the indices of the zeros.
        self._gone: list[tuple[str, nn.Module, str, Tensor]] = []
        # Modules whose masks of residual sums have zeros, and the indices of the zeros.
        self.masked: list[tuple[nn.Module, Tensor]] = []
        # By name of such a module: its mask before this pruner, and the last zeros of this pruner.
        self._before: dict[str, Tensor] = {}
        self._zeros: dict[str, Tensor] = {}
        for layer in self.layers.values():
            for where, entries in layer.masks.items():
                there = mask_of(entries.module)
                ones = layer.conv.weight.new_ones(len(entries.filters))
                self._before[where] = ones if there is None else there.clone()
        self._fresh = False  # `_mask_sums` is due
        self.activation: ActivationScore | None = None
        if score == "activation":
            self.activation = ActivationScore(self.layers.values())
            self._hook = PassHook(self.activation.before_pass)
            model.register_forward_pre_hook(self._hook)

    @property
    def due(self) -> bool:
        """True if the score "activation" observes the pass that was announced last."""
        return self.activation is not None and self.activation.due

    def before_pass(self, training: bool) -> None:
        """Count the pass, for the score "activation"."""
        if self.activation is not None:
            self.activation.before_pass(training)

    def choose(self, event: Events, events: Events) -> dict[str, Tensor]:
        """Mark the filters of one event as pruned, and leave the weights as they are.

        Args:
            event: The event's number, from 1, for every layer. Or one entry a layer, None for a
                layer that has no event now.
            events: How many events there are, for every layer, or one entry a layer.

        Returns:
            The indices of these filters by name of layer; a layer without any is left out.

        Raises:
            PruningError: There is no such event, or the number of layers or a score's shape is
                wrong, or scores or parameters are not finite, or nothing was observed for the score
                "activation". No mask is changed then.
        """
        numbers, counts = self._each(event), self._each(events)
        for values in (numbers, counts):
            if len(values) != len(self.layers):
                found = f"{len(values)} layers, but {len(self.layers)} are pruned"
                raise PruningError(f"an event for {found}")
        chosen = {}
        for name, i, n in zip(self.layers, numbers, counts, strict=True):
            if i is None or n is None:
                continue
            mask = self.masks[name]
            count = int(mask.sum()) - kept_filters(len(mask), self.fractions[name], i, n)
            if count > 0:
                scores = self._checked_scores(name)
                chosen[name] = select(scores, mask, count, self.target, self.generator)
        for name, indices in chosen.items():
            self.masks[name][indices] = False
        self._refresh()
        return chosen

    def _each(self, value: Any) -> list:
        """Return an entry for each layer."""
        value = value.tolist() if hasattr(value, "tolist") else value
        return list(value) if isinstance(value, Iterable) else [value] * len(self.layers)

    def prune(self, event: Events, events: Events) -> int:
        """Prune at one event, given as for `choose`; return how many filters were removed."""
        chosen = self.choose(event, events)
        self.hold()
        return sum(len(indices) for indices in chosen.values())

    @torch.no_grad()
    def hold(self) -> None:
        """Set every pruned parameter to zero. Call this after each optimizer step."""
        for _, module, key, indices in self._gone:
            getattr(module, key).index_fill_(0, indices, 0)
        if self._fresh:
            self._mask_sums()
        for module, indices in self.masked:
            if (mask := mask_of(module)) is not None:
                mask.index_fill_(0, indices, 0)

    def held(self) -> dict[str, Tensor]:
        """Return, by name of parameter, a bool tensor of its shape: True where it is held at 0."""
        out: dict[str, Tensor] = {}
        for name, module, key, indices in self._gone:
            like = getattr(module, key)
            out.setdefault(name, torch.zeros_like(like, dtype=torch.bool))[indices] = True
        return out

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that later events depend on, generators apart, as named tensors."""
        state = super().state_dict()
        return state | (self.activation.state_dict() if self.activation is not None else {})

    def load_masks(self, state: Mapping[str, Tensor]) -> None:
        """Resume from a `state_dict`, and leave the weights as they are."""
        super().load_masks(state)
        if self.activation is not None:
            self.activation.load_state_dict(state)
        self._refresh()

    def _refresh(self) -> None:
        """Find the indices that `hold` needs, once an event instead of at each step."""
        self._gone, self._fresh = [], True
        for name, mask in self.masks.items():
            gone = (~mask).nonzero().squeeze(1)
            for full_name, module, key, entries in self._parameters(name) if len(gone) else ():
                indices = entries.of(gone).to(getattr(module, key).device)
                self._gone.append((full_name, module, key, indices))

    def _mask_sums(self) -> None:
        """Find the zeros in masks of residual sums; a sum with nothing pruned gets no mask."""
        found: dict[str, tuple[nn.Module, list[Tensor]]] = {}
        for name, layer in self.layers.items() if self.norm else ():
            gone = (~self.masks[name]).nonzero().squeeze(1)
            for where, entries in layer.masks.items():
                _, zeros = found.setdefault(where, (entries.module, []))
                zeros.append(entries.of(gone).to(layer.conv.weight.device))
                if len(gone) and mask_of(entries.module) is None:
                    add_mask(entries.module, self._before[where].to(layer.conv.weight))
        self.masked, self._fresh = [], False
        for where, (module, zeros) in found.items():
            if (mask := mask_of(module)) is not None:
                indices = torch.cat(zeros)
                if (last := self._zeros.get(where)) is not None:  # the pruner may have gone back
                    mask[last] = self._before[where].to(mask)[last]
                self._zeros[where] = indices
                self.masked.append((module, indices))

    def _parameters(self, name: str) -> Iterator[tuple[str, nn.Module, str, Entries]]:
        """Yield a layer's parameters that are zero with a filter: name, module, key, entries."""
        for where, entries in self.layers[name].zeroed(self.norm).items():
            for key in entries.parameters:
                yield f"{where}.{key}", entries.module, key, entries

    def _checked_scores(self, name: str) -> Tensor | None:
        """Return a layer's scores (filters,), or None for target "random".

        Raises:
            PruningError: The parameters or the scores of kept filters are not finite, or the scores
                have another shape.
        """
        if not all(getattr(m, key).isfinite().all() for _, m, key, _ in self._parameters(name)):
            raise PruningError(f"layer {name!r} or its norm is not finite")
        if self.target == "random":
            return None
        if self.activation is not None and self.activation.passes == 0:
            raise PruningError(f"score 'activation' of {name!r}: no pass in training mode so far")
        scores = scores_of(self.layers[name], self.score, self.activation)
        shape = tuple(self.masks[name].shape)
        if tuple(scores.shape) != shape:
            raise PruningError(
                f"the score of {name!r} has shape {tuple(scores.shape)}, not {shape}"
            )
        if scores.is_complex() or not scores[self.masks[name]].isfinite().all():
            raise PruningError(f"the score of {name!r} is not finite, or complex")
        return scores


def as_list(values: Iterable, what: str) -> list:
    """Return values as a list; raise PruningError for a string, or for a single number."""
    if not isinstance(values, str):
        with suppress(TypeError):
            return list(values)
    raise PruningError(f"{what} must be a list, got {values!r}")


def _chosen(
    model: nn.Module,
    found: Mapping[str, PrunableLayer],
    fractions: Sequence[float],
    layers: Sequence[str] | None,
    norm: bool,
) -> list[str]:
    """Return the names of the layers to prune; raise PruningError if one cannot be pruned."""
    countable = [name for name, layer in found.items() if not layer.passed_over]
    can = ", ".join(name for name in countable if not found[name].problem(norm)) or "none"
    if layers is None and len(fractions) > len(countable):
        raise PruningError(
            f"{len(fractions)} fractions, but {type(model).__name__} has {len(countable)} "
            f"prunable convolutions: {', '.join(countable)}"
        )
    names = countable[len(countable) - len(fractions) :] if layers is None else list(layers)
    for name in names:
        if name not in found:
            raise PruningError(f"no prunable layer {name!r}: one of {can}")
        if why := found[name].problem(norm):
            raise PruningError(
                f"cannot prune {name!r}: {why}. Choose other layers, among {can}"
                + ("; or mask its weights only, with norm=False" * (why is found[name].leak))
            )
    check_order(names, countable)
    if len(names) != len(fractions):
        raise PruningError(f"{len(fractions)} fractions for {len(names)} layers")
    return names
