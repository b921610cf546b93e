"""The gradient of the variance of log-weights."""

from typing import final

from torch import Tensor

from ppvae.errors import UsageError
from ppvae.objectives.gradients.discrete.sites import SiteDraws, SiteEstimator
from ppvae.objectives.protocol import LogWeightBound


@final
class VarGrad(SiteEstimator):
    """The sample covariance of log-weights and scores, 1 / (K - 1) sum_k (log w_k - mean log w) d log q(z_k); unbiased.

    It is half the gradient of the variance of the log-weights at draws that are held constant, and leave-one-out for an
    ELBO ("vimco") without the score of mean zero that the log-weights have themselves. It serves every family of
    latents, and bounds that are means of log-weights.

    Raises:
        UsageError: another bound, or fewer than two particles.

    Source: Richter et al. 2020 (arXiv 2010.10436); Kool et al. 2019.

    >>> import torch
    >>> from ppvae import VAE, likelihoods, objectives, posteriors, priors
    >>> nets = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)
    >>> vae = VAE(priors.Bernoulli(2), likelihoods.Bernoulli(nets[0]), posteriors.Bernoulli(nets[1]))
    >>> loss = objectives.ELBO(2, gradient=VarGrad()).loss_and_grads(vae.model, vae.guide, torch.ones(4, 3))
    >>> nets[1].weight.grad.shape
    torch.Size([2, 3])
    """

    def check_objective(self, objective: LogWeightBound) -> None:
        if objective.draws < 2:
            raise UsageError("num_particles: expected at least 2 for a variance (vargrad), found 1")
        if not objective.stl_unbiased:
            raise UsageError(
                f"gradient: expected a bound that is a mean of log-weights for 'vargrad', found "
                f"{type(objective).__name__}; take 'vimco'"
            )

    def site_surrogate(self, site: SiteDraws) -> Tensor:
        w = site.log_weight
        return ((w - w.mean(0)) / (len(w) - 1) * site.log_prob).sum()
