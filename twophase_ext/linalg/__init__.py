"""Linear algebra with proved error bounds, for matrices too large for one kernel."""
