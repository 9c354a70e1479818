"""Every benchmark, as one table and as JSON with the machine: `make bench`."""

import argparse
import json
from pathlib import Path

import pandas as pd
import torch

from benchmarks import training
from paperlib import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    options = parser.parse_args()
    rows = list(training.compare(device=options.device))
    print(pd.DataFrame(rows).round(2).to_string(index=False))
    machine = provenance.describe(options.device, "", torch.get_num_threads())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
