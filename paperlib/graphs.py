"""The old place of `extras.fast.graphs`."""

from paperlib.extras.fast.graphs import GO_ON, CapturedLoop, CaptureError  # noqa: F401
