"""Samples, reconstructions, interpolations, traversals and attribute vectors of any pair that keeps the contract.

Every function takes a pair and data of the kind it was trained on (a tensor, a split, or a tuple of them), runs modules
in evaluation mode, draws from its own `seed`, and returns plain tensors. Images are means of p(x | z); `mean=False`
gives draws. `prior_predictive` and `posterior_predictive` give draws of every observed site by its name, as Pyro's
`Predictive` does; the others the site that observes the data's first tensor. `ppvae.evaluation.impute` fills missing
values, by importance weights of the guide's draws.
"""

from ppvae.generate.latent_space import attribute_vector, decode, interpolations, moved, posterior_means, traversals
from ppvae.generate.sampling import posterior_predictive, prior_predictive, reconstructions, samples

__all__ = [
    "attribute_vector", "decode", "interpolations", "moved", "posterior_means", "posterior_predictive",
    "prior_predictive", "reconstructions", "samples", "traversals",
]  # fmt: skip
