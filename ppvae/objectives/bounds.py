"""Importance-weighted bounds on log p(x): IWAE and its relatives."""

from typing import final

import torch
from torch import Tensor

from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers
from ppvae.inference.structure import Structure
from ppvae.inference.terms import Terms
from ppvae.objectives.gradients import DReG, Gradient, Pathwise
from ppvae.objectives.gradients.estimator import gradient_only
from ppvae.objectives.gradients.latent_leaves import LatentLeaves
from ppvae.objectives.objective import Objective
from ppvae.objectives.protocol import PairCall
from ppvae.objectives.reductions import leave_one_out_log_mean_exp, leave_one_out_mean, log_mean_exp
from ppvae.objectives.requirements import require_sampled_latents


@final
class IWAE(Objective):
    """The importance-weighted bound, E[log (1/K) sum_k p(x, z_k) / q(z_k | x)].

    With global latents theta, a bound on log p of all N data from a batch of B: E_q(theta)[N / B sum_n log (1/K) sum_k
    p(x_n, z_nk | theta) / q(z_nk | x_n, theta) + log p(theta) - log q(theta)], K particles at one draw of theta. It
    lies between the ELBO and E_q(theta)[log p(all x | theta)] - KL(q(theta) || p(theta)).

    Args:
        num_particles: K, draws per datum.
        gradient: "pathwise", "stl" (biased for K > 1), "dreg", "gdreg", "score", "vimco", one of discrete latents
            ("arms", "double_cv", ...: `ppvae.objectives.gradients`), an estimator, or a dict of these by site.

    Raises:
        ContractError: a guide that is not absolutely continuous with its prior, by the site's name.

    Source: Burda et al. 2016 (arXiv 1509.00519).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.zeros(4, 3)
    >>> bool(abs(IWAE(5).loss(pair.model, pair.guide, x) + pair.log_px(x).sum()) < 1e-4)
    True
    """

    def __init__(self, num_particles: int = 50, gradient: Gradient = "pathwise"):
        check_numbers(num_particles=num_particles)
        super().__init__(num_particles, gradient)

    def reduce(self, log_weight: Tensor) -> Tensor:
        return log_mean_exp(log_weight)

    def leave_one_out_bound(self, log_weight: Tensor, replacement: Tensor) -> Tensor:
        return leave_one_out_log_mean_exp(log_weight, replacement)

    def dreg_weights(self, log_weight: Tensor) -> Tensor:
        return log_weight.softmax(0)


@final
class Renyi(Objective):
    """The variational Renyi bound, (1 / (1 - alpha)) log (1/K) sum_k w_k^(1 - alpha), in expectation.

    alpha = 1 is the ELBO, alpha = 0 the IWAE bound.

    Args:
        alpha: the order; below 0 the bound is an upper bound on log p(x) as K tends to infinity.
        num_particles: K, draws per datum.
        gradient: an estimator, or its name.

    Source: Li and Turner 2016 (arXiv 1602.02311); Tucker et al. 2019 (arXiv 1810.04152) for the doubly
    reparameterised gradient, alpha w + (1 - alpha) w^2.

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.zeros(4, 3)
    >>> bool(abs(Renyi(0.5, 5).loss(pair.model, pair.guide, x) + pair.log_px(x).sum()) < 1e-4)
    True
    """

    def __init__(self, alpha: float = 0.5, num_particles: int = 50, gradient: Gradient = "pathwise"):
        check_numbers(alpha=alpha, num_particles=num_particles)
        self.alpha = alpha
        super().__init__(num_particles, gradient)

    @property
    def stl_unbiased(self) -> bool:
        return self.alpha == 1

    def check_structure(self, s: Structure) -> None:
        if self.alpha != 0:
            require_sampled_latents(s, "a Renyi bound", "take ELBO or CIWAE")
        super().check_structure(s)

    def reduce(self, log_weight: Tensor) -> Tensor:
        power = 1 - self.alpha
        return log_mean_exp(power * log_weight) / power if power else log_weight.mean(0)

    def learning_signal(self, log_weight: Tensor) -> Tensor:
        return super().learning_signal(log_weight) if self.alpha != 1 else log_weight / len(log_weight)

    def leave_one_out_bound(self, log_weight: Tensor, replacement: Tensor) -> Tensor:
        power = 1 - self.alpha
        if not power:
            return leave_one_out_mean(log_weight, replacement)
        return leave_one_out_log_mean_exp(power * log_weight, power * replacement) / power

    def dreg_weights(self, log_weight: Tensor) -> Tensor:
        return self.alpha + (1 - self.alpha) * ((1 - self.alpha) * log_weight).softmax(0)


class GroupedBounds(Objective):
    """An objective of M K draws per datum, in M groups of K consecutive draws."""

    def __init__(self, num_particles: int = 8, num_bounds: int = 8, gradient: Gradient = "pathwise"):
        check_numbers(num_particles=num_particles, num_bounds=num_bounds)
        super().__init__(num_particles, gradient)
        self.num_bounds = num_bounds

    @property
    def draws(self) -> int:
        return self.num_particles * self.num_bounds

    def dreg_weights(self, log_weight: Tensor) -> Tensor:
        return _merge_bounds(_split_bounds(log_weight, self.num_bounds).softmax(0))


@final
class MIWAE(GroupedBounds):
    """The mean of M importance-weighted bounds of K draws each: between the ELBO (K = 1) and IWAE (M = 1).

    Args:
        num_particles: K, draws in each bound.
        num_bounds: M, the number of bounds in the mean.
        gradient: an estimator, or its name.

    Source: Rainforth et al. 2018 (arXiv 1802.04537).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.zeros(4, 3)
    >>> bool(abs(MIWAE(5, 2).loss(pair.model, pair.guide, x) + pair.log_px(x).sum()) < 1e-4)
    True
    """

    @property
    def stl_unbiased(self) -> bool:
        return self.num_particles == 1

    def reduce(self, log_weight: Tensor) -> Tensor:
        return self._bounds(log_weight).mean(0)

    def _bounds(self, log_weight: Tensor) -> Tensor:
        """The M bounds, [M, batch], each on K consecutive draws."""
        return log_mean_exp(_split_bounds(log_weight, self.num_bounds))

    def learning_signal(self, log_weight: Tensor) -> Tensor:
        return self._bounds(log_weight).repeat_interleave(self.num_particles, 0) / self.num_bounds

    def leave_one_out_bound(self, log_weight: Tensor, replacement: Tensor) -> Tensor:
        changed = leave_one_out_log_mean_exp(
            _split_bounds(log_weight, self.num_bounds), _split_bounds(replacement, self.num_bounds)
        )
        bounds = self._bounds(log_weight)
        return _merge_bounds(bounds.mean(0) + (changed - bounds) / self.num_bounds)


@final
class CIWAE(Objective):
    """The convex combination beta ELBO + (1 - beta) IWAE of the same draws.

    Args:
        beta: the weight on the ELBO, in [0, 1].
        num_particles: K, draws per datum.
        gradient: an estimator, or its name.

    Source: Rainforth et al. 2018 (arXiv 1802.04537).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.zeros(4, 3)
    >>> bool(abs(CIWAE(0.5, 5).loss(pair.model, pair.guide, x) + pair.log_px(x).sum()) < 1e-4)
    True
    """

    def __init__(self, beta: float = 0.05, num_particles: int = 50, gradient: Gradient = "pathwise"):
        check_numbers(beta=beta, num_particles=num_particles)
        if not beta <= 1:
            raise UsageError(f"beta: expected a number in [0, 1], found {beta}")
        self.beta = beta
        super().__init__(num_particles, gradient)

    @property
    def stl_unbiased(self) -> bool:
        return self.beta == 1

    def check_structure(self, s: Structure) -> None:
        if s.weights_refusal or self.beta == 0:
            super().check_structure(s)

    def bound(self, t: Terms) -> Tensor:
        return self.beta * t.elbo.mean(0) + (1 - self.beta) * log_mean_exp(t.log_weight)

    def reduce(self, log_weight: Tensor) -> Tensor:
        return self.beta * log_weight.mean(0) + (1 - self.beta) * log_mean_exp(log_weight)

    def learning_signal(self, log_weight: Tensor) -> Tensor:
        return self.beta * log_weight / len(log_weight) + (1 - self.beta) * log_mean_exp(log_weight)

    def leave_one_out_bound(self, log_weight: Tensor, replacement: Tensor) -> Tensor:
        iwae = leave_one_out_log_mean_exp(log_weight, replacement)
        return self.beta * leave_one_out_mean(log_weight, replacement) + (1 - self.beta) * iwae

    def dreg_weights(self, log_weight: Tensor) -> Tensor:
        w = log_weight.softmax(0)
        r_iwae, r_elbo = (1 - self.beta) * w, self.beta / len(log_weight)
        r = r_iwae + r_elbo
        return torch.where(r > 0, (r_iwae * w + r_elbo) / r, w)


@final
class PIWAE(GroupedBounds):
    """IWAE with M K draws for the model's parameters, MIWAE with M bounds of K for the guide's; the value is IWAE's.

    Args:
        num_particles: K, draws in each of the guide's bounds.
        num_bounds: M, the number of bounds in the guide's mean.
        gradient: the guide's estimator, "pathwise" or "dreg".

    Raises:
        ContractError: a guide that enumerates a site, or is not absolutely continuous with its prior, by the site's
            name.

    Source: Rainforth et al. 2018 (arXiv 1802.04537).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.zeros(4, 3)
    >>> bool(abs(PIWAE(5, 2).loss(pair.model, pair.guide, x) + pair.log_px(x).sum()) < 1e-4)
    True
    """

    def __init__(self, num_particles: int = 8, num_bounds: int = 8, gradient: Gradient = "pathwise"):
        check_numbers(num_particles=num_particles, num_bounds=num_bounds)
        super().__init__(num_particles, num_bounds, gradient)

    def check_estimator(self) -> None:
        super().check_estimator()
        if not isinstance(self.gradient, Pathwise | DReG):
            raise UsageError(f"PIWAE: expected gradient 'pathwise' or 'dreg', found {type(self.gradient).__name__}")

    def check_structure(self, s: Structure) -> None:
        require_sampled_latents(s, "PIWAE", "take ELBO or CIWAE")
        super().check_structure(s)

    def reduce(self, log_weight: Tensor) -> Tensor:
        return log_mean_exp(log_weight)

    def surrogate(self, call: PairCall) -> Tensor:
        leaves = LatentLeaves()
        t = call.terms(latent_hook=leaves)
        log_weight, log_q = t.log_weight, t.log_guide
        detached = log_weight.detach()
        weights = self.dreg_weights(detached)  # normalised in each of the guide's bounds
        r = weights / self.num_bounds
        model_term = (detached.softmax(0) * (log_weight + log_q)).sum()
        if isinstance(self.gradient, DReG):
            guide_term = leaves.path_surrogate(leaves.gradients(log_weight), weights * r)
        else:
            guide_term = leaves.path_surrogate(leaves.gradients(log_weight), r) - (r * log_q).sum()
        return self.reduce(detached).sum() + gradient_only(model_term + guide_term)


def _split_bounds(log_weight: Tensor, num_bounds: int) -> Tensor:
    """[M K, batch] -> [K, M, batch]."""
    return log_weight.reshape(num_bounds, -1, *log_weight.shape[1:]).transpose(0, 1)


def _merge_bounds(log_weight: Tensor) -> Tensor:
    """[K, M, batch] -> [M K, batch]."""
    return log_weight.transpose(0, 1).flatten(0, 1)
