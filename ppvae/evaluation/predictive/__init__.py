"""Predictive checks: statistics of data that the model replicates, beside those of the data observed."""
