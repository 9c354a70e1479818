"""Moved: paperlib.store.records."""

import sys

from paperlib.store import records

sys.modules[__name__] = records
