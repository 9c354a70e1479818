"""The bar of a sweep: epochs done of all, runs done of all, and the time left."""

import time
from types import TracebackType

from tqdm.auto import tqdm

from paperlib.runs import Store
from paperlib.store import checkpoints
from paperlib.store.records import Entry
from paperlib.sweep import costs
from paperlib.sweep.states import State

SHOWN = (
    "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} epochs "
    "[{elapsed}, {rate_noinv_fmt}{postfix}]"
)


class Bar:
    """A bar for the runs of a sweep, here and in other processes that share the store.

    It counts records and the epochs in checkpoints.

    Args:
        todo: the runs.
        store: the store.
        speeds: measured so far; the bar adds to them.

    Attributes:
        left: by identity, the runs that are neither done nor given up.
    """

    def __init__(self, todo: list[State], store: Store, speeds: costs.Speeds) -> None:
        self.store, self.speeds, self.count = store, speeds, len(todo)
        self.left = {state.run: state for state in todo}
        self.done: list[State] = []
        self.start = time.monotonic()

    def __enter__(self) -> "Bar":
        self.bar = tqdm(total=1, unit=" epochs", bar_format=SHOWN)
        self.look()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.look()
        self.bar.close()

    def look(self) -> None:
        """Count the runs that are done by now, and show how far all are."""
        there = self.left.keys() & set(self.store.own())
        for run, entry in self.store.find(there).items():
            if isinstance(entry, Entry):
                self.done.append(self.left.pop(run))
                self.speeds.observe(entry)
        parts = [(state, state.left, 0) for state in self.done]
        begun = {path.stem for path in (self.store.path / "checkpoints").glob("*.safetensors")}
        for run, state in self.left.items():
            epochs = checkpoints.progress(self.store.path, run) if run in begun else None
            new = max((epochs or 0) - state.epochs, 0)
            parts.append((state, new, state.left - new))
        weights = [self.speeds.epoch(state.config, unknown=1.0) for state, _, _ in parts]
        done = sum(w * new for w, (_, new, _) in zip(weights, parts, strict=True))
        left = sum(w * rest for w, (_, _, rest) in zip(weights, parts, strict=True))
        seconds = (time.monotonic() - self.start) * left / done if done else 0.0
        self.bar.n = sum(new for _, new, _ in parts)
        self.bar.total = self.bar.n + sum(rest for _, _, rest in parts)
        self.bar.set_description_str(f"runs {len(self.done)}/{self.count}", refresh=False)
        shown = f"{costs.duration(seconds)} left" if seconds else ""
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.refresh()
