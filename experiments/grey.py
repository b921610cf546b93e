"""A Bernoulli on grey pixels is not a likelihood: its value, its integral, and log p(x) of normalised likelihoods.

lambda^x (1 - lambda)^(1 - x) sums to one over {0, 1}; over [0, 1] it integrates to 1 / C(lambda) <= 1/2, so it is not a
density. Divided by its integral it is the continuous Bernoulli (Loaiza-Ganem and Cunningham 2019, arXiv 1907.06845).
The first row is trained on dynamically binarised images and evaluated on grey ones; the second is the same network,
normalised. Bits per dim of densities are upper bounds on those of a mass on 256 levels (Theis et al. 2016, arXiv
1511.01844)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments import cells
from experiments.cells import Cells, Workspace
from experiments.likelihoods import initial_bias
from ppvae import VAE, data, distributions, generate, likelihoods, log_marginal, nn, posteriors, priors
from ppvae.plots import image_grid
from ppvae.plots.style import BLUE, figure, styled

BUILD = {name: getattr(likelihoods, name) for name in ("Bernoulli", "ContinuousBernoulli", "Beta")}
BUILD["Normal"] = functools.partial(likelihoods.Normal, scale="network")


@dataclass(frozen=True)
class Settings:
    """Sizes and training budget, the same for every likelihood."""

    likelihoods: tuple[str, ...] = tuple(BUILD)
    seeds: tuple[int, ...] = (0,)
    data: str = "mnist"
    latent: int = 20
    encoder: tuple[int, ...] = (200, 200)
    decoder: tuple[int, ...] = (200, 200)
    steps: int = 2000
    batch_size: int = 100
    lr: float = 1e-3
    num_test: int = 1000
    particles: int = 200


SMALL = {"latent": 2, "encoder": (16,), "decoder": (16,), "steps": 13, "num_test": 20, "particles": 25}
SMOKE = {"data": "digits"} | SMALL


class UnnormalizedBernoulli(distributions.ContinuousBernoulli):
    """A Bernoulli's x log(lambda) + (1 - x) log(1 - lambda) on [0, 1], where it is not a density."""

    def log_prob(self, value: Tensor) -> Tensor:
        return value * self.logits - torch.nn.functional.softplus(self.logits)


class UnnormalizedLikelihood(likelihoods.ContinuousBernoulli):
    """The unnormalised p(x | z)."""

    def forward(self, z: Tensor) -> Any:
        return UnnormalizedBernoulli(self.net(z)).to_event(1)


def log_integral(logits: Tensor, nodes: int = 64) -> Tensor:
    """log of the integral of exp(l x) / (1 + e^l) over x in [0, 1], by Gauss-Legendre quadrature; [*]."""
    x, w = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(nodes))
    return (UnnormalizedBernoulli(logits.double().unsqueeze(-1)).log_prob((x + 1) / 2) + (w / 2).log()).logsumexp(-1)


def compute(s: Settings, workspace: Workspace, likelihood: str, seed: int) -> dict[str, Any]:
    """Trains one VAE and evaluates it on the first test images; the Bernoulli unnormalised and normalised."""
    plain = likelihood == "Bernoulli"
    train, valid, _ = data.load(s.data, workspace.root, binarize="dynamic" if plain else None, dequantize=not plain)
    grey, test = (data.load(s.data, workspace.root, dequantize=d)[2].head(s.num_test) for d in (False, True))
    torch.manual_seed(seed)
    dims = train.shape[1]
    (outputs,) = BUILD[likelihood](torch.nn.Identity()).output_shape((dims,))
    decoder = nn.mlp(s.latent, outputs, hidden=s.decoder, activation=torch.nn.ELU)
    about = "ContinuousBernoulli" if plain else likelihood
    nn.set_output_bias(decoder, initial_bias(about, train.as_subclass(torch.Tensor), grey.levels))
    encoder = nn.mlp(dims, 2 * s.latent, hidden=s.encoder, activation=torch.nn.ELU)
    prior, posterior = priors.StandardNormal(s.latent), posteriors.DiagonalNormal(encoder)
    vae = own = VAE(prior, BUILD[likelihood](decoder), posterior)
    epochs = math.ceil(s.steps * s.batch_size / len(train))
    cells.train(vae, train, valid, workspace, epochs=epochs, lr=s.lr, batch_size=s.batch_size, clip=1000.0, seed=seed)
    result = {}
    if plain:
        lies = VAE(prior, UnnormalizedLikelihood(decoder), posterior)
        claim = log_marginal(lies.model, lies.guide, grey, num_particles=s.particles, seed=seed, proposal="guide")
        z = generate.posterior_means(lies.model, lies.guide, grey)["z"][:100]
        whole = log_integral(decoder(z).detach()).sum(-1).mean()
        result = {"claim": -claim.nll, "claim_elbo": float(claim.elbo.mean()), "integral": float(whole)}
        own = VAE(prior, likelihoods.ContinuousBernoulli(decoder), posterior)
    est = log_marginal(own.model, own.guide, test, num_particles=s.particles, seed=seed, proposal="guide")
    pairs = [(vae, valid), (own, test)]
    drawn = [generate.samples(p.model, p.guide, x, 8, mean=m, seed=seed) for p, x in pairs for m in (True, False)]
    np.save(workspace.folder / "samples.npy", torch.stack(drawn).reshape(2, 16, *grey.event_shape).numpy())
    return cells.estimate_summary(est) | result


def table(found: Cells) -> str:
    """The value of the Bernoulli on grey pixels; log p(x) and bits per dim of normalised densities."""
    lines: list[tuple[Any, ...]] = []
    for (name,), r in cells.group_cells(found, "likelihood").items():
        if name == "Bernoulli":
            claim = [f"{cells.mean(r, key):.1f}, it says" for key in ("claim_elbo", "claim")]
            lines.append((name, len(r), *claim, f"e^{cells.mean(r, 'integral'):.0f} an image", "none", ""))
        own = f"{-cells.mean(r):.1f} ± {cells.standard_error(r):.1f}"
        share = f"{100 * cells.mean(r, 'unreliable') / cells.mean(r, 'num_data'):.0f} %"
        words = "the same, divided by its integral" if name == "Bernoulli" else name
        elbo, bits = f"{cells.mean(r, 'elbo'):.1f}", f"{cells.mean(r, 'bits_per_dim'):.3f}"
        lines.append((words, len(r), elbo, own, 1, bits, share))
    header = "likelihood, seeds, ELBO, log p(x) in nats, integrates to, bits per dim, unreliable"
    return cells.markdown(header.split(", "), lines)


@styled
def draw_integral() -> Any:
    """The numerical integral of the Bernoulli's function of a grey pixel, by lambda."""
    fig, lambdas = figure(5.6, 2.6), torch.linspace(0.001, 0.999, 199).double()
    ax = fig.add_subplot()
    ax.plot(
        lambdas, log_integral(lambdas.logit()).exp(), color=BLUE, label="integral of $λ^x (1 - λ)^{1 - x}$ over [0, 1]"
    )
    ax.set(xlabel="λ", ylim=(0, 1))
    ax.legend()
    return fig


def draw_samples(found: Cells, folder: Path) -> None:
    """Eight means and eight samples per row."""
    rows: dict[str, Any] = {}
    for (name,), r in cells.group_cells(found, "likelihood").items():
        if (path := Path(r[0]["folder"]) / "samples.npy").exists():
            first, second = np.load(path)
            rows |= {name: first} | ({"normalised": second} if name == "Bernoulli" else {})
    if rows:
        grid = image_grid(np.stack(list(rows.values())), first.shape[1:], row_titles=list(rows))
        grid.savefig(folder / "samples.png")


def main(args: list[str] | None = None) -> None:
    """Computes the table and draws the figures."""
    found, folder = cells.run("grey", Settings, ("likelihood", "seed"), compute, table, SMOKE, __doc__, args)
    draw_integral().savefig(folder / "grey.png")
    draw_samples(found, folder)


if __name__ == "__main__":
    main()
