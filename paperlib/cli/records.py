"""`paperlib runs`: the records of runs."""

import json
from pathlib import Path

import click
import pandas as pd

from paperlib import experiments, runs
from paperlib.cli.options import FAILED, JSON, STORE, VERBOSE, Asked, Names, of_figures
from paperlib.experiments import Scale
from paperlib.plans import is_setting
from paperlib.store import archive
from paperlib.sweep import costs


@click.group("runs")
def runs_group() -> None:
    """List, show, export, import and clear up the records of runs."""


@runs_group.command("list")
@of_figures(None)
@JSON
def list_command(names: Names, asked: Asked, store: runs.Store, as_json: bool) -> None:
    """List the runs that are there: all, or those of figures (NAME ...) or a profile."""
    frame = archive.table(store, _chosen(store, names, asked))
    if as_json:
        click.echo(frame.to_json(orient="records", indent=1))
        return
    columns = ["run", "title", "data", "epochs", "best_accuracy", "mean_stability", "seconds"]
    shown = [name for name in (*columns, "damaged") if name in frame]
    click.echo(frame[shown].to_string(index=False, float_format="{:.2f}".format, na_rep=""))


@runs_group.command("show")
@click.argument("run")
@JSON
@STORE
@VERBOSE
def show_command(run: str, as_json: bool, store: str | None) -> None:
    """Show one run, which the start of its identity names: configuration, origin, epochs."""
    where = runs.Store(store)
    content = archive.describe(where, archive.resolve(where, run))
    if as_json:
        click.echo(json.dumps(content, indent=1))
        return
    epochs = content.pop("rows", None)
    for name, value in content.items():
        click.echo(f"{name}: {json.dumps(value)}")
    if epochs:
        click.echo(pd.DataFrame(epochs).to_string(index=False, float_format="{:.4g}".format))


@runs_group.command("export")
@click.argument("file", type=click.Path(dir_okay=False))
@of_figures(None)
@click.option(
    "--arrays/--no-arrays", default=True, help="what was measured in runs  [default: yes]"
)
def export_command(
    file: str,
    names: Names,
    asked: Asked,
    store: runs.Store,
    arrays: bool,
) -> None:
    """Write runs, all or those of figures or a profile, to one Parquet FILE, as results/ holds."""
    count = archive.export(store, Path(file), _chosen(store, names, asked), arrays)
    click.echo(f"{count} runs in {file}, {costs.size(Path(file).stat().st_size)}")


@runs_group.command("import")
@click.argument("sources", nargs=-1, required=True, metavar="FILE|STORE...")
@STORE
@VERBOSE
def import_command(sources: tuple[str, ...], store: str | None) -> None:
    """Take over the runs of exported files or other stores; none in place of a better one."""
    where, problems = runs.Store(store), 0
    for source in sources:
        frame = archive.merge(where, Path(source))
        counts = frame.outcome.str.partition(":")[0].value_counts()
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        click.echo(f"{source}: {told}")
        refused = frame[~frame.outcome.isin(["new", "mended", "better", "same", "shorter"])]
        problems += len(refused)
        for row in refused.itertuples():
            what = "has other numbers than ours, which stay"
            click.echo(f"  {row.run} {what if row.outcome == 'different' else row.outcome}")
    if problems:
        raise SystemExit(FAILED)


@runs_group.command("clean")
@click.option("--yes", is_flag=True, help="do not ask")
@STORE
@VERBOSE
def clean_command(yes: bool, store: str | None) -> None:
    """Remove records of no present setting, and what unfinished or failed runs left."""
    where = runs.Store(store)
    unused = archive.leftovers(where, is_setting)
    if not unused:
        click.echo(f"nothing to remove in {where.path}")
        return
    for leftover in unused:
        click.echo(f"{leftover.run}: {leftover.why}, {costs.size(leftover.bytes)}")
    total = costs.size(sum(leftover.bytes for leftover in unused))
    if not yes:
        click.confirm(f"remove these {len(unused)}, {total}, from {where.path}?", abort=True)
    archive.remove(unused)
    click.echo(f"{len(unused)} removed, {total}")


def _chosen(store: runs.Store, names: Names, asked: Asked) -> list[str] | None:
    """Return the runs that are there of those asked for; None where all are."""
    if not (names or any(asked.values())):
        return None
    scale = Scale(**asked | {"profile": asked["profile"] or "small"})
    return list(store.find(config.identity for config in experiments.queue(scale, names)))
