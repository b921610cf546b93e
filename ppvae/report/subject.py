"""What a report is about: a run, the data it is judged on, and perhaps an estimate of log p(x)."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ppvae import generate
from ppvae.data.checks import one_line
from ppvae.errors import ContractError, PpvaeError, UsageError
from ppvae.evaluation.blocks import as_single_batch, data_digest
from ppvae.evaluation.estimate import Estimate
from ppvae.inference.evaluation_mode import evaluation_mode
from ppvae.inference.inspection import inspect
from ppvae.inference.param_store import unwrap
from ppvae.inference.structure import Structure

if TYPE_CHECKING:
    from ppvae.training import Run

FEW = (23, 24)  # data on which a pair is first tried
MAP_ROWS = 2000  # data whose posterior means are computed
ACTIVE = 0.01  # variance of the posterior mean above which a dim counts as active (Burda et al. 2016)


class LeftOut(Exception):
    """Why something is not in the report, in one sentence."""


class Subject:
    """A run with its test data, ready to be drawn from.

    Attributes:
        columns: the data, with noise fixed as the estimate fixed it.
        event: (C, H, W) where data are images, or None; `guessed` where nothing but the size says so.
        limits: the values shown as black and white.
        structure: what the pair is, or None where it cannot be run on the data (`problem` says why).
    """

    def __init__(self, run: Run, data: Any, estimate: Estimate | None, seed: int, labels: Any = None):
        columns = tuple(data) if isinstance(data, list | tuple) else (data,)
        noise = seed if estimate is None else estimate.seed
        self.columns = tuple(c.fixed(noise) if getattr(c, "noise", None) else c for c in columns)
        self.run, self.estimate, self.seed = run, estimate, seed
        self.labels = _labels(self.columns, labels)
        self.structure: Structure | None = None
        self.problem = ""
        self.whole = False  # whether the pair must be called with all data at once
        self._look()
        first = self.read(torch.arange(min(200, len(self))))[0]
        low, high = float(first.min()), float(first.max())
        unit = low >= 0 and high <= 1
        self.limits = (0.0, 1.0) if unit or high == low else (low, high)
        self.event, self.guessed = image_shape(tuple(getattr(self.columns[0], "event_shape", first.shape[1:])), unit)

    def __len__(self) -> int:
        return len(self.columns[0])

    def read(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The rows of every column, marked where they have missing values."""
        return tuple(
            c.read(rows) if hasattr(c, "read") and not c.missing else c[rows.to(c.device)] for c in self.columns
        )

    def called_with(self, rows: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        """What to call the pair with to learn about `rows`, and where they are in what comes back."""
        if self.whole:
            return self.read(torch.arange(len(self))), rows
        return self.read(rows), slice(None)

    def values(self, rows: Tensor) -> Tensor:
        """The data themselves, [rows, *event]."""
        return self.read(rows)[0].cpu()

    def like_data(self, values: Tensor, lead: int = 1) -> Tensor:
        """What the pair generated, on the CPU, if it is of the data's size; `lead` dims come before the event."""
        values, size = values.cpu(), math.prod(self.columns[0].shape[1:])
        if math.prod(values.shape[lead:]) != size:
            found = list(values.shape[lead:])
            raise LeftOut(f"The model's first observed site is of shape {found}; the data have {size} numbers.")
        return values

    @property
    def means(self) -> Mapping[str, Tensor]:
        """The guide's mean of every latent that is a number or vector per datum, {site: [first rows, D]}."""
        means, why = self._means
        if why:
            raise LeftOut(why)
        return means

    @functools.cached_property
    def _means(self) -> tuple[dict[str, Tensor], str]:
        """The means, or why there are none."""
        if self.structure is None:
            return {}, self.problem
        try:
            return self._computed(self.structure), ""
        except PpvaeError as error:
            return {}, one_line(error, 400)
        except Exception as error:
            return {}, f"Posterior means could not be computed ({type(error).__name__}: {one_line(error)})."

    def _computed(self, structure: Structure) -> dict[str, Tensor]:
        count = min(len(self), MAP_ROWS)
        batch, rows = self.called_with(torch.arange(count))
        found = {}
        for name, v in generate.posterior_means(self.run.model, self.run.guide, batch, seed=self.seed).items():
            size = structure.event_dims[name]
            if v.is_floating_point() and size <= 1 and v.dim() == 1 + size and len(v) == len(batch[0]):
                found[name] = v[rows].cpu().reshape(count, -1)
        return found

    @property
    def matched(self) -> str:
        """Why the estimate's data cannot be told to be these data, or an empty string."""
        if self.estimate is None:
            return self.no_estimate
        if self.estimate.joint:
            return "Weights are joint over the data set, so that no datum has a log p(x) of its own."
        found = self.digest
        if len(self.estimate.log_px) != len(self) or self.estimate.digest not in ("", found):
            return f"The estimate is of other data (SHA-256 {self.estimate.digest[:12]}) than these ({found[:12]})."
        return ""

    @property
    def no_estimate(self) -> str:
        """Why there is no estimate."""
        why = self.problem or (self.structure.weights_refusal if self.structure else "")
        return f"No estimate of log p(x): {why}" if why else "No estimate of log p(x) was given."

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the data, as `log_marginal` writes it into its result."""
        return data_digest(self.columns)

    @property
    def description(self) -> str:
        """The data in words."""
        first = self.columns[0]
        return getattr(first, "description", "") or f"a tensor of shape {list(first.shape)}"

    @property
    def pair(self) -> tuple[str, str]:
        """The pair's name, and its parts."""
        model = unwrap(self.run.model)
        owner = getattr(model, "__self__", model)
        thing: Any = type(owner) if isinstance(owner, nn.Module) else model
        name = getattr(thing, "__qualname__", type(thing).__name__).replace("<locals>.", "")
        parts = list(owner.named_children())[:6] if isinstance(owner, nn.Module) else []
        words = ", ".join(f"{n} {type(part).__name__}" for n, part in parts)
        return str(self.run.config.get("pair", {}).get("name", name)), words

    @property
    def num_parameters(self) -> int:
        """How many numbers the run learned."""
        return sum(p.numel() for p in self.run.model.scope.params.values())

    def _look(self) -> None:
        """Finds out what the pair is, and whether it can be run on some of the data or wants them all."""
        try:
            # of two sizes, so that neither is taken for the batch of a pair that draws its own subsample of that size
            found = [self._inspect(count) for count in {min(n, len(self)) for n in FEW}]
            self.whole = any(structure.draws_subsample or structure.has_global_latents for structure in found)
        except ContractError:
            self.whole = True
        try:
            self.structure = self._inspect(len(self)) if self.whole else found[0]
        except PpvaeError as error:
            self.problem = one_line(error, 400)

    def _inspect(self, count: int) -> Structure:
        with evaluation_mode(self.run.model, self.run.guide):
            batch = as_single_batch(self.run.model, self.run.guide, self.read(torch.arange(count)), self.seed)
            return inspect(self.run.model, self.run.guide, batch, weights=False)


def image_shape(event: tuple[int, ...], unit: bool) -> tuple[tuple[int, int, int] | None, bool]:
    """(C, H, W) of data that are or seem to be images, and whether that was guessed.

    Numbers in [0, 1] in a square of side 8 at least are taken for an image; so is any [1 or 3, H, W].

    >>> image_shape((3, 32, 32), False), image_shape((784,), True), image_shape((5,), True)
    (((3, 32, 32), False), ((1, 28, 28), True), (None, False))
    """
    if len(event) == 3 and event[0] in (1, 3):
        return (event[0], event[1], event[2]), False
    if len(event) == 2 and unit and min(event) >= 8:
        return (1, event[0], event[1]), True
    side = math.isqrt(event[0]) if len(event) == 1 else 0
    if side >= 8 and side * side == event[0] and unit:
        return (1, side, side), True
    return None, False


def _labels(columns: tuple[Any, ...], given: Any) -> Tensor | None:
    """Labels [N]: those given, else the split's, else a second column of whole numbers."""
    if given is not None:
        labels = torch.as_tensor(given).cpu()
        if labels.shape != (len(columns[0]),):
            raise UsageError(
                f"labels: expected one for each of {len(columns[0])} data, found shape {list(labels.shape)}"
            )
        return labels
    own = getattr(columns[0], "labels", None)
    if own is None and len(columns) > 1 and not columns[1].is_floating_point():
        own = columns[1]
    return own.cpu() if own is not None and own.ndim == 1 else None
