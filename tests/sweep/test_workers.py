"""Worker processes: deaths, and their devices."""

import os
import pickle

import pytest
import torch

from paperlib.sweep import cluster, workers
from paperlib.sweep.workers import Processes, WorkerDied


def gone():
    raise WorkerDied("the GPU is gone")


def test_a_process_that_dies_is_replaced():
    with Processes(["mine"]) as pool:
        assert pool.submit(workers.assigned_device, "auto").result(100) == "mine"
        assert pool.submit(workers.assigned_device, "cpu").result(100) == "cpu"
        first = pool.submit(os.getpid).result(100)
        with pytest.raises((AttributeError, pickle.PicklingError)):
            pool.submit(lambda: 0).result(100)
        with pytest.raises(ZeroDivisionError):
            pool.submit(divmod, 1, 0).result(100)
        assert pool.submit(os.getpid).result(100) == first
        with pytest.raises(WorkerDied):
            pool.submit(os._exit, 3).result(100)
        second = pool.submit(os.getpid).result(100)
        with pytest.raises(WorkerDied, match="the GPU is gone"):
            pool.submit(gone).result(100)
        assert len({first, second, pool.submit(os.getpid).result(100)}) == 3
    with pytest.raises(RuntimeError):
        pool.submit(max, 1, 2)


@pytest.mark.parametrize("mps", [None, "/tmp/mps"])
@pytest.mark.parametrize("own", [None, "4"])
def test_connections_to_a_gpu_shared_by_mps(monkeypatch, mps, own):
    """CUDA's default of 8 under MPS, where processes share a pool; never in place of the user's."""
    variables = {"CUDA_MPS_PIPE_DIRECTORY": mps, "CUDA_DEVICE_MAX_CONNECTIONS": own}
    monkeypatch.setattr(os, "environ", {name: value for name, value in variables.items() if value})
    workers.set_environment()
    expected = own or (None if mps else workers.WORKER_ENVIRONMENT["CUDA_DEVICE_MAX_CONNECTIONS"])
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == expected


@pytest.mark.parametrize(
    ("asked", "jobs", "per_device", "gpus", "runs", "expected"),
    [
        ("auto", None, None, 0, 99, (["auto"] * 5, 1)),
        ("auto", None, None, 0, 3, (["auto"] * 3, 1)),
        ("cpu", None, None, 2, 99, (["cpu"] * 5, 1)),
        ("auto", None, 2, 0, 99, (["auto"] * 2, 1)),
        ("auto", None, None, 2, 99, (["cuda:0", "cuda:1"], 1)),
        ("cuda", 3, 4, 2, 99, (["cuda:0", "cuda:1", "cuda:0"], 4)),
        ("cuda", 3, 4, 2, 5, (["cuda:0", "cuda:1", "cuda:0"], 2)),
        ("cuda:1", 2, 3, 2, 99, (["cuda:1"] * 2, 3)),
    ],
)
def test_devices(monkeypatch, asked, jobs, per_device, gpus, runs, expected):
    monkeypatch.setattr(workers, "gpus", lambda: gpus)
    monkeypatch.setattr(workers, "cores", lambda: 5)
    assert workers.devices(asked, jobs, per_device, runs) == expected


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


@pytest.mark.parametrize("address", ["there:1", "local:0", "local:two"])
def test_a_wrong_address_is_named(address):
    with pytest.raises(ValueError, match=address), cluster.connected(address):
        pass
