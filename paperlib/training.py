"""One run, from a configuration to its record: the one training loop.

Everything random comes from a named stream of the seed, one a purpose and epoch: settings that
share a seed share their initial weights, order of images and augmentation, and can be compared in
pairs. All streams are drawn on the CPU, so every device sees the same.
"""

import hashlib
import importlib
import math
import os
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from paperlib import (
    backends,
    checkpoints,
    convolutions,
    data,
    executors,
    graphs,
    locks,
    memory,
    models,
    provenance,
)
from paperlib.checkpoints import Checkpoint
from paperlib.config import Config, FilterPruning, Flatness, WeightPruning
from paperlib.flatness import gradient_covariance_trace, hessian_spectrum, sharpness
from paperlib.loop import PlainLoop, QuickLoop, Totals, batch_norms, evaluate, recalibrate
from paperlib.noise import FilterNoise
from paperlib.pruning import FilterPruner, Pruner, WeightPruner
from paperlib.runs import RunRecord, Store, StoreError

EVALUATION_BATCH = {"cpu": 128}  # measured: what is larger leaves the caches
LARGE_EVALUATION_BATCH = 1000  # on all other devices
# torch's global generators and torch.fx's tracing belong to the process: threads take turns.
_one_at_a_time = threading.RLock()
HISTOGRAM_IMAGES = 128
LOSS_IMAGES = 1000  # training images whose loss is measured around an event
RECALIBRATION_IMAGES, RECALIBRATION_BATCH = 2000, 128
# Columns that no other number depends on. NaN but at events (the last one: but in the last epoch).
BESIDE = ("recalibrated", "pre_loss", "post_loss", "distance")


class TrainingError(RuntimeError):
    """A run that cannot go on; the message names it and the epoch."""


class ChangedInputs(StoreError):
    """A record made with other data or code than there is now; the message names both."""


def stream(seed: int, name: str, epoch: int = 0) -> int:
    """The seed of one named stream of randomness."""
    digest = hashlib.sha256(f"{seed}/{name}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def generator(seed: int, name: str, epoch: int = 0) -> torch.Generator:
    """A CPU generator at the start of one named stream."""
    return torch.Generator().manual_seed(stream(seed, name, epoch))


@contextmanager
def seeded(seed: int, name: str, epoch: int = 0):
    """torch's global generators at the start of a named stream, and afterwards as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(stream(seed, name, epoch))
        yield


def choose_device(name: str = "auto") -> torch.device:
    """ "auto" is the first there is of cuda, mps, cpu. Raises ValueError where it is not there."""
    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there[:0] = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device(there[0])
    if name not in there:
        raise ValueError(f"no device {name!r} here: one of auto, {', '.join(there)}")
    return torch.device(name)


def build(config: Config, classes: int = 10, channels: int = 3) -> nn.Module:
    """The run's network, with the initial weights of its seed."""
    with seeded(config.seed, "weights"):
        if ":" in config.model:
            return resolve(config.model)(num_classes=classes, in_channels=channels)
        return models.build(config.model, classes, channels, config.width, config.dropout)


def resolve(spec: str) -> Callable:
    """The object that "package.module:name" names."""
    module, _, name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot find {spec!r}: {error}") from error


def _network(config: Config, classes: int, channels: int, device: torch.device | str) -> nn.Module:
    """`build` on a device, in the memory format that trains fastest there."""
    device = torch.device(device)
    return build(config, classes, channels).to(device, memory_format=_layout(config, device))


def _layout(config: Config, device: torch.device) -> torch.memory_format:
    """The memory format of images and convolutions' weights that a device computes fastest in.

    cuDNN has most float32 kernels for channels-first only, and would convert around each of them.
    """
    planar = device.type == "mps" or (device.type == "cuda" and config.precision == "float32")
    return torch.contiguous_format if planar else torch.channels_last


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Adam or SGD over all parameters, fused."""
    common = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=config.momentum, **common)
    return torch.optim.Adam(model.parameters(), **common)


def make_pruner(
    config: Config, model: nn.Module
) -> FilterPruner | FilterNoise | WeightPruner | None:
    """The run's pruner, or noise that stands in for it, or None where nothing is pruned."""
    p = config.pruning
    chance = torch.Generator()
    if isinstance(p, FilterPruning):
        score = resolve(p.score) if ":" in p.score else p.score
        pruner = FilterPruner(model, p.fractions, score, p.target, p.layers, chance, p.norm)
        if config.noise is None:
            return pruner
        return FilterNoise(model, pruner, config.noise.kind, config.noise.passes, torch.Generator())
    if isinstance(p, WeightPruning):
        return WeightPruner(model, p.layers, p.fractions, p.target, p.schedule, p.mu, chance)
    return None


def make_loop(
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pruner: Pruner | None,
    device: torch.device,
    fast: bool = False,
) -> PlainLoop:
    """How a run trains and evaluates: on a CPU the quick way, on a GPU by the plain loop.

    fast: on a GPU, with networks of ours, by CUDA graphs. The variable PAPERLIB_PLAIN=1 has the
    plain loop everywhere.
    """

    def autocast() -> torch.autocast:
        # No cache of weights: a graph must convert them itself, and each is used once a pass.
        enabled, cached = config.precision == "bfloat16", device.type != "cuda"
        return torch.autocast(device.type, torch.bfloat16, enabled, cache_enabled=cached)

    kind = PlainLoop
    if os.environ.get("PAPERLIB_PLAIN", "0") != "1":
        if device.type == "cuda" and fast and config.model in models.MODELS:
            kind = graphs.CapturedLoop
        elif device.type == "cpu":
            kind = QuickLoop
    return kind(model, optimizer, pruner, autocast)


def native_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16, rather than emulate it at a fraction of the speed."""
    if device.type == "cpu":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


@torch.no_grad()
def normalised_outputs(
    model: nn.Module, images: torch.Tensor, layers: int = 8, bins: int = 200, reach: float = 5.0
) -> np.ndarray:
    """Histograms of what the last batch norms make of images, before their scale and shift.

    In training mode, by the statistics of this batch (arXiv 1906.03728, figure B1); the network,
    its running statistics too, stays as it is. Returns (layers, bins) densities over all channels
    and pixels in [-reach, reach], the deepest layer last.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)][-layers:]
    densities = {}

    def observe(norm: nn.BatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
        outputs = F.batch_norm(inputs[0].float(), None, None, training=True, eps=norm.eps).cpu()
        counts = torch.histc(outputs, bins, -reach, reach)
        densities[norm] = (counts / counts.sum() * bins / (2 * reach)).numpy()

    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    hooks = [norm.register_forward_pre_hook(observe) for norm in norms]
    mode = model.training
    try:
        model.train()(images)
    finally:
        model.train(mode)
        for hook in hooks:
            hook.remove()
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])
    return np.stack([densities[norm] for norm in norms])


MAGNITUDES = np.logspace(-6, 1, 141)


def magnitudes(weight: torch.Tensor) -> np.ndarray:
    """How many weights that are not zero have a magnitude in each bin of `MAGNITUDES`, (140,).

    The bins are a twentieth of a decade wide; what is smaller or larger counts in the outermost.
    """
    sizes = weight.detach().abs().flatten().double().cpu().numpy()
    return np.histogram(np.clip(sizes[sizes > 0], MAGNITUDES[0], MAGNITUDES[-1]), MAGNITUDES)[0]


def weight_histograms(pruner: WeightPruner, moment: str) -> dict[str, np.ndarray]:
    """`magnitudes` of every layer that is pruned, as "MOMENT.LAYER"."""
    return {f"{moment}.{name}": magnitudes(m.weight) for name, m in pruner.layers.items()}


def initial_network(record: RunRecord) -> nn.Module:
    """The network of a record at the initial weights of its seed."""
    counted = record.provenance
    return build(record.config, counted.get("classes", 10), counted.get("channels", 3))


def pruned_network(record: RunRecord) -> tuple[nn.Module, WeightPruner]:
    """The network of a record whose single weights were pruned, at its seed's initial weights.

    The record keeps where the zeros are (histograms=True), not the weights: what depends on the
    zeros alone, sizes and times, is that of the trained network. Returns the network and its
    pruner. Raises ValueError where the record has no such masks, or of another network.
    """
    run = f"the record of {record.config.title}"
    if not isinstance(record.config.pruning, WeightPruning):
        raise ValueError(f"{run} is not of single weights pruned")
    model = initial_network(record)
    pruner = make_pruner(record.config, model)
    state = {}
    for name, mask in pruner.masks.items():
        packed = record.arrays.get(f"kept.{name}")
        if packed is None:
            raise ValueError(f"{run} has no mask of {name!r}: it was not made with histograms=True")
        if len(packed) != math.ceil(mask.numel() / 8):
            shape = tuple(mask.shape)
            raise ValueError(f"{run} has a mask of {len(packed)} bytes of {name!r}, not of {shape}")
        kept = torch.from_numpy(np.unpackbits(packed, count=mask.numel()).astype(bool))
        state[f"mask.{name}"] = kept.view(mask.shape)
    pruner.load_state_dict(state)
    return model, pruner


def imagenet_outputs(config: Config) -> dict[str, np.ndarray]:
    """`normalised_outputs` of torchvision's VGG19 on the run's first training images.

    Untrained, and trained on ImageNet: the pair figure B1 shows. Raises RuntimeError where its
    weights cannot be downloaded.
    """
    trained = models.pretrained_vgg19_bn()
    dataset = data.load(config.data)
    images = data.Batches(
        dataset.train_images, dataset.train_labels, dataset.mean, dataset.std, torch.device("cpu")
    )
    first, _ = images.first(HISTOGRAM_IMAGES)
    with seeded(config.seed, "weights"):
        untrained = models.build("vgg19_bn", num_classes=1000)
    networks = {"untrained": untrained, "trained": trained}
    return {name: normalised_outputs(network, first) for name, network in networks.items()}


def measured_flatness(
    model: nn.Module, test: data.Batches, flatness: Flatness, held: dict[str, torch.Tensor]
) -> dict[str, np.ndarray]:
    """What figures 6 and E1 to E5 are drawn from; the network stays as it is.

    eigenvalues (k,), by magnitude, and noise, Tr(C), on the first test images; epsilons (E,), and
    losses and accuracies (D, E) on the whole test set along the eigenvectors of the D algebraically
    largest of the eigenvalues (arXiv 1906.03728, section 3 and appendix E).
    """
    images, labels = test.first(flatness.images)
    eigenvalues, vectors = hessian_spectrum(model, images, labels, flatness.eigenvalues, held)
    directions = vectors[eigenvalues.argsort(descending=True)[: flatness.directions]]
    del vectors
    noise = gradient_covariance_trace(model, images, labels, held)
    along = test.first(flatness.test_images or len(test.labels))
    losses, accuracies = sharpness(model, *along, directions, flatness.epsilons, held)
    return {
        "eigenvalues": eigenvalues.cpu().numpy(),
        "noise": np.array(noise),
        "epsilons": np.array(flatness.epsilons),
        "losses": losses.numpy(),
        "accuracies": accuracies.numpy(),
    }


class Replica:
    """A second network that takes over a run's state, to measure it without touching the run.

    Network and pruner are built anew. A deep copy would share the run's hooks, and through them
    its counters, scores and noise. As for a checkpoint, a network may keep state in parameters and
    buffers only.

    Args:
        config: The run's configuration.
        classes: Of the run's data, as `channels`.
        loop: The run's; the replica computes on its device, in its precision.
    """

    def __init__(self, config: Config, classes: int, channels: int, loop: PlainLoop) -> None:
        self.device = next(loop.model.parameters()).device
        self.model = _network(config, classes, channels, self.device)
        self.pruner = make_pruner(config, self.model)
        self.autocast = loop.autocast
        self.quick = isinstance(loop, QuickLoop)

    @torch.no_grad()
    def load(self, model: nn.Module, pruner: Pruner) -> None:
        """Take over the state of the run's network and pruner."""
        self.pruner.load_state_dict(pruner.state_dict())  # first: it may add buffers
        state = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            tensor.copy_(state[name])

    def loss(self, train: data.Batches) -> Totals:
        """The loss on the first `LOSS_IMAGES` training images, without augmentation."""
        images, labels = train.first(LOSS_IMAGES)
        size = self._evaluation_batch
        with self._measuring():
            batches = zip(images.split(size), labels.split(size), strict=True)
            return evaluate(self.model, batches, self.autocast)

    def recalibrated(self, train: data.Batches, test: data.Batches) -> Totals:
        """The test accuracy with batch norm's running statistics taken anew.

        They are taken from the first `RECALIBRATION_IMAGES` training images, without augmentation.
        A last batch of one image is left out, as some batch norms cannot train on it. The replica's
        statistics change. NaN without batch norm.
        """
        if not batch_norms(self.model):
            return Totals(math.nan, math.nan, 1)
        images, _ = train.first(RECALIBRATION_IMAGES)
        batches = list(images.split(RECALIBRATION_BATCH))
        if len(batches) > 1 and len(batches[-1]) == 1:
            batches.pop()
        with self._measuring():
            recalibrate(self.model, batches, self.autocast)
            return evaluate(self.model, test.evaluation(self._evaluation_batch), self.autocast)

    @property
    def _evaluation_batch(self) -> int:
        return EVALUATION_BATCH.get(self.device.type, LARGE_EVALUATION_BATCH)

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        with ExitStack() as stack:
            if isinstance(self.pruner, FilterNoise):
                stack.enter_context(self.pruner.paused())
            if self.quick:
                stack.enter_context(convolutions.quick(self.model))
            yield


@torch.no_grad()
def distance(model: nn.Module, initial: nn.Module) -> float:
    """The L2 distance of all parameters from initial ones, relative to the norm of these."""
    start = {name: parameter.cpu().double() for name, parameter in initial.named_parameters()}
    moved = torch.zeros((), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        moved += (parameter.cpu().double() - start[name]).square().sum()
    norm = sum(parameter.square().sum() for parameter in start.values())
    return float((moved / norm).sqrt())


@dataclass
class Moment:
    """The end of an epoch, as `run` shows it to a callback: the row so far and the network."""

    epoch: int
    row: dict[str, float]
    model: nn.Module
    pruner: FilterPruner | FilterNoise | WeightPruner | None
    test: data.Batches
    config: Config


def run(
    config: Config,
    store: Store | None = None,
    device: str = "auto",
    callback: Callable[[Moment], dict[str, np.ndarray] | None] | None = None,
    wait: bool = True,
    fast: bool = False,
) -> RunRecord:
    """Train, prune and measure one network as `config` says; or return the store's record of it.

    store: where the record is looked up and written; None keeps nothing. A run that was stopped
    goes on from its last checkpoint in the store. callback: called at the end of each epoch with a
    `Moment`; arrays it returns are kept in the record. It must leave the network and torch's
    generators as they are, and sees an epoch again whose checkpoint was not written. wait: where
    another process has the run, wait for its record rather than raise `locks.Claimed`. fast: as
    for `make_loop`.

    Raises ConfigError, PruningError, DataError or ValueError on what cannot be run, before any
    training; StoreError where the store cannot be written, or has a record that was made with other
    data or code (`ChangedInputs`); TrainingError where the loss stops being finite, which the store
    then notes, or where the process that was waited for failed; and `locks.Lost` where another
    process took the run over from this one.
    """
    going = _Running(config, store, device, callback, wait, alone=True, fast=fast)
    while going.result is None:
        going.go_on()
    return going.result


def run_together(
    configs: Iterable[Config],
    store: Store | None = None,
    device: str = "auto",
    callbacks: Iterable[Callable[[Moment], dict[str, np.ndarray] | None] | None] | None = None,
    *,
    at_once: int | None = None,
    fast: bool = False,
    until: float = math.inf,
) -> list[RunRecord | Exception]:
    """`run` several on one device, `at_once` of them at any time, in the order they are given.

    Returns the record of each, or why there is none. On a CPU it is no faster than one after the
    other. A run that another process has is not waited for: its `locks.Claimed` is returned.

    callbacks: one a run. at_once: all, where None is given. fast and until: as for `by_turns`.
    """
    configs = list(configs)
    at_once = at_once or len(configs)
    callbacks = [None] * len(configs) if callbacks is None else callbacks
    waiting = deque(enumerate(zip(configs, callbacks, strict=True)))
    results: dict[int, RunRecord | Exception] = {}
    with closing(executors.Turns()) as turns:
        while waiting or turns:
            while waiting and len(turns) < at_once:
                i, (config, callback) = waiting.popleft()
                alone = min(at_once, len(configs)) == 1
                steps = by_turns(
                    config, store, device, callback, alone=alone, fast=fast, until=until
                )
                turns.add(i, steps)
            for i, worked, result in turns.turn():
                if not worked:
                    raise result
                results[i] = result
    return [results[i] for i in range(len(configs))]


def by_turns(
    config: Config,
    store: Store | None = None,
    device: str = "auto",
    callback: Callable[[Moment], dict[str, np.ndarray] | None] | None = None,
    *,
    alone: bool = False,
    fast: bool = False,
    until: float = math.inf,
) -> Generator[str | None, None, RunRecord | Exception]:
    """`run` as one of several that take turns (`executors.Turns`) in launching their steps.

    Each has a CUDA stream of its own. A step of a small network leaves most of a GPU idle; steps
    of several share it. What is random in one does not depend on the others. One that finds no
    memory beside the others is begun again, from its checkpoint, when they are done.

    Args:
        config: of the run; store, device, callback and fast as for `run`.
        alone: no other run is at work on the device, so that a lack of memory is a failure.
        until: when the run has to stop, by `time.time`: at the end of an epoch, with a checkpoint.

    Returns:
        The record, or why there is none.
    """
    handled = sys.exception()
    going = _Running(config, store, device, callback, False, alone, fast, until)
    try:
        while going.result is None:
            wish = None
            try:
                going.go_on()
            except Exception as error:
                if isinstance(error, torch.OutOfMemoryError) and not going.alone:
                    going.put_off()
                    wish = executors.ALONE
                else:
                    going.result = error
                _let_go(error, handled)
            if going.result is None:
                yield wish
    finally:
        going.close()
    return going.result


def _let_go(error: BaseException | None, handled: BaseException | None) -> None:
    """Free what the frames of an error's traceback hold: a network, its graphs, their memory.

    handled: what the caller is handling, and wants to look into yet.
    """
    while error is not None and error is not handled:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def spoils(error: object) -> bool:
    """Whether, after this, all else that its process does on a GPU may fail as well."""
    return isinstance(error, graphs.CaptureError | torch.AcceleratorError)


class _Running:
    """A run that goes on from one wait for the device to the next, on a stream of its own.

    alone: no other has memory of the device meanwhile.
    """

    def __init__(
        self,
        config: Config,
        store: Store | None,
        device: str,
        callback,
        wait: bool,
        alone: bool,
        fast: bool = False,
        until: float = math.inf,
    ):
        self.config, self.store, self.device = config, store, device
        self.callback, self.wait, self.alone = callback, wait, alone
        self.fast, self.until = fast, until
        self.steps: Generator[str | None, None, RunRecord] | None = None
        self.stream: torch.cuda.Stream | None = None
        self.waits = False  # for what its stream still has to do
        self.result: RunRecord | Exception | None = None

    def go_on(self) -> None:
        """To the next wait, or the end; at first, where the store has the record, to that.

        Beside others it does not wait for the device here: it stays where it is.
        """
        if self.steps is None:
            self._begin()
            if self.result is not None:
                return
        if self.waits and not self.alone and not self.stream.query():
            return
        with ExitStack() as stack:
            if self.stream is not None:
                # Of the device first: a stream's end would begin something on the one before.
                stack.enter_context(torch.cuda.device(self.stream.device))
                stack.enter_context(torch.cuda.stream(self.stream))
                # The quickest kernels, found by trial at their first use.
                stack.enter_context(backends.switched(torch.backends.cudnn, benchmark=True))
            if self.config.precision == "float32":
                stack.enter_context(backends.full_float32())
            try:
                self.waits = next(self.steps) != graphs.GO_ON and self.stream is not None
            except StopIteration as end:
                self.result = end.value

    def _begin(self) -> None:
        config, store = self.config, self.store
        if store is not None and config.identity in store:
            checkpoints.discard(store.path, config.identity)  # its writer may have died before
            self.result = stored(config, store)
            return
        where = choose_device(self.device)
        if where.type == "cuda":
            torch.cuda.empty_cache()  # of runs that are done; other processes may need it
            self.stream = torch.cuda.Stream(where)
        self.steps = _claimed(
            config, store, where, self.callback, self.wait, self.alone, self.fast, self.until
        )

    def put_off(self) -> None:
        """Begin again, alone."""
        self.steps, self.alone, self.waits = None, True, False

    def close(self) -> None:
        """Give up what a run that is not done has claimed."""
        if self.steps is not None:
            self.steps.close()


def _claimed(
    config: Config,
    store: Store | None,
    device: torch.device,
    callback,
    wait: bool,
    alone: bool,
    fast: bool,
    until: float,
) -> Generator[str | None, None, RunRecord]:
    """Check the run, claim it, do it, and read its record."""
    if store is not None:
        store.check_writable()
    with _one_at_a_time:
        make_pruner(config, build(config))  # raises on names it does not know, before data are read
    if config.precision == "bfloat16" and not native_bfloat16(device):
        warnings.warn(
            f"this {device.type} only emulates bfloat16, some hundred times slower than float32",
            stacklevel=2,
        )
    if store is None:
        with memory.kept():
            return (yield from _run(config, _dataset(config), device, callback, fast=fast))
    earlier = store.failure(config.identity)
    with locks.claim(store.path, config.identity, wait) as claim:
        failure = store.failure(config.identity)
        if failure != earlier and failure is not None:
            raise TrainingError(f"{config.title} failed in another process: {failure}")
        if config.identity not in store:
            with memory.kept():
                yield from _run_once(config, store, device, callback, claim, alone, fast, until)
            return store.read(config.identity)
        return stored(config, store)


def _dataset(config: Config, root: Path | None = None) -> data.Dataset:
    """The run's images: one subset for all seeds, which differ in the network, not the task."""
    checksum = provenance.known_checksum(config.data, root)
    return _subset(config.data, root, checksum, config.train_per_class, config.test_per_class)


@lru_cache(maxsize=1)
def _subset(
    spec: str, root: Path | None, checksum: str | None, training: int | None, test: int | None
) -> data.Dataset:
    """Kept for the next run: a process that does many loads their images once."""
    return data.load(spec, root).subset(training, test)


def source_checksum(config: Config) -> str | None:
    """The checksum of the code of the score and network that a run names; None without any.

    Of both, it is that of the two checksums.
    """
    specs = [config.model]
    if isinstance(config.pruning, FilterPruning):
        specs.append(config.pruning.score)
    found = [checksum for checksum in map(provenance.source_checksum, specs) if checksum]
    if len(found) < 2:
        return found[0] if found else None
    return hashlib.sha256("/".join(found).encode()).hexdigest()


def _checksums(config: Config, images: str | None) -> dict[str, str | None]:
    return {"data": images or None, "source": source_checksum(config)}


def stored(config: Config, store: Store) -> RunRecord:
    """The store's record of a run.

    Raises:
        ChangedInputs: its data, or the code of a score or network that it names, have changed
            since. They are compared where the checksums of then and now are known.
        KeyError, DamagedRecord: as `Store.read`.
    """
    record = store.read(config.identity)
    try:
        images = provenance.known_checksum(config.data, store.path / "data")
    except data.DataError:  # there is something else in the place of the data
        images = None
    for name, now in _checksums(config, images).items():
        then = record.provenance.get(name)
        if then and now and then != now:
            inputs = f"data {config.data!r}" if name == "data" else "code of its score or network"
            raise ChangedInputs(
                f"the record of {config.title} in {store.path} was made with other {inputs}, of "
                f"checksum {then}; the present one has {now}. Choose another run folder with "
                "--runs, or remove the record"
            )
    return record


def _run_once(
    config: Config,
    store: Store,
    device: torch.device,
    callback,
    claim: locks.Claim,
    alone: bool,
    fast: bool,
    until: float,
) -> Generator[str | None, None, None]:
    """Run what this process has claimed, and write its record or why it failed."""
    dataset = _dataset(config, store.path / "data")
    checksums = _checksums(config, dataset.checksum)
    checkpoint = Checkpoint(store.path, config, claim, **checksums, until=until)
    try:
        with _one_at_a_time:
            try:
                record = yield from _run(config, dataset, device, callback, checkpoint, fast)
            except checkpoints.UnusableCheckpoint as error:
                checkpoint.set_aside(error)
                record = yield from _run(config, dataset, device, callback, checkpoint, fast)
    except TrainingError as error:
        store.fail(config, error)
        checkpoints.discard(store.path, config.identity)
        raise
    except torch.OutOfMemoryError as error:
        if alone:
            store.fail(config, error)
        raise
    claim.check()
    if config.identity not in store:  # one that was copied there meanwhile stays
        store.write(record)
    checkpoints.discard(store.path, config.identity)


def _run(
    config: Config,
    dataset: data.Dataset,
    device: torch.device,
    callback,
    checkpoint: Checkpoint | None = None,
    fast: bool = False,
) -> Generator[str | None, None, RunRecord]:
    """The run itself; it yields wherever it would wait for the device, or for its launches."""
    checksums = _checksums(config, dataset.checksum)
    classes, channels = len(dataset.classes), dataset.train_images.shape[1]
    model = _network(config, classes, channels, device)
    layout = _layout(config, device)
    train = data.Batches(
        dataset.train_images,
        dataset.train_labels,
        dataset.mean,
        dataset.std,
        device,
        config.batch,
        config.augment,
        layout,
    )
    test = data.Batches(
        dataset.test_images,
        dataset.test_labels,
        dataset.mean,
        dataset.std,
        device,
        layout=layout,
    )
    rows, arrays = [], {}
    of_weights = config.histograms and isinstance(config.pruning, WeightPruning)
    of_norms = config.histograms and not of_weights
    if of_norms:  # before there is a pruner, which may count or watch forward passes
        arrays["untrained"] = normalised_outputs(model, train.first(HISTOGRAM_IMAGES)[0])
    pruner = make_pruner(config, model)
    optimizer = make_optimizer(config, model)
    if checkpoint is not None:
        rows, arrays = checkpoint.restore(model, optimizer, pruner) or (rows, arrays)
    noise = pruner if isinstance(pruner, FilterNoise) else None
    chooser = pruner if noise is None else noise.pruner
    evaluation_batch = EVALUATION_BATCH.get(device.type, LARGE_EVALUATION_BATCH)
    if noise is not None:
        evaluation_batch = config.noise.evaluation_batch
    loop = make_loop(config, model, optimizer, pruner, device, fast)
    events = Events(config.pruning)
    replica = None
    trained = sum(row["trained"] for row in rows)
    for epoch in range(len(rows), config.epochs):
        start = time.perf_counter()
        learning_rate = config.learning_rate * 0.1 ** sum(trained >= m for m in config.milestones)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        if noise is not None:
            noise.generator.manual_seed(stream(config.seed, "noise", epoch))
        takes_event_only = epoch == 0 and events.scratch
        train_loss = train_accuracy = math.nan
        if not takes_event_only:
            order = generator(config.seed, "order", epoch)
            augment = generator(config.seed, "augmentation", epoch)
            with seeded(config.seed, "dropout", epoch) if loop.draws else nullcontext():
                totals = yield from loop.launch(train, order, augment)
            trained += 1
        tested = loop.evaluate(test, evaluation_batch)
        yield
        if not takes_event_only:
            train_loss, train_accuracy = totals.read()
            if not math.isfinite(train_loss):
                raise TrainingError(f"the loss of {config.title} is {train_loss} at epoch {epoch}")
        test_loss, pre = tested.read()
        removed, post = 0, pre
        around: list[Totals] = []
        if events.at(epoch):
            replica = replica or Replica(config, classes, channels, loop)
            replica.load(model, pruner)
            chooser.generator.manual_seed(stream(config.seed, "filters", epoch))
            if of_weights and epoch == events.first:
                arrays |= weight_histograms(pruner, "before") | {"edges": MAGNITUDES}
            removed = pruner.prune(*events.at(epoch))
            if of_weights and epoch == events.last:
                arrays |= weight_histograms(pruner, "after")
            if removed:
                around.append(replica.loss(train))
        if noise is not None and epoch == config.epochs - 1:
            noise.remove()
        if removed:
            replica.load(model, pruner)
            around += [replica.loss(train), replica.recalibrated(train, test)]
        if removed or noise is not None:
            # With noise every epoch has both evaluations: each of their batches is a pass.
            tested = loop.evaluate(test, evaluation_batch)
            yield
            test_loss, post = tested.read()
        if not math.isfinite(test_loss):
            raise TrainingError(f"the test loss of {config.title} is {test_loss} at epoch {epoch}")
        row = {
            "epoch": epoch,
            "trained": not takes_event_only,
            "learning_rate": learning_rate,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "pre": pre,
            "post": post,
            "removed": removed,
        }
        row |= dict.fromkeys(BESIDE, math.nan)
        if around:
            (row["pre_loss"], _), (row["post_loss"], _), (_, row["recalibrated"]) = (
                totals.read() for totals in around
            )
        if epoch == config.epochs - 1:
            row["distance"] = distance(model, build(config, classes, channels))
        evaluated = time.perf_counter()
        with noise.paused() if noise is not None else nullcontext():
            if config.flatness is not None and epoch == config.flatness.epoch:
                held = pruner.held() if pruner is not None else {}
                arrays |= measured_flatness(model, test, config.flatness, held)
            if callback is not None:
                arrays |= callback(Moment(epoch, row, model, pruner, test, config)) or {}
        rows.append(row | {"seconds": time.perf_counter() - start})
        if checkpoint is not None and len(rows) < config.epochs:
            measured = time.perf_counter() - evaluated
            checkpoint.save_when_due(model, optimizer, pruner, rows, arrays, measured)
    if of_norms:
        arrays["trained"] = normalised_outputs(model, train.first(HISTOGRAM_IMAGES)[0])
    if of_weights:
        arrays |= weight_histograms(pruner, "end")
        arrays |= {f"kept.{name}": np.packbits(m.cpu()) for name, m in pruner.masks.items()}
    about = _provenance(device, model, pruner) | {"classes": classes, "channels": channels}
    about |= checksums
    if checkpoint is not None and checkpoint.earlier:
        about["resumed"] = checkpoint.earlier
    return RunRecord(config, pd.DataFrame(rows), arrays, about)


class Events:
    """A run's events by epoch, in the form the pruners take."""

    def __init__(self, pruning: FilterPruning | WeightPruning | None) -> None:
        self.scratch = isinstance(pruning, FilterPruning) and pruning.scratch
        self._at: dict[int, tuple] = {}
        if self.scratch:
            self._at[0] = (1, 1)
        elif isinstance(pruning, FilterPruning):
            counts = [len(epochs) for epochs in pruning.epochs]
            for epoch in sorted({e for epochs in pruning.epochs for e in epochs}):
                event = [es.index(epoch) + 1 if epoch in es else None for es in pruning.epochs]
                self._at[epoch] = (event, counts)
        elif pruning is not None:
            for i, epoch in enumerate(pruning.epochs):
                self._at[epoch] = (i + 1, len(pruning.epochs))

    @property
    def first(self) -> int:
        return min(self._at)

    @property
    def last(self) -> int:
        return max(self._at)

    def at(self, epoch: int) -> tuple | None:
        """(event, events) at the end of this epoch, or None."""
        return self._at.get(epoch)


def _provenance(device: torch.device, model: nn.Module, pruner) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    held = pruner.held() if pruner is not None else {}
    return provenance.describe(device.type, name, torch.get_num_threads()) | {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held": int(sum(mask.sum() for mask in held.values())),
    }
