"""One step of training: gradients per datum, clipped, and nothing changed where something is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias, final

import torch
from torch import Tensor

from ppvae.errors import PpvaeError, TrainingError
from ppvae.inference.contract.missing import LEAVE_OUT, tensors_with_missing
from ppvae.inference.evaluation_mode import eval_mode
from ppvae.inference.structure import Structure
from ppvae.inference.svi import SVI
from ppvae.inference.tracing import node_log_prob, sample_sites, trace_pair
from ppvae.objectives import Objective
from ppvae.training import checkpoint
from ppvae.training.checkpoint import PairState
from ppvae.training.data_parallel import DataParallel

Number: TypeAlias = float | Tensor  # of one element


@final
class TrainingStep:
    """Takes steps of SVI, with loss and gradient divided by the number of data that a batch represents.

    A batch of more than `rows` (datum, particle) rows goes through the pair in parts, whose gradients are added up;
    objectives of the batch as a whole, and pairs with batch norm, get it at once.

    Attributes:
        taken: the steps so far.
        checkpoints: where the run's checkpoints lie, for the error of a step that cannot be taken.
    """

    def __init__(self, svi: SVI, state: PairState, structure: Structure, clip: float | None, rows: int):
        self.svi, self.state, self.structure, self.clip, self.rows = svi, state, structure, clip, rows
        self.normalised = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in state.modules)
        self.processes = DataParallel()
        self.taken = 0
        self.checkpoints: Path | None = None

    @property
    def reads(self) -> bool:
        """Whether each step's loss and gradient are looked at before the update; a GPU would have to be waited for."""
        return all(p.device.type != "cuda" for p in self.svi.params)

    def __call__(self, batch: tuple[Tensor, ...], epoch: int) -> tuple[Number, Number]:
        """One step in an epoch (counted from 1); returns loss and gradient norm per datum, for `looked_at` at its end.

        Raises:
            TrainingError: loss or gradient is not finite; the parameters are as they were before the step.
        """
        before = torch.get_rng_state()
        try:
            loss, represented = self._gradients(batch)
        except PpvaeError:
            raise
        except (ValueError, RuntimeError, IndexError) as error:
            raise self._broken(batch, epoch, before, " ".join(str(error).split())[:160]) from error
        grads = [p.grad for p in self.svi.params if p.grad is not None]
        if not self.reads:
            return loss, self._unread_update(grads, represented)
        loss = float(loss)
        if not math.isfinite(loss):
            raise self._broken(batch, epoch, before, f"the loss is {loss}")
        norm = 0.0
        if grads:
            norm = float(torch.nn.utils.get_total_norm(grads)) / represented
            if not math.isfinite(norm):
                raise self._broken(batch, epoch, before, f"the gradient is {norm}")
            factor = 1 / represented
            if self.clip is not None and norm > self.clip:
                factor *= self.clip / norm
            torch._foreach_mul_(grads, factor)
        self.svi.update()
        self.taken += 1
        return loss, norm

    def _unread_update(self, grads: list[Tensor], represented: float) -> Number:
        """The same update, with no number read; the gradient's norm per datum."""
        norm: Number = 0.0
        if grads:
            norm = torch.nn.utils.get_total_norm(grads) / represented
            factor = 1.0 if self.clip is None else (self.clip / norm).clamp(max=1.0)
            torch._foreach_mul_(grads, factor / represented)
        self.svi.update()
        self.taken += 1
        return norm

    def looked_at(self, steps: Sequence[tuple[Number, Number]], epoch: int) -> list[tuple[float, float]]:
        """An epoch's losses and gradient norms as numbers.

        Raises:
            TrainingError: one is not finite.
        """
        flat = [torch.as_tensor(x, dtype=torch.float64) for step in steps for x in step]
        place = next((x.device for x in flat if x.device.type != "cpu"), torch.device("cpu"))
        numbers = torch.stack([x.to(place) for x in flat]).tolist()
        found = list(zip(numbers[::2], numbers[1::2], strict=True))
        for i, (loss, norm) in enumerate(found):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = f"the gradient is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
                raise TrainingError(
                    f"step {self.taken - len(found) + i + 1} (epoch {epoch}): {what}; the parameters are put back to "
                    f"the epoch before. Try a smaller learning rate, clip, or a bounded scale"
                )
        return found

    def _gradients(self, batch: tuple[Tensor, ...]) -> tuple[Number, float]:
        """Leaves gradients of the loss in the parameters: (loss per datum, how many data the gradients stand for)."""
        parts = self.parts(batch)
        if self.processes.size == 1 and len(parts) == 1:
            alone = self.structure.represented_size(self.structure.batch_size(batch))
            loss = self.svi.unread_gradients(*batch)
            return (loss.double() if isinstance(loss, Tensor) else loss) / alone, alone
        try:
            numbers = self._added(parts)
        except Exception:
            self.processes.added([0.0, 0.0], self.svi.params, failed=True)
            raise
        loss, represented = self.processes.added(numbers, self.svi.params, failed=False)
        return loss / represented, represented

    def parts(self, batch: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """The batch, cut so that no part has more than `rows` (datum, particle) rows; none of an empty one."""
        size, objective = self.structure.batch_size(batch), self.svi.loss
        if not size:
            return []
        together = self.structure.draws_subsample or self.structure.has_global_latents or self.normalised
        if together or not (isinstance(objective, Objective) and objective.separate):
            return [batch]
        width = max(1, self.rows // objective.draws)
        return [batch] if size <= width else list(zip(*(t.split(width) for t in batch), strict=True))

    def _added(self, parts: Sequence[tuple[Tensor, ...]]) -> list[float]:
        """Leaves the sum of gradients over parts in the parameters: [the sum of losses, the data that they stand for].

        A part of a batch whose loss stands for all data by itself counts by its rows.
        """
        params, objective = self.svi.params, self.svi.loss
        total = represented = 0.0
        sums: dict[int, Tensor] = {}
        step = objective.taken if isinstance(objective, Objective) else 0
        for part in parts:
            if isinstance(objective, Objective):
                objective.go_to(step)  # all parts are of the same step
            rows = self.structure.batch_size(part)
            weight = rows if self.structure.has_fixed_full_size else 1
            total += weight * self.svi.gradients(*part)
            represented += weight * self.structure.represented_size(rows)
            for p in params:  # a first run may have added some
                if p.grad is not None:
                    before = sums.get(id(p))
                    sums[id(p)] = p.grad.mul_(weight) if before is None else before.add_(p.grad, alpha=weight)
        if isinstance(objective, Objective):
            objective.go_to(step + 1)  # a process without a part of the batch goes on too
        for p in params:
            p.grad = sums.get(id(p))
        return [total, represented]

    def _broken(self, batch: tuple[Tensor, ...], epoch: int, rng: Tensor, what: str) -> TrainingError:
        """The error for a step that cannot be taken: names the step, the site, and the last good checkpoint."""
        torch.set_rng_state(rng)
        where = self._culprit(batch)
        kept = "the parameters are as they were before the step"
        if self.checkpoints is not None and checkpoint.exists(self.checkpoints):
            kept += f"; last good checkpoint: {self.checkpoints}"
        cure = "Try a smaller learning rate, clip, or a bounded scale"
        if tensors_with_missing(batch):
            cure += f"; as values are missing (NaN), whose gradient is NaN even under a mask, {LEAVE_OUT}"
        return TrainingError(f"step {self.taken + 1} (epoch {epoch}): {what}{where}; {kept}. {cure}")

    def _culprit(self, batch: tuple[Tensor, ...]) -> str:
        for name, p in self.state.params().items():
            if not bool(torch.isfinite(p).all()):
                return f" (parameter {name!r} is not finite)"
        try:
            with torch.no_grad(), eval_mode(self.svi.model, self.svi.guide):
                model_trace, guide_trace = trace_pair(self.svi.model, self.svi.guide, batch, self.structure, {})
                for side, trace in (("guide", guide_trace), ("model", model_trace)):
                    for name, node in sample_sites(trace):
                        if not bool(torch.isfinite(node_log_prob(node)).all()):
                            return f" (site {name!r} of the {side} has a log-density that is not finite)"
        except Exception as error:
            return f" ({' '.join(str(error).split())[:120]})"
        for name, p in self.state.params().items():
            if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
                return f" (in parameter {name!r})"
        return ""
