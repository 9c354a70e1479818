"""How long runs will take, from the seconds an epoch that the store has measured. No torch."""

import math
import platform
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from paperlib.config import Config, to_dict
from paperlib.runs import Store
from paperlib.store.records import Entry

ALIKE = ("train_per_class", "test_per_class", "model", "width", "batch", "augment", "precision")


class Work(Protocol):
    """A run to be done: a `states.State`."""

    config: Config
    state: str

    @property
    def left(self) -> int:
        """How many epochs are not done."""


class Speeds:
    """Seconds an epoch, by what makes runs alike: data, network, width, batch, precision."""

    def __init__(self) -> None:
        self._measured: dict[tuple, list[float]] = defaultdict(list)

    def observe(self, config: dict, seconds: float) -> None:
        """Take in a measured epoch of a configuration as `config.to_dict` gives it."""
        for kind in _kinds(config):
            self._measured[kind].append(seconds)

    def epoch(self, config: Config) -> float:
        """Return the expected seconds an epoch; NaN where nothing alike was measured."""
        for kind in _kinds(to_dict(config)):
            if kind in self._measured:
                return sum(self._measured[kind]) / len(self._measured[kind])
        return math.nan

    def seconds(self, work: Work) -> float:
        """Return the expected seconds that a run still takes; NaN as above."""
        return self.epoch(work.config) * work.left


def speeds(store: Store, device: str | None = "auto") -> Speeds:
    """Return the speeds of the store's own records made on such a device; None takes all devices.

    Records in results/ were measured on other machines and do not count.
    """
    expected = _kind_of_device(device)
    measured = Speeds()
    for entry in store.find(store.own()).values():
        if isinstance(entry, Entry) and "seconds" in entry.columns:
            config, made_on = entry.content["config"], entry.content["provenance"].get("device")
            if expected is None or made_on in (None, expected):
                epochs = config.get("epochs", Config.epochs)
                measured.observe(config, float(entry.columns["seconds"].sum()) / epochs)
    return measured


def _kind_of_device(device: str | None) -> str | None:
    if device is None:
        return None
    if device != "auto":
        return device.partition(":")[0]
    if list(Path("/dev").glob("nvidia[0-9]*")):
        return "cuda"
    return "mps" if (platform.system(), platform.machine()) == ("Darwin", "arm64") else "cpu"


def _kinds(config: dict) -> list[tuple]:
    """Return of what kind a run is, the narrowest first."""
    wide = (
        config.get("data", Config.data).rpartition("/")[2],
        *(config.get(name, getattr(Config, name)) for name in ALIKE),
        str(config.get("flatness")),
    )
    parts = (config.get("pruning") or {}).get("type"), (config.get("noise") or {}).get("kind")
    return [(*wide, *parts), wide]


def forecast(todo: Sequence[Work], again: int, slots: int | None, speeds: Speeds) -> str:
    """Say in a line what is about to be run, and how long it will take.

    Args:
        todo: the runs.
        again: how many of them failed before.
        slots: runs in parallel; None where that is open.
        speeds: as measured so far.
    """
    counts = Counter(work.state for work in todo)
    named = {
        "new": counts["missing"] + counts["failed"] - again,
        "resumed": counts["partial"],
        "tried again": again,
        "damaged": counts["damaged"],
    }
    parts = ", ".join(f"{count} {name}" for name, count in named.items() if count)
    known = [s for s in map(speeds.seconds, todo) if not math.isnan(s)]
    if not known:
        needed = "time unknown: nothing alike was measured here"
    elif slots is None:
        needed = f"about {duration(sum(known))} one after the other"
    else:
        needed = f"about {duration(max(sum(known) / slots, max(known)))}, {slots} in parallel"
    if known and len(known) < len(todo):
        needed += f", and {len(todo) - len(known)} of unknown length"
    return f"{len(todo)} runs ({parts}): {needed}"


def size(count: float) -> str:
    """Return bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Return seconds for people; "unknown" for NaN."""
    if math.isnan(seconds):
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
