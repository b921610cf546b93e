"""Weighted reservoir sampling: posterior draws of the latents from a stream of weighted particles."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ppvae.evaluation.blocks import PARTICLE_BLOCK
from ppvae.inference.structure import Role, Structure


class PosteriorReservoir:
    """Posterior draws by resampling: each draw is a particle with probability proportional to its weight.

    Particles are resampled a whole block at a time, so that the draws do not depend on `rows`.
    """

    def __init__(self, num_draws: int, seed: int, s: Structure):
        self.num_draws, self.s = num_draws, s
        self.names = [
            n
            for n, role in s.guide_roles.items()
            if role is Role.LATENT and not s.enumerated and not s.has_global_latents
        ]
        self._generator = torch.Generator().manual_seed(seed)
        self._log_total: Tensor | None = None
        self._buffer: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._values: dict[str, Tensor] = {}

    def add(self, log_weight: Tensor, latents: Mapping[str, Tensor], rows: Tensor | None = None) -> None:
        """Adds log-weights [particles, N] and the latents behind them, of some rows of a batch (or all)."""
        values = {}
        for name in (n for n in self.names if n in latents):
            value = latents[name].cpu()
            value = value.movedim(value.dim() - self.s.event_dims[name] - 1, 1)  # [particles, batch, ...]
            values[name] = value if rows is None else value[:, rows]
        self._buffer.append((log_weight.cpu(), values))
        if sum(len(w) for w, _ in self._buffer) >= PARTICLE_BLOCK:
            self._resample()

    def _resample(self) -> None:
        if not self._buffer:
            return
        log_weight = torch.cat([w for w, _ in self._buffer])
        latents = {n: torch.cat([v[n] for _, v in self._buffer]) for n in self._buffer[0][1]}
        self._buffer = []
        count = log_weight.shape[1]
        log_new = log_weight.logsumexp(0)
        safe = torch.where(log_new.isfinite(), log_weight, torch.zeros_like(log_weight))
        index = torch.multinomial(safe.softmax(0).T, self.num_draws, replacement=True, generator=self._generator).T
        uniform = torch.rand(self.num_draws, count, generator=self._generator, dtype=torch.float64)
        self._log_total = log_new if self._log_total is None else torch.logaddexp(self._log_total, log_new)
        replaced = uniform < (log_new - self._log_total).exp()
        for name, value in latents.items():
            new = value[index, torch.arange(count)]
            old = self._values.get(name, new)
            self._values[name] = torch.where(replaced.reshape(*replaced.shape, *(1,) * (new.dim() - 2)), new, old)

    @property
    def values(self) -> dict[str, Tensor]:
        """Draws of each latent, [draws, N, (inner plates,) *event]."""
        self._resample()
        return self._values
