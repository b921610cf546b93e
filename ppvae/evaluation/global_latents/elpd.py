"""`PredictiveAccuracy`: expected log predictive densities with their diagnosis, as ArviZ compares them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import count_of
from ppvae.evaluation.reliability import all_reliable

MAX_K_HAT = 0.7
MIN_ESS = 50.0
MAX_WAIC_VARIANCE = 0.4  # of log p(x_n | theta), above which WAIC of a datum is far off (Vehtari et al. 2017)


@dataclass(frozen=True)
class PredictiveAccuracy:
    """Expected log pointwise predictive densities (elpd) per datum, with a diagnosis; nats, float64, [N].

    Attributes:
        elpd: log p(x_n | the other data), of leave-one-out or of the other folds; of WAIC its estimate of it.
        lpd: log p(x_n | all data), by the pair that is trained on all of them; NaN at one particle of sampled local
            latents, whose estimate of p(x_n | theta) no other one is beside.
        std_error: Monte-Carlo standard error of elpd, by the delta method. Data share draws, so that the errors of
            different data are correlated.
        k_hat: Pareto shape of the weights of each datum over the draws of the global latents: of leave-one-out, that of
            p(theta, other data) / q(theta); where the datum is refitted, of the new guide's; of WAIC, `guide_k_hat`.
        ess: effective sample size of these weights, [N].
        guide_k_hat: Pareto shape of p(theta, x) / q(theta), of K-fold the largest of a fold: above the limit, the guide
            is too far from the posterior for any of its numbers.
        local_k_hat: Pareto shape of the local latents' weights, [N]; None where they are summed out or there are none.
        refitted: which data have a pair that was trained without them.
        method: "loo", "kfold" or "waic".
        num_draws, local_particles: draws of the global latents, and particles of the local ones at each.
    """

    elpd: Tensor
    lpd: Tensor
    std_error: Tensor
    k_hat: Tensor
    ess: Tensor
    guide_k_hat: float
    local_k_hat: Tensor | None
    refitted: Tensor
    method: str
    num_draws: int
    local_particles: int
    seed: int
    digest: str = field(default="", repr=False)
    num_folds: int = 0

    @property
    def k_hat_limit(self) -> float:
        """min(0.7, 1 - 1 / log10 S) of S draws (Vehtari et al. 2024, arXiv 1507.02646)."""
        return min(MAX_K_HAT, 1 - 1 / math.log10(self.num_draws)) if self.num_draws > 1 else -math.inf

    @property
    def reliable(self) -> Tensor:
        """Which data have a finite elpd, ess >= 50, and k-hat of their own, of their guide and of their local weights
        below the limits, [N]; of WAIC also a variance of log p(x_n | theta) of at most 0.4."""
        good = self.elpd.isfinite() & (self.k_hat < self.k_hat_limit)
        good &= self.ess >= min(MIN_ESS, 0.999 * self.num_draws)  # equal weights are enough however few there are
        good &= self.refitted | (self.guide_k_hat < self.k_hat_limit)
        if self.method == "waic":
            good &= self.lpd - self.elpd <= MAX_WAIC_VARIANCE
        return good if self.local_k_hat is None else good & ~(self.local_k_hat >= MAX_K_HAT)

    @property
    def total(self) -> float:
        """The sum of elpd over the data, nats."""
        return float(self.elpd.sum())

    @property
    def total_std_error(self) -> float:
        """Standard error of the sum over data, sqrt(N Var[elpd_n]), as `arviz.loo` has it; NaN for one datum."""
        return math.sqrt(len(self.elpd) * float(self.elpd.var(correction=0))) if len(self.elpd) > 1 else math.nan

    @property
    def effective_parameters(self) -> float:
        """p_loo, the sum of lpd - elpd: by how much data that are fitted are predicted better than new ones."""
        return float((self.lpd - self.elpd).sum())

    def with_data(self, which: Tensor, other: PredictiveAccuracy, refitted: bool = False) -> PredictiveAccuracy:
        """The same with the numbers of some data, [N] bool, from another one; their lpd stays that of all data."""
        names = ("elpd", "std_error", "k_hat", "ess")
        new: dict[str, Any] = {name: torch.where(which, getattr(other, name), getattr(self, name)) for name in names}
        if self.local_k_hat is not None and other.local_k_hat is not None:
            new["local_k_hat"] = torch.where(which, other.local_k_hat, self.local_k_hat)
        return replace(self, **new, refitted=self.refitted | which if refitted else self.refitted)

    def summary(self) -> str:
        """The numbers over the data set, and how far they can be trusted, in words."""
        bad, count = int((~self.reliable).sum()), len(self.elpd)
        limits = f"k-hat not below {self.k_hat_limit:.2f}, local k-hat not below {MAX_K_HAT}, or ess below {MIN_ESS:g}"
        limits += f", or a variance above {MAX_WAIC_VARIANCE}" if self.method == "waic" else ""
        lines = [
            f"elpd {self.total:.2f} ± {self.total_std_error:.2f} nats over {count_of(count)} by {self.method}, "
            f"{self.effective_parameters:.2f} effective parameters ({self.num_draws} draws of the global latents, "
            f"{self.local_particles} local particles)",
            all_reliable(count) if not bad else
            f"{bad} of {count_of(count)} {'is' if bad == 1 else 'are'} unreliable ({limits}): {self._cure}",
        ]  # fmt: skip
        if not self.guide_k_hat < self.k_hat_limit:
            lines.append(
                f"the guide is far from the posterior of the global latents (k-hat {self.guide_k_hat:.2f}): take a "
                "richer guide, as AutoMultivariateNormal, or more draws"
            )
        if bool(self.refitted.any()):
            refitted = int(self.refitted.sum())
            them = "it" if refitted == 1 else "them"
            lines.append(f"{count_of(refitted)} by pairs that were trained without {them}")
        return "\n".join(lines)

    @property
    def _cure(self) -> str:
        return {"loo": "pass refit=, or more draws", "waic": "take loo"}.get(self.method, "take more draws")

    def to_arviz(self) -> Any:
        """An ArviZ `ELPDData` with pointwise values, as `arviz.compare({name: result.to_arviz(), ...})` takes it."""
        import arviz as az
        import xarray

        def array(name: str, values: Tensor) -> Any:
            return xarray.DataArray(values.cpu().numpy(), dims=("datum",), name=name)

        warning = bool((~self.reliable).any()) or not self.guide_k_hat < self.k_hat_limit
        kind = "waic" if self.method == "waic" else "loo"
        if int(az.__version__.split(".")[0]) > 0:
            from arviz_stats import utils

            fields = {
                "elpd": self.total, "se": self.total_std_error, "p": self.effective_parameters, "scale": "log",
                "n_samples": self.num_draws, "n_data_points": len(self.elpd), "warning": warning,
                "good_k": self.k_hat_limit, "elpd_i": array("elpd_i", self.elpd),
                "pareto_k": array("pareto_k", self.k_hat),
            }  # fmt: skip
            if not hasattr(utils, "ELPDDataLOO"):  # before 1.3
                return utils.ELPDData(kind=kind, approx_posterior=True, **fields)
            return utils.ELPDData(**fields) if kind == "waic" else utils.ELPDDataLOO(approx_posterior=True, **fields)
        from arviz.stats.stats_utils import ELPDData

        values = {
            f"elpd_{kind}": self.total, "se": self.total_std_error, f"p_{kind}": self.effective_parameters,
            "n_samples": self.num_draws, "n_data_points": len(self.elpd), "warning": warning,
            f"{kind}_i": array(f"{kind}_i", self.elpd),
        }  # fmt: skip
        values |= {"pareto_k": array("pareto_k", self.k_hat)} if kind == "loo" else {}
        values |= {"scale": "log"} | ({"good_k": self.k_hat_limit} if kind == "loo" else {})
        return ELPDData(data=list(values.values()), index=list(values))
