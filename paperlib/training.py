"""One run, from its configuration to its record.

`run` is the entry. `steps` looks the record up, claims the run and writes the record.
`Run.complete` does the epochs; one of them is to train, test, prune, test again, and measure. They
are generators because several runs may take turns on one GPU (`extras.fast.together`); alone, a run
simply exhausts them.
"""

import math
import time
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from paperlib import data, diagnostics, inputs, models, networks
from paperlib.batches import Batches
from paperlib.config import Config
from paperlib.devices import autocast, choose_device, full_float32, memory_format, one_at_a_time
from paperlib.diagnostics import Arrays, Callback, Moment
from paperlib.extras.fast import loops
from paperlib.lanczos import ConvergenceError
from paperlib.loop import PlainLoop, Totals, finish
from paperlib.networks import build, check_images, events_of, make_optimizer, make_pruner
from paperlib.noise import FilterNoise
from paperlib.papers.noise_spans import steps as steps_of
from paperlib.pruning import Pruner
from paperlib.runs import RunRecord, Store
from paperlib.store import checkpoints, lease
from paperlib.store.checkpoints import Checkpoint
from paperlib.streams import generator, seeded, stream

# No other number of the record depends on these columns. NaN except at events; `distance` is NaN
# except in the last epoch.
BESIDE = ("recalibrated", "pre_loss", "post_loss", "distance")

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
    with one_at_a_time:
        networks.try_pruner(config)  # a sweep does so before all its runs
    with computing(config, loops.new_stream(where)):
        return finish(steps(config, store, where, callback, wait, captured=fast))


@contextmanager
def computing(config: Config, on: "torch.cuda.Stream | None") -> Iterator[None]:
    """Compute in a run's precision, on a CUDA stream if there is one."""
    with loops.on_stream(on), full_float32() if config.precision == "float32" else nullcontext():
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
    with one_at_a_time:
        make_pruner(config, build(config))  # refuses unknown names before data are read
    loops.warn_if_emulated(config.precision, device)
    if store is None:
        how = config, inputs.images_of(config), device, callback, captured
        with one_at_a_time:
            return (yield from Run(*how).complete(None))
    store.check_writable()
    earlier = store.failure(config.identity)
    with lease.claim(store.path, config.identity, wait) as claim, one_at_a_time:
        if (failure := store.failure(config.identity)) not in (earlier, None):
            raise TrainingError(f"{config.title} failed in another process: {failure}")
        if config in store:
            return store.read(config)
        dataset = inputs.images_of(config, store.path / "data")
        checkpoint = Checkpoint(store.path, config, claim, inputs.checksums(config, dataset), until)
        how = config, dataset, device, callback, captured
        try:
            record = yield from _resumed(how, checkpoint)
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


def _resumed(how: tuple, checkpoint: Checkpoint) -> Steps:
    """Complete a run from its checkpoint; from the start if that cannot be used."""
    try:
        return (yield from Run(*how).complete(checkpoint))
    except checkpoints.UnusableCheckpoint as error:
        config, *_ = how
        warnings.warn(f"{config.title} starts afresh: {error}", stacklevel=2)
        checkpoints.discard(checkpoint.store, config.identity)
        return (yield from Run(*how).complete(checkpoint))


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
        self.classes, self.channels = len(dataset.classes), shape[0]
        check_images(config, shape, self.classes, device, len(dataset.train_labels))
        self.model = self.new_network()
        self.made_of = inputs.checksums(config, dataset)  # now: a file may change later
        batches = partial(
            Batches, mean=dataset.mean, std=dataset.std, device=device, layout=self.layout
        )
        train, labels = dataset.train_images, dataset.train_labels
        self.train = batches(train, labels, size=config.batch, augment=config.augment)
        self.test = batches(dataset.test_images, dataset.test_labels)
        self.arrays: Arrays = {}
        self.pruner = Pruner()  # the run's own may observe forward passes
        self._note_histograms("untrained")
        self.pruner = make_pruner(config, self.model)
        self.noise = self.pruner if isinstance(self.pruner, FilterNoise) else None
        self.optimizer = make_optimizer(config, self.model)
        self.loop = make_loop(config, self.model, self.optimizer, self.pruner, device, captured)
        self.events = events_of(config.pruning)
        self.evaluation_batch = evaluation_batch(device)
        self._check_measures()

    def _check_measures(self) -> None:
        """Refuse flatness that cannot be measured; warn of noise computed for other images."""
        config = self.config
        if config.flatness:
            with self.pruner.by_hand():
                diagnostics.check_flatness(self.model, self.test, config.flatness)
        if config.noise and steps_of(config) != len(self.train):
            warnings.warn(
                f"{config.title}: Figures 5 and D2 compute how long noise lasts for "
                f"{steps_of(config)} training batches an epoch, and these images have "
                f"{len(self.train)}",
                stacklevel=2,
            )

    def new_network(self) -> nn.Module:
        """Return the network at its initial weights, on the device."""
        network = build(self.config, self.classes, self.channels)
        return network.to(device=self.device).to(memory_format=self.layout)

    @cached_property
    def _second(self) -> tuple[nn.Module, Pruner]:
        model = self.new_network()
        pruner = make_pruner(self.config, model)
        pruner.unhook()
        return model, pruner

    @torch.no_grad()
    def replica(self) -> nn.Module:
        """Return a second network, brought to the present state of the run's.

        It is built anew. A deep copy would share hooks of the run, and through them its counters,
        scores and noise. As for a checkpoint, a network may keep state in parameters and buffers
        only.
        """
        model, pruner = self._second
        pruner.load_state_dict(self.pruner.state_dict())  # first: it may add buffers
        state = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.copy_(state[name])
        return model

    def evaluate(self) -> Totals:
        """Test the network."""
        noise = self.config.noise
        size = self.evaluation_batch if noise is None else noise.evaluation_batch
        return self.loop.evaluate(self.test, size)

    def complete(self, checkpoint: Checkpoint | None) -> Steps:
        """Train the network epoch by epoch, from the checkpoint on, and return the record."""
        parts = self.model, self.optimizer, self.pruner
        rows: list[Row] = []
        if checkpoint is not None:
            rows, self.arrays = checkpoint.restore(parts) or (rows, self.arrays)
        for epoch in range(len(rows), self.config.epochs):
            start = time.perf_counter()
            row = yield from self._epoch(epoch, trained=sum(row["trained"] for row in rows))
            self.arrays |= self._measured(epoch, row)
            rows.append(row | {"seconds": time.perf_counter() - start})
            if checkpoint is not None and len(rows) < self.config.epochs:
                checkpoint.save_when_due(parts, rows, self.arrays)
        self._note_histograms("trained")
        about = inputs.described(self.device, self.model, self.pruner) | self.made_of
        about |= {"classes": self.classes, "channels": self.channels}
        if checkpoint is not None and checkpoint.earlier:
            about["resumed"] = checkpoint.earlier
        return RunRecord(self.config, pd.DataFrame(rows), self.arrays, about)

    def _epoch(self, epoch: int, trained: int) -> Generator[str | None, None, Row]:
        """Train, test, prune and test again.

        Args:
            epoch: Which epoch, from 0.
            trained: How many epochs have trained before.

        Yields:
            As `steps`.

        Returns:
            The epoch's row of the record, without its seconds.
        """
        config, loop = self.config, self.loop
        learning_rate = config.learning_rate * 0.1 ** sum(trained >= m for m in config.milestones)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.noise is not None:
            _reseed(self.noise, config.seed, "noise", epoch)
        totals = None
        if epoch > 0 or not getattr(config.pruning, "scratch", False):
            order = generator(config.seed, "order", epoch)
            augment = generator(config.seed, "augmentation", epoch)
            with seeded(config.seed, "dropout", epoch) if loop.draws else nullcontext():
                totals = yield from loop.launch(self.train, order, augment)
        tested = self.evaluate()
        yield None
        train_loss, train_accuracy = totals.read() if totals else (math.nan, math.nan)
        if totals and not math.isfinite(train_loss):
            raise TrainingError(f"the loss of {config.title} is {train_loss} at epoch {epoch}")
        test_loss, pre = tested.read()
        post = pre
        removed, beside = self._event(epoch)
        if removed or self.noise is not None:
            # With noise every epoch has both evaluations: each of their batches is a pass.
            tested = self.evaluate()
            yield None
            test_loss, post = tested.read()
        if not math.isfinite(test_loss):
            raise TrainingError(f"the test loss of {config.title} is {test_loss} at epoch {epoch}")
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

    def _event(self, epoch: int) -> tuple[int, Row]:
        """Prune, if the epoch has an event.

        Returns:
            How many filters or weights were removed, and `BESIDE`: the loss on training images
            before and after, and the test accuracy with recalibrated batch norms, NaN if none was
            removed. With noise they stay NaN: it acts on later passes, which they must not take.
        """
        removed, beside = 0, dict.fromkeys(BESIDE, math.nan)
        with_images = self.loop, self.train, self.evaluation_batch
        if event := self.events.get(epoch):
            if self.noise is None:
                beside["pre_loss"] = diagnostics.training_loss(self.replica(), *with_images)
            chooser = self.pruner if self.noise is None else self.noise.pruner
            _reseed(chooser, self.config.seed, "filters", epoch)
            if epoch == min(self.events):
                self._note_histograms("before")
            with seeded(self.config.seed, "score", epoch):
                removed = self.pruner.prune(*event)
            if epoch == max(self.events):
                self._note_histograms("after")
        last = epoch == self.config.epochs - 1
        if self.noise is not None and last:
            self.noise.remove()
        if not removed:
            beside["pre_loss"] = math.nan
        elif self.noise is None:
            replica = self.replica()
            beside["post_loss"] = diagnostics.training_loss(replica, *with_images)
            beside["recalibrated"] = diagnostics.recalibrated(replica, *with_images, self.test)
        if last:
            initial = build(self.config, self.classes, self.channels)
            beside["distance"] = diagnostics.distance(self.model, initial)
        return removed, beside

    def _note_histograms(self, moment: str) -> None:
        parts = self.model, self.pruner, self.train
        with seeded(self.config.seed, f"histograms {moment}"):
            self.arrays |= diagnostics.histograms(self.config, moment, *parts)

    def _measured(self, epoch: int, row: Row) -> Arrays:
        """Return the arrays of the flatness measures and of the callback at the end of an epoch."""
        config, arrays = self.config, Arrays()
        with self.pruner.by_hand():
            if config.flatness is not None and epoch == config.flatness.epoch:
                held = self.pruner.held()
                try:
                    arrays |= diagnostics.measured_flatness(
                        self.model, self.test, config.flatness, held
                    )
                except (ValueError, ConvergenceError) as error:
                    message = f"flatness of {config.title} at epoch {epoch}: {error}"
                    raise TrainingError(message) from error
            if self.callback is not None:
                moment = Moment(epoch, row, self.model, self.pruner, self.test, config)
                arrays |= self.callback(moment) or {}
        for name, array in arrays.items():
            if np.asarray(array).dtype.hasobject:
                raise TrainingError(f"array {name!r} of {config.title} holds objects, not numbers")
        return arrays


def _reseed(chooser: Any, seed: int, name: str, epoch: int) -> None:
    chooser.generator.manual_seed(stream(seed, name, epoch))


def make_loop(
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pruner: Pruner | None,
    device: torch.device,
    fast: bool = False,
) -> PlainLoop:
    """Return the loop that trains and evaluates a run; see `loops.loop_class`."""
    kind = loops.loop_class(device, config.model in models.MODELS, fast)
    return kind(model, optimizer, pruner, partial(autocast, config.precision, device))


def evaluation_batch(device: torch.device) -> int:
    """Return the images of a batch of evaluation; on a CPU larger ones leave the caches."""
    return 128 if device.type == "cpu" else 1000
