"""The subject of a report: a run, its test data, and an estimate of log p(x) if there is one."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ppvae import generate
from ppvae.data.admission import admit
from ppvae.data.checks import one_line
from ppvae.data.loader import as_single_batch, data_digest
from ppvae.errors import ContractError, PpvaeError, UsageError
from ppvae.evaluation.estimate import Estimate
from ppvae.generate.pair import are_table_columns
from ppvae.inference.device import default_device
from ppvae.inference.evaluation_mode import evaluation_mode
from ppvae.inference.inspection import inspect
from ppvae.inference.param_store import program_device, unwrap
from ppvae.inference.structure import Structure
from ppvae.training.run import Run

BATCH_SIZES = (23, 24)  # of the batches with which a pair is inspected
MAX_MEANS = 2000  # data whose posterior means are computed


class SectionUnavailable(Exception):
    """The reason why a section of the report is not available, in one sentence."""


class RunData:
    """A run with its test data.

    Attributes:
        columns: the data; noise of a dynamic split is fixed at the seed of the estimate, or at `seed` without one.
        labels: [N], or None.
        event: (C, H, W) where data are images, or None; `event_guessed` where only the size of a datum suggests it.
        limits: the values shown as black and white.
        structure: the structure of the pair, or None where it cannot be run on the data; `problem` is the reason.
        needs_all_data: whether the pair must be called with the whole data set, since it draws its own subsample or has
            global latents.
    """

    def __init__(self, run: Run, data: Any, estimate: Estimate | None, seed: int, labels: Any = None):
        columns = admit(data, "data", run.model)
        noise = seed if estimate is None else estimate.seed
        self.columns = tuple(c.fixed(noise) if getattr(c, "noise", None) else c for c in columns)
        self.run, self.estimate, self.seed = run, estimate, seed
        self.labels = _labels(self.columns, labels)
        self.structure, self.needs_all_data, self.problem = self._inspect()
        first = self.values(torch.arange(min(200, len(self))))
        low, high = float(first.min()), float(first.max())
        in_unit_interval = low >= 0 and high <= 1
        self.limits = (0.0, 1.0) if in_unit_interval or high == low else (low, high)
        shape = tuple(first.shape[1:] if self.names else getattr(self.columns[0], "event_shape", first.shape[1:]))
        self.event, self.event_guessed = image_shape(shape, in_unit_interval)

    def __len__(self) -> int:
        return len(self.columns[0])

    def read(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The rows of each column; those of a column with missing values keep its marks of them."""
        return tuple(
            c.read(rows) if hasattr(c, "read") and not c.missing and not self.names else c[rows.to(c.device)]
            for c in self.columns
        )

    def batch_of(self, rows: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        """(a batch that holds `rows`, the index of `rows` in it); the batch is the whole data set where it must be."""
        if self.needs_all_data:
            return self.read(torch.arange(len(self))), rows
        return self.read(rows), slice(None)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the columns of a table, where the pair gets them one by one."""
        return tuple(c.columns[0] for c in self.columns) if are_table_columns(self.columns) else ()

    @property
    def has_context(self) -> bool:
        """Whether the batch has tensors beside the data."""
        return len(self.columns) > 1 and not self.names

    def values(self, rows: Tensor) -> Tensor:
        """Data as a tensor: the first of the batch, or the table [rows, columns] that the pair gets by columns."""
        read = self.read(rows)
        return (torch.stack([c.detach().as_subclass(Tensor) for c in read], 1) if self.names else read[0]).cpu()

    def like_data(self, values: Tensor, lead: int = 1) -> Tensor:
        """Generated values on the CPU; `lead` dims come before the event.

        Raises:
            SectionUnavailable: an event of the values has another size than a datum.
        """
        values, size = values.cpu(), self.size
        if math.prod(values.shape[lead:]) != size:
            shape = list(values.shape[lead:])
            raise SectionUnavailable(
                f"The first observed site of the model has shape {shape}; a datum has {size} values."
            )
        return values

    @property
    def size(self) -> int:
        """Numbers of a datum."""
        return len(self.names) or math.prod(self.columns[0].shape[1:])

    @property
    def means(self) -> Mapping[str, Tensor]:
        """The guide's mean of each latent that is a number or a vector per datum, {site: [first rows, D]}."""
        means, reason = self._means
        if reason:
            raise SectionUnavailable(reason)
        return means

    def is_discrete(self, site: str) -> bool:
        """Whether a latent is discrete."""
        return self.structure is not None and self.structure.is_discrete(site)

    @functools.cached_property
    def _means(self) -> tuple[dict[str, Tensor], str]:
        """(the means, the reason why there are none or an empty string)."""
        if self.structure is None:
            return {}, self.problem
        try:
            return self._posterior_means(self.structure), ""
        except PpvaeError as error:
            return {}, one_line(error, 400)
        except Exception as error:
            return {}, f"Posterior means could not be computed ({type(error).__name__}: {one_line(error)})."

    def _posterior_means(self, structure: Structure) -> dict[str, Tensor]:
        count = min(len(self), MAX_MEANS)
        batch, rows = self.batch_of(torch.arange(count))
        out = {}
        for name, mean in generate.posterior_means(self.run.model, self.run.guide, batch, seed=self.seed).items():
            size = structure.event_dims[name]
            if mean.is_floating_point() and size <= 1 and mean.dim() == 1 + size and len(mean) == len(batch[0]):
                out[name] = mean[rows].cpu().reshape(count, -1)
        return out

    @property
    def mismatch(self) -> str:
        """The reason why rows of the estimate are not rows of these data, or an empty string."""
        if self.estimate is None:
            return self.no_estimate
        if self.estimate.joint:
            return "Weights are joint over the data set, so a single datum has no log p(x)."
        digest = self.digest
        if len(self.estimate.log_px) != len(self) or self.estimate.digest not in ("", digest):
            return f"The estimate is of other data (SHA-256 {self.estimate.digest[:12]}) than these ({digest[:12]})."
        return ""

    @property
    def no_estimate(self) -> str:
        reason = self.problem or (self.structure.weights_refusal if self.structure else "")
        if reason:
            return f"No estimate of log p(x): {reason}"
        return "No estimate of log p(x) yet: ppvae evaluate adds one, or estimate= of report.write."

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the data, equal to the digest in a result of `log_marginal`."""
        return data_digest(self.columns)

    @property
    def description(self) -> str:
        first = self.columns[0]
        return getattr(first, "description", "") or f"a tensor of shape {list(first.shape)}"

    @property
    def pair(self) -> tuple[str, str]:
        """(the name of the pair, its modules with their classes)."""
        model = unwrap(self.run.model)
        owner = getattr(model, "__self__", model)
        named: Any = type(owner) if isinstance(owner, nn.Module) else model
        name = getattr(named, "__qualname__", type(named).__name__).replace("<locals>.", "")
        children = list(owner.named_children())[:6] if isinstance(owner, nn.Module) else []
        modules = ", ".join(f"{child} {type(module).__name__}" for child, module in children)
        return str(self.run.config.get("pair", {}).get("name", name)), modules

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.run.model.scope.params.values())

    def _inspect(self) -> tuple[Structure | None, bool, str]:
        """(structure of the pair, whether it needs the whole data set at each call, why there is no structure)."""
        structures = []
        try:
            # two batch sizes: one alone may equal the subsample size of a pair that draws its own subsample
            structures = [self._inspect_batch(count) for count in {min(n, len(self)) for n in BATCH_SIZES}]
            needs_all = any(s.draws_subsample or s.has_global_latents for s in structures)
        except ContractError:
            needs_all = True
        try:
            return (self._inspect_batch(len(self)) if needs_all else structures[0]), needs_all, ""
        except PpvaeError as error:
            return None, needs_all, one_line(error, 400)

    def _inspect_batch(self, count: int) -> Structure:
        with evaluation_mode(self.run.model, self.run.guide):
            first = self.read(torch.arange(count))
            place = program_device(self.run.model, self.run.guide, first)
            with default_device(place):
                batch = as_single_batch(first, self.seed, place)
                return inspect(self.run.model, self.run.guide, batch, weights=False)


def image_shape(event: tuple[int, ...], in_unit_interval: bool) -> tuple[tuple[int, int, int] | None, bool]:
    """((C, H, W) of data that are or may be images, whether the shape is a guess); (None, False) for other data.

    Values in [0, 1] of which a datum has 64 or more, in a square, are shown as an image; so is any [1 or 3, H, W].

    >>> image_shape((3, 32, 32), False), image_shape((784,), True), image_shape((5,), True)
    (((3, 32, 32), False), ((1, 28, 28), True), (None, False))
    """
    if len(event) == 3 and event[0] in (1, 3):
        return (event[0], event[1], event[2]), False
    if len(event) == 2 and in_unit_interval and min(event) >= 8:
        return (1, event[0], event[1]), True
    side = math.isqrt(event[0]) if len(event) == 1 else 0
    if side >= 8 and side * side == event[0] and in_unit_interval:
        return (1, side, side), True
    return None, False


def _labels(columns: tuple[Any, ...], labels: Any) -> Tensor | None:
    """Labels [N]: the argument, else the labels of the split, else a second column of integers."""
    if labels is not None:
        tensor = torch.as_tensor(labels).cpu()
        if tensor.shape != (len(columns[0]),):
            raise UsageError(
                f"labels: expected one for each of {len(columns[0])} data, found shape {list(tensor.shape)}"
            )
        return tensor
    found = getattr(columns[0], "labels", None)
    if found is None and len(columns) > 1 and not columns[1].is_floating_point():
        found = columns[1]
    return found.cpu() if found is not None and found.ndim == 1 else None
