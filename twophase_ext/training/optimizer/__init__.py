"""Optimizers of any package: made, grouped, averaged, scheduled."""
