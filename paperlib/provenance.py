"""Moved: paperlib.store.provenance."""

import sys

from paperlib.store import provenance

sys.modules[__name__] = provenance
