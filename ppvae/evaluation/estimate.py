"""What an estimate of log p(x) says: per-datum values, how far each can be trusted, and numbers over the data set."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import UsageError
from ppvae.evaluation.importance.psis import MIN_PARTICLES
from ppvae.evaluation.reliability import (
    advice,
    by_weights,
    k_hat_limit,
    particles_in_words,
    reasons,
    reliability_verdict,
    target_in_words,
)
from ppvae.storage import write_bytes


@dataclass(frozen=True)
class Estimate:
    """Importance-weighted log p(x) per datum, with a diagnosis; nats per datum, float64, all [N].

    Attributes:
        log_px: log (1/K) sum_k p(x, z_k) / q(z_k | x); too low on average, by more where `ess` is low.
        std_error: Monte-Carlo standard error of log_px; NaN at K = 1.
        ess: effective sample size of the weights, (sum w)^2 / sum w^2.
        k_hat: Pareto shape of the weights' upper tail (Vehtari et al. 2024, arXiv 1507.02646); NaN for K < 25.
        reliable: no non-finite weight, ess >= 50 and k_hat < min(0.7, 1 - 1 / log10 K).
        elbo: the evidence lower bound from the same draws.
        dims: numbers per datum, or their mean where some are missing; numbers of all data where weights are joint.
        base_measure: what log p(x) is relative to: "binary", "256 levels", "discrete" for other masses, "density on
            [0, 1]", "density", or "mixed".
        nonfinite: how many weights were NaN or +inf (one at least where all were zero); such data are not reliable.
        method, settings: how it was made; K (`num_particles`) is the number of chains where the method is annealing.
        diagnostics: what else the method says of each datum, [N] by name; "num_particles" of each where they were drawn
            by need, of which K is then the most.
        trusted: the verdict per datum of a method whose rule is not that of importance sampling.
        remedy: what makes log p(x) of this pair tighter where importance sampling fails, in words.
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
    trusted: Tensor | None = field(default=None, repr=False)
    remedy: str = ""

    @property
    def k_hat_limit(self) -> float:
        """The largest k_hat of a reliable estimate, min(0.7, 1 - 1 / log10 K); -inf for K < 25, too few to judge."""
        return k_hat_limit(self.num_particles)

    @property
    def reliable(self) -> Tensor:
        """Which estimates can be trusted, [N] bool."""
        if self.trusted is not None:
            return self.trusted
        if self.lower_bound_only or self.num_particles < MIN_PARTICLES:
            return torch.zeros_like(self.log_px, dtype=torch.bool)
        return by_weights(self)

    @property
    def particles(self) -> Tensor:
        """How many particles the estimate of each datum is made of, [N]; K for all unless each got what it needs."""
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
        """L_k, the importance-weighted bound with k particles, from the same draws; [N] nats.

        Raises:
            UsageError: k was not recorded; the message names the recorded ones.
        """
        if k not in self.bounds:
            raise UsageError(
                f"bound({k}): recorded are {sorted(self.bounds)}; for another k call log_marginal(..., bounds=({k},))"
            )
        return self.bounds[k]

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
        """nll / (dims log 2), plus log2(levels) for dequantised data; `base_measure` names what it is relative to."""
        return self.nll / (self.dims * math.log(2)) + (math.log2(self.levels) if self.levels else 0.0)

    def summary(self) -> str:
        """The estimate in words, with how many data are not to be trusted, why, and what to do about them.

        >>> one = torch.ones(2).double()
        >>> print(Estimate(-one, one, one, one, -one, 0 * one, 100, 0, 3, "density").summary())
        NLL 1.000 ± 0.000 nats per datum over 2 data (K = 100), 0.481 bits per dim (density)
        ELBO -1.000; Monte-Carlo standard error 1.0000 (median)
        2 of 2 data (100.0 %) are not to be trusted (heavy tail, k_hat not below 0.50: 2, ess below 50: 0, \
broken weights: 0): log p(x) may be far too low
        what to do: for 2: a better guide
        """
        count = len(self.log_px)
        unit = "nats for the whole data set" if self.joint else "nats per datum"
        how = f"K = {particles_in_words(self)}"
        if self.trusted is not None:
            how = f"{self.method}, {self.num_particles} chains"
        lines = [
            f"NLL {self.nll:.3f} ± {self.nll_std_error:.3f} {unit} over {count} data ({how}), "
            f"{self.bits_per_dim:.3f} bits per dim ({self.base_measure})",
            f"ELBO {float(self.elbo.mean()):.3f}; Monte-Carlo standard error "
            f"{float(self.std_error.median()):.4f} (median)",
        ]
        lines += [reliability_verdict(self), *([target_in_words(self)] if "target_std_error" in self.settings else [])]
        if not reasons(self) and (broken := int((self.nonfinite > 0).sum())):
            lines.append(f"{broken} data have non-finite weights")
        if todo := advice(self):
            lines.append(f"what to do: {todo}")
        if self.lower_bound_only:
            lines.append("the guide has a point mass on a discrete latent: these are lower bounds only")
        return "\n".join([*lines, *self.notes])

    def table(self) -> dict[str, str]:
        """The numbers over the data set as words, for printing.

        >>> one = torch.ones(2).double()
        >>> Estimate(-one, one, one, one, -one, 0 * one, 100, 0, 3, "density").table()["what to do"]
        'for 2: a better guide'
        """
        count = len(self.log_px)
        unit = "nats for the whole data set" if self.joint else "nats per datum"
        rows = {
            "data": f"{self.data or 'a tensor'}, {count} data",
            "NLL": f"{self.nll:.3f} ± {self.nll_std_error:.3f} {unit}",
            "bits per dim": f"{self.bits_per_dim:.4f} ({self.base_measure})",
            "ELBO": f"{float(self.elbo.mean()):.3f}",
            "particles": particles_in_words(self),
            **(
                {} if self.trusted is None else {"method": self.method, **{k: str(v) for k, v in self.settings.items()}}
            ),
            "verdict": reliability_verdict(self),
            **({"target": target_in_words(self)} if "target_std_error" in self.settings else {}),
        }
        if todo := advice(self):
            rows["what to do"] = todo
        return rows | {f"note {i}": note for i, note in enumerate(self.notes, 1)}

    def per_datum(self) -> dict[str, Tensor]:
        """Every per-datum quantity by name, [N]."""
        names = ("log_px", "std_error", "ess", "k_hat", "elbo", "nonfinite", "reliable")
        return {name: getattr(self, name) for name in names} | dict(self.diagnostics)

    def attributes(self) -> dict[str, Any]:
        """What the estimate is of and how it was made, as strings and numbers."""
        return {
            "data": self.data, "digest": self.digest, "num_particles": self.num_particles, "seed": self.seed,
            "dims": self.dims, "base_measure": self.base_measure, "lower_bound_only": self.lower_bound_only,
            "joint": self.joint, "nll": self.nll, "nll_std_error": self.nll_std_error,
            "bits_per_dim": self.bits_per_dim, "elbo": float(self.elbo.mean()),
            "unreliable": int((~self.reliable).sum()), "num_data": len(self.log_px), "notes": "; ".join(self.notes),
            "levels": self.levels or 0, "method": self.method, "remedy": self.remedy, **self.settings,
        }  # fmt: skip

    def to_arviz(self) -> Any:
        """The estimate for ArviZ: `InferenceData` under ArviZ 0.x, `DataTree` under 1.x.

        Per-datum results are in group `marginal_likelihood`; posterior draws, where asked for, in `posterior`.
        """
        from ppvae.evaluation.arviz import to_arviz

        draws = {name: value.cpu().numpy() for name, value in (self.posterior or {}).items()}
        per_datum = {name: value.cpu().numpy() for name, value in self.per_datum().items()}
        per_datum |= {f"bound_{k}": value.cpu().numpy() for k, value in self.bounds.items()}
        return to_arviz(per_datum, draws or None, None, self.attributes())

    def save(self, directory: str | os.PathLike[str], name: str = "log_marginal") -> Path:
        """Writes `<name>.json` (numbers and per-datum values) and `<name>.nc` (for ArviZ), each whole or not at all."""
        from ppvae.evaluation.arviz import write_netcdf

        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.json"
        content = {key: _number(value) for key, value in self.attributes().items()} | {
            "curve": {str(k): _number(float(v.mean())) for k, v in sorted(self.bounds.items())},
            "summary": self.summary().splitlines(),
            "per_datum": {key: [_number(v) for v in value.tolist()] for key, value in self.per_datum().items()},
        }
        write_bytes(path, (json.dumps(content, allow_nan=False) + "\n").encode())
        write_netcdf(self.to_arviz(), folder / f"{name}.nc")
        return path


def _number(value: Any) -> Any:
    """A value as JSON takes it: a number that is not finite becomes a string."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
