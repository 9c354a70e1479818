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
from dataclasses import fields

import numpy as np
import pandas as pd

from paperlib import experiments, landscape
from paperlib.claims_2018 import r1, r2, r3, r4
from paperlib.claims_2020 import VGG, t1, t2, t3, t4, t5
from paperlib.gates import evaluate
from paperlib.packs import Entry
from paperlib.runs import Store, StoreError, epochs_frame, runs_frame
from paperlib.stats import Fitted
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


def judge(
    profile: str = "small",
    data: str | None = None,
    precision: str | None = None,
    store: Store | None = None,
) -> list[Claim]:
    """Every claim, by the runs that a store has; nothing is trained.

    Args:
        profile, data, precision: as `experiments.plan` takes them.
        store: the default one where None.
    """
    runs, epochs = load(profile, data, precision, store)
    gates = evaluate(runs, epochs)
    return [claim(runs, gates) for claim in CLAIMS.values()]


def load(
    profile: str = "small",
    data: str | None = None,
    precision: str | None = None,
    store: Store | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The registered runs of all claims, see the module's docstring, and the epochs of those done.

    Arguments as `judge` takes them.
    """
    store = store or Store()
    plans = [
        experiments.plan(figure, profile, data, precision=precision).assign(figure=figure)
        for figure in FIGURES
    ]
    runs = pd.concat(plans, ignore_index=True)
    length = {run: config.epochs for run, config in zip(runs.run, runs.config, strict=True)}
    found = store.find(length)
    entries = [e for e in found.values() if isinstance(e, Entry) and e.count == length[e.run]]
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
    """T4's columns. Arrays are read only if all of its runs are there; one without is not done."""
    names = ["curvature", "noise", "delta_w", "train_loss"]
    runs[names] = np.nan
    mine = (runs.figure == "figure-6") & (runs.network == VGG)
    if not runs.done[mine].all():
        return runs
    losses = epochs.set_index(["run", "epoch"]).train_loss
    for i in runs.index[mine & runs.finite]:
        run, flatness = runs.run[i], runs.config[i].flatness
        try:
            found = landscape.measures(store.records([run])).iloc[0]
        except (StoreError, KeyError):
            runs.loc[i, "done"] = False
            continue
        never = flatness.reach + flatness.step
        delta_w = never if np.isnan(found.delta_w) else found.delta_w
        loss = losses[run, flatness.epoch]
        runs.loc[i, names] = [found.curvature, found.noise, delta_w, loss]
    return runs


def to_frame(claims: Iterable[Claim]) -> pd.DataFrame:
    """One row a contrast, and one for each claim that has none."""
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


def to_dict(claim: Claim) -> dict:
    """Everything about a claim as plain JSON types; None for numbers that there are not."""
    content = {field.name: getattr(claim, field.name) for field in fields(claim)}
    content["contrasts"] = [_row(contrast) for contrast in claim.contrasts]
    content["gates"] = [
        {f.name: getattr(gate, f.name) for f in fields(gate)} for gate in claim.gates
    ]
    return _plain(content)


def _row(contrast: Contrast) -> dict[str, object]:
    low, high = contrast.fitted.interval()
    return {
        "kind": contrast.kind,
        "contrast": contrast.name,
        "outcome": contrast.outcome,
        "n": contrast.n,
        "dropped": contrast.dropped,
        "estimate": float(contrast.fitted.value),
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
    """A value in JSON's types."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
