"""Guides with parameters of their own for every datum, and the climb to the best ELBO among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, final

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppvae.errors import ContractError
from ppvae.evaluation.annealing.potential import Potential
from ppvae.evaluation.blocks import PARTICLE_BLOCK, Block
from ppvae.evaluation.local.parameters import Affine, per_datum_distribution, trace_arguments
from ppvae.inference.structure import Role
from ppvae.inference.terms import evaluate_terms
from ppvae.inference.tracing import Program, frozen_params
from ppvae.rng import derive_seed

DRAWS = 10  # per datum and step of a climb
SELECTION = 1000  # per datum where it is decided whether a round has raised the ELBO
RATE = EPS = 0.05  # Adam's step in units of the start's own scale; with this eps a small gradient makes Newton's step
NETWORK_RATE, NETWORK_EPS = 1e-3, 1e-8  # the same for the weights of a network, which have no units
ENOUGH = 0.002  # nats per datum: rounds end once one gains less on average
MOMENTS = 1000  # draws per datum from which a richer family starts
EDGE = 1e-6  # added to a covariance, relative to its diagonal, so that it has a factor


class Local(Protocol):
    """A guide for one block of data, with parameters that climb."""

    leaves: Sequence[Tensor]
    data_dims: Sequence[int | None]  # where the data stand in each leaf; None where a leaf belongs to the one datum
    rate: float
    eps: float

    def elbo(self, count: int) -> Tensor:
        """The ELBO from fresh draws, [count, N]."""

    def descend(self, count: int) -> None:
        """Puts the gradient of minus the ELBO, summed over data, into the leaves, by the paths of the draws alone.

        Such a gradient is unbiased, and zero without noise where the guide is exact.
        Source: Roeder et al. 2017 (arXiv 1703.09194).
        """

    def weights(self, num_particles: int, seed: int, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(log-weights, elbo) of a few particles at a time, both [particles, N]."""


def optimize_local_elbo(
    local: Local, *, steps: int, rounds: int, seed: int, tick: Callable[[], Any] = lambda: None
) -> tuple[Tensor, int]:
    """Raises every datum's ELBO by its own parameters: (what the last round gained [N] nats, how many rounds ran).

    Each round takes `steps` steps of Adam, whose rate falls from `rate` to zero by a cosine, from the best point so
    far; a datum keeps a round's end only where it is better on draws common to all rounds. Rounds end once one gains
    less than 0.002 nats on average, or `rounds` have run. `tick` is called at every step.
    """
    with pyro.validation_enabled(False):  # the contract was checked once
        return _climbed(local, steps, rounds, seed, tick)


def _climbed(local: Local, steps: int, rounds: int, seed: int, tick: Callable[[], Any]) -> tuple[Tensor, int]:
    best, done = _score(local, seed), 0
    gained = torch.zeros_like(best)
    if not local.leaves:
        return gained, 0
    kept = [leaf.detach().clone() for leaf in local.leaves]
    for done in range(1, rounds + 1):
        torch.manual_seed(derive_seed(seed, "climb", done))
        adam = torch.optim.Adam(local.leaves, lr=local.rate, eps=local.eps)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        for _ in range(steps):
            adam.zero_grad()
            local.descend(DRAWS)
            for leaf in local.leaves:
                if leaf.grad is not None:  # a datum without a finite ELBO stays where it is
                    leaf.grad.nan_to_num_(0.0, 0.0, 0.0)
            adam.step()
            schedule.step()
            tick()
        new = _score(local, seed)
        better = new > best
        gained = torch.where(better, new - best, torch.zeros_like(best)).nan_to_num(0.0, 0.0)
        best = torch.where(better, new, best)
        with torch.no_grad():
            for leaf, old, dim in zip(local.leaves, kept, local.data_dims, strict=True):
                old.copy_(_chosen(better, leaf, old, dim))
                leaf.copy_(old)
        if float(gained.mean()) < ENOUGH:
            break
    return gained, done


def _score(local: Local, seed: int) -> Tensor:
    """The ELBO from draws that are the same every time, [N]."""
    torch.manual_seed(derive_seed(seed, "selection"))
    return torch.stack([local.elbo(PARTICLE_BLOCK).mean(0) for _ in range(SELECTION // PARTICLE_BLOCK)]).mean(0)


def _chosen(better: Tensor, new: Tensor, old: Tensor, dim: int | None) -> Tensor:
    """A leaf's new value for the data where it is better, its old one elsewhere."""
    if dim is None:
        return new if bool(better.all()) else old
    whole = torch.zeros(new.shape[dim], dtype=torch.bool, device=new.device)
    whole[: len(better)] = better
    return torch.where(whole.reshape(*(-1 if i == dim else 1 for i in range(new.dim()))), new, old)


class Guided:
    """A guide on a block as it is: nothing climbs."""

    leaves: Sequence[Tensor] = ()
    data_dims: Sequence[int | None] = ()
    rate, eps = RATE, EPS

    def __init__(self, model: Program, guide: Program, block: Block):
        self.model, self.guide, self.block, self.s = model, guide, block, block.s

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The guide runs on the parameters that climb meanwhile."""
        yield

    def _elbo(self, count: int, frozen: Sequence[str] = ()) -> Tensor:
        batch, index = self.block.batch, self.block.index
        t = evaluate_terms(self.model, self.guide, batch, count, structure=self.s, index=index, frozen=frozen)
        return t.elbo[:, : self.block.size]

    def elbo(self, count: int) -> Tensor:
        with torch.no_grad(), self.installed():
            return self._elbo(count)

    def _slope(self, count: int) -> None:
        # an expectation over what the guide enumerates has weights, which must keep their gradient
        whole = Role.ENUMERATED in self.s.guide_roles.values()
        (-self._elbo(count, () if whole else ("guide",)).mean(0).sum()).backward()

    def descend(self, count: int) -> None:
        raise NotImplementedError

    def weights(self, num_particles: int, seed: int, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        with self.installed():
            for log_weight, elbo, _ in self.block.weights(self.model, self.guide, num_particles, seed, rows):
                yield log_weight[:, : self.block.size], elbo[:, : self.block.size]


class Replaced(Messenger):
    """Puts other distributions in the place of a guide's own."""

    def __init__(self, sites: Mapping[str, Any]):
        super().__init__()
        self.sites = sites

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.sites and not msg["is_observed"]:
            msg["fn"] = self.sites[msg["name"]]


@final
class Distributions(Guided):
    """The guide with its sites' distributions free for every datum of a block; it starts as the guide."""

    def __init__(self, model: Program, guide: Program, block: Block):
        sites = per_datum_distribution(guide, block.batch, block.s, block.index)
        self.leaves = [leaf for site in sites.values() for leaf in site.leaves]
        self.data_dims = [site.data_dim for site in sites.values() for _ in site.leaves]

        def local(*batch: Any) -> Any:
            copies = len(batch[0]) // len(block.batch[0])  # more than one where particles are folded into the batch
            with Replaced({name: site(copies) for name, site in sites.items()}):
                return guide(*batch)

        super().__init__(model, local, block)
        self._held = list(block.s.params.values())
        self.s = replace(block.s, guide_params={str(i): leaf for i, leaf in enumerate(self.leaves)})

    def descend(self, count: int) -> None:
        with torch.enable_grad(), frozen_params(self._held):
            self._slope(count)


@final
class Network(Guided):
    """The guide with a copy of its own parameters for one datum; what it shares with the model stays as it is.

    While `installed`, the parameters' tensors point at the copy, and afterwards at their own storage again.
    """

    rate, eps = NETWORK_RATE, NETWORK_EPS

    def __init__(self, model: Program, guide: Program, block: Block):
        super().__init__(model, guide, block)
        shared = {id(p) for p in block.s.model_params.values()}
        self._own = {n: p for n, p in block.s.guide_params.items() if id(p) not in shared}
        self.leaves = [p.detach().clone() for p in self._own.values()]
        self.data_dims = [None] * len(self.leaves)

    @contextmanager
    def installed(self) -> Iterator[None]:
        before = [p.data for p in self._own.values()]
        for p, leaf in zip(self._own.values(), self.leaves, strict=True):
            p.data = leaf.data
        try:
            yield
        finally:
            for p, data in zip(self._own.values(), before, strict=True):
                p.data = data

    def descend(self, count: int) -> None:
        params = list(self._own.values())
        with (
            self.installed(),
            torch.enable_grad(),
            trace_arguments(self._own),
            frozen_params(self.s.model_params.values()),
        ):
            before = [p.grad for p in params]
            for p in params:
                p.grad = None
            self._slope(count)
            for p, leaf, own in zip(params, self.leaves, before, strict=True):
                leaf.grad, p.grad = p.grad, own


class FullRankFamily:
    """Normals with any covariance, [N, D], that start at given ones; D are all coordinates of a datum's latents.

    A richer family is such an object: made of locations [N, D] and lower-triangular scales [N, D, D], it gives a
    distribution with batch shape [N] when called, and names its parameters, data first, in `leaves`.
    """

    name = "a normal with any covariance over all latents in unconstrained space"

    def __init__(self, loc: Tensor, scale_tril: Tensor):
        self._affine = Affine(loc, scale_tril)
        self.leaves: Sequence[Tensor] = self._affine.leaves

    def __call__(self) -> Any:
        loc, scale_tril = self._affine.arguments()
        return dist.MultivariateNormal(loc, scale_tril=scale_tril)


@final
class FullRankGuide:
    """A richer family over all of a datum's latents in unconstrained space; it starts at the moments of a guide."""

    rate, eps = RATE, EPS

    def __init__(self, start: Guided, family: Callable[[Tensor, Tensor], FullRankFamily], seed: int, rows: int):
        block = start.block
        if Role.ENUMERATED in block.s.guide_roles.values():
            raise ContractError("the guide enumerates a latent, so that others are drawn once for each of its values")
        self._size, self._number, self._rows = block.size, block.number, rows
        torch.manual_seed(derive_seed(seed, block.number, "moments"))
        with start.installed():
            self._at = Potential(start.model, start.guide, block.batch, block.s, block.index, rows, False)
            u = self._at.start(MOMENTS)
        if self._at.active is not None:
            raise ContractError("a masked latent: its dims differ from datum to datum")
        loc = u.mean(0)
        covariance = torch.einsum("knd,kne->nde", u - loc, u - loc) / (len(u) - 1)
        variance = covariance.diagonal(dim1=-2, dim2=-1) + torch.finfo(u.dtype).tiny
        scale_tril, failed = torch.linalg.cholesky_ex(covariance + torch.diag_embed(EDGE * variance))
        scale_tril = torch.where(failed[:, None, None] > 0, torch.diag_embed(variance.sqrt()), scale_tril)
        self._family = family(loc, scale_tril)
        self.leaves = self._family.leaves
        self.data_dims: Sequence[int | None] = [0] * len(self.leaves)
        self._held = list(block.s.params.values())

    def _elbo(self, count: int, paths_only: bool = False) -> Tensor:
        q = self._family()
        u = q.rsample(torch.Size((count,)))
        with frozen_params(self.leaves if paths_only else ()):
            log_q = self._family().log_prob(u)
        return (self._at.densities(u)[1] - log_q.double())[:, : self._size]

    def elbo(self, count: int) -> Tensor:
        with torch.no_grad():
            return self._elbo(count)

    def descend(self, count: int) -> None:
        with torch.enable_grad(), frozen_params(self._held):
            (-self._elbo(count, True).mean(0).sum()).backward()

    def weights(self, num_particles: int, seed: int, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        for number, first in enumerate(range(0, num_particles, PARTICLE_BLOCK)):
            torch.manual_seed(derive_seed(seed, self._number, number))
            weight = self.elbo(min(PARTICLE_BLOCK, num_particles - first))
            yield weight, weight
