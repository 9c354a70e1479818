"""Gates decide from the records whether a scale can test a claim at all.

| gate | condition |
| --- | --- |
| G1 | the unpruned network learns its training images |
| G2 | networks recover from their events before the next one, or have stopped improving |
| G3 | every pruned network learns its training images in the end |
| G4 | the doses that are compared differ by a factor of 5 |
| G5 | the mean stabilities of two pruned settings that are compared differ |
| share | noise lasts for the paper's share of the time between events |

G1 to G4 and share are computed for each network of a figure from means over seeds, G5 by
`verdicts.Part`. No gate compares the accuracies of two settings. Imports no torch.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from paperlib.config import Config, FilterPruning
from paperlib.instability import OUTCOME_EPOCHS
from paperlib.papers.noise_spans import steps, training_batches

LEARNED = 99.9  # percent training accuracy
LEARNED_BY = 0.55  # of the epochs
LEARNED_WITHOUT_MILESTONES = 98.0  # percent, in the mean of the last `LAST_EPOCHS`
LAST_EPOCHS = 3
RECOVERED = 0.3  # points by which `pre` may stay lower
RECOVERED_EVENTS = 90.0  # percent of the events
STILL_RISING = 0.5  # points from three epochs to the next three
LOW_LOSS = 0.02  # nats
DOSES = 5.0
DIGITS = 9  # digits after the point to which means over seeds are rounded
PAPER_STEPS = 40 * 391  # of the paper's training, from one event of noise to the next

UNPRUNED = "none"
CURVES = ["pre", "post", "train_accuracy", "train_loss", "removed"]

Result = tuple[bool | None, float, str]


@dataclass(frozen=True)
class Gate:
    """One gate's result.

    Attributes:
        gate: The gate's name.
        network: The network of the runs.
        figure: The figure of the runs.
        setting: The setting's label; empty if the gate is about all settings. A setting that the
            profile lacks has its name.
        passed: None if the gate does not apply.
        number: The measured number, in the unit given in `text`; NaN if nothing was measured.
        text: The result in words.
    """

    gate: str
    network: str
    figure: str
    setting: str
    passed: bool | None
    number: float
    text: str


def table(results: Iterable[Gate]) -> pd.DataFrame:
    """Return one row a result, for people: the fields of `Gate`, with `passed` in words."""
    words = {True: "passed", False: "failed", None: "not applicable"}
    rows = [asdict(gate) | {"passed": words[gate.passed]} for gate in results]
    return pd.DataFrame(rows, columns=list(Gate.__dataclass_fields__))


def evaluate(runs: pd.DataFrame, epochs: pd.DataFrame) -> list[Gate]:
    """Evaluate G1 to G4 and the share of noise, for each network of each figure.

    Args:
        runs: One row a run of a figure, with columns figure, network, setting, label, run, config
            and choosing. Runs of seeds that only choose dropout are left out.
        epochs: One row an epoch, keyed by run. The means are over the runs that it has.
    """
    epochs = epochs.reindex(columns=["run", "epoch", *CURVES]).drop_duplicates(["run", "epoch"])
    results = []
    for (figure, network), group in runs[~runs.choosing].groupby(["figure", "network"], sort=False):
        settings = group.drop_duplicates("setting")
        curves = group[["run", "setting"]].merge(epochs, on="run")
        means = curves.groupby(["setting", "epoch"])[CURVES].mean().round(DIGITS)
        for row in settings.itertuples():
            if row.setting in means.index:
                found = _of_setting(row.setting, row.config, means.loc[row.setting])
                results += [Gate(n, network, figure, row.label, *r) for n, r in found.items()]
        fitting = [config for config in settings.config if _fits_training_set(config)]
        results.append(Gate("G4", network, figure, "", *_doses(fitting)))
    return results


def _of_setting(setting: str, config: Config, curves: pd.DataFrame) -> dict[str, Result]:
    """Return the gates of one setting by name, from its (epochs,) means over seeds."""
    if setting == UNPRUNED:
        return {"G1": _learned(config, curves)}
    if config.pruning is None:
        return {}
    if config.noise is not None:
        return {"share": _noise_share(int(setting.split()[-1]), config)}
    if not _fits_training_set(config):
        return {"G2": _settled(curves), "G3": (None, np.nan, "not needed of this network")}
    return {"G2": _recovered(config, curves), "G3": _fitted(curves)}


def _fits_training_set(config: Config) -> bool:
    """Return whether a network must learn its training images exactly: G3 and G2's first form.

    This holds for vgg11_bn and resnet18 if they are trained with Adam and without augmentation. So
    it leaves out conv4, the networks trained with SGD, and Table F1.
    """
    network = config.model in ("vgg11_bn", "resnet18")
    return network and config.optimizer == "adam" and not config.augment


def _learned(config: Config, curves: pd.DataFrame) -> Result:
    """Evaluate G1 of the unpruned network."""
    if config.augment:
        return None, np.nan, "the training images are augmented"
    if config.milestones:
        by, needed = int(round(LEARNED_BY * config.epochs, DIGITS)), LEARNED
        number = curves.train_accuracy[curves.index < by].max()
        text = f"{number:.2f}% training accuracy by epoch {by} of {config.epochs}"
    else:
        needed = LEARNED_WITHOUT_MILESTONES
        number = curves.train_accuracy.iloc[-LAST_EPOCHS:].mean()
        text = f"{number:.2f}% training accuracy in the last {LAST_EPOCHS} epochs"
    passed = bool(round(number, DIGITS) >= needed)
    return passed, float(number), f"{text}, at least {needed:g}% needed"


def _recovered(config: Config, curves: pd.DataFrame) -> Result:
    """Evaluate G2 of one pruned setting of a network that must learn its images exactly."""
    if isinstance(config.pruning, FilterPruning) and config.pruning.scratch:
        return None, np.nan, "pruned before training"
    milestone = min(config.milestones, default=0)
    events = curves.index[(curves.removed > 0) & (curves.index >= milestone)]
    if not len(events):
        return None, np.nan, f"no event from epoch {milestone} on"
    if (np.diff(events) == 1).any():
        return None, np.nan, "an event every epoch: G3 decides"
    recovered = []
    for event, end in zip(events, [*events[1:], curves.index.max()], strict=True):
        window = curves.loc[event + 1 : end]
        back = window.pre.max() >= round(curves.pre[event] - RECOVERED, DIGITS)
        recovered.append(bool(back and window.train_accuracy.iloc[-1:].max() >= LEARNED))
    number = 100 * float(np.mean(recovered))
    text = (
        f"recovered from {sum(recovered)} of {len(recovered)} events from the first milestone on, "
        f"at least {RECOVERED_EVENTS:g}% needed"
    )
    return number >= RECOVERED_EVENTS, number, text


def _settled(curves: pd.DataFrame) -> Result:
    """Evaluate G2 of one setting of any other network: test accuracy no longer rises."""
    late = curves.post.iloc[-1 - 2 * OUTCOME_EPOCHS : -1]
    rise = late.iloc[OUTCOME_EPOCHS:].mean() - late.iloc[:OUTCOME_EPOCHS].mean()
    number = round(float(rise), DIGITS)
    text = (
        f"test accuracy rises by {number:.2f} points to the outcome's {OUTCOME_EPOCHS} epochs from "
        f"the {OUTCOME_EPOCHS} before, at most {STILL_RISING:g} allowed"
    )
    return number <= STILL_RISING, number, text


def _fitted(curves: pd.DataFrame) -> Result:
    """Evaluate G3 of one pruned setting."""
    accuracy, loss = curves.train_accuracy.iloc[-1], curves.train_loss.iloc[-1]
    text = (
        f"ends at {accuracy:.2f}% training accuracy, at least {LEARNED:g}% needed, and a training "
        f"loss of {loss:.2g}, at most {LOW_LOSS:g} allowed"
    )
    return bool(accuracy >= LEARNED and loss <= LOW_LOSS), float(accuracy), text


def _doses(configs: Iterable[Config]) -> Result:
    """Evaluate G4 over the settings that prune filters in training, without noise."""
    doses = []
    for config in configs:
        pruning = config.pruning
        if config.noise is None and isinstance(pruning, FilterPruning) and not pruning.scratch:
            doses.append(100 * pruning.fractions[-1] / len(pruning.epochs[-1]))
    if len(doses) < 2:
        return None, np.nan, "no doses are compared"
    number = round(max(doses) / min(doses), DIGITS)
    text = (
        f"{min(doses):.2g} to {max(doses):.2g}% of the last layer an event, a factor of "
        f"{number:.1f}, at least {DOSES:g} needed"
    )
    return number >= DOSES, number, text


def _noise_share(paper: int, config: Config) -> Result:
    """Check that noise lasts for the paper's share of the steps from one event to the next.

    The share is met to the nearest batch, and by at least one batch.

    Args:
        paper: The paper's span in training batches.
        config: The configuration of the setting.
    """
    batches = training_batches(config)
    if paper == 0:
        return None, float(batches), "noise in one pass only"
    assert isinstance(config.pruning, FilterPruning)
    gap = min(np.diff(epochs).min(initial=config.epochs) for epochs in config.pruning.epochs)
    between = int(gap) * steps(config)
    expected = max(1.0, paper / PAPER_STEPS * between)
    text = (
        f"noise lasts {batches} of {between} training batches from event to event, {expected:.1f} "
        f"for the paper's {100 * paper / PAPER_STEPS:.1f}%"
    )
    return round(abs(batches - expected), DIGITS) <= 0.5, float(batches), text
