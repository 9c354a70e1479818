"""`paperlib runs`: the records of runs."""

import json
from pathlib import Path

import click
import pandas as pd

from paperlib import experiments, runs
from paperlib.cli.options import FAILED, JSON, STORE, Asked, Names, of_figures
from paperlib.experiments import Scale
from paperlib.plans import is_setting
from paperlib.store import archive


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
def show_command(run: str, as_json: bool, store: str | None) -> None:
    """Show one run, which the start of its identity names: configuration, origin, epochs."""
    content = archive.describe(runs.Store(store), run)
    if as_json:
        click.echo(json.dumps(content, indent=1))
        return
    epochs = content.pop("rows", [])
    for name, value in content.items():
        click.echo(f"{name}: {json.dumps(value)}")
    if epochs:
        click.echo(pd.DataFrame(epochs).to_string(index=False, float_format="{:.4g}".format))


@runs_group.command("export")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@of_figures(None)
def export_command(file: Path, names: Names, asked: Asked, store: runs.Store) -> None:
    """Write runs, all or those of figures or a profile, to one Parquet FILE, as results/ holds."""
    count = archive.export(store, file, _chosen(store, names, asked))
    click.echo(f"{count} runs in {file}, {_megabytes([file])}")


@runs_group.command("import")
@click.argument("sources", nargs=-1, required=True, metavar="FILE|STORE...")
@STORE
def import_command(sources: tuple[str, ...], store: str | None) -> None:
    """Take over the runs of exported files or other stores; none in place of a better one."""
    where, problems = runs.Store(store), 0
    for source in sources:
        frame = archive.merge(where, Path(source))
        counts = frame.outcome.str.partition(":")[0].value_counts()
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        click.echo(f"{source}: {told}")
        refused = frame[frame.outcome.str.startswith(("damaged", "different"))]
        problems += len(refused)
        for row in refused.itertuples():
            click.echo(f"  {row.run} {row.outcome}")
    if problems:
        raise SystemExit(FAILED)


@runs_group.command("clean")
@click.option("--yes", is_flag=True, help="do not ask")
@STORE
def clean_command(yes: bool, store: str | None) -> None:
    """Remove records of no present setting, and what unfinished or failed runs left."""
    where = runs.Store(store)
    unused = archive.leftovers(where, is_setting)
    for path, why in unused.items():
        click.echo(f"{path.relative_to(where.path)}: {why}")
    told = f"{len(unused)} files, {_megabytes(unused)}, in {where.path}"
    if unused and not yes:
        click.confirm(f"remove {told}?", abort=True)
    for path in unused:
        path.unlink(missing_ok=True)
    click.echo(f"removed {told}")


def _megabytes(paths: "list[Path] | dict[Path, str]") -> str:
    return f"{sum(path.stat().st_size for path in paths) / 1e6:.2f} MB"


def _chosen(store: runs.Store, names: Names, asked: Asked) -> list[str] | None:
    """Return the runs that are there of those asked for; None where all are."""
    if not (names or any(asked.values())):
        return None
    scale = Scale(**asked | {"profile": asked["profile"] or "small"})
    return list(store.find(config.identity for config in experiments.queue(scale, names)))
