"""Multiple imputation of missing values by importance resampling, for any pair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppvae.data.admission import column_names
from ppvae.data.loader import data_digest
from ppvae.errors import ContractError, UsageError, count_of, site_error
from ppvae.errors.calls import explain_call
from ppvae.errors.ranges import check_numbers, check_ranges
from ppvae.evaluation.blocks import DATA_BLOCK, PARTICLE_BLOCK, Block, Evaluation, run_blocks, start_evaluation
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.importance.accumulators import LogWeightAccumulator, WeightedMean
from ppvae.evaluation.importance.resampling import PosteriorReservoir
from ppvae.evaluation.reliability import recommend_alternative
from ppvae.inference.contract.support import base_distribution, base_measure_of, count_observed
from ppvae.inference.sites import Place, Site, cover_gaps, find_places
from ppvae.inference.structure import ParticlePlacement, Structure
from ppvae.inference.terms import evaluate_terms
from ppvae.inference.tracing import Program
from ppvae.rng import derive_seed, seed_all

DRAWS = 10  # imputations sampled at once


@dataclass(frozen=True)
class Imputations:
    """Data with imputed missing values; observed values are unchanged.

    Attributes:
        values: multiple imputations, draws from p(x_missing | x_observed), [draws, N, *event]; of a dict of columns, as
            `mean` and `missing`, a dict with each column that has missing values.
        mean: E[x_missing | x_observed] by self-normalised weights, [N, *event]; NaN where the likelihood has no mean,
            as for the codes of categories.
        missing: which values are imputed, [N, *event] bool.
        estimate: log p(x_observed) by the same weights; its `ess` and `reliable` apply to the imputations too.
        probs: p(x_missing = code | x_observed) of categories by the same weights, [N, *event, levels]; NaN elsewhere;
            of a dict of columns, those that are categories. None where no column is.
    """

    values: Tensor | dict[str, Tensor]
    mean: Tensor | dict[str, Tensor]
    missing: Tensor | dict[str, Tensor]
    estimate: Estimate
    probs: Tensor | dict[str, Tensor] | None = None

    @property
    def completed(self) -> Tensor | dict[str, Tensor]:
        """The data with one number in each gap, as `mean`.

        The mean, rounded where all numbers of a column are whole, as counts; of a category the most probable code.
        """
        if isinstance(self.mean, dict) and isinstance(self.values, dict):
            probs = self.probs if isinstance(self.probs, dict) else {}
            return {name: _best(self.values[name], mean, probs.get(name)) for name, mean in self.mean.items()}
        return _best(self.values, self.mean, self.probs)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """How many values are imputed, in which columns, and how far to trust them."""
        missing = self.missing if isinstance(self.missing, dict) else {"": self.missing}
        values = next(iter(self.values.values())) if isinstance(self.values, dict) else self.values
        rows = torch.stack([m.reshape(len(m), -1).any(1) for m in missing.values()]).any(0)
        columns = ", ".join(f"{name} {int(m.sum())}" for name, m in missing.items() if name)
        total = sum(int(m.sum()) for m in missing.values())
        return (
            f"{count_of(total, 'value')} imputed in {int(rows.sum())} of {count_of(len(rows), 'row')}"
            f"{f' ({columns})' if columns else ''}, {count_of(len(values), 'draw')} each\n{self.estimate.verdict}"
        )

    __repr__ = __str__

    def arrays(self) -> dict[str, Any]:
        """Everything as numpy arrays by name, for `np.savez`; those of a column "age" as "values/age"."""
        found: dict[str, Tensor] = {}
        kinds = {"values": self.values, "mean": self.mean, "missing": self.missing, "probs": self.probs}
        for name, value in kinds.items():
            if value is None:
                continue
            found |= {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        return {name: value.cpu().numpy() for name, value in (found | self.estimate.per_datum()).items()}


@explain_call
def impute(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_particles: int = 1000,
    draws: int = 10,
    seed: int = 0,
    rows: int | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Imputations:
    """Imputes the missing values of the data by importance resampling, for any pair that takes them.

    z_k ~ q(z | x_observed) with weights w_k = p(x_observed, z_k) / q(z_k | x_observed); z is resampled in proportion to
    w, and x_missing ~ p(x_missing | z). The mean is sum_k w_k E[x_missing | z_k] / sum_k w_k. Both are
    consistent in K; where the effective sample size is low they follow the guide rather than the model.

    Given z, missing values are assumed to be independent of the observed ones, as in all likelihoods that mask missing
    values out of a product.

    Args:
        model, guide: a Pyro pair that keeps the contract, or run.model, run.guide.
        data: marked by `data.with_missing`, [N, *event], or a tuple whose first is, which is imputed; or a dict of
            columns, of which all that have missing values are. Called as model(*batch).
        num_particles: K.
        draws: the number of imputations.
        seed: of every draw. The result does not depend on `rows`.
        rows, device, progress: as `log_marginal` takes them.

    Raises:
        UsageError: nothing is missing, or a bad argument; ContractError: the pair does not take missing values, sums a
            latent out, has a global latent, or no site that observes the data; DataError: bad data.

    Source: Mattei and Frellsen 2019 (arXiv 1812.02633).

    >>> from ppvae import VAE, data, likelihoods, nn, posteriors, priors
    >>> columns = ["real", "real", ("categorical", 3)]
    >>> encoder = nn.Missing(nn.mlp(6, 4, hidden=(8,)))
    >>> decoder = nn.mlp(2, likelihoods.table_outputs(columns), hidden=(8,))
    >>> vae = VAE(priors.StandardNormal(2), likelihoods.Mixed(decoder, columns), posteriors.DiagonalNormal(encoder))
    >>> x = data.with_missing(torch.tensor([[0.5, torch.nan, 1.0], [torch.nan, 1.0, torch.nan]]))
    >>> filled = impute(vae.model, vae.guide, x, draws=5)
    >>> filled.values.shape, bool(filled.values.isnan().any()), filled.values[:, 0, 0].tolist()
    (torch.Size([5, 2, 3]), False, [0.5, 0.5, 0.5, 0.5, 0.5])
    """
    check_numbers(num_particles=num_particles, draws=draws, seed=seed)
    check_ranges(rows=rows)
    rows = DATA_BLOCK * PARTICLE_BLOCK if rows is None else rows
    names = column_names(data, model)
    with start_evaluation(model, guide, data, seed=seed, device=device) as run:
        s, columns = run.structure, run.columns
        _check_structure(s)
        wanted = {i: name for i, name in enumerate(names) if bool(torch.as_tensor(columns[i]).isnan().any())}
        if names and not wanted:
            raise UsageError(f"impute: expected missing values in a column of {', '.join(names)}; found none")
        found = run_blocks(
            run, lambda block: _impute_block(run, block, tuple(wanted) or (0,), num_particles, draws, rows),
            {"what": "impute", "num_particles": num_particles, "draws": draws},
            desc="imputations", progress=progress,
        )  # fmt: skip
    parts = {kind: {i: found.pop(f"{kind}/{i}") for i in wanted or (0,)} for kind in ("values", "mean", "missing")}
    probs = {i: found.pop(f"probs/{i}") for i in wanted or (0,) if f"probs/{i}" in found}
    probs = {i: p for i, p in probs.items() if not bool(p.isnan().all())}
    parts["values"] = {i: v.transpose(0, 1) for i, v in parts["values"].items()}
    if not any(bool(v.any()) for v in parts["missing"].values()):
        raise UsageError("impute: expected missing values in the data's first tensor, found none")
    base, levels, notes = base_measure_of(columns[0], s)
    dims, missing_note = count_observed(int(found.pop("missing").sum()), columns, s)
    estimate = Estimate(
        **found,  # type: ignore[arg-type]
        num_particles=num_particles, seed=seed, dims=dims, base_measure=base, levels=levels,
        notes=(*notes, *s.remarks, *missing_note), lower_bound_only=s.lower_bound_only,
        data=getattr(columns[0], "description", ""), digest=data_digest(columns), remedy=recommend_alternative(s),
    )  # fmt: skip
    if not names:
        return Imputations(**{kind: v[0] for kind, v in parts.items()}, estimate=estimate, probs=probs.get(0))
    named = {k: {wanted[i]: x for i, x in v.items()} for k, v in parts.items()}
    return Imputations(**named, estimate=estimate, probs={wanted[i]: p for i, p in probs.items()} or None)


def _check_structure(s: Structure) -> None:
    if s.enumerated:
        raise site_error(
            s.enumerated[0], "latents that the guide samples, to impute given them", "one that is summed out",
            "sample it in the guide, without infer={'enumerate': ...}",
        )  # fmt: skip
    if s.has_global_latents:
        raise ContractError("impute: expected latents of each datum; found one that is shared by all data")


def _impute_block(
    run: Evaluation, block: Block, wanted: Sequence[int], num_particles: int, draws: int, rows: int
) -> dict[str, Tensor]:
    """Imputations [N, draws, *event] of columns of a block, their means, and the statistics of the weights."""
    model, guide, seed = run.model, run.guide, run.seed
    s, size, index = block.s, block.size, block.index
    x = {i: block.batch[i] if index is None else block.batch[i][index] for i in wanted}
    sites = _sites_of_columns(model, block, x)
    means, probs = {i: WeightedMean() for i in wanted}, {i: WeightedMean() for i in wanted}
    weights = LogWeightAccumulator(num_particles, [], block.eps)
    reservoir = PosteriorReservoir(draws, derive_seed(seed, block.number, "posterior"), s)
    for log_weight, elbo, t in block.weights(model, guide, num_particles, seed, rows):
        assert t is not None
        weights.add(log_weight, elbo)
        reservoir.add(log_weight, {name: site.value for name, site in t.guide.items()})
        of_site = {name: torch.cat(list(_means(t.model[name], s, t.num_particles))) for name in sites}
        for i in wanted:
            means[i].add(log_weight, _in_shape_of(of_site, sites, i, x[i], s)[:, :size])
        masses = {name: torch.cat(list(_masses(t.model[name], s, t.num_particles))) for name in sites}
        levels = max(v.shape[-1] for v in masses.values())
        for i in wanted if levels else ():
            own = [{n: _code(v, k) for n, v in masses.items()} for k in range(levels)]
            found = [_in_shape_of(of_code, sites, i, x[i].new_full(x[i].shape, torch.nan), s) for of_code in own]
            probs[i].add(log_weight, torch.stack(found, -1)[:, :size])
    values: dict[int, list[Tensor]] = {i: [] for i in wanted}
    width = len(x[wanted[0]])
    latents = {n: _pad(v, width) for n, v in reservoir.values.items()}
    for number, first in enumerate(range(0, draws, DRAWS)):
        count = min(DRAWS, draws - first)
        at = {n: v[first : first + count].movedim(1, v.dim() - s.event_dims[n] - 1) for n, v in latents.items()}
        at = {n: v.to(run.device) for n, v in at.items()}
        seed_all(derive_seed(seed, block.number, "imputed", number))
        t = evaluate_terms(model, guide, block.batch, count, values=at, structure=s, index=index)
        of_site = {name: torch.cat(list(_samples(t.model[name], s, count))) for name in sites}
        for i in wanted:
            values[i].append(_in_shape_of(of_site, sites, i, x[i], s))
    out: dict[str, Tensor] = {}
    for i in wanted:
        known = x[i][:size]
        missing = known.isnan()
        drawn = torch.cat(values[i])[:, :size].to(known.dtype)
        out[f"values/{i}"] = torch.where(missing, drawn, known).transpose(0, 1).cpu()
        out[f"mean/{i}"] = torch.where(missing, means[i].value.to(known.dtype), known).cpu()
        out[f"missing/{i}"] = missing.cpu()
        if probs[i].value.dim():
            out[f"probs/{i}"] = torch.where(missing[..., None], probs[i].value.to(known.dtype), torch.nan).cpu()
    return out | weights.result() | {"missing": torch.tensor(block.num_missing)}


def _sites_of_columns(model: Program, block: Block, x: Mapping[int, Tensor]) -> dict[str, list[Place]]:
    """The places of each observed site that holds numbers of columns.

    Raises:
        ContractError: a missing number of a column [N, *event] is that of no site.
    """
    found = find_places(model, block.s, block.batch, block.index)
    held: dict[str, list[Place]] = {}
    for i, column in x.items():
        gaps = column.reshape(len(column), -1).isnan().any(0)
        own = {
            name: [place for place in places if place.column == i]
            for name, (places, value) in found.items()
            if value.is_floating_point()
        }
        alone = next((name for name, places in own.items() if places and cover_gaps(places, gaps)), None)
        chosen = own if alone is None else {alone: own[alone]}
        if not cover_gaps([place for places in chosen.values() for place in places], gaps):
            raise site_error(
                next(iter(found)),
                f"an observed site that holds the data, {list(column.shape)}, so that missing values "
                "can be drawn from it",
                f"none among {list(found)}",
                "observe the data's first tensor as a whole, under a mask",
            )
        for name, places in chosen.items():
            if places:
                held.setdefault(name, []).extend(places)
    return held


def _best(values: Tensor, mean: Tensor, probs: Tensor | None) -> Tensor:
    """The mean [N, ...], rounded where all draws [draws, N, ...] are whole; where there is none, the likeliest code."""
    mean = torch.where((values == values.round()).flatten(0, 1).all(0), mean.round(), mean)
    if probs is None:
        return mean
    return torch.where(mean.isnan() & ~probs[..., 0].isnan(), probs.argmax(-1).to(mean), mean)


def _in_shape_of(
    of_site: Mapping[str, Tensor], sites: Mapping[str, Sequence[Place]], column: int, x: Tensor, s: Structure
) -> Tensor:
    """Values of sites [particles, *inner, N, *event], in the shape of a column, [particles, *x.shape]."""
    count = len(next(iter(of_site.values())))
    out = x.reshape(len(x), -1).expand(count, len(x), -1).clone()
    for name, places in sites.items():
        value = of_site[name].movedim(of_site[name].dim() - s.event_dims[name] - 1, 1)
        flat = value.reshape(count, value.shape[1], -1)[:, : len(x)].to(out)
        for place in (p for p in places if p.column == column):
            if place.of_column is None:
                out = flat
            else:
                out[:, :, place.of_column] = flat[:, :, place.of_site]
    return out.reshape(count, *x.shape)


def _samples(site: Site, s: Structure, count: int) -> Iterator[Tensor]:
    for part, fn in _expanded_distributions(site, s, count):
        yield _particles_first(fn.sample(), part, s, count)


def _means(site: Site, s: Structure, count: int) -> Iterator[Tensor]:
    for part, fn in _expanded_distributions(site, s, count):
        try:
            mean = fn.mean
        except (NotImplementedError, AttributeError):
            mean = part.log_prob.new_full((*fn.batch_shape, *fn.event_shape), torch.nan)
        yield _particles_first(mean, part, s, count)


def _masses(site: Site, s: Structure, count: int) -> Iterator[Tensor]:
    """The masses of the codes of categories, [particles, *inner, N, *event, levels]; none where a mean is known."""
    for part, fn in _expanded_distributions(site, s, count):
        shape, probs = (*fn.batch_shape, *fn.event_shape), getattr(base_distribution(fn), "probs", None)
        try:
            coded = isinstance(probs, Tensor) and bool(fn.mean.isnan().any())
        except (NotImplementedError, AttributeError):
            coded = False
        if probs is None or not coded:
            yield _particles_first(part.log_prob.new_empty(shape), part, s, count)[..., None][..., :0]
            continue
        probs = probs.expand(*shape, probs.shape[-1])
        yield torch.stack([_particles_first(p, part, s, count) for p in probs.unbind(-1)], -1)


def _code(masses: Tensor, k: int) -> Tensor:
    """The mass of a code of a site [..., levels]: 0 beyond its levels, NaN where it has none."""
    levels = masses.shape[-1]
    return masses[..., k] if k < levels else masses.new_full(masses.shape[:-1], 0.0 if levels else torch.nan)


def _expanded_distributions(site: Site, s: Structure, count: int) -> Iterator[tuple[Site, Any]]:
    """The distribution of a site in each run that it was joined from, expanded over all plates."""
    for part in site.particle_sites or (site,):
        fn = part.distribution
        lead = part.traced_value.shape[: part.traced_value.dim() - s.event_dims[site.name]]
        if s.layout is ParticlePlacement.VECTORIZED:
            lead = torch.Size((count, *(1,) * (s.plate_nesting - len(lead)), *lead))
        shape = torch.broadcast_shapes(fn.batch_shape, lead)
        yield part, fn if fn.batch_shape == shape else fn.expand(shape)


def _particles_first(value: Tensor, part: Site, s: Structure, count: int) -> Tensor:
    """The value of a site in a run, [*plates, *event], with the particles first."""
    if s.layout is ParticlePlacement.ONE_BY_ONE:
        return value[None]
    if s.layout is ParticlePlacement.VECTORIZED:
        return value
    data = value.dim() - s.event_dims[part.name] - 1
    split = value.reshape(*value.shape[:data], count, -1, *value.shape[data + 1 :])
    return split.movedim(data, 0)


def _pad(value: Tensor, size: int) -> Tensor:
    """Latents [draws, N, ...], padded to `size` data."""
    short = size - value.shape[1]
    return value if short <= 0 else torch.cat([value, value[:, :1].expand(-1, short, *value.shape[2:])], 1)
