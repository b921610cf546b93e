"""A VAE whose decoder's last layer has a posterior."""

from __future__ import annotations

from typing import final

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.errors.ranges import check_numbers
from ppvae.models.bayesian.plate import NUM_DATA, data_plate
from ppvae.models.composed_model import ComposedModel


@final
class LastLayerVAE(ComposedModel):
    """A VAE whose decoder ends in a linear layer of random weights: x ~ likelihood([h(z), 1] weight).

    weight ~ N(0, scale^2 / inputs), a global latent [hidden + 1, outputs], the last row the bias; h is trained.
    The guide is an independent normal of each weight, and q(z | x) amortised. Sites "weight", "z", "x".

    Args:
        size: the number of training data, of which a batch is a part.
        prior: p(z).
        features: h, a network from z to [..., hidden].
        likelihood: a conditional of the layer's output [..., outputs], as `likelihoods.Bernoulli(torch.nn.Identity())`.
        posterior: q(z | x).
        hidden, outputs: the sizes of h(z) and of what the likelihood takes.
        scale: of the weights' prior.

    Raises ValueError for fewer than one datum.
    Source: Kingma and Welling 2014 (arXiv 1312.6114), appendix F; Snoek et al. 2015 (arXiv 1502.05700) for the layer.

    >>> from ppvae import likelihoods, nn, posteriors, priors
    >>> pair = LastLayerVAE(
    ...     100, priors.StandardNormal(2), nn.mlp(2, 5), likelihoods.Bernoulli(torch.nn.Identity()),
    ...     posteriors.DiagonalNormal(nn.mlp(4, 2 * 2)), hidden=5, outputs=4,
    ... )
    >>> pair.guide(torch.zeros(3, 4)).shape, pair.model(torch.zeros(3, 4)).shape
    (torch.Size([3, 2]), torch.Size([3, 4]))
    """

    def __init__(
        self, size: int, prior: nn.Module, features: nn.Module, likelihood: nn.Module, posterior: nn.Module,
        hidden: int, outputs: int, scale: float = 1.0,
    ):  # fmt: skip
        NUM_DATA.check_number("size", size)
        check_numbers(hidden=hidden, outputs=outputs, scale=scale)
        super().__init__("last_layer_vae")
        self.size, self.scale = size, scale * (hidden + 1) ** -0.5
        self.prior, self.features, self.likelihood, self.posterior = prior, features, likelihood, posterior
        self.layer = WeightPosterior(hidden + 1, outputs, self.scale)

    def model(self, x: Tensor) -> Tensor:
        """p(weight, z, x)."""
        loc = torch.zeros_like(self.layer.loc)
        weight = pyro.sample("weight", dist.Normal(loc, self.scale).to_event(2))
        with data_plate(self.size, x):
            z = pyro.sample("z", self.call_part("prior"))
            h = self.register_part("features")(z)
            outputs = (h.unsqueeze(-2) @ weight[..., :-1, :]).squeeze(-2) + weight[..., -1, :]
            return pyro.sample("x", self.call_part("likelihood", outputs), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """q(weight) q(z | x)."""
        pyro.sample("weight", self.call_part("layer"))
        with data_plate(self.size, x):
            return pyro.sample("z", self.call_part("posterior", x))


class WeightPosterior(nn.Module):
    """q(weight): an independent normal of each."""

    def __init__(self, inputs: int, outputs: int, scale: float):
        super().__init__()
        self.loc = nn.Parameter(scale * torch.randn(inputs, outputs))
        self.log_scale = nn.Parameter(torch.full((inputs, outputs), 0.1 * scale).log())

    def forward(self) -> dist.TorchDistribution:
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(2)
