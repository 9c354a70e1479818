"""The command line: `paperlib`, or `python -m paperlib`. Nothing but arguments."""

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pandas as pd

from paperlib import __version__, archive, batch, costs, executors, runs, sweep

FAILED, WRONG = 1, 2


def _options(*, execution: bool, profile: str | None = "demo") -> Callable:
    """The options the commands share; those that only make sense where runs are executed."""
    shared = [
        click.argument("names", nargs=-1, metavar="[NAME]..."),
        click.option(
            "--profile", default=profile, show_default=True, help="smoke, demo, small, paper"
        ),
        click.option("--data", help="a data set in place of the profile's, as for `paperlib data`"),
        click.option("--seeds", type=int, help="how many, in place of the profile's"),
        click.option("--precision", help="float32 or bfloat16, in place of the profile's"),
        click.option("--runs", "store", metavar="DIR", help="the run store  [default: runs]"),
        _verbose,
    ]
    if execution:
        shared += [
            click.option(
                "--jobs",
                type=click.IntRange(1),
                help="processes  [default: one a core, or one a GPU]",
            ),
            click.option(
                "--device", default="auto", show_default=True, help="auto, cpu, cuda, mps"
            ),
            click.option(
                "--per-device",
                type=click.IntRange(1),
                help="runs at once in each process on a GPU  [default: 1]",
            ),
            click.option("--fast", is_flag=True, help="on a GPU, train by CUDA graphs"),
            click.option(
                "--minutes",
                type=click.FloatRange(0, min_open=True),
                help="stop after so long; what is not done goes on the next time",
            ),
            click.option("--cluster", metavar="ADDRESS", help="Dask: tcp://HOST:PORT or local:N"),
            click.option(
                "--send-back", is_flag=True, help="a cluster's workers do not share this run store"
            ),
            click.option("--retry-failed", is_flag=True, help="runs that failed before, too"),
        ]

    def decorate(command: Callable) -> Callable:
        for option in reversed(shared):
            command = option(command)
        return command

    return decorate


_verbose = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=lambda context, _, value: (
        context.find_root()
        .ensure_object(dict)
        .update(verbose=value or context.find_root().obj.get("verbose", False))
    ),
    help="show the trace of an error",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.pass_context
@_verbose
def cli(context: click.Context) -> None:
    """Two papers on neural-network pruning: their runs, their figures, their claims."""


@cli.command("figures")
@_options(execution=True)
def figures_command(names, profile, data, seeds, precision, store, **how) -> None:
    """Regenerate figures (all, or NAME ...): the runs they need, then their notebooks."""
    where = runs.Store(store)
    with _execution(**how) as options:
        frame = batch.figures(names, profile, where, data, seeds, precision=precision, **options)
    click.echo(frame.fillna({"error": ""}).to_string(index=False, float_format="{:.0f}".format))
    click.echo(f"figures are in {runs.figures_path() / profile}")
    if frame.attrs["left"]:
        click.echo(f"there was no time for: {', '.join(frame.attrs['left'])}")
    if frame.attrs["failed_runs"]:
        click.echo(f"paperlib: {frame.attrs['failed_runs']}", err=True)
    if frame.error.notna().any() or frame.attrs["failed_runs"]:
        raise SystemExit(FAILED)


@cli.command("sweep")
@_options(execution=True)
def sweep_command(names, profile, data, seeds, precision, store, **how) -> None:
    """Do the runs of figures, without the notebooks.

    By NAME in that order, or all, those first that most depends on.
    """
    configs = sweep.unique(batch.queue(names, profile, data, seeds, precision))
    where = runs.Store(store)
    with _execution(**how) as options:
        done = sweep.execute(configs, where, **options)
    left = len(sweep.missing(configs.values(), where)) if how["minutes"] else 0
    told = f", {left} left" if left else ""
    click.echo(f"{done} runs done, {len(configs) - left} in {where.path}{told}")


@cli.command("status")
@_options(execution=False)
@click.option("--json", "as_json", is_flag=True, help="as JSON, with every run")
@click.pass_context
def status_command(context, names, profile, data, seeds, precision, store, as_json) -> None:
    """Show which runs of which figure are there; with -v, why each would or would not be run."""
    frame = batch.status(names, profile, runs.Store(store), data, seeds, precision)
    states = frame.attrs["states"]
    if as_json:
        rows = json.loads(frame.to_json(orient="records"))
        for row in rows:
            row["states"] = [
                {name: getattr(state, name) for name in ("run", "state", "epochs", "why", "error")}
                for state in states[row["figure"]]
            ]
        click.echo(json.dumps(rows, indent=1))
        return
    click.echo(frame.to_string(index=False, float_format="{:.2f}".format, na_rep="?"))
    every = context.find_root().obj.get("verbose")
    shown = {
        state.run: state
        for mine in states.values()
        for state in mine
        if every or state.state in ("partial", "failed", "damaged")
    }
    for state in shown.values():
        why = f"{state.why}: {state.error}" if state.error else state.why
        click.echo(f"{state.state}: {state.config.title}: {why}")


@cli.group("runs")
def runs_group() -> None:
    """List, show, export, import and clear up the records of runs."""


_store = click.option("--runs", "store", metavar="DIR", help="the run store  [default: runs]")


@runs_group.command("list")
@_options(execution=False, profile=None)
@click.option("--json", "as_json", is_flag=True, help="as JSON")
def list_command(names, profile, data, seeds, precision, store, as_json) -> None:
    """List the runs that are there: all, or those of figures (NAME ...) or a profile."""
    where = runs.Store(store)
    frame = archive.table(where, _chosen(where, names, profile, data, seeds, precision))
    if as_json:
        click.echo(frame.to_json(orient="records", indent=1))
        return
    columns = ["run", "title", "data", "epochs", "best_accuracy", "mean_stability", "seconds"]
    shown = [name for name in (*columns, "damaged") if name in frame]
    click.echo(frame[shown].to_string(index=False, float_format="{:.2f}".format, na_rep=""))


@runs_group.command("show")
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="as JSON")
@_store
@_verbose
def show_command(run, as_json, store) -> None:
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
@_options(execution=False, profile=None)
@click.option(
    "--arrays/--no-arrays", default=True, help="what was measured in runs  [default: yes]"
)
def export_command(file, names, profile, data, seeds, precision, store, arrays) -> None:
    """Write runs, all or those of figures or a profile, to one Parquet FILE, as results/ holds."""
    where = runs.Store(store)
    chosen = _chosen(where, names, profile, data, seeds, precision)
    count = archive.export(where, Path(file), chosen, arrays)
    click.echo(f"{count} runs in {file}, {costs.size(Path(file).stat().st_size)}")


@runs_group.command("import")
@click.argument("sources", nargs=-1, required=True, metavar="FILE|STORE...")
@_store
@_verbose
def import_command(sources, store) -> None:
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


@runs_group.command("prune")
@click.option("--yes", is_flag=True, help="do not ask")
@_store
@_verbose
def prune_command(yes, store) -> None:
    """Remove what no current setting refers to, and what unfinished or failed runs left."""
    where = runs.Store(store)
    unused = archive.leftovers(where)
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


def _chosen(store, names, profile, data, seeds, precision) -> list[str] | None:
    """The runs that are there of those asked for; None where all are."""
    if not (names or profile or data or seeds or precision):
        return None
    plans = batch.needed(names, profile or "demo", data, seeds, precision)
    wanted = dict.fromkeys(run for plan in plans.values() for run in plan.run)
    return list(store.find(wanted))


@contextmanager
def _execution(
    device, jobs, per_device, cluster, send_back, retry_failed, fast, minutes
) -> Iterator[dict]:
    """What `sweep.execute` takes, from the options."""
    options = {"device": device, "retry_failed": retry_failed, "tell": _tell}
    options |= {"fast": fast, "minutes": minutes}
    if cluster is None:
        if send_back:
            raise click.UsageError("--send-back is for a --cluster")
        _check(device)
        yield options | {"jobs": jobs, "per_device": per_device}
        return
    if jobs or per_device:
        raise click.UsageError("a --cluster has as many runs at once as its workers have threads")
    with executors.cluster(cluster, gpu=device.startswith("cuda")) as executor:
        yield options | {"executor": executor, "send_back": send_back}


def _tell(text: str) -> None:
    click.echo(text, err=True)


@cli.command("data")
@click.argument("spec")
@click.option("--runs", "store", metavar="DIR", help="the run store  [default: runs]")
@_verbose
def data_command(spec, store) -> None:
    """Load a data set (digits, cifar10, cifar100, images:PATH) and say what is in it."""
    from paperlib import data

    loaded = data.load(spec, runs.Store(store).path / "data")
    count, channels, height, width = loaded.train_images.shape
    click.echo(
        f"{loaded.name}: {count} training and {len(loaded.test_images)} test images, "
        f"{channels} x {height} x {width}, {len(loaded.classes)} classes: "
        + ", ".join(loaded.classes)
    )


def _check(device: str) -> None:
    """Fail on an unknown device before anything is run."""
    if device in ("auto", "cpu"):
        return
    from paperlib import training

    training.choose_device(device)


def main() -> None:
    """Run the command line; an error is one line and exit code 2, with its trace at -v."""
    context: dict[str, bool] = {}
    try:
        cli(obj=context, standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("paperlib: stopped; what is done is kept", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(WRONG)
    except (ValueError, RuntimeError, OSError) as error:
        if context.get("verbose"):
            traceback.print_exc()
        click.echo(f"paperlib: {error}", err=True)
        sys.exit(FAILED if isinstance(error, sweep.SweepError) else WRONG)


if __name__ == "__main__":
    main()
