"""Every benchmark, as tables and as JSON with the machine: `make bench`.

python -m benchmarks                   # all but the longest (the spectrum of the full VGG11)
python -m benchmarks --only training
"""

import argparse
import json
import warnings
from pathlib import Path

import pandas as pd

from benchmarks import flatness, training


def of_training(device: str) -> list[dict]:
    rows = list(training.compare(device=device))
    print(pd.DataFrame(rows).round(2).to_string(index=False))
    return rows


def of_flatness(device: str) -> dict:
    warnings.filterwarnings("ignore", message=".*create_graph=True.*")
    arguments = flatness.parser().parse_args(["--device", device])
    results = {}
    for part in ("compare", "trace", "cost"):
        results[part] = flatness.PARTS[part](arguments)
        print()
    return results


SECTIONS = {"training": of_training, "flatness": of_flatness}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    options = parser.parse_args()
    results = {"machine": flatness.machine(options.device)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        results[name] = SECTIONS[name](options.device)
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
