"""h(x_i) of the frozen network: planned, kept, compared with the model."""
