"""What bfloat16 changes: the same runs in both precisions, in pairs.

    python -m benchmarks.precision figure-R2 --profile small --data images:cifar10-jpeg.tar.xz

Nothing is trained: pairs are made of the runs that the store and `results/` hold. A pair has the
same seed, initial network and order of images. Then the conclusions, in each precision, from the
same seeds: paired differences of methods.
"""

import argparse
import itertools
import json
from pathlib import Path

import pandas as pd

from benchmarks import training
from paperlib import experiments, stats
from paperlib.runs import Store

NUMBERS = {"best_accuracy": "best test accuracy", "mean_stability": "mean stability"}  # percent


def pairs(store: Store, name: str, profile: str, data: str | None = None) -> pd.DataFrame:
    """The settings and seeds of a figure that are there in float32 and in bfloat16.

    One row a pair: method, label, seed and each of `NUMBERS` in both precisions, in percent.
    """
    found = []
    for precision in ("float32", "bfloat16"):
        plan = experiments.plan(name, profile, data, precision=precision)
        there = store.find(plan.run)
        _, runs = store.frames([run for run in plan.run if run in there])
        found.append(experiments.annotate(runs, plan).drop_duplicates(["label", "seed"]))
    keys = ["method", "label", "seed"]
    both = [frame[[*keys, *NUMBERS]] for frame in found if len(frame)]
    if len(both) < 2:
        return pd.DataFrame(columns=keys)
    return both[0].merge(both[1], on=keys, suffixes=(" float32", " bfloat16"))


def conclusions(paired: pd.DataFrame) -> list[dict]:
    """Differences in best test accuracy between settings, in both precisions, from paired seeds.

    And their change: the difference in bfloat16 less that in float32, by seed.
    """
    columns = {name: f"best_accuracy {name}" for name in ("float32", "bfloat16")}
    columns["change"] = "change"
    paired = paired.assign(change=paired[columns["bfloat16"]] - paired[columns["float32"]])
    rows = []
    for a, b in itertools.combinations(paired.label.unique(), 2):
        row = {"difference": f"{a} - {b}"}
        for name, value in columns.items():
            row[name] = str(stats.paired_difference(paired, value, "label", a, b))
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", nargs="*", default=["figure-R2"])
    parser.add_argument("--profile", default="small")
    parser.add_argument("--data")
    parser.add_argument("--runs", help="run store; default: as for paperlib")
    parser.add_argument("--out", type=Path, help="JSON file of everything printed")
    options = parser.parse_args(argv)
    store, results = Store(options.runs), {}
    for name in options.figures:
        paired = pairs(store, name, options.profile, options.data)
        print(f"{name} at {options.profile}: {len(paired)} pairs")
        if paired.empty:
            continue
        changes = {}
        for number, words in NUMBERS.items():
            change = paired[f"{number} bfloat16"] - paired[f"{number} float32"]
            changes[words] = str(stats.mean(change))
            print(f"{words}, bfloat16 less float32, points: {changes[words]}")
        rows, differences = paired.to_dict("records"), conclusions(paired)
        print(training.table(rows))
        if differences:
            print(f"\ndifferences in best test accuracy, points\n{training.table(differences)}")
        results[name] = {"pairs": rows, "changes": changes, "conclusions": differences}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
