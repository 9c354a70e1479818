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

The claims: `tradeoff_2020`, `regularization_2018`; whether they can be tested: `gates`; how they
get their verdicts: `verdicts`. No torch.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from paperlib import measures, plans
from paperlib.claims import regularization_2018, tradeoff_2020
from paperlib.claims.gates import evaluate
from paperlib.claims.verdicts import Claim, Contrast
from paperlib.plans import Scale
from paperlib.runs import Store, StoreError

CLAIMS = {rule.name: rule for rule in (*tradeoff_2020.RULES, *regularization_2018.RULES)}
EPOCHS = (
    *("run", "epoch", "trained", "removed", "pre", "post", "train_accuracy", "train_loss"),
    "seconds",
)
SUMMARY = ["accuracy", "best_accuracy", "mean_stability", "parameters"]
# What the failure of a run says whose loss was not finite.
NOT_FINITE = re.compile(r"loss of .* is (nan|inf|-inf) at epoch")
# Columns of a contrast in frames and JSON.
ROW = (
    *("kind", "contrast", "outcome", "n", "dropped", "estimate", "low", "high", "null", "p"),
    *("sign_flip", "holm", "note"),
)


def carried(figure: str) -> list[str]:
    """Return the names of the claims that a figure carries."""
    return [name for name, rule in CLAIMS.items() if figure in (*rule.reads, *rule.shown)]


def judge(
    scale: Scale | str = "small",
    store: Store | None = None,
    names: Iterable[str] | None = None,
) -> list[Claim]:
    """Judge claims by the runs that a store has; nothing is trained.

    Args:
        scale: As for `experiments.plan`, but for the seeds: those that are registered count.
        store: The default one where None.
        names: Of the claims; all where None.

    Raises:
        ValueError: A claim is unknown; the message names the valid ones.
    """
    names = list(CLAIMS if names is None else names)
    if unknown := set(names) - set(CLAIMS):
        raise ValueError(f"unknown claim {min(unknown)!r}: one of {', '.join(CLAIMS)}")
    if not names:
        return []
    figures = dict.fromkeys(figure for name in names for figure in CLAIMS[name].reads)
    runs, epochs = load(scale, store, figures)
    gates = evaluate(runs, epochs)
    return [CLAIMS[name].judge(runs, gates) for name in names]


def load(
    scale: Scale | str, store: Store | None, figures: Iterable[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the registered runs, as the module's docstring says, and the epochs of those done.

    Args:
        scale: As for `judge`.
        store: As for `judge`.
        figures: Those that the claims read.
    """
    store, scale = store or Store(), replace(Scale.of(scale), seeds=None)
    found = [plans.plan(figure, scale).assign(figure=figure) for figure in figures]
    runs = pd.concat(found, ignore_index=True)
    epochs, summary = store.frames(store.whole(runs.config))
    lengths = runs.run.map(epochs.run.value_counts())
    there = set(runs.run[lengths == [config.epochs for config in runs.config]])
    epochs = epochs.reindex(columns=EPOCHS)
    runs = runs.merge(summary.reindex(columns=["run", *SUMMARY]), "left", "run")
    missing = set(runs.run) - there
    failed = {run for run in missing if NOT_FINITE.search(store.failure(run) or "")}
    lost = epochs.run[epochs.trained.astype(bool) & ~np.isfinite(epochs.train_loss)]
    runs["done"] = runs.run.isin(there | failed)
    runs["finite"] = ~runs.run.isin(failed.union(lost))
    return _with_flatness(runs, epochs, store), epochs


def _with_flatness(runs: pd.DataFrame, epochs: pd.DataFrame, store: Store) -> pd.DataFrame:
    """Add T4's columns. Arrays are read only if all of its runs are there.

    delta_w that is never reached counts as one step beyond the last point.
    """
    names = ["curvature", "noise", "delta_w", "train_loss"]
    runs[names] = np.nan
    rule = tradeoff_2020.T4
    mine = runs.figure.isin(rule.figures) & (runs.network == rule.network)
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
        about = {"claim": claim.name, "verdict": claim.verdict, "runs": claim.n}
        contrasts = [_row(contrast) for contrast in claim.contrasts] or [{}]
        rows += [about | {"power": claim.power} | contrast for contrast in contrasts]
    return pd.DataFrame(rows, columns=["claim", "verdict", "runs", "power", *ROW])


def to_dict(claim: Claim) -> dict[str, Any]:
    """Return all about a claim in JSON's types; None for numbers that there are not."""
    content = vars(claim) | {
        "contrasts": [_row(contrast) for contrast in claim.contrasts],
        "gates": [vars(gate) for gate in claim.gates],
    }
    text = json.dumps(content, default=lambda value: value.item())
    return json.loads(text, parse_constant=lambda _: None)


def _row(contrast: Contrast) -> dict[str, Any]:
    low, high = contrast.fitted.interval()
    numbers = {"estimate": contrast.fitted.value, "low": low, "high": high}
    row = {name: getattr(contrast, name, None) for name in ROW}
    return row | {"contrast": contrast.name} | {n: float(v) for n, v in numbers.items()}
