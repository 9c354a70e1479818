"""The few plot forms the figures share, their one look, and their files. Imports no torch."""
# ruff: noqa: F401

from paperlib.plots.contrasts import differences, forest
from paperlib.plots.curves import bars_by_rank, by_fraction, dynamics, events, lines, noise, rates
from paperlib.plots.dots import by_setting, dots, pairs, scatter, tradeoff
from paperlib.plots.files import save, save_table, stamp
from paperlib.plots.histograms import MOMENTS, densities, magnitudes, shares, weight_counts
from paperlib.plots.style import NAMES, PALETTE, focus, grid, legend_below, looks, panels, use_style
from paperlib.plots.tables import gates, numbers, verdict
