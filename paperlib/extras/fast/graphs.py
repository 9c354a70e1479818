"""Training steps and evaluations as CUDA graphs.

A step of these networks is about a hundred short kernels, which a GPU finishes faster than Python
launches them. A CUDA graph launches them all at once. At every replay it reads and writes the same
addresses, and no Python runs. Therefore a counter on the device selects the batch, a mask on the
device holds pruned weights at zero, and a pruner's `before_pass` is called before the replay.
"""

import gc
from collections.abc import Callable, Generator, Hashable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from paperlib.batches import Batches
from paperlib.loop import PlainLoop, Precision, Totals, score
from paperlib.pruning import Pruner


class Graph(Protocol):
    """A recording of a function's work on the device."""

    def replay(self) -> None:
        """Repeat the work."""


Capture = Callable[[Callable[[], object]], Graph]

STEPS = 4  # steps launched before other runs may launch theirs; with 32, streams overlap less
GO_ON = "go on"  # yielded by a run that does not wait for the device


class CaptureError(RuntimeError):
    """A capture that failed. Anything else this process does on the device may fail afterwards."""


@contextmanager
def _uncollected() -> Iterator[None]:
    """Collect no garbage for a while: destroying a graph would end a capture.

    Objects without cycles are still freed.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class CudaGraphs:
    """Captures functions as CUDA graphs, on the current stream and without executing them.

    All graphs share one pool of memory, because they are replayed one after the other. Unlike
    torch.cuda.graph, a capture neither waits for other streams nor returns memory that they are
    about to use.

    Raises:
        RuntimeError: The current stream is the default one, which cannot be captured.
        CaptureError: A capture failed.
        OutOfMemoryError: A capture found too little memory, and nothing else is wrong.
    """

    def __init__(self) -> None:
        if torch.cuda.current_stream() == torch.cuda.default_stream():
            raise RuntimeError(
                "graphs need a stream of their own: make the network and all that goes with it, "
                "and use it, within torch.cuda.stream(torch.cuda.Stream())"
            )
        self._pool = torch.cuda.graph_pool_handle()
        # A pool ends with its last graph, so this one stays. The ordinary call comes first because
        # the device loads a kernel at its first launch.
        torch.zeros((), device="cuda")
        self._keeper = self(lambda: torch.zeros((), device="cuda"))

    def __call__(self, function: Callable[[], object]) -> Graph:
        """Capture a function."""
        graph, device = torch.cuda.CUDAGraph(), torch.device("cuda", torch.cuda.current_device())
        try:
            # In turn: the start of a capture writes the address where graphs read their seed.
            with _uncollected(), in_turn(device), _capture(graph, self._pool):
                function()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise CaptureError(f"a CUDA graph could not be captured: {error}") from error
        return graph


@contextmanager
def _capture(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Record the launches on the current stream in a graph, from whichever thread they come."""
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # a failed capture raises it
            graph.capture_end()
        raise
    graph.capture_end()


class Replays:
    """Functions without arguments that are captured at their second call, then replayed.

    A function may only read and write tensors that keep their addresses, and must not wait for the
    device. The first call is an ordinary one, in which libraries choose their kernels and
    optimizers create their state.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._graphs: dict[Hashable, Graph | None] = {}  # None after the first call

    def __call__(self, function: Callable[[], None], *key: Hashable) -> None:
        """Call a function, or replay the one that was captured for this key."""
        if key not in self._graphs:
            self._graphs[key] = None
            function()
            return
        graph = self._graphs[key] or self._capture(function)
        self._graphs[key] = graph
        graph.replay()

    def forget(self) -> None:
        """Drop all graphs, because the tensors that they use have changed."""
        self._graphs.clear()


_last_turn: dict[torch.device, torch.cuda.Event] = {}


@contextmanager
def in_turn(device: torch.device) -> Iterator[None]:
    """Let launches wait, on the device, for earlier launches in such a context on any stream.

    All graphs of a process read their random seed and offset at the same two addresses of a device,
    and every replay writes these anew.
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
    """The plain loop by graphs; its numbers are the same up to rounding.

    A loop serves one set of training images and one of test images.

    Args:
        model: The network.
        optimizer: The optimizer of its parameters.
        pruner: The pruner, or None.
        autocast: The precision of the passes.
        capture: Makes a graph of a function; tests replace `CudaGraphs`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        pruner: Pruner | None,
        autocast: Precision,
        capture: Capture | None = None,
    ) -> None:
        super().__init__(model, optimizer, pruner, autocast)
        self._replays = Replays(capture or CudaGraphs())
        self._parameters = dict(model.named_parameters())
        self._keep: dict[str, Tensor] = {}  # 1 where a parameter is free, 0 where it is held
        self._drawn: list[Tensor] = []
        self._device = device = next(model.parameters()).device
        # Graphs read new learning rates on the device. CUDA's fused kernels need float32.
        kind = torch.float32 if device.type == "cuda" else torch.float64
        self._rates = [torch.zeros((), dtype=kind, device=device) for _ in optimizer.param_groups]
        self.draws = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
        self._position = torch.zeros((), dtype=torch.int64, device=device)
        self._loss = torch.zeros((), device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)

    def launch(
        self, batches: Batches, order: torch.Generator, augment: torch.Generator
    ) -> Generator[str, None, Totals]:
        """Train on all images once, as `PlainLoop.launch`, in turns with other runs.

        A device queues a limited number of launches. A whole epoch of one run would fill the queue
        while the other runs' streams stay empty.

        Yields:
            `GO_ON` every `STEPS` steps; nothing if the network draws random numbers.
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
        """Test on all images, in batches of `size`."""
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
        self._add(*self.step(x, y))

    @torch.no_grad()
    def _test_batch(self, batches: Batches, size: int) -> None:
        x, y = batches.unaugmented(self._rows(size))
        self._add(*score(self.model, self.autocast, x, y))

    def _rows(self, size: int) -> Tensor:
        """Return the next positions of a pass, and advance."""
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
    def hold(self) -> None:
        """Multiply parameters by the masks, which graphs read."""
        if self._keep:
            parameters: list[Tensor] = [self._parameters[name] for name in self._keep]
            torch._foreach_mul_(parameters, list(self._keep.values()))  # type: ignore[arg-type]

    @torch.no_grad()
    def _refresh(self) -> None:
        """Update the masks and learning rates that graphs read. Drop graphs that lack a mask."""
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
        # The ordinary first step would warn about this.
        self.optimizer._warned_capturable_if_run_uncaptured = True


def _sizes(images: int, size: int) -> Iterator[int]:
    """Iterate over the sizes of the batches of a pass."""
    for start in range(0, images, size):
        yield min(size, images - start)
