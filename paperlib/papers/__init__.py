"""The settings of both papers, as data at the papers' own scale."""
