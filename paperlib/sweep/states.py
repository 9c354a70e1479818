"""The states of runs in a store, and the time that unfinished runs will take. Imports no torch."""

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
# An epoch takes as long in runs that agree in these, and in data, noise and measurements.
ALIKE = ("train_per_class", "test_per_class", "model", "width", "batch", "augment", "precision")

Speeds = dict[tuple, float]  # median seconds an epoch, by kind of run


@dataclass
class State:
    """The state of a run in a store.

    Attributes:
        run: The run's identity.
        config: Its configuration.
        state: One of `STATES`.
        epochs: The number of epochs done.
        why: The reason why it would or would not be run, with the note of a failure or damage.
    """

    run: str
    config: Config
    state: str
    epochs: int
    why: str

    @property
    def left(self) -> int:
        """The number of epochs that are not done."""
        return self.config.epochs - self.epochs


def states(configs: Iterable[Config], store: Store) -> list[State]:
    """Return the state of each configuration, in order. Equal runs appear once."""
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
    """Return the configurations that have no whole record in the store.

    Raises:
        Mismatch: A record was made with other data or code.
    """
    named = unique(configs)
    whole = store.whole(named.values())
    return [config for run, config in named.items() if run not in whole]


def speeds(store: Store, device: str = "auto") -> Speeds:
    """Return the speeds of the store's own records from the same kind of device, GPU or not.

    Records in results/ do not count, because they were made on other machines.
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
    """Return the seconds that a run will still take; NaN if no similar run was measured."""
    return speeds.get(_kind(state.config), math.nan) * state.left


def _kind(config: Config) -> tuple:
    noise = config.noise and config.noise.kind
    alike = (getattr(config, name) for name in ALIKE)
    return config.data.rpartition("/")[2], noise, config.flatness, *alike


def forecast(todo: Sequence[State], slots: int, speeds: Speeds) -> str:
    """Describe in one line the runs to come, and their time with `slots` runs in parallel."""
    counts = Counter(state.state for state in todo)
    parts = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    known = [s for s in (seconds(state, speeds) for state in todo) if not math.isnan(s)]
    needed = [f"{len(todo) - len(known)} of unknown length"] if len(known) < len(todo) else []
    if known:
        needed.insert(0, f"about {tqdm.format_interval(max(sum(known) / slots, *known))}")
    return f"{len(todo)} runs ({parts}), {slots} in parallel: {', '.join(needed)}"


def table(plans: Mapping[str, Iterable[Config]], store: Store) -> pd.DataFrame:
    """Count the runs of figures by state.

    Args:
        plans: The configurations of each figure.
        store: The store that holds the records.

    Returns:
        One row a figure, with columns figure, runs, one for each of `STATES`, hours, unknown and
        states (a list of `State`). Hours is the time of the runs not done, one after the other on
        this machine. It leaves out runs unlike all those that the store has measured, which
        unknown counts, and is NaN if it leaves out all.
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
