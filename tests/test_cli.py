"""The command line: what it prints, and that an error is one line and exit code 2."""

import json
import subprocess
import sys

import pandas as pd
import pytest
import torch

from paperlib import cli, experiments
from paperlib.experiments import Scale
from paperlib.runs import RunRecord, Store
from paperlib.sweep import notebooks

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
# A command, and what its one line of error must name.
WRONG = [
    *((f"{n} figure-9", "'figure-9' figure-2 table-F1") for n in ("status", "sweep", "figures")),
    ("claims R9", "'R9' T1 R4"),
    ("status --profile huge", "'huge' smoke demo small paper"),
    ("figures figure-1 --profile huge", "'huge' smoke demo small paper"),
    ("status figure-1 --seeds 0", "0"),
    ("sweep figure-1 --profile smoke --precision float16", "'float16' float32 bfloat16"),
    ("sweep figure-1 --cluster there:1", "tcp://HOST:PORT local:N 'there:1'"),
    ("runs show abc", "'abc'"),
    ("runs export OUT", "export"),
    ("runs import FILE", "file"),
    ("data nope", "'nope' digits cifar10 images:PATH"),
    ("sweep figure-1 --profile smoke --data images:/no/such.zip", "/no/such.zip"),
    ("sweep figure-1 --profile smoke --device tpu", "'tpu' auto"),
    pytest.param("sweep figure-1 --profile smoke --device cuda", "'cuda' auto", marks=NO_GPU),
    ("sweep figure-1 --profile smoke --runs FILE", "file"),
    ("figures figure-1 --profile smoke --runs FILE", "file"),
]


@pytest.mark.parametrize(("line", "words"), WRONG)
def test_a_wrong_value_is_one_line_that_names_it(paperlib, tmp_path, line, words):
    (tmp_path / "file").touch()
    for name in ("FILE", "OUT"):
        line = line.replace(name, str(tmp_path / name.lower()))
    code, out, err = paperlib(*line.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("paperlib: ")
    assert all(word in err for word in words.split())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "file"]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("nope", "nope"),
        ("data", "SPEC"),
        ("sweep --jobs 0", "--jobs"),
        ("sweep --minutes 0", "--minutes"),
        ("sweep --send-back", "--cluster"),
        ("sweep --cluster local:2 --jobs 2", "--cluster"),
        ("claims --seeds 2", "--seeds"),
        ("runs nope", "nope"),
    ],
)
def test_wrong_usage(paperlib, line, word):
    code, _, err = paperlib(*line.split())
    assert code == 2
    assert word in err.splitlines()[-1]
    assert "Traceback" not in err


# Status


def record(config, seconds: float) -> RunRecord:
    rows = {
        "epoch": range(config.epochs),
        "trained": True,
        "train_accuracy": 50.0,
        "pre": 50.0,
        "post": 40.0,
        "removed": 3,
        "train_loss": 0.1,
        "seconds": seconds / config.epochs,
    }
    return RunRecord(config, pd.DataFrame(rows))


STATES = ["done", "partial", "failed", "damaged", "changed", "missing"]
SEVEN = Scale("smoke", seeds=7)


@pytest.fixture
def half_done(tmp_path) -> Store:
    """Of seven runs of figure 1, two done, one failed, two damaged (one of them failed, too)."""
    store = Store(tmp_path / "runs", tmp_path / "results")
    configs = experiments.plan("figure-1", SEVEN).config.tolist()
    for config, seconds in zip(configs[:2], (3000, 4200), strict=True):
        store.write(record(config, seconds))
    for config in configs[3:5]:
        store.write(record(config, 1))
        (store.path / "records" / f"{config.identity}.parquet").write_bytes(b"half a record")
    for config in (configs[2], configs[4]):
        store.fail(config, "the loss is nan")
    return store


def test_status(paperlib, half_done):
    line = "status figure-1 figure-B1 --profile smoke --seeds 7"
    code, out, err = paperlib(*line.split(), "--json")
    one, other = json.loads(out)
    assert (code, err) == (0, "")
    assert [one[name] for name in ("figure", "runs", *STATES)] == ["figure-1", 7, 2, 0, 1, 2, 0, 2]
    assert one["hours"] == pytest.approx(5)  # 3600 seconds for each of the five not done
    states = [state["state"] for state in one["states"]]
    assert states == ["done", "done", "failed", "damaged", "damaged", "missing", "missing"]
    assert "the loss is nan" in one["states"][2]["why"]
    assert (other["figure"], other["runs"], other["missing"]) == ("figure-B1", 7, 7)
    _, out, _ = paperlib(*line.split())
    header, first, _, *told = out.splitlines()
    assert header.split() == ["figure", "runs", *STATES, "hours", "unknown"]
    assert first.split() == ["figure-1", "7", "2", "0", "1", "2", "0", "2", "5.00", "0"]
    assert [text.split(":")[0] for text in told] == ["failed", "damaged", "damaged"]
    assert len(paperlib(*line.split(), "-v")[1].splitlines()) == 3 + 7 + 7


def test_status_claims_and_runs_import_no_torch(half_done):
    for line in ("status figure-1 --profile smoke", "runs list", "claims R1 T1"):
        code = f"""
import sys
from paperlib import cli, experiments, instability, plots
from paperlib.runs import Store
sys.argv = {["paperlib", *line.split(), "--runs", str(half_done.path)]}
experiments.load("figure-1", "smoke", store=Store({str(half_done.path)!r})).runs
cli.main()
assert not {{"torch", "distributed", "papermill"}} & set(sys.modules)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


def test_claims(paperlib, half_done):
    code, out, _ = paperlib("claims", "--json")
    assert code == 0
    assert {claim["verdict"] for claim in json.loads(out)} == {"incomplete"}
    for config in experiments.plan("figure-R1", "smoke").config:
        half_done.write(record(config, 1))
    code, out, _ = paperlib("claims", "R1", "R4", "--profile", "smoke")
    assert code == 0
    assert "R1: not testable" in out  # 50% training accuracy
    assert "G1" in out


# Work


def test_data(paperlib):
    code, out, err = paperlib("data", "digits")
    assert (code, err) == (0, "")
    for word in ("1000 training", "797 test", "3 x 32 x 32", "10 classes"):
        assert word in out


def test_sweep(paperlib, tmp_path):
    line = f"sweep figure-1 --profile smoke --jobs 1 --runs {tmp_path / 'mine'} --minutes 5".split()
    code, out, err = paperlib(*line)
    assert (code, out) == (0, f"1 runs done, 1 in {tmp_path / 'mine'}\n")
    assert "1 missing" in err
    store = Store(tmp_path / "mine", tmp_path / "results")
    assert store.identities() == experiments.plan("figure-1", "smoke").run.tolist()
    assert not (tmp_path / "runs").exists()
    assert paperlib(*line) == (0, f"0 runs done, 1 in {tmp_path / 'mine'}\n", "")


@pytest.fixture
def executed(monkeypatch):
    """What the command line has done instead of training and executing notebooks."""
    done = {"runs": [], "scales": {}}

    def execute(configs, store, executor, **options):
        done.update(options, runs=list(dict.fromkeys(configs)), results=store.results)
        return 0

    def figures(scales, store, overview):
        done.update(scales=scales, overview=overview)
        return pd.DataFrame(columns=["figures", "profile", "seconds", "file", "error"])

    monkeypatch.setattr(cli.sweep, "execute", execute)
    monkeypatch.setattr(notebooks, "figures", figures)
    monkeypatch.delenv("PAPERLIB_PROFILE", raising=False)
    return done


def test_the_order_of_a_sweep(paperlib, executed):
    line = "sweep figure-B1 figure-1 --profile smoke --seeds 2 --fast --minutes 1.5"
    code, out, _ = paperlib(*line.split())
    plans = [experiments.plan(f"figure-{n}", Scale("smoke", seeds=2)) for n in ("B1", "1")]
    runs = [config.identity for config in executed["runs"]]
    assert runs == list(dict.fromkeys(run for plan in plans for run in plan.run))
    assert (code, executed["fast"], executed["minutes"]) == (0, True, 1.5)
    assert f"{len(runs)} left" in out
    paperlib("sweep", "--profile", "smoke")
    assert executed["runs"] == experiments.queue("smoke")


def test_figures_are_drawn_at_small_where_its_runs_are_there(paperlib, executed, tmp_path):
    store = Store(tmp_path / "runs", tmp_path / "results")
    for config in experiments.plan("figure-1", "small").config:
        store.write(record(config, 1))
    assert paperlib("figures", "figure-1", "figure-B1")[0] == 0
    assert executed["scales"] == {"figure-1": Scale("small"), "figure-B1": Scale("demo")}
    assert executed["overview"] is None
    assert {c.data for c in executed["runs"]} == {"cifar10-jpeg", "digits"}
    paperlib("figures", "--fresh")
    assert set(executed["scales"].values()) == {executed["overview"]} == {Scale("demo")}
    assert list(executed["scales"]) == list(experiments.FIGURES)
    assert executed["runs"] == experiments.queue("demo")
    assert not executed["results"].exists()
    # what there was no time for is not executed: its notebook would train
    code, out, _ = paperlib(*["figures", "figure-1", "figure-B1", "--minutes", "1"])
    assert (code, list(executed["scales"])) == (0, ["figure-1"])
    assert out.splitlines()[-1].endswith(": figure-B1")


# Records


def test_runs_list_and_show(paperlib, half_done):
    first, _, failed, damaged, *_ = experiments.plan("figure-1", SEVEN).run
    lines = paperlib("runs", "list")[1].splitlines()
    assert len(lines) == 1 + 4
    assert sum("not a whole record" in line for line in lines) == 2
    code, out, _ = paperlib("runs", "list", "figure-1", "--profile", "smoke", "--seeds", "1")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["run", first]
    out = paperlib("runs", "show", first[:6])[1]
    assert f'run: "{first}"' in out
    assert '"epochs": 12' in out
    assert "the loss is nan" in paperlib("runs", "show", failed)[1]
    assert "not a whole record" in paperlib("runs", "show", damaged)[1]


def test_runs_export_and_import(paperlib, half_done, tmp_path):
    file, other = tmp_path / "some.parquet", tmp_path / "other"
    line = f"runs export {file} figure-1 --profile smoke --seeds 2"
    code, out, _ = paperlib(*line.split())
    assert (code, out.split()[0]) == (0, "2")
    code, out, _ = paperlib(*f"runs import {file} {half_done.path} --runs {other}".split())
    assert code == 1
    assert "2 new" in out.splitlines()[0]
    assert "2 same, 2 damaged" in out.splitlines()[1]
    config = experiments.plan("figure-1", "smoke").config[0]
    changed = record(config, 3000)
    changed.epochs["post"] = 41.0
    Store(tmp_path / "third", tmp_path / "results").write(changed)
    code, out, _ = paperlib(*f"runs import {tmp_path / 'third'} --runs {other}".split())
    assert code == 1
    assert config.identity in out
    assert set(Store(other).read(config.identity).epochs.post) == {40}
    assert paperlib("runs", "export", str(file))[0] == 2  # two are damaged


def test_runs_clean(paperlib, half_done, monkeypatch):
    """Removed is what no setting has, in any profile, with any data, precision or seed."""
    config = experiments.plan("figure-1", "smoke").config[0]
    kept = config.with_(seed=40, precision="bfloat16")
    unused = config.with_(learning_rate=0.7)
    for one in (kept, unused):
        half_done.write(record(one, 1))
    before = half_done.own()
    monkeypatch.setattr("sys.stdin", None)
    code, out, _ = paperlib("runs", "clean")
    assert code != 0
    assert f"records/{unused.identity}.parquet" in out.splitlines()
    assert half_done.own() == before
    assert paperlib("runs", "clean", "--yes")[0] == 0
    assert len(half_done.own()) == 3
    assert {kept.identity, config.identity} < set(half_done.own())
