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

from paperlib.runs import figures_path
from paperlib.store import provenance

if TYPE_CHECKING:
    from paperlib.experiments import Loaded
    from paperlib.overview import Judged

PACKAGES = ("paperlib", "matplotlib", "numpy", "pandas")
CHARACTERS_PER_INCH = 17  # in the stamp


def stamp(figure: Figure, words: str) -> None:
    """Write words on the figure's face, such as its profile, data, seeds and failed gates."""
    width = max(40, int(CHARACTERS_PER_INCH * figure.get_figwidth()))
    lines = textwrap.fill(words, width, break_long_words=False)
    figure.suptitle(lines, x=0.995, ha="right", fontsize=7, color="0.4")


def save(picture: Figure, loaded: "Loaded | Judged", name: str = "", note: str = "") -> None:
    """Stamp a figure, write its files, and show it if this is a notebook.

    The metadata of the files hold the stamp and the versions of the packages, but no date.

    Args:
        picture: The figure.
        loaded: The runs or claims that it shows. They give its name, profile and stamp.
        name: The name of the files, if it differs from `loaded.name`.
        note: An addition to the stamp.
    """
    name, alt = name or loaded.name, described(picture)
    words = ", ".join(filter(None, [loaded.stamp, note]))
    stamp(picture, words)
    versions = [f"{package} {provenance.version(package)}" for package in PACKAGES]
    about = "; ".join([words, f"python {platform.python_version()}", *versions])
    no_date = {"CreationDate": None, "ModDate": None}
    picture.savefig(
        _path(loaded, f"{name}.pdf"), metadata={"Title": name, "Subject": about, **no_date}
    )
    png = {"Title": name, "Description": about, "Comment": alt}
    picture.savefig(_path(loaded, f"{name}.png"), metadata=png)
    if get_ipython() is not None:
        display(picture, metadata={"image/png": {"alt": alt}})
        plt.close(picture)


def save_table(frame: pd.DataFrame, loaded: "Loaded | Judged", name: str = "") -> Path:
    """Write a table to figures/PROFILE/NAME.csv and return the path."""
    path = _path(loaded, f"{name or loaded.name}.csv")
    frame.to_csv(path, float_format="%.4f")
    return path


def described(picture: Figure) -> str:
    """Describe a figure by its panels: their titles, axes and legends."""
    sentences = []
    for ax in picture.axes:
        x, y = ax.get_xlabel(), ax.get_ylabel()
        axes = f"{y} against {x}" if x and y else x or y
        sentence = ": ".join(filter(None, [ax.get_title().replace("\n", ", "), axes]))
        if legend := ax.get_legend():
            sentence += "; " + ", ".join(text.get_text() for text in legend.get_texts())
        sentences.append(sentence.replace("$", "").replace("\\", ""))
    return ". ".join(filter(None, sentences)) + "."


def _path(loaded: "Loaded | Judged", name: str) -> Path:
    folder = figures_path() / loaded.scale.profile
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name
