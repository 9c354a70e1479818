"""Speed, as ratios in one run against what one would otherwise use: `python -m benchmarks`."""
