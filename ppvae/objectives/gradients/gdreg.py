"""Gradients by leaves: what the densities say of each latent, apart from where the latent came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import pyro.distributions as dist
import torch
from torch import Tensor

from ppvae.errors import site_error
from ppvae.inference.particle_layout import ParticleLayout
from ppvae.inference.sites import Site, event_factors
from ppvae.inference.structure import Role, Structure
from ppvae.objectives.gradients.estimators import (
    Gradient,
    accumulate_gradients,
    reparameterized_latents,
    sampled_latents,
)

if TYPE_CHECKING:
    from ppvae.objectives.base import Call, Objective

Paths = dict[tuple[str, int], Tensor]


class LatentLeaves:
    """Cuts latents off where they enter the densities, and keeps both ends: the path that led there, and the leaf."""

    def __init__(self) -> None:
        self.met: dict[tuple[str, int], tuple[Tensor, Tensor, ParticleLayout]] = {}

    def __call__(self, name: str, value: Tensor, piece: ParticleLayout) -> Tensor:
        if not value.is_floating_point():
            return value
        leaf = value.detach().requires_grad_()
        self.met[name, piece.particle] = value, leaf, piece
        return leaf

    def gradients(self, log_prob: Tensor, of: str = "") -> Paths:
        """d log_prob / d latent of every draw and datum by itself, in the shape of a run's value."""
        keys = [key for key in self.met if not of or key[0] == of]
        leaves = [self.met[key][1] for key in keys]
        if not keys or not log_prob.requires_grad:
            return {key: torch.zeros_like(leaf) for key, leaf in zip(keys, leaves, strict=True)}
        found = torch.autograd.grad(
            log_prob.sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return dict(zip(keys, found, strict=True))

    def through(self, paths: Paths, weights: Tensor) -> Tensor:
        """Carries weighted gradients on along the paths that led to the latents; weights are [particles, batch]."""
        total = torch.zeros((), dtype=weights.dtype, device=weights.device)
        for key, gradient in paths.items():
            value, _, piece = self.met[key]
            if value.requires_grad:
                total = total + (value * (piece.broadcast_weights(weights, key[0]).to(gradient) * gradient)).sum()
        return total

    def learnt(self, site: Site) -> bool:
        """Whether a parameter takes a gradient from a site's density, and not only the latents that it is given."""
        ours = {id(leaf) for _, leaf, _ in self.met.values()}
        waiting = [site.log_prob.grad_fn]
        seen = set(waiting)
        while waiting:
            node = waiting.pop()
            if node is None:
                continue
            if id(getattr(node, "variable", site.log_prob)) not in ours | {id(site.log_prob)}:
                return True
            new = {parent for parent, _ in node.next_functions} - seen
            seen |= new
            waiting += new
        return False


def transported(fn: Any, value: Tensor) -> Tensor | None:
    """A value as a function of a distribution's parameters, its standard noise held; None where none is known.

    T(T^-1(z; theta) held; theta), z = T(noise; theta).
    """
    fn, _ = event_factors(fn)
    if isinstance(fn, torch.distributions.TransformedDistribution) and not isinstance(fn, dist.Gumbel):
        back = value
        for transform in reversed(fn.transforms):
            back = transform.inv(back)
        moved = transported(fn.base_dist, back.detach())
        for transform in fn.transforms if moved is not None else ():
            moved = transform(moved)
        return moved
    if isinstance(fn, dist.MultivariateNormal):
        noise = torch.linalg.solve_triangular(fn.scale_tril, (value - fn.loc)[..., None], upper=False).detach()
        return fn.loc + (fn.scale_tril @ noise)[..., 0]
    if isinstance(
        fn, torch.distributions.Normal | dist.Laplace | dist.Cauchy | dist.StudentT | dist.Gumbel | dist.Logistic
    ):
        if isinstance(fn, dist.StudentT) and fn.df.requires_grad:
            return None
        return fn.loc + fn.scale * ((value - fn.loc) / fn.scale).detach()
    return None


@final
class GDReG(Gradient):
    """Doubly reparameterised for the prior's parameters, too: their score becomes a path through the prior's noise.

    With r_k and d_k as in DReG, the guide gets sum_k d_k d log w_k / dz dz/dphi, and the parameters theta of a latent's
    density p_i in the model get, with z_i = T(noise; theta),
    sum_k (r_k d/dz_i [log w_k + log q - log p_i] - d_k d log w_k / dz_i) dT/dtheta. What a latent's parents say of a
    hierarchical prior's parameters comes out right: they are held, and only the latent moves. Priors of a
    location and a scale, multivariate normals, and transforms of these; a fixed prior may be any.
    Source: Bauer and Mnih 2021 (arXiv 2101.11046).
    """

    def suits(self, objective: Objective) -> None:
        objective.dreg_weights(torch.zeros(objective.draws, 1))

    def refuse(self, objective: Objective, s: Structure) -> None:
        reparameterized_latents(s, "gdreg")
        sampled_latents(s, "gdreg")
        if s.enumerated:
            raise site_error(
                s.enumerated[0], "a latent whose prior is a density of it alone", "one summed out", "take 'dreg'"
            )

    def surrogate(self, objective: Objective, call: Call) -> Tensor:
        leaves = LatentLeaves()
        t = call.terms(latent_hook=leaves)
        log_weight = objective.weigh(t)
        held = log_weight.detach().requires_grad_()
        bound = objective.reduce(held).sum()
        (r,) = torch.autograd.grad(bound, held)
        held = held.detach()
        d = r * objective.dreg_weights(held)
        paths, of_guide = leaves.gradients(log_weight), leaves.gradients(t.log_guide)
        direct = t.log_lik + t.log_prior
        theirs = leaves.through(paths, d)
        for name, site in t.model.items():
            if site.role is not Role.LATENT or not leaves.learnt(site):
                continue
            if site.masked:
                raise site_error(name, "a learnt prior that counts for every datum", "a mask", "take gradient='dreg'")
            if Role.AUXILIARY in call.s.guide_roles.values():  # the guide's density would have to be one of the latent
                raise site_error(
                    name, "a guide that draws its latents themselves, for a learnt prior", "one that makes them of a "
                    "helper", "take gradient='dreg'",
                )  # fmt: skip
            own = leaves.gradients(site.log_prob, name)
            direct = direct - (site.log_prob.sum(-1, keepdim=True) if t.has_global_latents else site.log_prob)
            for number, part in enumerate(site.particle_sites or (site,)):
                key = name, number
                moved = transported(part.distribution, part.traced_value.detach())
                if moved is None:
                    family = type(event_factors(part.distribution)[0]).__name__
                    raise site_error(
                        name, "a learnt prior that moves its noise by a location and a scale, or by a transform",
                        family, "take gradient='dreg', which leaves the prior's score as it is",
                    )  # fmt: skip
                piece = leaves.met[key][2]
                rest = paths[key] + of_guide[key] - own[key]
                flow = (
                    piece.broadcast_weights(r, name).to(rest) * rest
                    - piece.broadcast_weights(d, name).to(rest) * paths[key]
                )
                theirs = theirs + (moved * flow).sum()
        return bound.detach() + accumulate_gradients((r * direct).sum() + theirs)
