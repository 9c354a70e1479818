"""Several runs that take turns on one device."""

import gc
import math
import weakref
from contextlib import nullcontext

import pytest
import recording
import torch
from recording import BASE, MAKE_LOOP, PRUNING, SETTINGS
from small import numbers

from benchmarks.gpu import run_together
from paperlib import training
from paperlib.config import FilterPruning
from paperlib.extras import fast
from paperlib.extras.fast import graphs, together
from paperlib.extras.fast.convolutions import QuickLoop
from paperlib.extras.fast.graphs import Replays
from paperlib.runs import Store
from paperlib.store import checkpoints, lease
from paperlib.training import run

captured = recording.captured  # a fixture
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


TOGETHER = ("filters", "dropout", "gaussian", "residual")


@pytest.mark.parametrize("with_graphs", [False, True])
def test_together_as_alone(with_graphs, request, monkeypatch):
    if with_graphs:
        request.getfixturevalue("captured")
    monkeypatch.setattr(graphs, "STEPS", 2)  # of the 4 or 5 of an epoch here
    alone = [numbers(SETTINGS[name]) for name in TOGETHER]
    before = torch.get_rng_state()
    records = run_together([SETTINGS[name] for name in TOGETHER], device="cpu")
    for record, rows in zip(records, alone, strict=True):
        assert record.epochs.drop(columns="seconds").equals(rows)
    assert torch.get_rng_state().equal(before)


def launching(name, monkeypatch) -> str:
    """Whose steps were launched, in order: two runs of one epoch of four steps."""
    order, real = [], Replays.__call__

    def noted(replays, function, *key):
        if key[0] == "train":
            order.append(id(replays))
        real(replays, function, *key)

    monkeypatch.setattr(Replays, "__call__", noted)
    monkeypatch.setattr(graphs, "STEPS", 2)
    config = SETTINGS[name].with_(epochs=1, train_per_class=6, batch=16)
    run_together([config.with_(seed=seed) for seed in range(2)], device="cpu")
    names = {each: str(i) for i, each in enumerate(dict.fromkeys(order))}
    return "".join(names[each] for each in order)


@pytest.mark.parametrize(("name", "expected"), [("plain", "00110011"), ("dropout", "00001111")])
def test_steps_take_turns(name, expected, captured, monkeypatch):
    assert launching(name, monkeypatch) == expected


def test_all_stop_when_the_time_is_up(tmp_path):

    store, seeds = Store(tmp_path, tmp_path / "none"), [BASE.with_(seed=i) for i in range(2)]
    alone = [numbers(config) for config in seeds]
    for epochs in (1, 2):  # one more each time
        stopped = run_together(seeds, store, "cpu", until=0.0)
        assert [type(each) for each in stopped] == [checkpoints.Stopped] * 2
        assert [checkpoints.progress(tmp_path, c.identity) for c in seeds] == [epochs] * 2
    assert not store.failures()
    done = run_together(seeds, store, "cpu")
    for record, rows in zip(done, alone, strict=True):
        assert record.epochs.drop(columns="seconds").equals(rows)


class Stream:
    """It is busy, except at every fifth question."""

    device, asked = None, 0

    def query(self):
        self.asked += 1
        return self.asked % 5 == 0


def test_a_run_that_waits_leaves_the_thread_to_others(captured, monkeypatch):
    """It continues when its stream is done; between launches it does not ask."""
    stream, config = Stream(), BASE.with_(epochs=2)
    monkeypatch.setattr(fast, "new_stream", lambda device: stream)
    monkeypatch.setattr(fast, "on_stream", nullcontext)
    monkeypatch.setattr(graphs, "STEPS", 1)
    turns = together.by_turns(config, None, "cpu")
    calls = 0
    while True:
        try:
            next(turns)
        except StopIteration as end:
            record = end.value
            break
        calls += 1
    assert len(record.epochs) == 2
    assert stream.asked == 2 * 5
    launches = math.ceil(10 * BASE.train_per_class / BASE.batch)
    assert calls == 2 * launches + 2 * 4


def test_one_that_fails_leaves_the_others(tmp_path):

    store = Store(tmp_path, tmp_path / "none")
    bad = BASE.with_(learning_rate=1e30, optimizer="sgd")
    wrong = BASE.with_(pruning=FilterPruning((0.5,), ((1,),), "loudest"))
    first, second, third = run_together([bad, BASE, wrong], store, "cpu")
    assert isinstance(first, training.TrainingError)
    assert "loudest" in str(third)
    assert second.epochs.drop(columns="seconds").equals(numbers(BASE))
    assert BASE.identity in store
    assert bad.identity in store.failures()
    again = run_together([BASE], store, "cpu")
    assert again[0].provenance == second.provenance


def test_one_that_fails_holds_no_memory(monkeypatch, captured):
    models, alive = [], []
    real = training.make_loop

    def make_loop(config, model, *rest):
        models.append(weakref.ref(model))
        return real(config, model, *rest)

    monkeypatch.setattr(training, "make_loop", make_loop)
    numbers(BASE.with_(epochs=1))  # what is imported in a first run may stay in cycles with it
    models.clear()
    bad = BASE.with_(learning_rate=1e30, optimizer="sgd", pruning=PRUNING)
    look = [None, lambda moment: alive.append(models[0]() is not None)]
    gc.collect()
    gc.disable()
    try:
        first, second = run_together([bad, BASE], None, "cpu", callbacks=look)
    finally:
        gc.enable()
    assert isinstance(first, training.TrainingError)
    assert len(second.epochs) == BASE.epochs
    assert len(models) == 2
    assert not alive[-1]


def test_one_without_memory_beside_others_is_done_after_them(tmp_path, monkeypatch):

    class Short(QuickLoop):
        """With a second run there is no memory for the first's third epoch."""

        def launch(self, *rest):
            going.append(self)
            if len(ended) < 1 and self is going[0] and going.count(self) > 2:
                raise torch.OutOfMemoryError("out of memory")
            return (yield from super().launch(*rest))

    def make_loop(config, model, optimizer, pruner, device, fast):
        loop = MAKE_LOOP(config, model, optimizer, pruner, device)
        return Short(model, optimizer, pruner, loop.autocast)

    configs = [BASE.with_(seed=seed) for seed in range(2)]
    alone = [numbers(config) for config in configs]
    monkeypatch.setattr(training, "make_loop", make_loop)
    store, going, ended = Store(tmp_path, tmp_path / "none"), [], []

    def note(moment):
        if moment.epoch == BASE.epochs - 1:
            ended.append(moment)

    records = run_together(configs, store, "cpu", callbacks=[note, note])
    for record, rows in zip(records, alone, strict=True):
        assert record.epochs.drop(columns="seconds").equals(rows)
    assert not store.failures()
    assert len({id(loop) for loop in going}) == 3
    going, ended = [], []
    (only,) = run_together([BASE.with_(seed=2)], store, "cpu")
    assert isinstance(only, torch.OutOfMemoryError)
    assert "out of memory" in store.failure(BASE.with_(seed=2).identity)


def test_stopped_together(tmp_path):

    def stop(moment):
        raise KeyboardInterrupt

    store, seeds = Store(tmp_path, tmp_path / "none"), [BASE.with_(seed=i) for i in range(3)]
    with pytest.raises(KeyboardInterrupt):
        run_together(seeds, store, "cpu", [None, stop, None])
    for config in seeds:
        with lease.claim(store.path, config.identity, wait=False):
            pass
    assert not store.failures()


@on_gpu
@pytest.mark.parametrize("name", ["plain", "dropout", "milestones"])
def test_streams_against_one_after_the_other(name):
    configs = [SETTINGS[name].with_(seed=seed) for seed in range(4)]
    together = run_together(configs, device="cuda", at_once=3, fast=True)
    for config, record in zip(configs, together, strict=True):
        alone = run(config, device="cuda", fast=True)
        assert record.epochs.train_loss[:2].to_numpy() == pytest.approx(
            alone.epochs.train_loss[:2].to_numpy(), rel=2e-2
        )
