"""What a reader of a notebook's page can take home: its files, and what their figure is made of."""

import json
import re
from pathlib import Path

from PIL import Image
from sphinx.application import Sphinx

from paperlib.experiments import FIGURES

PROFILES = ("small", "paper", "demo")
KINDS = ("png", "pdf", "csv", "tex")


def files_of(notebook: str, figures: Path) -> list[list[Path]]:
    """Return the files of each figure that a notebook draws, a list for each profile and figure.

    Args:
        notebook: its path in `notebooks/`, without suffix.
        figures: the folder with a folder for each profile.
    """
    names = {name for name, figure in FIGURES.items() if figure.notebook == notebook}
    names.add(Path(notebook).name)
    found = []
    for profile in PROFILES:
        for name in sorted(names):
            paths = [figures / profile / f"{name}.{kind}" for kind in KINDS]
            found.append([path for path in paths if path.exists()])
    return list(filter(None, found))


def stamp_of(files: list[Path]) -> str:
    """Return what a figure's PNG says of its profile, seeds, data, commit and versions, or ""."""
    for path in files:
        if path.suffix == ".png":
            with Image.open(path) as image:
                return image.info.get("Description", "")
    return ""


def section(docname: str, root: Path) -> str:
    """Return "Files and provenance" of a notebook's page, in Markdown."""
    name = Path(docname).name
    lines = ["## Files and provenance", "", f"- {{download}}`{name}.ipynb </{docname}.ipynb>`"]
    for files in files_of(docname.removeprefix("notebooks/"), root / "figures"):
        links = [
            f"{{download}}`{path.suffix[1:].upper()} </{path.relative_to(root)}>`" for path in files
        ]
        title = f"- {files[0].stem} at profile `{files[0].parent.name}`: {', '.join(links)}"
        lines += [title, *(f"  <br>{stamp}" for stamp in [stamp_of(files)] if stamp)]
    return "\n".join(lines)


def add_section(app: Sphinx, docname: str, source: list[str]) -> None:
    """Append the section to a notebook as it is read, as one more Markdown cell."""
    if app.env.doc2path(docname).suffix == ".ipynb":
        notebook = json.loads(source[0])
        cell = {"cell_type": "markdown", "metadata": {}, "id": "files-and-provenance"}
        cell["source"] = section(docname, app.srcdir)
        notebook |= {"cells": [*notebook["cells"], cell], "nbformat": 4, "nbformat_minor": 5}
        source[0] = json.dumps(notebook)


def link_pages(app, page, template, context, doctree) -> None:
    """Let links between notebooks, in their outputs, lead to the notebooks' pages."""
    if "body" in context:
        link = r'href="(?!https?:|[^"]*_downloads)([^"]+)\.ipynb"'
        context["body"] = re.sub(link, r'href="\1.html"', context["body"])


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to the reading of sources."""
    app.connect("html-page-context", link_pages)
    app.connect("source-read", add_section)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
