"""Mixtures of distributions of any families, with stratified draws."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, final

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from ppvae.distributions.batch_shape import WithoutMoments


@final
class StratifiedMixture(WithoutMoments):
    """q(z) = sum_m w_m q_m(z), whose draws are stratified along their leftmost dim, the particles.

    Of K draws along that dim, component m gives K w_m to within one, at places that are permuted at random: each draw
    alone, and each group of draws, has the mixture's distribution, and means over all K have less noise. With the
    weights constant the paths of the components give an unbiased pathwise gradient: d E_q[f] = sum_m w_m d E_m[f].
    There is no path for weights: given as logits, they make a mixture that is not reparameterised. Without a path, and
    where gradients are enabled, draws are independent, as baselines of score-function estimators expect them.

    Args:
        components: distributions of one event shape and support, of batch shapes that broadcast.
        weights: [components], not negative, normalised here; constant; equal by default.
        logits: [..., components] in place of weights, of a batch shape that broadcasts with the components'.

    Raises ValueError for components of different events, for a point mass, or for weights that require a gradient.
    Source: Kviman et al. 2022, Multiple importance sampling ELBO (arXiv 2202.10951); Elvira et al. 2019 (arXiv
    1511.03095) for deterministic mixture weights.

    >>> near, far = dist.Normal(torch.zeros(1), 1.0).to_event(1), dist.StudentT(5.0, torch.zeros(1), 3.0).to_event(1)
    >>> StratifiedMixture([near, far]).log_prob(torch.zeros(1))
    tensor(-1.3366)
    """

    def __init__(
        self,
        components: Sequence[Any],
        weights: Tensor | None = None,
        validate_args: bool | None = None,
        logits: Tensor | None = None,
    ):
        first = components[0]
        for fn in components:
            if isinstance(fn, dist.Delta):
                raise ValueError("components: expected distributions with a density, found Delta, a point mass")
            if fn.event_shape != first.event_shape or type(fn.support) is not type(first.support):
                raise ValueError(
                    f"components: expected one event shape and support, found {list(first.event_shape)} with "
                    f"{first.support} and {list(fn.event_shape)} with {fn.support}"
                )
        self.learned = logits is not None
        if logits is not None:
            if weights is not None or logits.shape[-1:] != (len(components),):
                raise ValueError(
                    f"logits: expected [..., {len(components)}], one a component, and no weights beside them, found "
                    f"{list(logits.shape)}"
                )
            weights = torch.ones(len(components))
        if weights is None:
            weights = torch.ones(len(components))
        if weights.requires_grad:
            raise ValueError("weights: expected constant weights, found some that require a gradient")
        if weights.shape != (len(components),):
            raise ValueError(f"weights: expected {len(components)}, one a component, found {list(weights.shape)}")
        self.components = tuple(components)
        self.log_weight = (weights / weights.sum()).log() if logits is None else logits.log_softmax(-1)
        batch = torch.broadcast_shapes(*(fn.batch_shape for fn in components), self.log_weight.shape[:-1])
        super().__init__(batch, first.event_shape, validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> Any:
        return self.components[0].support

    @property
    def has_rsample(self) -> bool:
        return not self.learned and all(fn.has_rsample for fn in self.components)

    @property
    def mean(self) -> Tensor:
        means = [
            w.reshape(w.shape + (1,) * len(self.event_shape)) * fn.mean
            for w, fn in zip(self.log_weight.exp().unbind(-1), self.components, strict=True)
        ]
        return sum(means[1:], means[0]).expand(self.shape())

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> StratifiedMixture:
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        log_probs = [
            fn.log_prob(value) + w for w, fn in zip(self.log_weight.to(value).unbind(-1), self.components, strict=True)
        ]
        log_prob = torch.stack(torch.broadcast_tensors(*log_probs)).logsumexp(0)
        return log_prob.expand(torch.broadcast_shapes(self.batch_shape, log_prob.shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self._draw(torch.Size(sample_shape) + self.batch_shape, "rsample", stratified=True)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        # baselines of score-function estimators expect independent draws
        stratified = self.has_rsample or not torch.is_grad_enabled()
        with torch.no_grad():
            return self._draw(torch.Size(sample_shape) + self.batch_shape, "sample", stratified)

    def _draw(self, shape: torch.Size, draw: str, stratified: bool) -> Tensor:
        draws = []
        for fn in self.components:
            lead = shape[: len(shape) - len(fn.batch_shape)]
            whole = shape[len(lead) :] == fn.batch_shape
            draws.append(getattr(fn, draw)(lead) if whole else getattr(fn.expand(shape), draw)())
        at = self._choose(shape, draws[0], stratified)
        at = at.reshape(1, *shape, *(1,) * len(self.event_shape)).expand(1, *draws[0].shape)
        return torch.stack(draws).gather(0, at).squeeze(0)

    def _choose(self, shape: torch.Size, like: Tensor, stratified: bool) -> Tensor:
        """The component of each draw, `shape`: systematic along the leftmost dim, permuted at random; or not."""
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
        place = torch.rand(shape, dtype=dtype, device=like.device)
        if shape and stratified:
            offset = torch.rand(shape[1:], dtype=dtype, device=like.device)
            place = (place.argsort(0) + offset) / shape[0]
        upper = self.log_weight.detach().to(place).exp().cumsum(-1)[..., :-1]
        return (place.unsqueeze(-1) >= upper).sum(-1)
