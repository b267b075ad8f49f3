"""Models, data, the command line and the pure-PyTorch reference of the two-phase method."""
