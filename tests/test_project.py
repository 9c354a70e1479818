"""The project's own files: environments in step, notebooks clean, the command lines of README."""

import ast
import graphlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
import yaml

import paperlib
from paperlib import claims, overview
from paperlib.experiments import Scale
from paperlib.runs import Store

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
BY_HAND = {"python", "pip", "make"}


def requirements(*extras: str) -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    lines = project["dependencies"] + [
        line for name in extras or optional for line in optional[name]
    ]
    return dict(re.fullmatch(r"([\w-]+)(>=.+)", line).groups() for line in lines)


def test_environment_matches_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge"]
    packages = [line for line in environment["dependencies"] if isinstance(line, str)]
    conda = {re.split("[>=<]", line)[0]: line for line in packages}
    expected = {
        CONDA_NAMES.get(name, name): minimum for name, minimum in requirements("test").items()
    }
    assert conda.keys() - BY_HAND == expected.keys()
    for name, minimum in expected.items():
        assert conda[name] == f"{name}{minimum}"
    assert conda["python"] == "python=3.12"
    assert {"pip": ["--editable ."]} in environment["dependencies"]


def test_lock_pins_every_requirement():
    pins = dict(
        re.match(r"([\w.-]+)==(\S+)", line).groups()
        for line in (ROOT / "requirements.lock").read_text().splitlines()
    )
    assert requirements().keys() <= pins.keys()


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert paperlib.__version__ == project["version"] == metadata.version("paperlib")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_parameters_and_no_machine_in_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    for cell in code:
        assert "execution" not in cell.metadata  # times of a run
        assert str(ROOT) not in json.dumps(cell.outputs)
        assert all(output.output_type != "error" for output in cell.outputs)


def test_every_figure_has_its_notebook():
    from paperlib import experiments

    there = {str(path.relative_to(ROOT / "notebooks").with_suffix("")) for path in NOTEBOOKS}
    others = {"index", "tour", "claims", "explore", "your-own"}
    assert {figure.notebook for figure in experiments.FIGURES.values()} | others == there


@pytest.mark.parametrize("name", overview.PAGES)
def test_the_claims_tables_are_those_of_the_committed_runs(name, tmp_path):
    committed = Store(tmp_path, ROOT / "results")
    scale = Scale("small")
    judged = overview.Judged(scale, tuple(claims.judge(scale, committed)))
    assert (ROOT / name).read_text() == overview.page(name, judged)


def imports() -> dict[str, set[str]]:
    """Return what each module of paperlib imports when it is imported, by dotted names."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "paperlib").rglob("*.py")
    }
    found = {}
    for module, path in paths.items():
        found[module] = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("paperlib"):
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    found[module].add(name if name in paths else node.module)
    return found


IDEAS = [
    "models",
    "pruning",
    "noise",
    "flatness",
    "lanczos",
    "loss",
    "derivatives",
    "measures",
    "instability",
    "stats",
]
# Second derivatives of small images on a CPU use the same matrix products as training.
EXCEPTIONS = {("paperlib.flatness", "paperlib.extras.fast.convolutions")}


def test_the_papers_ideas_import_no_machinery():
    machinery = tuple(f"paperlib.{name}" for name in ("store", "sweep", "extras", "runs", "cli"))
    for module, others in imports().items():
        if module.split(".")[1:2] and module.split(".")[1] in IDEAS:
            wrong = {(module, other) for other in others if other.startswith(machinery)}
            assert wrong <= EXCEPTIONS
        if module.startswith("paperlib.store"):
            allowed = ("paperlib.store", "paperlib.config", "paperlib.measures")
            assert all(other == "paperlib" or other.startswith(allowed) for other in others)


def test_no_two_modules_import_each_other():
    order = graphlib.TopologicalSorter(
        {module: others - {module} for module, others in imports().items()}
    )
    assert len(list(order.static_order())) >= len(imports())  # a cycle raises CycleError


def test_files_have_at_most_400_lines_and_functions_60():
    for path in (ROOT / "paperlib").rglob("*.py"):
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
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "paperlib").rglob("*.py")} <= names
    code = "import paperlib.sweep, paperlib.store.store; print(paperlib.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(built)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(built) in done.stdout


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
    executed = json.loads((tmp_path / "out.ipynb").read_text())
    assert "injected-parameters" in str(executed["cells"])


def test_nothing_names_a_machine_or_a_registry():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    host = "|".join(("pypi" + r"\.org", "files.python" + "hosted", "/root" + "/", "/home" + "/"))
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in {".py", ".ipynb", ".md", ".toml", ".yml", ".lock", ".cff"}:
            assert not re.search(host, path.read_text()), name
