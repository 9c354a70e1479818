"""The claims of both papers, judged by the runs that are there.

`judge` reads a store; `load` gives it the registered runs, a row each, with the columns of
`experiments.plan` and

    figure                       a run that serves several figures has a row for each
    done, finite                 whether there is a record (or a failure for a loss that was not
                                 finite), and whether the loss was finite throughout
    accuracy, best_accuracy      percent: the primary outcome and the paper's
    mean_stability               percent
    parameters                   left at the end, for R3
    curvature, noise, delta_w    Tr(H), Tr(C) and delta_w, for T4
    train_loss                   of the epoch at whose end these were measured, for T4

The claims: `claims_2020`, `claims_2018`; how they get their verdicts: `verdicts`. No torch.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pandas as pd

from paperlib import measures, plans
from paperlib.claims_2018 import r1, r2, r3, r4
from paperlib.claims_2020 import VGG, t1, t2, t3, t4, t5
from paperlib.gates import evaluate
from paperlib.plans import Scale
from paperlib.runs import Store, StoreError, epochs_frame, runs_frame
from paperlib.stats import Fitted
from paperlib.store.records import Entry
from paperlib.verdicts import DESCRIBED, Claim, Contrast

FIGURES = (
    *("figure-2", "figure-3", "figure-4", "figure-5", "figure-6", "figure-B2", "figure-C3"),
    *("figure-D2", "table-C1", "figure-R1", "figure-R3", "figure-R4"),
)
EPOCHS = (
    *("run", "epoch", "trained", "removed", "pre", "post", "train_accuracy", "train_loss"),
    "seconds",
)
SUMMARY = ("accuracy", "best_accuracy", "mean_stability", "parameters")
# What the failure of a run says whose loss was not finite.
NOT_FINITE = re.compile(r"loss of .* is (nan|inf|-inf) at epoch")
CLAIMS = {"T1": t1, "T2": t2, "T3": t3, "T4": t4, "T5": t5, "R1": r1, "R2": r2, "R3": r3, "R4": r4}


# The figures whose runs decide a claim, and those that show the same runs.
CARRIED = {
    "T1": ("figure-2", "figure-E6"),
    "T2": (
        *("figure-2", "figure-3", "figure-4", "figure-B2", "figure-C1", "figure-C2", "figure-C3"),
        "table-C1",
    ),
    "T3": ("figure-5",),
    "T4": ("figure-6", *(f"figure-E{number}" for number in range(1, 6))),
    "T5": ("figure-D2",),
    "R1": ("figure-R1", "figure-R3"),
    "R2": ("figure-R1", "figure-R2", "figure-R4"),
    "R3": ("figure-R1", "figure-R2", "figure-R4", "figure-R6"),
    "R4": ("figure-R1",),
}


def carried(figure: str) -> list[str]:
    """Return the names of the claims that a figure carries."""
    return [name for name, figures in CARRIED.items() if figure in figures]


def judge(
    scale: Scale | str = "small",
    store: Store | None = None,
    names: Iterable[str] | None = None,
) -> list[Claim]:
    """Judge claims by the runs that a store has; nothing is trained.

    Args:
        scale: as for `experiments.plan`, but for the seeds: those that are registered count.
        store: the default one where None.
        names: of the claims; all where None.
    """
    names = list(CLAIMS if names is None else names)
    if unknown := set(names) - set(CLAIMS):
        raise ValueError(f"unknown claim {min(unknown)!r}: one of {', '.join(CLAIMS)}")
    figures = [figure for figure in FIGURES if any(figure in CARRIED[name] for name in names)]
    if not figures:
        return []
    runs, epochs = load(scale, store, figures)
    gates = evaluate(runs, epochs)
    return [CLAIMS[name](runs, gates) for name in names]


def load(
    scale: Scale | str = "small",
    store: Store | None = None,
    figures: Iterable[str] = FIGURES,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the registered runs, as the module's docstring says, and the epochs of those done.

    Arguments as for `judge`; figures: those of `FIGURES` that the claims need.
    """
    store, scale = store or Store(), replace(Scale.of(scale), seeds=None)
    found = [plans.plan(figure, scale).assign(figure=figure) for figure in figures]
    runs = pd.concat(found, ignore_index=True)
    length = {run: config.epochs for run, config in zip(runs.run, runs.config, strict=True)}
    entries = [
        entry
        for entry in store.find(runs.config).values()
        if isinstance(entry, Entry) and entry.count == length[entry.run]
    ]
    there = {entry.run for entry in entries}
    epochs = epochs_frame(entries).reindex(columns=EPOCHS)
    summary = runs_frame(entries, epochs).reindex(columns=["run", *SUMMARY])
    runs = runs.drop(columns=[c for c in SUMMARY if c in runs]).merge(summary, "left", "run")
    failed = {run for run in set(length) - there if NOT_FINITE.search(store.failure(run) or "")}
    lost = epochs.run[epochs.trained.astype(bool) & ~np.isfinite(epochs.train_loss)]
    runs["done"] = runs.run.isin(there | failed)
    runs["finite"] = ~runs.run.isin(failed.union(lost))
    return _with_flatness(runs, epochs, store), epochs


def _with_flatness(runs: pd.DataFrame, epochs: pd.DataFrame, store: Store) -> pd.DataFrame:
    """Add T4's columns. Arrays are read only if all of its runs are there."""
    names = ["curvature", "noise", "delta_w", "train_loss"]
    runs[names] = np.nan
    mine = (runs.figure == "figure-6") & (runs.network == VGG)
    if not runs.done[mine].all():
        return runs
    losses = epochs.set_index(["run", "epoch"]).train_loss
    for i in runs.index[mine & runs.finite]:
        run, flatness = runs.run[i], runs.config[i].flatness
        try:
            found = measures.flatness(store.records([run])).iloc[0]
        except (StoreError, KeyError):
            runs.loc[i, "done"] = False
            continue
        never = flatness.reach + flatness.step
        delta_w = never if np.isnan(found.delta_w) else found.delta_w
        loss = losses[run, flatness.epoch]
        runs.loc[i, names] = [found.curvature, found.noise, delta_w, loss]
    return runs


def to_frame(claims: Iterable[Claim]) -> pd.DataFrame:
    """Return one row a contrast, and one for each claim that has none."""
    rows = []
    for claim in claims:
        about = {
            "claim": claim.name,
            "verdict": claim.verdict,
            "runs": claim.n,
            "power": claim.power,
        }
        rows += [about | _row(contrast) for contrast in claim.contrasts] or [about]
    columns = ["claim", "verdict", "runs", "power", *_row(_EMPTY)]
    return pd.DataFrame(rows, columns=columns)


def to_dict(claim: Claim) -> dict[str, Any]:
    """Return all about a claim in JSON's types; None for numbers that there are not."""
    content: dict[str, Any] = {field.name: getattr(claim, field.name) for field in fields(claim)}
    content["contrasts"] = [_row(contrast) for contrast in claim.contrasts]
    content["gates"] = [
        {f.name: getattr(gate, f.name) for f in fields(gate)} for gate in claim.gates
    ]
    return {name: _plain(value) for name, value in content.items()}


def _row(contrast: Contrast) -> dict[str, object]:
    low, high = (np.asarray(limit).item() for limit in contrast.fitted.interval())
    return {
        "kind": contrast.kind,
        "contrast": contrast.name,
        "outcome": contrast.outcome,
        "n": contrast.n,
        "dropped": contrast.dropped,
        "estimate": np.asarray(contrast.fitted.value).item(),
        "low": float(low),
        "high": float(high),
        "null": contrast.null,
        "p": contrast.p,
        "sign_flip": contrast.sign_flip,
        "holm": contrast.holm,
        "note": contrast.note,
    }


_EMPTY = Contrast("", DESCRIBED, "", Fitted(math.nan, math.nan, 0), 0, 0)


def _plain(value: object) -> object:
    """Return a value in JSON's types."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
