"""Sampling, reconstructing, interpolating, traversing, editing: functions over any pair that keeps the contract.

Every function takes the pair and data of the kind it was trained on (a tensor, a split, or a tuple of them), runs with
modules in evaluation mode, draws from its own `seed`, and gives plain tensors. Pictures are means of p(x | z) unless
`mean=False` asks for draws. Missing values are filled by `ppvae.evaluation.impute`, which weighs what the guide draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppvae.data.loader import as_single_batch
from ppvae.errors import UsageError
from ppvae.inference.evaluation_mode import evaluation_mode
from ppvae.inference.inspection import inspect
from ppvae.inference.param_store import bind_program, program_device
from ppvae.inference.structure import Role, Structure
from ppvae.inference.tracing import Program, Substitute, sample_sites, trace_program
from ppvae.rng import fork_rng

ROWS = 500


def samples(model: Program, guide: Program, x: Any, count: int = 64, *, mean: bool = True, seed: int = 0) -> Tensor:
    """Ancestral samples from the model, [count, *event]: z ~ p(z), then the mean of (or a draw from) p(x | z).

    `x` gives the shape of the data, and whatever else the model is conditioned on.

    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> samples(pair.model, pair.guide, torch.zeros(4, 3), count=5).shape
    torch.Size([5, 3])
    """
    with _opened(model, guide, x, seed) as pair:
        return pair.decode({}, pair.repeated(count), mean)


def reconstructions(model: Program, guide: Program, x: Any, *, mean: bool = True, seed: int = 0) -> Tensor:
    """Each datum encoded and decoded, [N, *event]: z ~ q(z | x), then the mean of (or a draw from) p(x | z).

    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> reconstructions(pair.model, pair.guide, torch.zeros(4, 3)).shape
    torch.Size([4, 3])
    """
    with _opened(model, guide, x, seed) as pair:
        return pair.decode(pair.encode(mean=False), pair.batch, mean)


def posterior_means(model: Program, guide: Program, x: Any, *, seed: int = 0) -> dict[str, Tensor]:
    """The guide's mean of every latent, {site: [N, *event]}; a draw where a distribution has no mean.

    In a hierarchical guide a lower site's mean is that given the means above it.

    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> posterior_means(pair.model, pair.guide, torch.zeros(4, 3))["z"].shape
    torch.Size([4, 2])
    """
    with _opened(model, guide, x, seed) as pair:
        return pair.encode(mean=True)


def interpolations(model: Program, guide: Program, start: Any, end: Any, steps: int = 10, *, seed: int = 0) -> Tensor:
    """Means along straight lines between the posterior means of two sets of data, [steps, N, *event].

    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> interpolations(pair.model, pair.guide, torch.zeros(4, 3), torch.ones(4, 3), steps=7).shape
    torch.Size([7, 4, 3])
    """
    if steps < 2:
        raise UsageError(f"steps: expected at least 2, found {steps}")
    with _opened(model, guide, end, seed) as pair:
        last = pair.encode(mean=True)
    with _opened(model, guide, start, seed) as pair:
        first = pair.encode(mean=True)
        if any(v.shape != last[n].shape for n, v in first.items()):
            raise UsageError("start, end: expected as many data in both")
        rows = []
        for t in torch.linspace(0, 1, steps).tolist():
            between = {n: torch.lerp(v, last[n], t) if v.is_floating_point() else v for n, v in first.items()}
            rows.append(pair.decode(between, pair.batch, True))
        return torch.stack(rows)


def traversals(
    model: Program,
    guide: Program,
    x: Any,
    *,
    site: str | None = None,
    dims: Sequence[int] | None = None,
    values: Sequence[float] = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0),
    seed: int = 0,
) -> Tensor:
    """Means as one latent dim at a time is set to given values, the rest at the posterior mean of the first datum.

    Args:
        site: the latent to walk in; the first of the guide by default.
        dims: which of its dims; all by default.

    Returns:
        [dims, values, *event].

    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> traversals(pair.model, pair.guide, torch.zeros(4, 3), values=(-1.0, 1.0)).shape
    torch.Size([2, 2, 3])
    """
    with _opened(model, guide, x, seed) as pair:
        means = {n: pair.first(n, v) for n, v in pair.encode(mean=True).items()}
        site = pair.vector(means, site)
        start = means[site]
        size = start.shape[-1]
        wanted = list(range(size)) if dims is None else list(dims)
        if any(not 0 <= d < size for d in wanted):
            raise UsageError(f"dims: expected numbers below {size}, found {wanted}")
        count = len(wanted) * len(values)
        walk = start.repeat(count, 1)
        grid = torch.tensor(list(values)).to(walk)
        for row, d in enumerate(wanted):
            walk[row * len(values) : (row + 1) * len(values), d] = grid
        given = {n: pair.first(n, v, count) for n, v in means.items() if n != site} | {site: walk}
        out = pair.decode(given, pair.repeated(count, first=True), True)
        return out.reshape(len(wanted), len(values), *out.shape[1:])


def attribute_vector(
    model: Program, guide: Program, x: Any, attribute: Tensor, *, site: str | None = None, seed: int = 0
) -> Tensor:
    """How a latent's posterior mean goes with an attribute of the data, [latent]: cov(E_q[z | x], a) / var(a).

    The slope of least squares, in units of z for one unit of the attribute; of a yes-or-no attribute it is the mean of
    z with it minus the mean without. Attributes that go together in the data go together in their vectors.

    Args:
        attribute: [N], numbers or bools.
        site: the latent; the first of the guide by default.

    Raises UsageError for an attribute that is not one finite number a datum or that does not vary.
    Source: Larsen et al. 2016 (arXiv 1512.09300); White 2016 (arXiv 1609.04468).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.randn(4, 3)
    >>> attribute_vector(pair.model, pair.guide, x, x[:, 0] > 0).shape
    torch.Size([2])
    """
    with _opened(model, guide, x, seed) as pair:
        means = pair.encode(mean=True)
        z = means[pair.vector(means, site)]
    a = attribute.as_subclass(Tensor).to(z)
    if z.shape[:-1] != a.shape or not bool(torch.isfinite(a).all()):
        raise UsageError(f"attribute: expected {len(z)} finite numbers, one a datum, found shape {list(a.shape)}")
    a = a - a.mean()
    if not bool(a.square().sum() > 0):
        raise UsageError("attribute: expected values that vary over the data, found one value for all")
    return a @ (z - z.mean(0)) / a.square().sum()


def moved(
    model: Program,
    guide: Program,
    x: Any,
    direction: Tensor,
    amounts: Sequence[float] = (-1.0, 0.0, 1.0),
    *,
    site: str | None = None,
    seed: int = 0,
) -> Tensor:
    """Means of p(x | z) with each datum's posterior mean moved by amounts of a direction, [N, amounts, *event].

    Args:
        direction: [latent], such as an `attribute_vector`.
        site: the latent to move; the first of the guide by default. Other latents stay at their posterior means.

    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> moved(pair.model, pair.guide, torch.zeros(4, 3), torch.ones(2)).shape
    torch.Size([4, 3, 3])
    """
    with _opened(model, guide, x, seed) as pair:
        means = pair.encode(mean=True)
        site = pair.vector(means, site)
        if direction.shape != means[site].shape[-1:]:
            raise UsageError(f"direction: expected {list(means[site].shape[-1:])}, found {list(direction.shape)}")
        step = direction.to(means[site])
        return torch.stack([pair.decode(means | {site: means[site] + t * step}, pair.batch, True) for t in amounts], 1)


class _Opened:
    """A pair ready for evaluation, with the batch it is asked about."""

    def __init__(self, model: Program, guide: Program, batch: tuple[Tensor, ...], structure: Structure):
        self.model, self.guide, self.batch, self.s = model, guide, batch, structure

    def repeated(self, count: int, first: bool = False) -> tuple[Tensor, ...]:
        """The batch's rows over and over, `count` in all; or the first row alone."""
        if count < 1:
            raise UsageError(f"count: expected at least 1, found {count}")
        rows = torch.zeros(count, dtype=torch.long) if first else torch.arange(count) % len(self.batch[0])
        return tuple(t[rows.to(t.device)] for t in self.batch)

    def vector(self, means: Mapping[str, Tensor], site: str | None) -> str:
        """The latent to walk in, the first by default, which must be a continuous vector."""
        site = site or next(iter(means), None)
        if site is None or site not in means:
            raise UsageError(f"site: expected one of the guide's latents {sorted(means)}, found {site!r}")
        if self.s.event_dims[site] != 1 or not means[site].is_floating_point():
            shape = list(means[site].shape)
            raise UsageError(f"site: expected a continuous vector to walk in, found {site!r} of shape {shape}")
        return site

    def first(self, name: str, value: Tensor, count: int = 1) -> Tensor:
        """The first datum's value of a latent, `count` times; a latent shared by all data as it is."""
        axis = value.dim() - self.s.event_dims[name] - 1
        return value if axis < 0 else value.narrow(axis, 0, 1).repeat_interleave(count, axis)

    def _pieces(self, batch: tuple[Tensor, ...]) -> Iterator[tuple[slice, tuple[Tensor, ...], dict[str, Tensor]]]:
        """Rows in pieces that the pair takes: (rows, what to call it with, its plate's rows)."""
        count = len(batch[0])
        if self.s.draws_subsample:
            size = self.s.subsample_size
            for start in range(0, count, size):
                index = torch.arange(start, start + size) % self.s.full_size
                yield slice(start, min(start + size, count)), self.batch, {self.s.plate: index}
        else:
            for start in range(0, count, ROWS):
                rows = slice(start, min(start + ROWS, count))
                yield rows, tuple(t[rows] for t in batch), {}

    def encode(self, mean: bool) -> dict[str, Tensor]:
        """Latents of the batch: means, or draws from the guide."""
        parts: list[dict[str, tuple[int, Tensor]]] = []
        for rows, piece, index in self._pieces(self.batch):
            at: dict[str, Tensor] = dict(index)
            if mean:
                with _Means():
                    trace = trace_program(self.guide, piece, Structure(), at)
            else:
                trace = trace_program(self.guide, piece, Structure(), at)
            width = rows.stop - rows.start
            found = {}
            for name, node in sample_sites(trace):
                if self.s.guide_roles.get(name) in (Role.LATENT, Role.ENUMERATED):
                    axis = node["value"].dim() - self.s.event_dims[name] - 1
                    shared = self.s.plate not in {f.name for f in node["cond_indep_stack"]}
                    found[name] = (-1, node["value"]) if shared else (axis, node["value"].narrow(axis, 0, width))
            parts.append(found)
        return {
            n: value if axis < 0 else torch.cat([p[n][1] for p in parts], axis)  # a shared latent is drawn once
            for n, (axis, value) in parts[0].items()
        }

    def decode(self, values: Mapping[str, Tensor], batch: tuple[Tensor, ...], mean: bool) -> Tensor:
        """The site that observes the batch's first tensor, given latents: [rows, *event]."""
        out = []
        for rows, piece, index in self._pieces(batch):
            width = rows.stop - rows.start
            given: dict[str, Tensor] = dict(index)
            for name, v in values.items():
                axis = v.dim() - self.s.event_dims[name] - 1
                if axis < 0 or v.shape[axis] != len(batch[0]):  # shared by all data
                    given[name] = v
                    continue
                part = v.narrow(axis, rows.start, width)
                if self.s.draws_subsample and width < self.s.subsample_size:  # a ragged end is padded, then cut off
                    fill = part.narrow(axis, 0, 1).repeat_interleave(self.s.subsample_size - width, axis)
                    part = torch.cat([part, fill], axis)
                given[name] = part
            with poutine.trace() as tracer, poutine.uncondition(), Substitute(given):
                self.model(*piece)
            nodes = [n for _, n in sample_sites(tracer.get_trace()) if n["infer"].get("was_observed")]
            node = next((n for n in nodes if n["infer"].get("obs") is piece[0]), nodes[0])
            value = node["value"]
            if mean:
                value = _mean(node["fn"], value)
            axis = value.dim() - len(node["fn"].event_shape) - 1  # inner plates stand left of the data
            out.append(value.narrow(axis, 0, width).movedim(axis, 0))
        return torch.cat(out)


class _Means(poutine.messenger.Messenger):
    """Sets every site that has one to its distribution's mean."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and msg["cond_indep_stack"]:
            msg["value"] = _mean(msg["fn"], msg["value"])


def _mean(fn: Any, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    try:
        mean = fn.mean
    except (NotImplementedError, AttributeError):
        return value
    return mean if mean.shape == value.shape and bool(torch.isfinite(mean).all()) else value


@contextmanager
def _opened(model: Program, guide: Program, x: Any, seed: int) -> Iterator[_Opened]:
    model, guide = bind_program(model), bind_program(guide)
    with fork_rng(), evaluation_mode(model, guide):
        batch = as_single_batch(x, seed, program_device(model, guide, x))
        structure = inspect(model, guide, batch, weights=False, particles=False)
        torch.manual_seed(seed)
        yield _Opened(model, guide, batch, structure)
