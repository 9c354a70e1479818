"""The command line: `paperlib`, or `python -m paperlib`. Nothing but arguments."""

import json
import sys
import traceback
from typing import Any

import click
import pandas as pd

from paperlib import __version__, claims, experiments, overview, runs, sweep
from paperlib.cli import options
from paperlib.cli.options import EXECUTION, FAILED, JSON, STORE, Asked, Names, of_figures
from paperlib.cli.records import runs_group
from paperlib.config import Config
from paperlib.experiments import Scale
from paperlib.sweep import costs
from paperlib.sweep.states import by_figure

WRONG = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="show the trace of an error")
@click.pass_obj
def cli(settings: dict[str, bool], verbose: bool) -> None:
    """Two papers on neural-network pruning: their runs, their figures, their claims."""
    settings["verbose"] = verbose


@cli.command("figures")
@of_figures(None, "small where all runs are there, else demo")
@options.given(*EXECUTION)
@click.option("--fresh", is_flag=True, help="train all runs, without looking into results/")
def figures_command(names: Names, asked: Asked, store: runs.Store, fresh: bool, **how: Any) -> None:
    """Draw figures (all, or NAME ...) into figures/PROFILE: missing runs, then notebooks.

    Without --profile, a figure is drawn at profile small if all of its runs are there (results/
    counts), and else at demo, which trains for minutes.
    """
    from paperlib.sweep import notebooks

    if fresh:
        store.results = store.path / "no results"
        asked["profile"] = asked["profile"] or "demo"
    overview_scale = None if names else Scale(**asked | {"profile": asked["profile"] or "small"})
    asked["profile"] = asked["profile"] or "auto"
    scales = {
        name: experiments.resolve(name, **asked, store=store)
        for name in names or experiments.FIGURES
    }
    failed, left = "", []
    with options.execution(**how) as given:
        try:
            sweep.execute(_queue(scales), store, **given)
        except sweep.SweepError as error:
            failed = str(error)
    if how["minutes"]:
        plans = {name: experiments.plan(name, scale) for name, scale in scales.items()}
        left = [name for name, plan in plans.items() if sweep.missing(plan.config, store)]
    drawn = {name: scale for name, scale in scales.items() if name not in left}
    frame = notebooks.figures(drawn, store, overview_scale)
    click.echo(frame.fillna({"error": ""}).to_string(index=False, float_format="{:.0f}".format))
    click.echo(f"figures are in {runs.figures_path()}")
    if left:
        click.echo(f"there was no time for: {', '.join(left)}")
    if failed:
        click.echo(f"paperlib: {failed}", err=True)
    if failed or frame.error.notna().any():
        raise SystemExit(FAILED)


def _queue(scales: dict[str, Scale]) -> list[Config]:
    """Return the runs of figures; in the order of worth if they are all figures."""
    ordered: list[Config] = []
    for scale in dict.fromkeys(scales.values()):
        names = [name for name in scales if scales[name] == scale]
        ordered += experiments.queue(scale, () if len(names) == len(experiments.FIGURES) else names)
    return ordered


@cli.command("sweep")
@of_figures("small")
@options.given(*EXECUTION)
def sweep_command(names: Names, asked: Asked, store: runs.Store, **how: Any) -> None:
    """Do the runs of figures (NAME ... in that order, or all by worth), without the notebooks."""
    configs = experiments.queue(Scale(**asked), names)
    with options.execution(**how) as given:
        done = sweep.execute(configs, store, **given)
    left = len(sweep.missing(configs, store)) if how["minutes"] else 0
    told = f", {left} left" if left else ""
    click.echo(f"{done} runs done, {len(sweep.unique(configs)) - left} in {store.path}{told}")


@cli.command("status")
@of_figures("small")
@JSON
@click.option("-v", "every", is_flag=True, help="why each run would or would not be run")
def status_command(
    names: Names, asked: Asked, store: runs.Store, as_json: bool, every: bool
) -> None:
    """Show which runs of which figure are there, and the hours that missing ones will take."""
    scale = Scale(**asked)
    plans = {name: experiments.plan(name, scale) for name in names or experiments.FIGURES}
    found = by_figure(plans, store)
    frame = costs.table(found, costs.speeds(store))
    if as_json:
        rows = json.loads(frame.to_json(orient="records"))
        for row in rows:
            row["states"] = [
                {name: getattr(state, name) for name in ("run", "state", "epochs", "why", "error")}
                for state in found[row["figure"]]
            ]
        click.echo(json.dumps(rows, indent=1))
        return
    click.echo(frame.to_string(index=False, float_format="{:.2f}".format, na_rep="?"))
    for state in {state.run: state for mine in found.values() for state in mine}.values():
        if every or state.state not in ("done", "missing"):
            why = f"{state.why}: {state.error}" if state.error else state.why
            click.echo(f"{state.state}: {state.config.title}: {why}")


@cli.command("claims")
@of_figures("small")
@JSON
@click.option("--write", is_flag=True, help="also into the tables of README.md and docs/")
def claims_command(
    names: Names, asked: Asked, store: runs.Store, as_json: bool, write: bool
) -> None:
    """Judge the claims of both papers (all, or NAME ..., such as T1) by the runs that are there."""
    if write and names:
        raise click.UsageError("--write is for all claims")
    if asked["seeds"] is not None:
        raise click.UsageError("claims are judged by the registered seeds, without --seeds")
    judged = claims.judge(Scale(**asked), store, names or None)
    if write:
        overview.write(Scale(**asked), judged)
    if as_json:
        click.echo(json.dumps([claims.to_dict(claim) for claim in judged], indent=1))
        return
    for claim in judged:
        power = "" if pd.isna(claim.power) else f", power {claim.power:.2f} for {claim.effect}"
        click.echo(f"{claim.name}: {claim.verdict} ({claim.n} runs{power}). {claim.statement}")
        for gate in claim.gates:
            if gate.passed is False:
                where = f"{gate.figure} {gate.network} {gate.setting}".strip()
                click.echo(f"  {gate.gate} fails: {where}: {gate.text}")
    frame = claims.to_frame(judged).dropna(subset="contrast")
    if len(frame):
        shown = ["claim", "kind", "contrast", "outcome", "n", "estimate", "low", "high"]
        shown += ["p", "sign_flip", "holm", "power"]
        click.echo()
        click.echo(frame[shown].to_string(index=False, float_format="{:.3g}".format, na_rep=""))


@cli.command("data")
@click.argument("spec")
@STORE
def data_command(spec: str, store: str | None) -> None:
    """Load a data set (digits, cifar10, cifar100, images:PATH) and say what is in it."""
    from paperlib import data

    loaded = data.load(spec, runs.Store(store).path / "data")
    count, channels, height, width = loaded.train_images.shape
    click.echo(
        f"{loaded.name}: {count} training and {len(loaded.test_images)} test images, "
        f"{channels} x {height} x {width}, {len(loaded.classes)} classes: "
        + ", ".join(loaded.classes)
    )


cli.add_command(runs_group)


def main() -> None:
    """Run the command line; an error is one line and exit code 2, with its trace at -v."""
    settings: dict[str, bool] = {}
    try:
        cli(obj=settings, standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("paperlib: stopped; what is done is kept", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(WRONG)
    except (ValueError, RuntimeError, OSError) as error:
        if settings.get("verbose"):
            traceback.print_exc()
        click.echo(f"paperlib: {error}", err=True)
        sys.exit(FAILED if isinstance(error, sweep.SweepError) else WRONG)


if __name__ == "__main__":
    main()
