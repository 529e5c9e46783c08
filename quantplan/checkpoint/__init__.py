"""Checkpoints on disk: what goes where, reading, atomic writing, provenance."""
