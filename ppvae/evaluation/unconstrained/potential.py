"""The unnormalised log-densities of a pair on a block of data, in unconstrained coordinates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from ppvae.errors import ContractError
from ppvae.evaluation.blocks import Block
from ppvae.evaluation.unconstrained.chain_state import ChainState, concatenate_states
from ppvae.evaluation.unconstrained.coordinates import UnconstrainedSpace
from ppvae.inference.particle_layout import sum_inner_plates
from ppvae.inference.second_run import frozen_params
from ppvae.inference.structure import Role
from ppvae.inference.terms import Terms, cache_encoder, evaluate_terms, sample_guide
from ppvae.inference.tracing import Program, node_log_prob

SCALE_DRAWS = 100  # draws from the start density that estimate its scale


def prior_as_guide(model: Program, guide_roles: Mapping[str, Role]) -> Program:
    """The model's prior over the guide's latents, as a guide."""
    latents = {name for name, role in guide_roles.items() if role is Role.LATENT}

    def hidden(message: Any) -> bool:
        is_plate = isinstance(message["fn"], _Subsample)
        return message["type"] == "sample" and not is_plate and message["name"] not in latents

    def prior(*batch: Any) -> None:
        with poutine.block(hide_fn=hidden):
            model(*batch)

    return prior


class Potential:
    """log q(z | x) and log p(x, z) of a block of data as densities of u in R^dims, z = T(u), both with log |dz/du|.

    States u are [chains, batch, dims], see `UnconstrainedSpace`. Sites enumerated in the model are summed out of
    log p(x, z). q is the start density.

    Args:
        model, guide: the pair, or the model and its `prior_as_guide`, whose structure the block then has.
        block: the data.
        rows: the largest number of (chain, datum) rows in one run of the pair.
        from_prior: the guide is the model's prior, whose log-density is then part of the model's run.
        cache: the guide's network runs once where `cache_encoder` allows it.
        evaluate: (potential, u) -> `ChainState`, such as a compiled function; by default the method `evaluate`.

    Raises:
        ContractError, UsageError: as `UnconstrainedSpace`.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        block: Block,
        rows: int,
        *,
        from_prior: bool = False,
        cache: bool = False,
        evaluate: Callable[[Potential, Tensor], ChainState] | None = None,
    ):
        s = block.s
        self.model, self.batch, self.index = model, block.batch, block.index
        self.guide = cache_encoder(guide, self.batch, s, self.index) if cache else guide
        self.space = UnconstrainedSpace(self.guide, self.batch, s, self.index)
        self.s = s = self.space.s
        self.rows, self._from_prior, self._uncached_guide, self._evaluate = rows, from_prior, guide, evaluate
        self._num_rows = s.batch_size(self.batch) if self.index is None else len(self.index)
        self.size = 1 if s.has_global_latents else self._num_rows
        nodes = self.space.nodes
        self._only_latents = (
            all(s.guide_roles[n] is Role.LATENT for n in nodes) and nodes.keys() == self.space.sites.keys()
        )

    def sample_start(self, num_chains: int) -> Tensor:
        """Draws from the start density under torch's generator, [chains, batch, dims]."""
        with torch.no_grad():
            sites = sample_guide(self.guide, self.batch, num_chains, structure=self.s, index=self.index)
            return self.space.unconstrain({name: sites[name].value for name in self.space.nodes})

    def start_scale(self) -> Tensor:
        """The start density's scale per coordinate, half of its central 68 %; zero where masked; [batch, dims]."""
        u = self.sample_start(SCALE_DRAWS).double()
        low, high = torch.quantile(u, torch.tensor([0.16, 0.84], dtype=u.dtype, device=u.device), dim=0)
        scale = (high - low) / 2
        scale = torch.where(scale.isfinite() & (scale > 0), scale, torch.ones_like(scale))
        return (scale if self.space.active is None else scale * self.space.active).to(self.space.dtype)

    def log_densities(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(log start, log joint) of a state, [chains, batch] in float64, both in the coordinates u."""
        values, log_det = self.space.constrain(u)
        s = self.s
        if self._from_prior or self.guide is not self._uncached_guide:
            sites = {n: replace(self.space.sites[n], value=v, traced_value=v) for n, v in values.items()}
            t = self._terms(len(u), guide_sites=sites)
            log_prior = log_start = t.log_prior
            if not self._from_prior:
                ((name, node),) = self.space.nodes.items()
                log_start = sum_inner_plates(node_log_prob({**node, "value": values[name]}).double(), s.plate_nesting)
            return log_start + log_det, log_prior + t.log_lik + log_det
        t = self._terms(len(u), values=values)
        log_start = log_det
        for name in values:
            log_prob = t.guide[name].log_prob.double()
            log_prob = log_prob.sum(tuple(range(log_prob.dim() - 2))) if log_prob.dim() > 2 else log_prob
            log_start = log_start + (log_prob.sum(-1, keepdim=True) if s.has_global_latents else log_prob)
        if self._only_latents and t.contraction is None:  # keeps the guide's network out of the joint density's graph
            return log_start, t.log_lik + t.log_prior + log_det
        return log_start, log_start + t.log_weight

    def log_joint(self, u: Tensor) -> Tensor:
        """log p(x, z) of a state, [chains, batch] in float64, in the coordinates u; without the guide where it can."""
        if not self._only_latents or self.s.enumerated:
            return self.log_densities(u)[1]
        values, log_det = self.space.constrain(u)
        sites = {n: replace(self.space.sites[n], value=v, traced_value=v) for n, v in values.items()}
        t = self._terms(len(u), guide_sites=sites)
        return t.log_lik + t.log_prior + log_det

    def joint_gradient(self, u: Tensor) -> Tensor:
        """The gradient of log p(x, z) at a state, [chains, batch, dims]; parameters get no gradient."""
        parts = []
        with torch.enable_grad(), frozen_params(self.s.params.values()):
            for part in u.split(self._chains_per_run):
                part = part.detach().requires_grad_()
                parts += torch.autograd.grad(self.log_joint(part).sum(), part, materialize_grads=True)
        return torch.cat(parts)

    def _terms(self, num_chains: int, **latents: Any) -> Terms:
        return evaluate_terms(
            self.model, self.guide, self.batch, num_chains, structure=self.s, index=self.index, **latents
        )

    def elbo(self, u: Tensor) -> Tensor:
        """One-sample ELBOs of the start density at draws from it, [chains, batch]."""
        with torch.no_grad():
            parts = u.split(self._chains_per_run)
            elbos = [self._terms(len(part), values=self.space.constrain(part)[0]).elbo for part in parts]
        return torch.cat(elbos)[:, : self.size]

    @property
    def _chains_per_run(self) -> int:
        return max(1, self.rows // self._num_rows)

    def __call__(self, u: Tensor) -> ChainState:
        """Densities and gradients, in runs of at most `rows` rows; parameters get no gradient."""
        with torch.enable_grad(), frozen_params(self.s.params.values()):
            evaluate = self.evaluate if self._evaluate is None else partial(self._evaluate, self)
            return concatenate_states([evaluate(part) for part in u.split(self._chains_per_run)])

    def evaluate(self, u: Tensor) -> ChainState:
        """Densities and gradients of a state [chains, batch, dims], by one eager run of the pair."""
        u = u.detach().requires_grad_()
        log_start, log_joint = self.log_densities(u)
        (grad_start,) = torch.autograd.grad(log_start.sum(), u, retain_graph=True, materialize_grads=True)
        (grad_joint,) = torch.autograd.grad(log_joint.sum(), u, materialize_grads=True)
        return ChainState(u.detach(), log_start.detach(), log_joint.detach(), grad_start, grad_joint)

    @property
    def capturable(self) -> bool:
        """Whether a graph of `evaluate` holds for other blocks of data of the same shape."""
        return self.space.active is None and self.index is None and not self.s.has_global_latents

    def without_cache(self) -> Potential:
        """The same densities with the guide run for every state, so that a captured graph has the encoder in it."""
        other = copy(self)
        other.guide, other._from_prior = self._uncached_guide, False
        return other

    def check_deterministic(self) -> None:
        """Raises ContractError for densities that differ from run to run at the same latents."""
        with torch.no_grad():
            u = self.sample_start(1)
            one, two = (torch.cat(self.log_densities(u)) for _ in range(2))
        same = (one - two).abs() <= 1e-3 * (1 + one.abs())
        if not bool((same | (one == two) | one.isnan()).all()):
            unshared = [n for n, role in self.s.model_roles.items() if role is Role.CANCELLED]
            raise ContractError(
                "expected the same density at the same latents; found another at every run"
                + (f": what follows depends on {unshared}, which the model draws anew each time" if unshared else "")
                + ". Annealing needs every random choice to be a latent of the guide; use log_marginal"
            )
