"""The amortised guide of a pair on a block of data, and local versions of it with parameters for each datum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, final

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppvae.evaluation.blocks import Block
from ppvae.evaluation.local.optimization import ADAM_EPS, LEARNING_RATE
from ppvae.evaluation.local.parameters import per_datum_distributions, require_grad
from ppvae.inference.second_run import frozen_params
from ppvae.inference.structure import Role
from ppvae.inference.terms import evaluate_terms
from ppvae.inference.tracing import Program

NETWORK_LEARNING_RATE, NETWORK_ADAM_EPS = 1e-3, 1e-8  # network weights have no natural unit


class AmortizedGuide:
    """The guide on a block as it is: a `OptimizableGuide` without parameters."""

    params: Sequence[Tensor] = ()
    data_dims: Sequence[int | None] = ()
    learning_rate, adam_eps = LEARNING_RATE, ADAM_EPS

    def __init__(self, model: Program, guide: Program, block: Block):
        self.model, self.guide, self.block, self.s = model, guide, block, block.s

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Runs of the guide use the local parameters."""
        yield

    def _elbo(self, num_particles: int, frozen: Sequence[str] = ()) -> Tensor:
        batch, index = self.block.batch, self.block.index
        t = evaluate_terms(self.model, self.guide, batch, num_particles, structure=self.s, index=index, frozen=frozen)
        return t.elbo[:, : self.block.size]

    def elbo(self, num_particles: int) -> Tensor:
        with torch.no_grad(), self.installed():
            return self._elbo(num_particles)

    def _backward(self, num_particles: int) -> None:
        # the probabilities of enumerated values are weights of the expectation, and keep their gradient
        enumerated = Role.ENUMERATED in self.s.guide_roles.values()
        (-self._elbo(num_particles, () if enumerated else ("guide",)).mean(0).sum()).backward()

    def backward(self, num_particles: int) -> None:
        raise NotImplementedError

    def log_weights(self, num_particles: int, seed: int, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        with self.installed():
            for log_weight, elbo, _ in self.block.weights(self.model, self.guide, num_particles, seed, rows):
                yield log_weight[:, : self.block.size], elbo[:, : self.block.size]


class SubstituteDistributions(Messenger):
    """Replaces the distributions of latent sites, by name."""

    def __init__(self, distributions: Mapping[str, Any]):
        super().__init__()
        self.distributions = distributions

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.distributions and not msg["is_observed"]:
            msg["fn"] = self.distributions[msg["name"]]


@final
class PerDatumGuide(AmortizedGuide):
    """The guide with free distribution arguments for every datum; optimisation starts at the amortised ones.

    Raises:
        UnsupportedDistribution: as `per_datum_distributions`.
    """

    def __init__(self, model: Program, guide: Program, block: Block):
        sites = per_datum_distributions(guide, block.batch, block.s, block.index)
        self.params = [param for site in sites.values() for param in site.params]
        self.data_dims = [site.data_dim for site in sites.values() for _ in site.params]

        def local_guide(*batch: Any) -> Any:
            copies = len(batch[0]) // len(block.batch[0])  # more than one where particles are folded into the batch
            with SubstituteDistributions({name: site(copies) for name, site in sites.items()}):
                return guide(*batch)

        super().__init__(model, local_guide, block)
        self._fixed_params = list(block.s.params.values())
        self.s = replace(block.s, guide_params={str(i): param for i, param in enumerate(self.params)})

    def backward(self, num_particles: int) -> None:
        with torch.enable_grad(), frozen_params(self._fixed_params):
            self._backward(num_particles)


@final
class NetworkCopyGuide(AmortizedGuide):
    """The guide with a copy of its parameters for one datum; parameters shared with the model stay fixed.

    While `installed`, the parameters' `.data` is that of the copy; their own storage is restored afterwards.
    """

    learning_rate, adam_eps = NETWORK_LEARNING_RATE, NETWORK_ADAM_EPS

    def __init__(self, model: Program, guide: Program, block: Block):
        super().__init__(model, guide, block)
        shared = {id(p) for p in block.s.model_params.values()}
        self._originals = {n: p for n, p in block.s.guide_params.items() if id(p) not in shared}
        self.params = [p.detach().clone() for p in self._originals.values()]
        self.data_dims = [None] * len(self.params)

    @contextmanager
    def installed(self) -> Iterator[None]:
        storage = [p.data for p in self._originals.values()]
        for p, param in zip(self._originals.values(), self.params, strict=True):
            p.data = param.data
        try:
            yield
        finally:
            for p, data in zip(self._originals.values(), storage, strict=True):
                p.data = data

    def backward(self, num_particles: int) -> None:
        originals = list(self._originals.values())
        with (
            self.installed(),
            torch.enable_grad(),
            require_grad(originals),
            frozen_params(self.s.model_params.values()),
        ):
            grads = [p.grad for p in originals]
            for p in originals:
                p.grad = None
            self._backward(num_particles)
            for p, param, grad in zip(originals, self.params, grads, strict=True):
                param.grad, p.grad = p.grad, grad
