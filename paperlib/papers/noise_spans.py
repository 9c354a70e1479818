"""The time that noise lasts, in forward passes, from a number of training batches.

As in the paper's runs, every forward pass counts, training and evaluation alike (arXiv 1906.03728,
figures 5 and D2).
"""

import math

from paperlib.config import Config, Noise

# Classes, training images and test images; of other data, those of CIFAR-10.
COUNTS = {"digits": (10, 1000, 797), "cifar100": (100, 50_000, 10_000)}


def images_of(config: Config) -> tuple[int, int]:
    """Return the numbers of training and test images; images at a path count as CIFAR-10."""
    classes, train, test = COUNTS.get(config.data, (10, 50_000, 10_000))
    return (
        min(train, classes * (config.train_per_class or train)),
        min(test, classes * (config.test_per_class or test)),
    )


def steps(config: Config) -> int:
    """Return the number of optimizer steps in an epoch."""
    return math.ceil(images_of(config)[0] / config.batch)


def with_noise(config: Config, kind: str, batches: int, evaluation_batch: int = 128) -> Config:
    """Return a configuration with noise that lasts for some training batches after the event.

    Noise covers the evaluation after the event, then each epoch's training batches and its two
    evaluations. With 0 batches, zeroing and Gaussian noise act on the first pass only.

    Args:
        config: A configuration.
        kind: "zeroing", "gaussian" or "restored".
        batches: The number of training batches.
        evaluation_batch: Images in a pass of evaluation.
    """
    passes = 0
    if batches:
        evaluation = math.ceil(images_of(config)[1] / evaluation_batch)
        whole = (batches - 1) // steps(config)
        # Zeroing and Gaussian noise act on N + 1 passes, restored zeroing on N.
        passes = evaluation + batches + whole * 2 * evaluation - (kind != "restored")
    return config.with_(noise=Noise(kind, passes, evaluation_batch))


def training_batches(config: Config) -> int:
    """Return the number of training batches that noise lasts for: the inverse of `with_noise`."""
    noise = config.noise
    if noise is None or noise.passes == 0:
        return 0
    evaluation = math.ceil(images_of(config)[1] / noise.evaluation_batch)
    left = noise.passes + (noise.kind != "restored") - evaluation
    whole, rest = divmod(left, steps(config) + 2 * evaluation)
    return whole * steps(config) + min(rest, steps(config))
