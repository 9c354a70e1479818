"""All claims at a glance: their verdicts, their gates and their figures. Imports no torch."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from paperlib import claims, experiments
from paperlib.claims import gates
from paperlib.claims.verdicts import Claim
from paperlib.runs import Store

PAPERS = {"T": "https://arxiv.org/abs/1906.03728", "R": "https://arxiv.org/abs/1805.01930"}


@dataclass(frozen=True)
class Judged:
    """The claims of both papers, judged by the runs that are there.

    Attributes:
        scale: The scale of the runs.
        claims: The claims, with verdict, contrasts and gates.
        name: The name of the files that `plots.save` writes.
    """

    scale: experiments.Scale
    claims: tuple[Claim, ...]
    name: str = "claims"

    @property
    def stamp(self) -> str:
        """One line for a figure's face."""
        complete = sum(claim.done == claim.registered for claim in self.claims)
        scale = ", ".join(filter(None, [self.scale.profile, self.scale.data, self.scale.precision]))
        return f"{scale}: {complete} of {len(self.claims)} claims have all their runs"

    @property
    def contrasts(self) -> pd.DataFrame:
        """One row a contrast, and one for each claim that has none."""
        return claims.to_frame(self.claims)

    @property
    def gates(self) -> pd.DataFrame:
        """One row a gate of a claim, for people."""
        frames = [gates.table(c.gates).assign(claim=c.name) for c in self.claims]
        return pd.concat(frames, ignore_index=True)

    @property
    def summary(self) -> pd.DataFrame:
        """One row a claim: its statement, its runs, its verdict, its power and its notes."""
        table = pd.DataFrame([vars(c) | {"runs": c.n} for c in self.claims])
        table["power"] = ["" if math.isnan(c.power) else f"{c.power:.2f}" for c in self.claims]
        table["notes"] = table.notes.map("; ".join)
        table = table.rename(columns={"name": "claim", "effect": "for a true effect of"})
        columns = ["statement", "runs", "verdict", "power", "for a true effect of", "notes"]
        return table.set_index("claim")[columns]

    def index(self, folder: str = "") -> str:
        """Return a table in Markdown: each claim with links to its figures, and its verdict.

        Args:
            folder: The notebooks' folder as seen from the page, with a slash at its end.
        """
        lines = ["| | claim | figures | verdict |", "| --- | --- | --- | --- |"]
        for claim in self.claims:
            notebooks = dict.fromkeys(experiments.FIGURES[f].notebook for f in claim.figures)
            links = ", ".join(f"[{n.partition('/')[2]}]({folder}{n}.ipynb)" for n in notebooks)
            name = f"[{claim.name}]({PAPERS[claim.name[0]]})"
            verdict = f"**{claim.verdict}** ({claim.n} runs)"
            lines.append(f"| {name} | {claim.statement} | {links} | {verdict} |")
        return "\n".join(lines)


def judged(
    profile: str = "auto",
    data: str | None = None,
    precision: str | None = None,
    store: Store | None = None,
) -> Judged:
    """Judge every claim by the runs that are there. Nothing is trained.

    Args:
        profile: As for `Scale`, or "auto": PAPERLIB_PROFILE, or else "small", the scale at which
            claims are tested.
        data: As for `Scale`.
        precision: As for `Scale`.
        store: The store; None for the default one.
    """
    asked = (os.environ.get("PAPERLIB_PROFILE") or "auto") if profile == "auto" else profile
    scale = experiments.Scale("small" if asked == "auto" else asked, data, precision=precision)
    return Judged(scale, tuple(claims.judge(scale, store)))


ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/index.md", "docs/evidence.md")
BEGIN, END = "<!-- claims: begin -->", "<!-- claims: end -->"


def page(name: str, judged: Judged) -> str:
    """Return the text of a page of `PAGES` with the claims' table between its two marks.

    Raises:
        ValueError: The page lacks a mark.
    """
    before, begin, rest = (ROOT / name).read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{name} lacks {BEGIN} or {END}")
    table = judged.index("../" * name.count("/") + "notebooks/")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def write(scale: experiments.Scale, judged: Iterable[Claim]) -> None:
    """Write the claims' table into every page of `PAGES` in this checkout."""
    overview = Judged(scale, tuple(judged))
    for name in PAGES:
        (ROOT / name).write_text(page(name, overview))


def figures(profile: str = "auto", **change: Any) -> str:
    """Return all figures in Markdown, in the papers' order: link, profile and content.

    Args:
        profile: As for `experiments.resolve`.
        change: As for `experiments.resolve`.
    """
    shown: dict[str, list[str]] = {}
    for figure in experiments.FIGURES.values():
        scale = experiments.resolve(figure.name, profile, **change)
        only = f" ({', '.join(scale.networks)})" if scale.networks else ""
        shown.setdefault(figure.notebook, [f"{scale.profile}{only}"]).append(figure.title)
    lines = ["| figure | drawn at | content |", "| --- | --- | --- |"]
    for notebook, (at, *titles) in shown.items():
        link = f"[{notebook.partition('/')[2]}]({notebook}.ipynb)"
        lines.append(f"| {link} | {at} | {'; '.join(titles)} |")
    return "\n".join(lines)
