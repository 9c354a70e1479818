"""Training images a second, against the ordinary loop on the same machine in the same run.

The ordinary loop: a DataLoader with two workers over PIL images and torchvision's transforms, masks
multiplied into weights and batch norm on every forward pass, the loss read every batch.
"""

import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from paperlib import data, models
from paperlib.config import Config
from paperlib.pruning import FilterPruner
from paperlib.training import make_optimizer, train_epoch

BATCH = 128
FRACTIONS = (0.3, 0.3, 0.3, 0.9)
MEAN, STD = data.CIFARS["cifar10"].mean, data.CIFARS["cifar10"].std


def images(count: int) -> tuple[Tensor, Tensor]:
    """Random images of CIFAR's size: what is in them costs nothing."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return pixels, torch.randint(10, (count,), generator=generator)


class Pictures(Dataset):
    """A data set the ordinary way: one PIL image at a time, transformed on its own."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels.permute(0, 2, 3, 1).numpy(), labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class Masked(nn.Module):
    """A module whose weight and bias are multiplied by a mask on every forward pass."""

    def __init__(self, module: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("mask", mask.float())

    def forward(self, x: Tensor) -> Tensor:
        m, mask = self.module, self.mask
        if isinstance(m, nn.Conv2d):
            weight, bias = m.weight * mask[:, None, None, None], m.bias * mask
            return F.conv2d(x, weight, bias, m.stride, m.padding)
        mean, var = m.running_mean, m.running_var
        weight, bias = m.weight * mask, m.bias * mask
        return F.batch_norm(x, mean, var, weight, bias, self.training, m.momentum, m.eps)


def ordinary(pixels: Tensor, labels: Tensor, device: torch.device) -> Callable[[], None]:
    """One epoch of the ordinary loop on a pruned vgg11_bn."""
    model, masks = pruned_vgg()
    for name, mask in masks.items():
        index = int(name.split(".")[1])
        model.features[index] = Masked(model.features[index], mask)
        model.features[index + 1] = Masked(model.features[index + 1], mask)
    model = model.to(device).train()
    loader = DataLoader(
        Pictures(pixels, labels), BATCH, shuffle=True, num_workers=2, persistent_workers=True
    )
    optimizer = torch.optim.Adam(model.parameters())
    for _ in loader:  # the workers start once, outside of what is timed
        pass

    def epoch() -> None:
        total = 0.0
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            total += loss.item()

    return epoch


def ours(pixels: Tensor, labels: Tensor, device: torch.device) -> Callable[[], None]:
    """One epoch of `training.train_epoch` on the same pruned vgg11_bn."""
    model = models.build("vgg11_bn").to(device, memory_format=torch.channels_last)
    pruner = FilterPruner(model, FRACTIONS)
    pruner.prune(1, 1)
    optimizer = make_optimizer(Config(), model)
    batches = data.Batches(pixels, labels, MEAN, STD, device, BATCH, augment=True)
    order, augment = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, enabled=False)

    return lambda: train_epoch(model, batches, optimizer, pruner.hold, autocast, order, augment)


def pruned_vgg() -> tuple[nn.Module, dict[str, Tensor]]:
    """A full vgg11_bn and the masks of Figure 2's fractions."""
    model = models.build("vgg11_bn")
    pruner = FilterPruner(model, FRACTIONS)
    pruner.choose(1, 1)
    return model, pruner.masks


def compare(batches: int = 4, rounds: int = 3, device: str = "cpu") -> Iterator[dict]:
    """Rows of the table: name, images a second, ratio to the ordinary loop; in turns, the best."""
    count = batches * BATCH
    where = torch.device(device)
    loops = {
        "ordinary loop": ordinary(*images(count), where),
        "paperlib": ours(*images(count), where),
    }
    best = dict.fromkeys(loops, float("inf"))
    for turn in range(rounds + 1):
        for name, epoch in loops.items():
            start = time.perf_counter()
            epoch()
            if where.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first round warms up
                best[name] = min(best[name], time.perf_counter() - start)
    for name, seconds in best.items():
        yield {
            "what": f"vgg11_bn, training, {where.type}, float32: {name}",
            "images a second": count / seconds,
            "ratio": best["ordinary loop"] / seconds,
        }
