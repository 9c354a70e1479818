"""Memory is kept by `extras.fast.WORKER_ENVIRONMENT`, in worker processes only."""

from contextlib import nullcontext as kept  # noqa: F401
