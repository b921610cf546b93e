"""Latent diagnostics: rate and distortion, KL per dim, active units, and ELBO surgery of the rate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from ppvae.data.loader import data_digest
from ppvae.errors import ContractError, UsageError, count_of
from ppvae.errors.calls import explain_call
from ppvae.errors.ranges import check_numbers
from ppvae.evaluation.aggregate_posterior import split_rate
from ppvae.evaluation.blocks import DATA_BLOCK, PARTICLE_BLOCK, Block, Evaluation, run_blocks, start_evaluation
from ppvae.evaluation.results import SaveableResult, mean_words
from ppvae.inference.particle_layout import particle_dim, unfold_value
from ppvae.inference.sites import Site
from ppvae.inference.structure import ParticlePlacement, Role, Structure
from ppvae.inference.terms import Terms, evaluate_terms
from ppvae.inference.tracing import Program
from ppvae.rng import derive_seed, seed_all

ACTIVE = 0.01  # Burda et al. 2016


@dataclass(frozen=True)
class Representation(SaveableResult):
    """Information in the latents of a guide over a data set; nats, float64.

    Attributes:
        rate, distortion: [N], E_q[log q(z | x) - log p(z)] and -E_q[log p(x | z)]; ELBO = -(rate + distortion).
        kl, kl_error: {site: [dims]}, the rate of each dim of a latent, averaged over the data, and its standard error
            over them; a single number for a latent whose prior or guide does not factorise, or that is masked.
        variance: {site: [dims]}, Var_x(E_q[u | x]) over the data, free of the bias of a finite number of draws (it may
            come out a little below zero); a dim is active above 0.01 (Burda et al. 2016, arXiv 1509.00519).
        surgery_rate: [N], the rate from the draws of the surgery; None without surgery.
        information_lower, information_upper: [N], log q(z | x) - log q(z) averaged over those draws, where q(z) is the
            mean of q(z | x_m) over the N data, with the datum's own among them and without it. On average the first is
            below the mutual information I_q(x; z) of the population and at most log N, the second above it
            (Poole et al. 2019, arXiv 1905.06922).
    """

    rate: Tensor
    distortion: Tensor
    kl: dict[str, Tensor]
    kl_error: dict[str, Tensor]
    variance: dict[str, Tensor]
    surgery_rate: Tensor | None
    information_lower: Tensor | None
    information_upper: Tensor | None
    num_particles: int
    seed: int
    data: str = ""
    digest: str = ""
    notes: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the latents."""
        return tuple(self.kl)

    @property
    def elbo(self) -> Tensor:
        """-(rate + distortion), [N] nats."""
        return -(self.rate + self.distortion)

    @property
    def information(self) -> tuple[Tensor, Tensor]:
        """(lower, upper) bounds of the mutual information on average over the data, both [N].

        The upper bound is at most the rate, since the marginal KL is not negative.

        Raises:
            UsageError: there was no surgery.
        """
        if self.surgery_rate is None or self.information_lower is None or self.information_upper is None:
            raise UsageError(f"mutual information: expected surgery_draws >= 1; {'; '.join(self.notes) or 'found 0'}")
        above = self.information_upper.mean() > self.surgery_rate.mean()
        return self.information_lower, self.surgery_rate if above else self.information_upper

    @property
    def marginal_kl_lower(self) -> Tensor | None:
        """Rate minus `information_upper`, [N]: on average below KL(q(z) || p(z))."""
        return self._without(self.information_upper)

    @property
    def marginal_kl_upper(self) -> Tensor | None:
        """Rate minus `information_lower`, [N]: on average above KL(q(z) || p(z))."""
        return self._without(self.information_lower)

    def _without(self, information: Tensor | None) -> Tensor | None:
        return None if self.surgery_rate is None or information is None else self.surgery_rate - information

    def active(self, site: str, threshold: float = ACTIVE) -> Tensor:
        """Which dims of a latent are active, [dims] bool."""
        check_numbers(threshold=threshold)
        return self.variance[site] > float(threshold)

    def table(self) -> dict[str, str]:
        """The numbers over the data set with standard errors, as strings."""
        rows = {
            "data": f"{self.data or 'a tensor'}, {count_of(len(self.rate))}",
            "rate": f"{mean_words(self.rate)} nats per datum",
            "distortion": f"{mean_words(self.distortion)} nats per datum",
            "ELBO": mean_words(self.elbo),
        }
        for site, variance in self.variance.items():
            dims = len(variance)
            rows[f"active units of {site}"] = f"{int(self.active(site).sum())} of {dims} (Var_x E_q > {ACTIVE:g})"
        for site, kl in self.kl.items():
            rows[f"KL of {site}"] = f"{float(kl.sum()):.3f}" + (f" over {len(kl)} dims" if len(kl) > 1 else "")
        if self.information_lower is not None:
            top = math.log(len(self.rate))
            low, high = (mean_words(v) for v in self.information)
            rows["mutual information"] = f"between {low} (at most log N = {top:.2f}) and {high}"
            marginal = self.marginal_kl_lower
            low = mean_words(marginal) if marginal is not None and marginal.mean() > 0 else "0"
            rows["marginal KL"] = f"between {low} and {mean_words(self.marginal_kl_upper)}"
        return rows | {f"note {i}": note for i, note in enumerate(self.notes, 1)}


@explain_call
def representation(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_particles: int = 100,
    surgery_draws: int = 1,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Representation:
    """Measures the information in the latents about the data, for any pair whose guide samples all latents.

    ELBO surgery splits the rate, averaged over the data, into I_q(x; z) + KL(q(z) || p(z)), with the aggregate
    posterior q(z) = E_x q(z | x). With q(z) taken over the same N data both parts are biased, in a known direction:
    each comes as a lower and an upper bound, whose distance shows the bias. It takes `surgery_draws` * N^2 densities of
    the guide.

    Args:
        model, guide: a Pyro pair that keeps the contract, or run.model, run.guide.
        data: a tensor [N, *event], a split, or a tuple of them.
        num_particles: draws per datum.
        surgery_draws: the draws per datum that the surgery uses; 0 for no surgery.
        seed: of the draws.

    Raises:
        ContractError: the pair breaks the contract, has a latent shared by all data, or enumerates a latent, so that
            there is no separate rate; UsageError, DataError: bad arguments or data.

    Source: Alemi et al. 2018 (arXiv 1711.00464) for rate and distortion; Hoffman and Johnson 2016, ELBO surgery.

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2).double(), torch.randn(40, 3).double()
    >>> found = representation(pair.model, pair.guide, x)
    >>> bool((found.elbo.mean() - pair.log_px(x).mean()).abs() < 1e-6), found.active("z").shape
    (True, torch.Size([2]))
    """
    check_numbers(num_particles=num_particles, surgery_draws=surgery_draws, seed=seed)
    if num_particles < 2:
        raise UsageError(f"num_particles: expected at least 2, found {num_particles}")
    if not 0 <= surgery_draws <= num_particles:
        raise UsageError(f"surgery_draws: expected 0 to num_particles = {num_particles}, found {surgery_draws}")
    with start_evaluation(model, guide, data, seed=seed, device=device) as run:
        _check_structure(run.structure)
        found = run_blocks(
            run, lambda block: _block_statistics(run, block, num_particles, surgery_draws),
            {"what": "representation", "num_particles": num_particles, "surgery_draws": surgery_draws},
            desc="latents", progress=progress,
        )  # fmt: skip
        surgery, why = None, ""
        if surgery_draws:
            draws = {n: value.transpose(0, 1).to(run.device) for n, value in _of_prefix(found, "draws/").items()}
            log_q, log_p = (found[name].T.to(run.device) for name in ("log_q", "log_p"))
            blocks = run.blocks("aggregate posterior", progress)
            with pyro.validation_enabled(False):
                surgery, why = split_rate(run.guide, draws, log_q, log_p, blocks, run.structure)
    kl = _of_prefix(found, "kl/")
    dims = {name: int(value[0]) for name, value in _of_prefix(found, "dims/").items()}
    whole = [n for n, v in kl.items() if v.shape[1] == 1 and dims[n] > 1]
    notes = (f"KL of the whole latent: {', '.join(whole)} (masked, or no product over its dims)",) if whole else ()
    return Representation(
        rate=found["rate"],
        distortion=found["distortion"],
        kl={n: v.mean(0) for n, v in kl.items()},
        kl_error={n: v.std(0, correction=min(1, len(v) - 1)) / math.sqrt(len(v)) for n, v in kl.items()},
        variance={n: _variance(found, n) for n in _of_prefix(found, "mean/")},
        surgery_rate=surgery[0] if surgery else None,
        information_lower=surgery[1] if surgery else None,
        information_upper=surgery[2] if surgery else None,
        num_particles=num_particles,
        seed=seed,
        data=getattr(run.columns[0], "description", ""),
        digest=data_digest(run.columns),
        notes=notes + ((f"no mutual information: {why}",) if why else ()),
    )


def _check_structure(s: Structure) -> None:
    if s.has_global_latents:
        raise ContractError("a latent is shared by all data: expected latents per datum, whose rate is one per datum")
    if s.enumerated:
        raise ContractError(
            f"latents {list(s.enumerated)} are enumerated: expected latents that the guide samples, for a rate "
            f"separate from the distortion; log_marginal gives the ELBO of such a pair"
        )


def _block_statistics(run: Evaluation, block: Block, num_particles: int, surgery_draws: int) -> dict[str, Tensor]:
    """Averages over the draws of a block of data, and the first draws themselves; data first."""
    statistics = LatentStatistics(block.s, block.size, surgery_draws)
    for t in _draws(run, block, num_particles):
        statistics.add(t)
    return statistics.result()


def _draws(run: Evaluation, block: Block, num_particles: int) -> Iterator[Terms]:
    """Terms of a few particles at a time; of single ones under the layout "one by one"."""
    step = (
        1
        if block.s.layout is ParticlePlacement.ONE_BY_ONE
        else PARTICLE_BLOCK * DATA_BLOCK // max(block.size, DATA_BLOCK) or 1
    )
    for number, first in enumerate(range(0, num_particles, step)):
        seed_all(derive_seed(run.seed, block.number, number))
        count = min(step, num_particles - first)
        yield evaluate_terms(run.model, run.guide, block.batch, count, structure=block.s, index=block.index)


class LatentStatistics:
    """Running averages over the draws of a block of data, and the first draws themselves."""

    def __init__(self, s: Structure, size: int, num_kept: int):
        self.s, self.size, self.num_kept, self.count = s, size, num_kept, 0
        self._sums: dict[str, Tensor] = {}
        self.dims: dict[str, int] = {}
        self.draws: dict[str, Tensor] = {}  # latents [draws, N, *inner, *event]
        self.log_densities: list[Tensor] = []  # (log q, log p) of them, [2, draws, N]

    def add(self, t: Terms) -> None:
        """Adds the terms of some particles."""
        self._add("log_lik", t.log_lik[:, : self.size])
        self._add("rate", (t.log_guide - t.log_prior)[:, : self.size])
        for name, role in self.s.guide_roles.items():
            if role is not Role.LATENT:
                continue
            site, value = t.guide[name], self._flat(t.guide[name].value, name)
            self.dims[name] = value[0, 0].numel()
            difference = (site.log_prob - t.model[name].log_prob)[:, : self.size].double()
            parts = self._per_dim(site, t.model[name], t.num_particles, difference)
            self._add(f"kl/{name}", difference.unsqueeze(-1) if parts is None else parts)
            if value.is_floating_point():
                value = value.double().reshape(*value.shape[:2], -1)
                self._add(f"u/{name}", value)
                self._add(f"u^2/{name}", value**2)
        if self.count < self.num_kept:
            some = min(self.num_kept - self.count, t.num_particles)
            for n, site in t.guide.items():
                value = self._flat(site.value, n)[:some]
                self.draws[n] = torch.cat([self.draws[n], value]) if n in self.draws else value
            self.log_densities.append(torch.stack([t.log_guide, t.log_prior])[:, :some, : self.size])
        self.count += t.num_particles

    def _add(self, name: str, values: Tensor) -> None:
        """Adds values [particles, N, ...] to a running sum over particles."""
        total = values.sum(0)
        self._sums[name] = self._sums[name] + total if name in self._sums else total

    def _flat(self, value: Tensor, name: str) -> Tensor:
        """[particles, *inner, batch, *event] -> [particles, N, *inner, *event]."""
        data = value.dim() - self.s.event_dims[name] - 1
        return value.movedim((particle_dim(value, self.s, name), data), (0, 1))[:, : self.size]

    def _per_dim(self, q: Site, p: Site, count: int, difference: Tensor) -> Tensor | None:
        """log q - log p of every dim, [particles, N, dims]; None where the densities do not factorise over dims."""
        try:
            both = [site.per_event() for site in (q, p)]
        except ValueError:
            both = (
                [site.distribution.log_prob(site.traced_value) for site in (q, p)]
                if not self.s.event_dims[q.name]
                else []
            )
        if not both:
            return None
        shape = torch.broadcast_shapes(q.traced_value.shape, *(b.shape for b in both))
        ratio = (both[0].double() - both[1].double()).expand(shape)
        if self.s.layout is ParticlePlacement.FOLDED:
            ratio = unfold_value(ratio, self.s, q.name, count, q.log_prob.shape[-1])
        elif self.s.layout is ParticlePlacement.ONE_BY_ONE:
            ratio = ratio.unsqueeze(0)
        if ratio.shape != q.value.shape:
            return None
        flat = self._flat(ratio, q.name)
        flat = flat.reshape(*flat.shape[:2], -1)
        return flat if torch.allclose(flat.sum(-1), difference, rtol=1e-3, atol=1e-3, equal_nan=True) else None

    def result(self) -> dict[str, Tensor]:
        """rate, distortion [N]; "kl/site" [N, dims]; "mean/site", E_q[u | x], and "variance of mean/site" over draws
        [N, dims]; "dims/site"; "draws/site" [N, draws, ...] and their log densities log_q, log_p [N, draws]."""
        averages = {name: (total / self.count).cpu() for name, total in self._sums.items()}
        out = {"rate": averages["rate"], "distortion": -averages["log_lik"]}
        out |= {name: value for name, value in averages.items() if name.startswith("kl/")}
        out |= {f"dims/{name}": torch.tensor(dims) for name, dims in self.dims.items()}
        for name, mean in _of_prefix(averages, "u/").items():
            spread = (averages[f"u^2/{name}"] - mean**2).clamp(min=0)
            out |= {f"mean/{name}": mean, f"variance of mean/{name}": spread / (self.count - 1)}
        if self.draws:
            log_q, log_p = torch.cat(self.log_densities, 1)
            out |= {"log_q": log_q.T, "log_p": log_p.T}
            out |= {f"draws/{name}": value.transpose(0, 1) for name, value in self.draws.items()}
        return out


def _of_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _variance(statistics: Mapping[str, Tensor], name: str) -> Tensor:
    """Var_x(E_q[u | x]) = variance of the averages over K draws, minus the share of the draws' own variance; [dims]."""
    means, noise = statistics[f"mean/{name}"], statistics[f"variance of mean/{name}"]
    return means.var(0, correction=1 if len(means) > 1 else 0) - noise.mean(0)
