"""Checkpoints: a run that was stopped ends with the numbers of one that never was."""

import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import torch

from paperlib import training
from paperlib.config import Config, FilterPruning, Flatness, Noise, WeightPruning
from paperlib.runs import Store, StoreError
from paperlib.store import checkpoints
from paperlib.store.checkpoints import Checkpoint, UnusableCheckpoint
from paperlib.training import TrainingError, run
from tests import small

VGG = small.VGG.with_(train_per_class=3, test_per_class=3, epochs=5, batch=8)
CONV = VGG.with_(model="conv4", optimizer="sgd", momentum=0.9, weight_decay=0.01)
EVENTS = ((1, 3), (1, 2, 3))


def pruned(score: str = "l2", target: str = "smallest", **changes) -> Config:
    return VGG.with_(pruning=FilterPruning((0.3, 0.9), EVENTS, score, target), **changes)


def noisy(kind: str, passes: int) -> Config:
    """Five passes an epoch: the noise of an event crosses the ends of several epochs."""
    pruning = FilterPruning((0.3, 0.5), ((1, 4), (0, 3)), "activation", "largest", norm=False)
    return VGG.with_(pruning=pruning, noise=Noise(kind, passes, evaluation_batch=16))


CONFIGS = {
    "adam": VGG,
    "dropout": CONV.with_(dropout=(0.25, 0.5), augment=True, milestones=(2,)),
    "l1": pruned("l1", "largest", optimizer="sgd", momentum=0.9),
    "l2": pruned("l2", weight_decay=0.01, milestones=(1, 3)),
    "activation": pruned("activation", histograms=True),
    "random": pruned("l2", "random"),
    "residual": pruned("activation", model="resnet20", width=1 / 4),
    "scratch": VGG.with_(pruning=FilterPruning((0.3, 0.9), scratch=True)),
    "weights": CONV.with_(pruning=WeightPruning(("dense",), (0.5,), (0, 2, 4)), histograms=True),
    "random weights": VGG.with_(pruning=WeightPruning(("classifier.2",), (0.5,), (1, 3), "random")),
    "zeroing": noisy("zeroing", 12),
    "gaussian": noisy("gaussian", 12),
    "restored": noisy("restored", 13),
    "long noise": noisy("restored", 10**6),
    "flatness": pruned(
        flatness=Flatness(2, images=8, eigenvalues=3, directions=2, reach=0.02), batch=30
    ),
    "bfloat16": pruned(precision="bfloat16"),
}


class Stop(Exception):
    """What a test's callback stops a run with."""


@pytest.fixture
def always(monkeypatch):
    """A checkpoint after every epoch."""
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "SHARE", np.inf)


def weights(moment) -> dict[str, np.ndarray]:
    return {f"epoch {moment.epoch}": next(moment.model.parameters()).detach().numpy().copy()}


def arrays(record) -> list[tuple]:
    return [(name, array.dtype, array.tobytes()) for name, array in record.arrays.items()]


def same(a, b) -> bool:
    rows, others = (record.epochs.drop(columns="seconds") for record in (a, b))
    pd.testing.assert_frame_equal(rows, others, check_exact=True)
    return arrays(a) == arrays(b)


def stopped_at(*epochs: int):
    """A callback that stops the run the first time it sees each of these epochs."""
    left = set(epochs)

    def callback(moment):
        if moment.epoch in left:
            left.remove(moment.epoch)
            raise Stop
        return weights(moment)

    return callback


def stop(config: Config, store: Store, epoch: int) -> Path:
    """Leave the checkpoint of a run stopped in this epoch."""
    with pytest.raises(Stop):
        run(config, store, "cpu", stopped_at(epoch))
    return checkpoints.file(store.path, config.identity)


@pytest.mark.parametrize("name", CONFIGS)
def test_stopped_in_every_epoch(name, store, always):
    config = CONFIGS[name]
    expected = run(config, None, "cpu", weights)
    callback = stopped_at(*range(config.epochs))
    for epoch in range(config.epochs):
        with pytest.raises(Stop):
            run(config, store, "cpu", callback)
        done = epoch if epoch else None
        assert checkpoints.progress(store.path, config.identity) == done
        torch.manual_seed(epoch)  # what the next process would start with is another state
    resumed = run(config, store, "cpu", callback)
    assert same(resumed, expected)
    assert [part["epochs"] for part in resumed.provenance["resumed"]] == [1, 2, 3, 4]
    assert not list((store.path / "checkpoints").iterdir())


def test_tensors_keep_their_memory_format(store, always):
    """Fused optimizers go through weights and averages in order of memory."""
    config = pruned("activation")
    stop(config, store, 2)
    rows, model, optimizer, pruner = restored(config, store)
    assert [row["epoch"] for row in rows] == [0, 1]
    assert pruner.activation.passes == 2 * 4
    for parameter in model.parameters():
        step, *averages = (optimizer.state[parameter][k] for k in ("step", "exp_avg", "exp_avg_sq"))
        assert step == 2 * 4
        assert parameter.dim() < 4 or parameter.is_contiguous(memory_format=torch.channels_last)
        assert all(average.stride() == parameter.stride() and average.any() for average in averages)


def test_not_due_yet(store, monkeypatch):
    assert not stop(VGG, store, 4).exists()
    now, saved = [100.0], []  # a save that takes a second is 2 % of the next 50
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])

    def save(self, *state):
        saved.append(now[0])
        now[0] += 1.0

    monkeypatch.setattr(Checkpoint, "_save", save)
    checkpoint = Checkpoint(store.path, VGG, None, {})
    for _ in range(1000):
        now[0] += 1.0
        checkpoint.save_when_due(None, [], {})
    assert saved[0] == 110.0
    assert set(np.diff(saved)) == {51.0}


KILLED = """
import os, random, signal, sys, time
from paperlib import training
from paperlib.store import checkpoints
from paperlib.runs import Store
from tests.store.test_checkpoints import CONFIGS  # it sets one thread

checkpoints.SECONDS, checkpoints.SHARE = 0.0, float("inf")
path, config = sys.argv[1], CONFIGS["gaussian"].with_(epochs=60)
store, chance = Store(path), random.Random(7)
training.run(config, Store(path + "-unbroken"), "cpu")
for _ in range(10):
    before = checkpoints.progress(path, config.identity) or 0
    child = os.fork()
    if not child:
        training.run(config, store, "cpu")
        os._exit(0)
    further = chance.choice([0, 1, 1, 2])
    while (checkpoints.progress(path, config.identity) or 0) < before + further:
        assert os.waitpid(child, os.WNOHANG)[0] == 0
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
training.run(config, store, "cpu")
"""


def test_ten_kills_at_random_moments(store, tmp_path):
    command = [sys.executable, "-c", KILLED, str(store.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (record,) = store.records()
    assert same(record, Store(tmp_path / "runs-unbroken").read(record.run))
    assert len(record.epochs) == 60
    assert len({part["epochs"] for part in record.provenance["resumed"]}) > 4
    assert not list((store.path / "checkpoints").iterdir())


def test_killed_between_record_and_removal(store, always, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "discard", lambda *arguments: None)
        run(VGG, store, "cpu")
    assert checkpoints.progress(store.path, VGG.identity) == 4
    run(VGG, store, "cpu")
    assert not list((store.path / "checkpoints").iterdir())


def restored(config: Config, store: Store, **made_of: str):
    """The rows of a checkpoint, and the parts of a run as it has them."""
    model = training.build(config).to(memory_format=torch.channels_last)
    parts = model, training.make_optimizer(config, model), training.make_pruner(config, model)
    rows, _ = Checkpoint(store.path, config, None, made_of).restore(parts)
    return rows, *parts


def afresh(config: Config, store: Store, reason: str) -> None:
    """The checkpoint is removed with a warning that names it, and the run starts anew."""
    seen = []
    with pytest.warns(UserWarning, match=f"{config.identity}.safetensors.*{reason}"):
        record = run(config, store, "cpu", lambda moment: seen.append(moment.epoch))
    assert seen == list(range(config.epochs))
    assert "resumed" not in record.provenance
    assert same(record, run(config, None, "cpu"))
    assert not list((store.path / "checkpoints").iterdir())


def test_cut_or_changed_anywhere(store, always):
    path = stop(VGG, store, 2)
    content = path.read_bytes()
    (head,) = struct.unpack("<Q", content[:8])
    end = len(content)
    for length in (0, 4, 8, 200, head - 5, head + 8, head + 9, end // 2, end * 9 // 10, end - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UnusableCheckpoint, match=str(path)):
            restored(VGG, store)
    epochs = content.index(b'epochs\\": 2') + len(b'epochs\\": ')
    for place in [epochs, *random.Random(3).sample(range(head + 8, end), 10)]:
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(UnusableCheckpoint, match="checksum"):
            restored(VGG, store)
    path.write_bytes(bytes(end))
    assert checkpoints.progress(store.path, VGG.identity) is None
    afresh(VGG, store, "")


@pytest.mark.parametrize("name", ["run", "version", "paperlib", "torch", "data", "source"])
def test_of_another_run_version_data_or_code(name, store, always, monkeypatch):
    if name == "run":
        other = VGG.with_(seed=1)
        stop(other, store, 2).replace(checkpoints.file(store.path, VGG.identity))
        return afresh(VGG, store, other.identity)
    inputs = Checkpoint._inputs
    theirs = property(lambda self: inputs.fget(self) | {name: "99"})
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "_inputs", theirs)
        stop(VGG, store, 2)
    if name == "source":  # VGG names no code, so it has none to compare
        restored(VGG, store)
        with pytest.raises(UnusableCheckpoint, match=r"source.*99.*abc"):
            restored(VGG, store, source="abc")
    else:
        afresh(VGG, store, f"{name}.*99")


def changing(num_classes: int, in_channels: int):
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, num_classes, bias=changing.bias)
    )


@pytest.mark.parametrize("bias", [True, False])
def test_of_a_network_that_changed(bias, store, always, monkeypatch):
    config = VGG.with_(model=f"{__name__}:changing")
    monkeypatch.setattr(changing, "bias", bias, raising=False)
    stop(config, store, 2)
    changing.bias = not bias
    afresh(config, store, "does not fit")


def test_a_full_disk_is_an_error_that_keeps_the_last_checkpoint(store, always, monkeypatch):
    real = checkpoints.write_whole

    def full(path, content):
        if checkpoints.progress(store.path, VGG.identity) == 2:
            raise StoreError(f"cannot write {path}: no space left on device")
        return real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_whole", full)
        with pytest.raises(StoreError, match="no space left"):
            run(VGG, store, "cpu")
    assert checkpoints.progress(store.path, VGG.identity) == 2
    assert store.failure(VGG.identity) is None
    assert same(run(VGG, store, "cpu"), run(VGG, None, "cpu"))


@pytest.mark.parametrize(
    ("error", "left"), [(TrainingError("nan"), None), (torch.OutOfMemoryError("full"), 2)]
)
def test_what_a_failed_run_leaves(error, left, store, always):
    """Nothing if its numbers failed; its checkpoint if the machine failed."""
    seen = []

    def fails(moment):
        seen.append(moment.epoch)
        if len(seen) == 3:
            raise error

    with pytest.raises(type(error)):
        run(VGG, store, "cpu", fails)
    assert checkpoints.progress(store.path, VGG.identity) == left
    assert store.failure(VGG.identity) is not None
    assert same(run(VGG, store, "cpu", fails), run(VGG, None, "cpu"))
    assert seen == [0, 1, 2, *range(left or 0, VGG.epochs)]


def test_a_description_needs_no_torch_and_no_pickle(store, always):
    content, run_ = stop(VGG, store, 3).read_bytes(), VGG.identity
    imports = "import sys; from paperlib.store.checkpoints import progress"
    code = f"{imports}; print(progress(*sys.argv[1:]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(store.path), run_]
    assert subprocess.check_output(command, text=True) == "3 False\n"
    assert checkpoints.progress(store.path, "0" * 16) is None
    about = checkpoints.describe(store.path, run_)
    assert (about["run"], about["epochs"], about["device"]) == (run_, 3, "cpu")
    assert torch.__version__.startswith(about["torch"])
    tensors = safetensors.numpy.load(content)
    assert tensors["row.train_loss"].dtype == np.float64
    assert tensors["row.epoch"].tolist() == [0, 1, 2]
