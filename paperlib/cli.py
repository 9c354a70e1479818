"""The command line: `paperlib`, or `python -m paperlib`. It only reads arguments and prints."""

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import pandas as pd

from paperlib import __version__, claims, experiments, overview, plans, runs, sweep
from paperlib.config import Config
from paperlib.experiments import Scale
from paperlib.store import archive
from paperlib.sweep.states import table

FAILED, WRONG = 1, 2  # exit codes: a run, notebook or record failed; the command is wrong
Asked = dict[str, Any]
Names = tuple[str, ...]


def _store(context: click.Context, option: click.Parameter, path: str | None) -> runs.Store:
    """Return the store at a path, or the default one; refuse what is there and no open folder."""
    store = runs.Store(path)
    readable = store.path.is_dir() and os.access(store.path, os.R_OK | os.X_OK)
    if store.path.exists() and not readable:
        raise runs.StoreError(f"the run store {store.path} is not a folder that can be read")
    return store


STORE = click.option(
    *("--runs", "store"),
    metavar="DIR",
    callback=_store,
    help="the run store  [default: runs]",
)
JSON = click.option("--json", "as_json", is_flag=True, help="as JSON")
COUNT, MINUTES = click.IntRange(1), click.FloatRange(0, min_open=True)
SCALE = {  # option -> its type and its help
    "data": (str, "a data set in place of the profile's, as for `paperlib data`"),
    "seeds": (int, "how many, in place of the profile's"),
    "precision": (str, "float32 or bfloat16, in place of the profile's"),
}
ASKED = ("profile", *SCALE)  # arguments of `Scale`
EXECUTION = {
    "jobs": (COUNT, "processes  [default: one a core, or one a GPU]"),
    "device": (str, "auto, cpu, cuda, mps  [default: auto]"),
    "per-device": (COUNT, "runs in parallel in a GPU's process  [default: 1]"),
    "fast": (bool, "on a GPU, train by CUDA graphs"),
    "minutes": (MINUTES, "stop after so long; the next call resumes"),
    "cluster": (str, "Dask: tcp://HOST:PORT or local:N"),
    "send-back": (bool, "a cluster's workers do not share this store"),
    "retry-failed": (bool, "runs that failed before, too"),
}


def options(table: dict[str, tuple[Any, str]]) -> Callable:
    """Decorate a command with the options of a table."""

    def decorate(command: Callable) -> Callable:
        for name, (kind, text) in reversed(table.items()):
            option = click.option(f"--{name}", type=kind, is_flag=kind is bool, help=text)
            command = option(command)
        return command

    return decorate


def of_figures(profile: str | None) -> Callable:
    """Decorate a command that is about runs of figures.

    The command takes names (of figures), asked (arguments of `Scale`; the profile may be None) and
    store.

    Args:
        profile: The default profile.
    """
    text = "smoke, demo, small, paper" + (f"  [default: {profile}]" if profile else "")
    names = click.argument("names", nargs=-1, metavar="[NAME]...")
    option = click.option("--profile", default=profile, help=text)

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def wrapped(**given: Any) -> None:
            asked = {name: given.pop(name) for name in ASKED}
            command(asked=asked, **given)

        return names(option(options(SCALE)(STORE(wrapped))))

    return decorate


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Two papers on neural-network pruning: their runs, their figures, their claims."""


@cli.command("figures")
@of_figures(None)
@options(EXECUTION)
@click.option("--fresh", is_flag=True, help="train all runs, without looking into results/")
def figures_command(names: Names, asked: Asked, store: runs.Store, fresh: bool, **how: Any) -> None:
    """Draw figures (all, or NAME ...) into figures/PROFILE: missing runs, then notebooks.

    Without --profile, a figure is drawn at profile small for the networks whose runs are all there
    (results/ counts), and else at demo, whose runs are in results/, too.
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
    failed = ""
    try:
        _execute(_queue(scales), store, **how)
    except sweep.SweepError as error:
        failed = f"paperlib: {error}"
    left = []
    if how["minutes"]:
        configs = {name: experiments.plan(name, scale).config for name, scale in scales.items()}
        left = [name for name, of_figure in configs.items() if sweep.missing(of_figure, store)]
    drawn = {name: scale for name, scale in scales.items() if name not in left}
    frame = notebooks.figures(drawn, store, overview_scale)
    _print(frame.fillna({"error": ""}), "{:.0f}")
    click.echo(f"figures are in {runs.figures_path()}")
    if left:
        click.echo(f"there was no time for: {', '.join(left)}")
    if failed or frame.error.notna().any():
        click.echo(failed, err=True)
        raise SystemExit(FAILED)


def _queue(scales: dict[str, Scale]) -> list[Config]:
    """Return the runs of figures, in the order of the evidence if these are all figures."""
    ordered: list[Config] = []
    for scale in dict.fromkeys(scales.values()):
        names = [name for name in scales if scales[name] == scale]
        ordered += experiments.queue(scale, () if len(names) == len(experiments.FIGURES) else names)
    return ordered


def _execute(
    configs: list[Config], store: runs.Store, cluster: str | None, send_back: bool, **how: Any
) -> int:
    """Do runs by the options of `EXECUTION`. Wrong options fail before any work."""
    if send_back and not cluster:
        raise click.UsageError("--send-back is for a --cluster")
    if cluster and (how["jobs"] or how["per_device"]):
        raise click.UsageError("a --cluster has as many runs in parallel as its workers' threads")
    how["device"] = how["device"] or "auto"
    where: Any = nullcontext()
    if cluster:
        from paperlib.sweep.cluster import connected

        where = connected(cluster, gpu=how["device"].startswith("cuda"))
    elif how["device"] not in ("auto", "cpu"):
        from paperlib.devices import choose_device

        choose_device(how["device"])
    with where as executor:
        return sweep.execute(configs, store, executor, send_back=send_back, **how)


@cli.command("sweep")
@of_figures("small")
@options(EXECUTION)
@click.option(
    "--retrain-changed", is_flag=True, help="also runs whose record was made from other images"
)
def sweep_command(names: Names, asked: Asked, store: runs.Store, **how: Any) -> None:
    """Train the missing runs of figures: NAME ... in that order, or all, the evidence first."""
    configs = experiments.queue(Scale(**asked), names)
    done = _execute(configs, store, **how)
    left = len(sweep.missing(configs, store)) if how["minutes"] else 0
    told = f", {left} left" if left else ""
    click.echo(f"{done} runs done, {len(configs) - left} in {store.path}{told}")


@cli.command("status")
@of_figures("small")
@JSON
@click.option("-v", "every", is_flag=True, help="why each run would or would not be run")
def status_command(
    names: Names, asked: Asked, store: runs.Store, as_json: bool, every: bool
) -> None:
    """Show which runs of which figure are there, and the hours that missing ones will take."""
    scale = Scale(**asked)
    wanted = {name: experiments.plan(name, scale).config for name in names or experiments.FIGURES}
    frame = table(wanted, store)
    if as_json:
        frame["states"] = [
            [{key: value for key, value in vars(state).items() if key != "config"} for state in row]
            for row in frame.states
        ]
        click.echo(frame.to_json(orient="records", indent=1))
        return
    _print(frame.drop(columns="states"), "{:.2f}")
    distinct = {state.run: state for row in frame.states for state in row}.values()
    done = sum(state.state == "done" for state in distinct)
    click.echo(f"{done} of {len(distinct)} runs are done; figures share runs")
    for state in distinct:
        if every or state.state not in ("done", "missing"):
            click.echo(f"{state.state}: {state.config.title}: {state.why}")


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
        for failure in claim.failures:
            click.echo(f"  {failure}")
    frame = claims.to_frame(judged).dropna(subset="contrast")
    if len(frame):
        shown = ["claim", "kind", "contrast", "outcome", "n", "estimate", "low", "high"]
        click.echo()
        _print(frame[[*shown, "p", "sign_flip", "holm", "power"]], "{:.3g}")


@cli.command("data")
@click.argument("spec")
@STORE
def data_command(spec: str, store: runs.Store) -> None:
    """Load a data set (cifar10-jpeg, digits, cifar10, cifar100, images:PATH); describe it."""
    from paperlib import data

    loaded = data.load(spec, store.path / "data")
    count, channels, height, width = loaded.train_images.shape
    click.echo(
        f"{loaded.name}: {count} training and {len(loaded.test_images)} test images, "
        f"{channels} x {height} x {width}, {len(loaded.classes)} classes: "
        + ", ".join(loaded.classes)
    )


@cli.group("runs")
def runs_group() -> None:
    """List, show, export, import and clear up the records of runs."""


@runs_group.command("list")
@of_figures(None)
def list_command(names: Names, asked: Asked, store: runs.Store) -> None:
    """List the runs that are there: all, or those of figures (NAME ...) or a profile."""
    frame = archive.table(store, _chosen(store, names, asked))
    columns = ["run", "title", "data", "epochs", "best_accuracy", "mean_stability", "seconds"]
    _print(frame[[name for name in (*columns, "damaged") if name in frame]], "{:.2f}")


@runs_group.command("show")
@click.argument("run")
@STORE
def show_command(run: str, store: runs.Store) -> None:
    """Show one run, named by the start of its identity: configuration, origin, epochs."""
    about, epochs = archive.describe(store, run)
    for name, value in about.items():
        click.echo(f"{name}: {json.dumps(value)}")
    _print(epochs, "{:.4g}")


@runs_group.command("export")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@of_figures(None)
def export_command(file: Path, names: Names, asked: Asked, store: runs.Store) -> None:
    """Write runs, all or those of figures or a profile, to one Parquet FILE, as results/ holds."""
    file = file.expanduser()
    count = archive.export(store, file, _chosen(store, names, asked))
    click.echo(f"{count} runs in {file}, {_megabytes([file])}")


@runs_group.command("import")
@click.argument("sources", nargs=-1, required=True, metavar="FILE|STORE...")
@STORE
def import_command(sources: tuple[str, ...], store: runs.Store) -> None:
    """Copy runs from exported files or other stores. A whole record here is never replaced."""
    problems = 0
    for source in sources:
        frame = archive.merge(store, Path(source))
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
def clean_command(yes: bool, store: runs.Store) -> None:
    """Remove records that no setting refers to, and leftovers of unfinished or failed runs."""
    if not store.path.is_dir():
        raise runs.StoreError(f"there is no run store {store.path}")
    unused = archive.leftovers(store, plans.is_setting)
    for path in unused:
        click.echo(path.relative_to(store.path))
    told = f"{len(unused)} files, {_megabytes(unused)}, in {store.path}"
    if unused and not yes:
        click.confirm(f"remove {told}?", abort=True)
    for path in unused:
        path.unlink(missing_ok=True)
    click.echo(f"removed {told}")


def _megabytes(paths: Iterable[Path]) -> str:
    return f"{sum(path.stat().st_size for path in paths) / 1e6:.2f} MB"


def _chosen(store: runs.Store, names: Names, asked: Asked) -> list[str] | None:
    """Return the runs asked for that are in the store; None if all are asked for."""
    if not (names or any(asked.values())):
        return None
    scale = Scale(**asked | {"profile": asked["profile"] or "small"})
    return list(store.find(config.identity for config in experiments.queue(scale, names)))


def _print(frame: pd.DataFrame, number: str) -> None:
    text = frame.to_string(index=False, float_format=number.format, na_rep="")
    click.echo(text if len(frame) else "none")


def main() -> None:
    """Run the command line. An error is one line and exit code 2, or 1 if a run failed."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("paperlib: stopped; what is done is kept", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(WRONG)
    except (ValueError, RuntimeError, OSError) as error:
        click.echo(f"paperlib: {error}", err=True)
        sys.exit(FAILED if isinstance(error, sweep.SweepError) else WRONG)
