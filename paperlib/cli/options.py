"""Options that commands share."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from paperlib import runs
from paperlib.experiments import Scale

Asked = dict[str, Any]
Names = tuple[str, ...]
POSITIVE = click.IntRange(1)
FAILED = 1  # the exit code where a run, a notebook or a record is wrong

NAMES = click.argument("names", nargs=-1, metavar="[NAME]...")
STORE = click.option("--runs", "store", metavar="DIR", help="the run store  [default: runs]")
JSON = click.option("--json", "as_json", is_flag=True, help="as JSON")
VERBOSE = click.option(
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
REPLACED = (
    click.option("--data", help="a data set in place of the profile's, as for `paperlib data`"),
    click.option("--seeds", type=int, help="how many, in place of the profile's"),
    click.option("--precision", help="float32 or bfloat16, in place of the profile's"),
    STORE,
    VERBOSE,
)
EXECUTION = (
    click.option("--jobs", type=POSITIVE, help="processes  [default: one a core, or one a GPU]"),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, mps"),
    click.option("--per-device", type=POSITIVE, help="runs in parallel in a GPU's process  [1]"),
    click.option("--fast", is_flag=True, help="on a GPU, train by CUDA graphs"),
    click.option(
        "--minutes",
        type=click.FloatRange(0, min_open=True),
        help="stop after so long; the next call resumes what is not done",
    ),
    click.option("--cluster", metavar="ADDRESS", help="Dask: tcp://HOST:PORT or local:N"),
    click.option("--send-back", is_flag=True, help="a cluster's workers do not share this store"),
    click.option("--retry-failed", is_flag=True, help="runs that failed before, too"),
)


def options(*options: Callable) -> Callable:
    """Decorate a command with options, in this order."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def of_figures(profile: str | None, shown: bool | str = True) -> Callable:
    """Decorate a command that is about runs of figures.

    It is given names (of figures), asked (what `Scale` takes; the profile may be None) and store.

    Args:
        profile: the default.
        shown: whether help shows it, or what it shows instead.
    """

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def wrapped(*args: Any, store: str | None, **rest: Any) -> None:
            asked = {name: rest.pop(name) for name in Scale.__dataclass_fields__}
            command(*args, asked=asked, store=runs.Store(store), **rest)

        text = "smoke, demo, small, paper"
        option = click.option("--profile", default=profile, show_default=shown, help=text)
        return options(NAMES, option, *REPLACED)(wrapped)

    return decorate


@contextmanager
def execution(
    device: str,
    jobs: int | None,
    per_device: int | None,
    cluster: str | None,
    send_back: bool,
    retry_failed: bool,
    fast: bool,
    minutes: float | None,
) -> Iterator[dict[str, Any]]:
    """Give what `sweep.execute` takes, from the options."""
    options = {"device": device, "retry_failed": retry_failed, "tell": _tell}
    options |= {"fast": fast, "minutes": minutes}
    if cluster is None:
        if send_back:
            raise click.UsageError("--send-back is for a --cluster")
        _check(device)
        yield options | {"jobs": jobs, "per_device": per_device}
        return
    if jobs or per_device:
        raise click.UsageError(
            "a --cluster has as many runs in parallel as its workers have threads"
        )
    from paperlib.sweep.cluster import connected

    with connected(cluster, gpu=device.startswith("cuda")) as executor:
        yield options | {"executor": executor, "send_back": send_back}


def _tell(text: str) -> None:
    click.echo(text, err=True)


def _check(device: str) -> None:
    """Fail on an unknown device before anything is run."""
    if device in ("auto", "cpu"):
        return
    from paperlib import training

    training.choose_device(device)
