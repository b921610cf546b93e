"""Models with a posterior over their parameters, which are global latents: pairs for mini-batches of `size` data.

Each guide has parameters of its own for the global latents and, given these, an exact or amortised density of the local
ones, so that every datum has a log-weight of its own: see `ppvae.log_marginal(conditional=True)` and
`ppvae.evaluation.loo`.
"""
