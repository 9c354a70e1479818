"""Switches are as they were afterwards, whichever of torch's two ways they were set by."""

import threading

import pytest
import torch
from small import VGG

from paperlib import devices
from paperlib.extras.fast.together import by_turns
from paperlib.training import run

cudnn, cuda, mkldnn = torch.backends.cudnn, torch.backends.cuda, torch.backends.mkldnn
NEW = hasattr(cuda.matmul, "fp32_precision")  # from torch 2.9 on
PLACES = (cudnn.conv, cuda.matmul, mkldnn.conv, mkldnn.matmul) if NEW else ()


def switches() -> list:
    if NEW:
        return [place.fp32_precision for place in PLACES]
    return [torch.get_float32_matmul_precision(), cudnn.allow_tf32]


def rounds() -> bool:
    """Whether any product or convolution of float32 may round more than float32 does."""
    return not {*switches()} <= {"ieee", "none", "highest", False}


@pytest.fixture
def restored():
    before = switches()
    yield
    torch.set_float32_matmul_precision("highest")
    for place, value in zip(PLACES, before, strict=NEW):
        place.fp32_precision = value
    assert switches() == before


@pytest.mark.parametrize("value", ["highest", "high", "medium", *["ieee", "tf32"] * NEW])
def test_full_float32(value, restored):
    older = value not in ("ieee", "tf32")
    if older:
        torch.set_float32_matmul_precision(value)
    else:
        cudnn.conv.fp32_precision = cuda.matmul.fp32_precision = value
    before = switches()
    with devices.full_float32():
        assert not rounds()
    assert switches() == before
    assert not older or torch.get_float32_matmul_precision() == value


@pytest.fixture
def tf32(restored):
    """A GPU's convolutions would take TF32, as is PyTorch's default."""
    torch.set_float32_matmul_precision("high")
    assert rounds()


@pytest.mark.parametrize(("precision", "full"), [("float32", True), ("bfloat16", False)])
def test_float32_is_full_float32(precision, full, tf32):
    config = VGG.with_(precision=precision, model="small:Chain", batch=50)
    seen = []
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
