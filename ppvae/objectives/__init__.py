"""Objectives: bounds on log p(x) and related losses for Pyro's `SVI(..., loss=objective)` and for `fit`.

An objective is a reduction of a pair's `Terms`. It follows Pyro's convention: a loss is minus the bound, summed over
the batch, times the data plate's scale. The gradient estimator is a separate choice, `gradient=`, that never changes
the value: see `ppvae.objectives.gradients`.

A new objective is a subclass of `Objective` that defines `reduce`, here the jackknife of IWAE (Nowozin 2018):

    class Jackknife(Objective):
        def reduce(self, log_weight):
            k, nothing = len(log_weight), torch.full_like(log_weight, -torch.inf)
            smaller = leave_one_out_log_sum_exp(log_weight, nothing).mean(0) - math.log(k - 1)
            return k * log_mean_exp(log_weight) - (k - 1) * smaller

`Objective` documents the other hooks. Named in `OBJECTIVES` of tests/laws/objectives.py, it is put through all laws.

A new gradient estimator is a subclass of `GradientEstimator`, here the score function for every latent:

    class Reinforce(GradientEstimator):
        def check_structure(self, objective, s):
            require_sampled_latents(s, "reinforce")

        def surrogate(self, objective, call):
            t = call.terms(frozen=("latents",))
            signal = objective.learning_signal(objective.log_weights(t).detach())
            return objective.bound(t).sum() + gradient_only((signal * t.log_guide).sum())

One for the draws of discrete sites, of which reparameterised sites beside them need to know nothing, is a subclass of
`SiteEstimator` with a method `site_surrogate`; both are audited by `evaluation.gradients`. It is used as
`IWAE(5, gradient=Reinforce())`. Named in `gradients.GRADIENTS`, it has a string for `gradient=`; named in
`ESTIMATORS` of tests/laws/objectives.py, it is put through the laws with every objective.
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
