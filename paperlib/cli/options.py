"""Options that commands share."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from paperlib import runs

Asked = dict[str, Any]
Names = tuple[str, ...]
ASKED = ("profile", "data", "seeds", "precision")  # of `Scale`
POSITIVE = click.IntRange(1)
MINUTES = click.FloatRange(0, min_open=True)
FAILED = 1  # the exit code where a run, a notebook or a record is wrong

STORE = click.option("--runs", "store", metavar="DIR", help="the run store  [default: runs]")
JSON = click.option("--json", "as_json", is_flag=True, help="as JSON")
EXECUTION = (
    click.option("--jobs", type=POSITIVE, help="processes  [default: one a core, or one a GPU]"),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, mps"),
    click.option("--per-device", type=POSITIVE, help="runs in parallel in a GPU's process  [1]"),
    click.option("--fast", is_flag=True, help="on a GPU, train by CUDA graphs"),
    click.option("--minutes", type=MINUTES, help="stop after so long; the next call resumes"),
    click.option("--cluster", metavar="ADDRESS", help="Dask: tcp://HOST:PORT or local:N"),
    click.option("--send-back", is_flag=True, help="a cluster's workers do not share this store"),
    click.option("--retry-failed", is_flag=True, help="runs that failed before, too"),
)


def given(*options: Callable) -> Callable:
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
    text = "smoke, demo, small, paper"
    decorators = (
        click.argument("names", nargs=-1, metavar="[NAME]..."),
        click.option("--profile", default=profile, show_default=shown, help=text),
        click.option("--data", help="a data set in place of the profile's, as for `paperlib data`"),
        click.option("--seeds", type=int, help="how many, in place of the profile's"),
        click.option("--precision", help="float32 or bfloat16, in place of the profile's"),
        STORE,
    )

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def wrapped(store: str | None, **rest: Any) -> None:
            asked = {name: rest.pop(name) for name in ASKED}
            command(asked=asked, store=runs.Store(store), **rest)

        return given(*decorators)(wrapped)

    return decorate


@contextmanager
def execution(cluster: str | None, send_back: bool, **how: Any) -> Iterator[dict[str, Any]]:
    """Give what `sweep.execute` takes, from the options. Fail on wrong ones before any work."""
    how["tell"] = functools.partial(click.echo, err=True)
    if cluster is None:
        if send_back:
            raise click.UsageError("--send-back is for a --cluster")
        if how["device"] not in ("auto", "cpu"):
            from paperlib import training

            training.choose_device(how["device"])
        yield how
        return
    if how["jobs"] or how["per_device"]:
        raise click.UsageError("a --cluster has as many runs in parallel as its workers' threads")
    from paperlib.sweep.cluster import connected

    with connected(cluster, gpu=how["device"].startswith("cuda")) as executor:
        yield how | {"executor": executor, "send_back": send_back}
