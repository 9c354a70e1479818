"""Execute notebooks and write them back: `python -m benchmarks.notebooks --write [FILE ...]`.

All notebooks, or the files named, are executed from the records that are there. The same versions
and records give the same bytes. Without `--write` the command tells which would change.
"""

import argparse
import os
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from paperlib.sweep.notebooks import ThisKernel, in_parallel, notebooks_path

CELL_SECONDS = 3600
WIDGET = "application/vnd.jupyter.widget-view+json"
# Numbers of the display that differ from one execution to the next.
STYLER = re.compile(r"\bT_([0-9a-f]{5})(?=[_\"' ])")
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def rewrite(paths: Iterable[Path], write: bool) -> pd.DataFrame:
    """Execute notebooks as they are, and write them back with their outputs.

    The same versions give the same bytes: timings, addresses and random names are left out.

    Args:
        paths: of the notebooks.
        write: otherwise nothing is written.

    Returns:
        One row a notebook: file, changed (whether its bytes change) and error (or None).
    """
    os.environ.setdefault("SOURCE_DATE_EPOCH", "0")  # no dates in the figures' files
    done = in_parallel({str(path): partial(_rewrite, path, write) for path in paths})
    rows = [{"file": path, **result} for path, result in done.items()]
    return pd.DataFrame(rows, columns=["file", "changed", "error"])


def _rewrite(path: Path, write: bool) -> dict[str, object]:
    before = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(before, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_manager_class=ThisKernel,
        resources={"metadata": {"path": str(path.parent)}},
        store_widget_state=False,
    )
    try:
        client.execute()
    except CellExecutionError as failure:
        return {"changed": False, "error": f"{failure.ename}: {failure.evalue}"}
    except RuntimeError as failure:
        return {"changed": False, "error": f"the kernel died: {failure}"}
    after = nbformat.writes(cleaned(notebook), version=4) + "\n"
    if write and after != before:
        path.write_text(after, encoding="utf-8")
    return {"changed": after != before, "error": None}


def cleaned(notebook: Any) -> Any:
    """Return an executed notebook without all that differs from one execution to the next.

    Left out are stderr, timings, widgets, the kernel's version and addresses; random names
    in pandas' tables are numbered.
    """
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = type(notebook)(name="python")
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            names: dict[str, str] = {}
            cell.outputs = [
                o
                for o in cell.outputs
                if o.get("name") != "stderr" and WIDGET not in o.get("data", {})
            ]
            for output in cell.outputs:
                if "text" in output:
                    output["text"] = _plain(output["text"], cell.id, names)
                for kind, content in output.get("data", {}).items():
                    if isinstance(content, str) and not kind.startswith("image/"):
                        output["data"][kind] = _plain(content, cell.id, names)
    return notebook


def _plain(text: str, cell: str, names: dict[str, str]) -> str:
    """Return a text without addresses; random names are numbered, and kept in `names`."""
    return STYLER.sub(
        lambda match: names.setdefault(match[0], f"T_{cell}_{len(names) + 1}"),
        ADDRESS.sub("", text),
    )


def main() -> None:
    """Execute notebooks; the exit code is 1 if one fails, or would change without --write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    found = options.files or sorted(notebooks_path().rglob("*.ipynb"))
    frame = rewrite([p for p in found if ".ipynb_checkpoints" not in p.parts], options.write)
    print(frame.fillna({"error": ""}).to_string(index=False))
    raise SystemExit(frame.error.notna().any() or (frame.changed.any() and not options.write))


if __name__ == "__main__":
    main()
