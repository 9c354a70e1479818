"""How long noise lasts: forward passes, as the loop counts them, from training batches.

In the paper's runs every forward pass counts, training and evaluation alike (arXiv 1906.03728,
figures 5 and D2).
"""

import math

from paperlib.config import Config, Noise

CIFAR_IMAGES = (50_000, 10_000)


def images_of(config: Config) -> tuple[int, int]:
    """Return the number of training and test images of a run of ten classes.

    CIFAR's numbers stand in where the configuration takes all images.
    """
    return (
        10 * config.train_per_class if config.train_per_class else CIFAR_IMAGES[0],
        10 * config.test_per_class if config.test_per_class else CIFAR_IMAGES[1],
    )


def noise_for(
    kind: str,
    batches: int,
    batch: int = 128,
    train_images: int = CIFAR_IMAGES[0],
    test_images: int = CIFAR_IMAGES[1],
    evaluation_batch: int = 128,
) -> Noise:
    """Return noise that lasts for `batches` training batches from the event on.

    It covers the evaluation after the event, then each epoch's training batches and its two
    evaluations. With no training batch, zeroing and Gaussian noise act on the first pass only.
    """
    if batches == 0:
        return Noise(kind, 0, evaluation_batch)
    an_epoch = math.ceil(train_images / batch)
    evaluation = math.ceil(test_images / evaluation_batch)
    whole = (batches - 1) // an_epoch
    passes = evaluation + batches + whole * 2 * evaluation
    # Zeroing and Gaussian noise act on N + 1 passes, restored zeroing on N.
    return Noise(kind, passes - (kind != "restored"), evaluation_batch)


def training_batches(noise: Noise, batch: int, train_images: int, test_images: int) -> int:
    """Return how many training batches noise lasts for: the inverse of `noise_for`."""
    if noise.passes == 0:
        return 0
    an_epoch = math.ceil(train_images / batch)
    evaluation = math.ceil(test_images / noise.evaluation_batch)
    left = noise.passes + (noise.kind != "restored") - evaluation
    whole, rest = divmod(left, an_epoch + 2 * evaluation)
    return whole * an_epoch + min(rest, an_epoch)
