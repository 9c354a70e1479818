"""Worker processes: deaths, devices that are busy at first, and turns in one process."""

import os
import pickle

import pytest
import torch

from paperlib.extras.fast.turns import ALONE, Turns
from paperlib.sweep import cluster, workers
from paperlib.sweep.workers import Processes, WorkerDied


def gone():
    raise WorkerDied("the GPU is gone", ["a run"])


def test_a_process_that_dies_is_replaced():
    with Processes(["cpu"]) as pool:
        assert pool.submit(max, 3, 7).result(100) == 7
        first = pool.submit(os.getpid).result(100)
        for broken, error in ((lambda: 0, (AttributeError, pickle.PicklingError)),):
            with pytest.raises(error):
                pool.submit(broken).result(100)
        with pytest.raises(ZeroDivisionError):
            pool.submit(divmod, 1, 0).result(100)
        assert pool.submit(os.getpid).result(100) == first
        with pytest.raises(WorkerDied):
            pool.submit(os._exit, 3).result(100)
        second = pool.submit(os.getpid).result(100)
        with pytest.raises(WorkerDied, match="the GPU is gone") as caught:
            pool.submit(gone).result(100)
        assert caught.value.runs == ("a run",)
        assert len({first, second, pool.submit(os.getpid).result(100)}) == 3
    with pytest.raises(RuntimeError):
        pool.submit(max, 1, 2)


def test_each_process_has_its_device():
    with Processes(["one", "two"]) as pool:
        assert pool.submit(workers.assigned_device, "auto").result(100) in ("one", "two")
        assert pool.submit(workers.assigned_device, "cpu").result(100) == "cpu"


def test_a_device_that_is_busy_is_tried_again(monkeypatch, tmp_path):
    """Each time in a new process; when it stays busy the work fails as by a death."""
    monkeypatch.setattr(workers, "PAUSES_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(workers, "_device_problem", busy)
    (tmp_path / "times").write_text("2")
    with Processes([str(tmp_path / "times")]) as pool:
        assert pool.submit(max, 3, 7).result(100) == 7
    (tmp_path / "times").write_text("3")
    with Processes([str(tmp_path / "times")]) as pool, pytest.raises(WorkerDied, match="busy"):
        pool.submit(max, 3, 7).result(100)
    assert (tmp_path / "times").read_text() == "0"


def busy(device: str) -> str | None:
    """A device that is busy as often as the file says."""
    with open(device) as file:
        times = int(file.read())
    if not times:
        return None
    with open(device, "w") as file:
        file.write(str(times - 1))
    return "busy or unavailable"


def test_one_that_wants_to_be_alone_comes_last():
    order, turns = [], Turns()

    def steps(name, count, wishes=()):
        for i in range(count):
            order.append(name)
            yield ALONE if i in wishes else None
        return name

    for name, *how in (("a", 3, [0]), ("b", 3), ("c", 2, [0, 1])):
        turns.add(name, steps(name, *how))
    ended = []
    while turns:
        ended += [key for key, worked, _ in turns.turn() if worked]
        if ended == ["b"] and "d" not in order:
            turns.add("d", steps("d", 2))
    assert ended[0] == "b"
    assert sorted(ended) == list("abcd")
    assert "".join(order).startswith("abcbb")


@pytest.mark.parametrize(
    ("asked", "jobs", "per_device", "gpus", "expected"),
    [
        ("auto", None, None, 0, (["auto"] * 5, 1)),
        ("cpu", None, None, 2, (["cpu"] * 5, 1)),
        ("auto", None, 2, 0, (["auto"] * 2, 1)),
        ("auto", None, None, 2, (["cuda:0", "cuda:1"], 1)),
        ("cuda", 3, 4, 2, (["cuda:0", "cuda:1", "cuda:0"], 4)),
        ("cuda:1", 2, 3, 2, (["cuda:1"] * 2, 3)),
    ],
)
def test_devices(monkeypatch, asked, jobs, per_device, gpus, expected):
    monkeypatch.setattr(workers, "gpus", lambda: gpus)
    assert workers.devices(asked, jobs, per_device, 5, 9) == expected


@pytest.mark.parametrize(
    ("files", "visible", "expected"),
    [((), "", 0), (("nvidiactl",), "", 0), (("nvidia0",), "", 2), (("dxg",), "", 2), ((), "0", 2)],
)
def test_gpus_are_looked_for_without_torch(files, visible, expected, tmp_path, monkeypatch):
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(workers, "Path", lambda path: tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert workers.gpus() == expected


@pytest.mark.parametrize("jobs", ["0", "-1", "two", "1.5"])
def test_bad_number_of_jobs(monkeypatch, jobs):
    monkeypatch.setenv("PAPERLIB_JOBS", jobs)
    with pytest.raises(ValueError, match=f"'{jobs}'"):
        workers.default_jobs()


@pytest.mark.parametrize("address", ["there:1", "local:0", "local:two"])
def test_a_wrong_address_is_named(address):
    with pytest.raises(ValueError, match=address), cluster.connected(address):
        pass
