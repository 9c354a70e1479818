"""What runs will cost, in seconds and bytes, from what the store has measured. Imports no torch."""

import math
import platform
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from paperlib.config import Config, to_dict
from paperlib.packs import Entry
from paperlib.runs import Store, StoreError

# Of ten classes at full width; they go with the width's square.
PARAMETERS = {
    "conv4": 1.25e6,
    "vgg11_bn": 9.23e6,
    "vgg19_bn": 139.6e6,
    "resnet18": 11.2e6,
    "resnet20": 0.27e6,
    "resnet56": 0.85e6,
}
RECORD, ROW = 12_000, 110  # bytes of a record, and of each of its epochs
SLACK = 4_000_000
LONG = 600.0  # seconds of work, from which on it is worth a hint


class Speeds:
    """Seconds an epoch takes, by what makes runs alike: data, network, width, batch, precision."""

    def __init__(self) -> None:
        self._measured: dict[tuple, list[float]] = defaultdict(list)

    def observe(self, config: dict, seconds: float) -> None:
        """Take in a measured epoch of a configuration as `config.to_dict` gives it."""
        for kind in _kinds(config):
            self._measured[kind].append(seconds)

    def epoch(self, config: Config) -> float:
        """Expected seconds an epoch; NaN where nothing alike was measured."""
        for kind in _kinds(to_dict(config)):
            if kind in self._measured:
                return sum(self._measured[kind]) / len(self._measured[kind])
        return math.nan


def speeds(store: Store, device: str | None = "auto") -> Speeds:
    """From the store's own records, those made on such a device; None takes all devices.

    What lies in results/ was measured on other machines and does not count.
    """
    expected = _expected(device)
    measured = Speeds()
    for entry in store.find(store.own()).values():
        if isinstance(entry, Entry) and "seconds" in entry.columns:
            config, made_on = entry.content["config"], entry.content["provenance"].get("device")
            if expected is None or made_on in (None, expected):
                epochs = config.get("epochs", Config.epochs)
                measured.observe(config, float(entry.columns["seconds"].sum()) / epochs)
    return measured


def native_bfloat16() -> bool:
    """Whether this processor computes in bfloat16, by what Linux says of it."""
    with suppress(OSError):
        flags = re.search(r"^flags.*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return flags is not None and bool({"avx512_bf16", "amx_bf16"} & set(flags[0].split()))
    return False


def hint(configs: Iterable[Config], seconds: float, device: str | None) -> str | None:
    """What would make runs of so many seconds quicker on this device, if anything, for people."""
    if not seconds > LONG or _expected(device) != "cpu" or not native_bfloat16():
        return None
    if all(config.precision == "bfloat16" for config in configs):
        return None
    return "this processor computes in bfloat16: --precision bfloat16 takes about half the time"


def _expected(device: str | None) -> str | None:
    if device is None:
        return None
    if device != "auto":
        return device.partition(":")[0]
    if list(Path("/dev").glob("nvidia[0-9]*")):
        return "cuda"
    return "mps" if (platform.system(), platform.machine()) == ("Darwin", "arm64") else "cpu"


def _kinds(config: dict) -> list[tuple]:
    """Of what kind a run is, the narrowest first."""
    names = ("train_per_class", "test_per_class", "model", "width", "batch", "augment", "precision")
    wide = (
        config.get("data", Config.data).rpartition("/")[2],
        *(config.get(name, getattr(Config, name)) for name in names),
        str(config.get("flatness")),
    )
    parts = (config.get("pruning") or {}).get("type"), (config.get("noise") or {}).get("kind")
    return [(*wide, *parts), wide]


def disk(configs: Iterable[Config], at_once: int) -> int:
    """Bytes that runs will take at most: their records, and checkpoints of those at once.

    A checkpoint holds weights and an optimizer's two averages; a new one is written beside the old.
    """
    configs = list(configs)
    records = 0
    for config in configs:
        records += RECORD + ROW * config.epochs
        if config.flatness is not None:
            points = config.flatness.directions * len(config.flatness.epsilons)
            records += 8 * (2 * points + config.flatness.eigenvalues)
    checkpoints = sorted(
        (2 * 3 * 4 * PARAMETERS.get(c.model, 0) * c.width**2 for c in configs), reverse=True
    )
    return int(records + sum(checkpoints[:at_once])) + SLACK


def free(path: Path) -> int:
    """Bytes that are free where `path` is or will be."""
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def check_disk(configs: Iterable[Config], at_once: int, path: Path) -> None:
    """Raise StoreError where the disk is too small for the runs."""
    needed, there = disk(configs, at_once), free(path)
    if there < needed:
        raise StoreError(
            f"the disk of {path} is too small: these runs need {size(needed)}, {size(there)} free"
        )


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds for people; "unknown" for NaN."""
    if math.isnan(seconds):
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
