"""The fast path on a GPU: training steps and evaluations as CUDA graphs, replayed.

A step of these networks is some hundred short kernels, which a GPU works off faster than Python
launches them. A CUDA graph holds them all and takes one launch. What it reads and writes are the
same addresses at every replay, and no Python runs. So a batch is found on the device, by a position
that moves on; what pruning holds at zero is a mask there; and what a pruner or noise does before a
forward pass is done before the replay. What a step is, `loop` says.
"""

import gc
from collections.abc import Callable, Generator, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from paperlib.data import Batches
from paperlib.loop import PlainLoop, Totals, score, step
from paperlib.pruning import Pruner


class Graph(Protocol):
    """Something that does again what was done when it was made."""

    def replay(self) -> None: ...


Capture = Callable[[Callable[[], None]], Graph]

STEPS = 4  # that are launched before other runs may launch theirs: of 32, streams overlap less
GO_ON = "go on"  # what a run yields that need not wait for the device


class CaptureError(RuntimeError):
    """A capture that failed: what else this process does on the device may fail from now on."""


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is collected meanwhile: a graph among it would be destroyed, which ends captures.

    What counts references still frees at once.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class CudaGraphs:
    """Makes CUDA graphs of what functions launch on the current stream, without executing it.

    All share one pool of memory, as they are replayed one after the other. A capture does not wait
    for what other streams have launched, nor gives back memory that others are about to use, which
    torch.cuda.graph does. Raises RuntimeError on the default stream, which cannot be captured, and
    CaptureError; OutOfMemoryError where memory is short and nothing else is wrong.
    """

    def __init__(self) -> None:
        if torch.cuda.current_stream() == torch.cuda.default_stream():
            raise RuntimeError(
                "graphs need a stream of their own: make the network and all that goes with it, "
                "and use it, within torch.cuda.stream(torch.cuda.Stream())"
            )
        self._pool = torch.cuda.graph_pool_handle()
        # With its last graph a pool is gone, and nothing can be captured into it: this one stays.
        # An ordinary call first: the device loads a kernel when it is first launched.
        torch.zeros((), device="cuda")
        self._keeper = self(lambda: torch.zeros((), device="cuda"))

    def __call__(self, function: Callable[[], None]) -> Graph:
        graph, device = torch.cuda.CUDAGraph(), torch.device("cuda", torch.cuda.current_device())
        try:
            # In turn: the beginning of a capture writes where graphs find their seed.
            with _uncollected(), in_turn(device), _capture(graph, self._pool):
                function()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise CaptureError(f"a CUDA graph could not be captured: {error}") from error
        return graph


@contextmanager
def _capture(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> Iterator[None]:
    """What is launched on the current stream goes into the graph, whichever thread launches it."""
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # of an error that was there before
            graph.capture_end()
        raise
    graph.capture_end()


class Replays:
    """Functions of no arguments, each captured at its second call, and replayed.

    A function may only read and write tensors that stay where they are, and must not wait for the
    device. Its first call is an ordinary one: there, libraries choose their kernels, and optimizers
    make their state.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._warm: set[Hashable] = set()
        self._graphs: dict[Hashable, Graph] = {}

    def __call__(self, function: Callable[[], None], *key: Hashable) -> None:
        """Do `function`, which for this key is always the same, or was until `forget`."""
        if key not in self._warm:
            self._warm.add(key)
            function()
            return
        if key not in self._graphs:
            self._graphs[key] = self._capture(function)
        self._graphs[key].replay()

    def forget(self) -> None:
        """Begin again, with ordinary calls: what the graphs hold has changed."""
        self._warm.clear()
        self._graphs.clear()


_last_turn: dict[torch.device, torch.cuda.Event] = {}


@contextmanager
def in_turn(device: torch.device) -> Iterator[None]:
    """What is launched in this context waits, on the device, for what was launched in it before.

    Whatever its stream: a process's graphs all find the seed of what is random in them, and how far
    it has come, at the same two addresses of a device, where each replay writes them anew.
    """
    if device.type != "cuda":
        yield
        return
    if device in _last_turn:
        _last_turn[device].wait()
    try:
        yield
    finally:
        _last_turn[device] = torch.cuda.Event()
        _last_turn[device].record()


class CapturedLoop(PlainLoop):
    """As `PlainLoop`, by graphs; its numbers are the same up to rounding.

    For one set of training images and one of test images. capture: makes a graph of a function;
    CUDA's, unless a test brings its own.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        pruner: Pruner | None,
        autocast: Callable[[], AbstractContextManager],
        capture: Capture | None = None,
    ) -> None:
        super().__init__(model, optimizer, pruner, autocast)
        self._replays = Replays(capture or CudaGraphs())
        self._parameters = dict(model.named_parameters())
        self._keep: dict[str, Tensor] = {}  # 1 where a parameter is free, 0 where it is held
        self._drawn: list[Tensor] = []
        self._device = device = next(model.parameters()).device
        # On the device, where graphs find new learning rates; CUDA's fused kernels read floats.
        kind = torch.float32 if device.type == "cuda" else torch.float64
        self._rates = [torch.zeros((), dtype=kind, device=device) for _ in optimizer.param_groups]
        self.draws = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
        self._position = torch.zeros((), dtype=torch.int64, device=device)
        self._loss = torch.zeros((), device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)

    def train(self, batches: Batches, order: torch.Generator, augment: torch.Generator) -> Totals:
        """One pass over the training images."""
        launches = self.launch(batches, order, augment)
        while True:
            try:
                next(launches)
            except StopIteration as end:
                return end.value

    def launch(
        self, batches: Batches, order: torch.Generator, augment: torch.Generator
    ) -> Generator[str, None, Totals]:
        """`train`, which yields `GO_ON` after every `STEPS` steps, unless something is random.

        A device takes so many launches ahead and no more. A whole epoch of one run would fill it,
        and the others' streams would stay empty meanwhile.
        """
        self.model.train()
        self._refresh()
        self._start()
        drawn = batches.draw(order, augment)
        self._drawn = self._drawn or [torch.empty_like(tensor) for tensor in drawn]
        for kept, new in zip(self._drawn, drawn, strict=True):
            kept.copy_(new)
        images = len(batches.labels)
        with self.pruner.by_hand(), in_turn(self._device) if self.draws else nullcontext():
            for i, size in enumerate(_sizes(images, batches.size)):
                if i and i % STEPS == 0 and not self.draws:
                    yield GO_ON
                self.pruner.before_pass(training=True)
                batch = partial(self._train_batch, batches, size)
                self._replays(batch, "train", size, self.pruner.due)
        return self._totals(images)

    def evaluate(self, batches: Batches, size: int) -> Totals:
        """One pass over the test images, in batches of `size`."""
        if self.pruner.busy:  # every pass changes weights
            return super().evaluate(batches, size)
        self.model.eval()
        self._refresh()
        self._start()
        images = len(batches.labels)
        with self.pruner.by_hand():
            for count in _sizes(images, size):
                self.pruner.before_pass(training=False)
                self._replays(partial(self._test_batch, batches, count), "test", count)
        self.model.train()
        return self._totals(images)

    def _train_batch(self, batches: Batches, size: int) -> None:
        rows = self._rows(size)
        x, y = batches.pick(*(drawn.index_select(0, rows) for drawn in self._drawn))
        self._add(*step(self.model, self.optimizer, self._hold, self.autocast, x, y))

    @torch.no_grad()
    def _test_batch(self, batches: Batches, size: int) -> None:
        x, y = batches.unaugmented(self._rows(size))
        self._add(*score(self.model, self.autocast, x, y))

    def _rows(self, size: int) -> Tensor:
        """The next places of a pass."""
        rows = self._position + torch.arange(size, device=self._device)
        self._position += size
        return rows

    def _add(self, loss: Tensor, correct: Tensor) -> None:
        self._loss += loss
        self._correct += correct

    def _start(self) -> None:
        for tensor in (self._position, self._loss, self._correct):
            tensor.zero_()

    def _totals(self, images: int) -> Totals:
        return Totals(self._loss.clone(), self._correct.clone(), images)

    @torch.no_grad()
    def _hold(self) -> None:
        if self._keep:
            parameters = [self._parameters[name] for name in self._keep]
            torch._foreach_mul_(parameters, list(self._keep.values()))

    @torch.no_grad()
    def _refresh(self) -> None:
        """Bring up to date what the graphs read, and forget them where they hold something else."""
        held = self.pruner.held()
        if new := held.keys() - self._keep.keys():
            self._keep |= {name: torch.ones_like(self._parameters[name]) for name in new}
            self._replays.forget()
        for name, keep in self._keep.items():
            keep.fill_(1).masked_fill_(held[name], 0)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if group["lr"] is not rate:
                group["lr"] = rate.fill_(group["lr"])
            if "capturable" in group:
                group["capturable"] = True
        # Not of the ordinary first step, of which it would warn.
        self.optimizer._warned_capturable_if_run_uncaptured = True


def _sizes(images: int, size: int) -> Iterator[int]:
    """Of each batch of a pass over so many images."""
    for start in range(0, images, size):
        yield min(size, images - start)
