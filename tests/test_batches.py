"""Batches and augmentation against the plainest way to do the same."""

import pytest
import torch
from torchvision.transforms import v2

from paperlib.batches import Batches

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
NORMALISE = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int, size: int = 32) -> torch.Tensor:
    return torch.randint(256, (count, 3, size, size), generator=generator(0)).byte()


def test_epoch_is_every_image_once_in_the_order_drawn():
    images, labels = random_images(10), torch.arange(10)
    batches = Batches(images, labels, MEAN, STD, "cpu", size=4)
    ((expected, _),) = batches.evaluation(10)
    found = list(batches.epoch(generator(5)))
    assert len(batches) == 3
    assert [len(y) for _, y in found] == [4, 4, 2]
    order = torch.randperm(10, generator=generator(5))
    assert torch.equal(torch.cat([y for _, y in found]), order)
    assert torch.equal(torch.cat([x for x, _ in found]), expected[order])


@pytest.mark.parametrize("size", [32, 12])
def test_augmentation_is_crop_then_flip_of_each_image(size):
    images, labels = random_images(50, size), torch.arange(50)
    batches = Batches(images, labels, MEAN, STD, "cpu", size=16, augment=True)
    found, drawn = batches.epoch(generator(1), generator(2)), generator(2)
    corners = torch.randint(9, (50, 2), generator=drawn).tolist()
    flips = torch.randint(2, (50,), generator=drawn).tolist()
    xs, order = (torch.cat(parts) for parts in zip(*found, strict=True))
    for x, index, (top, left), flip in zip(xs, order, corners, flips, strict=True):
        image = torch.zeros(3, size + 8, size + 8, dtype=torch.uint8)
        image[:, 4:-4, 4:-4] = images[index]
        image = image[:, top : top + size, left : left + size]
        image = image.flip(2) if flip else image
        assert torch.allclose(x, NORMALISE(image), atol=1e-5)
    assert {0, 8} <= {corner for pair in corners for corner in pair}
    assert 10 < sum(flips) < 40


@pytest.mark.parametrize("augment", [False, True])
def test_batches_are_channels_last_and_typed(augment):
    batches = Batches(random_images(8), torch.arange(8).int(), MEAN, STD, "cpu", 3, augment)
    for x, y in [*batches.epoch(generator(0), generator(1)), *batches.evaluation(3)]:
        assert x.dtype == torch.float32
        assert x.shape[1:] == (3, 32, 32)
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert y.dtype == torch.int64


def test_same_generators_same_batches_whatever_else_is_drawn():
    batches = Batches(random_images(20), torch.arange(20), MEAN, STD, "cpu", 8, augment=True)
    order, augmentation = generator(1), generator(2)
    first = batches.epoch(order, augmentation)
    second = batches.epoch(order, augmentation)  # drawn now, though the first is yet to be used
    torch.manual_seed(99)
    order, augmentation = generator(1), generator(2)
    epochs = [list(batches.epoch(order, augmentation)) for _ in range(2)]
    for epoch, again in zip((first, second), epochs, strict=True):
        for (x, y), (x2, y2) in zip(epoch, again, strict=True):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)
    assert not torch.equal(epochs[0][0][1], epochs[1][0][1])
    # The order does not depend on whether there is augmentation: settings compare in pairs.
    plain = Batches(random_images(20), torch.arange(20), MEAN, STD, "cpu", 8)
    assert torch.equal(next(plain.epoch(generator(1)))[1], epochs[0][0][1])


IN_TURN, BY_CLASS = [2, 0, 1] * 4, [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize(
    ("labels", "count", "chosen"),
    [
        (IN_TURN, 7, [*range(7)]),
        (IN_TURN, 99, [*range(12)]),
        # At even distances: of the first images all would be of one class.
        (BY_CLASS, 3, [0, 4, 8]),
        (BY_CLASS, 5, [0, 2, 4, 7, 9]),
    ],
)
def test_first_images(labels, count, chosen):
    images, labels = random_images(12, size=8), torch.tensor(labels)
    x, y = Batches(images, labels, MEAN, STD, "cpu", augment=True).first(count)
    assert torch.allclose(x, NORMALISE(images[chosen]), atol=1e-5)
    assert torch.equal(y, labels[chosen])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_are_the_cpus_without_synchronising():
    images, labels = random_images(50), torch.arange(50)
    cpu, gpu = (Batches(images, labels, MEAN, STD, d, 16, augment=True) for d in ("cpu", "cuda"))
    expected = list(cpu.epoch(generator(1), generator(2)))
    epoch = gpu.epoch(generator(1), generator(2))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = list(epoch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (x, y), (x2, y2) in zip(expected, found, strict=True):
        assert torch.allclose(x, x2.cpu(), atol=1e-5)
        assert torch.equal(y, y2.cpu())
