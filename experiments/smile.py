"""Attribute vectors in a convolutional VAE: held-out images are moved along the vector of an attribute, and the effect
is measured. The vector is cov(E_q[z | x], a) / var(a) over the training data; images without the attribute are moved by
0.5, 1 and 1.5 times the vector, encoded again, and moved back. A small network trained on real images, independent of
the VAE, classifies the attribute; ink is measured, in units of two standard deviations. Identity is measured orthogonal
to the vector: the distance of an image's encoding from that of its original, in units of the distance between two test
images, and how often the original is the nearest of all. Rows: smiles (or celeba), a 3 to an 8, ink."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from experiments import cells
from experiments.cells import Cells, Workspace
from ppvae import VAE, data, generate, likelihoods, nn, posteriors, priors
from ppvae.plots import image_grid

STAGES = ("rebuilt", "moved 1.5", "and back")
AMOUNTS = (0.0, 0.5, 1.0, 1.5)
MAX_TRAIN = 20_000  # training images for the vector and the classifier


@dataclass(frozen=True)
class Settings:
    """The VAE, its training budget, and the number of held-out images."""

    rows: tuple[str, ...] = ("smiles", "3-to-8", "ink")
    seeds: tuple[int, ...] = (0,)
    latent: int = 32
    channels: tuple[int, ...] = (32, 64, 64)  # the first of them, down to a size of 4x4
    steps: int = 3500
    batch_size: int = 100
    lr: float = 1e-3
    num_test: int = 1000
    judge_epochs: int = 15


SMOKE = {"rows": ("3-to-8", "ink"), "latent": 4, "channels": (4,), "steps": 13, "judge_epochs": 1}


def load_labelled(row: str, split: Any, count: int) -> tuple[Tensor, Tensor]:
    """The relevant ones of the first images, [N, C, H, W], and their attribute [N]: 0 or 1, or ink."""
    split = split.head(count).fixed(0)
    x, labels = split.read(), split.attributes["Smiling"] if row == "celeba" else split.labels
    if row == "3-to-8":
        chosen = (labels == 3) | (labels == 8)
        return x[chosen], (labels[chosen] == 8).float()
    return x, ink(x) if row == "ink" else labels.float()


def ink(x: Tensor) -> Tensor:
    """The mean pixel of digits, centred, in units of two standard deviations."""
    return (x.flatten(1).mean(1) - 0.3165) / 0.063


def train_classifier(s: Settings, x: Tensor, a: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
    """A classifier of the attribute trained on real images; returns 0 or 1 per image."""
    torch.manual_seed(seed)
    net = nn.conv_encoder(x.shape[1:], 1, channels=(16, 32), hidden=64)
    adam = torch.optim.Adam(net.parameters(), 1e-3, weight_decay=1e-3)
    for rows in (rows for _ in range(s.judge_epochs) for rows in torch.randperm(len(x)).split(s.batch_size)):
        adam.zero_grad()
        binary_cross_entropy_with_logits(net(x[rows]).squeeze(-1), a[rows]).backward()
        adam.step()
    return torch.no_grad()(lambda images: (net(images).squeeze(-1) > 0).float())


def compute(s: Settings, workspace: Workspace, row: str, seed: int) -> dict[str, Any]:
    """Trains a VAE without labels, computes the vector, and measures moved held-out images."""
    name = row if row in data.named.NAMES else "digits"
    train, valid, test = data.load(name, workspace.root, dequantize=True, flat=False)
    torch.manual_seed(seed)
    shape = train.event_shape
    channels = s.channels[: int(math.log2(shape[-1])) - 2]
    encoder = nn.conv_encoder(shape, 2 * s.latent, channels, 256)
    decoder = nn.conv_decoder(s.latent, shape, channels[::-1], 256)
    nn.set_output_bias(decoder, train.head(1000).fixed(0).read().mean((0, 2, 3)))
    likelihood = likelihoods.Normal(decoder, scale="learned")
    torch.nn.init.constant_(likelihood.log_scale, math.log(0.1))  # with an initial scale of 1, most of z is never used
    vae = VAE(priors.StandardNormal(s.latent), likelihood, posteriors.DiagonalNormal(encoder))
    epochs = math.ceil(s.steps * s.batch_size / len(train))
    trained = cells.train(vae, train, valid, workspace, epochs=epochs, lr=s.lr, batch_size=s.batch_size, seed=seed)
    pair = trained.model, trained.guide
    x, a = load_labelled(row, train, MAX_TRAIN)
    vector = generate.attribute_vector(*pair, x, a)
    says = ink if row == "ink" else train_classifier(s, x, a, seed)
    x, a = load_labelled(row, test, s.num_test)
    has = a > 0
    rebuilt = generate.moved(*pair, x, vector, (0.0,))[:, 0]
    there = generate.moved(*pair, x[~has], vector, AMOUNTS)
    back = generate.moved(*pair, there[:, -1], vector, [-t for t in AMOUNTS[1:]])
    np.save(workspace.folder / "moved.npy", torch.cat([there, back], 1)[:8].numpy())
    shown = {"real without": x[~has], "real with": x[has]}
    shown |= {"rebuilt without": rebuilt[~has], "rebuilt with": rebuilt[has]}
    shown |= {f"moved {t:g}": there[:, i] for i, t in enumerate(AMOUNTS) if t} | {"and back": back[:, -1]}
    shown |= {"with, moved -1.5": generate.moved(*pair, x[has], vector, (-1.5,))[:, 0]}
    result = {f"says {key}": float(says(images).mean()) for key, images in shown.items()}

    def outside(images: Tensor) -> Tensor:
        z, unit = generate.posterior_means(*pair, images)["z"], vector / vector.norm()
        return z - (z @ unit)[:, None] * unit

    own, mine = outside(x), torch.arange(len(x))[~has]
    typical = torch.cdist(own, own).sum() / (len(own) * (len(own) - 1))
    for key, images in zip(STAGES, (rebuilt[~has], there[:, -1], back[:, -1]), strict=True):
        far = torch.cdist(outside(images), own)
        result[f"away {key}"] = float(far.gather(1, mine[:, None]).mean() / typical)
        result[f"itself {key}"] = float((far.argmin(1) == mine).float().mean())
    return (
        cells.training_summary(trained)
        | result
        | {"digest": test.digest, "judged": len(x), "without": int((~has).sum())}
    )


def table(found: Cells) -> str:
    """The attribute of real, reconstructed and moved images, and the preserved identity."""
    keys = [key for key in found[0]["result"] if key.startswith("says")]
    says, stays = [], []
    for (row,), r in cells.group_cells(found, "row").items():
        form = "{:+.2f}" if row == "ink" else "{:.1%}"
        says.append((row, *(form.format(cells.mean(r, key)) for key in keys)))
        parts = [f"{cells.mean(r, f'away {k}'):.2f}, {cells.mean(r, f'itself {k}'):.0%}" for k in STAGES]
        stays.append((row, r[0]["result"]["without"], r[0]["result"]["judged"], *parts))
    header = ["has it, says the judge", *(key.removeprefix("says ") for key in keys)]
    second = ["away from itself, nearest is itself", "images", "among", *STAGES]
    return cells.markdown(header, says) + "\n\n" + cells.markdown(second, stays)


def draw_figures(found: Cells, folder: Path) -> None:
    """The first held-out images without the attribute, moved there and back; one figure per row."""
    titles = [*(f"+{t:g}" if t else "reconstructed" for t in AMOUNTS), *(f"back {t:g}" for t in AMOUNTS[1:])]
    for (row,), r in cells.group_cells(found, "row").items():
        if (path := Path(r[0]["folder"]) / "moved.npy").exists():
            image_grid(np.load(path), np.load(path).shape[2:], col_titles=titles).savefig(folder / f"{row}.png")


def main(args: list[str] | None = None) -> None:
    """Computes the tables and draws the figures."""
    draw_figures(*cells.run("smile", Settings, ("row", "seed"), compute, table, SMOKE, __doc__, args))


if __name__ == "__main__":
    main()
