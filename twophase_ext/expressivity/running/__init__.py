"""Error bounds through the operators of a model as it runs: no trace of it is made."""
