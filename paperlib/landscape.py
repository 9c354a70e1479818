"""The former place of the frames in `measures`."""

from paperlib.measures import RISE, delta_w, rises, spectra, tic, unperturbed
from paperlib.measures import flatness as measures

__all__ = ["RISE", "delta_w", "measures", "rises", "spectra", "tic", "unperturbed"]
