"""Making a face smile: held-out images moved along the vector of an attribute in a convolutional VAE, and measured. The
vector is cov(E_q[z | x], a) / var(a) over the training data; images without the attribute are moved by 0.5, 1 and 1.5
of it, encoded again, and moved back. A judge that knows nothing of the VAE says how often an image has it: a small
network trained on real images; ink is measured, one for two standard deviations. Outside the vector's direction a
moved image should still be itself: how far its encoding is from the original's, in units of the distance of two test
images, and how often the original is the nearest of all. Rows: smiles (or celeba), a 3 to an 8, ink.
"""

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
from experiments.cells import Cells, Here
from ppvae import VAE, data, generate, likelihoods, nn, posteriors, priors
from ppvae.plots import image_grid

STAGES = ("rebuilt", "moved 1.5", "and back")
AMOUNTS = (0.0, 0.5, 1.0, 1.5)
MOST = 20_000  # training images that the vector and the judge come from


@dataclass(frozen=True)
class Settings:
    """The VAE, its budget, and how many held-out images are moved."""

    rows: tuple[str, ...] = ("smiles", "3-to-8", "ink")
    seeds: tuple[int, ...] = (0,)
    latent: int = 32
    channels: tuple[int, ...] = (32, 64, 64)  # as many of them as leave 4x4
    steps: int = 3500
    batch_size: int = 100
    lr: float = 1e-3
    num_test: int = 1000
    judge_epochs: int = 15


SMOKE = {"rows": ("3-to-8", "ink"), "latent": 4, "channels": (4,), "steps": 13, "judge_epochs": 1}


def labelled(row: str, split: Any, count: int) -> tuple[Tensor, Tensor]:
    """Of the first images those that count, [N, C, H, W], and their attribute [N]: 0 or 1, or ink."""
    split = split.head(count).fixed(0)
    x, labels = split.read(), split.attributes["Smiling"] if row == "celeba" else split.labels
    if row == "3-to-8":
        chosen = (labels == 3) | (labels == 8)
        return x[chosen], (labels[chosen] == 8).float()
    return x, ink(x) if row == "ink" else labels.float()


def ink(x: Tensor) -> Tensor:
    """The mean pixel of digits, from its mean and in units of two of its standard deviations."""
    return (x.flatten(1).mean(1) - 0.3165) / 0.063


def judge(s: Settings, x: Tensor, a: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
    """A network trained to see the attribute in real images: says 0 or 1 for each."""
    torch.manual_seed(seed)
    net = nn.conv_encoder(x.shape[1:], 1, channels=(16, 32), hidden=64)
    adam = torch.optim.Adam(net.parameters(), 1e-3, weight_decay=1e-3)
    for rows in (rows for _ in range(s.judge_epochs) for rows in torch.randperm(len(x)).split(s.batch_size)):
        adam.zero_grad()
        binary_cross_entropy_with_logits(net(x[rows]).squeeze(-1), a[rows]).backward()
        adam.step()
    return torch.no_grad()(lambda images: (net(images).squeeze(-1) > 0).float())


def compute(s: Settings, here: Here, row: str, seed: int) -> dict[str, Any]:
    """Trains a VAE without labels, finds the vector, moves held-out images, measures."""
    name = row if row in data.named.NAMES else "digits"
    train, valid, test = data.load(name, here.root, dequantize=True, flat=False)
    torch.manual_seed(seed)
    shape = train.event_shape
    channels = s.channels[: int(math.log2(shape[-1])) - 2]
    encoder = nn.conv_encoder(shape, 2 * s.latent, channels, 256)
    decoder = nn.conv_decoder(s.latent, shape, channels[::-1], 256)
    nn.set_output_bias(decoder, train.head(1000).fixed(0).read().mean((0, 2, 3)))
    likelihood = likelihoods.Normal(decoder, scale="learned")
    torch.nn.init.constant_(likelihood.log_scale, math.log(0.1))  # from 1, most of z is never used
    vae = VAE(priors.StandardNormal(s.latent), likelihood, posteriors.DiagonalNormal(encoder))
    epochs = math.ceil(s.steps * s.batch_size / len(train))
    trained = cells.train(vae, train, valid, here, epochs=epochs, lr=s.lr, batch_size=s.batch_size, seed=seed)
    pair = trained.model, trained.guide
    x, a = labelled(row, train, MOST)
    vector = generate.attribute_vector(*pair, x, a)
    says = ink if row == "ink" else judge(s, x, a, seed)
    x, a = labelled(row, test, s.num_test)
    has = a > 0
    rebuilt = generate.moved(*pair, x, vector, (0.0,))[:, 0]
    there = generate.moved(*pair, x[~has], vector, AMOUNTS)
    back = generate.moved(*pair, there[:, -1], vector, [-t for t in AMOUNTS[1:]])
    np.save(here.folder / "moved.npy", torch.cat([there, back], 1)[:8].numpy())
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
    return cells.of_run(trained) | result | {"digest": test.digest, "judged": len(x), "without": int((~has).sum())}


def table(found: Cells) -> str:
    """What the judge says of real, rebuilt and moved images, and how much of an image stays."""
    keys = [key for key in found[0]["result"] if key.startswith("says")]
    says, stays = [], []
    for (row,), r in cells.collected(found, "row").items():
        form = "{:+.2f}" if row == "ink" else "{:.1%}"
        says.append((row, *(form.format(cells.mean(r, key)) for key in keys)))
        parts = [f"{cells.mean(r, f'away {k}'):.2f}, {cells.mean(r, f'itself {k}'):.0%}" for k in STAGES]
        stays.append((row, r[0]["result"]["without"], r[0]["result"]["judged"], *parts))
    header = ["has it, says the judge", *(key.removeprefix("says ") for key in keys)]
    second = ["away from itself, nearest is itself", "images", "among", *STAGES]
    return cells.markdown(header, says) + "\n\n" + cells.markdown(second, stays)


def picture(found: Cells, folder: Path) -> None:
    """The first held-out images without the attribute, moved there and back: one picture a row; all is generated."""
    titles = [*(f"+{t:g}" if t else "rebuilt" for t in AMOUNTS), *(f"back {t:g}" for t in AMOUNTS[1:])]
    for (row,), r in cells.collected(found, "row").items():
        if (path := Path(r[0]["folder"]) / "moved.npy").exists():
            image_grid(np.load(path), np.load(path).shape[2:], col_titles=titles).savefig(folder / f"{row}.png")


def main(args: list[str] | None = None) -> None:
    """Fills the tables and draws the pictures."""
    picture(*cells.run("smile", Settings, ("row", "seed"), compute, table, SMOKE, __doc__, args))


if __name__ == "__main__":
    main()
