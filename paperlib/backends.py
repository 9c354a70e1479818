"""The old place of `devices`."""

from paperlib.devices import full_float32, switched  # noqa: F401
