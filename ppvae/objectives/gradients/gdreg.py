"""The generalised doubly reparameterised gradient: DReG for the prior's parameters, too."""

from typing import Any, final

import pyro.distributions as dist
import torch
from torch import Tensor

from ppvae.errors import site_error
from ppvae.inference.sites import event_factors
from ppvae.inference.structure import Role, Structure
from ppvae.objectives.gradients.estimator import GradientEstimator, gradient_only
from ppvae.objectives.gradients.latent_leaves import LatentLeaves
from ppvae.objectives.protocol import LogWeightBound, PairCall
from ppvae.objectives.requirements import require_reparameterized_latents, require_sampled_latents


def reparameterize(fn: Any, value: Tensor) -> Tensor | None:
    """A given value as a reparameterised sample: T(T^-1(z; theta) held constant; theta), z = T(noise; theta).

    None for a distribution without such a map here.
    """
    fn, _ = event_factors(fn)
    if isinstance(fn, torch.distributions.TransformedDistribution) and not isinstance(fn, dist.Gumbel):
        base_value = value
        for transform in reversed(fn.transforms):
            base_value = transform.inv(base_value)
        sample = reparameterize(fn.base_dist, base_value.detach())
        for transform in fn.transforms if sample is not None else ():
            sample = transform(sample)
        return sample
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
class GDReG(GradientEstimator):
    """Generalised DReG: the score of the prior's parameters is reparameterised through the prior's noise.

    With r_k and d_k as in DReG, the guide gets sum_k d_k d log w_k / dz dz/dphi. The parameters theta of a latent's
    density p_i in the model get, with z_i = T(noise; theta),
    sum_k (r_k d/dz_i [log w_k + log q - log p_i] - d_k d log w_k / dz_i) dT/dtheta. For a hierarchical prior the
    parents are held constant and only the latent z_i is reparameterised. Learnable priors: location-scale families,
    multivariate normals, and transforms of these; a prior without parameters may be of any family.
    Source: Bauer and Mnih 2021 (arXiv 2101.11046).
    """

    holds_latents = False

    def check_objective(self, objective: LogWeightBound) -> None:
        objective.dreg_weights(torch.zeros(objective.draws, 1))

    def check_structure(self, objective: LogWeightBound, s: Structure) -> None:
        require_reparameterized_latents(s, "gdreg")
        require_sampled_latents(s, "gdreg")
        if s.enumerated:
            raise site_error(
                s.enumerated[0], "a latent whose prior is a density of it alone", "one summed out", "take 'dreg'"
            )

    def surrogate(self, objective: LogWeightBound, call: PairCall) -> Tensor:
        leaves = LatentLeaves()
        t = call.terms(latent_hook=leaves)
        log_weight = objective.log_weights(t)
        detached = log_weight.detach().requires_grad_()
        bound = objective.reduce(detached).sum()
        (r,) = torch.autograd.grad(bound, detached)
        d = r * objective.dreg_weights(detached.detach())
        grad_weight, grad_guide = leaves.gradients(log_weight), leaves.gradients(t.log_guide)
        density = t.log_lik + t.log_prior  # of the model, less the priors whose score is reparameterised below
        paths = leaves.path_surrogate(grad_weight, d)
        for name, site in t.model.items():
            if site.role is not Role.LATENT or not leaves.has_parameters(site):
                continue
            if site.mask is not None:
                raise site_error(name, "a learnable prior without a mask", "a mask", "take gradient='dreg'")
            if Role.AUXILIARY in call.structure.guide_roles.values():  # then q is no density of z itself
                raise site_error(
                    name, "a guide that samples its latents directly, for a learnable prior", "latents computed from "
                    "an auxiliary site", "take gradient='dreg'",
                )  # fmt: skip
            grad_prior = leaves.gradients(site.log_prob, name)
            density = density - (site.log_prob.sum(-1, keepdim=True) if t.has_global_latents else site.log_prob)
            for particle, run in enumerate(site.particle_sites or (site,)):
                key = name, particle
                sample = reparameterize(run.distribution, run.traced_value.detach())
                if sample is None:
                    family = type(event_factors(run.distribution)[0]).__name__
                    raise site_error(
                        name, "a learnable prior that is a location-scale family or a transform of one",
                        family, "take gradient='dreg', which uses the prior's score",
                    )  # fmt: skip
                layout = leaves.entries[key][2]
                others = grad_weight[key] + grad_guide[key] - grad_prior[key]
                r_z, d_z = (layout.broadcast_weights(weights, name).to(others) for weights in (r, d))
                flow = r_z * others - d_z * grad_weight[key]
                paths = paths + (sample * flow).sum()
        return bound.detach() + gradient_only((r * density).sum() + paths)
