"""Models made fit for the theorem: analytic activations, a wide layer, plain operators."""
