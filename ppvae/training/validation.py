"""The ELBO of held-out data with beta = 1 and fixed noise, its rate and its distortion."""

from __future__ import annotations

import torch

from ppvae.evaluation.blocks import Block
from ppvae.inference.contract import inspect
from ppvae.inference.evaluating import eval_mode
from ppvae.inference.structure import Structure, undisturbed
from ppvae.inference.tracing import Pair
from ppvae.training.loading import Columns

ROWS = 1000


class Monitor:
    """Reports ELBO = -(rate + distortion), nats per datum, one draw per datum, the same noise every time.

    rate = E[log q(z | x) - log p(z)], distortion = -E[log p(x | z)] (Alemi et al. 2018, arXiv 1711.00464). Without
    validation data it looks at the first training data, and says so in the metrics' names. Where there
    are several latents, the KL of each stands by itself, too.
    """

    def __init__(self, model: Pair, guide: Pair, structure: Structure, columns: Columns, held_out: bool, seed: int):
        self.structure, self.columns, self.seed = structure, columns, seed
        self.prefix = "valid" if held_out else "train"
        self.key = f"{self.prefix}_elbo"
        self._count = len(columns) if held_out else min(len(columns), ROWS)
        with undisturbed():
            torch.manual_seed(seed)  # a split that redraws its values is looked at in one drawing
            self._parts = tuple(_fixed(part, seed) for part in columns.parts)
        if structure.indexes and held_out:  # its plate has another size over other data
            self.structure = inspect(model, guide, columns.whole(), weights=False)

    @property
    def has_elbo(self) -> bool:
        """Whether the pair has an ELBO per datum; joint weights and point masses have none."""
        return not (self.structure.joint or self.structure.refusal)

    def __call__(self, model: Pair, guide: Pair) -> dict[str, float]:
        """{valid_elbo, valid_rate, valid_distortion, valid_kl_z1, ...}, or the same with train_."""
        s = self.structure
        if not self.has_elbo:
            return {}
        size = s.subsample_size if s.indexes else ROWS
        latents = [] if s.enumerated or "auxiliary" in s.guide_roles.values() else list(s.guide_roles)
        totals = torch.zeros(3 + len(latents), dtype=torch.float64)
        with undisturbed(), torch.no_grad(), eval_mode(model, guide):
            for number, start in enumerate(range(0, self._count, size)):
                stop = min(start + size, self._count)
                block = Block(self._parts, start, stop, number, s, self.columns.device)
                for _, elbo, t in block.weights(model, guide, 1, self.seed, ROWS):
                    assert t is not None  # no compiled cells
                    rates = t.rates() if latents else {}
                    parts = [elbo, t.log_lik, t.log_guide - t.log_prior, *(rates[n] for n in latents)]
                    totals += torch.stack([p[..., : stop - start].sum().cpu() for p in parts])
        elbo, log_lik, rate, *each = (totals / self._count).tolist()
        metrics = {self.key: elbo}
        if not s.enumerated:
            metrics |= {f"{self.prefix}_rate": rate, f"{self.prefix}_distortion": -log_lik}
            if len(latents) > 1:
                metrics |= {f"{self.prefix}_kl_{name}": kl for name, kl in zip(latents, each, strict=True)}
        return metrics


def _fixed(part: object, seed: int) -> object:
    return part.fixed(seed) if getattr(part, "noise", None) else part  # type: ignore[attr-defined]
