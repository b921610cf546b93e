"""`Estimate`: log p(x) per datum with its diagnosis, numbers over the data set, and files."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import UsageError, count_of
from ppvae.errors.ranges import check_numbers
from ppvae.evaluation.reliability import (
    FILTER_METHOD,
    Reliability,
    assess_chains,
    assess_filters,
    assess_mixed,
    assess_weights,
    error_words,
    format_particles,
    k_hat_limit,
    verdict_words,
)
from ppvae.run_folder.atomic_commit import written_together
from ppvae.run_folder.identity import write_result

MIXED_METHOD = "importance sampling and annealing"  # by datum, as `diagnostics["method"]` says: 0 and 1
UNIT, JOINT_UNIT = "nats per datum", "nats for the whole data set"


@dataclass(frozen=True)
class Estimate:
    """Importance-weighted log p(x) per datum, with a diagnosis; nats per datum, float64, all [N].

    Attributes:
        log_px: log (1/K) sum_k p(x, z_k) / q(z_k | x); too low on average, by more where `ess` is low.
        std_error: Monte-Carlo standard error of log_px; NaN at K = 1.
        ess: effective sample size of the weights, (sum w)^2 / sum w^2.
        k_hat: Pareto shape of the weights' upper tail (Vehtari et al. 2024, arXiv 1507.02646); NaN for K < 25.
        reliable: no non-finite weight, ess >= 50, and the 95 % limit of k_hat, from all data of the estimate, below
            min(0.6, 1 - 1 / log10 K); see `ppvae.evaluation.reliability.k_hat_upper`.
        elbo: the evidence lower bound from the same draws; of the guide where `guide_estimate` is there.
        dims: observed numbers per datum, averaged where values are missing; of the whole data set where weights are
            joint.
        base_measure: what log p(x) is relative to: "binary", "256 levels", "discrete" for other masses, "density on
            [0, 1]", "density", or "mixed".
        nonfinite: the number of weights that are NaN or +inf (at least one where all are zero); such data are not
            reliable.
        method, settings: the estimator; K (`num_particles`) is the number of chains of an annealed estimate.
        diagnostics: further numbers per datum, [N] by name; with an adaptive allocation "num_particles" of each datum,
            and K is the largest. Of `log_marginal(..., method="auto")`: "method", 0 for importance sampling and 1 for
            annealing, "num_temperatures" and "acceptance" of the chains, and "num_particles", which counts them.
        reliable_override: [N] bool, replaces the rule of importance sampling: the rule of another method, or that of
            a file.
        remedy: the method that is recommended for data where importance sampling fails.
        log_likelihood: log p(x_n | theta) at the first draws of the global latents theta, [draws, N], where they were
            kept; `posterior` then has these draws, [draws, *event].
        ess_by_step: of a particle filter, the ess at each step before resampling, [N, T], summed over its filters;
            NaN beyond the end of a sequence.
        guide_estimate: the same by draws from the guide, where proposals were refined: L_K, which papers print.
        seconds: of the computation, where it was timed; of its last part where it was resumed.
        site: the observed site, "x" where there are several: the variable of `log_likelihood` for ArviZ.
    """

    log_px: Tensor
    std_error: Tensor
    ess: Tensor
    k_hat: Tensor
    elbo: Tensor
    nonfinite: Tensor
    num_particles: int
    seed: int
    dims: float
    base_measure: str
    levels: int | None = None
    lower_bound_only: bool = False
    joint: bool = False
    data: str = ""
    digest: str = ""
    bounds: Mapping[int, Tensor] = field(default_factory=dict, repr=False)
    posterior: Mapping[str, Tensor] | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()
    method: str = "importance sampling"
    settings: Mapping[str, Any] = field(default_factory=dict)
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    reliable_override: Tensor | None = field(default=None, repr=False)
    remedy: str = ""
    log_likelihood: Tensor | None = field(default=None, repr=False)
    ess_by_step: Tensor | None = field(default=None, repr=False)
    guide_estimate: Estimate | None = field(default=None, repr=False)
    seconds: float = math.nan
    site: str = field(default="x", repr=False)

    @property
    def k_hat_limit(self) -> float:
        """The limit of `k_hat_upper` for a reliable estimate, min(0.6, 1 - 1 / log10 K); -inf for K < 25."""
        return k_hat_limit(self.num_particles)

    @functools.cached_property
    def reliability(self) -> Reliability:
        """The diagnosis: which data are reliable, why others are not, and what to do about them."""
        common: dict[str, Any] = {
            "ess": self.ess,
            "nonfinite": self.nonfinite,
            "joint": self.joint,
            "reliable": self.reliable_override,
        }
        if self.method == FILTER_METHOD:
            del common["joint"]
            return assess_filters(**common, filter_ess=self.diagnostics["filter_ess"], particles=self.particles)
        acceptance = self.diagnostics.get("acceptance", torch.ones_like(self.ess))
        if self.method == MIXED_METHOD:
            return assess_mixed(
                **common, k_hat=self.k_hat, particles=self.particles, acceptance=acceptance,
                chains=self.diagnostics["method"] == 1, alternative=self.remedy,
            )  # fmt: skip
        if self.reliable_override is None or self.method == "importance sampling":
            return assess_weights(
                **common, k_hat=self.k_hat, particles=self.particles, lower_bound_only=self.lower_bound_only,
                alternative=self.remedy,
            )  # fmt: skip
        return assess_chains(**common, acceptance=acceptance, num_chains=self.num_particles)

    @property
    def reliable(self) -> Tensor:
        """Which data have a reliable estimate, [N] bool."""
        return self.reliability.reliable

    @property
    def particles(self) -> Tensor:
        """The number of particles of each datum, [N]; K for all unless the allocation was adaptive."""
        return self.diagnostics.get("num_particles", torch.full(self.log_px.shape, self.num_particles)).long()

    @property
    def on_target(self) -> Tensor:
        """Which data are reliable and within the target standard error, [N] bool.

        Raises:
            UsageError: no target was set; call log_marginal(..., num_particles="auto").
        """
        if "target_std_error" not in self.settings:
            raise UsageError('on_target: no target was set; call log_marginal(..., num_particles="auto")')
        return self.reliable & (self.std_error <= self.settings["target_std_error"])

    def bound(self, k: int) -> Tensor:
        """L_k, the importance-weighted bound with k particles, of the guide where it is known; [N] nats.

        Raises:
            UsageError: k was not recorded; the message names the recorded ones.
        """
        check_numbers(k=k)
        found = self.bounds if self.guide_estimate is None else self.guide_estimate.bounds
        if k not in found:
            raise UsageError(
                f"bound({k}): recorded are {sorted(found)}; for another k call log_marginal(..., bounds=({k},))"
            )
        return found[k]

    @property
    def nll(self) -> float:
        """Negative log-likelihood, -mean(log_px), nats per datum (per data set where weights are joint)."""
        return -float(self.log_px.mean())

    @property
    def nll_std_error(self) -> float:
        """Standard error of `nll` over the data, from the spread of log_px; NaN for one datum."""
        return float(self.log_px.std() / math.sqrt(len(self.log_px))) if len(self.log_px) > 1 else math.nan

    @property
    def bits_per_dim(self) -> float:
        """nll / (dims log 2), plus log2(levels) for dequantised data; `base_measure` names what it is relative to.

        NaN where no number is observed, and the model is made of factors alone.
        """
        if not self.dims:
            return math.nan
        return self.nll / (self.dims * math.log(2)) + (math.log2(self.levels) if self.levels else 0.0)

    def __str__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """The estimate in words: numbers, how many data are unreliable and why, and what to do about them.

        >>> one = torch.ones(2).double()
        >>> print(Estimate(-one, one, one, one, -one, 0 * one, 100, 0, 3, "density").summary())
        NLL 1.000 ± 0.000 nats per datum over 2 data (K = 100), 0.481 bits per dim (density)
        ELBO -1.000; Monte-Carlo standard error 1.0000 (median)
        100.0 % of the data (2 of 2) are unreliable: 2 with a heavy tail (95 % limit of k_hat not below 0.50); \
their log p(x) may be far too low
        what to do: for 2: a better guide
        """
        unit = JOINT_UNIT if self.joint else UNIT
        sampler = f"K = {format_particles(self.particles)}"
        if self.method == FILTER_METHOD or self.reliable_override is not None:
            count = sampler if self.method == FILTER_METHOD else f"{self.num_particles} chains"
            sampler = f"{self.method}, {count}"
        lines = [
            f"NLL {error_words(self.nll, self.nll_std_error)} {unit} over {count_of(len(self.log_px))} ({sampler}), "
            f"{self.bits_per_dim:.3f} bits per dim ({self.base_measure})",
            f"ELBO {float(self.elbo.mean()):.3f}; "
            f"Monte-Carlo standard error {float(self.std_error.median()):.4f} (median)",
            self.reliability.summary,
        ]
        lines += [text for text in (self.guide_comparison, self._target_summary()) if text]
        if (broken := int((self.nonfinite > 0).sum())) and not self.reliability.reasons:
            lines.append(count_of(broken, "datum has", "data have") + " non-finite weights")
        if self.reliability.recommendation:
            lines.append(f"what to do: {self.reliability.recommendation}")
        if self.lower_bound_only:
            lines.append("the guide has a point mass on a discrete latent: these are lower bounds only")
        return "\n".join([*lines, *self.notes])

    def table(self) -> dict[str, str]:
        """The numbers over the data set as strings, for printing.

        >>> one = torch.ones(2).double()
        >>> Estimate(-one, one, one, one, -one, 0 * one, 100, 0, 3, "density").table()["what to do"]
        'for 2: a better guide'
        """
        unit = JOINT_UNIT if self.joint else UNIT
        rows = {
            "data": f"{self.data or 'a tensor'}, {count_of(len(self.log_px))}",
            "NLL": f"{error_words(self.nll, self.nll_std_error)} {unit}",
            "bits per dim": f"{self.bits_per_dim:.4f} ({self.base_measure})",
            "ELBO": f"{float(self.elbo.mean()):.3f}",
            "particles": format_particles(self.particles),
        }
        if "proposal" in self.settings:
            rows["proposal"] = f"{self.settings['proposal']} for each datum"
        if self.guide_estimate is not None:
            rows["beside it"] = self.guide_comparison
        if math.isfinite(self.seconds):
            guide = self.guide_estimate
            rows["seconds"] = f"{self.seconds:.1f}" + (f", and {guide.seconds:.1f} of the guide" if guide else "")
        if self.method == FILTER_METHOD or self.reliable_override is not None:
            rows |= {"method": self.method, **{k: str(v) for k, v in self.settings.items()}}
        if bracket := self.bracket_summary:
            rows["bracket"] = bracket
        rows["verdict"] = self.verdict
        rows["reliability"] = self.reliability.summary
        if target := self._target_summary():
            rows["target"] = target
        if self.reliability.recommendation:
            rows["what to do"] = self.reliability.recommendation
        return rows | {f"note {i}": note for i, note in enumerate(self.notes, 1)}

    @property
    def bracket_summary(self) -> str:
        """What a `bracket` of the proposal on simulated data says; an empty string where there was none."""
        s = self.settings
        return f"on {s['bracket_data']} simulated data, {s['bracket']}" if "bracket" in s else ""

    @property
    def verdict(self) -> str:
        """Whether log p(x) can be relied on, in one sentence."""
        if self.settings.get("bracket_sufficient") is False:  # what no weight shows
            return "not reliable: the proposal is too far from posteriors of simulated data, see bracket"
        return verdict_words(self.reliable, self.joint)

    @property
    def guide_comparison(self) -> str:
        """L_K of the guide, its reliability, and by how much it is lower; an empty string without `guide_estimate`."""
        guide = self.guide_estimate
        if guide is None:
            return ""
        lower = (self.log_px - guide.log_px).double()
        error = f" ± {float(lower.std() / math.sqrt(len(lower))):.3f}" if len(lower) > 1 else ""
        share = "" if self.joint else f", reliable for {100 * float(guide.reliable.double().mean()):.1f} % of the data"
        text = f"NLL {guide.nll:.3f} by L_{guide.num_particles} of the guide{share}"
        return f"{text}: log p(x) lower by {float(lower.mean()):z.3f}{error} nats"

    def _target_summary(self) -> str:
        """How many data are reliable and within the target standard error, where there is a target."""
        if "target_std_error" not in self.settings:
            return ""
        good, budget = int(self.on_target.sum()), self.settings["max_particles"]
        spent = int((~self.on_target & (self.particles >= budget)).sum())
        who = "the estimate is" if self.joint and good else f"{good} of {count_of(len(self.log_px))} are"
        text = f"{who} reliable and within a standard error of {self.settings['target_std_error']:g} nats"
        return f"{text}; {spent} of the others had all {budget} particles" if spent else text

    def per_datum(self) -> dict[str, Tensor]:
        """Every per-datum quantity by name, [N]."""
        names = ("log_px", "std_error", "ess", "k_hat", "elbo", "nonfinite", "reliable")
        return {name: getattr(self, name) for name in names} | dict(self.diagnostics)

    def attributes(self) -> dict[str, Any]:
        """Data, settings and numbers over the data set, as strings and numbers."""
        return {
            "data": self.data, "digest": self.digest, "num_particles": self.num_particles, "seed": self.seed,
            "dims": self.dims, "base_measure": self.base_measure, "lower_bound_only": self.lower_bound_only,
            "joint": self.joint, "nll": self.nll, "nll_std_error": self.nll_std_error,
            "bits_per_dim": self.bits_per_dim, "elbo": float(self.elbo.mean()),
            "unreliable": int((~self.reliable).sum()), "num_data": len(self.log_px),
            "notes": "; ".join(note.replace("; ", ", ") for note in self.notes),
            "levels": self.levels or 0, "method": self.method, "remedy": self.remedy, **self.settings,
        } | ({"seconds": round(self.seconds, 1)} if math.isfinite(self.seconds) else {})  # fmt: skip

    def to_arviz(self) -> Any:
        """The estimate for ArviZ: `InferenceData` under ArviZ 0.x, `DataTree` under 1.x.

        Per-datum results are in group `marginal_likelihood`; posterior draws, where asked for, in `posterior`, and of
        an estimate given global latents their log-likelihoods in `log_likelihood`.
        """
        from ppvae.evaluation.arviz import to_arviz

        draws = {name: value.cpu().numpy() for name, value in (self.posterior or {}).items()}
        per_datum = {name: value.cpu().numpy() for name, value in self.per_datum().items()}
        per_datum |= {f"bound_{k}": value.cpu().numpy() for k, value in self.bounds.items()}
        log_lik = None if self.log_likelihood is None else self.log_likelihood.cpu().numpy()
        steps = None if self.ess_by_step is None else self.ess_by_step.cpu().numpy()
        return to_arviz(per_datum, draws or None, None, self.attributes(), log_lik, steps, self.site)

    def save(
        self, directory: str | os.PathLike[str], name: str = "log_marginal", origin: Mapping[str, str] | None = None
    ) -> Path:
        """Writes `<name>.json` (numbers and per-datum values) and `<name>.nc` (for ArviZ), both or neither.

        `guide_estimate` is written with them, as `<name>_guide`. `origin` is that of the run, `Run.origin`, which the
        files then carry.

        Raises:
            CheckpointError: they cannot be written; what was there before is kept.
        """
        from ppvae.evaluation.arviz import write_netcdf

        content = {key: _number(value) for key, value in self.attributes().items()} | {
            "curve": {str(k): _number(float(v.mean())) for k, v in sorted(self.bounds.items())},
            "summary": self.summary().splitlines(),
            "per_datum": {key: [_number(v) for v in value.tolist()] for key, value in self.per_datum().items()},
        }
        with written_together(Path(directory), name) as folder:
            if self.guide_estimate is not None:
                self.guide_estimate.save(folder, f"{name}_guide", origin)
                content["guide_estimate"] = f"{name}_guide.json"
            arrays = write_netcdf(self.to_arviz(), folder / f"{name}.nc")
            write_result(folder / f"{name}.json", content, [arrays], origin)
        return Path(directory) / f"{name}.json"


def _number(value: Any) -> Any:  # a JSON value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
