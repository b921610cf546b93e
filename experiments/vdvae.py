"""A small VDVAE (Child 2021) in bits per dimension, compared with a VAE with one latent vector and the same likelihood,
a mixture of discretised logistics per pixel, with the same number of epochs and free bits. Colour images of 32x32:
`--data cifar10` (torchvision's files below the root, or an .npz of images [N, 32, 32, 3], uint8) with `--levels 256
--sides 1 4 8 16 32 --blocks 1 2 2 2 1`; "discs" is a simulated set. Settings were chosen on the validation images."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments import cells
from experiments.cells import Cells, Workspace
from ppvae import VAE, data, generate, likelihoods, log_marginal, nn, objectives, posteriors, priors
from ppvae.models import very_deep_vae
from ppvae.plots import image_grid


@dataclass(frozen=True)
class Settings:
    """The data, the sizes of the latents, and the training budget, the same for both rows."""

    rows: tuple[str, ...] = ("VAE", "VDVAE")
    seeds: tuple[int, ...] = (0, 1, 2)
    data: str = "digits"
    levels: int = 17
    sides: tuple[int, ...] = (1, 4, 8)
    blocks: tuple[int, ...] = (1, 1, 1)
    width: int = 24
    latent: int = 4
    components: int = 3
    epochs: int = 30
    batch_size: int = 50
    lr: float = 4e-3
    free_bits: float = 0.02  # nats of rate that each dim of a latent has for nothing
    clip: float = 200.0
    num_train: int = 100_000
    num_test: int = 360
    particles: int = 200


SMOKE = {
    "seeds": (0,), "data": "discs", "levels": 256, "sides": (1, 8, 32), "blocks": (1, 1, 1), "width": 4, "latent": 1,
    "epochs": 1, "num_test": 6, "particles": 25,
}  # fmt: skip


def write_discs(path: Path, count: int = 100, side: int = 32) -> Path:
    """Writes simulated images of a coloured disc on a coloured ground."""
    rng = np.random.default_rng(0)
    ground, colour = rng.integers(0, 256, (2, count, 1, 1, 3))
    y, x, radius = rng.uniform(0.2 * side, 0.8 * side, (3, count, 1, 1))
    rows, columns = np.mgrid[:side, :side]
    inside = (rows - y) ** 2 + (columns - x) ** 2 < (radius / 2) ** 2
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=np.where(inside[..., None], colour, ground).astype(np.uint8))
    return path


def build_pair(s: Settings, row: str, images: Any) -> Any:
    """The pair of a row."""
    if row == "VDVAE":
        return very_deep_vae(images, s.sides, s.blocks, s.width, s.latent, s.components, s.levels)
    shape, latent = tuple(images.shape[1:]), 32
    widths = (s.width, 2 * s.width)
    likelihood = likelihoods.MixtureOfDiscretizedLogistics(torch.nn.Identity(), s.components, shape[0], s.levels)
    likelihood.net = nn.residual_decoder(latent, (likelihood.outputs, *shape[1:]), channels=widths[::-1])
    encoder = nn.residual_encoder(shape, 2 * latent, channels=widths)
    return VAE(priors.StandardNormal(latent), likelihood, posteriors.DiagonalNormal(encoder))


def compute(s: Settings, workspace: Workspace, row: str, seed: int) -> dict[str, Any]:
    """Trains one pair and evaluates it on the first test images."""
    source = write_discs(workspace.folder / "discs.npz") if s.data == "discs" else s.data
    images, valid, test = data.load(source, workspace.root, flat=False)
    torch.manual_seed(seed)
    vae = build_pair(s, row, images)
    folder = dataclasses.replace(workspace, folder=workspace.folder / "run")
    trained = cells.train(
        vae, images.head(s.num_train), valid.head(s.num_test), folder, epochs=s.epochs,
        lr=s.lr, objective=objectives.ELBO(free_bits=s.free_bits), batch_size=s.batch_size, clip=s.clip, seed=seed,
    )  # fmt: skip
    pair = trained.model, trained.guide
    drawn = generate.samples(*pair, test[:1].to(workspace.device or "cpu"), 16, seed=seed)
    np.save(workspace.folder / "samples.npy", drawn.cpu().numpy())
    est = log_marginal(*pair, test.head(s.num_test), num_particles=s.particles, seed=seed, proposal="guide")
    numbers = {
        "latents": sum(s.blocks) if row == "VDVAE" else 1,
        "parameters": sum(p.numel() for p in vae.parameters()),
    }
    return cells.estimate_summary(est) | cells.training_summary(trained) | numbers


def table(found: Cells) -> str:
    """One row per kind."""
    rows = {name: r for (name,), r in cells.group_cells(found, "row").items()}
    plain = rows.get("VAE")
    header = ("", "seeds", "latents", "bits per dim", "test NLL", "ELBO", "gain on the VAE", "weights", "CPU ms/step")
    lines = []
    for name, r in rows.items():
        lines.append((
            name, len(r), f"{cells.mean(r, 'latents'):.0f}", f"{cells.mean(r, 'bits_per_dim'):.3f}",
            f"{cells.mean(r):.2f} ± {cells.standard_error(r):.2f}", f"{cells.mean(r, 'elbo'):.2f}",
            cells.compare_rows(r, plain) if plain and r is not plain else "",
            f"{cells.mean(r, 'parameters') / 1e3:.0f} k", f"{cells.mean(r, 'cpu_ms_per_step'):.1f}",
        ))  # fmt: skip
    return cells.markdown(header, lines)


def draw_figure(found: Cells, folder: Path) -> None:
    """Sixteen samples per row, for the first seed."""
    rows = {}
    for (name,), r in cells.group_cells(found, "row").items():
        path = Path(r[0]["folder"]) / "samples.npy"
        if path.exists():
            rows[name] = np.load(path)
    if rows:
        images = np.stack(list(rows.values()))
        image_grid(images, images.shape[2:], row_titles=list(rows)).savefig(folder / "samples.png")


def main(args: list[str] | None = None) -> None:
    """Computes the table and draws the figure."""
    found, folder = cells.run("vdvae", Settings, ("row", "seed"), compute, table, SMOKE, __doc__, args)
    draw_figure(found, folder)


if __name__ == "__main__":
    main()
