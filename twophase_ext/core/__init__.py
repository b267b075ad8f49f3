"""What every floor above may use: torch, NumPy and the standard library only."""
