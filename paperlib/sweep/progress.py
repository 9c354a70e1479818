"""The bar of a sweep: epochs done of all, runs done of all, and the time left."""

import math
import os
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tqdm.auto import tqdm

from paperlib.config import to_dict
from paperlib.sweep import costs
from paperlib.sweep.states import State

LOOK_SECONDS = 1.0  # between looks at the notes of unfinished runs
SHOWN = (
    "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} epochs "
    "[{elapsed}, {rate_noinv_fmt}{postfix}]"
)


class Bar:
    """A bar for the runs of a sweep, here and in other processes that share the store.

    Args:
        todo: the runs, by identity.
        store: path of the store, where processes note how far they are.
        speeds: measured so far; the bar adds to them.
    """

    def __init__(self, todo: dict[str, State], store: Path, speeds: costs.Speeds) -> None:
        self.todo, self.folder, self.speeds = todo, store / "progress", speeds
        self.left = {run: state.left for run, state in todo.items()}
        self.runs = self.epochs = 0
        self.total = sum(self.left.values())
        self.done_weight = 0.0
        self.start = self.looked = time.monotonic()

    def __enter__(self) -> "Bar":
        self.bar = tqdm(total=self.total, unit=" epochs", bar_format=SHOWN)
        self.show(now=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.show(now=True)
        self.bar.close()

    def waits_for(self, state: State) -> bool:
        """Whether a run is neither done nor given up."""
        return state.run in self.left

    def done(self, state: State, seconds: float | None) -> None:
        """Count a run as done; seconds: of one epoch on average, where that is known."""
        if seconds is not None:
            self.speeds.observe(to_dict(state.config), seconds)
        if self.waits_for(state):
            left = self.left.pop(state.run)
            self.runs += 1
            self.epochs += left
            self.done_weight += self._weight(state, left)

    def gave_up(self, state: State) -> None:
        """Leave out a run that failed or was stopped: its epochs will not be done."""
        self.total -= self.left.pop(state.run, 0)

    def show(self, now: bool = False) -> None:
        """Bring the bar up to date, at most once in `LOOK_SECONDS` unless `now`."""
        if not now and time.monotonic() - self.looked < LOOK_SECONDS:
            return
        self.looked = time.monotonic()
        running = self._running()
        weight = self.done_weight + sum(self._weight(self.todo[r], n) for r, n in running.items())
        remaining = sum(self._weight(self.todo[run], n) for run, n in self.left.items())
        remaining += self.done_weight - weight
        self.bar.total = self.total
        self.bar.set_description_str(f"runs {self.runs}/{len(self.todo)}", refresh=False)
        shown = ""
        if weight > 0 and remaining > 0:
            shown = f"{costs.duration((self.looked - self.start) * remaining / weight)} left"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.n = self.epochs + sum(running.values())
        self.bar.refresh()

    def _weight(self, state: State, epochs: int) -> float:
        """Return the cost of epochs of a run, in seconds where they are known."""
        seconds = self.speeds.epoch(state.config)
        return epochs * (1.0 if math.isnan(seconds) else seconds)

    def _running(self) -> dict[str, int]:
        """Return how many epochs of each unfinished run are done, by the notes in the store."""
        running = {}
        with suppress(OSError):
            for name in os.listdir(self.folder):
                if name in self.left:
                    with suppress(OSError, ValueError):
                        epochs = int((self.folder / name).read_text())
                        done = epochs - self.todo[name].epochs
                        running[name] = min(max(done, 0), self.left[name])
        return running
