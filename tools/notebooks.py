"""Execute notebooks and write them back with their outputs: `python tools/notebooks.py [FILE ...]`.

All notebooks, or the files named, are executed from the records that are there. The same versions
and records give the same bytes: stderr, timings, widgets and the kernel's version are left out.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from paperlib.sweep.notebooks import ThisKernel, notebooks_path

CELL_SECONDS = 3600
WIDGET = "application/vnd.jupyter.widget-view+json"
PARALLEL = 2  # two notebooks keep two cores busy


def rewrite(path: Path) -> None:
    """Execute a notebook and write it back; nothing is written if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_manager_class=ThisKernel,
        resources={"metadata": {"path": str(path.parent)}},
        coalesce_streams=True,
        record_timing=False,
        store_widget_state=False,
    ).execute()
    notebook.metadata["language_info"] = nbformat.from_dict({"name": "python"})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if output.get("name") != "stderr" and WIDGET not in output.get("data", {})
            ]
    nbformat.write(notebook, path)
    print(path, flush=True)


if __name__ == "__main__":
    found = [Path(name) for name in sys.argv[1:]] or sorted(notebooks_path().rglob("[!.]*.ipynb"))
    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(rewrite, found))
