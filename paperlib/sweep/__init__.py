"""Sweeps: which runs are missing, their execution in parallel, and figures in batch.

A run is done once, however many sweeps, processes and hosts share a store: whoever trains it has
claimed it, and others wait for its record. A run whose process dies is tried again from its
checkpoint. A run that fails is noted, and left alone until somebody asks for it again.
"""

from paperlib.sweep.run import SweepError, collect, execute  # noqa: F401
from paperlib.sweep.states import missing, states, unique  # noqa: F401
