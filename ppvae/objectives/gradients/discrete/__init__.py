"""Gradients through discrete draws: antithetic draws, control variates, relaxations, draws without replacement.

`sites` holds the interface, `SiteEstimator` and what one reads of a site, `bits` Bernoulli and categorical sites as
independent bits, `per_site` the composition of estimators by site; the other modules are an estimator each.
"""
