"""The result of an audit of gradient estimators."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ppvae.evaluation.results import SaveableResult

BIASED = 1e-4  # an unbiased estimator is called biased with at most this probability, for each site


@dataclass(frozen=True)
class GradientAudit(SaveableResult):
    """Gradient estimators of one objective on one batch of a pair, by site; float64, [estimators] for each site.

    The parameters of a site are those of the guide's density of this site, given the values of earlier ones;
    "model" are the parameters of the model alone. Gradients are of the bound per datum.

    Attributes:
        estimators: their names.
        variance: {site: [estimators]}, of the gradient of one step, summed over the parameters of the site.
        signal: {site: [estimators]}, the norm of the mean gradient, without the noise of a finite number of draws.
        bias: {site: [estimators]}, the norm of the mean less the enumerated gradient over the norm of the latter,
            without that noise; NaN where the latents cannot be enumerated, or a gradient is not finite.
        p_value: {site: [estimators]}, of the largest difference of a parameter's mean from the enumerated gradient in
            standard errors, corrected for the number of parameters (Bonferroni) and under a normal mean. A hundredth of
            the largest parameter's gradient is subtracted first: draws too rare to be seen may carry it.
        seconds: [estimators], CPU time of a step, forward and backward, the median.
        draws: steps for each estimator.
        notes: estimators that the pair refuses, with the reason.
    """

    estimators: tuple[str, ...]
    variance: dict[str, Tensor]
    signal: dict[str, Tensor]
    bias: dict[str, Tensor]
    p_value: dict[str, Tensor]
    seconds: Tensor
    draws: int
    objective: str
    seed: int
    digest: str = ""
    notes: tuple[str, ...] = ()

    @property
    def signal_to_noise(self) -> dict[str, Tensor]:
        """{site: [estimators]}, the norm of the mean gradient over the square root of the variance of one step."""
        return {site: self.signal[site] / self.variance[site].sqrt() for site in self.variance}

    @property
    def biased(self) -> dict[str, Tensor]:
        """{site: [estimators]}, whether the mean differs from the enumerated gradient, by chance with p < 1e-4."""
        return {site: p < BIASED for site, p in self.p_value.items()}

    def table(self) -> dict[str, str]:
        """Variance, signal-to-noise ratio and bias by site, and the time of a step, for each estimator, as strings."""
        rows = {"objective": f"{self.objective}, {self.draws} steps for each estimator"}
        for i, name in enumerate(self.estimators):
            cells = [
                f"{site}: variance {float(self.variance[site][i]):.3g}, "
                f"signal/noise {float(self.signal_to_noise[site][i]):.3g}{self._bias_words(site, i)}"
                for site in self.variance
            ]
            rows[name] = "; ".join([*cells, f"{1000 * float(self.seconds[i]):.2f} ms"])
        return rows | {f"note {i}": note for i, note in enumerate(self.notes, 1)}

    def _bias_words(self, site: str, i: int) -> str:
        bias = float(self.bias[site][i])
        if not math.isfinite(float(self.variance[site][i])):
            return ", gradients that are not finite"
        if math.isnan(bias):
            return ""
        return f", biased by {100 * bias:.2g} %" if bool(self.biased[site][i]) else ", no bias found"
