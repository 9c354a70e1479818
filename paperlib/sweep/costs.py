"""How long runs will take, from the seconds an epoch that the store has measured. No torch."""

import math
import platform
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import pandas as pd

from paperlib.config import Config, from_dict
from paperlib.runs import Store
from paperlib.store.records import Entry
from paperlib.sweep.states import STATES, State
from paperlib.sweep.workers import may_have_gpu

ALIKE = ("train_per_class", "test_per_class", "model", "width", "batch", "augment", "precision")


class Speeds:
    """Seconds an epoch, by what makes runs alike: data, network, width, batch, precision."""

    def __init__(self) -> None:
        self._measured: dict[tuple, list[float]] = defaultdict(list)

    def observe(self, entry: Entry) -> None:
        """Take in the seconds that the epochs of a run took."""
        if "seconds" in entry.columns:
            for kind in _kinds(from_dict(entry.content["config"])):
                self._measured[kind].append(float(entry.columns["seconds"].mean()))

    def epoch(self, config: Config, unknown: float = math.nan) -> float:
        """Return the expected seconds an epoch; `unknown` where nothing alike was measured."""
        for kind in _kinds(config):
            if kind in self._measured:
                return sum(self._measured[kind]) / len(self._measured[kind])
        return unknown

    def needed(self, states: Sequence[State]) -> list[float]:
        """Return the expected seconds that each run still takes, of those where it is known."""
        seconds = [self.epoch(state.config) * state.left for state in states]
        return [s for s in seconds if not math.isnan(s)]


def speeds(store: Store, device: str = "auto") -> Speeds:
    """Return the speeds of the store's own records that were made on such a device.

    Records in results/ were measured on other machines and do not count.
    """
    kind = device.partition(":")[0]
    if kind == "auto":
        apple = (platform.system(), platform.machine()) == ("Darwin", "arm64")
        kind = "cuda" if may_have_gpu() else "mps" if apple else "cpu"
    measured = Speeds()
    for entry in store.find(store.own()).values():
        if isinstance(entry, Entry) and entry.content["provenance"].get("device", kind) == kind:
            measured.observe(entry)
    return measured


def _kinds(config: Config) -> list[tuple]:
    """Return of what kind a run is, the narrowest first."""
    data = config.data.rpartition("/")[2]
    wide = data, config.flatness, *(getattr(config, name) for name in ALIKE)
    return [(*wide, type(config.pruning), getattr(config.noise, "kind", None)), wide]


def forecast(todo: Sequence[State], slots: int, speeds: Speeds) -> str:
    """Say in a line what is about to be run, and how long it will take in so many `slots`."""
    counts = Counter(state.state for state in todo)
    parts = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    known = speeds.needed(todo)
    if not known:
        needed = "time unknown: nothing alike was measured here"
    else:
        needed = f"about {duration(max(sum(known) / slots, max(known)))}, {slots} in parallel"
        if len(known) < len(todo):
            needed += f", and {len(todo) - len(known)} of unknown length"
    return f"{len(todo)} runs ({parts}): {needed}"


def table(figures: Mapping[str, Sequence[State]], speeds: Speeds) -> pd.DataFrame:
    """Return one row a figure: its runs, and how many are in each of `STATES`.

    Column hours has the time that runs not done will take one after the other on this machine, as
    far as its store has measured runs alike; NaN where it has none. Column unknown counts the runs
    that this leaves out.
    """
    rows = []
    for name, mine in figures.items():
        counts = Counter(state.state for state in mine)
        left = [state for state in mine if state.state != "done"]
        known = speeds.needed(left)
        hours = sum(known) / 3600 if known or not left else math.nan
        rows.append(
            {"figure": name, "runs": len(mine)}
            | {state: counts[state] for state in STATES}
            | {"hours": hours, "unknown": len(left) - len(known)}
        )
    return pd.DataFrame(rows)


def duration(seconds: float) -> str:
    """Return seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
