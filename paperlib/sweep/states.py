"""What a store knows of runs: done, partial, failed, damaged or missing. Imports no torch."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pandas as pd

from paperlib.config import Config
from paperlib.runs import Mismatch, Store, StoreError
from paperlib.store import checkpoints, lease
from paperlib.store.records import Entry
from paperlib.store.store import by_identity as unique
from paperlib.sweep import costs

STATES = ("done", "partial", "failed", "damaged", "changed", "missing")
TO_RUN = ("partial", "damaged", "missing")


@dataclass
class State:
    """What a store knows of a run.

    Attributes:
        run: its identity.
        config: its configuration.
        state: one of `STATES`.
        epochs: how many are done.
        why: why it would or would not be run, for people.
        error: the note of a failure, or what is wrong with a record.
    """

    run: str
    config: Config
    state: str
    epochs: int
    why: str
    error: str | None = None

    @property
    def left(self) -> int:
        """How many epochs are not done."""
        return self.config.epochs - self.epochs


def states(configs: Iterable[Config] | dict[str, Config], store: Store) -> list[State]:
    """Return the state of each configuration, in order."""
    named = configs if isinstance(configs, dict) else unique(configs)
    found, failures = store.find(named.values()), store.failures()
    own = set(store.own())
    return [
        _state(run, config, found.get(run), failures.get(run), run in own, store)
        for run, config in named.items()
    ]


def _state(
    run: str,
    config: Config,
    record: Entry | StoreError | None,
    failure: str | None,
    own: bool,
    store: Store,
) -> State:
    if isinstance(record, Entry):
        where = "in the store" if own else "in results"
        return State(run, config, "done", config.epochs, f"not run: {where}")
    if isinstance(record, Mismatch):
        why = "not run: its record is of other data or code"
        return State(run, config, "changed", config.epochs, why, str(record))
    epochs = checkpoints.progress(store.path, run) or 0
    resumed = f"resumes from epoch {epochs}" if epochs else "starts from its first epoch"
    if record is not None:
        return State(run, config, "damaged", epochs, "run: its record is damaged", str(record))
    if failure is not None:
        why = "not run: it failed before; --retry-failed runs it again"
        return State(run, config, "failed", epochs, why, failure)
    holder = lease.holder(store.path, run)
    if holder:
        resumed += f"; process {holder['pid']} on {holder['host']} is at it"
    return State(run, config, "partial" if epochs else "missing", epochs, f"run: {resumed}")


def missing(configs: Iterable[Config], store: Store) -> list[Config]:
    """Return the configurations that have no whole record in the store."""
    named = unique(configs)
    whole = store.whole(named.values())
    return [config for run, config in named.items() if run not in whole]


def by_figure(plans: Mapping[str, pd.DataFrame], store: Store) -> dict[str, list[State]]:
    """Return the states of each figure's runs, each run once, by the figure's name.

    plans: by figure, as `experiments.plan` returns them.
    """
    configs = unique(config for plan in plans.values() for config in plan.config)
    found = {state.run: state for state in states(configs, store)}
    return {name: [found[run] for run in dict.fromkeys(plan.run)] for name, plan in plans.items()}


def table(figures: Mapping[str, list[State]], speeds: costs.Speeds) -> pd.DataFrame:
    """Return one row a figure: its runs, and how many are in each of `STATES`.

    Column hours has the time that runs not done will take one after the other on this machine, as
    far as its store has measured runs alike; NaN where it has none. Column unknown counts the runs
    that this leaves out.
    """
    rows = []
    for name, mine in figures.items():
        counts = Counter(state.state for state in mine)
        left = [state for state in mine if state.state != "done"]
        known = [s for s in (speeds.seconds(state) for state in left) if not math.isnan(s)]
        rows.append(
            {"figure": name, "runs": len(mine)}
            | {state: counts[state] for state in STATES}
            | {
                "hours": sum(known) / 3600 if known or not left else math.nan,
                "unknown": len(left) - len(known),
            }
        )
    return pd.DataFrame(rows)
