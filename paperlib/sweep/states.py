"""The states of runs in a store: done, partial, failed, damaged, changed or missing. No torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pandas as pd

from paperlib.config import Config
from paperlib.runs import Mismatch, Store
from paperlib.store import checkpoints, lease
from paperlib.store.records import Entry
from paperlib.store.store import by_identity as unique

STATES = ("done", "partial", "failed", "damaged", "changed", "missing")
TO_RUN = ("partial", "damaged", "missing")


@dataclass
class State:
    """The state of a run in a store.

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


def states(configs: Iterable[Config], store: Store) -> list[State]:
    """Return the state of each configuration, in order; equal runs appear once."""
    named = unique(configs)
    found, failures, own = store.find(named.values()), store.failures(), set(store.own())
    result = []
    for run, config in named.items():
        record, epochs = found.get(run), checkpoints.progress(store.path, run) or 0
        if isinstance(record, Entry):
            why = "not run: in the store" if run in own else "not run: in results"
            state = State(run, config, "done", config.epochs, why)
        elif isinstance(record, Mismatch):
            why = "not run: its record is of other data or code"
            state = State(run, config, "changed", config.epochs, why, str(record))
        elif record is not None:
            why = "run: its record is damaged"
            state = State(run, config, "damaged", epochs, why, str(record))
        elif run in failures:
            why = "not run: it failed before; --retry-failed runs it again"
            state = State(run, config, "failed", epochs, why, failures[run])
        else:
            why = f"run: resumes from epoch {epochs}" if epochs else "run: from its first epoch"
            if holder := lease.holder(store.path, run):
                why += f"; {holder} is at it"
            state = State(run, config, "partial" if epochs else "missing", epochs, why)
        result.append(state)
    return result


def missing(configs: Iterable[Config], store: Store) -> list[Config]:
    """Return the configurations that have no whole record in the store."""
    named = unique(configs)
    whole = store.whole(named.values())
    return [config for run, config in named.items() if run not in whole]


def by_figure(plans: Mapping[str, pd.DataFrame], store: Store) -> dict[str, list[State]]:
    """Return the states of each figure's runs, each run once, by the figure's name.

    plans: by figure, as `experiments.plan` returns them.
    """
    configs = (config for plan in plans.values() for config in plan.config)
    found = {state.run: state for state in states(configs, store)}
    return {name: [found[run] for run in dict.fromkeys(plan.run)] for name, plan in plans.items()}
