"""The ELBO of held-out data with beta = 1 and fixed noise, its rate and its distortion."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import final

import pyro
import torch
from torch import Tensor

from ppvae.compilation.function import Comparison, CompiledFunction, Outputs, Policy, Target
from ppvae.compilation.graph import CaptureError, all_close, all_double
from ppvae.compilation.guards import Guards
from ppvae.compilation.matmul_backend import Choices
from ppvae.data.loader import DataLoader, data_columns
from ppvae.errors.memory import explain_out_of_memory
from ppvae.evaluation.blocks import Block
from ppvae.inference.contract.run_failure import explain_failures
from ppvae.inference.evaluation_mode import eval_mode
from ppvae.inference.inspection import inspect
from ppvae.inference.param_store import unwrap
from ppvae.inference.structure import ParticlePlacement, Role, Structure
from ppvae.inference.terms import Terms, evaluate_terms
from ppvae.inference.tracing import Program
from ppvae.rng import derive_seed, fork_rng, seed_all

ROWS = 1000

log = logging.getLogger("ppvae")


@final
class ValidationMetrics:
    """Reports ELBO = -(rate + distortion), nats per datum, from one draw per datum with the same noise every epoch.

    rate = E[log q(z | x) - log p(z)], distortion = -E[log p(x | z)] (Alemi et al. 2018, arXiv 1711.00464). Without
    validation data the metrics are of the first training data, and named train_*. Pairs with several latents also get
    the KL of each. Given global latents theta the terms of a validation datum are those of its own sites, at a draw of
    theta from the guide, or at its point: the mean is a lower bound on that of the predictive log-density of new data.
    """

    def __init__(
        self, model: Program, guide: Program, structure: Structure, loader: DataLoader, held_out: bool, seed: int
    ):
        self.structure, self.loader, self.seed, self.held_out = structure, loader, seed, held_out
        self.prefix = "valid" if held_out else "train"
        self.key = f"{self.prefix}_elbo"
        self._function: CompiledFunction | None = None
        self._warned = False
        whole = held_out or bool(structure.row_order)
        self._count = len(loader) if whole else min(len(loader), ROWS)
        with fork_rng():
            torch.manual_seed(seed)  # noise that a split redraws is drawn once
            self._columns = data_columns(loader.columns, seed)
        if structure.draws_subsample and held_out:  # its plate has another size over other data
            self.structure = inspect(model, guide, loader.read_all(), weights=False)

    @property
    def has_elbo(self) -> bool:
        """Whether the pair has an ELBO per datum; joint weights and point masses on local latents have none."""
        s = self.structure
        return self.held_out and not s.local_refusal if s.has_global_latents else not s.weights_refusal

    def __call__(self, model: Program, guide: Program, products: Choices | None = None) -> dict[str, float]:
        """{valid_elbo, valid_rate, valid_distortion, valid_kl_z1, ...}, or the same with train_.

        With `products`, the choices of the steps' compiled graph, whole blocks of data come from one, too: the same
        numbers, up to rounding.
        """
        s = self.structure
        if not self.has_elbo:
            return {}
        size = s.subsample_size if s.draws_subsample else self._count if s.row_order else ROWS
        latents = [n for n, role in s.guide_roles.items() if role is Role.LATENT and n not in s.global_sites]
        if s.enumerated or Role.AUXILIARY in s.guide_roles.values():
            latents = []  # their rates are no terms of their own
        totals = torch.zeros(3 + len(latents), dtype=torch.float64)
        with fork_rng(), torch.no_grad(), eval_mode(model, guide):
            for number, start in enumerate(range(0, self._count, size)):
                stop = min(start + size, self._count)
                block = Block(self._columns, start, stop, number, s, self.loader.device)
                sums = None
                if products is not None and number > 0 and stop - start == size:
                    sums = self._sums_by_graph(model, guide, block, latents, products)
                if sums is None or not bool(sums.isfinite().all()):
                    with (
                        explain_out_of_memory(
                            f"the ELBO of the {self.prefix} data", "Lower num_particles or batch_size"
                        ),
                        explain_failures(model, guide, block.batch, f"{self.prefix} {block.where}", block.rows),
                    ):
                        ((_, _, t),) = block.weights(model, guide, 1, self.seed, ROWS)
                    assert t is not None  # no compiled cells
                    sums = _sums(t.local, latents, stop - start)
                    self._warn_of_nonfinite(t.local.elbo[..., : stop - start], start)
                totals += sums.cpu()
        elbo, log_lik, rate, *each = (totals / self._count).tolist()
        metrics = {self.key: elbo}
        if not s.enumerated:
            metrics |= {f"{self.prefix}_rate": rate, f"{self.prefix}_distortion": -log_lik}
            if len(latents) > 1:
                metrics |= {f"{self.prefix}_kl_{name}": kl for name, kl in zip(latents, each, strict=True)}
        return metrics

    def _warn_of_nonfinite(self, elbo: Tensor, start: int) -> None:
        """Says once which row has no finite ELBO."""
        lost = (~elbo.isfinite()).any(0).nonzero()
        if len(lost) and not self._warned:
            self._warned = True
            log.warning(
                "ppvae: %s is not finite, as the ELBO of row %d of these data: mend that row, or leave it out",
                self.key, start + int(lost[0]),
            )  # fmt: skip

    def _sums_by_graph(
        self, model: Program, guide: Program, block: Block, latents: Sequence[str], products: Choices
    ) -> Tensor | None:
        """The sums of a block of the usual size after the first; None where no graph gives them."""
        if self.structure.layout is ParticlePlacement.ONE_BY_ONE or self.structure.draws_subsample:
            return None
        if self._function is None:

            def run(*batch: Tensor) -> Outputs:
                with pyro.validation_enabled(False):
                    t = evaluate_terms(model, guide, batch, 1, structure=self.structure)
                    return [_sums(t.local, latents, ROWS)]

            target = Target(
                function=run,
                agree=self._agree,
                parameters=self.structure.params.values,
                guards=lambda: Guards(model=unwrap(model), guide=unwrap(guide)),
                choices=lambda: products,
            )
            fallback = "validation runs without a compiled graph"
            self._function = CompiledFunction(target, Policy(checks_guards=True), "validation sums", fallback)
        seed_all(derive_seed(self.seed, block.number, 0))  # as `Block.weights` has it
        out = self._function(ROWS, block.batch)
        return None if out is None or self._function.refusal else out[0]

    def _agree(self, c: Comparison) -> None:
        ((a,), (b,)) = c.expected, c.found
        digits = 1e-9 if all_double(self.structure.params.values()) else 1e-4
        if not all_close(a, b, digits * (1 + a.abs().amax())):
            raise CaptureError("it gives other sums than the graph of it")


def _sums(t: Terms, latents: Sequence[str], rows: int) -> Tensor:
    """[elbo, log_lik, rate, a rate for each latent], summed over the first rows."""
    rates = t.rates() if latents else {}
    absent = torch.zeros_like(t.elbo)  # of a latent that other batches have
    parts = [t.elbo, t.log_lik, t.log_guide - t.log_prior, *(rates.get(name, absent) for name in latents)]
    return torch.stack([p[..., :rows].sum() for p in parts])
