"""The command line: what it prints, and that an error is one line and exit code 2."""

import json
import subprocess
import sys

import pandas as pd
import pytest
import small

from paperlib import cli, experiments
from paperlib.experiments import Scale
from paperlib.runs import RunRecord, Store
from paperlib.sweep import notebooks


@pytest.fixture
def paperlib(monkeypatch, capsys, tmp_path):
    """Runs the command line; returns exit code, stdout and stderr."""
    monkeypatch.setenv("PAPERLIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PAPERLIB_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setenv("PAPERLIB_RESULTS", str(tmp_path / "results"))

    def call(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["paperlib", *line.split()])
        code = 0
        try:
            cli.main()
        except SystemExit as ending:
            code = ending.code
        return code, *capsys.readouterr()

    return call


# A command, and what its error must name.
WRONG = [
    *((f"{n} figure-9", "'figure-9' figure-2 table-F1") for n in ("status", "sweep", "figures")),
    ("claims R9", "'R9' T1 R4"),
    ("status --profile huge", "'huge' smoke demo small paper"),
    ("figures figure-1 --profile huge", "'huge' smoke demo small paper"),
    ("status figure-1 --seeds 0", "0"),
    ("claims --seeds 2", "--seeds"),
    ("sweep figure-1 --profile smoke --precision float16", "'float16' float32 bfloat16"),
    ("sweep figure-1 --profile smoke --data images:/no/such.zip", "/no/such.zip"),
    ("sweep figure-1 --profile smoke --device tpu", "'tpu' auto cpu"),
    ("sweep figure-1 --profile smoke --runs FILE", "file"),
    ("sweep figure-1 --cluster there:1", "tcp://HOST:PORT local:N 'there:1'"),
    ("sweep --cluster local:2 --jobs 2", "--cluster"),
    ("sweep --send-back", "--cluster"),
    ("sweep --jobs 0", "--jobs"),
    ("sweep --minutes 0", "--minutes"),
    ("figures figure-1 --profile smoke --runs FILE", "file"),
    ("runs nope", "nope"),
    ("runs show abc", "'abc'"),
    *((f"{n} --runs FILE", "file") for n in ("status", "runs list", "runs clean", "claims R1")),
    ("runs clean --runs OUT", "out"),
    ("runs export OUT.parquet", "export"),
    ("runs export OUT.csv", "out.csv .parquet"),
    ("runs import FILE", "file"),
    ("data", "SPEC"),
    ("data nope", "'nope' digits cifar10 images:PATH"),
    ("nope", "nope"),
]


@pytest.mark.parametrize(("line", "words"), WRONG)
def test_a_wrong_command_is_told_in_one_line(paperlib, tmp_path, line, words):
    (tmp_path / "file").touch()
    for name in ("FILE", "OUT"):
        line = line.replace(name, str(tmp_path / name.lower()))
    code, out, err = paperlib(line)
    *usage, error = err.splitlines()
    assert (code, out) == (2, "")
    assert error.startswith("paperlib: ") if not usage else usage[0].startswith("Usage: ")
    assert all(word in error for word in words.split())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "file"]


def record(config, seconds: float = 1) -> RunRecord:
    return small.record(config, train_accuracy=50.0, seconds=seconds / config.epochs)


STATES = ["done", "partial", "failed", "damaged", "changed", "missing"]
SEVEN = Scale("smoke", seeds=7)


@pytest.fixture
def half_done(store) -> Store:
    """Of seven runs of figure 1, two done, one failed, two damaged (one of them failed, too)."""
    configs = experiments.plan("figure-1", SEVEN).config.tolist()
    for i, seconds in {0: 3000, 1: 4200, 3: 1, 4: 1}.items():
        store.write(record(configs[i], seconds))
    for i in (3, 4):
        store.path.joinpath(f"records/{configs[i].identity}.parquet").write_bytes(b"half a record")
    for i in (2, 4):
        store.fail(configs[i], "the loss is nan")
    return store


def test_status(paperlib, half_done):
    line = "status figure-1 figure-B1 --profile smoke --seeds 7"
    code, out, err = paperlib(f"{line} --json")
    one, other = json.loads(out)
    assert (code, err) == (0, "")
    assert [one[name] for name in ("figure", "runs", *STATES)] == ["figure-1", 7, 2, 0, 1, 2, 0, 2]
    assert one["hours"] == pytest.approx(5)  # 3600 seconds for each of the five not done
    states = [state["state"] for state in one["states"]]
    assert states == ["done", "done", "failed", "damaged", "damaged", "missing", "missing"]
    assert "the loss is nan" in one["states"][2]["why"]
    assert (other["figure"], other["runs"], other["missing"]) == ("figure-B1", 7, 7)
    header, first, _, total, *told = paperlib(line)[1].splitlines()
    assert header.split() == ["figure", "runs", *STATES, "hours", "unknown"]
    assert first.split() == ["figure-1", "7", "2", "0", "1", "2", "0", "2", "5.00", "0"]
    assert total.split()[:3] == ["2", "of", "14"]
    assert [text.split(":")[0] for text in told] == ["failed", "damaged", "damaged"]
    assert len(paperlib(f"{line} -v")[1].splitlines()) == 4 + 7 + 7


LIGHT = """
import sys
from paperlib import cli, experiments, instability, measures, overview, plots
from paperlib.runs import Store
experiments.load("figure-1", "smoke", store=Store(sys.argv[-1])).runs
cli.main()
assert not {"torch", "distributed", "papermill"} & set(sys.modules)
"""


@pytest.mark.parametrize("line", ["status figure-1 --profile smoke", "runs list", "claims R1 T1"])
def test_status_claims_and_runs_import_no_torch(half_done, line):
    command = [sys.executable, "-c", LIGHT, *line.split(), "--runs", str(half_done.path)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_claims(paperlib, half_done):
    code, out, _ = paperlib("claims --json")
    assert code == 0
    assert {claim["verdict"] for claim in json.loads(out)} == {"incomplete"}
    for config in experiments.plan("figure-R1", "smoke").config:
        half_done.write(record(config))
    code, out, _ = paperlib("claims R1 R4 --profile smoke")
    assert code == 0
    assert "G1" in out
    assert "R1: not testable" in out  # 50% training accuracy


def test_data(paperlib):
    code, out, err = paperlib("data digits")
    assert (code, err) == (0, "")
    assert "1000 training and 797 test images, 3 x 32 x 32, 10 classes" in out


def test_sweep(paperlib, tmp_path):
    line = f"sweep figure-1 --profile smoke --jobs 1 --runs {tmp_path / 'mine'} --minutes 5"
    code, out, err = paperlib(line)
    assert (code, out) == (0, f"1 runs done, 1 in {tmp_path / 'mine'}\n")
    assert "1 missing" in err
    store = Store(tmp_path / "mine", tmp_path / "results")
    assert store.identities() == experiments.plan("figure-1", "smoke").run.tolist()
    assert not (tmp_path / "runs").exists()
    assert paperlib(line) == (0, f"0 runs done, 1 in {tmp_path / 'mine'}\n", "")


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
    code, out, _ = paperlib(f"{line} --retrain-changed")
    plans = [experiments.plan(f"figure-{n}", Scale("smoke", seeds=2)) for n in ("B1", "1")]
    runs = [config.identity for config in executed["runs"]]
    assert runs == list(dict.fromkeys(run for plan in plans for run in plan.run))
    assert (code, executed["fast"], executed["minutes"]) == (0, True, 1.5)
    assert executed["retrain_changed"]
    assert f"{len(runs)} left" in out
    paperlib("sweep --profile smoke")
    assert executed["runs"] == experiments.queue("smoke")


def test_figures_are_drawn_at_small_where_its_runs_are_there(paperlib, executed, store):
    for config in experiments.plan("figure-1", "small").config:
        store.write(record(config))
    assert paperlib("figures figure-1 figure-B1")[0] == 0
    assert executed["scales"] == {"figure-1": Scale("small"), "figure-B1": Scale("demo")}
    assert executed["overview"] is None
    assert {c.data for c in executed["runs"]} == {"cifar10-jpeg", "digits"}
    paperlib("figures --fresh")
    assert set(executed["scales"].values()) == {executed["overview"]} == {Scale("demo")}
    assert list(executed["scales"]) == list(experiments.FIGURES)
    assert executed["runs"] == experiments.queue("demo")
    assert not executed["results"].exists()
    # what there was no time for is not executed: its notebook would train
    code, out, _ = paperlib("figures figure-1 figure-B1 --minutes 1")
    assert (code, list(executed["scales"])) == (0, ["figure-1"])
    assert out.splitlines()[-1].endswith(": figure-B1")


def test_runs_list_and_show(paperlib, half_done):
    first, _, failed, damaged, *_ = experiments.plan("figure-1", SEVEN).run
    lines = paperlib("runs list")[1].splitlines()
    assert len(lines) == 1 + 4
    assert sum("not a whole record" in line for line in lines) == 2
    out = paperlib("runs list figure-1 --profile smoke --seeds 1")[1]
    assert [line.split()[0] for line in out.splitlines()] == ["run", first]
    out = paperlib(f"runs show {first[:6]}")[1]
    assert f'run: "{first}"' in out
    assert '"epochs": 12' in out
    assert "the loss is nan" in paperlib(f"runs show {failed}")[1]
    assert "not a whole record" in paperlib(f"runs show {damaged}")[1]


def test_runs_export_and_import(paperlib, half_done, tmp_path):
    file, other = tmp_path / "some.parquet", tmp_path / "other"
    code, out, _ = paperlib(f"runs export {file} figure-1 --profile smoke --seeds 2")
    assert (code, out.split()[0]) == (0, "2")
    code, out, _ = paperlib(f"runs import {file} {half_done.path} --runs {other}")
    assert code == 1
    assert "2 new" in out.splitlines()[0]
    assert "2 same, 2 damaged" in out.splitlines()[1]
    config = experiments.plan("figure-1", "smoke").config[0]
    Store(tmp_path / "third", tmp_path / "results").write(small.record(config, post=41.0))
    code, out, _ = paperlib(f"runs import {tmp_path / 'third'} --runs {other}")
    assert code == 1
    assert config.identity in out
    assert set(Store(other).read(config.identity).epochs.post) == {70}
    assert paperlib(f"runs export {file}")[0] == 2  # two are damaged


def test_runs_clean(paperlib, half_done, monkeypatch):
    """Removed is what no setting has, in any profile, with any data, precision or seed."""
    config = experiments.plan("figure-1", "smoke").config[0]
    kept = config.with_(seed=40, precision="bfloat16")
    unused = config.with_(learning_rate=0.7)
    half_done.write(record(kept))
    half_done.write(record(unused))
    before = half_done.own()
    monkeypatch.setattr("sys.stdin", None)
    code, out, _ = paperlib("runs clean")
    assert code != 0
    assert f"records/{unused.identity}.parquet" in out.splitlines()
    assert half_done.own() == before
    assert paperlib("runs clean --yes")[0] == 0
    assert len(half_done.own()) == 3
    assert {kept.identity, config.identity} < set(half_done.own())
