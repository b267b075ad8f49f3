"""Checkpoints and the run folder: written, read, refused."""
