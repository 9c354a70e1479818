"""Test claim T1 on a pruning method, a network or images of one's own.

`settings` takes Figure 2's settings of VGG11, on any network and with one more score. `judge` gives
the verdict, by the same rules as for the papers' figures.
"""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from paperlib import experiments
from paperlib.claims import gates
from paperlib.claims.gates import UNPRUNED
from paperlib.claims.tradeoff_2020 import T1
from paperlib.claims.verdicts import Claim
from paperlib.store.provenance import CHECKSUMS, images_path

FIGURE, LIKE, YOURS = "figure-2", "largest 40", "yours"
SHOWN = (UNPRUNED, "smallest 4", "smallest 40", LIKE)


class Yours(T1):
    """T1 of other settings and networks."""

    name = "yours"
    statement = "Of these settings, the least stable generalizes best."
    settings = ()


def settings(
    profile: str = "demo",
    score: str | None = None,
    target: str = "smallest",
    model: str | None = None,
    data: str | None = None,
    seeds: int | None = None,
    layers: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Return Figure 2's settings of VGG11 and one with another score, a row a run.

    Args:
        profile: The scale.
        score: "module:function", a function of a convolution that gives a value a filter; or a
            name of `pruning.SCORES`. Its events are those of Prune_L. None leaves this setting out.
            The function may use the gradients of the last training batch, as `conv.weight.grad`,
            and random numbers of torch, which are seeded.
        target: The filters that are pruned, by the score's values: "smallest" or "largest". It
            changes nothing without a score.
        model: "module:function" of a network, called with num_classes and in_channels (always 3),
            or a name of `models.MODELS`, in place of VGG11. Its training, and the width of a named
            one, are those of VGG11 at this profile. It may draw random numbers with torch, and keep
            state in parameters and buffers: other generators and attributes are neither seeded nor
            in a checkpoint.
        data: A data set in place of the profile's.
        seeds: The number of seeds, in place of the profile's.
        layers: The names of the four convolutions that are pruned, in forward order. None takes the
            last four, and counts neither grouped ones nor those on shortcuts.

    Returns:
        The columns of `experiments.plan`.

    Raises:
        ValueError: A name is unknown. Functions and layers are looked up when runs begin.
    """
    _check_names(score, target, model, data)
    if isinstance(layers, str):
        raise ValueError(f"layers must be a list of names, got {layers!r}")
    plan = experiments.plan(FIGURE, experiments.Scale(profile, data, seeds))
    plan = plan[(plan.network == "VGG11") & plan.setting.isin(SHOWN)]
    if score is not None:
        mine = plan[plan.setting == LIKE].copy()
        rate = mine.label.str.rpartition(" ")[2]
        mine["config"] = [
            c.with_(pruning=replace(c.pruning, score=score, target=target)) for c in mine.config
        ]
        mine = mine.assign(method="Yours", setting=YOURS, label="Yours " + rate)
        plan = pd.concat([plan, mine])
    if model is not None:
        plan = plan.assign(network=model.rpartition(":")[2])
        plan["config"] = [
            c.with_(model=model, flatness=None, histograms=False) for c in plan.config
        ]
    if layers is not None:
        names = tuple(layers)
        plan["config"] = [
            c.with_(pruning=c.pruning and replace(c.pruning, layers=names)) for c in plan.config
        ]
    plan["run"] = [config.identity for config in plan.config]
    return plan.reset_index(drop=True)


def _check_names(score: str | None, target: str, model: str | None, data: str | None) -> None:
    """Raise ValueError for names that are unknown, except those of functions."""
    path = images_path(data or "")
    if data is not None and data not in CHECKSUMS and not (path and path.exists()):
        there = ", ".join(CHECKSUMS)
        raise ValueError(f"unknown data {data!r}: one of {there}, or images:PATH of images there")
    if target not in (valid := ("smallest", "largest")):
        raise ValueError(f"unknown target {target!r}: one of {', '.join(valid)}")
    for what, name in (("score", score), ("model", model)):
        if name is not None and ":" not in name:
            from paperlib import models, pruning

            names = pruning.SCORES if what == "score" else tuple(models.MODELS)
            if name not in names:
                there = ", ".join(names)
                raise ValueError(f"unknown {what} {name!r}: one of {there}, or module:function")


def judge(plan: pd.DataFrame, epochs: pd.DataFrame, runs: pd.DataFrame) -> Claim:
    """Judge whether the least stable setting beats the most stable one, and no pruning.

    Args:
        plan: A plan of one network, as `settings` returns it.
        epochs: Its epochs, keyed by run.
        runs: Its runs, keyed by run.

    Returns:
        The claim, with gates, contrasts and a verdict. Two seeds are enough only for a clear
        difference.

    Raises:
        ValueError: The plan lacks "none", or two other settings.
    """
    names = list(plan.setting.unique())
    if UNPRUNED not in names or len(names) < 3:
        raise ValueError(f"a verdict needs {UNPRUNED!r} and two other settings, got {names}")
    columns = ["run", "accuracy", "best_accuracy", "mean_stability", "device"]
    frame = plan.merge(runs[columns].drop_duplicates("run"), "left", on="run")
    frame = frame.assign(figure=FIGURE, done=frame.accuracy.notna(), finite=True)
    rule = Yours()
    rule.network = plan.network.iloc[0]
    rule.compared = [name for name in names if name != UNPRUNED]
    return rule.judge(frame, gates.evaluate(frame, epochs), secondary=False)
