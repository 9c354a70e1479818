"""Several runs that take turns on one device."""

import gc
import math
import weakref
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import recording
import torch
from recording import BASE, PRUNING, SETTINGS
from small import numbers

from benchmarks.gpu import run_together
from paperlib import training
from paperlib.extras.fast import graphs, loops, together
from paperlib.extras.fast.convolutions import QuickLoop
from paperlib.extras.fast.graphs import Replays
from paperlib.loop import finish
from paperlib.runs import Store
from paperlib.store import checkpoints, lease
from paperlib.training import run

captured = recording.captured  # a fixture
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TOGETHER = ("filters", "dropout", "gaussian", "residual")
SEEDS = [BASE.with_(seed=seed) for seed in range(3)]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path, tmp_path / "none")


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


@pytest.mark.parametrize(("name", "expected"), [("plain", "00110011"), ("dropout", "00001111")])
def test_steps_take_turns(name, expected, captured, monkeypatch):
    """Two runs of one epoch of four steps, in the order of launches."""
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
    assert "".join(names[each] for each in order) == expected


def test_all_stop_when_the_time_is_up(store):
    for epochs in (1, 2):  # one more each time
        stopped = run_together(SEEDS, store, "cpu", until=0.0)
        assert [type(each) for each in stopped] == [checkpoints.Stopped] * 3
        assert [checkpoints.progress(store.path, c.identity) for c in SEEDS] == [epochs] * 3
    assert not store.failures()
    for record, config in zip(run_together(SEEDS, store, "cpu"), SEEDS, strict=True):
        assert record.epochs.drop(columns="seconds").equals(numbers(config))


def test_a_run_that_waits_leaves_the_thread_to_others(captured, monkeypatch):
    """It continues when its stream is done; between launches it does not ask."""
    stream = Mock()
    stream.query.side_effect = [False, False, False, False, True] * 2
    monkeypatch.setattr(loops, "new_stream", lambda device: stream)
    monkeypatch.setattr(loops, "on_stream", nullcontext)
    monkeypatch.setattr(graphs, "STEPS", 1)
    calls = len(list(together.by_turns(BASE.with_(epochs=2), None, "cpu")))
    launches = math.ceil(10 * BASE.train_per_class / BASE.batch)
    assert stream.query.call_count == 2 * 5
    assert calls == 2 * launches + 2 * 4


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


@pytest.mark.parametrize("alone", [False, True])
def test_one_without_memory_may_be_tried_again_unless_it_was_alone(alone, store, monkeypatch):
    launch = Mock(side_effect=torch.OutOfMemoryError("out of memory"))
    monkeypatch.setattr(QuickLoop, "launch", launch)
    error = finish(together.by_turns(BASE, store, "cpu", alone=alone))
    assert isinstance(error, torch.OutOfMemoryError)
    assert (BASE.identity in store.failures()) == alone


def test_stopped_together(store):
    def stop(moment):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_together(SEEDS, store, "cpu", [None, stop, None])
    for config in SEEDS:
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
