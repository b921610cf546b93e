"""Semi-amortised inference: gradient steps on the ELBO of each datum from an amortised initialisation."""

import functools
from typing import final

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from ppvae.errors import ContractError, UsageError
from ppvae.errors.ranges import check_numbers
from ppvae.nn.context import call_with_context


@final
class SemiAmortized(nn.Module):
    """A diagonal normal posterior, initialised by a network and refined by gradient steps on the ELBO of each datum.

    (loc, log_scale) = net(x); then, `steps` times, loc += rate * scale^2 * dL/dloc and log_scale += rate / 2 * dL/dlog
    scale, the natural gradient of L = E_q[log p(x | z) + log p(z)] + sum log_scale, with fixed noise for the
    expectation, so that q(z | x) is a function of x. A step is accepted for a datum if it raises L; its rate is halved
    on rejection and grows back on acceptance, so that L never decreases. Kim et al. take plain gradient steps of a
    fixed rate, which must be tuned for every decoder.

    Args:
        net: maps data [..., *event] to [..., 2 * latent], location and log-scale.
        prior, likelihood: the modules p(z) and p(x | z) of the pair. The decoder must take any leading dims. They and
            the network are given the batch's second tensor where they declare `context`.
        steps: the number of steps, 0 for none; each costs a forward and backward pass of the decoder for every
            particle.
        rate: the initial step size; 1 is Newton's step for a normal posterior at the right scale.
        num_particles: noise draws for the expectation, antithetic and with variance one in every dim; with at least
            2 * latent draws they are uncorrelated too, and expectations of quadratics are exact.
        through: differentiate through the steps in training, as in the paper. Otherwise the derivative of the refined
            parameters by the network's is approximated by its diagonal, the ratio of the ELBO's slope after the steps
            to that before them, within [0, 1], at a third of the time. It is exact where dims are independent and L is
            quadratic; with the identity in its place, nothing would hold the outputs along converged dims.
        seed: the seed of the noise.

    Returns batch shape [...], event shape [latent]. The steps enable gradients themselves, also under no_grad.
    Raises ValueError for steps < 0 and for an odd number of particles, ContractError for a prior over anything else.
    Source: Kim et al. 2018, Semi-amortized variational autoencoders (arXiv 1802.02550).

    >>> from ppvae import VAE, likelihoods, nn, priors
    >>> prior, likelihood = priors.StandardNormal(8), likelihoods.Bernoulli(nn.mlp(8, 64))
    >>> vae = VAE(prior, likelihood, SemiAmortized(nn.mlp(64, 2 * 8), prior, likelihood, steps=3))
    >>> vae.guide(torch.zeros(5, 64)).shape
    torch.Size([5, 8])
    """

    def __init__(
        self,
        net: nn.Module,
        prior: nn.Module,
        likelihood: nn.Module,
        steps: int = 5,
        rate: float = 0.5,
        num_particles: int = 4,
        through: bool = True,
        seed: int = 0,
    ):
        check_numbers(steps=steps, rate=rate, num_particles=num_particles, seed=seed)
        super().__init__()
        if num_particles < 2 or num_particles % 2:
            raise UsageError(f"num_particles: expected an even number, found {num_particles}")
        self.net, self.prior, self.likelihood = net, prior, likelihood
        self.steps, self.rate, self.through = steps, rate, through
        self.num_particles, self.seed = num_particles, seed

    @staticmethod
    def outputs(latent: int) -> int:
        check_numbers(latent=latent)
        return 2 * latent

    def head(self, outputs: Tensor) -> dist.TorchDistribution:
        loc, log_scale = outputs.chunk(2, dim=-1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def elbo(self, x: Tensor, outputs: Tensor, context: Tensor | None = None) -> Tensor:
        """L of each datum at parameters [..., 2 * latent] under the fixed noise, up to a constant: [...] nats."""
        loc, log_scale = outputs.chunk(2, dim=-1)
        noise = _antithetic_noise(self.num_particles, loc.shape[-1], self.seed).to(loc)
        z = loc + log_scale.exp() * noise.reshape(len(noise), *(1,) * (loc.dim() - 1), -1)
        prior, likelihood = self._prior(loc, context), call_with_context(self.likelihood, z, context=context)
        joint = likelihood.log_prob(x) + prior.log_prob(z)
        return joint.mean(0) + log_scale.sum(-1)

    def _prior(self, loc: Tensor, context: Tensor | None) -> dist.TorchDistribution:
        """The prior, which must be over real vectors. ContractError otherwise."""
        prior = call_with_context(self.prior, context=context)
        support = getattr(prior.support, "base_constraint", prior.support)
        if support not in (constraints.real, constraints.real_vector) or prior.event_shape != loc.shape[-1:]:
            raise ContractError(
                f"SemiAmortized: expected a prior over real vectors {list(loc.shape[-1:])}, as its normal is, found "
                f"{type(self.prior).__name__} over {list(prior.event_shape)}"
            )
        return prior

    def _ascend_elbo(
        self, x: Tensor, best: Tensor, through: bool, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(parameters after the steps, slopes there, slopes at the start) from `best`, which requires a gradient."""

        def value_and_gradient(point: Tensor) -> tuple[Tensor, Tensor]:
            value = self.elbo(x, point, context)
            (slope,) = torch.autograd.grad(value.sum(), point, create_graph=through)
            return value.detach(), slope

        value, first = value_and_gradient(best)
        slope = first
        rate = torch.full_like(value, self.rate)
        for _ in range(self.steps):
            to_loc, to_scale = slope.chunk(2, dim=-1)
            variance = (2 * best.chunk(2, dim=-1)[1]).exp()
            trial = best + rate.unsqueeze(-1) * torch.cat([variance * to_loc, to_scale / 2], -1)
            if not through:
                trial = trial.detach().requires_grad_()
            new, new_slope = value_and_gradient(trial)
            improved = new > value
            best = torch.where(improved.unsqueeze(-1), trial, best)
            slope = torch.where(improved.unsqueeze(-1), new_slope, slope)
            value = torch.where(improved, new, value)
            rate = torch.where(improved, (1.5 * rate).clamp(max=self.rate), rate / 2)
        return best, slope, first

    def forward(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        start = call_with_context(self.net, x, context=context)
        if torch.is_grad_enabled() and self.through and start.requires_grad:
            return self.head(self._ascend_elbo(x, start, True, context)[0])
        with torch.enable_grad():
            end, slope, first = self._ascend_elbo(x, start.detach().requires_grad_(), False, context)
        remaining = (slope / first).nan_to_num(1.0).clamp(0.0, 1.0).detach()  # as a step of Newton leaves none
        return self.head(end.detach() + remaining * (start - start.detach()))


@functools.cache
def _antithetic_noise(count: int, latent: int, seed: int) -> Tensor:
    """Antithetic standard normal noise [count, latent] with variance one in every dim."""
    half = torch.randn(count // 2, latent, generator=torch.Generator().manual_seed(seed))
    if len(half) >= latent:  # as many draws as dims: uncorrelated, too
        half = torch.linalg.qr(half).Q
    half = half / (half**2).mean(0).sqrt()
    return torch.cat([half, -half])
