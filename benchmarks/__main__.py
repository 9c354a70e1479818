"""Every benchmark, as tables and as JSON with the machine: `make bench`.

    python -m benchmarks                   # all but the longest (the spectrum of the full VGG11)
    python -m benchmarks --only training

Training is measured on the CPU and, where there is a GPU, there too, in ten minutes more. What else
can be set: `python -m benchmarks.training --help`, and the same of flatness, gpu, sweep and faults.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks import flatness, gpu, machine, training


def of_training(options: argparse.Namespace) -> dict:
    return training.main([])


def of_gpu(options: argparse.Namespace) -> dict:
    out = options.out.with_name(f"{options.out.stem}-gpu.json")
    return gpu.main(["--device", "cuda", "--out", str(out)])


def of_flatness(options: argparse.Namespace) -> dict:
    results = {}
    for part, images in FLATNESS.items():
        arguments = ["--only", part, "--device", options.device, "--images", str(images)]
        results[part] = flatness.main(arguments)[part]
    return results


# Parts and their images. `benchmarks.flatness` by itself compares spectra on 256, for which
# PyHessian alone may take half an hour.
FLATNESS = {"compare": 64, "trace": 256}
SECTIONS = {"training": of_training, "gpu": of_gpu, "flatness": of_flatness}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    there = [name for name in SECTIONS if name != "gpu" or torch.cuda.is_available()]
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=there)
    parser.add_argument("--device", default="cpu", help="of flatness")
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    options = parser.parse_args(argv)
    results = {"machine": machine.machine(options.device)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        results[name] = SECTIONS[name](options)
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
