"""Updates of many parameters at once, by torch optimizers and by those of Pyro, which has one for each parameter."""
