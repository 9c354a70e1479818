"""Moved: paperlib.store.archive."""

import sys

from paperlib.store import archive

sys.modules[__name__] = archive
