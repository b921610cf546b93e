"""Log-weights of fresh draws from a proposal, block by block and independent of memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, final

import pyro
import torch
from torch import Tensor

from ppvae.errors import site_error
from ppvae.evaluation.blocks import DATA_BLOCK, PARTICLE_BLOCK, Block, Evaluation
from ppvae.evaluation.proposals.fit import FittedProposal, fit_proposal, rows_of_fit
from ppvae.evaluation.unconstrained.chain_state import ChainState
from ppvae.evaluation.unconstrained.compiled_potential import CompiledProposalTarget
from ppvae.evaluation.unconstrained.potential import Potential
from ppvae.inference.contract.row_order import find_bound_rows
from ppvae.inference.structure import Role
from ppvae.inference.terms import evaluate_terms
from ppvae.rng import derive_seed, seed_all

FIT_BLOCK, MAX_DIMS = 200, 200  # data whose proposals are fitted together; the dims beyond which memory is dear
FIT_ROWS = 5000  # (draw, datum) rows in one run of a fit, whatever `rows` is: a fit would amplify rounding

LogWeights = tuple[Tensor, Tensor, Mapping[str, Tensor] | None]


class Proposal(Protocol):
    """Where the particles of a block of data come from."""

    block: Block

    def select(self, rows: Tensor) -> tuple[Proposal, Tensor]:
        """(the proposal of these rows, their positions in it); the proposal itself where the pair takes no fewer."""

    def log_weights(self, num_particles: int, *, start: int = 0, noise: str = "") -> Iterator[LogWeights]:
        """(log-weights, ELBO samples, latents) of particles `start` to `num_particles`, a few at a time.

        Log-weights and ELBO samples are [particles, N]; latents are by name, as the guide has them, or None where a
        compiled function gave the weights. `start` is a multiple of 100; `noise` names the stream.
        """

    def log_weights_at(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Log-weights [1, N] of given latents, [*inner, batch, *event] by name."""


@final
class RefinedProposal:
    """A density fitted to each datum of a block, in unconstrained coordinates; see `fit_proposal`.

    The draws are independent with `independent=True`; else the share of the guide among them is fixed.

    The fit uses noise of its own, so that the weights of the draws that follow are unbiased for p(x) whatever was
    fitted. A masked latent has no density: its coordinates are standard normal on both sides.

    Raises:
        ContractError: a latent that is discrete, or that the model draws anew at each run, by the site's name.
    """

    def __init__(
        self,
        run: Evaluation,
        block: Block,
        rows: int,
        fitted: FittedProposal | None = None,
        independent: bool = False,
        compiled: CompiledProposalTarget | None = None,
    ):
        self.run, self.block, self.rows, self.independent = run, block, rows, independent
        self._compiled = compiled or CompiledProposalTarget(0, 0, 1)
        with pyro.validation_enabled(False):  # the contract was checked once, and supports are checked once a block
            self._potential = Potential(run.model, run.guide, block, FIT_ROWS, cache=True)
            if fitted is None:
                check_deterministic(block)
                terms = evaluate_terms(run.model, run.guide, block.batch, 1, structure=block.s, index=block.index)
                block.check_supports(terms)
                seed_all(derive_seed(run.seed, block.number, "proposal"))
                fitted = fit_proposal(self)
        self.fitted = fitted

    def select(self, rows: Tensor) -> tuple[RefinedProposal, Tensor]:
        part, positions = select_rows(self.run, self.block, rows)
        if part is self.block:
            return self, positions
        fitted = self.fitted.select(rows)
        return RefinedProposal(self.run, part, self.rows, fitted, self.independent, self._compiled), positions

    def log_weights(self, num_particles: int, *, start: int = 0, noise: str = "") -> Iterator[LogWeights]:
        step, width = max(1, self.rows // self.block.size), self.block.num_weights
        with pyro.validation_enabled(False), torch.no_grad():
            for first in range(start, num_particles, PARTICLE_BLOCK):
                number, count = first // PARTICLE_BLOCK, min(PARTICLE_BLOCK, num_particles - first)
                seed_all(derive_seed(self.run.seed, self.block.number, noise or "refined", number))
                for u in self.sample(count).split(step):
                    log_weight = self.log_weight(u)[:, :width]
                    yield log_weight, log_weight, self.constrain(u)

    def log_weight(self, u: Tensor) -> Tensor:
        """Log-weights [particles, batch] of states [particles, batch, dims]."""
        log_guide, log_joint = self._compiled.log_densities(self._potential, u)
        extra = self._potential.space.inactive_log_density(u)
        return log_joint + extra - self.fitted.log_prob(u, log_guide + extra)

    def state(self, latents: Mapping[str, Tensor]) -> Tensor:
        """The state [1, batch, dims] of given latents, [*inner, batch, *event] as `simulate_data` gives them.

        The coordinates of masked latents, which have no value, are drawn from their standard normal.
        """
        with torch.no_grad(), pyro.validation_enabled(False):
            return self._potential.space.fill_inactive(self._potential.space.expand(latents, 1))

    def log_weights_at(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Log-weights [1, N] of given latents, as `state` takes them."""
        with torch.no_grad(), pyro.validation_enabled(False):
            return self.log_weight(self.state(latents))[:, : self.block.num_weights]

    def sample(self, count: int) -> Tensor:
        """Draws [particles, batch, dims], of which the guide's share of each datum is fixed and at random places.

        A fixed share has less variance than a random one, and any k of the draws are exchangeable, so that L_k is a
        bound for every k.
        """
        of_guide, of_density = self.sample_start(count), self.fitted.density.sample(count)
        share = self.fitted.guide_share
        if self.independent:
            of_the_guide = torch.rand(of_guide.shape[:2], device=share.device) < share
            return torch.where(of_the_guide[..., None], of_guide, of_density)
        places = torch.rand(of_guide.shape[:2], device=share.device).argsort(0).argsort(0)
        whole = (count * share).floor()
        whole = whole + (torch.rand(share.shape, device=share.device) < count * share - whole)  # right on average
        return torch.where((places < whole)[..., None], of_guide, of_density)

    def sample_start(self, num_chains: int) -> Tensor:
        """Draws of the guide, [particles, batch, dims]."""
        return self._potential.space.fill_inactive(self._potential.sample_start(num_chains))

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """The latents of states [particles, batch, dims] by name, as the guide has them."""
        return self._potential.space.constrain(u)[0]

    def __call__(self, u: Tensor) -> ChainState:
        """log q(u | x) and log p(x, u) with their gradients."""
        state, active = self._potential(u), self._potential.space.active
        if active is None:
            return state
        extra = self._potential.space.inactive_log_density(u)
        return ChainState(
            u, state.log_start + extra, state.log_joint + extra,
            torch.where(active, state.grad_start, -u), torch.where(active, state.grad_joint, -u),
        )  # fmt: skip

    def log_densities(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log q(u | x) and log p(x, u), [particles, batch]."""
        extra = self._potential.space.inactive_log_density(u)
        parts = [self._compiled.log_densities(self._potential, part) for part in self._split(u)]
        log_guide, log_joint = map(torch.cat, zip(*parts, strict=True))
        return log_guide + extra, log_joint + extra

    def log_joint(self, u: Tensor) -> Tensor:
        """log p(x, u), [particles, batch]."""
        with torch.no_grad():
            log_joint = torch.cat([self._potential.log_joint(part) for part in self._split(u)])
            return log_joint + self._potential.space.inactive_log_density(u)

    def gradient(self, u: Tensor) -> Tensor:
        """The gradient of log p(x, u), [particles, batch, dims]."""
        gradient = torch.cat([self._compiled.gradient(self._potential, part) for part in self._split(u)])
        active = self._potential.space.active
        return gradient if active is None else torch.where(active, gradient, -u)

    def _split(self, u: Tensor) -> Sequence[Tensor]:
        return u.split(max(1, FIT_ROWS // self.block.size))


def select_rows(run: Evaluation, block: Block, rows: Tensor) -> tuple[Block, Tensor]:
    """(a block of these rows, their positions in it); the block itself where the pair takes no fewer rows.

    A pair with one parameter a datum, such as an `AutoNormal`, or a plate of fixed size has all its data in one block.
    """
    return (block, rows) if len(rows) < block.size and keeps_rows(run, block) else block.select_rows(rows)


def keeps_rows(run: Evaluation, block: Block) -> bool:
    """Whether the pair takes the rows of a block as they are alone: its plate draws them, or each has its place."""
    holds_all = block.size == run.num_data
    return block.s.draws_subsample or (holds_all and bool(find_bound_rows(run.model, run.guide, block.batch, block.s)))


def with_larger_blocks(run: Evaluation) -> Evaluation:
    """The same evaluation by blocks of up to `FIT_BLOCK` data, where their size is free and the dims are few.

    A fit takes hundreds of runs of the pair one after another, each of few particles: many data share their overhead.
    """
    s = run.structure
    size = math.ceil(run.num_data / math.ceil(run.num_data / FIT_BLOCK))  # of equal blocks, as far as that goes
    free = run.block_size == DATA_BLOCK and not (s.has_global_latents or s.draws_subsample)
    return replace(run, block_size=size) if free and s.latent_dims <= MAX_DIMS else run


def compiled_densities(run: Evaluation, num_particles: int) -> CompiledProposalTarget:
    """The densities of all blocks, compiled where fits and draws of so many particles pay for it."""
    gradients, densities = rows_of_fit(run.structure.latent_dims)
    return CompiledProposalTarget(run.num_data * gradients, run.num_data * (densities + num_particles), FIT_ROWS)


def check_refinable(run: Evaluation, block: Block) -> None:
    """Raises the error that `RefinedProposal` meets, if it does, without fitting anything."""
    Potential(run.model, run.guide, block, FIT_ROWS)
    check_deterministic(block)


def check_deterministic(block: Block) -> None:
    """Raises ContractError for a site that the model draws anew at each run."""
    for name, role in block.s.model_roles.items():
        if role is Role.CANCELLED:
            raise site_error(
                name, "a latent of the guide, so that the model's density is the same at every run",
                "a site that the model draws anew at each run (obs_mask)", "use proposal='guide'",
            )  # fmt: skip
