"""Rotating digits with missing frames: a Gaussian process prior over time (Casale et al. 2018, arXiv 1810.11738;
Fortuin et al. 2020, arXiv 1907.04155) compared with independent frames.

The sequences are simulated from real images: a digit rotates at a constant speed of 15 to 35 degrees per frame, for 10
frames of 14 x 14 binary pixels; 40 % of the frames are missing, in training too. Each row has the same networks. The
guide is the process conditioned on one pseudo-observation per known frame (smoothed), or independent over known frames
(stepwise). log p of the missing frames given the others is log p(all) - log p(known); the error is the mean square of
(pixel - its mean given the known frames)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import cells
from experiments.cells import Cells, Workspace
from ppvae import data, likelihoods, log_marginal, nn, objectives, posteriors, priors
from ppvae.evaluation import impute
from ppvae.models import GaussianProcessVAE, smoothed, stepwise
from ppvae.plots import image_grid
from ppvae.priors.gaussian_process import rbf


@dataclass(frozen=True)
class Settings:
    """The pairs, the sequences, and the schedule."""

    pairs: tuple[str, ...] = ("independent frames", "process, smoothed", "process, stepwise")
    seeds: tuple[int, ...] = (0, 1, 2)
    data: str = "mnist"
    sequences: int = 4000
    num_test: int = 200
    steps: int = 10
    missing: float = 0.4
    latent: int = 8
    hidden: tuple[int, ...] = (200,)
    epochs: int = 10
    batch_size: int = 50
    lr: float = 2e-3
    particles: int = 300


SMOKE = {"data": "digits", "seeds": (0,), "sequences": 100, "num_test": 10, "steps": 4, "epochs": 1, "particles": 50}


def white_kernel(r: Tensor) -> Tensor:
    """No correlation between different times."""
    return (r == 0).to(r.dtype)


PAIRS = dict(zip(Settings.pairs, ((white_kernel, smoothed), (rbf, smoothed), (rbf, stepwise)), strict=True))


def rotate(images: Tensor, s: Settings, seed: int) -> tuple[Tensor, Tensor]:
    """Sequences [N, T, pixels] of rotating images [N, 1, H, W], and which frames are observed [N, T]."""
    noise = torch.Generator().manual_seed(seed)
    start = 2 * math.pi * torch.rand(len(images), 1, generator=noise)
    way = torch.rand(len(images), 1, generator=noise).sub(0.5).sign()
    speed = math.radians(15) + math.radians(20) * torch.rand(len(images), 1, generator=noise)
    angle = (start + way * speed * torch.arange(s.steps)).flatten()
    turn = torch.stack([angle.cos(), -angle.sin(), 0 * angle, angle.sin(), angle.cos(), 0 * angle], -1)
    frames = images.repeat_interleave(s.steps, 0)
    grid = F.affine_grid(turn.reshape(-1, 2, 3), list(frames.shape), align_corners=False)
    frames = F.grid_sample(frames, grid, align_corners=False)
    frames = F.avg_pool2d(frames, 2) if frames.shape[-1] > 14 else frames
    known = torch.rand(len(images), s.steps, generator=noise) >= s.missing
    known[torch.arange(len(images)), torch.randint(s.steps, (len(images),), generator=noise)] = True
    return (frames > 0.5).float().reshape(len(images), s.steps, -1), known


def nearest_known_frame(x: Tensor, known: Tensor) -> Tensor:
    """The observed frame that is nearest in time to each frame."""
    far = torch.cdist(times := torch.arange(x.shape[1])[:, None].float(), times) + 1000 * ~known.unsqueeze(1)
    return torch.gather(x, 1, far.argmin(-1, keepdim=True).expand_as(x))


def compute(s: Settings, workspace: Workspace, pair: str, seed: int) -> dict[str, Any]:
    """Trains one pair on sequences with missing frames; log p of observed frames, and of missing given observed."""
    splits = data.load(s.data, workspace.root, flat=False)
    counts = (s.sequences, s.num_test, s.num_test)
    made = [rotate(d.head(n).read(), s, i) for i, (d, n) in enumerate(zip(splits, counts, strict=True))]
    train, valid, test = (data.with_missing(x.masked_fill(~known.unsqueeze(-1), torch.nan)) for x, known in made)
    torch.manual_seed(seed)
    kernel, steps = PAIRS[pair]
    prior = priors.GaussianProcess(s.latent, kernel=kernel, jitter=1e-3)
    with torch.no_grad():
        prior.log_lengthscale.copy_(torch.linspace(math.log(2), math.log(10), s.latent))
    size = train.shape[-1]
    likelihood = likelihoods.Bernoulli(nn.mlp(s.latent, size, hidden=s.hidden))
    posterior = posteriors.DiagonalNormal(nn.mlp(size, 2 * s.latent, hidden=s.hidden))
    vae = GaussianProcessVAE(prior, likelihood, posterior, steps)
    options = {"epochs": s.epochs, "lr": s.lr, "batch_size": s.batch_size, "seed": seed}
    trained = cells.train(vae, train, valid, workspace, objective=objectives.ELBO(), **options)
    (truth, known), own = made[2], (trained.model, trained.guide)
    est, whole = (log_marginal(*own, x, num_particles=s.particles, seed=seed, proposal="guide") for x in (test, truth))
    filled = impute(*own, test, num_particles=s.particles, draws=1, seed=seed).mean
    np.save(workspace.folder / "filled.npy", torch.stack([truth[:2], test[:2].as_subclass(Tensor), filled[:2]]).numpy())
    return cells.estimate_summary(est) | cells.training_summary(trained) | {
        "frame": est.nll * len(known) / int(known.sum()),
        "missing_frame": float((est.log_px - whole.log_px).sum()) / int((~known).sum()),
        "error": float((filled - truth)[~known].square().mean()),
        "error_nearest": float((nearest_known_frame(truth, known) - truth)[~known].square().mean()),
    }  # fmt: skip


def table(found: Cells) -> str:
    """One row per pair, compared with independent frames."""
    header = ("pair", "seeds", "test NLL of known frames", "a known frame", "a missing frame given them")
    header += ("error of imputation", "error of the nearest frame", "unreliable", "gain on independent frames")
    lines, rows = [], cells.group_cells(found, "pair")
    for (pair,), r in rows.items():
        nats = [f"{cells.mean(r, key):.1f}" for key in ("frame", "missing_frame")]
        errors = [f"{cells.mean(r, key):.4f}" for key in ("error", "error_nearest")]
        total = f"{cells.mean(r):.1f} ± {cells.standard_error(r):.1f}"
        untrusted = f"{cells.mean(r, 'unreliable') / cells.mean(r, 'num_data'):.0%}"
        plain = rows.get(("independent frames",), r)
        gain = cells.compare_rows(r, plain) if r is not plain else ""
        lines.append((pair, len(r), total, *nats, *errors, untrusted, gain))
    return cells.markdown(header, lines)


def draw_figure(found: Cells, folder: Path) -> None:
    """Two sequences: complete, observed, and imputed by each pair."""
    first = {
        r[0]["cell"]["pair"]: Path(r[0]["folder"]) / "filled.npy" for r in cells.group_cells(found, "pair").values()
    }
    filled = {pair: np.load(path) for pair, path in first.items() if path.exists()}
    if filled:
        known = next(iter(filled.values()))
        shown = {"truth": known[0], "seen": known[1]} | {pair: own[2] for pair, own in filled.items()}
        rows = [(name, x[i]) for i in range(2) for name, x in shown.items()]
        side = math.isqrt(known.shape[-1])
        titles, images = zip(*rows, strict=True)
        image_grid(np.stack(images), (side, side), row_titles=titles).savefig(folder / "filled.png")


def main(args: list[str] | None = None) -> None:
    """Computes the table and draws the figure."""
    found, folder = cells.run("gp_vae", Settings, ("pair", "seed"), compute, table, SMOKE, __doc__, args)
    draw_figure(found, folder)


if __name__ == "__main__":
    main()
