"""log p(x) as it is reported: one estimate from several methods, and the bounds that certify it.

`log_marginal` is the estimate, `escalation` sends the data that importance sampling fails on to annealing, `bracket`
bounds log p(x) on both sides for data simulated from the model, and `interval` for given data.
"""
