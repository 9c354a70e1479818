"""The command line: what it prints, and that an error is one line and exit code 2."""

import json
import subprocess
import sys

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
    code, out, err = paperlib(*line.replace("FILE", str(tmp_path / "file")).split())
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
    [("nope", "nope"), ("data", "SPEC"), ("sweep --jobs 0", "--jobs"), ("status --x", "--x")],
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
    assert one["failed"] >= 1
    assert one["damaged"] >= 1
    # 3600 seconds a run on average, for each of the five that are not done
    assert one["hours"] == pytest.approx(5)
    assert (other["figure"], other["runs"], other["missing"]) == ("figure-B1", 7, 7)


def test_status_counts_every_run_once(paperlib, half_done):
    _, out, _ = paperlib("status", "figure-1", "--profile", "smoke", "--seeds", "7", "--json")
    (row,) = json.loads(out)
    assert sum(row[name] for name in ("done", "failed", "damaged", "missing")) == row["runs"]


def test_status_for_people(paperlib, half_done):
    code, out, _ = paperlib("status", "figure-1", "table-C1", "--profile", "smoke")
    header, *rows = out.splitlines()
    assert code == 0
    assert header.split() == ["figure", "runs", "done", "failed", "damaged", "missing", "hours"]
    assert rows[0].split() == ["figure-1", "1", "1", "0", "0", "0", "0.00"]
    assert rows[1].split() == ["table-C1", "6", "0", "0", "0", "6", "?"]


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
    assert "100%" in err
    store = Store(tmp_path / "mine")
    assert store.identities() == experiments.plan("figure-1", "smoke").run.tolist()
    assert not (tmp_path / "runs").exists()
    assert paperlib(*line) == (0, f"0 runs done, 1 in {tmp_path / 'mine'}\n", "")


def test_help():
    command = [sys.executable, "-m", "paperlib", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for word in ("figures", "sweep", "status", "data", "--version", "--verbose"):
        assert word in done.stdout
    assert done.stderr == ""
