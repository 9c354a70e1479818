"""Captured steps against the plain loop.

On a CPU CUDA graphs are stood in for by `Recording`, which is as strict as they are: it writes down
each operation with the very tensors it read and wrote, and does those again, without any Python
between them; and it refuses what a capture refuses.
"""

import gc
import math
import warnings
import weakref
from contextlib import nullcontext

import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paperlib import graphs, training
from paperlib.config import Config, FilterPruning, Flatness, Noise, WeightPruning
from paperlib.graphs import CapturedLoop, Replays
from paperlib.training import run, run_together

torch.set_num_threads(1)

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
MAKE_LOOP = training.make_loop
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Recording(TorchDispatchMode):
    """A graph of a function, as on a GPU, but executed once when it is made."""

    made = 0

    def __init__(self, function):
        super().__init__()
        self.operations, self.fresh = [], True
        Recording.made += 1
        with self:
            function()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in WAITS:
            raise RuntimeError(f"{name} waits for the device within a capture")
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        if self.fresh:  # executed when it was made
            self.fresh = False
            return
        for function, args, kwargs, out in self.operations:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def captured(monkeypatch):
    """All runs by captured loops; gives what makes their graphs, which counts them."""

    def make_loop(config, model, optimizer, pruner, device, fast):
        loop = MAKE_LOOP(config, model, optimizer, pruner, device)
        return CapturedLoop(model, optimizer, pruner, loop.autocast, Recording)

    monkeypatch.setattr(training, "make_loop", make_loop)
    monkeypatch.setattr(Recording, "made", 0)
    return Recording


BASE = Config(
    data="digits",
    train_per_class=5,
    test_per_class=6,
    width=1 / 16,
    epochs=5,
    batch=16,
    learning_rate=0.01,
)
CONV = BASE.with_(model="conv4", optimizer="sgd", momentum=0.9, weight_decay=0.01)
PRUNING = FilterPruning((0.3, 0.3, 0.3, 0.9), ((1,), (1, 2), (2,), (1, 2, 3)), target="largest")
ALL = ((1, 2), (1, 2), (2,), (1, 3))
PLAIN_NORM = FilterPruning(PRUNING.fractions, PRUNING.epochs, target="largest", norm=False)
SETTINGS = {
    "plain": BASE,
    "milestones": BASE.with_(milestones=(2, 3)),
    "sgd": BASE.with_(optimizer="sgd", momentum=0.9, weight_decay=0.01, augment=True),
    "filters": BASE.with_(pruning=PRUNING),
    "scratch": BASE.with_(pruning=FilterPruning((0.3, 0.9), scratch=True)),
    "residual": BASE.with_(  # of 5 batches: the 10th pass, which is observed, ends an epoch
        model="resnet18",
        batch=10,
        pruning=FilterPruning((0.25, 0.4, 0.25, 0.9), ALL, "activation"),
    ),
    "many layers": BASE.with_(
        model="resnet20", width=0.5, pruning=FilterPruning((0.2,) * 18, ((1, 3),) * 18, "l1")
    ),
    "weights": CONV.with_(pruning=WeightPruning(("dense",), (0.9,), (1, 2, 3))),
    "dropout": CONV.with_(dropout=(0.25, 0.5), augment=True),
    "zeroing": BASE.with_(pruning=PLAIN_NORM, noise=Noise("zeroing", 5, 16)),
    "gaussian": BASE.with_(pruning=PLAIN_NORM, noise=Noise("gaussian", 9, 16)),
    "restored": BASE.with_(pruning=PLAIN_NORM, noise=Noise("restored", 3, 16)),
    "flatness": BASE.with_(
        pruning=PRUNING, flatness=Flatness(3, images=8, eigenvalues=2, directions=1, step=0.2)
    ),
    "histograms": BASE.with_(pruning=PRUNING, histograms=True),
}


def numbers(config: Config, **options) -> pd.DataFrame:
    return run(config, device="cpu", **options).epochs.drop(columns="seconds")


def expected(config: Config) -> pd.DataFrame:
    """By the plain loop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_loop", MAKE_LOOP)
        patch.setenv("PAPERLIB_PLAIN", "1")
        return numbers(config)


@pytest.mark.parametrize("name", SETTINGS)
def test_same_as_the_plain_loop(name, captured):
    rows = numbers(SETTINGS[name])
    assert captured.made > 0
    pd.testing.assert_frame_equal(rows, expected(SETTINGS[name]), rtol=1e-6)


def test_few_graphs(captured):
    """One for each size of a batch and one for the test images: not one an epoch or an event.

    Nor one for each learning rate.
    """
    numbers(BASE.with_(epochs=8, milestones=(2, 4)))
    assert captured.made == 3
    captured.made = 0
    epochs = tuple(range(2, 10))
    numbers(BASE.with_(epochs=12, pruning=FilterPruning((0.9,), (epochs,))))
    assert captured.made <= 6


def test_what_waits_cannot_be_captured():
    def waits():
        float(torch.ones(1).sum())

    with pytest.raises(RuntimeError, match="waits"):
        Recording(waits)


def test_the_first_call_is_an_ordinary_one():
    made, calls = [], []

    class Counted:
        def __init__(self, function):
            made.append(function)

        def replay(self):
            calls.append("replayed")

    replays = Replays(Counted)
    for _ in range(3):
        replays(lambda: calls.append("called"), "a")
    assert calls == ["called", "replayed", "replayed"]
    assert len(made) == 1
    replays.forget()  # what is done by now may need kernels that were never launched
    for _ in range(2):
        replays(lambda: calls.append("called"), "a")
    assert calls[3:] == ["called", "replayed"]
    assert len(made) == 2
    replays(lambda: calls.append("called"), "b")
    assert calls[5:] == ["called"]


class Event:
    record = wait = lambda self: None


class Pools:
    """torch.cuda's graphs and pools as far as `CudaGraphs` needs them, with PyTorch's own rules."""

    def __init__(self, monkeypatch):
        self.uses = {}
        fakes = {"graph_pool_handle": lambda: 7, "CUDAGraph": lambda: Pools.OfOne(self)}
        fakes |= {"current_stream": lambda: 1, "default_stream": lambda: 0}
        fakes |= {"current_device": lambda: 0, "Event": Event}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch, "zeros", lambda *args, **options: None)
        monkeypatch.setattr(graphs, "_last_turn", {})

    class OfOne:
        pool = begun = None

        def __init__(self, pools):
            self.pools = pools

        def capture_begin(self, pool, capture_error_mode):
            if self.pools.uses.get(pool) == 0:
                raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
            self.begun = pool

        def capture_end(self):
            self.pool, self.begun = self.begun, None
            self.pools.uses[self.pool] = self.pools.uses.get(self.pool, 0) + 1

        def __del__(self):
            if self.pool is not None:  # captured
                self.pools.uses[self.pool] -= 1


def test_the_pool_outlives_forgotten_graphs(monkeypatch):
    pools, made = Pools(monkeypatch), []
    replays = Replays(graphs.CudaGraphs())
    monkeypatch.setattr(Pools.OfOne, "replay", lambda graph: made.append(graph.pool), raising=False)
    for _ in range(3):
        replays(lambda: None, "a")
    replays.forget()
    for _ in range(2):
        replays(lambda: None, "a")
    assert made == [7, 7, 7]
    assert pools.uses == {7: 2}
    del replays
    assert pools.uses == {7: 0}


def test_no_garbage_is_collected_in_a_capture(monkeypatch):
    Pools(monkeypatch)
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
def test_captures_that_fail(error, raised, monkeypatch):
    def fails():
        raise error("no such kernel")

    Pools(monkeypatch)
    capture = graphs.CudaGraphs()
    with pytest.raises(raised, match="no such kernel") as caught:
        capture(fails)
    assert type(caught.value) is raised
    assert gc.isenabled()
    assert training.spoils(caught.value) == (raised is graphs.CaptureError)
    assert training.spoils(torch.AcceleratorError("an illegal address"))
    assert not training.spoils(RuntimeError())


def test_graphs_need_a_stream(monkeypatch):
    Pools(monkeypatch)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: 0)
    with pytest.raises(RuntimeError, match="a stream of their own"):
        graphs.CudaGraphs()


def test_what_is_random_in_graphs_takes_turns(monkeypatch):
    done = []

    class Event:
        def __init__(self):
            self.number = sum(word == "record" for word, _ in done)

        def record(self):
            done.append(("record", self.number))

        def wait(self):
            done.append(("wait", self.number))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(graphs, "_last_turn", {})
    for index in (0, 0, 1, 0):
        with graphs.in_turn(torch.device("cuda", index)):
            done.append(("launch", index))
    first = [("launch", 0), ("record", 0), ("wait", 0), ("launch", 0), ("record", 1)]
    other = [("launch", 1), ("record", 2)]
    assert done == [*first, *other, ("wait", 1), ("launch", 0), ("record", 3)]


def test_the_next_turn_waits_for_one_that_failed(monkeypatch):
    done = []

    class Event:
        record = wait = lambda self: done.append(self)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(graphs, "_last_turn", {})
    with pytest.raises(ZeroDivisionError), graphs.in_turn(torch.device("cuda", 0)):
        raise ZeroDivisionError
    with graphs.in_turn(torch.device("cuda", 0)):
        done.append("launch")
    failed, waited, *rest = done
    assert failed is waited
    assert rest[0] == "launch"


@pytest.mark.parametrize(("name", "turns"), [("dropout", CONV.epochs), ("filters", 0)])
def test_only_dropout_takes_turns(name, turns, captured, monkeypatch):
    taken = []
    monkeypatch.setattr(graphs, "in_turn", lambda device: nullcontext(taken.append(device)))
    numbers(SETTINGS[name])
    assert taken == [torch.device("cpu")] * turns


def test_a_run_that_was_stopped(captured, tmp_path, monkeypatch):
    from paperlib import checkpoints
    from paperlib.runs import Store

    class Stopped(Exception):
        pass

    def stop(moment):
        if moment.epoch == 3:
            raise Stopped

    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "SHARE", 1e9)
    config, store = SETTINGS["residual"], Store(tmp_path, tmp_path / "none")
    with pytest.raises(Stopped):
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


# Several at once

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


def test_the_next_begins_when_one_is_done():
    """Two at any time, in the order given: not in bundles that wait for their slowest."""
    lengths, seen = (4, 1, 1, 1, 2), []
    configs = [BASE.with_(epochs=n, seed=i) for i, n in enumerate(lengths)]
    notes = [lambda moment, i=i: seen.append(i) for i in range(len(configs))]
    records = run_together(configs, None, "cpu", notes, at_once=2)
    assert [len(record.epochs) for record in records] == list(lengths)
    begun = [seen.index(i) for i in range(5)]
    assert begun == sorted(begun)
    of_the_long_one = [at for at, i in enumerate(seen) if i == 0]
    assert seen.index(2) < of_the_long_one[-1]


def test_all_stop_when_the_time_is_up(tmp_path):
    from paperlib import checkpoints
    from paperlib.runs import Store

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
    """One that has always something left to do, but for every fifth question."""

    device, asked = None, 0

    def query(self):
        self.asked += 1
        return self.asked % 5 == 0


def test_a_run_that_waits_leaves_the_thread_to_others(captured, monkeypatch):
    """It goes on when its stream is done; between launches that is not asked."""
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(graphs, "STEPS", 1)
    config, calls = BASE.with_(epochs=2), 0
    going = training._Running(config, None, "cpu", None, False, alone=False)
    going._begin()
    going.stream = Stream()
    while going.result is None:
        going.go_on()
        calls += 1
    assert len(going.result.epochs) == 2
    assert going.stream.asked == 2 * 5
    launches = math.ceil(10 * BASE.train_per_class / BASE.batch)
    assert calls == 2 * launches + 2 * 4 + 1


def test_one_that_fails_leaves_the_others(tmp_path):
    from paperlib.runs import Store

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


def test_one_that_fails_leaves_what_its_caller_handles():
    def raises():
        kept = "to be looked at"
        raise ZeroDivisionError(kept)

    try:
        raises()
    except ZeroDivisionError as error:
        (failed,) = run_together([BASE.with_(learning_rate=1e30, optimizer="sgd")], None, "cpu")
        frame = error.__traceback__.tb_next.tb_frame
    assert isinstance(failed, training.TrainingError)
    assert frame.f_locals == {"kept": "to be looked at"}


def test_one_without_memory_beside_others_is_done_after_them(tmp_path, monkeypatch):
    from paperlib.runs import Store

    class Short(training.QuickLoop):
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


def test_a_record_that_cannot_be_read_leaves_the_others(tmp_path, monkeypatch):
    from paperlib.runs import Store, StoreError

    store, other = Store(tmp_path, tmp_path / "none"), BASE.with_(seed=1)
    run_together([BASE, other], store, "cpu")
    real = Store.read

    def read(self, identity):
        if identity == BASE.identity:
            raise StoreError("damaged")
        return real(self, identity)

    monkeypatch.setattr(Store, "read", read)
    damaged, whole = run_together([BASE, other], store, "cpu")
    assert isinstance(damaged, StoreError)
    assert whole.run == other.identity


def test_one_that_another_process_has(tmp_path):
    from paperlib import locks
    from paperlib.runs import Store

    store = Store(tmp_path, tmp_path / "none")
    other = BASE.with_(seed=1)
    with locks.claim(store.path, other.identity, wait=False):
        claimed, done = run_together([other, BASE], store, "cpu")
    assert isinstance(claimed, locks.Claimed)
    assert done.run == BASE.identity


def test_stopped_together(tmp_path):
    from paperlib import locks
    from paperlib.runs import Store

    def stop(moment):
        raise KeyboardInterrupt

    store, seeds = Store(tmp_path, tmp_path / "none"), [BASE.with_(seed=i) for i in range(3)]
    with pytest.raises(KeyboardInterrupt):
        run_together(seeds, store, "cpu", [None, stop, None])
    for config in seeds:
        with locks.claim(store.path, config.identity, wait=False):
            pass
    assert not store.failures()


# What a CPU without bfloat16 says


@pytest.mark.parametrize("native", [True, False])
def test_emulated_bfloat16_is_said(native, monkeypatch):
    monkeypatch.setattr(training, "native_bfloat16", lambda device: native)
    config = BASE.with_(model="conv4", precision="bfloat16", epochs=1, train_per_class=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(config, device="cpu")
    assert any("emulates bfloat16" in str(w.message) for w in caught) is not native


# On a GPU


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
