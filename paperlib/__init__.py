"""Two papers on neural-network pruning, reproducible: see README.md."""

__version__ = "0.1.0"
