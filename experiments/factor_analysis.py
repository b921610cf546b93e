"""Probabilistic PCA and factor analysis by SVI, beside the maximum of their likelihood: that of PCA in closed form
(Tipping and Bishop 1999), that of factor analysis by scikit-learn's FactorAnalysis, which is EM. The ELBO is climbed
with three guides: the exact posterior, with which it is log p(x) itself; the best normal with independent dims for each
row; and an amortised one, linear in x, with one covariance for all rows, which the posterior has too. log p(x) is known
in closed form, and the gap is in nats per row of the data that are fitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pyro
import torch
from sklearn import datasets, decomposition
from torch import Tensor
from torch import nn as tnn

from experiments.cells import Cells, Here, collected, markdown, mean, of_estimate, run, train, values
from ppvae import data, log_marginal, posteriors
from ppvae.models import LinearGaussian


@dataclass(frozen=True)
class Settings:
    """A table, standardised, and digits with uniform noise within a level; the size of z, and the schedule."""

    tables: tuple[str, ...] = ("wine", "digits")
    models: tuple[str, ...] = ("PPCA", "factor analysis")
    guides: tuple[str, ...] = ("exact", "mean field", "amortised")
    seeds: tuple[int, ...] = (0, 1, 2)
    latent: int = 4
    epochs: int = 300
    lr: float = 2e-2


SMOKE = {"tables": ("wine",), "seeds": (0,), "epochs": 2}


def loaded(name: str) -> tuple[Tensor, Tensor]:
    """Rows to fit, and the rest."""
    if name == "digits":
        fitted, _, test = data.load("digits", dequantize=True)
        return fitted.fixed(0).read(), test.read()
    x = torch.from_numpy(getattr(datasets, f"load_{name}")().data).float()
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    fitted, test = x[: 3 * len(x) // 4], x[3 * len(x) // 4 :]
    return tuple((part - fitted.mean(0)) / fitted.std(0) for part in (fitted, test))  # type: ignore[return-value]


def maximum(s: Settings, model: str, x: Tensor) -> float:
    """log p(x) at the maximum of the likelihood, in nats per row of the data that it is the maximum of."""
    if model == "PPCA":
        return float(LinearGaussian.maximum_likelihood(x.double(), s.latent).log_px(x.double()).mean().detach())
    em = decomposition.FactorAnalysis(s.latent, tol=1e-6, max_iter=20000, svd_method="lapack").fit(x.double().numpy())
    return float(em.score(x.double().numpy()))


class Amortised(tnn.Module):
    """A guide that a linear map of x gives the location, and parameters the covariance."""

    def __init__(self, features: int, latent: int):
        super().__init__()
        outputs = posteriors.FullRank.outputs(latent)
        self.net, self.covariance = tnn.Linear(features, latent), tnn.Parameter(torch.zeros(outputs - latent))
        self.posterior = posteriors.FullRank(tnn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        pyro.module("amortised", self)
        covariance = self.covariance.expand(len(x), -1)
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self.posterior(torch.cat([self.net(x), covariance], -1)))


def compute(s: Settings, here: Here, table: str, model: str, guide: str, seed: int) -> dict[str, Any]:
    """Trains one pair; log p(x) of the rows that it was fitted to, beside its maximum, and of the others."""
    x, test = loaded(table)
    torch.manual_seed(seed)
    made = LinearGaussian(x.shape[1], s.latent, 1.0 if model == "PPCA" else x.std(0))
    made.loc.data.copy_(x.mean(0))
    guides = {"exact": made.guide, "mean field": made.mean_field, "amortised": Amortised(x.shape[1], s.latent)}
    pair = SimpleNamespace(model=made.model, guide=guides[guide])
    train(pair, x, None, here, epochs=s.epochs, lr=s.lr, seed=seed)
    found = LinearGaussian(x.shape[1], s.latent, made.log_scale.detach().exp()).double()
    found.load_state_dict(made.state_dict())
    reached, best = float(found.log_px(x.double()).mean().detach()), maximum(s, model, x)
    est = log_marginal(found.model, found.guide, test.double(), num_particles=30)
    return of_estimate(est) | {"reached": reached, "maximum": best, "gap": best - reached}


def table(cells: Cells) -> str:
    """One row a model and guide."""
    header = ("table", "model", "guide", "seeds", "maximum of log p(x)", "reached", "gap, largest", "NLL of other rows")
    lines = []
    for key, r in collected(cells, "table", "model", "guide").items():
        numbers = f"{mean(r, 'maximum'):.3f}", f"{mean(r, 'reached'):.3f}", f"{max(values(r, 'gap')):.3f}"
        lines.append((*key, len(r), *numbers, f"{mean(r):.3f}"))
    return markdown(header, lines)


def main(args: list[str] | None = None) -> None:
    """Fills the table."""
    axes = ("table", "model", "guide", "seed")
    run("factor_analysis", Settings, axes, compute, table, SMOKE, __doc__, args)


if __name__ == "__main__":
    main()
