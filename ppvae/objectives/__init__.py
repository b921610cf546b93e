"""Objectives: bounds on log p(x) and related losses for Pyro's `SVI(..., loss=objective)` and for `fit`.

An objective is a reduction of a pair's `Terms`. It follows Pyro's convention: a loss is minus the bound, summed over
the batch, times the data plate's scale. The gradient estimator is a separate choice, `gradient=`, that never changes
the value: see `ppvae.objectives.gradients`.

A new objective is a subclass of `Objective` that defines `reduce`, from log-weights [K, batch] to a bound [batch]. Here
the mean of two IWAE bounds, each of half of the draws, a lower bound as each of them is:

    >>> import torch
    >>> from ppvae.models import LinearGaussian
    >>> from ppvae.objectives import Objective
    >>> from ppvae.objectives.reductions import log_mean_exp
    >>> class MeanOfHalves(Objective):
    ...     def reduce(self, log_weight):
    ...         first, second = log_weight.chunk(2)
    ...         return (log_mean_exp(first) + log_mean_exp(second)) / 2
    >>> pair, x = LinearGaussian(3, 2), torch.zeros(5, 3)
    >>> MeanOfHalves(num_particles=4).loss(pair.model, pair.guide, x) > 0
    True

`Objective` documents the other hooks. Named in `OBJECTIVES` of tests/laws/objectives.py, it is put through all laws.

A new gradient estimator is a subclass of `GradientEstimator`, here the score function for every latent:

    >>> from ppvae.objectives.gradients import GradientEstimator
    >>> from ppvae.objectives.gradients.estimator import gradient_only
    >>> from ppvae.objectives.requirements import require_sampled_latents
    >>> class Reinforce(GradientEstimator):
    ...     def check_structure(self, objective, s):
    ...         require_sampled_latents(s, "reinforce")
    ...
    ...     def surrogate(self, objective, call):
    ...         t = call.terms(frozen=("latents",))
    ...         signal = objective.learning_signal(objective.log_weights(t).detach())
    ...         return objective.bound(t).sum() + gradient_only((signal * t.log_guide).sum())
    >>> MeanOfHalves(num_particles=4, gradient=Reinforce()).loss_and_grads(pair.model, pair.guide, x) > 0
    True

One for the draws of discrete sites, of which reparameterised sites beside them need to know nothing, is a subclass of
`SiteEstimator` with a method `site_surrogate`; both are audited by `evaluation.gradients`. Named in
`gradients.GRADIENTS`, it has a string for `gradient=`; named in `ESTIMATORS` of tests/laws/objectives.py, it is put
through the laws with every objective.
"""

from ppvae.objectives.aggregate_posterior import TCVAE, InfoVAE
from ppvae.objectives.bounds import CIWAE, IWAE, MIWAE, PIWAE, Renyi
from ppvae.objectives.elbo import ELBO, Capacity
from ppvae.objectives.fivo import FIVO
from ppvae.objectives.objective import Objective
from ppvae.objectives.tvo import TVO
from ppvae.objectives.wake_sleep import ReweightedWakeSleep

__all__ = [
    "CIWAE", "ELBO", "FIVO", "IWAE", "MIWAE", "PIWAE", "TCVAE", "TVO", "Capacity", "InfoVAE", "Objective", "Renyi",
    "ReweightedWakeSleep",
]  # fmt: skip
