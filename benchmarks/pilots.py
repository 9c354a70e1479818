"""Pilot runs: whether a scale can test the claims, before any run of the seeds that count.

    python -m benchmarks.pilots --profile small --only VGG11,conv4
    python -m benchmarks.pilots --profile small --show

Pilots use seeds 100 to 102 and are never evidence (docs/evidence.md). Runs that the store lacks are
trained first, unless `--show` is given. The output has the gates of each network and the minutes
that a run took. It compares no accuracies between settings.
"""

import argparse
from dataclasses import replace

import pandas as pd

from paperlib import experiments, sweep
from paperlib.claims import gates
from paperlib.config import Config
from paperlib.papers.settings import NO_PRUNING, Setting
from paperlib.runs import Store

SEEDS = (100, 101, 102)
TRADEOFF = ("none", "smallest 4", "smallest 40", "largest 40")
# Figure, network, settings and seeds. Figure 4 has no unpruned setting: one is made from the other.
PILOTS = (
    ("figure-2", "VGG11", TRADEOFF, SEEDS),
    ("figure-2", "ResNet18", TRADEOFF, SEEDS),
    ("figure-R1", "conv4", ("none", "largest 0.9"), SEEDS[:1]),
    ("figure-4", "ResNet20", ("none", "smallest 60"), SEEDS[:1]),
    ("figure-4", "ResNet56", ("none", "smallest 60"), SEEDS[:1]),
)
NETWORKS = tuple(network for _, network, *_ in PILOTS)


def pilots(profile: str, only: tuple[str, ...] = NETWORKS, data: str | None = None) -> list[Config]:
    """Return the configurations of the pilot runs of a profile, seed by seed."""
    return list(plan(profile, only, data).config)


def plan(profile: str, only: tuple[str, ...] = NETWORKS, data: str | None = None) -> pd.DataFrame:
    """Return the pilot runs of a profile, one row each, as `gates.evaluate` takes them.

    Args:
        profile: Its name.
        only: The networks.
        data: Replaces the profile's data set.

    Returns:
        Columns figure, network, setting, seed, choosing (False), run and config, seed by seed.

    Raises:
        ValueError: A network or profile is unknown; the message names the valid ones.
    """
    if unknown := set(only) - set(NETWORKS):
        raise ValueError(f"unknown network {min(unknown)!r}: one of {', '.join(NETWORKS)}")
    scale, rows = experiments.PROFILES[profile], []
    for figure, network, names, seeds in PILOTS:
        if network not in only:
            continue
        for setting in _settings(figure, network, names):
            for seed in seeds:
                config = scale.scale(setting, data).with_(seed=seed)
                row = {"figure": figure, "network": network, "setting": setting.name, "seed": seed}
                rows.append(row | {"choosing": False, "run": config.identity, "config": config})
    return pd.DataFrame(rows).sort_values("seed", kind="stable", ignore_index=True)


def _settings(figure: str, network: str, names: tuple[str, ...]) -> list[Setting]:
    """Return a figure's settings by name; an unpruned one that it lacks is made from the last."""
    known = {s.name: s for s in experiments.figure(figure).settings if s.network == network}
    whole = known[names[-1]]
    whole = replace(whole, method=NO_PRUNING, name="none", schedule=None)
    known.setdefault("none", replace(whole, config=whole.config.with_(pruning=None)))
    return [known[name] for name in names]


def minutes(runs: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """Return how long runs took, one row a network and setting.

    Args:
        runs: a `plan`.
        frame: `Store.runs` of those that are there; its `seconds` are of a whole run.

    Returns:
        Columns network, setting, device, runs (done of all) and minutes (of one run, their mean).
    """
    keys = ["network", "setting"]
    planned = runs.groupby(keys, sort=False).size()
    rows = []
    for (*key, device), done in runs.merge(frame[["run", "device", "seconds"]], on="run").groupby(
        [*keys, "device"], sort=False
    ):
        count = f"{len(done)} of {planned[*key]}"
        rows.append([*key, device, count, round(done.seconds.mean() / 60, 2)])
    return pd.DataFrame(rows, columns=[*keys, "device", "runs", "minutes"])


def report(runs: pd.DataFrame, store: Store) -> str:
    """Return the gates by network and the minutes of a run, from the records that are there."""
    there = store.whole(runs.run)
    counted = f"{len(there)} of {runs.run.nunique()} pilot runs are in {store.path}"
    if not there:
        return counted
    epochs, frame = store.frames(there)
    results = gates.table(gates.evaluate(runs[runs.run.isin(there)], epochs))
    parts = [counted]
    for network, rows in results.groupby("network", sort=False):
        shown = rows[["gate", "setting", "passed", "text"]].to_string(index=False)
        parts.append(f"{network}\n{shown}")
    took = minutes(runs, frame).to_string(index=False)
    return "\n\n".join([*parts, f"minutes of a run (one core of a CPU, or a GPU's share)\n{took}"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default="small", choices=list(experiments.PROFILES))
    parser.add_argument("--data", help="in place of the profile's data set")
    parser.add_argument("--only", default=",".join(NETWORKS), help="networks  [%(default)s]")
    parser.add_argument("--runs", default="local/pilots", help="the run store  [%(default)s]")
    parser.add_argument("--show", action="store_true", help="train nothing, read what is there")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--jobs", type=int, help="processes  [one a core, or one a GPU]")
    parser.add_argument("--per-device", type=int, help="runs in parallel on a GPU  [1]")
    parser.add_argument("--minutes", type=float, help="stop after so many, with checkpoints")
    parser.add_argument("--fast", action="store_true", help="CUDA graphs on a GPU")
    options = parser.parse_args(argv)
    store = Store(options.runs)
    try:
        runs = plan(options.profile, tuple(options.only.split(",")), options.data)
    except ValueError as error:
        parser.error(str(error))
    failed = None
    if not options.show:
        how = {"device": options.device, "jobs": options.jobs, "per_device": options.per_device}
        how |= {"fast": options.fast, "minutes": options.minutes, "tell": print}
        try:
            sweep.execute(runs.config, store, **how)
        except sweep.SweepError as error:
            failed = str(error)
    print(report(runs, store))
    if failed:
        raise SystemExit(failed)


if __name__ == "__main__":
    main()
