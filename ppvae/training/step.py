"""One optimization step: accumulation of gradients, clipping, and detection of non-finite losses and gradients."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias, final

import torch
from torch import Tensor

from ppvae.distributed import DistributedContext
from ppvae.errors import PpvaeError, TrainingError
from ppvae.errors.memory import explain_out_of_memory
from ppvae.inference.contract.run_failure import find_invalid
from ppvae.inference.structure import Structure
from ppvae.inference.svi import SVI
from ppvae.objectives import Objective
from ppvae.training import checkpoint
from ppvae.training.checkpoint import PairState
from ppvae.training.diagnosis import BOUND, FROM_THE_START, SLOWER, cure_for_step, find_nonfinite
from ppvae.training.metrics import last_good

Number: TypeAlias = float | Tensor  # of one element


@final
class TrainingStep:
    """Steps of SVI with loss and gradient divided by the number of data that a batch represents.

    A batch of more than `rows` (datum, particle) rows is cut into micro-batches, whose gradients are accumulated.
    Objectives of the batch as a whole, and pairs with batch norm, get the batch uncut.

    Attributes:
        count: the number of steps taken.
        start: parameters and buffers that were finite: those of the run's start, then those of each epoch's end.
        checkpoints: the folder of the run's checkpoints, for the error message of a step that fails.
    """

    def __init__(self, svi: SVI, state: PairState, structure: Structure, clip: float | None, rows: int):
        self.svi, self.state, self.structure, self.clip, self.rows = svi, state, structure, clip, rows
        self.has_batch_norm = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in state.modules)
        self.context = DistributedContext()
        self.count = 0
        self.start = state.snapshot()
        self.checkpoints: Path | None = None
        self._unapplied = 1.0  # the factor of the last step that its gradients do not have yet

    @property
    def synchronous(self) -> bool:
        """Whether loss and gradient are checked before each update; on a GPU, reading them would stall the queue."""
        return all(p.device.type != "cuda" for p in self.svi.params)

    @property
    def memory_cure(self) -> str:
        """What to lower where memory does not suffice, and what is kept, as a sentence."""
        objective = self.svi.objective
        splits = isinstance(objective, Objective) and objective.factorizes_over_data and not self.has_batch_norm
        lower = f"rows (now {self.rows}), batch_size or num_particles" if splits else "batch_size or num_particles"
        return f"Lower {lower}, or the sizes of the pair{last_good(self.checkpoints)}"

    def __call__(self, batch: tuple[Tensor, ...], epoch: int, rows: Tensor | None = None) -> tuple[Number, Number]:
        """Takes one step in an epoch (counted from 1); returns loss and gradient norm, both per datum.

        `rows` are those of the data that the batch holds on all ranks, for the error.

        Raises:
            TrainingError: loss or gradient is not finite; the parameters are as they were before the step.
        """
        rng_state = torch.get_rng_state()
        try:
            with explain_out_of_memory(f"step {self.count + 1} (epoch {epoch})", self.memory_cure):
                loss, represented = self._compute_gradients(batch)
        except PpvaeError:
            raise
        except (ValueError, RuntimeError, IndexError) as error:
            words = " ".join(str(error).split())[:160]
            raise self._step_error(batch, rows, epoch, rng_state, words, failed=True) from error
        grads = [p.grad for p in self.svi.params if p.grad is not None]
        if not self.synchronous:
            return loss, self._update_unchecked(grads, represented)
        loss = float(loss)
        if not math.isfinite(loss):
            raise self._step_error(batch, rows, epoch, rng_state, f"the loss is {loss}", failed=False)
        native = self.svi.native_adam([p for p in self.svi.params if p.grad is not None])
        norm = 0.0
        if grads:
            norm = (native.norm() if native else float(torch.nn.utils.get_total_norm(grads))) / represented
            if not math.isfinite(norm):
                raise self._step_error(batch, rows, epoch, rng_state, f"the gradient is {norm}", failed=False)
        factor = 1 / represented
        if self.clip is not None and norm > self.clip:
            factor *= self.clip / norm
        self._unapplied = factor if native else 1.0
        if native:
            native.scaled_step(factor)
        else:
            if grads:
                torch._foreach_mul_(grads, factor)
            self.svi.update()
        self.count += 1
        return loss, norm

    def _update_unchecked(self, grads: list[Tensor], represented: float) -> Number:
        """The same update without reading a number from the device; returns the gradient's norm per datum."""
        norm: Number = 0.0
        if grads:
            norm = torch.nn.utils.get_total_norm(grads) / represented
            factor = 1.0 if self.clip is None else (self.clip / norm).clamp(max=1.0)
            torch._foreach_mul_(grads, factor / represented)
        self.svi.update()
        self.count += 1
        return norm

    def end_epoch(self, steps: Sequence[tuple[Number, Number]], epoch: int) -> list[tuple[float, float]]:
        """The losses and gradient norms of an epoch's steps as floats; leaves the last step's gradients in `.grad`.

        Raises:
            TrainingError: one is not finite.
        """
        grads = [p.grad for p in self.svi.params if p.grad is not None]
        if self._unapplied != 1 and grads:
            torch._foreach_mul_(grads, self._unapplied)
        flat = [torch.as_tensor(x, dtype=torch.float64) for step in steps for x in step]
        device = next((x.device for x in flat if x.device.type != "cpu"), torch.device("cpu"))
        values = torch.stack([x.to(device) for x in flat]).tolist()
        pairs = list(zip(values[::2], values[1::2], strict=True))
        for i, (loss, norm) in enumerate(pairs):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = f"the gradient is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
                step = self.count - len(pairs) + i + 1
                cure = SLOWER if step > 1 else f"{FROM_THE_START}: {BOUND}"
                raise TrainingError(
                    f"step {step} (epoch {epoch}): {what}; the parameters are put back to the epoch before. {cure}"
                )
        return pairs

    def _compute_gradients(self, batch: tuple[Tensor, ...]) -> tuple[Number, float]:
        """Sets the gradients of the loss: (loss per datum, the number of data that the gradients represent)."""
        micro_batches = self.micro_batches(batch)
        if self.context.size == 1 and len(micro_batches) == 1:
            rows = self.structure.represented_size(self.structure.batch_size(batch))
            loss = self.svi.unread_gradients(*batch)
            return (loss.double() if isinstance(loss, Tensor) else loss) / rows, rows
        try:
            numbers = self._accumulate_gradients(micro_batches)
        except Exception:
            self.context.all_reduce_gradients([0.0, 0.0], self.svi.params, failed=True)
            raise
        loss, represented = self.context.all_reduce_gradients(numbers, self.svi.params, failed=False)
        return loss / represented, represented

    def micro_batches(self, batch: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """The batch cut into parts of at most `rows` (datum, particle) rows; no part of an empty batch."""
        size, objective = self.structure.batch_size(batch), self.svi.objective
        if not size:
            return []
        s = self.structure
        joint = s.draws_subsample or s.has_global_latents or bool(s.row_order) or self.has_batch_norm
        if joint or not (isinstance(objective, Objective) and objective.factorizes_over_data):
            return [batch]
        width = max(1, self.rows // objective.draws)
        return [batch] if size <= width else list(zip(*(t.split(width) for t in batch), strict=True))

    def _accumulate_gradients(self, micro_batches: Sequence[tuple[Tensor, ...]]) -> list[float]:
        """Sets the sum of gradients over micro-batches: [sum of losses, number of data that they represent].

        Where the plate has a fixed size, each loss represents all data, and counts by the rows of its micro-batch.
        """
        params, objective = self.svi.params, self.svi.objective
        total = represented = 0.0
        sums: dict[int, Tensor] = {}
        step = objective.steps_taken if isinstance(objective, Objective) else 0
        for part in micro_batches:
            if isinstance(objective, Objective):
                objective.set_step(step)  # all micro-batches belong to one step
            rows = self.structure.batch_size(part)
            weight = rows if self.structure.has_fixed_full_size else 1
            total += weight * self.svi.gradients(*part)
            represented += weight * self.structure.represented_size(rows)
            for p in params:  # the first run may have added some
                if p.grad is not None:
                    before = sums.get(id(p))
                    if before is not None:
                        before.add_(p.grad, alpha=weight)
                    else:
                        sums[id(p)] = p.grad if weight == 1 else p.grad.mul_(weight)
        if isinstance(objective, Objective):
            objective.set_step(step + 1)  # also on a rank without rows of the batch
        for p in params:
            p.grad = sums.get(id(p))
        return [total, represented]

    def _step_error(
        self, batch: tuple[Tensor, ...], rows: Tensor | None, epoch: int, rng_state: Tensor, what: str, failed: bool
    ) -> TrainingError:
        """The error for a step that cannot be taken: the step, the site or parameter, the last checkpoint, the cure."""
        model, guide = self.svi.model, self.svi.guide
        torch.set_rng_state(rng_state)
        rows = None if rows is None else self.context.shard_batch((rows,))[0]
        invalid = find_invalid(model, guide, batch, rows)
        origin = "" if invalid else find_nonfinite(model, guide, batch, rows, self.state.params(), self.structure)
        note = "the parameters are as they were before the step"
        if self.checkpoints is not None and checkpoint.exists(self.checkpoints):
            note += f"; last good checkpoint: {self.checkpoints}"
        now = self.state.snapshot()
        self.state.restore(self.start)
        torch.set_rng_state(rng_state)
        try:
            cure = cure_for_step(model, guide, batch, rows, lambda: self._loss_and_gradients(batch), failed, invalid)
        finally:
            self.state.restore(now)
        return TrainingError(f"step {self.count + 1} (epoch {epoch}): {what}{origin}; {note}. {cure}")

    def _loss_and_gradients(self, batch: tuple[Tensor, ...]) -> list[Tensor]:
        """Loss and gradients of a batch from eager runs of the pair, a list for all micro-batches."""
        found: list[Tensor] = []
        for part in self.micro_batches(batch):
            loss, _ = self.svi.eager_gradients(*part)
            found.append(torch.as_tensor(loss))
            found += [p.grad for p in self.svi.params if p.grad is not None]
        return found
