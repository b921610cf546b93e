"""Gradients through the draws of discrete sites, one site at a time.

The gradient of E[R(log w_1, ..., log w_K)] has two parts: the gradient of the bound R at given draws, through its
densities and reparameterised samples, and sum_k E[R d log q(z_k)] of every site without a path. A `SiteEstimator`
estimates the second part for one site, given the values that the guide sampled before it.

Coupled draws (antithetic, without replacement) are made given the guide's own draws, from further noise: the bound's
value and the order of its noise are those of every other estimator. `SiteDraws.evaluate` hands them to `terms` as
`values=` together with the values of earlier sites; the guide samples later sites anew.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor

from ppvae.errors import ContractError, UsageError, site_error
from ppvae.inference.particle_layout import unfold_value
from ppvae.inference.second_run import buffer_copies
from ppvae.inference.sites import Site
from ppvae.inference.structure import ParticlePlacement, Structure
from ppvae.inference.terms import Terms
from ppvae.objectives.gradients.estimator import GradientEstimator, gradient_only
from ppvae.objectives.gradients.latent_leaves import LatentLeaves
from ppvae.objectives.protocol import LogWeightBound, PairCall
from ppvae.objectives.requirements import require_sampled_latents


@dataclass(frozen=True)
class SiteDraws:
    """The K draws per datum of one site without a path: what a `SiteEstimator` reads.

    Attributes:
        terms: of the pair at the draws, with gradients.
        log_weight: `objective.log_weights(terms)` without gradients, [K, batch] nats.
        rows: log-weights of further draws, [K, batch, further draws] with gradients, which `evaluate` adds to.
    """

    name: str
    objective: LogWeightBound
    call: PairCall
    terms: Terms
    log_weight: Tensor
    leaves: LatentLeaves | None
    rows: list[Tensor] | None = field(repr=False)

    @property
    def site(self) -> Site:
        return self.terms.guide[self.name]

    @property
    def log_prob(self) -> Tensor:
        """log q of the site, [K, batch] nats, with gradients."""
        return self.site.log_prob.double()

    @property
    def value(self) -> Tensor:
        """[K, *inner plates, batch, *event]."""
        return self.site.value.detach()

    @property
    def event_dims(self) -> int:
        return int(self.terms.structure.event_dims[self.name])

    def particles(self, of: Callable[[Any, Tensor], Tensor]) -> Tensor:
        """of(distribution, value) of every run, each in the shape of the run's value, in the shape of `value`."""
        runs = self.site.particle_sites or (self.site,)
        return self._unfold([of(base_distribution(run.distribution), run.traced_value.detach()) for run in runs])

    def _unfold(self, runs: Sequence[Tensor]) -> Tensor:
        t = self.terms
        if t.structure.layout is ParticlePlacement.ONE_BY_ONE:
            return torch.stack(list(runs))
        if t.structure.layout is ParticlePlacement.FOLDED:
            return unfold_value(runs[0], t.structure, self.name, t.num_particles, t.batch_size)
        return runs[0]

    @property
    def value_gradient(self) -> Tensor:
        """d log w_k / d value of draw k, in the shape of `value`: the densities are functions of real numbers."""
        assert self.leaves is not None
        found = self.leaves.gradients(self.objective.log_weights(self.terms), self.name)
        if not found:
            raise site_error(
                self.name, "a latent of floating point, whose densities have a gradient in its value",
                f"{self.value.dtype} values", "take a OneHotCategorical, or gradient='arms'",
            )  # fmt: skip
        return self._unfold(list(found.values()))

    @property
    def kept(self) -> Tensor:
        """1 where the site counts, 0 where a mask removes it, in the shape of `value`."""
        mask = self.site.mask
        if mask is None:
            return torch.ones_like(self.value, dtype=torch.float64)
        if self.site.particle_sites:
            masks = [one.mask for one in self.site.particle_sites]
        else:
            masks = [mask]
        shape = (self.site.particle_sites or (self.site,))[0].traced_value.shape
        return self._unfold([torch.as_tensor(one, device=self.value.device).expand(shape).double() for one in masks])

    def spread(self, weights: Tensor, like: Tensor, event_dims: int | None = None) -> Tensor:
        """[..., K, batch] in a shape that broadcasts with [..., K, *inner plates, batch, *event]."""
        event = self.event_dims if event_dims is None else event_dims
        inner = (1,) * (like.dim() - event - 2)
        return weights.reshape(*weights.shape[:-1], *inner, weights.shape[-1], *(1,) * event)

    def evaluate(self, values: Tensor, from_guide: bool = True) -> Tensor:
        """The log-weights of further draws of the site, values [M, *shape of `value`]: [M, K, batch] nats, detached.

        Earlier sites keep their values, later sites are sampled anew. `from_guide`: each further draw alone has the
        guide's distribution, so that its bound is averaged with the bound in the gradient at given draws.
        """
        count, given = len(values), {self.name: values.flatten(0, 1)}
        for name, site in self.terms.guide.items():
            if name == self.name:
                break
            given[name] = site.value.expand(count, *site.value.shape).flatten(0, 1)
        rows = self.rows if from_guide else None
        with buffer_copies(), torch.set_grad_enabled(rows is not None and torch.is_grad_enabled()):
            t = self.call.again(count * len(self.log_weight), given)
            log_weight = without_scores(self.objective, t).unflatten(0, (count, -1))
        if rows is not None:
            rows.append(log_weight.movedim(0, -1))
        return log_weight.detach()

    def bounds(self, log_weights: Tensor) -> Tensor:
        """The bound with log-weight k replaced by that of each further draw, [M, K, batch] -> [1 + M, K, batch] nats.

        The first entry is the bound at the guide's own draws.
        """
        bound = self.objective.reduce(self.log_weight).expand_as(self.log_weight)
        return torch.stack([bound, *(self.objective.leave_one_out_bound(self.log_weight, w) for w in log_weights)])


class SiteEstimator(GradientEstimator):
    """An estimator of gradients through draws of sites without a path; all other latents have the pathwise gradient.

    A subclass defines `site_surrogate`. `gradient={"z": ..., "y": ...}` gives sites estimators of their own.
    """

    holds_latents = False
    needs_values = False  # reads `SiteDraws.value_gradient`

    @abstractmethod
    def site_surrogate(self, site: SiteDraws) -> Tensor:
        """A scalar whose gradient estimates sum_k E[R d log q(z_k)], R being the bound of each datum."""

    def check_structure(self, objective: LogWeightBound, s: Structure) -> None:
        check_sites(self, s, type(self).__name__)

    def surrogate(self, objective: LogWeightBound, call: PairCall) -> Tensor:
        hook = LatentLeaves(call.structure.non_reparameterized) if self.needs_values else None
        t = call.terms(latent_hook=hook) if hook is not None else call.terms()
        bound = objective.bound(t).sum()
        return bound + gradient_only(sites_surrogate(objective, call, t, lambda name: self, hook, paths=True))


def check_sites(estimator: Any, s: Structure, consumer: str) -> None:
    """The sites without a path are local, and the guide enumerates no site beside them."""
    if not s.non_reparameterized:
        return
    require_sampled_latents(s, f"{consumer} of another site", "take gradient='pathwise' and enumerate all of them")
    if s.has_global_latents:
        raise ContractError(
            f"{consumer}: expected data without a shared latent, found {', '.join(s.global_sites) or 'one'}. "
            "Take gradient='score' or 'vimco'"
        )


def sites_surrogate(
    objective: LogWeightBound,
    call: PairCall,
    t: Terms,
    estimator_of: Callable[[str], Any],
    leaves: LatentLeaves | None,
    paths: bool,
) -> Tensor:
    """A scalar whose gradient is that through the draws of all sites without a path.

    With `paths`, the further draws of the estimators are averaged with the guide's own in the gradient of the bound.
    """
    rows: list[Tensor] | None = [] if paths else None
    log_weight = without_scores(objective, t)
    bound = objective.bound(t).sum()
    held = objective.reduce(log_weight).sum() if objective.stl_unbiased else bound
    total = held - bound
    for name in t.guide:
        if name in t.structure.non_reparameterized:
            site = SiteDraws(name, objective, call, t, log_weight.detach(), leaves, rows)
            total = total + _checked(estimator_of(name), site)
    if rows:
        further = torch.cat(rows, -1)  # [K, batch, further draws]
        count = further.shape[-1]
        total = total + (objective.reduce(further).sum() - count * held) / (1 + count)
    return total


def _checked(estimator: SiteEstimator, site: SiteDraws) -> Tensor:
    """The surrogate of a site, a tensor of one number."""
    out: Any = estimator.site_surrogate(site)
    if not isinstance(out, Tensor) or out.numel() != 1:
        found = f"a tensor of shape {list(out.shape)}" if isinstance(out, Tensor) else repr(out)
        raise UsageError(
            f"{type(estimator).__name__}.site_surrogate: expected a tensor of one number, the sum over draws and data, "
            f"found {found}"
        )
    return out.reshape(())


def without_scores(objective: LogWeightBound, t: Terms) -> Tensor:
    """The log-weights; where the bound is their mean, without the gradient of log q of the sites without a path.

    At the guide's draws it is a constant times the score, whose mean is zero: it would add variance alone.
    """
    log_weight = objective.log_weights(t)
    scores = [q.log_prob for name, q in t.guide.items() if name in t.structure.non_reparameterized]
    scores = [q for q in scores if q.requires_grad]
    if not (objective.stl_unbiased and scores and log_weight.requires_grad):
        return log_weight
    found = torch.autograd.grad(log_weight.sum(), scores, retain_graph=True, allow_unused=True, materialize_grads=True)
    for coefficient, log_q in zip(found, scores, strict=True):
        log_weight = log_weight - gradient_only(coefficient * log_q)
    return log_weight


def base_distribution(fn: Any) -> Any:
    """The distribution of one element, without its event dims and masks."""
    while isinstance(fn, torch.distributions.Independent | MaskedDistribution):
        fn = fn.base_dist
    return fn
