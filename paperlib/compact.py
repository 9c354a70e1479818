"""`paperlib.extras.compact`, under its short name."""

from paperlib.extras.compact import *  # noqa: F403
