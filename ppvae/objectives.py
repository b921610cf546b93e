"""Objectives: reductions of a pair's `Terms` that Pyro's `SVI(..., loss=objective)` and `fit` both take.

They follow Pyro's convention: a loss is minus the bound, summed over the batch, times the data plate's scale.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, final

import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor

from ppvae.errors import ContractError
from ppvae.inference.contract import inspect
from ppvae.inference.structure import Structure
from ppvae.inference.tracing import Pair, traces
from ppvae.inference.weights import Terms, terms


class Objective(PyroELBO):
    """A bound per datum as a Pyro loss; subclasses say what the bound is."""

    def __init__(self, num_particles: int):
        if num_particles < 1:
            raise ValueError(f"num_particles: expected at least 1, found {num_particles}")
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self._known: tuple[Pair, Pair, Structure] | None = None

    @abstractmethod
    def bound(self, t: Terms) -> Tensor:
        """The bound per datum, [batch] nats."""

    def _get_trace(self, model: Pair, guide: Pair, args: Any, kwargs: Any) -> Any:
        """Pyro's hook for a pair of traces; everything here goes through `terms`."""
        return traces(model, guide, args, self._structure(model, guide, args), {}, num_particles=self.num_particles)

    def _structure(self, model: Pair, guide: Pair, batch: tuple[Any, ...]) -> Structure:
        if self._known is None or self._known[:2] != (model, guide):
            s = inspect(model, guide, batch)
            if s.score_only:
                raise ContractError(
                    f"site {s.score_only[0]!r}: expected a reparameterised latent for a pathwise gradient, found one "
                    f"without. Enumerate it (infer={{'enumerate': 'parallel'}}), or train on pyro.infer.Trace_ELBO"
                )
            self._known = (model, guide, s)
        return self._known[2]

    def differentiable_loss(self, model: Pair, guide: Pair, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the bound, summed over the batch, times the data plate's scale: a scalar tensor."""
        s = self._structure(model, guide, args)
        t = terms(model, guide, args, self.num_particles, structure=s)
        return -self.bound(t).sum() * s.represented(t.batch_size) / t.batch_size

    def loss(self, model: Pair, guide: Pair, *args: Any, **kwargs: Any) -> float:
        """The loss as a number, without a gradient."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args).item()

    def loss_and_grads(self, model: Pair, guide: Pair, *args: Any, **kwargs: Any) -> float:
        """The loss as a number; its gradient is added to `.grad` of the parameters."""
        loss = self.differentiable_loss(model, guide, *args)
        loss.backward()
        return loss.item()


@final
class ELBO(Objective):
    """The evidence lower bound with a weight beta on the rate, averaged over particles, pathwise gradients.

    E_q[log p(x | z)] - beta E_q[log q(z | x) - log p(z)].
    Source: Kingma and Welling 2014 (arXiv 1312.6114); Higgins et al. 2017 for beta.

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.zeros(4, 3)
    >>> isinstance(ELBO(num_particles=10).loss(pair.model, pair.mean_field, x), float)
    True
    """

    def __init__(self, num_particles: int = 1, beta: float = 1.0):
        super().__init__(num_particles)
        self.beta = beta

    def bound(self, t: Terms) -> Tensor:
        if self.beta == 1.0:
            return t.elbo.mean(0)
        if t.contracted:
            raise ContractError("beta: expected a pair without enumerated sites, whose rate stands apart; found some")
        return (t.log_lik - self.beta * (t.log_guide - t.log_prior)).mean(0)


@final
class IWAE(Objective):
    """The importance-weighted bound, E[log (1/K) sum_k p(x, z_k) / q(z_k | x)], pathwise gradients.

    Source: Burda et al. 2016 (arXiv 1509.00519).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.zeros(4, 3)
    >>> bool(abs(IWAE(5).loss(pair.model, pair.guide, x) + pair.log_px(x).sum()) < 1e-4)
    True
    """

    def bound(self, t: Terms) -> Tensor:
        return t.log_weight.logsumexp(0) - math.log(t.num_particles)
