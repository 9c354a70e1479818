"""Sweeps: find missing runs, execute them in parallel, and draw figures in batch.

A run is done once, however many sweeps, processes and hosts share a store. The process that trains
it has claimed it, and others wait for its record. A run whose process dies is tried again from its
checkpoint. A run whose loss is not finite, that lacks memory or whose process dies again and again
is noted as failed, and is run again only on request. Other errors are raised each time.
"""

from paperlib.sweep.run import SweepError, collect, execute  # noqa: F401
from paperlib.sweep.states import missing, states, unique  # noqa: F401
