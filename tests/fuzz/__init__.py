"""Random calls and damaged files: hypothesis tests in CI, `make fuzz` for long runs."""
