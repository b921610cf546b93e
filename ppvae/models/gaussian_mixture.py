"""Mixtures of normals and of factor analysers, with the cluster enumerated."""

from __future__ import annotations

from typing import Any, final

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.errors import UsageError
from ppvae.errors.ranges import Range, check_numbers
from ppvae.parameter_names import unique_name


@final
class GaussianMixture(nn.Module):
    """c ~ Categorical(softmax(logits)), x | c ~ N(loc_c, covariance_c), with the cluster c summed out exactly.

    log p(x) = logsumexp_c (log softmax(logits)_c + log N(x; loc_c, covariance_c)).
    The guide is empty: the model marks c as enumerated, so that `ppvae.objectives.ELBO()` and Pyro's
    `TraceEnum_ELBO()` are log p(x) itself, and `log_marginal` is exact. One component of a rank is factor analysis.

    Args:
        features: the size of x.
        components: the number of clusters.
        rank: None for full covariances; 0 for diagonal ones; r for a mixture of factor analysers, whose covariances are
            W_c W_c^T + diag(s_c)^2 with W_c [features, r].

    Locations start at standard normal draws, scales at one; `from_data` starts at rows of the data.
    Raises ValueError for fewer than one component, or a rank that is negative or no less than the features.
    Source: McLachlan and Peel 2000, Finite mixture models; Ghahramani and Hinton 1996, The EM algorithm for mixtures of
    factor analyzers.

    >>> pair = GaussianMixture(3, components=2)
    >>> pair.log_px(torch.zeros(4, 3)).shape, pair.posterior(torch.zeros(4, 3)).probs.shape
    (torch.Size([4]), torch.Size([4, 2]))
    """

    def __init__(self, features: int, components: int, rank: int | None = None):
        check_numbers(features=features, components=components)
        if rank is not None:
            words = f"None or 0 to {features - 1} for {features} features"
            Range(words, 0, features - 1, whole=True).check_number("rank", rank)
        super().__init__()
        self.rank = rank
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, features))
        self.log_scale = nn.Parameter(torch.zeros(components, features))
        if rank is None:  # the Cholesky factor below the diagonal
            self.factor = nn.Parameter(torch.zeros(components, features, features))
        elif rank:
            self.factor = nn.Parameter(0.1 * torch.randn(components, features, rank))
        self._name = unique_name("gaussian_mixture")

    @classmethod
    def from_data(cls, x: Tensor, components: int, rank: int | None = None, seed: int = 0) -> GaussianMixture:
        """A mixture initialised at distinct rows of data [N, features], with the scales of the data in every cluster.

        Raises ValueError where there are fewer rows than components.
        """
        check_numbers(components=components, seed=seed)
        if not 1 <= components <= len(x):
            raise UsageError(f"components: expected 1 to {len(x)}, as there are rows of data, found {components}")
        pair = cls(x.shape[1], components, rank).to(x)
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:components]
        with torch.no_grad():
            pair.loc.copy_(x[rows.to(x.device)])
            pair.log_scale.copy_(x.std(0).clamp(min=1e-3).log().expand_as(pair.log_scale))
        return pair

    def model(self, x: Tensor) -> Tensor:
        """p(x, c)."""
        pyro.module(self._name, self)
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"})
            return pyro.sample("x", self.component(c), obs=x)

    def guide(self, x: Tensor) -> None:
        """Empty: c is enumerated in the model."""

    def component(self, c: Any = ...) -> dist.TorchDistribution:
        """p(x | c), batch shape that of c (all clusters by default), event shape [features]."""
        loc, scale = self.loc[c], self.log_scale[c].exp()
        if self.rank is None:
            return dist.MultivariateNormal(loc, scale_tril=self.factor[c].tril(-1) + scale.diag_embed())
        if self.rank == 0:
            return dist.Normal(loc, scale).to_event(1)
        return dist.LowRankMultivariateNormal(loc, self.factor[c], scale.square())

    def posterior(self, x: Tensor) -> dist.Categorical:
        """p(c | x) in closed form, the responsibilities: batch shape [batch]."""
        return dist.Categorical(logits=self.component().log_prob(x.unsqueeze(-2)) + self.logits.log_softmax(-1))

    def log_px(self, x: Tensor) -> Tensor:
        """log p(x) in closed form, [batch] nats."""
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), self.component()).log_prob(x)
