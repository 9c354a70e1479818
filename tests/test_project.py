"""The project's own files: environments in step, notebooks clean, the command lines of README."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
import yaml

import paperlib
from paperlib import checkpoints, provenance

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
    assert conda["python"] == "python>=3.11"
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


def test_versions_in_a_checkout_that_is_not_installed(monkeypatch):
    installed = metadata.version

    def version(package):
        if package == "paperlib":
            raise metadata.PackageNotFoundError(package)
        return installed(package)

    monkeypatch.setattr(metadata, "version", version)
    about = provenance.describe("cpu", "", 1)
    assert about["paperlib"] == checkpoints._versions()["paperlib"] == paperlib.__version__
    assert about["numpy"] == installed("numpy")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_parameters_and_no_changing_output(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [tag for cell in code for tag in cell.metadata.get("tags", [])] == ["parameters"]
    for cell in code:
        assert cell.execution_count is None
        assert not cell.outputs or cell.source.startswith("# NBVAL_CHECK_OUTPUT")


def test_stripping_keeps_parameters_and_checked_output(tmp_path):
    path = tmp_path / "figure.ipynb"
    notebook = nbformat.read(ROOT / "notebooks/tradeoff-2020/figure-1.ipynb", as_version=4)
    noise = nbformat.v4.new_output("stream", text="changes from run to run")
    checked = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count = 7
            cell.outputs = [noise]
            checked += bool(cell.metadata.get("keep_output"))
    nbformat.write(notebook, path)
    subprocess.run([sys.executable, "-m", "nbstripout", path], check=True)
    stripped = nbformat.read(path, as_version=4)
    tags = [tag for cell in stripped.cells for tag in cell.metadata.get("tags", [])]
    assert tags == ["parameters"]
    assert checked == 1
    assert sum(bool(cell.get("outputs")) for cell in stripped.cells) == checked


def test_every_figure_has_its_notebook():
    from paperlib import experiments

    there = {str(path.relative_to(ROOT / "notebooks").with_suffix("")) for path in NOTEBOOKS}
    assert {figure.notebook for figure in experiments.FIGURES.values()} | {"tour"} == there


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
