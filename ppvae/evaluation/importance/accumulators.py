"""Running statistics of log-weights in constant memory: log p(x), its error, ess, k-hat, ELBO and bounds L_k."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ppvae.evaluation.importance.psis import MIN_PARTICLES, pareto_k, tail_length

BUFFER = 2000  # particles per reduction: many small reductions would cost more than the networks


class BoundAccumulator:
    """Running mean of log mean_k w over disjoint groups of k draws: an unbiased estimate of L_k per datum.

    It takes the log-sums of groups of `unit` draws, a divisor of k, from the accumulator of L_unit, and gives those of
    its own groups: many k cost little more than the smallest of them.

    Source: Burda et al. 2016 (arXiv 1509.00519).
    """

    def __init__(self, k: int, unit: int = 1):
        self.k, self.unit, self.groups = k, unit, 0
        self._width, self._filled = k // unit, 0
        self._total: Tensor | float = 0.0
        self._partial: Tensor | None = None

    def add(self, log_sums: Tensor) -> Tensor:
        """Adds log-sums of groups of `unit` weights [groups, N]; returns those of the groups of k that are complete."""
        start, out = 0, []
        if self._filled:
            start = min(self._width - self._filled, len(log_sums))
            assert self._partial is not None
            self._partial = torch.logaddexp(self._partial, log_sums[:start].logsumexp(0))
            self._filled += start
            if self._filled == self._width:
                out.append(self._partial[None])
                self._filled = 0
        groups = (len(log_sums) - start) // self._width
        end = start + groups * self._width
        if groups:
            whole = log_sums[start:end]
            out.append(whole if self._width == 1 else whole.reshape(groups, self._width, -1).logsumexp(1))
        if end < len(log_sums):
            self._partial, self._filled = log_sums[end:].logsumexp(0), len(log_sums) - end
        sums = torch.cat(out) if len(out) > 1 else out[0] if out else log_sums[:0]
        self._total = self._total + (sums - math.log(self.k)).sum(0)
        self.groups += len(sums)
        return sums

    @property
    def value(self) -> Tensor:
        """[N] nats."""
        assert isinstance(self._total, Tensor)
        return self._total / self.groups


class LogWeightAccumulator:
    """Statistics per datum from log-weights that are added a few particles at a time.

    Args:
        num_particles: the largest number of particles that are added.
        bounds: the k of the recorded L_k.
        eps: machine epsilon of the densities.
    """

    def __init__(self, num_particles: int, bounds: Sequence[int], eps: float = 0.0):
        self.num_particles, self._eps = num_particles, eps
        ordered = sorted(set(bounds))
        units = {k: max((d for d in ordered if d < k and k % d == 0), default=1) for k in ordered}
        self.bounds = {k: BoundAccumulator(k, unit) for k, unit in units.items()}
        self._tail_size = tail_length(num_particles) + 1
        self._buffer: Tensor | None = None  # [2, particles, N], of which the first `_buffered` are filled
        self._count = self._buffered = 0
        self._state: dict[str, Tensor] = {}

    def add(self, log_weight: Tensor, elbo: Tensor) -> None:
        """Adds log-weights and ELBO terms [particles, N], float64."""
        end = self._buffered + len(log_weight)
        if self._buffer is None or end > self._buffer.shape[1]:  # reused: long-lived small blocks fragment memory
            self._reduce()
            end = len(log_weight)
            self._buffer = log_weight.new_empty(2, min(self.num_particles, BUFFER + end), log_weight.shape[1])
        torch.stack([log_weight, elbo], out=self._buffer[:, self._buffered : end])
        self._buffered = end
        if end >= BUFFER:
            self._reduce()

    def _reduce(self) -> None:
        if not self._buffered:
            return
        assert self._buffer is not None
        w, elbo = self._buffer[:, : self._buffered]
        self._buffered = 0
        self._count += len(w)
        sums: dict[int, Tensor] = {}
        for k, bound in self.bounds.items():
            sums[k] = bound.add(sums.get(bound.unit, w))
        highest = w.amax(0)
        at = torch.where(highest.isfinite(), highest, 0.0)
        relative = (w - at).exp()
        new = {
            "log_sum": at + relative.sum(0).log(),
            "log_sum_of_squares": 2 * at + relative.square_().sum(0).log(),
            "elbo": elbo.sum(0),
            "smallest": w.amin(0),
            "nonfinite": (w.isnan() | (w == torch.inf)).sum(0),
            "zero": (w == -torch.inf).sum(0),
            "top": torch.where(w.isnan(), torch.inf, w).T,
        }
        if self._state:
            old = self._state
            for name in ("log_sum", "log_sum_of_squares"):
                new[name] = torch.logaddexp(old[name], new[name])
            for name in ("elbo", "nonfinite", "zero"):
                new[name] = old[name] + new[name]
            new["smallest"] = torch.minimum(old["smallest"], new["smallest"])
            new["top"] = torch.cat([old["top"], new["top"]], dim=1)
        new["top"] = new["top"].topk(min(self._tail_size, new["top"].shape[1]), dim=1).values
        self._state = new

    def select(self, which: Tensor) -> LogWeightAccumulator:
        """An accumulator that continues with some of the data, [N] bool, without bounds."""
        self._reduce()
        out = LogWeightAccumulator(self.num_particles, (), self._eps)
        out._count = self._count
        out._state = {name: value[which.to(value.device)] for name, value in self._state.items()}
        return out

    def result(self) -> dict[str, Tensor]:
        """Per datum, on the CPU: log_px, std_error, ess, k_hat, elbo, nonfinite, and recorded bounds as "bound_k"."""
        self._reduce()
        s, count = self._state, self._count
        assert 0 < count <= self.num_particles
        top = s["top"][:, : tail_length(count) + 1]
        log_ess = 2 * s["log_sum"] - s["log_sum_of_squares"]
        ess = log_ess.exp().clamp(max=count)
        # the delta method: se of log mean(w) is sd(w) / (sqrt(K) mean(w))
        relative = (count / ess - 1).clamp(min=0) / (count - 1) if count > 1 else torch.full_like(ess, torch.nan)
        # Where all weights of the tail equal the largest, as with discrete latents, the weights are bounded and no
        # tail is left to fit: ess alone decides.
        k_hat = pareto_k(top, count, s["smallest"])
        # Weights that differ by rounding alone count as equal.
        largest = top.amax(1)
        rounding = largest - s["smallest"] <= 32 * self._eps * (1 + largest.abs())
        flat = ((top.amin(1) == largest) & k_hat.isposinf() | rounding) & largest.isfinite()
        broken = (s["nonfinite"] > 0) | (s["zero"] == count)
        log_px = s["log_sum"] - math.log(count)
        found = {
            "log_px": log_px,
            "std_error": relative.sqrt(),
            "ess": ess,
            "k_hat": torch.where(flat & (count >= MIN_PARTICLES), -torch.inf, k_hat),
            "elbo": s["elbo"] / count,
            "nonfinite": torch.where(broken, s["nonfinite"].clamp(min=1), s["nonfinite"]),
            **{f"bound_{k}": log_px if k == count else b.value for k, b in self.bounds.items()},
        }
        return {name: value.cpu() for name, value in found.items()}


def two_sided(forward: LogWeightAccumulator, reverse: LogWeightAccumulator) -> dict[str, Tensor]:
    """Both bounds of log p(x) by field, from weights w with E[w] = p(x), and from 1 / w with E[1 / w] = 1 / p(x).

    lower = log mean w over forward chains, upper = -log mean 1/w over reverse ones.
    Source: Grosse, Ancha and Roy 2016 (arXiv 1606.02275).
    """
    below, above = forward.result(), reverse.result()
    return {
        "lower": below["log_px"], "lower_std_error": below["std_error"],
        "upper": -above["log_px"], "upper_std_error": above["std_error"],
        "nonfinite": below["nonfinite"] + above["nonfinite"],
    }  # fmt: skip


def recorded_bounds(num_particles: int) -> list[int]:
    """The k at which L_k is recorded: powers of two, the series 1, 2, 5, 10, ..., and K itself.

    >>> recorded_bounds(20)
    [1, 2, 4, 5, 8, 10, 16, 20]
    """
    series = {m * 10**e for e in range(len(str(num_particles))) for m in (1, 2, 5)}
    powers = {2**e for e in range(num_particles.bit_length())}
    return sorted(k for k in series | powers | {num_particles} if k <= num_particles)


class WeightedMean:
    """Running sum_k w_k v_k / sum_k w_k per datum."""

    def __init__(self) -> None:
        self._log_total: Tensor | None = None
        self.value = torch.zeros(())

    def add(self, log_weight: Tensor, values: Tensor) -> None:
        """Adds log-weights [particles, N] and values [particles, N, *event]; NaN and +inf weights count as zero."""
        log_weight = torch.where(log_weight.isnan() | (log_weight == torch.inf), -torch.inf, log_weight)
        new = log_weight.logsumexp(0)
        total = new if self._log_total is None else torch.logaddexp(self._log_total, new)
        at = torch.where(total.isfinite(), total, 0.0)
        share = (log_weight - at).exp()
        wide = share.reshape(*share.shape, *(1,) * (values.dim() - 2))
        old = 0.0 if self._log_total is None else (self._log_total - at).exp().reshape(wide.shape[1:]) * self.value
        self.value = old + (wide * values.double()).sum(0)
        self._log_total = total
