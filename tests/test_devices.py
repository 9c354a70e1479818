"""Switches are as they were afterwards, whichever of torch's two ways they were set by."""

import threading

import pytest
import torch
from small import VGG

from paperlib import devices
from paperlib.extras.fast.together import by_turns
from paperlib.training import run

NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")
new_ways = pytest.mark.skipif(not NEW, reason="came with torch 2.9")


def switches() -> list:
    if not NEW:
        return [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32]
    cudnn, cuda, mkldnn = torch.backends.cudnn, torch.backends.cuda, torch.backends.mkldnn
    places = [cudnn.conv, cudnn.rnn, cuda.matmul, mkldnn.conv, mkldnn.matmul]
    return [place.fp32_precision for place in places]


@pytest.fixture
def restored():
    before = switches()
    yield
    torch.set_float32_matmul_precision("highest")
    if NEW:
        cudnn, cuda, mkldnn = torch.backends.cudnn, torch.backends.cuda, torch.backends.mkldnn
        places = [cudnn.conv, cudnn.rnn, cuda.matmul, mkldnn.conv, mkldnn.matmul]
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value
    assert switches() == before


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_full_float32_by_the_older_way(precision, restored):
    torch.set_float32_matmul_precision(precision)
    before = switches()
    with devices.full_float32():
        inside = switches()
        assert not {"tf32", "bf16", "high", "medium", True} & {*inside[:1], *inside[2:]}
        assert NEW or inside[1] is False
    assert switches() == before
    assert torch.get_float32_matmul_precision() == precision


@new_ways
@pytest.mark.parametrize("value", ["ieee", "tf32"])
def test_full_float32_by_the_newer_way(value, restored):
    for place in (torch.backends.cudnn.conv, torch.backends.cuda.matmul):
        place.fp32_precision = value
    before = switches()
    with devices.full_float32():
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert switches() == before


# Precision


@pytest.fixture
def tf32():
    """A GPU's convolutions would take TF32, as is PyTorch's default."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def rounds(*_) -> bool:
    """Whether any product or convolution of float32 may round more than float32 does."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return torch.get_float32_matmul_precision() != "highest" or torch.backends.cudnn.allow_tf32
    places = [torch.backends.cudnn.conv, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    return any(place.fp32_precision not in ("ieee", "none") for place in places)


@pytest.mark.parametrize(("precision", "full"), [("float32", True), ("bfloat16", False)])
def test_float32_is_full_float32(precision, full, tf32):
    config = VGG.with_(precision=precision, model="small:Chain", batch=50)
    seen = []
    assert rounds()
    run(config, None, "cpu", lambda moment: seen.append(rounds()))
    assert seen == [not full] * 3
    list(by_turns(config.with_(seed=1), None, "cpu"))
    assert rounds()


def test_threads_take_turns_in_full_float32(tf32):
    """Else the first to end would set the switches back while the other computes."""
    entered, seen = threading.Event(), []

    def work():
        with devices.full_float32():
            entered.set()
            seen.append(rounds())

    with devices.full_float32():
        thread = threading.Thread(target=work)
        thread.start()
        assert not entered.wait(0.1)
        with devices.full_float32():  # the same thread may enter again
            pass
        assert not rounds()
    thread.join()
    assert seen == [False]
    assert rounds()


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "", "gpu"])
def test_unknown_devices(name):
    with pytest.raises(ValueError, match=rf"no device '{name}' here: one of auto, .*cpu"):
        devices.choose_device(name)
