"""Docstrings in plain English, where | and * are not reStructuredText: |Hv - av|, *args."""

import re

from sphinx.application import Sphinx

STARTS_MARKUP = re.compile(r"(?<![\w\\*|])[*|](?=\S)")


def escape(line: str) -> str:
    """Escape a * or | that would start markup, outside of `code`."""
    if line.lstrip().startswith((">>>", "...")):
        return line
    parts = re.split("(`+[^`]*`+)", line)
    parts[::2] = [STARTS_MARKUP.sub(r"\\\g<0>", part) for part in parts[::2]]
    return "".join(parts)


def process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list) -> None:
    """Escape a docstring's lines, before napoleon reads them."""
    lines[:] = map(escape, lines)


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to the reading of docstrings."""
    app.connect("autodoc-process-docstring", process, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
