"""What bfloat16 changes: the same runs in both precisions, in pairs.

    python -m benchmarks.precision figure-R2 --profile small --data images:cifar10-jpeg.tar.xz

Nothing is trained: pairs are made of the runs that the store and `results/` hold. A pair has the
same seed, initial network and order of images. Then the conclusions, in each precision, from the
same seeds: paired differences of methods, and correlations of stability with accuracy and flatness.
"""

import argparse
import itertools
import json
from pathlib import Path

import pandas as pd

from benchmarks import training
from paperlib import experiments, landscape, stats
from paperlib.runs import Store

KEYS = ["network", "method", "label", "seed"]
PRECISIONS = ("float32", "bfloat16")
NUMBERS = {"best_accuracy": "best test accuracy", "mean_stability": "mean stability"}  # percent
FLATNESS = {"curvature": "Tr(H)", "noise": "Tr(C)"}  # of the runs in which it was measured


def pairs(
    store: Store, name: str, profile: str, data: str | None = None, seeds: int | None = None
) -> pd.DataFrame:
    """The settings and seeds of a figure that are there in float32 and in bfloat16.

    One row a pair: network, method, label, seed and each of `NUMBERS` in both precisions, in
    percent; those of `FLATNESS`, too, where there are any.
    """
    found = []
    for precision in PRECISIONS:
        scale = experiments.Scale(profile, data, seeds, precision)
        plan = experiments.plan(name, scale)
        there = store.find(plan.run)
        measured = [config.identity for config in plan.config if config.flatness is not None]
        flat = landscape.measures(store.records([run for run in measured if run in there]))
        _, runs = store.frames([run for run in plan.run if run in there])
        if len(flat):
            runs = runs.merge(flat[["run", *FLATNESS]], on="run", how="left")
        found.append(experiments.annotate(runs, plan).drop_duplicates(KEYS))
    columns = [*KEYS, *NUMBERS, *FLATNESS]
    both = [frame[frame.columns.intersection(columns)] for frame in found if len(frame)]
    if len(both) < 2:
        return pd.DataFrame(columns=KEYS)
    return both[0].merge(both[1], on=KEYS, suffixes=(" float32", " bfloat16"))


def differences(paired: pd.DataFrame) -> list[dict]:
    """Differences in best test accuracy between settings, in both precisions, from paired seeds.

    And their change: the difference in bfloat16 less that in float32, by seed.
    """
    columns = {precision: f"best_accuracy {precision}" for precision in PRECISIONS}
    columns["change"] = "change"
    paired = paired.assign(change=paired[columns["bfloat16"]] - paired[columns["float32"]])
    rows = []
    for network, mine in paired.groupby("network", sort=False):
        for a, b in itertools.combinations(mine.label.unique(), 2):
            row = {"network": network, "difference": f"{a} - {b}"}
            for name, value in columns.items():
                row[name] = str(stats.paired_difference(mine, value, "label", a, b))
            rows.append(row)
    return rows


def correlations(paired: pd.DataFrame) -> list[dict]:
    """Pearson's r of mean stability and another number, in both precisions.

    What two claims of arXiv 1906.03728 are judged by: T1, in figure 2, by best test accuracy over
    the runs pruned in training; T4, in figure 6, by Tr(H) and Tr(C) over all runs. From the pairs,
    which have the same settings and seeds in both.
    """
    rows = []
    for network, mine in paired.groupby("network", sort=False):
        pruned = mine[~mine.method.isin([experiments.NO_PRUNING, experiments.SCRATCH])]
        cases = [("best_accuracy", NUMBERS["best_accuracy"] + ", pruned runs", pruned)]
        for name, words in FLATNESS.items():
            if f"{name} float32" in mine and mine[f"{name} float32"].notna().any():
                cases.append((name, words, mine.dropna(subset=f"{name} float32")))
        for name, words, chosen in cases:
            row = {"network": network, "with": words}
            for precision in PRECISIONS:
                x, y = (chosen[f"{column} {precision}"] for column in ("mean_stability", name))
                row[precision] = str(stats.pearson(x, y))
            rows.append(row)
    return rows


CONCLUSIONS = {
    "differences in best test accuracy, points": differences,
    "r of mean stability with others": correlations,
}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", nargs="*", default=["figure-R2"])
    parser.add_argument("--profile", default="small")
    parser.add_argument("--data")
    parser.add_argument("--seeds", type=int, help="how many, in place of the profile's")
    parser.add_argument("--runs", help="run store; default: as for paperlib")
    parser.add_argument("--out", type=Path, help="JSON file of everything printed")
    options = parser.parse_args(argv)
    store, results = Store(options.runs), {}
    for name in options.figures:
        paired = pairs(store, name, options.profile, options.data, options.seeds)
        print(f"{name} at {options.profile}: {len(paired)} pairs")
        if paired.empty:
            continue
        changes = {}
        for number, words in NUMBERS.items():
            change = paired[f"{number} bfloat16"] - paired[f"{number} float32"]
            changes[words] = str(stats.mean(change))
            print(f"{words}, bfloat16 less float32, points: {changes[words]}")
        results[name] = {"pairs": paired.to_dict("records"), "changes": changes}
        print(training.table(results[name]["pairs"]))
        for what, function in CONCLUSIONS.items():
            results[name][function.__name__] = rows = function(paired)
            if rows:
                print(f"\n{what}\n{training.table(rows)}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
