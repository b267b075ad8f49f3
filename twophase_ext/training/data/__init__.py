"""Training data by sample index."""
