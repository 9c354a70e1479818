"""Moved: paperlib.store.checkpoints."""

import sys

from paperlib.store import checkpoints

sys.modules[__name__] = checkpoints
