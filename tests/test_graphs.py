"""Captured steps against the plain loop."""

import gc
import warnings
from contextlib import nullcontext
from unittest.mock import Mock

import pandas as pd
import pytest
import recording
import torch
from recording import BASE, CONV, SETTINGS, Recording, expected
from small import numbers

from paperlib import training
from paperlib.config import FilterPruning
from paperlib.extras.fast import graphs, loops, together
from paperlib.extras.fast.graphs import Replays
from paperlib.runs import Store
from paperlib.store import checkpoints
from paperlib.training import run

captured = recording.captured  # a fixture
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("name", SETTINGS)
def test_same_as_the_plain_loop(name, captured):
    rows = numbers(SETTINGS[name])
    assert captured.made > 0
    pd.testing.assert_frame_equal(rows, expected(SETTINGS[name]), rtol=1e-6)


def test_few_graphs(captured):
    """One for each size of a batch and one for the test images: no more by epoch, rate or event."""
    numbers(BASE.with_(epochs=8, milestones=(2, 4)))
    assert captured.made == 3
    captured.made = 0
    numbers(BASE.with_(epochs=12, pruning=FilterPruning((0.9,), (tuple(range(2, 10)),))))
    assert captured.made <= 6


def test_the_first_call_is_an_ordinary_one(monkeypatch):
    calls, replays = [], Replays(Recording)
    monkeypatch.setattr(Recording, "replay", lambda graph: calls.append("replayed"))

    def function():
        calls.append("called")

    for _ in range(3):
        replays(function, "a")
    assert calls == ["called", "called", "replayed", "replayed"]  # captured at the second
    replays(function, "b")
    assert calls[4:] == ["called"]
    replays.forget()  # what is done by now may need kernels that were never launched
    replays(function, "a")
    assert calls[5:] == ["called"]


@pytest.fixture
def pools(monkeypatch):
    """How many graphs each pool has: stands in for torch.cuda, with its rule for pools."""
    uses = {}

    class Graph:
        pool = None

        def capture_begin(self, pool, capture_error_mode):
            if uses.get(pool) == 0:
                raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
            self.begun = pool

        def capture_end(self):
            self.pool = self.begun
            uses[self.pool] = uses.get(self.pool, 0) + 1

        def replay(self):
            pass

        def __del__(self):
            if self.pool is not None:  # captured
                uses[self.pool] -= 1

    fakes = {"graph_pool_handle": lambda: 7, "CUDAGraph": Graph, "Event": Mock}
    fakes |= {"current_stream": lambda: 1, "default_stream": lambda: 0, "current_device": lambda: 0}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "zeros", lambda *args, **options: None)
    monkeypatch.setattr(graphs, "_last_turn", {})
    return uses


def test_the_pool_outlives_forgotten_graphs(pools):
    replays = Replays(graphs.CudaGraphs())
    for _ in range(2):
        for _ in range(3):
            replays(lambda: None, "a")
        assert pools == {7: 2}
        replays.forget()
        assert pools == {7: 1}
    del replays
    assert pools == {7: 0}


def test_no_garbage_is_collected_in_a_capture(pools, monkeypatch):
    capture, seen = graphs.CudaGraphs(), []
    for collects in (True, False):
        monkeypatch.setattr(gc, "isenabled", lambda collects=collects: collects)
        monkeypatch.setattr(gc, "disable", lambda: seen.append("off"))
        monkeypatch.setattr(gc, "enable", lambda: seen.append("on"))
        capture(lambda: seen.append("captured"))
    assert seen == ["off", "captured", "on", "off", "captured"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [(RuntimeError, graphs.CaptureError), (torch.OutOfMemoryError, torch.OutOfMemoryError)],
)
def test_captures_that_fail(error, raised, pools):
    with pytest.raises(raised, match="no such kernel") as caught:
        graphs.CudaGraphs()(Mock(side_effect=error("no such kernel")))
    assert type(caught.value) is raised
    assert gc.isenabled()
    assert together.is_fatal(caught.value) == (raised is graphs.CaptureError)
    assert together.is_fatal(torch.AcceleratorError("an illegal address"))
    assert not together.is_fatal(RuntimeError())


def test_what_is_random_in_graphs_takes_turns(monkeypatch):
    done = []

    class Event:
        def __init__(self):
            self.number = sum(word.startswith("record") for word in done)

        def record(self):
            done.append(f"record {self.number}")

        def wait(self):
            done.append(f"wait {self.number}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(graphs, "_last_turn", {})
    for index in (0, 0, 1, 0):
        with graphs.in_turn(torch.device("cuda", index)):
            done.append(f"launch {index}")
    words = "launch 0, record 0, wait 0, launch 0, record 1, launch 1, record 2, wait 1"
    assert done == f"{words}, launch 0, record 3".split(", ")


@pytest.mark.parametrize(("name", "turns"), [("dropout", CONV.epochs), ("filters", 0)])
def test_only_dropout_takes_turns(name, turns, captured, monkeypatch):
    taken = []
    monkeypatch.setattr(graphs, "in_turn", lambda device: nullcontext(taken.append(device)))
    numbers(SETTINGS[name])
    assert taken == [torch.device("cpu")] * turns


def test_a_run_that_was_stopped(captured, tmp_path, monkeypatch):
    def stop(moment):
        if moment.epoch == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "SHARE", 1e9)
    config, store = SETTINGS["residual"], Store(tmp_path, tmp_path / "none")
    with pytest.raises(KeyboardInterrupt):
        numbers(config, store=store, callback=stop)
    record = run(config, store, "cpu")
    assert record.provenance["resumed"][0]["epochs"] == 3
    rows = record.epochs.drop(columns="seconds")
    pd.testing.assert_frame_equal(rows, expected(config), rtol=1e-6)


@pytest.mark.parametrize(
    ("device", "model", "fast", "plain", "expected"),
    [
        ("cuda", "vgg11_bn", True, "0", "CapturedLoop"),
        ("cuda", "vgg11_bn", False, "0", "PlainLoop"),
        ("cuda", "vgg11_bn", True, "1", "PlainLoop"),
        ("cuda", "tests.test_graphs:network", True, "0", "PlainLoop"),
        ("cpu", "vgg11_bn", False, "0", "QuickLoop"),
        ("cpu", "vgg11_bn", True, "0", "QuickLoop"),
        ("cpu", "tests.test_graphs:network", False, "0", "QuickLoop"),
        ("cpu", "vgg11_bn", True, "1", "PlainLoop"),
        ("mps", "vgg11_bn", True, "0", "PlainLoop"),
    ],
)
def test_which_loop_is_chosen(device, model, fast, plain, expected, monkeypatch):
    monkeypatch.setattr(graphs, "CudaGraphs", lambda: Recording)
    monkeypatch.setenv("PAPERLIB_PLAIN", plain)
    network = training.build(BASE)
    optimizer = training.make_optimizer(BASE, network)
    config = BASE.with_(model=model)
    loop = training.make_loop(config, network, optimizer, None, torch.device(device), fast)
    assert type(loop).__name__ == expected


@pytest.mark.parametrize("native", [True, False])
def test_emulated_bfloat16_is_said(native, monkeypatch):
    monkeypatch.setattr(loops, "native_bfloat16", lambda device: native)
    config = BASE.with_(model="conv4", precision="bfloat16", epochs=1, train_per_class=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(config, device="cpu")
    assert any("emulates bfloat16" in str(w.message) for w in caught) is not native


@on_gpu
@pytest.mark.parametrize("name", SETTINGS)
def test_cuda_graphs_against_the_plain_loop(name):
    config = SETTINGS[name].with_(epochs=max(4, SETTINGS[name].epochs))
    rows = run(config, device="cuda", fast=True).epochs
    plain = run(config, device="cuda").epochs
    assert rows.removed.equals(plain.removed)
    early = slice(0, 2)  # kernels chosen otherwise round otherwise, and that grows
    assert rows.train_loss[early].to_numpy() == pytest.approx(
        plain.train_loss[early].to_numpy(), rel=2e-2, nan_ok=True
    )
    assert rows.train_loss.iloc[-1] == pytest.approx(plain.train_loss.iloc[-1], rel=0.3)
