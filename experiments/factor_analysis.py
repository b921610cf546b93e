"""Probabilistic PCA and factor analysis by SVI, compared with maximum likelihood: in closed form for PCA (Tipping and
Bishop 1999), and by scikit-learn's FactorAnalysis, which is EM, for factor analysis. The ELBO is maximised with three
guides: the exact posterior, for which the ELBO is log p(x); the best normal with independent dims for each row; and an
amortised one, linear in x with one covariance for all rows, a family that contains the posterior. log p(x) is known in
closed form; the gap is in nats per row of the fitted data. With the amortised guide, weights start in units of each
feature's standard deviation, in which the guide reads x, too. From weights of size one, training stopped up to 6.3 nats
short on digits, some of whose pixels have a scale of 0.02: the first posterior is too narrow for the guide to find."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pyro
import torch
from sklearn import datasets, decomposition
from torch import Tensor
from torch import nn as tnn

from experiments.cells import Cells, Workspace, estimate_summary, group_cells, markdown, mean, run, train, values
from ppvae import data, log_marginal, posteriors
from ppvae.models import LinearGaussian


@dataclass(frozen=True)
class Settings:
    """A standardised table, and digits with uniform dequantisation; the size of z, and the schedule."""

    tables: tuple[str, ...] = ("wine", "digits")
    models: tuple[str, ...] = ("PPCA", "factor analysis")
    guides: tuple[str, ...] = ("exact", "mean field", "amortised")
    seeds: tuple[int, ...] = (0, 1, 2)
    latent: int = 4
    epochs: int = 300
    lr: float = 2e-2


SMOKE = {"tables": ("wine",), "seeds": (0,), "epochs": 2}


def load_rows(name: str) -> tuple[Tensor, Tensor]:
    """Training rows and test rows."""
    if name == "digits":
        fitted, _, test = data.load("digits", dequantize=True)
        return fitted.fixed(0).read(), test.read()
    x = torch.from_numpy(getattr(datasets, f"load_{name}")().data).float()
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    fitted, test = x[: 3 * len(x) // 4], x[3 * len(x) // 4 :]
    return tuple((part - fitted.mean(0)) / fitted.std(0) for part in (fitted, test))  # type: ignore[return-value]


def max_log_likelihood(s: Settings, model: str, x: Tensor) -> float:
    """The maximum of the mean log-likelihood of the rows, in nats per row."""
    if model == "PPCA":
        return float(LinearGaussian.maximum_likelihood(x.double(), s.latent).log_px(x.double()).mean().detach())
    em = decomposition.FactorAnalysis(s.latent, tol=1e-6, max_iter=20000, svd_method="lapack").fit(x.double().numpy())
    return float(em.score(x.double().numpy()))


class LinearGuide(tnn.Module):
    """A guide whose location is a linear map of standardised x and whose covariance is a parameter."""

    def __init__(self, x: Tensor, latent: int):
        super().__init__()
        outputs = posteriors.FullRank.outputs(latent)
        self.loc, self.scale = tnn.Buffer(x.mean(0)), tnn.Buffer(x.std(0))
        self.net, self.covariance = tnn.Linear(x.shape[1], latent), tnn.Parameter(torch.zeros(outputs - latent))
        self.posterior = posteriors.FullRank(tnn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        pyro.module("amortised", self)
        covariance = self.covariance.expand(len(x), -1)
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self.posterior(torch.cat([self.net((x - self.loc) / self.scale), covariance], -1)))


def compute(s: Settings, workspace: Workspace, table: str, model: str, guide: str, seed: int) -> dict[str, Any]:
    """Trains one pair; log p(x) of the training rows, compared with its maximum, and of the test rows."""
    x, test = load_rows(table)
    torch.manual_seed(seed)
    made = LinearGaussian(x.shape[1], s.latent, 1.0 if model == "PPCA" else x.std(0))
    made.loc.data.copy_(x.mean(0))
    guides = {"exact": made.guide, "mean field": made.mean_field, "amortised": LinearGuide(x, s.latent)}
    if guide == "amortised":
        made.weight.data.mul_(x.std(0)[:, None])
    pair = SimpleNamespace(model=made.model, guide=guides[guide])
    train(pair, x, None, workspace, epochs=s.epochs, lr=s.lr, seed=seed)
    found = LinearGaussian(x.shape[1], s.latent, made.log_scale.detach().exp()).double()
    found.load_state_dict(made.state_dict())
    reached, best = float(found.log_px(x.double()).mean().detach()), max_log_likelihood(s, model, x)
    est = log_marginal(found.model, found.guide, test.double(), num_particles=30, proposal="guide")
    return estimate_summary(est) | {"reached": reached, "maximum": best, "gap": best - reached}


def table(cells: Cells) -> str:
    """One row per model and guide."""
    header = ("table", "model", "guide", "seeds", "maximum of log p(x)", "reached", "gap, largest", "NLL of other rows")
    lines = []
    for key, r in group_cells(cells, "table", "model", "guide").items():
        numbers = f"{mean(r, 'maximum'):.3f}", f"{mean(r, 'reached'):.3f}", f"{max(values(r, 'gap')):.3f}"
        lines.append((*key, len(r), *numbers, f"{mean(r):.3f}"))
    return markdown(header, lines)


def main(args: list[str] | None = None) -> None:
    """Computes the table."""
    axes = ("table", "model", "guide", "seed")
    run("factor_analysis", Settings, axes, compute, table, SMOKE, __doc__, args)


if __name__ == "__main__":
    main()
