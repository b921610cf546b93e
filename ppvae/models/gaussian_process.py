"""Gaussian-process VAEs of sequences, with missing times."""

from collections.abc import Callable
from typing import final

import pyro
import torch
from torch import Tensor, nn

from ppvae.errors import ContractError, DataError
from ppvae.models.composed_model import ComposedModel, as_diagonal_normal
from ppvae.nn import rows_of
from ppvae.nn.sequences import require_sequences
from ppvae.priors.gaussian_process import GaussianProcessVector, cholesky_or_nan

ApproximatePosterior = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def smoothed(covariance: Tensor, loc: Tensor, scale: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """q(z | x) ~ p(z) prod_t N(z_t; loc_t, scale_t^2) over known times: Gaussian-process regression.

    The exact posterior where each factor is proportional to p(x_t | z_t). With D = diag(known / scale) and
    B = 1 + D K D, the mean is K D B^-1 D loc and the covariance K - K D B^-1 D K.

    Args:
        covariance: K, that of the prior, [..., latent, T, T].
        loc, scale: location and scale of the factors, [batch, latent, T].
        known: [batch, 1, T].

    Returns (mean [batch, latent, T], covariance [batch, latent, T, T]).
    Source: Johnson et al. 2016 (arXiv 1603.06277); Pearce 2020, The Gaussian process prior VAE for interpretable latent
    dynamics from pixels; Rasmussen and Williams 2006, section 2.2.
    """
    weight = torch.where(known, 1 / scale, 0.0)
    inner = weight.unsqueeze(-1) * covariance * weight.unsqueeze(-2)
    half = cholesky_or_nan(inner + torch.eye(inner.shape[-1]).to(inner))
    right = torch.cat([weight.unsqueeze(-1) * covariance, (weight * loc).unsqueeze(-1)], -1)
    spread, projection = torch.linalg.solve_triangular(half, right, upper=False).split([inner.shape[-1], 1], -1)
    return (spread.mT @ projection).squeeze(-1), covariance - spread.mT @ spread


def stepwise(covariance: Tensor, loc: Tensor, scale: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """q(z | x) = prod_t N(z_t; loc_t, scale_t^2) over known times; p(z_t | z at known times) at the others.

    Arguments and result as of `smoothed`. Source: Casale et al. 2018 (arXiv 1810.11738).
    """
    known_pairs = known.unsqueeze(-1) & known.unsqueeze(-2)
    of_known = torch.where(known_pairs, covariance, torch.eye(covariance.shape[-1]).to(covariance))
    to_known = torch.where(known.unsqueeze(-1), covariance, 0.0).expand(of_known.shape)
    gain = torch.cholesky_solve(to_known, cholesky_or_nan(of_known)).mT
    variance = torch.where(known, scale**2, 0.0).diag_embed()
    left = torch.where(known_pairs, covariance, 0.0) - variance
    return (gain @ torch.where(known, loc, 0.0).unsqueeze(-1)).squeeze(-1), covariance - gain @ left @ gain.mT


@final
class GaussianProcessVAE(ComposedModel):
    """p(x) = int p(z) prod_t p(x_t | z_t) dz with a Gaussian-process prior over time for each dim of z_1 .. z_T.

    Data are x [batch, T, *event], at times 0 .. T - 1, or (x, times [batch, T]), numbers or points [batch, T, axes]. A
    time at which all of x_t is NaN is missing (`data.with_missing`): it is marginalised out of log p(x), and in model
    and guide z_t follows the prior given the other times, so that it cancels from the weights. Shorter sequences end in
    missing times. `ppvae.evaluation.impute` imputes x. Sites "z" [T * latent], time first, and "x".

    Args:
        prior: p(z), `priors.GaussianProcess`.
        likelihood: p(x_t | z_t).
        posterior: the factor N(z_t; loc(x_t), scale(x_t)^2) of each time: `posteriors.DiagonalNormal`.
        steps: how q(z | x) combines the factors: `smoothed`, which includes the prior as a factor, or `stepwise`.

    Raises DataError for a sequence without any known time, by its row, and for times of another shape than x;
    ContractError for a prior that is no Gaussian process, or a posterior that is not normal with independent dims.
    Source: Casale et al. 2018 (arXiv 1810.11738); Fortuin et al. 2020, GP-VAE (arXiv 1907.04155).

    >>> from ppvae import likelihoods, nn, posteriors, priors
    >>> pair = GaussianProcessVAE(
    ...     prior=priors.GaussianProcess(2, lengthscale=3.0),
    ...     likelihood=likelihoods.Normal(nn.mlp(2, 16)),
    ...     posterior=posteriors.DiagonalNormal(nn.mlp(16, 2 * 2)),
    ... )
    >>> x = torch.zeros(5, 7, 16)
    >>> x[0, 3:] = torch.nan
    >>> pair.guide(x).shape
    torch.Size([5, 14])
    """

    def __init__(
        self, prior: nn.Module, likelihood: nn.Module, posterior: nn.Module, steps: ApproximatePosterior = smoothed
    ):
        super().__init__("gaussian_process_vae")
        self.prior, self.likelihood, self.posterior, self.steps = prior, likelihood, posterior, steps

    def model(self, x: Tensor, times: Tensor | None = None) -> Tensor:
        """p(x, z)."""
        x, known, times = _parse_batch(x, times)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.call_part("prior", context=times))
            fn = self.call_part("likelihood", z.unflatten(-1, (x.shape[1], -1)), context=times)
            return pyro.sample("x", fn.mask(known).to_event(1), obs=x)

    def guide(self, x: Tensor, times: Tensor | None = None) -> Tensor:
        """q(z | x)."""
        x, known, times = _parse_batch(x, times)
        prior = self.call_part("prior", context=times)
        if not isinstance(prior, GaussianProcessVector):
            raise ContractError(f"prior: expected a Gaussian process, found {type(prior).__name__}")
        factors = as_diagonal_normal(self.call_part("posterior", x, context=times), "posterior")
        covariance = prior.scale_tril @ prior.scale_tril.mT
        loc, spread = self.steps(covariance, factors.loc.double().mT, factors.scale.double().mT, known.unsqueeze(-2))
        with pyro.plate("data", len(x)):
            return pyro.sample("z", GaussianProcessVector(cholesky_or_nan(spread), prior.dtype, loc))


def _parse_batch(x: Tensor, times: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x with 0 at missing times, the mask of known times [batch, T], and the times."""
    require_sequences(x)
    known = ~x.isnan().flatten(2).all(-1)
    indices = torch.arange(x.shape[1], device=x.device)
    rows_of(indices, known.sum(-1), "x: expected {first} to {last} known times of each sequence", first=1)
    if times is None:
        times = indices.unsqueeze(0).to(x.dtype)
    elif times.shape[:2] != x.shape[:2]:
        raise DataError(f"times: expected {list(x.shape[:2])}, as x has, found {list(times.shape)}")
    return torch.where(known.reshape(*known.shape, *(1,) * (x.dim() - 2)), x, 0.0), known, times
