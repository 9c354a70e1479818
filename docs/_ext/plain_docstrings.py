"""Docstrings in plain English are not quite reStructuredText: | and * are no markup in |Hv - av| or
*args, and an indented block, such as a table or a formula, keeps its lines."""

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


def plain(lines: list[str]) -> list[str]:
    """Return the lines of a docstring as reStructuredText."""
    result: list[str] = []
    literal = False
    for i, line in enumerate(lines):
        indented = line.startswith("  ")
        if indented and not literal and i > 1 and not lines[i - 1]:
            before = next(filter(None, lines[i - 1 :: -1]))
            literal = not before.startswith((" ", "- ", ">>>")) and not before.endswith("::")
            result += ["::", ""] if literal else []
        literal = literal and (indented or not line)
        result.append(line if literal else escape(line))
    return result


def process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list) -> None:
    """Rewrite a docstring before napoleon reads it."""
    lines[:] = plain(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to the reading of docstrings."""
    app.connect("autodoc-process-docstring", process, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
