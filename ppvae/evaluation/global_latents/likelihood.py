"""log p(x_n | theta) of a block of data at draws of the global latents, local latents integrated out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ppvae.evaluation.blocks import Block, Evaluation
from ppvae.evaluation.global_latents.draws import GlobalDraws
from ppvae.evaluation.importance.accumulators import LogWeightAccumulator
from ppvae.inference.structure import Role


@dataclass(frozen=True)
class DrawChunk:
    """Some draws of the global latents at a block of data.

    Attributes:
        log_lik: log (1/K) sum_k p(x_n, z_nk | theta) / q(z_nk | x_n, theta), [draws, N]; exact without sampled local
            latents, else exp is unbiased for p(x_n | theta).
        log_square: log of the mean of products of two different of the K weights, [draws, N]: exp is unbiased for
            p(x_n | theta)^2; NaN for a single sampled particle.
        elbo: the mean of the K log-weights, [draws, N].
        log_ratio: log p(theta) - log q(theta), [draws].
    """

    log_lik: Tensor
    log_square: Tensor
    elbo: Tensor
    log_ratio: Tensor


@final
class ConditionalLikelihood:
    """log p(x_n | theta) for draws of the global latents from the guide.

    Noise is a function of the seed, the block of data and the block of particles: a second pass gives the same numbers.

    Args:
        run: an evaluation with `given_globals`.
        num_draws: S, of the global latents.
        local_particles: K, of the local latents at each.
        rows: the largest number of (datum, particle) rows in one run of the pair.
    """

    def __init__(self, run: Evaluation, num_draws: int, local_particles: int, rows: int):
        s = run.structure
        sampled = (n for n, role in s.guide_roles.items() if role in (Role.LATENT, Role.AUXILIARY))
        self.has_local_draws = any(name not in s.global_sites for name in sampled)
        self.run, self.num_draws, self.rows = run, num_draws, rows
        self.local_particles = local_particles if self.has_local_draws else 1  # else one is exact
        self.draws = GlobalDraws(run, self.local_particles)

    def chunks(self, block: Block, pooled: LogWeightAccumulator | None = None) -> Iterator[DrawChunk]:
        """The draws in order, some at a time; `pooled` gets the log-weights of all particles of the local latents."""
        run, per_draw = self.run, self.local_particles
        held: list[tuple[Tensor, Tensor, Tensor]] = []
        for log_weight, elbo, t in block.weights(
            run.model, run.guide, self.num_draws * per_draw, run.seed, self.rows, globals_of=self.draws
        ):
            assert t is not None
            if pooled is not None:
                pooled.add(log_weight, elbo)
            held.append((log_weight, elbo, t.globals.log_weight[:, 0]))
            if sum(len(w) for w, _, _ in held) >= per_draw:
                whole = [torch.cat(parts) for parts in zip(*held, strict=True)]
                end = len(whole[0]) // per_draw * per_draw
                w, e, ratio = (part[:end].unflatten(0, (-1, per_draw)) for part in whole)
                held = [(whole[0][end:], whole[1][end:], whole[2][end:])]
                log_sum = w.logsumexp(1)
                log_square = self._log_square(w, log_sum)
                yield DrawChunk(log_sum - math.log(per_draw), log_square, e.mean(1), ratio[:, 0])

    def _log_square(self, log_weight: Tensor, log_sum: Tensor) -> Tensor:
        """log ((sum_k w_k)^2 - sum_k w_k^2) / (K (K - 1)), [draws, N], of log-weights [draws, K, N]."""
        k = self.local_particles
        if not self.has_local_draws:
            return 2 * log_sum
        share = ((2 * log_weight).logsumexp(1) - 2 * log_sum).clamp(max=0.0)
        return 2 * log_sum + (-share.expm1()).log() - (math.log(k * (k - 1)) if k > 1 else math.nan)

    def pooled(self, block: Block) -> LogWeightAccumulator | None:
        """An accumulator of the local latents' weights at all draws; None where no local latent is sampled."""
        if not self.has_local_draws:
            return None
        return LogWeightAccumulator(self.num_draws * self.local_particles, (), block.eps)
