"""Batches of images made on the device, and augmentation (arXiv 1906.03728)."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = 4  # black pixels on each side, before the random crop


class Batches:
    """Batches of one set of images, made on a device that holds all of them.

    A batch is x, float32 (B, C, H, W), normalised, and y, int64 (B,).

    Args:
        images: uint8 (N, C, H, W).
        labels: (N,).
        mean: The mean of each channel, of pixels scaled to 0..1.
        std: The standard deviation of each channel, of the same.
        device: The device on which batches are made.
        size: Images of a training batch.
        augment: Whether training images are padded with black, cropped and flipped at random.
        layout: The memory format of x.

    Raises:
        ValueError: `size` is below 1.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        size: int = 128,
        augment: bool = False,
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        if size < 1:
            raise ValueError(f"a batch of {size} images; it needs at least 1")
        self.size, self.augment, self.layout = size, augment, layout
        self.height, self.width = images.shape[2:]
        self.padding = PADDING if augment else 0
        # Images are stored as NHWC, so that a selection of them is channels-last without a copy.
        pixels = F.pad(images.to(device), 4 * (self.padding,)).permute(0, 2, 3, 1).contiguous()
        self.pixels, self.labels = pixels, labels.to(device, torch.int64)
        # These repeat along the width: broadcasting over 3 channels is 20 times slower on a CPU.
        middle, spread = (torch.tensor(x, dtype=torch.float64) for x in (mean, std))
        self.scale = (1 / (255 * spread)).float().repeat(self.width, 1).to(device)
        self.shift = (-middle / spread).float().repeat(self.width, 1).to(device)

    def __len__(self) -> int:
        """Return the number of batches an epoch. The last one may be smaller."""
        return math.ceil(len(self.labels) / self.size)

    def epoch(
        self, order: torch.Generator, augmentation: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over all images once, in a random order that is drawn at the call."""
        drawn = self.draw(order, augmentation)
        return (self.pick(*part) for part in zip(*(t.split(self.size) for t in drawn), strict=True))

    def draw(
        self, order: torch.Generator, augmentation: torch.Generator | None = None
    ) -> list[Tensor]:
        """Draw all random numbers of one epoch, on the CPU: every device sees the same batches.

        Args:
            order: A CPU generator.
            augmentation: A CPU generator; needed if the batches augment.

        Returns:
            A permutation (N,). If the batches augment, also for each image the corner of its crop,
            row and column in 0..8 (N, 2), and its flip (N,), in the order of the permutation.

        Raises:
            ValueError: The batches augment, and there is no generator for it.
        """
        count, device = len(self.labels), self.labels.device
        drawn = [torch.randperm(count, generator=order)]
        if self.augment:
            if augmentation is None:
                raise ValueError("batches that augment need a generator for the augmentation")
            drawn.append(torch.randint(2 * self.padding + 1, (count, 2), generator=augmentation))
            drawn.append(torch.randint(2, (count,), generator=augmentation).bool())
        return [tensor.to(device) for tensor in drawn]

    def pick(self, indices: Tensor, *augmentation: Tensor) -> tuple[Tensor, Tensor]:
        """Return the batch of these images (B,), with their corners and flips if there are any."""
        if not augmentation:
            return self.unaugmented(indices)
        images = crop_and_flip(self.pixels, (self.height, self.width), indices, *augmentation)
        return self._normalise(images), self.labels[indices]

    def first(self, count: int) -> tuple[Tensor, Tensor]:
        """Return `count` images, or all if there are fewer, without augmentation, for measurements.

        These are the first ones. In a set sorted by class, such as a folder, they are images at
        even distances instead.
        """
        number = len(self.labels)
        indices = torch.arange(min(count, number))
        if count < number and bool((self.labels.diff() >= 0).all()):
            indices = indices * number // count
        return self.unaugmented(indices.to(self.labels.device))

    def unaugmented(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the batch of these images (B,), without augmentation."""
        rows, columns = self.padding + self.height, self.padding + self.width
        images = self.pixels.index_select(0, indices)
        inner = images[:, self.padding : rows, self.padding : columns]
        return self._normalise(inner), self.labels[indices]

    def evaluation(self, size: int = 1000) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over all images once, in their own order, without augmentation."""
        indices = torch.arange(len(self.labels), device=self.labels.device)
        return map(self.unaugmented, indices.split(size))

    def _normalise(self, pixels: Tensor) -> Tensor:
        """Turn uint8 (B, H, W, C) into float32 (B, C, H, W), `(x / 255 - mean) / std`."""
        images = pixels.float().mul_(self.scale).add_(self.shift).permute(0, 3, 1, 2)
        return images.contiguous(memory_format=self.layout)


def crop_and_flip(
    padded: Tensor, size: tuple[int, int], indices: Tensor, corners: Tensor, flips: Tensor
) -> Tensor:
    """Crop images, and flip some of them left to right.

    Args:
        padded: All images (N, H, W, C).
        size: Height and width of a crop.
        indices: (B,), the images to crop.
        corners: (B, 2), row and column of each crop's upper left corner.
        flips: bool (B,), True for the images to flip.

    Returns:
        (B, height, width, C), gathered pixel by pixel in one pass.
    """
    (_, padded_height, padded_width, channels), (height, width) = padded.shape, size
    across = torch.arange(width, device=padded.device)
    rows = corners[:, :1] + torch.arange(height, device=padded.device)
    columns = corners[:, 1:] + torch.where(flips[:, None], width - 1 - across, across)
    rows = rows + padded_height * indices[:, None]
    pixels = padded_width * rows[:, :, None] + columns[:, None, :]
    picked = padded.view(-1, channels).index_select(0, pixels.flatten())
    return picked.view(len(indices), height, width, channels)
