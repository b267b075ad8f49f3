"""What a run is asked from outside: Ctrl-C, the clock, the log."""
