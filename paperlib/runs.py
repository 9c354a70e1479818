"""The run store's names for users; they are defined in `paperlib.store`."""

from paperlib.store.paths import default_path, figures_path, results_path  # noqa: F401
from paperlib.store.records import (  # noqa: F401  # noqa: F401
    DamagedRecord,
    RunRecord,
    StoreError,
    parameters_left,
    write_whole,
)
from paperlib.store.store import Mismatch, Store, epochs_frame, runs_frame  # noqa: F401
