"""Pilot runs show, before any run of the seeds that count, if a scale can test the claims.

    python -m benchmarks.pilots --profile small --only VGG11 conv4
    python -m benchmarks.pilots --profile small --show

Pilots use seeds 100 to 102 and are never evidence (docs/evidence.md). Runs that the store lacks are
trained first, unless `--show` is given. The output has the gates of each network and the minutes
that a run took. It compares no accuracies between settings.
"""

import argparse
from dataclasses import replace

import pandas as pd

from paperlib import experiments, plans, sweep
from paperlib.claims import gates
from paperlib.papers.settings import Setting
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
NETWORKS = [network for _, network, *_ in PILOTS]


def plan(profile: str, only: list[str] = NETWORKS, data: str | None = None) -> pd.DataFrame:
    """Return the pilot runs of a profile, seed by seed, as `gates.evaluate` takes them.

    Columns figure, network, setting, label, seed, choosing (False), run and config.
    """
    scale, rows = experiments.PROFILES[profile], []
    for figure, network, names, seeds in PILOTS:
        for setting in _settings(figure, network, names) if network in only else ():
            for seed in seeds:
                config = scale.scale(setting, data).with_(seed=seed)
                label = plans.label(setting.method, config)
                row = {"figure": figure, "network": network, "setting": setting.name}
                row |= {"label": label, "seed": seed, "choosing": False}
                rows.append(row | {"run": config.identity, "config": config})
    return pd.DataFrame(rows).sort_values("seed", kind="stable", ignore_index=True)


def _settings(figure: str, network: str, names: tuple[str, ...]) -> list[Setting]:
    """Return a figure's settings by name; an unpruned one that it lacks is made from the last."""
    known = {s.name: s for s in experiments.figure(figure).settings if s.network == network}
    whole = replace(known[names[-1]], name="none", method="No Pruning", schedule=None)
    known.setdefault("none", replace(whole, config=whole.config.with_(pruning=None)))
    return [known[name] for name in names]


def report(runs: pd.DataFrame, store: Store) -> str:
    """Return the gates by network and the minutes of a run, from the records that are there."""
    there = store.whole(runs.run)
    parts = [f"{len(there)} of {runs.run.nunique()} pilot runs are in {store.path}"]
    if not there:
        return parts[0]
    epochs, frame = store.frames(there)
    results = gates.table(gates.evaluate(runs[runs.run.isin(there)], epochs))
    for network, rows in results.groupby("network", sort=False):
        shown = rows[["gate", "setting", "passed", "text"]].to_string(index=False)
        parts.append(f"{network}\n{shown}")
    took = runs.merge(frame[["run", "device", "seconds"]], on="run")
    took = took.groupby(["network", "setting", "device"], sort=False).seconds.agg(["size", "mean"])
    took = took.assign(mean=took["mean"] / 60).set_axis(["runs", "minutes of one"], axis=1)
    return "\n\n".join([*parts, took.round(2).to_string()])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default="small", choices=list(experiments.PROFILES))
    parser.add_argument("--data", help="in place of the profile's data set")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=NETWORKS, help="networks")
    parser.add_argument("--runs", default="local/pilots", help="the run store  [%(default)s]")
    parser.add_argument("--show", action="store_true", help="train nothing, read what is there")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--jobs", type=int, help="processes  [one a core, or one a GPU]")
    options = parser.parse_args(argv)
    store, runs = Store(options.runs), plan(options.profile, options.only, options.data)
    try:
        if not options.show:
            sweep.execute(runs.config, store, device=options.device, jobs=options.jobs)
    finally:
        print(report(runs, store))


if __name__ == "__main__":
    main()
