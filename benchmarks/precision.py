"""What bfloat16 changes: the same runs in both precisions, in pairs.

    python -m benchmarks.precision figure-R2 --profile small --data images:cifar10-jpeg.tar.xz

Nothing is trained: pairs are made of the runs that the store and `results/` hold. A pair has the
same seed, initial network and order of images. Then the conclusions, in each precision, from the
same seeds: paired differences of methods, and correlations of stability and accuracy.
"""

import argparse
import itertools
import json
from pathlib import Path

import pandas as pd

from benchmarks import training
from paperlib import experiments, stats
from paperlib.runs import Store

KEYS = ["network", "method", "label", "seed"]
PRECISIONS = ("float32", "bfloat16")
NUMBERS = {"best_accuracy": "best test accuracy", "mean_stability": "mean stability"}  # percent


def pairs(
    store: Store, name: str, profile: str, data: str | None = None, seeds: int | None = None
) -> pd.DataFrame:
    """The settings and seeds of a figure that are there in float32 and in bfloat16.

    One row a pair: network, method, label, seed and each of `NUMBERS` in both precisions, in
    percent.
    """
    found = []
    for precision in PRECISIONS:
        plan = experiments.plan(name, profile, data, seeds, precision)
        there = store.find(plan.run)
        _, runs = store.frames([run for run in plan.run if run in there])
        found.append(experiments.annotate(runs, plan).drop_duplicates(KEYS))
    both = [frame[[*KEYS, *NUMBERS]] for frame in found if len(frame)]
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
    """Pearson's r of mean stability and best test accuracy over pruned runs, in both precisions.

    What claim T1 of arXiv 1906.03728 is judged by, in figure 2. From the pairs, which have the same
    settings and seeds in both.
    """
    rows = []
    for network, mine in paired[paired.method != experiments.NO_PRUNING].groupby("network"):
        row = {"network": network}
        for precision in PRECISIONS:
            x, y = (mine[f"{name} {precision}"] for name in ("mean_stability", "best_accuracy"))
            row[precision] = str(stats.pearson(x, y))
        rows.append(row)
    return rows


CONCLUSIONS = {
    "differences in best test accuracy, points": differences,
    "r of mean stability and best test accuracy, pruned runs": correlations,
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
