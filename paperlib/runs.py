"""The run store's names for users; they are defined in `paperlib.store`."""

from paperlib.store.paths import default_path, figures_path, results_path  # noqa: F401
from paperlib.store.records import DamagedRecord, RunRecord, StoreError  # noqa: F401
from paperlib.store.store import Mismatch, Store  # noqa: F401
