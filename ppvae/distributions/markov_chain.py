"""Markov chains of vectors, of different lengths in one batch."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from pyro.distributions import constraints
from torch import Tensor

from ppvae.distributions.batch_shape import ParametricDistribution

Transition = Callable[[Tensor, Any], Any]  # (z before [..., latent], which times) -> the distribution of z then


@final
class MarkovChain(ParametricDistribution):
    """A Markov chain z_1 .. z_T of vectors, log p(z) = sum over known t of log p(z_t | z_(t-1)), z_0 = start.

    Steps that are not known are padding at the end: 0 in a draw and ignored by the density, so that a chain of length n
    is a density of its first n vectors. Sampling is sequential; the density evaluates all steps in one call.

    Args:
        step: step(z, at) returns p(z_t | z_(t-1)) given the previous vectors z: [..., latent] for one time `at`, or
            [..., T, latent] for all times, `at` = slice(None). Its event shape is [latent].
        start: z_0 [latent].
        known: the mask of the steps of each chain, [*batch, T].

    Batch shape [*batch], event shape [T, latent]. Reparameterised where the steps are.

    >>> import pyro.distributions as dist
    >>> known = torch.tensor([[True, True, False]])
    >>> walk = MarkovChain(lambda z, at: dist.Normal(z, 1.0).to_event(1), torch.zeros(2), known)
    >>> walk.shape(), walk.rsample()[0, 2].tolist()
    (torch.Size([1, 3, 2]), [0.0, 0.0])
    """

    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(self, step: Transition, start: Tensor, known: Tensor, validate_args: bool | None = None):
        self.step, self.start, self.known = step, start, known
        super().__init__(known.shape[:-1], known.shape[-1:] + start.shape, validate_args=validate_args)

    @property
    def counted(self) -> Tensor:
        """The elements of an event that the density depends on, [*batch, T, latent]."""
        return self.known.unsqueeze(-1).expand(self.known.shape + self.start.shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self._draw(torch.Size(sample_shape) + self.batch_shape, lambda t, draw: draw())

    def continue_from(self, value: Tensor, kept: Tensor) -> Tensor:
        """A draw [*batch, T, latent] given the steps of `value` where `kept` [*batch, T] is true."""
        kept = kept.unsqueeze(-1)

        def replace(t: int, draw: Callable[[], Tensor]) -> Tensor:
            now, given = kept[..., t, :], value[..., t, :]
            return given if bool(now.all()) else torch.where(now, given, draw())

        return self._draw(self.batch_shape, replace)

    def _draw(self, shape: torch.Size, replace: Callable[[int, Callable[[], Tensor]], Tensor]) -> Tensor:
        z, steps = self.start.expand(shape + self.start.shape), []
        for t in range(self.event_shape[0]):
            draw = functools.partial(lambda t, z: self.step(z, t).rsample(), t, z)
            steps.append(z := replace(t, draw))
        return torch.where(self.known.unsqueeze(-1), torch.stack(steps, -2), 0.0)

    def step_log_prob(self, value: Tensor) -> Tensor:
        """log p(z_t | z_(t-1)), [*batch, T]; 0 for steps that are not known."""
        first = self.start.expand(*value.shape[:-2], 1, value.shape[-1])
        before = torch.cat([first, value[..., :-1, :]], -2)
        return torch.where(self.known, self.step(before, slice(None)).log_prob(value), 0.0)

    def _log_prob(self, value: Tensor) -> Tensor:
        log_prob = self.step_log_prob(value).sum(-1)
        return log_prob.expand(torch.broadcast_shapes(self.batch_shape, log_prob.shape))
