"""Check the rules for verdicts: claims judged on simulated runs of a known truth.

    python -m benchmarks.claims --simulations 1000

Runs are those that profile small registers, with invented numbers; all gates but G5 pass, and no
record is read. A run's accuracy is its setting's mean, plus a part that all settings of a seed
share (SD 0.5), plus a part of its own (SD 0.6): a paired difference has an SD of 0.85 points.
Flatness is in logs, with an SD of 0.1 for a run's own part, so that an effect of 0.1 there is an
effect of 1 point at 1 point.

| truth | meaning |
| --- | --- |
| no effect | settings do not differ; R4: by 1 point; T5: Prune_L is better by delta, noise is not |
| effect | the claim's settings differ by 1 point; T4: 10%; R4: not at all |
| settings differ | by an SD of 0.5 points, in a way that has nothing to do with stability |
| networks differ | T2: the networks' effects have a mean of 0 and an SD of 0.5; Figure 3 has none |
| through the loss | T4: flatness differs only as training loss does |

"Old rule" is Pearson's r over all pruned runs, decided by its interval: for T1 and T2 (Figure 3) of
stability and accuracy, for T4 of stability and log Tr(H).
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from paperlib import claims, experiments, stats
from paperlib.claims.tradeoff_2020 import T2
from paperlib.claims.verdicts import Claim

CLAIMS = ("T1", "T2", "T3", "T4", "T5", "R1", "R2", "R4")  # R3 is R2
TRUTHS = (
    *((claim, truth) for claim in CLAIMS for truth in ("no effect", "effect")),
    ("T1", "settings differ"),
    ("T2", "settings differ"),
    ("T2", "networks differ"),
    ("T4", "settings differ"),
    ("T4", "through the loss"),
)
RUN_SD, SEED_SD, SETTING_SD, LOG_SD = 0.6, 0.5, 0.5, 0.1
UNSTABLE = {"smallest": 0.5, "random": 0.75, "largest": 1.0}
# Points by which settings are better where there is an effect; those left out by 0.
EFFECTS = {
    "T1": {"largest 40": 1, "smallest 40": 0.5},
    "T3": {"zeroing 1106": 1, "gaussian 1106": 1},
    "T4": {"largest 40": 1, "smallest 40": 0.5},
    "T5": {"restored 2480": 1, "largest 40 weights": 1},
    "R1": {"largest 0.9": 1},
    "R2": {"largest 0.9": 1},
    "R4": {},
}
EFFECTS["T2"] = EFFECTS["T1"] | {"smallest 60": 1, "smallest 0.10": 1}
NO_EFFECTS = {"T5": {"largest 40 weights": 0.5}, "R4": {"smallest 0.9": -1}}


@cache
def registered(claim: str) -> pd.DataFrame:
    """The runs of a claim's figures, all there, with their settings' mean stability in percent."""
    figures = claims.CLAIMS[claim].reads
    plans = [experiments.plan(f, "small").assign(figure=f) for f in figures]
    runs = pd.concat(plans, ignore_index=True).drop(columns="config")
    return runs.assign(done=True, finite=True, device="cpu", stability=runs.setting.map(_stability))


def simulate(claim: str, truth: str, rng: np.random.Generator) -> pd.DataFrame:
    """The claim's runs with numbers drawn from a truth of `TRUTHS`."""
    runs = registered(claim)
    points = _points(claim, truth, runs)
    if truth == "settings differ":
        points = _shared(runs, ["figure", "network", "setting"], SETTING_SD, rng)
    if truth == "networks differ":
        of_network = _shared(runs, ["figure", "network"], SETTING_SD, rng)
        points = points * of_network * (runs.figure != "figure-3")
    seeds = _shared(runs, ["network", "seed"], SEED_SD, rng)
    accuracy = 80 + points + seeds + rng.normal(0, RUN_SD, len(runs))
    numbers = {
        "accuracy": accuracy,
        "best_accuracy": accuracy + 0.5 + rng.normal(0, 0.2, len(runs)),
        "mean_stability": runs.stability + rng.normal(0, 0.3, len(runs)),
    }
    if claim == "T4":
        loss = rng.normal(0, 0.3, len(runs)) - 3 * points * (truth == "through the loss")
        flatter = 0.3 * loss - points * (truth != "through the loss")
        for name, scale in (("curvature", 300), ("noise", 2000)):
            logs = LOG_SD * (flatter + rng.normal(0, 1, len(runs)) + seeds)
            numbers[name] = scale * np.exp(logs)
        numbers["train_loss"] = 0.001 * np.exp(loss)
        numbers["delta_w"] = rng.uniform(0.02, 0.1, len(runs))
    return runs.assign(**numbers)


def judged(claim: str, runs: pd.DataFrame, draws: int) -> Claim:
    """Return the claim with its verdict, without what does not matter to that."""
    rule = type(claims.CLAIMS[claim])()
    if isinstance(rule, T2):
        rule.draws = draws
    return rule.judge(runs, (), secondary=False)


def old_verdict(claim: str, runs: pd.DataFrame) -> str:
    """Return the verdict by Pearson's r over pooled runs; empty where it was not used."""
    if claim not in ("T1", "T2", "T4"):
        return ""
    pruned = runs[(runs.network == "VGG11") & ~runs.setting.isin(["none", "scratch"])]
    pruned = pruned[pruned.figure == claims.CLAIMS[claim].figures[0]]
    outcome, sign = (np.log(pruned.curvature), 1) if claim == "T4" else (pruned.accuracy, -1)
    r = stats.pearson(pruned.mean_stability, outcome)
    low, high = sorted((sign * r.low, sign * r.high))
    return "supported" if low > 0 else "contradicted" if high < 0 else "undecided"


def verdicts(
    claim: str, truth: str, simulations: int, draws: int = 1000, seed: int = 0
) -> Iterator[tuple[str, str]]:
    """The verdict and that of the old rule, for each of so many simulations."""
    for number in range(simulations):
        runs = simulate(claim, truth, np.random.default_rng([seed, number]))
        yield judged(claim, runs, draws).verdict, old_verdict(claim, runs)


def rates(claim: str, truth: str, simulations: int, draws: int = 1000) -> dict[str, object]:
    """Count the simulations in 1,000 with each verdict, by the new rules and by the old."""
    new, old = (Counter(v) for v in zip(*verdicts(claim, truth, simulations, draws), strict=True))
    share = {name: round(1000 * count / simulations) for name, count in new.most_common()}
    row = {
        "claim": claim,
        "truth": truth,
        "supported": share.pop("supported", 0),
        "contradicted": share.pop("contradicted", 0),
        "other": ", ".join(f"{name} {count}" for name, count in share.items()),
    }
    if "" not in old:
        row["old rule: supported"] = round(1000 * old["supported"] / simulations)
        row["old rule: contradicted"] = round(1000 * old["contradicted"] / simulations)
    return row


def _points(claim: str, truth: str, runs: pd.DataFrame) -> np.ndarray:
    effects = EFFECTS[claim] if truth != "no effect" else NO_EFFECTS.get(claim, {})
    points = runs.setting.map(effects).fillna(0.0)
    if claim == "T2" and truth != "no effect":
        targets = runs.setting.str.split().str[0].map(UNSTABLE)
        points = points.where(runs.figure != "figure-3", 2 * targets - 1.5)
    return points.to_numpy(float)


def _shared(
    runs: pd.DataFrame, by: list[str], deviation: float, rng: np.random.Generator
) -> np.ndarray:
    """A normal number for each group of runs, (runs,)."""
    groups = runs.groupby(by).ngroup().to_numpy()
    return rng.normal(0, deviation, groups.max() + 1)[groups]


def _stability(setting: str) -> float:
    """Of filter pruning at a period, in percent; less for larger filters and rarer events."""
    target, *period = setting.split()
    if target not in UNSTABLE:
        return 100.0
    return 100 - 2 * UNSTABLE[target] * np.log1p(float(period[0]))


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=1000, help="T2's permutations of each")
    parser.add_argument("--out", type=Path, help="JSON file of the table")
    options = parser.parse_args(argv)
    rows = [rates(*truth, options.simulations, options.draws) for truth in TRUTHS]
    print(f"verdicts in 1,000, from {options.simulations} simulations each")
    print(pd.DataFrame(rows).to_string(index=False, na_rep=""))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    main()
