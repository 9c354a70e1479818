"""Which filters or weights are pruned, and when: scores, targets, schedules and masks.

arXiv 1906.03728 (filters) and arXiv 1805.01930 (single weights). A pruned parameter is set to zero
and put back to zero by `hold()` after every optimizer step; the forward pass of a pruned network
is that of a dense one, with nothing masked in it.

A network of one's own, residual or not, is pruned in the same way:

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

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from paperlib.models import ResidualSum

TARGETS = ("smallest", "largest", "random")
SCHEDULES = ("linear", "annealing")
OBSERVE_EVERY = 10
OBSERVE_DECAY = 0.9


class PruningError(ValueError):
    """A request that cannot be carried out; the message names the value and the valid ones."""


# Schedules


def kept_filters(filters: int, fraction: float, event: int, events: int) -> int:
    """How many of `filters` are kept after `event` (1-based) of `events` (arXiv 1906.03728).

    The same number goes at each event but for rounding, always up, in favour of keeping.
    """
    _check_fraction(fraction)
    if not 1 <= event <= events:
        raise PruningError(f"event must be from 1 to {events}, got {event}")
    final = _final(filters, fraction)
    return final - (filters - final) * (event - events) // events


def kept_weights(
    weights: int, fraction: float, event: int, events: int, schedule: str = "linear", mu: float = 0
) -> int:
    """How many of `weights` are kept after `event` (1-based) of `events`.

    linear: as `kept_filters`. annealing: that of Feature Selection with Annealing, which with
    larger mu removes more at first and with mu = 0 is done after half of the events.
    """
    if schedule not in SCHEDULES:
        raise PruningError(f"unknown schedule {schedule!r}: one of {', '.join(SCHEDULES)}")
    if mu < 0:
        raise PruningError(f"mu must be at least 0, got {mu}")
    linear = kept_filters(weights, fraction, event, events)
    if schedule == "linear":
        return linear
    final = _final(weights, fraction)
    share = max(0.0, (events - 2 * event) / (2 * event * mu + events))
    return math.ceil(round(final + (weights - final) * share, 6))


def _final(count: int, fraction: float) -> int:
    # Rounded first: (1 - 0.7) * 10 is 3.0000000000000004 in floating point, and must give 3.
    return math.ceil(round((1 - fraction) * count, 6))


def _check_fraction(fraction: float) -> None:
    if not 0 <= fraction < 1:
        raise PruningError(f"a fraction to prune must be in [0, 1), got {fraction}")


# Scores


def expected_activation(gamma: Tensor, beta: Tensor, signed: bool = False) -> Tensor:
    """E[BN]: the expected value of relu(gamma * z + beta) for z standard normal.

    gamma, beta: batch norm's scale and shift, any equal shapes; the result has that shape. gamma
    counts by magnitude, or with its sign where `signed` (arXiv 1906.03728, appendix). Finite for
    finite input: relu(beta) at gamma = 0, and 0 where the probability to be positive is 0.
    """
    scale = gamma if signed else gamma.abs()
    alpha = -beta / torch.where(scale == 0, 1, scale)
    positive = 1 - torch.special.ndtr(alpha)
    density = torch.exp(-0.5 * alpha.square()) / math.sqrt(2 * math.pi)
    value = torch.where(positive == 0, 0, positive * beta + density * scale)
    return torch.where(scale == 0, beta.relu(), value)


def select(
    scores: Tensor | None,
    kept: Tensor,
    count: int,
    target: str,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Indices of the `count` among the kept ones that the target says go next.

    scores: (n,), unused where target is "random". kept: (n,) bool. Ties go by position, the first
    in order first. The random choice is drawn on the CPU from `generator`.
    """
    candidates = kept.nonzero().squeeze(1)
    if target == "random":
        order = torch.randperm(len(candidates), generator=generator).to(candidates.device)
    else:
        order = scores[candidates].sort(descending=target == "largest", stable=True).indices
    return candidates[order[:count]]


# Layers


@dataclass(frozen=True)
class PrunableLayer:
    """A convolution and what follows it, as found in a network's graph.

    norm: its batch norm. sum: where it ends the branch of a residual block, the `ResidualSum` it
    feeds; block: or the block's module, where that adds with a plain `+`.
    """

    name: str
    conv: nn.Conv2d
    norm_name: str | None = None
    norm: nn.BatchNorm2d | None = None
    sum: ResidualSum | None = None
    block: nn.Module | None = None

    @property
    def filters(self) -> int:
        return self.conv.out_channels

    @property
    def output(self) -> nn.Module | None:
        """The module whose output is this layer's, before ReLU; None where no module gives it."""
        if self.block is not None:
            return None
        return self.sum or self.norm or self.conv


def prunable_layers(model: nn.Module) -> dict[str, PrunableLayer]:
    """A network's prunable convolutions by name, in forward order.

    Every convolution is one, but those on the shortcut of a residual block and grouped ones.
    Raises PruningError where torch.fx cannot follow the network's forward.
    """
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:
        raise PruningError(
            f"cannot follow the forward pass of {type(model).__name__} with torch.fx: {error}"
        ) from error
    finally:
        vars(tracer).clear()  # it is part of a cycle, and would keep the network
    modules = dict(model.named_modules())
    layers = {}
    for node in graph.nodes:
        conv = _module(node, modules, nn.Conv2d)
        if conv is None or conv.groups != 1:
            continue
        tail, norm = node, None
        if len(node.users) == 1:
            norm = _module(next(iter(node.users)), modules, nn.BatchNorm2d)
            tail = next(iter(node.users)) if norm is not None else node
        found = {"norm": norm, "norm_name": tail.target if norm is not None else None}
        adds = [user for user in tail.users if _is_add(user, modules)]
        if adds:
            branch = _branch(adds[0], modules)
            if branch is not tail:
                continue
            found["sum"] = _module(adds[0], modules, ResidualSum)
            if found["sum"] is None:
                found["block"] = _block(adds[0], modules)
        layers[node.target] = PrunableLayer(node.target, conv, **found)
    return layers


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, ResidualSum) or super().is_leaf_module(module, name)


_ADDS = {torch.add, "add", "add_"}
_RELUS = {torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_, "relu", "relu_"}


def _module(node: fx.Node, modules: Mapping[str, nn.Module], kind: type) -> nn.Module | None:
    module = modules.get(node.target) if node.op == "call_module" else None
    return module if isinstance(module, kind) else None


def _is_add(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if _module(node, modules, ResidualSum) is not None:
        return True
    plain = node.target in _ADDS or getattr(node.target, "__name__", "") in ("add", "iadd")
    return plain and len(node.all_input_nodes) == 2


def _branch(add: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node | None:
    """Which operand of a residual sum is the branch: the one with more convolutions behind it."""
    first, second = add.all_input_nodes
    if _module(add, modules, ResidualSum) is not None:
        return first

    def depth(node: fx.Node) -> int:
        convolutions = 0
        while len(node.users) == 1 and len(node.all_input_nodes) == 1:
            convolutions += _module(node, modules, nn.Conv2d) is not None
            node = node.all_input_nodes[0]
        return convolutions

    a, b = depth(first), depth(second)
    return None if a == b else first if a > b else second


def _block(add: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The module that returns this sum, or relu of it."""
    scope = list(add.meta.get("nn_module_stack", {}))
    name = scope[-1] if scope else ""
    last, users = add, list(add.users)
    if len(users) == 1 and (users[0].target in _RELUS or _module(users[0], modules, nn.ReLU)):
        last = users[0]
    inside = any(name in user.meta.get("nn_module_stack", {}) for user in last.users)
    if not name or inside:
        raise PruningError(
            f"the residual sum {add.name!r} is not what a block returns: add with "
            "paperlib.models.ResidualSum() instead of + so that its shortcut can be pruned"
        )
    return modules[name]


# Pruners


class Pruner:
    """What training asks of whatever prunes; this one prunes nothing.

    A hook on the network calls `before_pass`. Where hooks do not run, as when a captured step is
    replayed, it is called by hand, within `by_hand`. due: whether the next pass is observed.
    busy: whether `before_pass` changes weights in the passes to come.
    """

    due = busy = False
    _hooked = True

    def hold(self) -> None:
        """After an optimizer step: what is pruned stays zero."""

    def held(self) -> dict[str, Tensor]:
        """Parameter name -> bool tensor of its shape, True where pruning holds it at zero."""
        return {}

    def before_pass(self, training: bool) -> None:
        """To be called once before each forward pass, in training mode or not."""

    @contextmanager
    def by_hand(self) -> Iterator[None]:
        """In this context the network's hooks leave `before_pass` to the caller."""
        before, self._hooked = self._hooked, False
        try:
            yield
        finally:
            self._hooked = before

    def unhook(self) -> None:
        """From now on the network's hooks leave `before_pass` to the caller."""
        self._hooked = False

    def _hook(self, model: nn.Module, inputs: tuple) -> None:
        if self._hooked:
            self.before_pass(model.training)


def _norm_of(order: int) -> Callable[[PrunableLayer], Tensor]:
    return lambda layer: layer.conv.weight.flatten(1).norm(p=order, dim=1)


def _expected(signed: bool) -> Callable[[PrunableLayer], Tensor]:
    return lambda layer: expected_activation(
        layer.norm.weight.float().cpu(), layer.norm.bias.float().cpu(), signed
    )


_SCORES = {
    "l2": _norm_of(2),
    "l1": _norm_of(1),
    "ebn": _expected(signed=False),
    "ebn_signed": _expected(signed=True),
}
SCORES = (*_SCORES, "activation")


class FilterPruner(Pruner):
    """Prunes whole filters of a network's convolutions, event by event (arXiv 1906.03728).

    model: any network torch.fx can trace. fractions: share of each layer's filters that is gone
    after its last event. layers: names of convolutions in forward order; None takes as many of the
    last prunable ones as there are fractions. score: one of `SCORES`, or a function that takes the
    convolution and returns (filters,) scores. "activation" watches the forward passes in training
    mode from now on. norm: a pruned filter's batch-norm scale and shift, and its bias, are zero
    too, and a residual shortcut adds nothing to it; False masks the convolution's weights only.
    generator: a CPU generator for target "random".

    Raises PruningError on a value that cannot be used, and names the valid ones.
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
        _check_target(target)
        for fraction in fractions:
            _check_fraction(fraction)
        prunable = prunable_layers(model)
        if layers is None:
            if len(fractions) > len(prunable):
                raise PruningError(
                    f"{len(fractions)} fractions, but {type(model).__name__} has "
                    f"{len(prunable)} prunable convolutions: {', '.join(prunable)}"
                )
            layers = list(prunable)[len(prunable) - len(fractions) :]
        _check_layers(layers, prunable)
        if len(layers) != len(fractions):
            raise PruningError(f"{len(fractions)} fractions for {len(layers)} layers")
        self.layers = {name: prunable[name] for name in layers}
        self.fractions = dict(zip(layers, fractions, strict=True))
        self.target, self.generator, self.norm = target, generator, norm
        self.masks = {
            name: torch.ones(layer.filters, dtype=torch.bool, device=layer.conv.weight.device)
            for name, layer in self.layers.items()
        }
        self._gone: dict[str, Tensor] = {}
        self.activation: ActivationScore | None = None
        self._score = self._scorer(model, score)
        if norm:
            for name, layer in self.layers.items():
                if layer.block is not None:
                    layer.block.register_forward_hook(self._silence(name))

    def choose(
        self, event: int | Sequence[int | None], events: int | Sequence[int]
    ) -> dict[str, Tensor]:
        """One event: mark the filters that go as pruned, and return their indices by layer.

        event (1-based) and events: an int for every layer, or one entry a layer, None where a
        layer has no event now. Weights are left as they are: see `prune`.
        """
        chosen = {}
        for name, i, n in self._each_layer(event, events):
            layer, mask = self.layers[name], self.masks[name]
            kept = kept_filters(layer.filters, self.fractions[name], i, n)
            count = int(mask.sum()) - kept
            if count <= 0:
                continue
            scores = None if self.target == "random" else self._checked_scores(name)
            chosen[name] = select(scores, mask, count, self.target, self.generator)
        for name, indices in chosen.items():
            self.masks[name][indices] = False
        self._refresh()
        return chosen

    @property
    def due(self) -> bool:
        """Whether the score "activation" observes the pass that follows."""
        return self.activation is not None and self.activation.due

    def before_pass(self, training: bool) -> None:
        """Counts the pass, for the score "activation"."""
        if self.activation is not None:
            self.activation.before_pass(training)

    def prune(self, event: int | Sequence[int | None], events: int | Sequence[int]) -> int:
        """One event in every layer, as for `choose`; returns how many filters were removed."""
        chosen = self.choose(event, events)
        self.hold()
        return sum(len(indices) for indices in chosen.values())

    @torch.no_grad()
    def hold(self) -> None:
        """Set every pruned parameter to zero: to be called after each optimizer step."""
        for name, gone in self._gone.items():
            for parameter in self._parameters(name).values():
                parameter.index_fill_(0, gone, 0)
            add = self.layers[name].sum
            if self.norm and add is not None and add.keep is None:
                add.keep = self.masks[name].to(self.layers[name].conv.weight.dtype)[:, None, None]

    def held(self) -> dict[str, Tensor]:
        """Parameter name -> bool tensor of its shape, True where pruning holds it at zero."""
        out = {}
        for name in self._gone:
            for parameter_name, parameter in self._parameters(name).items():
                gone = ~self.masks[name]
                out[parameter_name] = gone.view(-1, *[1] * (parameter.dim() - 1)).expand_as(
                    parameter
                )
        return out

    def state_dict(self) -> dict[str, Tensor]:
        """All that `prune` goes by, as named tensors."""
        state = {f"mask.{name}": mask for name, mask in self.masks.items()}
        if self.activation is not None:
            state |= self.activation.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, mask in self.masks.items():
            mask.copy_(state[f"mask.{name}"])
        if self.activation is not None:
            self.activation.load_state_dict(state)
        self._refresh()
        self.hold()

    def _refresh(self) -> None:
        """What `hold` needs of the masks, found once an event: index tensors cost no masking."""
        for name, mask in self.masks.items():
            gone = (~mask).nonzero().squeeze(1)
            if len(gone):
                self._gone[name] = gone
            else:
                self._gone.pop(name, None)
            add = self.layers[name].sum
            if add is not None and add.keep is not None:
                # In place: a captured step goes on reading this very tensor.
                add.keep.copy_(mask.view_as(add.keep))

    def _parameters(self, name: str) -> dict[str, nn.Parameter]:
        layer = self.layers[name]
        found = {f"{name}.weight": layer.conv.weight}
        if self.norm:
            if layer.conv.bias is not None:
                found[f"{name}.bias"] = layer.conv.bias
            if layer.norm is not None and layer.norm.affine:
                found[f"{layer.norm_name}.weight"] = layer.norm.weight
                found[f"{layer.norm_name}.bias"] = layer.norm.bias
        return found

    def _each_layer(
        self, event: int | Sequence[int | None], events: int | Sequence[int]
    ) -> Iterator[tuple[str, int, int]]:
        n = len(self.layers)
        event = [event] * n if isinstance(event, int) else list(event)
        events = [events] * n if isinstance(events, int) else list(events)
        if len(event) != n or len(events) != n:
            raise PruningError(f"an event for {len(event)} layers, but {n} are pruned")
        for name, i, of in zip(self.layers, event, events, strict=True):
            if i is not None:
                yield name, i, of

    def _scorer(self, model: nn.Module, score: str | Callable) -> Callable[[PrunableLayer], Tensor]:
        if callable(score):
            return lambda layer: score(layer.conv)
        if score not in SCORES:
            raise PruningError(
                f"unknown score {score!r}: one of {', '.join(SCORES)}, or a function"
            )
        for layer in self.layers.values():
            if score.startswith("ebn") and (layer.norm is None or not layer.norm.affine):
                raise PruningError(
                    f"score {score!r} needs a batch norm with scale and shift after convolution "
                    f"{layer.name!r}, which has none"
                )
        if score == "activation":
            self.activation = activation = ActivationScore(self.layers.values())
            model.register_forward_pre_hook(self._hook)
            return lambda layer: activation.scores[layer.name]
        return _SCORES[score]

    @torch.no_grad()
    def _checked_scores(self, name: str) -> Tensor:
        layer = self.layers[name]
        scores = torch.as_tensor(self._score(layer), device=layer.conv.weight.device)
        if scores.shape != (layer.filters,):
            raise PruningError(
                f"the score of {name!r} has shape {tuple(scores.shape)}, not ({layer.filters},)"
            )
        if not scores[self.masks[name]].isfinite().all():
            raise PruningError(f"the score of {name!r} is not finite")
        return scores

    def _silence(self, name: str) -> Callable:
        def hook(block: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            if name not in self._gone or isinstance(output, fx.Proxy):
                return output
            return output * self.masks[name].to(output.dtype)[:, None, None]

        return hook


class ActivationScore:
    """A running mean of each filter's pre-ReLU activity (arXiv 1906.03728, section 4).

    The absolute output, summed over batch and pixels, of the layer's batch norm, or of the sum
    after the shortcut at the end of a residual block; taken on every tenth forward pass in
    training mode, as 0.9 * old + 0.1 * new, from zero.
    """

    def __init__(self, layers: Iterable[PrunableLayer]) -> None:
        self.passes = 0
        self.due = False
        self.scores: dict[str, Tensor] = {}
        for layer in layers:
            if layer.output is None:
                raise PruningError(
                    f"score 'activation' cannot see the residual sum after {layer.name!r}: add "
                    "with paperlib.models.ResidualSum() instead of +"
                )
            self.scores[layer.name] = torch.zeros(
                layer.filters, device=layer.conv.weight.device, dtype=torch.float32
            )
            layer.output.register_forward_hook(self._observer(layer.name))

    def before_pass(self, training: bool) -> None:
        """Counts passes in training mode; every tenth of them is due."""
        self.passes += training
        self.due = training and self.passes % OBSERVE_EVERY == 0

    def _observer(self, name: str) -> Callable:
        @torch.no_grad()
        def observe(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            if self.due:
                total = output.detach().float().abs().sum(dim=(0, 2, 3))
                self.scores[name].mul_(OBSERVE_DECAY).add_(total, alpha=1 - OBSERVE_DECAY)

        return observe

    def state_dict(self) -> dict[str, Tensor]:
        scores = {f"score.{name}": score for name, score in self.scores.items()}
        return scores | {"passes": torch.tensor(self.passes)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.passes = int(state["passes"])
        for name, score in self.scores.items():
            score.copy_(state[f"score.{name}"])


class WeightPruner(Pruner):
    """Prunes single weights of layers by magnitude, event by event (arXiv 1805.01930).

    layer: name of a dense or convolutional layer, or several names; fraction: what is gone of each
    after the last event, one for all or one a layer. target: "largest", "smallest" or "random".
    schedule: "linear", or "annealing" with mu. generator: a CPU generator for target "random".
    `masks` are of the weights' shape, True where kept.
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
        _check_target(target)
        names = [layer] if isinstance(layer, str) else list(layer)
        fractions = [fraction] * len(names) if isinstance(fraction, int | float) else fraction
        if len(fractions) != len(names):
            raise PruningError(f"{len(fractions)} fractions for {len(names)} layers")
        prunable = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
        _check_layers(names, prunable)
        self.layers = {name: prunable[name] for name in names}
        self.fractions = dict(zip(names, fractions, strict=True))
        self.target, self.schedule, self.mu, self.generator = target, schedule, mu, generator
        for f in fractions:
            kept_weights(1, f, 1, 1, schedule, mu)  # raises where one of them cannot be
        self.masks = {
            name: torch.ones(module.weight.shape, dtype=torch.bool, device=module.weight.device)
            for name, module in self.layers.items()
        }

    @torch.no_grad()
    def prune(self, event: int, events: int) -> int:
        """One event (1-based) in every layer; returns how many weights were removed."""
        removed = 0
        for name, module in self.layers.items():
            mask = self.masks[name].view(-1)
            kept = kept_weights(
                mask.numel(), self.fractions[name], event, events, self.schedule, self.mu
            )
            count = int(mask.sum()) - kept
            if count > 0:
                magnitudes = module.weight.detach().reshape(-1).abs()
                mask[select(magnitudes, mask, count, self.target, self.generator)] = False
                removed += count
        self.hold()
        return removed

    @torch.no_grad()
    def hold(self) -> None:
        """Set every pruned weight to zero: to be called after each optimizer step."""
        for name, mask in self.masks.items():
            self.layers[name].weight.masked_fill_(~mask, 0)

    def held(self) -> dict[str, Tensor]:
        """Parameter name -> bool tensor of its shape, True where pruning holds it at zero."""
        return {f"{name}.weight": ~mask for name, mask in self.masks.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """All that `prune` goes by, as named tensors."""
        return {f"mask.{name}": mask for name, mask in self.masks.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, mask in self.masks.items():
            mask.copy_(state[f"mask.{name}"])
        self.hold()


def _check_target(target: str) -> None:
    if target not in TARGETS:
        raise PruningError(f"unknown target {target!r}: one of {', '.join(TARGETS)}")


def _check_layers(names: Sequence[str], prunable: Mapping[str, nn.Module]) -> None:
    for name in names:
        if name not in prunable:
            raise PruningError(f"no prunable layer {name!r}: one of {', '.join(prunable)}")
    if list(names) != [name for name in prunable if name in set(names)]:
        raise PruningError(f"layers must be named once each, in forward order, got {list(names)}")
