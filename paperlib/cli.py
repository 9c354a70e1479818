"""The command line: `paperlib`, or `python -m paperlib`. Nothing but arguments."""

import sys
import traceback
from collections.abc import Callable

import click

from paperlib import __version__, batch, runs, sweep

FAILED, WRONG = 1, 2


def _options(*, execution: bool) -> Callable:
    """The options the commands share; those that only make sense where runs are executed."""
    shared = [
        click.argument("names", nargs=-1, metavar="[NAME]..."),
        click.option(
            "--profile", default="demo", show_default=True, help="smoke, demo, small, paper"
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
                "--jobs", type=click.IntRange(1), help="runs at once  [default: a core each]"
            ),
            click.option(
                "--device", default="auto", show_default=True, help="auto, cpu, cuda, mps"
            ),
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
def figures_command(names, profile, data, seeds, precision, store, jobs, device) -> None:
    """Regenerate figures (all, or NAME ...): the runs they need, then their notebooks."""
    _check(device)
    where = runs.Store(store)
    frame = batch.figures(names, profile, where, data, seeds, jobs, device, precision=precision)
    click.echo(frame.fillna({"error": ""}).to_string(index=False, float_format="{:.0f}".format))
    click.echo(f"figures are in {runs.figures_path() / profile}")
    if frame.attrs["failed_runs"]:
        click.echo(f"paperlib: {frame.attrs['failed_runs']}", err=True)
    if frame.error.notna().any() or frame.attrs["failed_runs"]:
        raise SystemExit(FAILED)


@cli.command("sweep")
@_options(execution=True)
def sweep_command(names, profile, data, seeds, precision, store, jobs, device) -> None:
    """Do the runs of figures (all, or NAME ...), without the notebooks."""
    _check(device)
    plans = batch.needed(names, profile, data, seeds, precision)
    configs = [config for plan in plans.values() for config in plan.config]
    where = runs.Store(store)
    done = sweep.execute(configs, where, device=device, jobs=jobs)
    click.echo(f"{done} runs done, {len(sweep.unique(configs))} in {where.path}")


@cli.command("status")
@_options(execution=False)
@click.option("--json", "as_json", is_flag=True, help="as JSON")
def status_command(names, profile, data, seeds, precision, store, as_json) -> None:
    """Show which runs of which figure are there, failed, damaged or missing."""
    frame = batch.status(names, profile, runs.Store(store), data, seeds, precision)
    if as_json:
        click.echo(frame.to_json(orient="records", indent=1))
    else:
        click.echo(frame.to_string(index=False, float_format="{:.2f}".format, na_rep="?"))


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
