"""One run, from its configuration to its record.

`run` is the entry. `steps` looks the record up, claims the run and writes the record; `_train`
does the epochs; `_epoch` is one of them: train, test, prune, test again, measure. They are
generators because several runs may take turns on one GPU (`extras.fast.together`); alone, a run
simply exhausts them.
"""

import math
import threading
import time
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import nn

from paperlib import data, inputs, models
from paperlib.batches import Batches
from paperlib.config import Config
from paperlib.devices import autocast, choose_device, full_float32, memory_format
from paperlib.diagnostics import (
    Arrays,
    Callback,
    Moment,
    Replica,
    distance,
    histograms,
    measured_flatness,
)
from paperlib.extras import fast as faster
from paperlib.loop import PlainLoop, Totals, finish
from paperlib.networks import AnyPruner, build, check_images, events_of, make_optimizer, make_pruner
from paperlib.networks import imagenet_outputs as imagenet_outputs
from paperlib.noise import FilterNoise
from paperlib.runs import RunRecord, Store
from paperlib.store import checkpoints, lease
from paperlib.store.checkpoints import Checkpoint
from paperlib.streams import generator, seeded, stream

# No other number of the record depends on these columns. NaN except at events; `distance` is NaN
# except in the last epoch.
BESIDE = ("recalibrated", "pre_loss", "post_loss", "distance")
# torch's global generators and torch.fx's tracing belong to the process: threads take turns.
_one_at_a_time = threading.RLock()

Row = dict[str, Any]  # an epoch of the record
Steps = Generator[str | None, None, RunRecord]


class TrainingError(RuntimeError):
    """A run that cannot continue; the message names it and the epoch."""


def run(
    config: Config,
    store: Store | None = None,
    device: str = "auto",
    callback: Callback | None = None,
    wait: bool = True,
    fast: bool = False,
) -> RunRecord:
    """Train, prune and measure one network, or return the store's record of it.

    Args:
        config: The run.
        store: Where the record is looked up and written. A run that was stopped resumes from its
            last checkpoint there. None keeps nothing.
        device: "auto", "cuda", "cuda:1", "mps" or "cpu".
        callback: Called at the end of each epoch; arrays that it returns go into the record. It
            must leave the network and torch's generators as they are. After a stop it sees those
            epochs again that no checkpoint holds.
        wait: Wait for the record of a run that another process has claimed, instead of raising
            `lease.Claimed`.
        fast: Use CUDA graphs on a GPU.

    Raises:
        ValueError: The run is impossible, for example because of its layers, data or image size
            (ConfigError, PruningError, DataError). Raised before training.
        StoreError: The store cannot be written, or its record was made with other data or code
            (`runs.Mismatch`).
        TrainingError: The loss is not finite, or the process that had claimed the run failed.
        lease.Lost: Another process took the run over.
    """
    if record := inputs.finished(config, store):
        return record
    where = choose_device(device)
    with computing(config, faster.new_stream(where)):
        return finish(steps(config, store, where, callback, wait, captured=fast))


@contextmanager
def computing(config: Config, on: "torch.cuda.Stream | None") -> Iterator[None]:
    """Compute in a run's precision, on a CUDA stream if there is one."""
    with faster.on_stream(on), full_float32() if config.precision == "float32" else nullcontext():
        yield


def steps(
    config: Config,
    store: Store | None,
    device: torch.device,
    callback: Callback | None = None,
    wait: bool = True,
    alone: bool = True,
    captured: bool = False,
    until: float = math.inf,
) -> Steps:
    """Do a run that has no record yet, step by step; see `run`.

    Args:
        config: The run.
        store: See `run`, like callback and wait.
        device: Where the run trains.
        callback: Or None.
        wait: Or raise `lease.Claimed`.
        alone: No other run uses the device: a lack of memory is this run's failure.
        captured: As `fast` for `run`.
        until: When to stop with a checkpoint at the end of an epoch, by `time.time`.

    Yields: None where the run would wait for the device, else where others may launch work.
    """
    with _one_at_a_time:
        make_pruner(config, build(config))  # refuses unknown names before data are read
    faster.warn_if_emulated(config.precision, device)
    if store is None:
        images = inputs.images_of(config)
        return (yield from _train(config, images, device, callback, None, captured))
    store.check_writable()
    earlier = store.failure(config.identity)
    with lease.claim(store.path, config.identity, wait) as claim:
        if (failure := store.failure(config.identity)) not in (earlier, None):
            raise TrainingError(f"{config.title} failed in another process: {failure}")
        if config in store:
            return store.read(config)
        dataset = inputs.images_of(config, store.path / "data")
        made_of = inputs.checksums(config, dataset.checksum)
        checkpoint = Checkpoint(store.path, config, claim, made_of, until)
        how = config, dataset, device, callback, checkpoint, captured
        try:
            try:
                record = yield from _train(*how)
            except checkpoints.UnusableCheckpoint as error:
                warnings.warn(f"{config.title} starts afresh: {error}", stacklevel=2)
                checkpoints.discard(store.path, config.identity)
                record = yield from _train(*how)
        except TrainingError as error:
            store.fail(config, error)
            checkpoints.discard(store.path, config.identity)
            raise
        except torch.OutOfMemoryError as error:
            if alone:
                store.fail(config, error)
            raise
        claim.check()
        if config not in store:  # a record that was copied there meanwhile stays
            store.write(record)
        checkpoints.discard(store.path, config.identity)
        return store.read(config.identity)


class Run:
    """A run in training: its network, pruner, optimizer, loop and batches."""

    def __init__(
        self,
        config: Config,
        dataset: data.Dataset,
        device: torch.device,
        callback: Callback | None,
        captured: bool,
    ) -> None:
        self.config, self.device, self.callback = config, device, callback
        self.layout, shape = memory_format(device, config.precision), dataset.train_images.shape[1:]
        self.classes, (self.channels, height, width) = len(dataset.classes), shape
        check_images(config, (self.channels, height, width), self.classes, device)
        self.model = self.new_network()
        self.made_of = inputs.checksums(config, dataset.checksum)  # now: a file may change later
        batches = partial(
            Batches, mean=dataset.mean, std=dataset.std, device=device, layout=self.layout
        )
        train, labels = dataset.train_images, dataset.train_labels
        self.train = batches(train, labels, size=config.batch, augment=config.augment)
        self.test = batches(dataset.test_images, dataset.test_labels)
        # Before there is a pruner, which may observe forward passes.
        self.arrays = histograms(config, "untrained", self.model, None, self.train)
        self.pruner = make_pruner(config, self.model)
        self.noise = self.pruner if isinstance(self.pruner, FilterNoise) else None
        self.optimizer = make_optimizer(config, self.model)
        self.loop = make_loop(config, self.model, self.optimizer, self.pruner, device, captured)
        self.events = events_of(config.pruning)
        self.evaluation_batch = evaluation_batch(device)
        self.replica: Replica | None = None

    def new_network(self) -> nn.Module:
        """Return the network at its initial weights, on the device."""
        network = build(self.config, self.classes, self.channels)
        return network.to(device=self.device).to(memory_format=self.layout)

    def replicate(self) -> Replica:
        """Return a replica of the network and pruner as they are now."""
        if self.replica is None:
            model = self.new_network()
            pruner = make_pruner(self.config, model)
            self.replica = Replica(model, pruner, self.loop, self.evaluation_batch)
        self.replica.load(self.model, self.pruner)
        return self.replica

    def evaluate(self) -> Totals:
        """Test the network."""
        noise = self.config.noise
        size = self.evaluation_batch if noise is None else noise.evaluation_batch
        return self.loop.evaluate(self.test, size)


def _train(
    config: Config,
    dataset: data.Dataset,
    device: torch.device,
    callback: Callback | None,
    checkpoint: Checkpoint | None,
    captured: bool,
) -> Steps:
    """Train a network epoch by epoch, and return its record."""
    with _one_at_a_time:
        run = Run(config, dataset, device, callback, captured)
        parts = run.model, run.optimizer, run.pruner
        rows: list[Row] = []
        if checkpoint is not None:
            rows, run.arrays = checkpoint.restore(parts) or (rows, run.arrays)
        for epoch in range(len(rows), config.epochs):
            start = time.perf_counter()
            row = yield from _epoch(run, epoch, trained=sum(row["trained"] for row in rows))
            run.arrays |= _measured(run, epoch, row)
            rows.append(row | {"seconds": time.perf_counter() - start})
            if checkpoint is not None and len(rows) < config.epochs:
                checkpoint.save_when_due(parts, rows, run.arrays)
        run.arrays |= histograms(config, "trained", run.model, run.pruner, run.train)
        about = inputs.described(run.device, run.model, run.pruner)
        about |= {"classes": run.classes, "channels": run.channels}
        about |= run.made_of
        if checkpoint is not None and checkpoint.earlier:
            about["resumed"] = checkpoint.earlier
        return RunRecord(config, pd.DataFrame(rows), run.arrays, about)


def _epoch(run: Run, epoch: int, trained: int) -> Generator[str | None, None, Row]:
    """Train, test, prune and test again.

    Args:
        run: The run.
        epoch: Which epoch, from 0.
        trained: How many epochs have trained before.

    Yields:
        As `steps`.

    Returns:
        The epoch's row of the record, without its seconds.
    """
    config, loop = run.config, run.loop
    learning_rate = config.learning_rate * 0.1 ** sum(trained >= m for m in config.milestones)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    if run.noise is not None:
        _reseed(run.noise, config.seed, "noise", epoch)
    totals = None
    if epoch > 0 or not getattr(config.pruning, "scratch", False):
        order = generator(config.seed, "order", epoch)
        augment = generator(config.seed, "augmentation", epoch)
        with seeded(config.seed, "dropout", epoch) if loop.draws else nullcontext():
            totals = yield from loop.launch(run.train, order, augment)
    tested = run.evaluate()
    yield None
    train_loss, train_accuracy = totals.read() if totals else (math.nan, math.nan)
    if totals and not math.isfinite(train_loss):
        raise TrainingError(f"the loss of {config.title} is {train_loss} at epoch {epoch}")
    test_loss, pre = tested.read()
    post = pre
    removed, beside = _event(run, epoch)
    if removed or run.noise is not None:
        # With noise every epoch has both evaluations: each of their batches is a pass.
        tested = run.evaluate()
        yield None
        test_loss, post = tested.read()
    if not math.isfinite(test_loss):
        raise TrainingError(f"the test loss of {config.title} is {test_loss} at epoch {epoch}")
    if epoch == config.epochs - 1:
        beside["distance"] = distance(run.model, build(config, run.classes, run.channels))
    return {
        "epoch": epoch,
        "trained": totals is not None,
        "learning_rate": learning_rate,
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "test_loss": test_loss,
        "pre": pre,
        "post": post,
        "removed": removed,
    } | beside


def _event(run: Run, epoch: int) -> tuple[int, Row]:
    """Prune, if the epoch has an event.

    Returns:
        How many filters or weights were removed, and the columns `BESIDE`. If some were removed,
        these are the loss on training images before and after, and the test accuracy with
        recalibrated batch norms.
    """
    removed, beside, pruner = 0, dict.fromkeys(BESIDE, math.nan), run.pruner
    if event := run.events.get(epoch):
        replica = run.replicate()
        chooser = pruner if run.noise is None else run.noise.pruner
        _reseed(chooser, run.config.seed, "filters", epoch)
        if epoch == min(run.events):
            run.arrays |= histograms(run.config, "before", run.model, pruner, run.train)
        removed = pruner.prune(*event)
        if epoch == max(run.events):
            run.arrays |= histograms(run.config, "after", run.model, pruner, run.train)
        if removed:
            beside["pre_loss"], _ = replica.loss(run.train).read()
    if run.noise is not None and epoch == run.config.epochs - 1:
        run.noise.remove()
    if removed:
        replica = run.replicate()
        beside["post_loss"], _ = replica.loss(run.train).read()
        _, beside["recalibrated"] = replica.recalibrated(run.train, run.test).read()
    return removed, beside


def _reseed(chooser: Any, seed: int, name: str, epoch: int) -> None:
    chooser.generator.manual_seed(stream(seed, name, epoch))


def _measured(run: Run, epoch: int, row: Row) -> Arrays:
    """Return the arrays of the flatness measures and of the callback at the end of an epoch."""
    config, arrays = run.config, Arrays()
    with run.noise.paused() if run.noise is not None else nullcontext():
        if config.flatness is not None and epoch == config.flatness.epoch:
            held = run.pruner.held()
            arrays |= measured_flatness(run.model, run.test, config.flatness, held)
        if run.callback is not None:
            moment = Moment(epoch, row, run.model, run.pruner, run.test, config)
            arrays |= run.callback(moment) or {}
    return arrays


def make_loop(
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pruner: AnyPruner | None,
    device: torch.device,
    fast: bool = False,
) -> PlainLoop:
    """Return the loop that trains and evaluates a run; see `extras.fast.loop_class`."""
    kind = faster.loop_class(device, config.model in models.MODELS, fast)
    return kind(model, optimizer, pruner, partial(autocast, config.precision, device))


def evaluation_batch(device: torch.device) -> int:
    """Return the images of a batch of evaluation; on a CPU larger ones leave the caches."""
    return 128 if device.type == "cpu" else 1000
