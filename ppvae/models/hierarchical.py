"""VAEs with several stochastic layers: bottom-up inference, and top-down inference (ladder VAE)."""

from collections.abc import Sequence
from typing import Any, final

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.errors import UsageError
from ppvae.models.composed_model import ComposedModel, as_diagonal_normal


class _StochasticLayers(ComposedModel):
    """p(x, z1 .. zL) = p(zL) p(z(L-1) | zL) ... p(z1 | z2) p(x | z1), sites "z1" to "zL" and "x"."""

    def __init__(self, name: str, prior: nn.Module, layers: Sequence[nn.Module], likelihood: nn.Module):
        super().__init__(name)
        self.prior, self.layers, self.likelihood = prior, nn.ModuleList(layers), likelihood

    def model(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """p(x, z1 .. zL), from the top down."""
        with pyro.plate("data", len(x)):
            top = len(self.layers) + 1
            z = pyro.sample(f"z{top}", self.call_part("prior", context=context))
            for i in range(top - 1, 0, -1):
                z = pyro.sample(f"z{i}", self.call_part(f"layers.{i - 1}", z, context=context))
            return pyro.sample("x", self.call_part("likelihood", z, context=context), obs=x)

    def _check_lengths(self, **parts: Sequence[nn.Module]) -> None:
        for name, given in parts.items():
            if len(given) != len(self.layers) + 1:
                raise UsageError(
                    f"{name}: expected {len(self.layers) + 1}, one for each latent of a prior and {len(self.layers)} "
                    f"layers, found {len(given)}"
                )


@final
class HierarchicalVAE(_StochasticLayers):
    """A VAE with any number of stochastic layers, its guide bottom-up, q(z1 | x) q(z2 | z1) ... q(zL | z(L-1)).

    p(x) = int p(zL) p(z(L-1) | zL) ... p(z1 | z2) p(x | z1) dz. With one layer it is the `VAE`. Sites "z1" (next to the
    data) to "zL"; the metrics of `fit` include the KL of each. A part that declares `context` gets the batch's second
    tensor.

    Args:
        prior: p(zL).
        layers: p(z1 | z2), p(z2 | z3), ..., parts such as `posteriors.DiagonalNormal`; none for one layer.
        likelihood: p(x | z1).
        posteriors: q(z1 | x), q(z2 | z1), ..., one for each latent.

    Raises ValueError for other numbers of parts; ContractError at the first data, by the part, where one does not fit.
    Source: Burda et al. 2016 (arXiv 1509.00519), section 5; Rezende et al. 2014 (arXiv 1401.4082).

    >>> from ppvae import likelihoods, nn, posteriors, priors
    >>> vae = HierarchicalVAE(
    ...     prior=priors.StandardNormal(4),
    ...     layers=[posteriors.DiagonalNormal(nn.mlp(4, 2 * 8))],
    ...     likelihood=likelihoods.Bernoulli(nn.mlp(8, 64)),
    ...     posteriors=[posteriors.DiagonalNormal(nn.mlp(64, 2 * 8)), posteriors.DiagonalNormal(nn.mlp(8, 2 * 4))],
    ... )
    >>> vae.guide(torch.zeros(5, 64)).shape
    torch.Size([5, 4])
    """

    def __init__(
        self, prior: nn.Module, layers: Sequence[nn.Module], likelihood: nn.Module, posteriors: Sequence[nn.Module]
    ):
        super().__init__("hierarchical_vae", prior, layers, likelihood)
        self._check_lengths(posteriors=posteriors)
        self.posteriors = nn.ModuleList(posteriors)

    def guide(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """q(z1 .. zL | x), from the bottom up."""
        with pyro.plate("data", len(x)):
            z = x
            for i in range(1, len(self.posteriors) + 1):
                z = pyro.sample(f"z{i}", self.call_part(f"posteriors.{i - 1}", z, context=context))
            return z


@final
class LadderVAE(_StochasticLayers):
    """A VAE with top-down inference through the layers of the model, q(zL | x) q(z(L-1) | zL, x) ... q(z1 | z2, x).

    A deterministic pass upward gives d1 = encoder1(x), d2 = encoder2(d1), ..., and q^(zi | di), normal with independent
    dims. The top latent is drawn from q^(zL | dL), each lower one from the precision-weighted product with the
    model: q(zi | z(i+1), x) is proportional to q^(zi | di) p(zi | z(i+1)). The model is that of
    `HierarchicalVAE`; with one layer both are the `VAE`. A part that declares `context` gets the batch's second tensor.

    Args:
        prior: p(zL).
        layers: p(z1 | z2), p(z2 | z3), ..., normal with independent dims, as `posteriors.DiagonalNormal`.
        likelihood: p(x | z1).
        encoders: networks of x, d1, d2, ..., one for each latent.
        posteriors: q^(z1 | d1), q^(z2 | d2), ..., `posteriors.DiagonalNormal`, one for each latent.

    Raises ValueError for other numbers of parts; ContractError at the first data, by the part, for a layer or posterior
    that is not normal with independent dims.
    Source: Sonderby et al. 2016 (arXiv 1602.02282).

    >>> from ppvae import likelihoods, nn, posteriors, priors
    >>> vae = LadderVAE(
    ...     prior=priors.StandardNormal(4),
    ...     layers=[posteriors.DiagonalNormal(nn.mlp(4, 2 * 8))],
    ...     likelihood=likelihoods.Bernoulli(nn.mlp(8, 64)),
    ...     encoders=[nn.mlp(64, 32), nn.mlp(32, 32)],
    ...     posteriors=[posteriors.DiagonalNormal(nn.mlp(32, 2 * size, hidden=())) for size in (8, 4)],
    ... )
    >>> vae.guide(torch.zeros(5, 64)).shape
    torch.Size([5, 8])
    """

    def __init__(
        self,
        prior: nn.Module,
        layers: Sequence[nn.Module],
        likelihood: nn.Module,
        encoders: Sequence[nn.Module],
        posteriors: Sequence[nn.Module],
    ):
        super().__init__("ladder_vae", prior, layers, likelihood)
        self._check_lengths(encoders=encoders, posteriors=posteriors)
        self.encoders, self.posteriors = nn.ModuleList(encoders), nn.ModuleList(posteriors)

    def guide(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """q(z1 .. zL | x), from the top down."""
        above = []
        for i in range(len(self.encoders)):
            above.append(x := self.call_part(f"encoders.{i}", x, context=context))
        with pyro.plate("data", len(x)):
            top = len(self.posteriors)
            z = pyro.sample(f"z{top}", self.call_part(f"posteriors.{top - 1}", above[-1], context=context))
            for i in range(top - 1, 0, -1):
                bottom_up = self.call_part(f"posteriors.{i - 1}", above[i - 1], context=context)
                top_down = self.call_part(f"layers.{i - 1}", z, context=context)
                fn = _product_of_normals(
                    as_diagonal_normal(bottom_up, f"posteriors.{i - 1}"),
                    as_diagonal_normal(top_down, f"layers.{i - 1}"),
                )
                z = pyro.sample(f"z{i}", fn)
            return z


def _product_of_normals(a: Any, b: Any) -> dist.TorchDistribution:
    """The normal whose density is proportional to the product of two, [...], event [latent]."""
    scale_norm = torch.hypot(a.scale, b.scale)  # precisions would overflow where a scale is small
    share = (b.scale / scale_norm).square()
    return dist.Normal(b.loc + share * (a.loc - b.loc), a.scale * (b.scale / scale_norm)).to_event(1)
