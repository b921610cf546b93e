"""Variational distributions fitted to one datum at a time by its own ELBO, and the inference gaps they measure.

`guides` and `full_rank` hold what can be fitted, `optimization` fits it, `refit` chooses a guide for a pair and fits it
to a block of data, `gaps` splits log p(x) - ELBO.
"""
