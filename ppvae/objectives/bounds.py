"""Bounds on log p(x) that are reductions of importance weights."""

from __future__ import annotations

import logging
from typing import final

import torch
from torch import Tensor

from ppvae.errors import UsageError
from ppvae.inference.structure import Structure
from ppvae.inference.terms import Terms
from ppvae.objectives.base import Call, Objective
from ppvae.objectives.gradients.estimators import DReG, Gradient, Pathwise, accumulate_gradients, sampled_latents
from ppvae.objectives.gradients.gdreg import LatentLeaves
from ppvae.objectives.reductions import log_mean_exp, log_mean_exp_without, mean_without

log = logging.getLogger("ppvae")


def warn_of_enumerated(s: Structure) -> None:
    """Says that a bound in which sites are summed out teaches nothing to the guide's probabilities of them."""
    found = [name for name in s.enumerated if name in s.guide_roles]
    if found:
        log.warning(
            "ppvae: %s: the guide enumerates them, so that the bound sums them out and their probabilities in the "
            "guide get no gradient; train these on ELBO or CIWAE", ", ".join(found)
        )  # fmt: skip


@final
class IWAE(Objective):
    """The importance-weighted bound, E[log (1/K) sum_k p(x, z_k) / q(z_k | x)].

    Args:
        num_particles: K, draws per datum.
        gradient: "pathwise", "stl" (biased for K > 1), "dreg", "gdreg", "score", "vimco", or an estimator.

    Raises:
        ContractError: a guide that is not absolutely continuous with its prior, by the site's name.

    Source: Burda et al. 2016 (arXiv 1509.00519).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.zeros(4, 3)
    >>> bool(abs(IWAE(5).loss(pair.model, pair.guide, x) + pair.log_px(x).sum()) < 1e-4)
    True
    """

    def __init__(self, num_particles: int = 50, gradient: str | Gradient = "pathwise"):
        super().__init__(num_particles, gradient)

    def refuse(self, s: Structure) -> None:
        super().refuse(s)
        warn_of_enumerated(s)

    def reduce(self, log_weight: Tensor) -> Tensor:
        return log_mean_exp(log_weight)

    def without(self, log_weight: Tensor, others: Tensor) -> Tensor:
        return log_mean_exp_without(log_weight, others)

    def dreg_weights(self, log_weight: Tensor) -> Tensor:
        return log_weight.softmax(0)


@final
class Renyi(Objective):
    """The variational Renyi bound, (1 / (1 - alpha)) log (1/K) sum_k w_k^(1 - alpha), in expectation.

    alpha = 1 is the ELBO, alpha = 0 the IWAE bound.

    Args:
        alpha: the order; above 1 it leans to the largest gap, below 0 it is no lower bound for infinite K.
        num_particles: K, draws per datum.
        gradient: an estimator, or its name.

    Source: Li and Turner 2016 (arXiv 1602.02311); Tucker et al. 2019 (arXiv 1810.04152) for the doubly
    reparameterised gradient, alpha w + (1 - alpha) w^2.

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.zeros(4, 3)
    >>> bool(abs(Renyi(0.5, 5).loss(pair.model, pair.guide, x) + pair.log_px(x).sum()) < 1e-4)
    True
    """

    def __init__(self, alpha: float = 0.5, num_particles: int = 50, gradient: str | Gradient = "pathwise"):
        self.alpha = alpha
        super().__init__(num_particles, gradient)

    @property
    def stl_unbiased(self) -> bool:  # type: ignore[override]
        return self.alpha == 1

    def refuse(self, s: Structure) -> None:
        super().refuse(s)
        if self.alpha != 0:
            sampled_latents(s, "a Renyi bound", "take ELBO or CIWAE")
        warn_of_enumerated(s)

    def reduce(self, log_weight: Tensor) -> Tensor:
        power = 1 - self.alpha
        return log_mean_exp(power * log_weight) / power if power else log_weight.mean(0)

    def learning_signal(self, log_weight: Tensor) -> Tensor:
        return super().learning_signal(log_weight) if self.alpha != 1 else log_weight / len(log_weight)

    def without(self, log_weight: Tensor, others: Tensor) -> Tensor:
        power = 1 - self.alpha
        if not power:
            return mean_without(log_weight, others)
        return log_mean_exp_without(power * log_weight, power * others) / power

    def dreg_weights(self, log_weight: Tensor) -> Tensor:
        return self.alpha + (1 - self.alpha) * ((1 - self.alpha) * log_weight).softmax(0)


@final
class MIWAE(Objective):
    """The mean of M importance-weighted bounds of K draws each: between the ELBO (K = 1) and IWAE (M = 1).

    Args:
        num_particles: K, draws in each bound.
        num_bounds: M, bounds that are averaged.
        gradient: an estimator, or its name.

    Source: Rainforth et al. 2018 (arXiv 1802.04537).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.zeros(4, 3)
    >>> bool(abs(MIWAE(5, 2).loss(pair.model, pair.guide, x) + pair.log_px(x).sum()) < 1e-4)
    True
    """

    def __init__(self, num_particles: int = 8, num_bounds: int = 8, gradient: str | Gradient = "pathwise"):
        self.num_bounds = _counted(num_bounds)
        self.num_particles = num_particles  # which the estimator is told of before Pyro's own constructor is
        super().__init__(num_particles, gradient)

    @property
    def draws(self) -> int:
        return self.num_particles * self.num_bounds

    @property
    def stl_unbiased(self) -> bool:  # type: ignore[override]
        return self.num_particles == 1

    def refuse(self, s: Structure) -> None:
        super().refuse(s)
        warn_of_enumerated(s)

    def reduce(self, log_weight: Tensor) -> Tensor:
        return self._bounds(log_weight).mean(0)

    def _bounds(self, log_weight: Tensor) -> Tensor:
        """[M, batch], each of K draws that follow one another."""
        return log_mean_exp(_grouped(log_weight, self.num_bounds))

    def learning_signal(self, log_weight: Tensor) -> Tensor:
        return self._bounds(log_weight).repeat_interleave(self.num_particles, 0) / self.num_bounds

    def without(self, log_weight: Tensor, others: Tensor) -> Tensor:
        own = log_mean_exp_without(_grouped(log_weight, self.num_bounds), _grouped(others, self.num_bounds))
        bounds = self._bounds(log_weight)
        return _ungrouped(bounds.mean(0) + (own - bounds) / self.num_bounds)

    def dreg_weights(self, log_weight: Tensor) -> Tensor:
        return _ungrouped(_grouped(log_weight, self.num_bounds).softmax(0))


@final
class CIWAE(Objective):
    """The convex combination beta ELBO + (1 - beta) IWAE of the same draws.

    Args:
        beta: the ELBO's part, in [0, 1].
        num_particles: K, draws per datum.
        gradient: an estimator, or its name.

    Source: Rainforth et al. 2018 (arXiv 1802.04537).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.zeros(4, 3)
    >>> bool(abs(CIWAE(0.5, 5).loss(pair.model, pair.guide, x) + pair.log_px(x).sum()) < 1e-4)
    True
    """

    def __init__(self, beta: float = 0.05, num_particles: int = 50, gradient: str | Gradient = "pathwise"):
        if not 0 <= beta <= 1:
            raise UsageError(f"beta: expected a number in [0, 1], found {beta}")
        self.beta = beta
        super().__init__(num_particles, gradient)

    @property
    def stl_unbiased(self) -> bool:  # type: ignore[override]
        return self.beta == 1

    def refuse(self, s: Structure) -> None:
        super().refuse(s)
        if self.beta == 0:
            warn_of_enumerated(s)

    def bound(self, t: Terms) -> Tensor:
        return self.beta * t.elbo.mean(0) + (1 - self.beta) * log_mean_exp(t.log_weight)

    def reduce(self, log_weight: Tensor) -> Tensor:
        return self.beta * log_weight.mean(0) + (1 - self.beta) * log_mean_exp(log_weight)

    def learning_signal(self, log_weight: Tensor) -> Tensor:
        return self.beta * log_weight / len(log_weight) + (1 - self.beta) * log_mean_exp(log_weight)

    def without(self, log_weight: Tensor, others: Tensor) -> Tensor:
        iwae = log_mean_exp_without(log_weight, others)
        return self.beta * mean_without(log_weight, others) + (1 - self.beta) * iwae

    def dreg_weights(self, log_weight: Tensor) -> Tensor:
        w = log_weight.softmax(0)
        share = (1 - self.beta) * w
        rate = share + self.beta / len(log_weight)
        return torch.where(rate > 0, (share * w + self.beta / len(log_weight)) / rate, w)


@final
class PIWAE(Objective):
    """IWAE with M K draws for the model, MIWAE with M bounds of K for the guide; the value is that of IWAE.

    Args:
        num_particles: K, draws in each of the guide's bounds.
        num_bounds: M, the guide's bounds that are averaged.
        gradient: the guide's estimator, "pathwise" or "dreg".

    Source: Rainforth et al. 2018 (arXiv 1802.04537).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.zeros(4, 3)
    >>> bool(abs(PIWAE(5, 2).loss(pair.model, pair.guide, x) + pair.log_px(x).sum()) < 1e-4)
    True
    """

    def __init__(self, num_particles: int = 8, num_bounds: int = 8, gradient: str | Gradient = "pathwise"):
        self.num_bounds = _counted(num_bounds)
        self.num_particles = num_particles
        super().__init__(num_particles, gradient)
        if not isinstance(self.gradient, Pathwise | DReG):
            raise UsageError(f"PIWAE: expected gradient 'pathwise' or 'dreg', found {type(self.gradient).__name__}")
        self._guides = MIWAE(num_particles, num_bounds)

    @property
    def draws(self) -> int:
        return self.num_particles * self.num_bounds

    def refuse(self, s: Structure) -> None:
        super().refuse(s)
        sampled_latents(s, "PIWAE", "take ELBO or CIWAE")

    def reduce(self, log_weight: Tensor) -> Tensor:
        return log_mean_exp(log_weight)

    def dreg_weights(self, log_weight: Tensor) -> Tensor:
        return _ungrouped(_grouped(log_weight, self.num_bounds).softmax(0))

    def surrogate(self, call: Call) -> Tensor:
        leaves = LatentLeaves()
        t = call.terms(latent_hook=leaves)
        log_weight, log_q = t.log_weight, t.log_guide
        detached = log_weight.detach()
        slope = self.dreg_weights(detached) / self.num_bounds  # of the mean of the guide's bounds
        ours = (detached.softmax(0) * (log_weight + log_q)).sum()
        if isinstance(self.gradient, DReG):
            theirs = leaves.through(leaves.gradients(log_weight), self.dreg_weights(detached) * slope)
        else:
            theirs = leaves.through(leaves.gradients(log_weight), slope) - (slope * log_q).sum()
        return self.reduce(detached).sum() + accumulate_gradients(ours + theirs)


def _counted(num_bounds: int) -> int:
    if num_bounds < 1:
        raise UsageError(f"num_bounds: expected at least 1, found {num_bounds}")
    return num_bounds


def _grouped(log_weight: Tensor, groups: int) -> Tensor:
    """[M K, batch] -> [K, M, batch]."""
    return log_weight.reshape(groups, -1, *log_weight.shape[1:]).transpose(0, 1)


def _ungrouped(log_weight: Tensor) -> Tensor:
    """[K, M, batch] -> [M K, batch]."""
    return log_weight.transpose(0, 1).flatten(0, 1)
