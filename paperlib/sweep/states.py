"""The states of runs in a store, and what those that are not done will cost. Imports no torch."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import pandas as pd
from tqdm.auto import tqdm

from paperlib.config import Config
from paperlib.runs import Mismatch, RunRecord, Store
from paperlib.store import checkpoints
from paperlib.store.store import by_identity as unique
from paperlib.sweep.workers import may_have_gpu

STATES = ("done", "partial", "failed", "damaged", "changed", "missing")
TO_RUN = ("partial", "damaged", "missing")
# What makes runs take as long an epoch, beside their data, noise and measurements.
ALIKE = ("train_per_class", "test_per_class", "model", "width", "batch", "augment", "precision")

Speeds = dict[tuple, float]  # the median of the seconds an epoch, by kind of run


@dataclass
class State:
    """The state of a run in a store.

    Attributes:
        run: its identity.
        config: its configuration.
        state: one of `STATES`.
        epochs: how many are done.
        why: why it would or would not be run, with the note of a failure or damage.
    """

    run: str
    config: Config
    state: str
    epochs: int
    why: str

    @property
    def left(self) -> int:
        """Number of epochs that are not done."""
        return self.config.epochs - self.epochs


def states(configs: Iterable[Config], store: Store) -> list[State]:
    """Return the state of each configuration, in order; equal runs appear once."""
    named, failures = unique(configs), store.failures()
    found, result = store.find(named.values()), []
    for run, config in named.items():
        record, epochs = found.get(run), checkpoints.progress(store.path, run) or 0
        if isinstance(record, RunRecord):
            state, epochs, why = "done", config.epochs, "not run: it has a record"
        elif isinstance(record, Mismatch):
            state, why = "changed", f"not run: {record}"
        elif record is not None:
            state, why = "damaged", f"run again: {record}"
        elif run in failures:
            state, why = (
                "failed",
                f"not run without --retry-failed (retry_failed=True): {failures[run]}",
            )
        else:
            state, why = "partial" if epochs else "missing", f"run from epoch {epochs}"
        result.append(State(run, config, state, epochs, why))
    return result


def missing(configs: Iterable[Config], store: Store) -> list[Config]:
    """Return the configurations that have no whole record in the store."""
    named = unique(configs)
    whole = store.whole(named.values())
    return [config for run, config in named.items() if run not in whole]


def speeds(store: Store, device: str = "auto") -> Speeds:
    """Return the speeds of the store's own records that were made on such a device.

    Records in results/ were measured on other machines and do not count.
    """
    on_gpu = may_have_gpu() if device == "auto" else device.startswith("cuda")
    measured = defaultdict(list)
    for record in store.find(store.own()).values():
        if isinstance(record, RunRecord):
            alike = on_gpu == (record.provenance.get("device") == "cuda")
            if alike and "seconds" in record.epochs:
                measured[_kind(record.config)].append(float(record.epochs.seconds.mean()))
    return {kind: median(seconds) for kind, seconds in measured.items()}


def seconds(state: State, speeds: Speeds) -> float:
    """Return the seconds that a run will still take; NaN where nothing alike was measured."""
    return speeds.get(_kind(state.config), math.nan) * state.left


def _kind(config: Config) -> tuple:
    noise = config.noise and config.noise.kind
    alike = (getattr(config, name) for name in ALIKE)
    return config.data.rpartition("/")[2], noise, config.flatness, *alike


def forecast(todo: Sequence[State], slots: int, speeds: Speeds) -> str:
    """Say in a line what is about to be run, and how long it will take in so many `slots`."""
    counts = Counter(state.state for state in todo)
    parts = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    known = [s for s in (seconds(state, speeds) for state in todo) if not math.isnan(s)]
    needed = [f"{len(todo) - len(known)} of unknown length"] if len(known) < len(todo) else []
    if known:
        needed.insert(0, f"about {tqdm.format_interval(max(sum(known) / slots, *known))}")
    return f"{len(todo)} runs ({parts}), {slots} in parallel: {', '.join(needed)}"


def table(plans: Mapping[str, Iterable[Config]], store: Store) -> pd.DataFrame:
    """Return one row a figure: its runs, and how many are in each of `STATES`.

    Column hours has the time that runs not done will take one after the other on this machine, as
    far as its store has measured runs alike; NaN where it has none. Column unknown counts the runs
    that this leaves out.

    Args:
        plans: the configurations of each figure.
        store: where the records are.
    """
    every = {s.run: s for s in states((c for plan in plans.values() for c in plan), store)}
    measured, rows = speeds(store), []
    for name, plan in plans.items():
        mine = [every[run] for run in unique(plan)]
        counts = Counter(state.state for state in mine)
        needed = pd.Series([seconds(s, measured) for s in mine if s.state != "done"], dtype=float)
        rows.append(
            {"figure": name, "runs": len(mine)}
            | {state: counts[state] for state in STATES}
            | {"hours": needed.sum(min_count=min(len(needed), 1)) / 3600}
            | {"unknown": needed.isna().sum(), "states": mine}
        )
    return pd.DataFrame(rows)
