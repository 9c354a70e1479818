"""Runs on disk: records, checkpoints, claims and provenance. Imports no torch."""
