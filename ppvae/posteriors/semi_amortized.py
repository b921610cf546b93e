"""An amortised posterior that takes a few steps of its own for every datum."""

from __future__ import annotations

import inspect
from typing import final

import pyro.distributions as dist
import torch
from torch import Tensor, nn


@final
class SemiAmortized(nn.Module):
    """A diagonal normal posterior that starts where a network says and climbs the ELBO of each datum for a few steps.

    (loc, log_scale) = net(x); then, `steps` times, loc += rate * scale^2 * dL/dloc and log_scale += rate / 2 * dL/dlog
    scale, the natural gradient of L = E_q[log p(x | z) + log p(z)] + sum log_scale, with a fixed set of noise for the
    expectation, so that q(z | x) is a function of x alone. A step counts where it raises L; a datum's rate is halved
    where it does not, and grows back where it does: L never ends below its start. Kim et al. take plain gradient steps
    of a fixed rate, which must be tuned for every decoder.

    Args:
        net: maps data [..., *event] to [..., 2 * latent], location and log-scale.
        prior, likelihood: the pair's own modules p(z) and p(x | z), neither of which may declare `context`. The decoder
            must take any leading dims.
        steps: how many; each costs a pass through the decoder and back for every particle.
        rate: the first step size; one is Newton's step for a normal posterior of the right scale.
        num_particles: noise draws for the expectation, in pairs of opposite sign and with variance one in every dim;
            from 2 * latent draws on they are uncorrelated as well, and expectations of quadratics are exact.
        through: differentiate through the steps in training, as the paper does; otherwise the steps count as a constant
            shift, and the network's gradient is that of the refined parameters.
        seed: of the noise.

    Returns batch shape [...], event shape [latent]. Works without gradients as well: it switches them on for its steps.
    Raises ValueError for a prior or likelihood with context, for steps < 0, and for an odd number of particles.
    Source: Kim et al. 2018, Semi-amortized variational autoencoders (arXiv 1802.02550).

    >>> from ppvae import VAE, likelihoods, nn, priors
    >>> prior, likelihood = priors.StandardNormal(8), likelihoods.Bernoulli(nn.mlp(8, 64))
    >>> vae = VAE(prior, likelihood, SemiAmortized(nn.mlp(64, 2 * 8), prior, likelihood, steps=3))
    >>> vae.guide(torch.zeros(5, 64)).shape
    torch.Size([5, 8])
    """

    noise: Tensor

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
        super().__init__()
        for name, part in (("prior", prior), ("likelihood", likelihood)):
            if "context" in inspect.signature(part.forward).parameters:
                raise ValueError(f"{name}: expected one without `context`, found {type(part).__name__}")
        if steps < 0:
            raise ValueError(f"steps: expected 0 or more, found {steps}")
        if num_particles < 2 or num_particles % 2:
            raise ValueError(f"num_particles: expected an even number, found {num_particles}")
        self.net, self.prior, self.likelihood = net, prior, likelihood
        self.steps, self.rate, self.through = steps, rate, through
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            latent = prior().event_shape[-1]
        half = torch.randn(num_particles // 2, latent, generator=generator)
        if len(half) >= latent:  # as many draws as dims: uncorrelated, too
            half = torch.linalg.qr(half).Q
        half = half / (half**2).mean(0).sqrt()
        self.register_buffer("noise", torch.cat([half, -half]))

    @staticmethod
    def outputs(latent: int) -> int:
        """How many outputs the network has."""
        return 2 * latent

    def head(self, outputs: Tensor) -> dist.TorchDistribution:
        """The distribution that parameters [..., 2 * latent] stand for."""
        loc, log_scale = outputs.chunk(2, dim=-1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def elbo(self, x: Tensor, outputs: Tensor) -> Tensor:
        """L of each datum at parameters [..., 2 * latent], with the fixed noise and up to a constant: [...] nats."""
        loc, log_scale = outputs.chunk(2, dim=-1)
        noise = self.noise.reshape(len(self.noise), *(1,) * (loc.dim() - 1), -1)
        z = loc + log_scale.exp() * noise
        joint = self.likelihood(z).log_prob(x) + self.prior().log_prob(z)
        return joint.mean(0) + log_scale.sum(-1)

    def _refined(self, x: Tensor, best: Tensor, through: bool) -> Tensor:
        """The parameters after the steps; `best` is where they start, and takes a gradient."""

        def looked_at(point: Tensor) -> tuple[Tensor, Tensor]:
            value = self.elbo(x, point)
            (slope,) = torch.autograd.grad(value.sum(), point, create_graph=through)
            return value.detach(), slope

        value, slope = looked_at(best)
        rate = torch.full_like(value, self.rate)
        for _ in range(self.steps):
            to_loc, to_scale = slope.chunk(2, dim=-1)
            variance = (2 * best.chunk(2, dim=-1)[1]).exp()
            trial = best + rate.unsqueeze(-1) * torch.cat([variance * to_loc, to_scale / 2], -1)
            if not through:
                trial = trial.detach().requires_grad_()
            new, new_slope = looked_at(trial)
            better = new > value
            best = torch.where(better.unsqueeze(-1), trial, best)
            slope = torch.where(better.unsqueeze(-1), new_slope, slope)
            value = torch.where(better, new, value)
            rate = torch.where(better, (1.5 * rate).clamp(max=self.rate), rate / 2)
        return best

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        start = self.net(x)
        if torch.is_grad_enabled() and self.through and start.requires_grad:
            return self.head(self._refined(x, start, True))
        with torch.enable_grad():
            shift = self._refined(x, start.detach().requires_grad_(), False).detach() - start.detach()
        return self.head(start + shift)
