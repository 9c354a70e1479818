"""The command line: what it prints, and that an error is one line and exit code 2."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import torch

from paperlib import cli, experiments
from paperlib.runs import RunRecord, Store

torch.set_num_threads(1)


@pytest.fixture
def paperlib(monkeypatch, capsys, tmp_path):
    """Runs the command line; returns exit code, stdout and stderr."""
    monkeypatch.setenv("PAPERLIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PAPERLIB_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setenv("PAPERLIB_RESULTS", str(tmp_path / "results"))

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["paperlib", *arguments])
        try:
            cli.main()
        except SystemExit as ending:
            code = ending.code
        else:
            code = 0
        return code, *capsys.readouterr()

    return call


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
WRONG = [
    ("status figure-9", ["unknown figure 'figure-9'", "figure-2", "table-F1"]),
    ("figures figure-9", ["unknown figure 'figure-9'", "figure-2", "table-F1"]),
    ("sweep figure-1 figure-9", ["unknown figure 'figure-9'", "figure-2", "table-F1"]),
    ("status --profile huge", ["unknown profile 'huge'", "smoke, demo, small, paper"]),
    ("sweep figure-1 --profile huge", ["unknown profile 'huge'", "smoke, demo, small, paper"]),
    ("status figure-1 --seeds 0", ["seeds must be at least 1, got 0"]),
    *(
        (
            f"{command} figure-1 --profile smoke --precision float16",
            ["unknown precision 'float16': one of float32, bfloat16"],
        )
        for command in ("status", "sweep", "figures")
    ),
    (
        "sweep figure-1 --cluster there:1",
        ["a cluster is tcp://HOST:PORT or local:N, got 'there:1'"],
    ),
    ("sweep figure-1 --cluster local:0", ["a local cluster is local:N", "got 'local:0'"]),
    ("runs show abc", ["no run starts with 'abc'"]),
    ("runs export OUT", ["there are no runs to export"]),
    ("runs import FILE", ["cannot import", "file"]),
    ("data nope", ["unknown data set 'nope'", "digits, cifar10, cifar100, images:PATH"]),
    ("data images:/no/such.zip", ["/no/such.zip: no such file or folder"]),
    ("sweep figure-1 --profile smoke --data nope", ["unknown data set 'nope'", "digits, cifar10"]),
    (
        "sweep figure-1 --profile smoke --data images:/no/such.zip",
        ["/no/such.zip: no such file or folder"],
    ),
    ("sweep figure-1 --profile smoke --device tpu", ["no device 'tpu' here: one of auto"]),
    pytest.param(
        "sweep figure-1 --profile smoke --device cuda",
        ["no device 'cuda' here: one of auto"],
        marks=NO_GPU,
    ),
    ("sweep figure-1 --profile smoke --runs FILE", ["cannot write to the run store", "file"]),
    ("figures figure-1 --profile smoke --runs FILE", ["cannot write to the run store", "file"]),
]


@pytest.mark.parametrize(("line", "words"), WRONG)
def test_bad_input(paperlib, tmp_path, line, words):
    (tmp_path / "file").touch()
    for name in ("FILE", "OUT"):
        line = line.replace(name, str(tmp_path / name.lower()))
    code, out, err = paperlib(*line.split())
    assert code == 2
    assert out == ""
    assert err.startswith("paperlib: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == [tmp_path / "file"]


@pytest.mark.parametrize("line", ["-v status figure-9", "status -v figure-9", "data -v nope"])
def test_verbose_shows_the_trace(paperlib, line):
    code, _, err = paperlib(*line.split())
    assert code == 2
    assert err.startswith("Traceback (most recent call last)")
    assert err.splitlines()[-1].startswith("paperlib: unknown ")


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("nope", "nope"),
        ("data", "SPEC"),
        ("sweep --jobs 0", "--jobs"),
        ("status --x", "--x"),
        ("sweep --send-back", "--cluster"),
        ("sweep --cluster local:2 --jobs 2", "--cluster"),
        ("runs import", "FILE|STORE"),
        ("runs nope", "nope"),
    ],
)
def test_bad_usage(paperlib, line, word):
    code, _, err = paperlib(*line.split())
    assert code == 2
    assert word in err.splitlines()[-1]
    assert "Traceback" not in err


# Status


def record(config, seconds: float) -> RunRecord:
    rows = {
        "epoch": [0, 1],
        "trained": True,
        "train_accuracy": 50.0,
        "pre": 50.0,
        "post": 40.0,
        "removed": [0, 3],
        "seconds": seconds / 2,
    }
    return RunRecord(config, pd.DataFrame(rows))


STATES = ["done", "partial", "failed", "damaged", "missing"]


@pytest.fixture
def half_done(tmp_path) -> Store:
    """Of seven runs of figure 1, two done, one failed, one damaged, one damaged and failed."""
    store = Store(tmp_path / "runs")
    configs = experiments.plan("figure-1", "smoke", seeds=7).config.tolist()
    for config, seconds in zip(configs[:2], (3000, 4200), strict=True):
        store.write(record(config, seconds))
    store.fail(configs[2], "the loss is nan")
    for config in configs[3:5]:
        store.write(record(config, 1))
        (store.path / "records" / f"{config.identity}.parquet").write_bytes(b"half a record")
    store.fail(configs[4], "the loss is nan")
    return store


def test_status(paperlib, half_done):
    line = "status figure-1 figure-B1 --profile smoke --seeds 7 --json"
    code, out, err = paperlib(*line.split())
    assert (code, err) == (0, "")
    one, other = json.loads(out)
    counts = {name: one[name] for name in ("figure", "runs", "done", "missing")}
    assert counts == {"figure": "figure-1", "runs": 7, "done": 2, "missing": 2}
    assert (one["failed"], one["damaged"], one["partial"]) == (1, 2, 0)
    # 3600 seconds a run on average, for each of the five that are not done
    assert one["hours"] == pytest.approx(5)
    assert one["unknown"] == 0
    states = [state["state"] for state in one["states"]]
    assert states == ["done", "done", "failed", "damaged", "damaged", "missing", "missing"]
    assert one["states"][2]["error"] == "the loss is nan"
    assert "is not a whole record" in one["states"][3]["error"]
    assert (other["figure"], other["runs"], other["missing"]) == ("figure-B1", 7, 7)


def test_status_counts_every_run_once(paperlib, half_done):
    _, out, _ = paperlib("status", "figure-1", "--profile", "smoke", "--seeds", "7", "--json")
    (row,) = json.loads(out)
    assert sum(row[name] for name in STATES) == row["runs"]


def test_status_for_people(paperlib, half_done):
    line = ["status", "figure-1", "table-C1", "--profile", "smoke", "--seeds", "3"]
    code, out, _ = paperlib(*line)
    header, first, second, *runs = out.splitlines()
    assert code == 0
    assert header.split() == ["figure", "runs", *STATES, "hours", "unknown"]
    assert first.split() == ["figure-1", "3", "2", "0", "1", "0", "0", "1.00", "0"]
    count = len(experiments.plan("table-C1", "smoke", seeds=3))
    assert second.split()[:2] + second.split()[-2:] == ["table-C1", f"{count}", "?", f"{count}"]
    assert len(runs) == 1
    assert runs[0].startswith("failed: ")
    assert runs[0].endswith(
        "not run: it failed before; --retry-failed runs it again: the loss is nan"
    )
    _, out, _ = paperlib(*line, "-v")
    runs = out.splitlines()[3:]
    assert len(runs) == 3 + count
    assert "not run: in the store" in runs[0]
    assert runs[3].startswith("missing: ")
    assert runs[3].endswith("run: starts from its first epoch")


def test_status_and_runs_import_no_torch(half_done):
    lines = ["status figure-1 --profile smoke --seeds 7", "runs list"]
    for line in lines:
        code = f"""
import sys
from paperlib import cli
sys.argv = {["paperlib", *line.split(), "--runs", str(half_done.path)]}
cli.main()
assert "torch" not in sys.modules and "distributed" not in sys.modules
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


def test_status_of_everything_writes_nothing(paperlib, tmp_path):
    code, out, _ = paperlib("status", "--profile", "paper", "--json")
    rows = json.loads(out)
    assert code == 0
    assert [row["figure"] for row in rows] == list(experiments.FIGURES)
    assert all(row["missing"] == row["runs"] > 0 for row in rows)
    assert not list(tmp_path.iterdir())


# Work


def test_data(paperlib, tmp_path):
    code, out, err = paperlib("data", "digits")
    assert (code, err) == (0, "")
    expected = "digits: 1000 training and 797 test images, 3 x 32 x 32, 10 classes: 0, 1, 2"
    assert out.startswith(expected)


def test_sweep(paperlib, tmp_path):
    line = f"sweep figure-1 --profile smoke --seeds 1 --jobs 1 --runs {tmp_path / 'mine'}".split()
    code, out, err = paperlib(*line)
    assert (code, out) == (0, f"1 runs done, 1 in {tmp_path / 'mine'}\n")
    assert "1 runs (1 new): time unknown" in err
    assert "100%" in err
    store = Store(tmp_path / "mine")
    assert store.identities() == experiments.plan("figure-1", "smoke").run.tolist()
    assert not (tmp_path / "runs").exists()
    assert paperlib(*line) == (0, f"0 runs done, 1 in {tmp_path / 'mine'}\n", "")


def test_sweep_for_some_minutes(paperlib, monkeypatch, tmp_path):
    """What there was no time for is counted, and no error."""
    given = {}

    def execute(configs, store, **options):
        given.update(options, configs=list(configs.values()))
        return 0

    monkeypatch.setattr(cli.sweep, "execute", execute)
    line = "sweep figure-B1 figure-1 --profile smoke --seeds 2 --fast --minutes 1.5"
    code, out, _ = paperlib(*line.split())
    plans = [experiments.plan(f"figure-{n}", "smoke", seeds=2) for n in ("B1", "1")]
    count = len({run for plan in plans for run in plan.run})
    assert (code, out) == (0, f"0 runs done, 0 in {tmp_path / 'runs'}, {count} left\n")
    assert (given["fast"], given["minutes"]) == (True, 1.5)
    seeds = [config.seed for config in given["configs"]]
    assert seeds[: len(plans[0])] == sorted(plans[0].seed)
    assert {c.identity for c in given["configs"][: len(plans[0])]} == set(plans[0].run)
    paperlib("sweep", "--profile", "smoke")
    assert given["configs"] == experiments.queue("smoke")
    assert (given["fast"], given["minutes"]) == (False, None)
    assert paperlib("sweep", "--minutes", "0")[0] == 2


def test_a_figure_there_was_no_time_for(paperlib, monkeypatch):
    """Its notebook is not executed: that would do its runs."""
    executed = []

    def execute(notebook, out, parameters):
        executed.append(notebook.stem)
        return {"seconds": 1.0, "file": str(out), "error": None}

    monkeypatch.setattr(cli.sweep, "execute", lambda *_, **options: 0)
    monkeypatch.setattr(cli.batch, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(cli.batch, "_execute", execute)
    done = experiments.plan("figure-1", "smoke", seeds=1).config[0]
    Store().write(record(done, 1))
    line = "figures figure-1 figure-B1 --profile smoke --seeds 1 --minutes 1"
    code, out, _ = paperlib(*line.split())
    assert code == 0
    assert executed == ["figure-1"]
    assert out.splitlines()[-1] == "there was no time for: figure-B1"


class Pool(ThreadPoolExecutor):
    """In this process."""

    def __init__(self, workers, **_):
        super().__init__(workers)


# Records


def test_runs_list_and_show(paperlib, half_done):
    code, out, _ = paperlib("runs", "list", "--json")
    rows = json.loads(out)
    assert code == 0
    assert len(rows) == 4
    assert sum(row["damaged"] is not None for row in rows) == 2
    first = experiments.plan("figure-1", "smoke").run[0]
    code, out, _ = paperlib("runs", "list", "figure-1", "--profile", "smoke", "--seeds", "1")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["run", first]
    assert paperlib("runs", "list", "--profile", "small")[0] == 0
    code, out, _ = paperlib("runs", "show", first[:6])
    assert code == 0
    assert out.startswith(f'run: "{first}"\n')
    assert json.loads(paperlib("runs", "show", first, "--json")[1])["rows"][0]["pre"] == 50
    failed = experiments.plan("figure-1", "smoke", seeds=7).run[2]
    assert '"the loss is nan"' in paperlib("runs", "show", failed)[1]


def test_runs_export_and_import(paperlib, half_done, tmp_path):
    file, other = tmp_path / "some.parquet", tmp_path / "other"
    line = f"runs export {file} figure-1 --profile smoke --seeds 2 --no-arrays"
    code, out, _ = paperlib(*line.split())
    assert code == 0
    assert out.startswith(f"2 runs in {file}, ")
    line = f"runs import {file} {half_done.path} --runs {other}"
    code, out, _ = paperlib(*line.split())
    assert code == 1
    assert out.splitlines()[0] == f"{file}: 2 new"
    assert out.splitlines()[1] == f"{half_done.path}: 2 same, 2 damaged"
    config = experiments.plan("figure-1", "smoke").config[0]
    changed = record(config, 3000)
    changed.epochs["post"] = 41.0
    Store(tmp_path / "third").write(changed)
    line = f"runs import {tmp_path / 'third'} --runs {other}"
    code, out, _ = paperlib(*line.split())
    assert code == 1
    assert f"{config.identity} has other numbers than ours, which stay" in out
    assert Store(other).read(config.identity).epochs.post.tolist() == [40, 40]
    assert paperlib("runs", "export", str(file))[0] == 2  # two are damaged


def test_runs_prune(paperlib, half_done, monkeypatch):
    config = experiments.plan("figure-1", "smoke").config[0]
    kept = config.with_(seed=40, data="images:/some/where", precision="bfloat16")
    unused = config.with_(learning_rate=0.7)
    for one in (kept, unused):
        half_done.write(record(one, 1))
    half_done.fail(config, "it failed at first")
    half_done.fail(unused.with_(seed=1), "it failed")
    checkpoint = half_done.path / "checkpoints" / f"{config.identity}.safetensors"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(bytes(10))
    young = half_done.path / "records" / f".{kept.identity}.parquet.{'0' * 32}"
    young.write_bytes(b"half")
    before = {path for path in half_done.path.rglob("*") if path.is_file()}
    monkeypatch.setattr("sys.stdin", None)
    code, out, _ = paperlib("runs", "prune")
    assert code != 0
    assert {path for path in half_done.path.rglob("*") if path.is_file()} == before
    told = {
        "a record no setting refers to": 1,
        "a damaged record": 2,
        "a failure before it was done": 1,
        "a failure no setting refers to": 1,
        "a checkpoint of a run that is done": 1,
    }
    for why, count in told.items():
        assert out.count(why) == count
    code, out, _ = paperlib("runs", "prune", "--yes")
    assert code == 0
    assert out.splitlines()[-1].startswith("6 removed, ")
    assert kept.identity in half_done
    assert config.identity in half_done
    assert young.exists()
    assert len(half_done.own()) == 3
    assert (
        list(half_done.failures())
        == experiments.plan("figure-1", "smoke", seeds=7).run[[2, 4]].sort_values().tolist()
    )
    assert paperlib("runs", "prune", "--yes")[1].startswith("nothing to remove")


def test_help():
    command = [sys.executable, "-m", "paperlib", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for word in ("figures", "sweep", "status", "runs", "data", "--version", "--verbose"):
        assert word in done.stdout
    assert done.stderr == ""
