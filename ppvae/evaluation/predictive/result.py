"""`PredictiveCheck`: statistics of observed and of replicated data, and their p-values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ppvae.errors import count_of
from ppvae.evaluation.predictive.p_values import two_sided
from ppvae.evaluation.results import SaveableResult

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class PredictiveCheck(SaveableResult):
    """Statistics of observed and of replicated data, per datum and over the set, with p-values.

    A p-value is the probability that a replicate has a larger value than the data: near 0 the model's data have smaller
    values, near 1 larger ones. Dicts are by the name of the statistic, or "NAME, mean over data" over the set.

    Attributes:
        observed: the statistics of the data, [N].
        prior: of replicates z ~ p(z), x ~ p(x | z), [replications, N].
        posterior: of replicates z ~ p(z | x_n), x ~ p(x | z), [draws, N].
        prior_p: p-values of each datum among its prior replicates, [N], with ties broken at random: uniform under the
            model.
        posterior_p: posterior predictive p-values, [N], a tie counting one half: closer to one half than uniform ones,
            since the datum itself has chosen z.
        calibrated_p: p-values of `posterior_p` among those of data that the model simulates, [N]: uniform under the
            model whatever the guide. Empty without calibrations.
        set_observed, set_prior, set_posterior: statistics over the set, [], [replications] and [draws].
        set_prior_p, set_posterior_p, set_calibrated_p: their p-values, [], made as those of a datum.
        uniformity: the p-value of the uniformity of `prior_p` over the data, [].
        log_joint: log p(x_n, z) at the posterior draws, [draws, N], nats.
        log_px: log p(x_n) from bootstrap samples of the importance weights, [draws, N], nats.
        latents: posterior draws by site, [draws, N, *event]; not saved.
        replicated: the data's first tensor replicated at the posterior draws and from the prior, [draws, N, *event]
            each, under "posterior" and "prior", and as it is under "observed"; empty unless kept, and not saved.
        alpha: the largest probability that the true model fails, over all tests together.
        site: the observed site, "x" where there are several: the variable of the data for ArviZ.
    """

    observed: Tensors
    prior: Tensors
    posterior: Tensors
    prior_p: Tensors
    posterior_p: Tensors
    calibrated_p: Tensors
    set_observed: Tensors
    set_prior: Tensors
    set_posterior: Tensors
    set_prior_p: Tensors
    set_posterior_p: Tensors
    set_calibrated_p: Tensors
    uniformity: Tensors
    log_joint: Tensor
    log_px: Tensor
    num_particles: int
    seed: int
    alpha: float = 0.01
    data: str = ""
    digest: str = ""
    site: str = "x"
    latents: Tensors = field(default_factory=dict, repr=False, metadata={"saved": False})
    replicated: Tensors = field(default_factory=dict, repr=False, metadata={"saved": False})

    @property
    def statistics(self) -> tuple[str, ...]:
        """The names of the statistics."""
        return tuple(self.observed)

    @property
    def tests(self) -> dict[str, float]:
        """p-values of all tests of the set, by name, uniform under the model or larger.

        For each statistic the uniformity of `prior_p` over the data, and the two-sided p-values over the set.
        """
        found = {f"{name} of each datum": float(p) for name, p in self.uniformity.items()}
        return found | {name: two_sided(float(p)) for name, p in self.set_prior_p.items()}

    @property
    def level(self) -> float:
        """The p-value below which a test fails: alpha over the number of tests (Bonferroni)."""
        return self.alpha / max(1, len(self.tests))

    @property
    def passed(self) -> bool:
        """Whether no test fails."""
        return all(p >= self.level for p in self.tests.values())

    def table(self) -> dict[str, str]:
        """The checks as strings, for printing."""
        failed = [name for name, p in self.tests.items() if p < self.level]
        rows = {
            "data": f"{self.data or 'a tensor'}, {count_of(len(next(iter(self.observed.values()))))}",
            "verdict": f"the model's data differ in {', '.join(failed)}" if failed else "no difference found",
        }
        rows["verdict"] += f" (the true model fails with probability {self.alpha:g} at most)"
        for name, observed in self.set_observed.items():
            prior, posterior = self.set_prior[name], self.set_posterior[name]
            p = [f"p = {_p(self.set_prior_p[name])} prior", f"{_p(self.set_posterior_p[name])} posterior"]
            if name in self.set_calibrated_p:
                p.append(f"{_p(self.set_calibrated_p[name])} calibrated")
            rows[name] = (
                f"{float(observed):.4g} in the data; {float(prior.mean()):.4g} ± {float(prior.std()):.2g} from the "
                f"prior, {float(posterior.mean()):.4g} ± {float(posterior.std()):.2g} from posteriors; {', '.join(p)}"
            )
        return rows | {
            f"{name} of each datum": f"p = {float(p):.2g} of uniform p-values" for name, p in self.uniformity.items()
        }

    def to_arviz(self) -> Any:
        """The check for ArviZ: `InferenceData` under ArviZ 0.x, `DataTree` under 1.x.

        Groups `observed_data`, `posterior_predictive` and `prior_predictive` hold the statistics of each datum by name
        (and the data by their site's name, where kept), so that `arviz.plot_ppc` (0.x) and `arviz.plot_ppc_dist` (1.x)
        draw them; `posterior` the latents; `sample_stats` the variable `lp`, log p(x_n, z); `log_likelihood` log p(x_n)
        with the latents integrated out, so that `arviz.loo` and `arviz.compare` compare models by log p(x): the draws
        are bootstrap samples of the importance weights, and a large Pareto k calls for more particles. The conditional
        log p(x_n | z) would be wrong there: each datum has its own latent (Merkle et al. 2019, arXiv 1802.04452).
        """
        from ppvae.evaluation.arviz import predictive_to_arviz

        kept = {key: {self.site: value} for key, value in self.replicated.items()}
        return predictive_to_arviz(
            observed_data=self.observed | kept.get("observed", {}),
            posterior_predictive=self.posterior | kept.get("posterior", {}),
            prior_predictive=self.prior | kept.get("prior", {}),
            posterior=self.latents, sample_stats={"lp": self.log_joint}, log_likelihood={self.site: self.log_px},
            attrs=self.table(),
        )  # fmt: skip

    def netcdf_groups(self) -> Any:
        """What `<name>.nc` holds: the groups of `to_arviz`."""
        return self.to_arviz()


def _p(value: Tensor) -> str:
    return f"{float(value):.3f}"
