"""Likelihoods of real numbers: normal, Laplace, Student's t, with fixed, learned or predicted scales."""

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae import distributions
from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers, check_ranges
from ppvae.likelihoods.network_outputs import (
    NetworkLikelihood,
    ParameterSource,
    event_dim,
    register_log_parameter,
    split_blocks,
)


class _LocationScale(NetworkLikelihood):
    """A location-scale likelihood: locations from net(z), scales fixed, learned or from net(z)."""

    log_scale: Tensor

    def __init__(self, net: nn.Module, scale: ParameterSource = 1.0, floor: float = 1e-3):
        check_numbers(floor=floor)
        check_ranges(scale=scale)
        super().__init__(net)
        self.floor, self._scale_from_network = floor, scale == "network"
        self.parameters_per_element = 2 if self._scale_from_network else 1
        register_log_parameter(self, "scale", scale)

    @property
    def at_floor(self) -> Tensor:
        """Which learned scales have reached the floor, in the shape of the scale. ValueError for predicted scales."""
        if self._scale_from_network:
            raise UsageError("at_floor: expected a scale of its own; the network's depends on z")
        return self.log_scale.exp() <= 1.01 * self.floor

    def _loc_scale(self, z: Tensor) -> tuple[Tensor, Tensor, int]:
        out = self.net(z)
        loc, log_scale = (
            split_blocks(out, z, 2, "location, log-scale") if self._scale_from_network else (out, self.log_scale)
        )
        scale = log_scale.exp()
        if self._scale_from_network or isinstance(self.log_scale, nn.Parameter):
            scale = scale + self.floor
        return loc, scale.expand(loc.shape), event_dim(loc, z)


class Normal(_LocationScale):
    """Independent normal dims, log p(x | z) = sum_d log N(x_d; loc_d(z), scale_d).

    Args:
        net: maps [..., latent] to locations [..., *event]; with scale="network" to [..., 2 * first, *rest], locations,
            then log-scales, along the first event dim.
        scale: a number (fixed), "learned" (one for all dims), a shape, the event's, for one learned scale a dim, or
            "network" (one a dim and datum).
        floor: the smallest learned scale. Where the data are constant in a dim, a learned scale and bits per dimension
            are unbounded below; the floor bounds them, and `at_floor` reports where it is reached.

    Returns batch shape [...], event shape [*event]; a density in nats. For the optimal sigma see `set_optimal_scale`.
    Raises ValueError for any other scale, or an output that does not divide.
    Source: Kingma and Welling 2014 (arXiv 1312.6114), appendix C.2; Rybkin et al. 2021 (arXiv 2006.13202) on the scale.

    >>> from ppvae.nn import mlp
    >>> Normal(mlp(8, 64), scale=0.1)(torch.zeros(5, 8)).shape()
    torch.Size([5, 64])
    """

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        loc, scale, dims = self._loc_scale(z)
        return dist.Normal(loc, scale).to_event(dims)


class Laplace(_LocationScale):
    """Independent Laplace dims, log p(x | z) = -sum_d |x_d - loc_d(z)| / scale_d + log(2 scale_d).

    More robust to outliers than a normal: its optimal location is a median.

    Args:
        net: as for `Normal`.
        scale: a number (fixed), "learned" (one for all dims), a shape, the event's, for one learned scale a dim, or
            "network" (one a dim and datum).
        floor: the smallest learned scale.

    Shapes and errors as for `Normal`.
    Source: Zhao et al. 2017, Loss functions for image restoration with neural networks (arXiv 1511.08861), on the
    absolute error.

    >>> from ppvae.nn import mlp
    >>> Laplace(mlp(8, 2 * 64), scale="network")(torch.zeros(5, 8)).shape()
    torch.Size([5, 64])
    """

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        loc, scale, dims = self._loc_scale(z)
        return dist.Laplace(loc, scale).to_event(dims)


class StudentT(_LocationScale):
    """Independent Student's t dims, log p(x | z) = sum_d log t(x_d; df, loc_d(z), scale_d), heavy-tailed.

    Args:
        net: as for `Normal`.
        df: the degrees of freedom: a number (fixed), "learned" (one for all dims, from 4), or a shape, the event's.
        scale: a number (fixed), "learned" (one for all dims), a shape, the event's, for one learned scale a dim, or
            "network" (one a dim and datum).
        floor: the smallest learned scale.

    Returns batch shape [...], event shape [*event]; a density in nats. Raises ValueError for any other df or scale.
    Source: Takahashi et al. 2018, "Student-t variational autoencoder for robust density estimation".

    >>> from ppvae.nn import mlp
    >>> StudentT(mlp(8, 64), df="learned", scale="learned")(torch.zeros(5, 8)).shape()
    torch.Size([5, 64])
    """

    log_df: Tensor

    def __init__(self, net: nn.Module, df: ParameterSource = 4.0, scale: ParameterSource = 1.0, floor: float = 1e-3):
        check_numbers(floor=floor)
        check_ranges(df=df, scale=scale)
        super().__init__(net, scale, floor)
        if df == "network":
            raise UsageError("df: expected a number, 'learned' or the event's shape, found 'network'")
        register_log_parameter(self, "df", df, start=4.0)

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        loc, scale, dims = self._loc_scale(z)
        return distributions.StudentT(self.log_df.exp().expand(loc.shape), loc, scale).to_event(dims)


@torch.no_grad()
def set_optimal_scale(likelihood: Normal | Laplace, x: Tensor, z: Tensor) -> Tensor:
    """Sets the learned scale to its closed-form optimum for data x at latents z, and returns it.

    For a normal sigma^2 = mean of (x - loc(z))^2, for a Laplace the mean of |x - loc(z)|; over all dims, or for each
    dim where the scale is per dim, and never below the floor. Call it between epochs, or once before training.

    This is the optimal sigma of Rybkin et al. 2021 (arXiv 2006.13202) with the model kept a normalised density. Theirs
    computes sigma from the mean squared error of the batch (or image) being scored: p(x | z) then depends on x, or on
    other data, through sigma, does not integrate to one, and defines no log p(x). A scale that is a parameter, set by
    this function or learned by gradient, has the same optimum over the data set.

    Args:
        likelihood: with scale="learned" or a shape; ValueError otherwise.
        x: data [..., *event].
        z: latents [..., latent], drawn from the posterior; leading dims broadcast with those of x.

    >>> part = Normal(torch.nn.Identity(), scale="learned")
    >>> set_optimal_scale(part, torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
    tensor(3.5355)
    """
    log_scale = getattr(likelihood, "log_scale", None)
    if not isinstance(log_scale, nn.Parameter):
        raise UsageError(f"likelihood: expected a learned scale, found a {type(likelihood).__name__} without one")
    residual = (x - likelihood.net(z)).abs().double()
    error = residual.square() if isinstance(likelihood, Normal) else residual
    dims = tuple(range(error.dim() - log_scale.dim()))
    best = error.mean(dims) if dims else error
    best = best.sqrt() if isinstance(likelihood, Normal) else best
    inner = (best - likelihood.floor).clamp(min=1e-6 * likelihood.floor)
    log_scale.copy_(inner.log())
    return log_scale.exp() + likelihood.floor
