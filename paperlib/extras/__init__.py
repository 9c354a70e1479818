"""Extras that go beyond the papers, or only make training faster."""
