"""Sweeps: find missing runs, execute them in parallel, and draw figures in batch.

A run is done once, however many sweeps, processes and hosts share a store. The process that trains
it has claimed it, and others wait for its record. A run whose process dies is tried again from its
checkpoint. A run that fails is noted. It is run again only on request.
"""

from paperlib.sweep.run import SweepError, collect, execute  # noqa: F401
from paperlib.sweep.states import missing, states, unique  # noqa: F401
