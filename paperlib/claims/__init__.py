"""The claims of both papers, judged by the runs that are there.

`judge` reads a store. `load` gives it the registered runs, a row each, with the columns of
`experiments.plan` and

    figure                       a run that serves several figures has a row for each
    done, finite                 whether there is a record (or a failure for a loss that was not
                                 finite), and whether the loss was finite throughout
    accuracy, best_accuracy      percent: the primary outcome and the paper's
    mean_stability               percent
    parameters                   left at the end, for R3
    device                       one of torch's types, such as "cpu"
    curvature, noise, delta_w    Tr(H), Tr(C) and delta_w, for T4
    train_loss                   of the epoch at whose end these three were measured, for T4

The claims are in `tradeoff_2020` and `regularization_2018`. `gates` decides whether they can be
tested, and `verdicts` has the rules for their verdicts. Imports no torch.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from paperlib import measures, plans
from paperlib.claims import regularization_2018, tradeoff_2020
from paperlib.claims.contrasts import Contrast
from paperlib.claims.gates import evaluate
from paperlib.claims.verdicts import Claim
from paperlib.plans import Scale
from paperlib.runs import Store

CLAIMS = {rule.name: rule for rule in (*tradeoff_2020.RULES, *regularization_2018.RULES)}
SUMMARY = ["run", "accuracy", "best_accuracy", "mean_stability", "parameters", "device"]
FLATNESS = ["run", "curvature", "noise", "delta_w", "train_loss"]
NAMED = 2  # gate failures in a claim's note
# The failure note of a run whose loss was not finite matches this.
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
    scale: Scale | str = "small", store: Store | None = None, names: Iterable[str] | None = None
) -> list[Claim]:
    """Judge claims by the runs that a store has. Nothing is trained.

    Args:
        scale: As for `experiments.plan`, but the registered seeds of all networks count.
        store: The store; None for the default one.
        names: The names of the claims; None for all.

    Raises:
        ValueError: A claim is unknown. The message names the valid ones.
        Mismatch: A record was made with other data or code.
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
    """Return the registered runs and the epochs of those done.

    Args:
        scale: As for `judge`.
        store: As for `judge`.
        figures: The figures that the claims read.

    Returns:
        The runs, one row each for a figure, with the columns in the module's docstring; and the
        epochs, keyed by run.
    """
    store, scale = store or Store(), replace(Scale.of(scale), seeds=None, networks=None)
    found = [plans.plan(figure, scale).assign(figure=figure) for figure in figures]
    runs = pd.concat(found, ignore_index=True)
    there = store.whole(runs.config)
    epochs, summary = store.frames(there)
    failed = {run for run in set(runs.run) - there if NOT_FINITE.search(store.failure(run) or "")}
    runs["done"], runs["finite"] = runs.run.isin(there | failed), ~runs.run.isin(failed)
    runs = runs.merge(summary.reindex(columns=SUMMARY), "left", "run")
    flat = runs.figure.isin(tradeoff_2020.T4.figures) & runs.run.isin(there)
    return runs.merge(_flatness(runs.run[flat], store), "left", "run"), epochs


def _flatness(runs: Iterable[str], store: Store) -> pd.DataFrame:
    """Return T4's columns, a row a run.

    If no loss rises as far as delta_w needs, delta_w is one step beyond the last point.
    """
    records = store.records(runs)
    frame = measures.flatness(records)
    for i, record in enumerate(records):
        how, epochs = record.config.flatness, record.epochs.set_index("epoch")
        assert how is not None
        frame.loc[i, "train_loss"] = epochs.train_loss[how.epoch]
        if np.isnan(frame.delta_w[i]):
            frame.loc[i, "delta_w"] = how.reach + how.step
    return frame.reindex(columns=FLATNESS)


def to_frame(claims: Iterable[Claim]) -> pd.DataFrame:
    """Return one row a contrast; for each claim that has none, one with gates that fail."""
    rows = []
    for claim in claims:
        about = {"claim": claim.name, "verdict": claim.verdict, "runs": claim.n}
        contrasts = [_row(contrast) for contrast in claim.contrasts]
        contrasts = contrasts or [{"note": _shortened(claim.failures)}]
        rows += [about | {"power": claim.power} | contrast for contrast in contrasts]
    return pd.DataFrame(rows, columns=["claim", "verdict", "runs", "power", *ROW])


def _shortened(failures: Sequence[str]) -> str | None:
    """Return the first failures in one line, and the number of the others; None for none."""
    more = [f"and {len(failures) - NAMED} more"] * (len(failures) > NAMED)
    return "; ".join([*failures[:NAMED], *more]) or None


def to_dict(claim: Claim) -> dict[str, Any]:
    """Return everything about a claim in JSON's types; None for numbers that are not finite."""
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
