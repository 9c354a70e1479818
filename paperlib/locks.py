"""Moved: paperlib.store.lease."""

import sys

from paperlib.store import lease

sys.modules[__name__] = lease
