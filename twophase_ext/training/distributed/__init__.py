"""Several processes of torchrun, and what they say to each other."""
