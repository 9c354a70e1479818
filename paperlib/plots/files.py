"""A figure's files: figures/PROFILE/NAME.pdf, .png and .csv, the same bytes each time."""

import platform
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import pandas as pd
from IPython.core.getipython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from paperlib.runs import figures_path
from paperlib.store import provenance

if TYPE_CHECKING:
    from paperlib.experiments import Loaded
    from paperlib.overview import Judged

PACKAGES = ("paperlib", "matplotlib", "numpy", "pandas")
CHARACTERS_PER_INCH = 17  # of the stamp


def stamp(figure: Figure, words: str) -> None:
    """Write on the figure's face its profile, seeds, data and the gates that fail."""
    width = max(40, int(CHARACTERS_PER_INCH * figure.get_figwidth()))
    lines = textwrap.fill(words, width, break_long_words=False)
    figure.suptitle(lines, x=0.995, ha="right", fontsize=7, color="0.4")


def save(
    picture: Figure,
    loaded: "Loaded | Judged",
    name: str = "",
    note: str = "",
    alt: str = "",
    folder: Path | None = None,
) -> None:
    """Stamp a figure, write its files, and show it where this is a notebook.

    The metadata of the files say the same as the face, and the versions of the packages. They hold
    no date.

    Args:
        picture: The figure.
        loaded: The runs it shows: for its name, profile and stamp.
        name: Of the files, where it differs from `loaded.name`.
        note: Added to the stamp.
        alt: The text for readers who do not see the figure; by default `described`.
        folder: In place of the usual one.
    """
    name, alt = name or loaded.name, alt or described(picture)
    words = ", ".join(filter(None, [loaded.stamp, note]))
    stamp(picture, words)
    versions = {"python": platform.python_version()}
    versions |= {package: provenance.version(package) for package in PACKAGES}
    about = "; ".join([words, *(f"{key} {value}" for key, value in versions.items())])
    target = _folder(loaded.scale.profile, folder)
    no_date = {"CreationDate": None, "ModDate": None}
    picture.savefig(target / f"{name}.pdf", metadata={"Title": name, "Subject": about, **no_date})
    png = {"Title": name, "Description": about, "Comment": alt}
    picture.savefig(target / f"{name}.png", metadata=png)
    if get_ipython() is not None:
        display(picture, metadata={"image/png": {"alt": alt}})
        plt.close(picture)


def save_table(
    frame: pd.DataFrame, loaded: "Loaded | Judged", name: str = "", folder: Path | None = None
) -> Path:
    """Write a table to FOLDER/PROFILE/NAME.csv and return the path."""
    path = _folder(loaded.scale.profile, folder) / f"{name or loaded.name}.csv"
    frame.to_csv(path, float_format="%.4f")
    return path


def described(picture: Figure) -> str:
    """Describe a figure by its panels: their titles, axes, names on the axes, and legends."""
    sentences = []
    for ax in picture.axes:
        title, x, y = (text.replace("$", "").replace("\\", "") for text in _labels(ax))
        axes = f"{y} against {x}" if x and y else x or y
        legend = ax.get_legend()
        names = [text.get_text() for text in legend.get_texts()] if legend else []
        names += _named_ticks(ax)
        parts = [": ".join(filter(None, [title, axes])), ", ".join(names)]
        sentences.append("; ".join(filter(None, parts)))
    return ". ".join(filter(None, sentences)) + "."


def _named_ticks(ax: plt.Axes) -> list[str]:
    """Return the names on an axis of categories, none of an axis of numbers."""
    axes = [a for a in (ax.xaxis, ax.yaxis) if isinstance(a.get_major_locator(), FixedLocator)]
    names = [label.get_text().replace("\n", " ") for a in axes for label in a.get_ticklabels()]
    return [name for name in names if any(letter.isalpha() for letter in name)]


def _labels(ax: plt.Axes) -> tuple[str, str, str]:
    return ax.get_title(), ax.get_xlabel(), ax.get_ylabel()


def _folder(profile: str, folder: Path | None) -> Path:
    target = (folder or figures_path()) / profile
    target.mkdir(parents=True, exist_ok=True)
    return target
