"""One update: of all parameters, of the last layer, by full gradients, over several processes."""
