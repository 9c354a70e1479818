"""The old place of `extras.fast.convolutions`."""

from paperlib.extras.fast.convolutions import convolve, quick  # noqa: F401
