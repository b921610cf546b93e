"""A mixture of Gaussians as a latent-variable model, and the VAE as a mixture with a cluster for every z.

Two data sets in the plane: planted clusters, which are a mixture, and a pinwheel, which is not. A mixture with the
cluster summed out is fitted by stochastic variational inference, whose bound then equals log p(x), and by
scikit-learn's EM from the same initial values (k-means), which maximises the same function; then a VAE, p(x) = integral
of N(x; f(z), s(z)^2) over z ~ N(0, I). log p(x) is exact for the mixtures, and estimated by importance sampling for the
VAE."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture as EM
from torch import Tensor

from experiments import cells
from experiments.cells import Cells, Workspace
from ppvae import VAE, data, generate, likelihoods, log_marginal, nn, objectives, plots, posteriors, priors
from ppvae.models import GaussianMixture


@dataclass(frozen=True)
class Settings:
    """The data are the same for all seeds; initial values and the order of the data differ."""

    names: tuple[str, ...] = ("clusters", "pinwheel")
    fits: tuple[str, ...] = ("EM", "SVI", "VAE")
    seeds: tuple[int, ...] = (0, 1, 2)
    num_data: int = 2000
    components: int = 10
    epochs: int = 300
    batch_size: int = 200
    lr: float = 2e-2
    hidden: tuple[int, ...] = (64, 64)
    vae_epochs: int = 300
    vae_lr: float = 1e-2
    particles: int = 2000
    side: int = 80


SMOKE = {"names": ("pinwheel",), "seeds": (0,), "num_data": 200, "epochs": 3, "vae_epochs": 3, "side": 9}


def clusters(count: int, generator: torch.Generator) -> Tensor:
    """Ten normals of different shapes and sizes, [count, 2]."""
    turn, far = 2 * math.pi * torch.arange(10) / 10, torch.tensor([1.3, 3.0]).repeat(5)
    loc = far[:, None] * torch.stack([turn.cos(), turn.sin()], -1)
    scale = 0.1 * torch.eye(2) + 0.25 * torch.randn(10, 2, 2, generator=torch.Generator().manual_seed(1)).tril()
    c = torch.multinomial(torch.arange(1.0, 11.0), count, replacement=True, generator=generator)
    return loc[c] + (scale[c] @ torch.randn(count, 2, 1, generator=generator)).squeeze(-1)


def pinwheel(count: int, generator: torch.Generator) -> Tensor:
    """Five bent arms, [count, 2]."""
    x = torch.randn(count, 2, generator=generator) * torch.tensor([0.6, 0.2]) + torch.tensor([2.0, 0.0])
    turn = 2 * math.pi * torch.randint(5, (count,), generator=generator) / 5 + 0.25 * (x[:, 0] / 2).exp()
    return torch.view_as_real(torch.view_as_complex(x) * torch.polar(torch.ones(count), turn))


def start_from_kmeans(x: Tensor, components: int, seed: int) -> GaussianMixture:
    """A mixture with the centres of k-means and the average scale of its clusters."""
    means = KMeans(components, n_init=1, random_state=seed).fit(x.numpy())
    pair = GaussianMixture.from_data(x, components)
    with torch.no_grad():
        pair.loc.copy_(torch.from_numpy(means.cluster_centers_))
        pair.log_scale.fill_(0.5 * math.log(means.inertia_ / x.numel()))
    return pair


def fit_by_em(x: Tensor, pair: GaussianMixture) -> None:
    """Fits the mixture by EM from its present values, in place."""
    start = (pair.logits.softmax(0), pair.loc, (-2 * pair.log_scale).exp().diag_embed())
    p, m, q = (value.detach().numpy() for value in start)
    em = EM(len(m), weights_init=p, means_init=m, precisions_init=q, tol=1e-10, max_iter=100_000, reg_covar=0.0)
    found = em.fit(x.numpy())
    factor, loc = torch.from_numpy(np.linalg.cholesky(found.covariances_)), torch.from_numpy(found.means_)
    end = {"loc": loc, "factor": factor, "log_scale": factor.diagonal(dim1=-2, dim2=-1).log()}
    pair.load_state_dict(end | {"logits": torch.from_numpy(found.weights_).log()})


def compute(s: Settings, workspace: Workspace, name: str, fit: str, seed: int) -> dict[str, Any]:
    """Fits one of the three, and evaluates its density over the plane."""
    make = {"clusters": clusters, "pinwheel": pinwheel}[name]
    x, test = (make(s.num_data, torch.Generator().manual_seed(i)).double() for i in (1, 2))
    torch.manual_seed(seed)
    if fit == "VAE":
        x, test = x.float(), test.float()
        decoder, encoder = (nn.mlp(2, 4, hidden=s.hidden) for _ in range(2))
        prior, posterior = priors.StandardNormal(2), posteriors.DiagonalNormal(encoder)
        pair: Any = VAE(prior, likelihoods.Normal(decoder, scale="network"), posterior)
        options = {"epochs": s.vae_epochs, "lr": s.vae_lr, "objective": objectives.IWAE(8)}
    else:
        pair = start_from_kmeans(x, s.components, seed)
        options = {"epochs": s.epochs, "lr": s.lr, "objective": objectives.ELBO()}
    if fit == "EM":
        fit_by_em(x, pair)
    else:
        cells.train(pair, x, None, workspace, batch_size=s.batch_size, seed=seed, **options)
    estimate = functools.partial(
        log_marginal, pair.model, pair.guide, num_particles=s.particles if fit == "VAE" else 1, proposal="guide"
    )
    workspace.folder.mkdir(parents=True, exist_ok=True)
    middles = generate.samples(pair.model, pair.guide, x, 100) if fit == "VAE" else pair.loc.detach()
    density = estimate(plots.plane(count=s.side).to(x)).log_px
    np.savez(workspace.folder / "map.npz", data=x, density=density, middles=middles)
    return cells.estimate_summary(estimate(test)) | {"train": -estimate(x).nll, "digest": data.digest(test.float())}


def table(found: Cells) -> str:
    """One row per data set and fit; SVI compared with EM on the training data, seed by seed."""
    rows, lines = cells.group_cells(found, "name", "fit"), []
    for (name, fit), r in rows.items():
        em = rows.get((name, "EM"), r)
        over = [c["result"]["train"] - e["result"]["train"] for c, e in zip(r, em, strict=False)]
        apart = ", ".join(f"{d:+.4f}" for d in over) if fit == "SVI" else ""
        log_px = f"{-cells.mean(r):.3f} ± {cells.standard_error(r):.3f}"
        gain = cells.compare_rows(r, em) if r is not em else ""
        lines.append((name, fit, len(r), f"{cells.mean(r, 'train'):.3f}", apart, log_px, gain))
    return cells.markdown(
        ("data", "fit", "seeds", "train log p(x)", "over EM, by seed", "test log p(x)", "gain"), lines
    )


def draw_figure(found: Cells, folder: Path) -> None:
    """The data, the finite mixture and the infinite one, one row per data set; crosses are cluster means."""
    panels, marks = {}, {}
    for (name, fit), r in cells.group_cells(found, "name", "fit").items():
        if fit != "EM" and (path := Path(r[0]["folder"]) / "map.npz").exists():
            held, count = np.load(path), r[0]["settings"]["components"]
            title = {"SVI": f"mixture of {count}", "VAE": "VAE, an infinite mixture"}[
                fit
            ] + f": {-cells.mean(r):.2f} nats"
            panels.setdefault(name, held["data"])
            panels[title], marks[title] = held["density"], held["middles"]
    if panels:
        plots.density_maps(panels, marks=marks).savefig(folder / "mixtures.png")


def main(args: list[str] | None = None) -> None:
    """Computes the table and draws the figure."""
    draw_figure(*cells.run("mixtures", Settings, ("name", "fit", "seed"), compute, table, SMOKE, __doc__, args))


if __name__ == "__main__":
    main()
