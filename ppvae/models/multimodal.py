"""VAEs of several modalities, such as image and caption, with missing modalities."""

from collections.abc import Callable, Sequence
from typing import Any, final

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from ppvae.distributions.normal_mixture import NormalMixture
from ppvae.errors import DataError, UsageError
from ppvae.models.composed_model import ComposedModel, as_diagonal_normal
from ppvae.nn import rows_of

CombineExperts = Callable[[Any, Sequence[Any], Tensor | None], Any]


def product_of_experts(prior: Any, experts: Sequence[Any], present: Tensor | None) -> Any:
    """q(z | x) ~ p(z) prod_m q^m(z | xm) of normals, over the modalities that are present [batch, M].

    Sharper than each expert; the exact posterior where each expert is proportional to p(xm | z).
    Source: Wu and Goodman 2018 (arXiv 1802.05335).

    >>> z = dist.Normal(torch.zeros(1, 2), 1.0)
    >>> product_of_experts(z, [z, z], torch.tensor([[True, False]])).base_dist.scale
    tensor([[0.7071, 0.7071]])
    """
    prior = as_diagonal_normal(prior, "prior")
    precision, weighed = prior.scale**-2, prior.loc * prior.scale**-2
    for m, expert in enumerate(experts):
        there = expert.scale**-2
        if present is not None:
            there = torch.where(present[:, m].unsqueeze(-1), there, 0.0)
        precision, weighed = precision + there, weighed + there * expert.loc
    return dist.Normal(weighed / precision, precision.rsqrt()).to_event(1)


def mixture_of_experts(prior: Any, experts: Sequence[Any], present: Tensor | None) -> Any:
    """q(z | x) = mean_m q^m(z | xm) of normals, over the modalities that are present [batch, M]; the prior is no
    expert.

    As wide as its widest expert; experts have equal weights. Draws are reparameterised (see
    `distributions.normal_mixture.NormalMixture`), so that any gradient estimator applies.
    Source: Shi et al. 2019 (arXiv 1911.03393), who stratify draws over experts.

    >>> z = dist.Normal(torch.zeros(1, 2), 1.0)
    >>> mixture_of_experts(z, [z, z], None).log_prob(torch.zeros(2)) - z.to_event(1).log_prob(torch.zeros(2))
    tensor([0.])
    """
    loc, scale = (torch.stack([getattr(e, name) for e in experts], -2) for name in ("loc", "scale"))
    weight = loc.new_zeros(loc.shape[:-1])
    if present is not None:
        there = present.unsqueeze(-1)  # the network output of a missing modality is arbitrary
        loc, scale = torch.where(there, loc, 0.0), torch.where(there, scale, 1.0)
        weight = torch.where(present, weight, -torch.inf)
    return NormalMixture(loc, scale, weight)


@final
class MultimodalVAE(ComposedModel):
    """p(x1 .. xM) = int p(z) prod_m p(xm | z) dz with a product, or a mixture, of experts q^m(z | xm) as guide.

    Missing modalities are left out of model and guide: log p(x) is that of the present ones. Data are (x1 [batch,
    *event1], ..., xM) or, with missing modalities, (x1, ..., xM, present [batch, M]); values of a missing modality are
    ignored. Sites "z", "x1" to "xM".

    Args:
        prior: p(z), `priors.StandardNormal`; for a product, normal with independent dims.
        likelihoods: p(x1 | z), p(x2 | z), ...
        posteriors: the experts q^1(z | x1), q^2(z | x2), ..., `posteriors.DiagonalNormal`.
        experts: how q(z | x) combines them: `product_of_experts`, which includes the prior as an expert, or
            `mixture_of_experts`.

    Raises ValueError for other numbers of parts; ContractError, by the part, for an expert that is not normal with
    independent dims; DataError for another number of tensors, or a datum with no modality, by its row.
    Source: Wu and Goodman 2018 (arXiv 1802.05335); Shi et al. 2019 (arXiv 1911.03393).

    >>> from ppvae import likelihoods, nn, posteriors, priors
    >>> vae = MultimodalVAE(
    ...     prior=priors.StandardNormal(4),
    ...     likelihoods=[likelihoods.Bernoulli(nn.mlp(4, 64)), likelihoods.Normal(nn.mlp(4, 3))],
    ...     posteriors=[posteriors.DiagonalNormal(nn.mlp(size, 2 * 4)) for size in (64, 3)],
    ... )
    >>> present = torch.tensor([[True, True], [True, False]])
    >>> vae.guide(torch.zeros(2, 64), torch.zeros(2, 3), present).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        prior: nn.Module,
        likelihoods: Sequence[nn.Module],
        posteriors: Sequence[nn.Module],
        experts: CombineExperts = product_of_experts,
    ):
        super().__init__("multimodal_vae")
        if not 0 < len(likelihoods) == len(posteriors):
            raise UsageError(
                f"posteriors: expected one for each of {len(likelihoods)} likelihoods, found {len(posteriors)}"
            )
        self.experts = experts
        self.prior, self.likelihoods, self.posteriors = prior, nn.ModuleList(likelihoods), nn.ModuleList(posteriors)

    def model(self, *batch: Tensor) -> None:
        """p(z) and p(xm | z) of the present modalities."""
        data, present = self._split_batch(batch)
        with pyro.plate("data", len(data[0])):
            z = pyro.sample("z", self.call_part("prior"))
            for m, x in enumerate(data):
                with poutine.mask(mask=True if present is None else present[:, m]):
                    pyro.sample(f"x{m + 1}", self.call_part(f"likelihoods.{m}", z), obs=x)

    def guide(self, *batch: Tensor) -> Tensor:
        """q(z | x) of the present modalities."""
        data, present = self._split_batch(batch)
        found = [
            as_diagonal_normal(self.call_part(f"posteriors.{m}", x), f"posteriors.{m}") for m, x in enumerate(data)
        ]
        with pyro.plate("data", len(data[0])):
            return pyro.sample("z", self.experts(self.call_part("prior"), found, present))

    def _split_batch(self, batch: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor | None]:
        """The modalities, and the mask of present ones."""
        count = len(self.likelihoods)
        if len(batch) == count:
            return batch, None
        if len(batch) != count + 1 or batch[-1].shape != (len(batch[0]), count):
            raise DataError(
                f"data: expected {count} modalities and perhaps which are present [batch, {count}], found "
                f"{[list(t.shape) for t in batch]}"
            )
        present = batch[-1].bool()
        each = torch.arange(count, device=present.device)
        rows_of(each, present.sum(-1), "present: expected {first} to {last} modalities of each datum", first=1)
        return batch[:-1], present
