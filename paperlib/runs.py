"""The run store's names for users; they are defined in `paperlib.store`."""

from paperlib.store.paths import default_path as default_path
from paperlib.store.paths import figures_path as figures_path
from paperlib.store.paths import results_path as results_path
from paperlib.store.records import DamagedRecord as DamagedRecord
from paperlib.store.records import RunRecord as RunRecord
from paperlib.store.records import StoreError as StoreError
from paperlib.store.records import parameters_left as parameters_left
from paperlib.store.records import write_whole as write_whole
from paperlib.store.store import Mismatch as Mismatch
from paperlib.store.store import Store as Store
from paperlib.store.store import epochs_frame as epochs_frame
from paperlib.store.store import runs_frame as runs_frame
