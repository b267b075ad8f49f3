"""The theorems' premises and bounds, for a model and its data."""
