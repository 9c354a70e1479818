"""The experiments of both papers: their figures, as a reader draws them.

`load` gives everything that a figure's notebook shows. `plan`, `table`, `queue` and `Scale` are
those of `plans`. Imports no torch unless something is trained.
"""

import os
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pandas as pd

from paperlib import claims, measures, sweep
from paperlib.claims import gates
from paperlib.plans import FIGURES, PROFILES, Scale, annotate, figure, plan, queue, table  # noqa: F401
from paperlib.runs import RunRecord, Store

NAMED = 3  # at most so many settings with a failed gate are named on a figure's face


def resolve(name: str, profile: str = "auto", store: Store | None = None, **change: Any) -> Scale:
    """Return the scale at which a figure is drawn.

    Args:
        name: The name of the figure.
        profile: A name of `PROFILES`, or "auto". "auto" is the variable PAPERLIB_PROFILE if it is
            set. Else it is "small" for the networks that have all their runs of the figure at that
            scale, or "demo" if none has. All registered seeds count even if fewer are shown: no
            part of a comparison is shown early.
        store: The store; None for the default one.
        change: Values for data, seeds and precision, as for `Scale`.

    Raises:
        ValueError: The figure or the profile is unknown.
        Mismatch: A record was made with other data or code.
    """
    if profile == "auto":
        profile = os.environ.get("PAPERLIB_PROFILE") or "auto"
    if profile != "auto":
        return Scale(profile, **change)
    small = Scale("small", **change)
    runs = pd.concat([plan(name, small), plan(name, replace(small, seeds=None))])
    complete = complete_networks(runs, store or Store())
    if len(complete) == runs.network.nunique():
        return small
    return replace(small, networks=complete) if complete else replace(small, profile="demo")


def complete_networks(runs: pd.DataFrame, store: Store) -> tuple[str, ...]:
    """Return the networks of a plan whose runs are all in a store."""
    missing = {config.identity for config in sweep.missing(runs.config, store)}
    lacking = set(runs.network[runs.run.isin(missing)])
    return tuple(network for network in runs.network.unique() if network not in lacking)


def load(
    name: str,
    profile: str = "auto",
    data: str | None = None,
    seeds: int | None = None,
    precision: str | None = None,
    store: Store | None = None,
    train: bool = True,
) -> "Loaded":
    """Load everything that a figure shows.

    Args:
        name: The name of the figure.
        profile: As for `resolve`.
        data: As for `Scale`.
        seeds: As for `Scale`.
        precision: As for `Scale`.
        store: The store; None for the default one.
        train: First train the missing runs, in worker processes.

    Raises:
        ValueError: The figure or the profile is unknown, or data cannot be loaded.
        StoreError: The store cannot be written, or has records of other data or code.
        sweep.SweepError: A run failed.
    """
    figure(name)
    store = store or Store()
    scale = resolve(name, profile, store, data=data, seeds=seeds, precision=precision)
    runs = plan(name, scale)
    if train:
        sweep.execute(runs.config, store)
    return Loaded(name, scale, runs, store)


def frames(runs: pd.DataFrame, store: Store) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the epochs and runs of a plan that a store has, with the plan's columns.

    If flatness was measured in any run, the frame of runs has its measures, too.
    """
    there = store.whole(runs.config)
    epochs, frame = (annotate(frame, runs) for frame in store.frames(there))
    flat = [c.identity for c in runs.config if c.flatness is not None and c.identity in there]
    records = [r for r in store.records(dict.fromkeys(flat)) if "eigenvalues" in r.arrays]
    if records:
        frame = frame.merge(measures.flatness(records), "left", "run")
    return epochs, frame


@dataclass(frozen=True)
class Loaded:
    """A figure's runs at a scale.

    Attributes:
        name: The name of the figure.
        scale: The scale at which it is shown.
        plan: Its runs, as `experiments.plan` returns them.
        store: The store that holds the records.
    """

    name: str
    scale: Scale
    plan: pd.DataFrame
    store: Store

    @property
    def complete(self) -> bool:
        """Whether the store has all runs."""
        return len(self.runs) == len(self.plan)

    @cached_property
    def settings(self) -> pd.DataFrame:
        """The settings beside the paper's: a row for each quantity and side, a column a setting."""
        return table(self.name, self.scale).T

    @cached_property
    def _frames(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        return frames(self.plan, self.store)

    @property
    def epochs(self) -> pd.DataFrame:
        """One row an epoch of each run, with the plan's columns."""
        return self._frames[0]

    @property
    def runs(self) -> pd.DataFrame:
        """One row a run, with the plan's columns.

        If flatness was measured, there are also columns curvature, noise, tic and delta_w.
        """
        return self._frames[1]

    @cached_property
    def records(self) -> list[RunRecord]:
        """The records with their arrays, in the plan's order."""
        return self.store.records(self.runs.run)

    @cached_property
    def _gates(self) -> list[gates.Gate]:
        return gates.evaluate(self.plan.assign(figure=self.name), self.epochs)

    @cached_property
    def gates(self) -> pd.DataFrame:
        """The figure's gates, one row each, for people."""
        return gates.table(self._gates)

    @cached_property
    def claims(self) -> pd.DataFrame:
        """The figure's claims by their registered seeds, one row a contrast."""
        names = claims.carried(self.name)
        return claims.to_frame(claims.judge(self.scale, store=self.store, names=names))

    @property
    def stamp(self) -> str:
        """One line for the figure's face: profile, data, seeds, missing runs and failed gates."""
        counts = self.plan[~self.plan.choosing].groupby(["network", "setting"]).size()
        seeds = " to ".join(str(count) for count in sorted({counts.min(), counts.max()}))
        data = ", ".join(dict.fromkeys(config.data for config in self.plan.config))
        parts = [f"{self.scale.profile}: {data}, {seeds} {'seed' if seeds == '1' else 'seeds'}"]
        if self.scale.precision:
            parts.append(self.scale.precision)
        if not self.complete:
            parts.append(f"{len(self.runs)} of {len(self.plan)} runs")
        if self.scale.networks:
            networks = dict.fromkeys(setting.network for setting in figure(self.name).settings)
            absent = [network for network in networks if network not in self.scale.networks]
            parts.append(f"not yet run: {', '.join(absent)}")
        failed = [gate for gate in self._gates if gate.passed is False]
        if failed:
            where = list(dict.fromkeys(f"{g.network} {g.setting}".strip() for g in failed))
            more = f" and {len(where) - NAMED} more" if len(where) > NAMED else ""
            names = sorted({gate.gate for gate in failed})
            verb = "fail" if len(names) > 1 else "fails"
            parts.append(f"{', '.join(names)} {verb}: {', '.join(where[:NAMED])}{more}")
        return "; ".join(parts)
