"""The project's own files: environments, layers of modules, the wheel, the tables of claims."""

import ast
import doctest
import graphlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import paperlib
from paperlib import claims, overview
from paperlib.experiments import Scale
from paperlib.extras.fast import WORKER_ENVIRONMENT
from paperlib.runs import Store

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
BY_HAND = {"python", "pip", "make"}


def requirements(*extras: str) -> dict[str, str]:
    optional = PROJECT["optional-dependencies"]
    lines = sum((optional[name] for name in extras or optional), PROJECT["dependencies"])
    return dict(re.fullmatch(r"([\w-]+)(>=.+)", line).groups() for line in lines)


def test_environment_matches_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge"]
    packages = [line for line in environment["dependencies"] if isinstance(line, str)]
    conda = {re.split("[>=<]", line)[0]: line for line in packages}
    expected = {CONDA_NAMES.get(k, k): minimum for k, minimum in requirements("test").items()}
    assert {name: conda[name] for name in conda.keys() - BY_HAND} == {
        name: f"{name}{minimum}" for name, minimum in expected.items()
    }
    assert conda["python"] == "python=3.12"
    assert {"pip": ["--editable ."]} in environment["dependencies"]


def test_lock_pins_every_requirement():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = {re.match(r"([\w.-]+)==\S+", line)[1] for line in lines}
    assert requirements().keys() <= pins


def test_one_version_everywhere():
    assert paperlib.__version__ == PROJECT["version"] == metadata.version("paperlib")


@pytest.mark.parametrize("name", overview.PAGES)
def test_the_claims_tables_are_those_of_the_committed_runs(name, tmp_path):
    scale, committed = Scale("small"), Store(tmp_path, ROOT / "results")
    judged = overview.Judged(scale, tuple(claims.judge(scale, committed)))
    assert (ROOT / name).read_text() == overview.page(name, judged)


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "paperlib").rglob("*.py"))
}


@pytest.mark.parametrize("name", [n for n, path in MODULES.items() if ">>>" in path.read_text()])
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert result.attempted > 0


def imports() -> dict[str, set[str]]:
    """Return what each module of paperlib imports when it is imported, by dotted names."""
    found = {module: set() for module in MODULES}
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("paperlib"):
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    found[module].add(name if name in MODULES else node.module)
            if isinstance(node, ast.Import):
                found[module] |= MODULES.keys() & {alias.name for alias in node.names}
    return found


IDEAS = {"models", "pruning", "noise", "flatness", "lanczos", "loss"}
IDEAS |= {"measures", "instability", "stats"}
# Second derivatives of small images on a CPU use the same matrix products as training.
EXCEPTIONS = {("paperlib.flatness", "paperlib.extras.fast.convolutions")}


def test_the_papers_ideas_import_no_machinery():
    machinery = tuple(f"paperlib.{name}" for name in ("store", "sweep", "extras", "runs", "cli"))
    for module, others in imports().items():
        if IDEAS & {*module.split(".")[1:2]}:
            wrong = {(module, other) for other in others if other.startswith(machinery)}
            assert wrong <= EXCEPTIONS
        if module.startswith("paperlib.store"):
            allowed = ("paperlib.store", "paperlib.config", "paperlib.measures")
            assert all(other == "paperlib" or other.startswith(allowed) for other in others)


def test_the_environment_of_workers_needs_no_torch():
    code = "import sys; from paperlib.extras.fast import WORKER_ENVIRONMENT"
    command = [sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"]
    environment = os.environ | WORKER_ENVIRONMENT
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert not done.stderr  # glibc names settings that it does not know


def test_no_two_modules_import_each_other():
    graph, cycle = {module: others - {module} for module, others in imports().items()}, []
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        cycle = error.args[1]
    assert not cycle


def test_files_have_at_most_400_lines_and_functions_60():
    for path in MODULES.values():
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, (path, node.name)


def test_the_wheel_has_every_package(tmp_path):
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    source = tmp_path / "source"
    shutil.copytree(ROOT / "paperlib", source / "paperlib")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*wheel, "-w", str(tmp_path), str(source)], check=True)
    (built,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(built).namelist())
    assert {str(path.relative_to(ROOT)) for path in MODULES.values()} <= names
    code = "import paperlib.sweep, paperlib.store.store; print(paperlib.__file__)"
    command, environment = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(built)}
    assert str(built) in subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)


def test_papermill_from_another_folder(tmp_path, monkeypatch):
    for name in ("PAPERLIB_RUNS", "PAPERLIB_FIGURES", "PAPERLIB_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    papermill = shutil.which("papermill", path=str(Path(sys.executable).parent))
    notebook = ROOT / "notebooks/tradeoff-2020/figure-1.ipynb"
    command = [papermill, str(notebook), "out.ipynb", "-p", "profile", "smoke"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "figures/smoke/figure-1.png").stat().st_size > 10_000
    assert (tmp_path / "figures/smoke/figure-1.pdf").exists()
    assert len(list((tmp_path / "runs/records").glob("*.parquet"))) == 1
    assert "injected-parameters" in (tmp_path / "out.ipynb").read_text()


def test_nothing_names_a_machine_or_a_registry():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    host = "|".join(("pypi" + r"\.org", "files.python" + "hosted", "/root" + "/", "/home" + "/"))
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in {".py", ".ipynb", ".md", ".toml", ".yml", ".lock", ".cff"}:
            assert not re.search(host, path.read_text()), name
