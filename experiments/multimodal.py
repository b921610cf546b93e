"""A binarised image and its label as two modalities: product of experts (Wu and Goodman 2018, arXiv 1802.05335)
compared with mixture of experts (Shi et al. 2019, arXiv 1911.03393).

An epoch contains every image three times, with its label, alone, and as the label alone, so that the guide learns every
combination. log p(label | image) = log p(image, label) - log p(image), log(1/10) = -2.30 by chance; accuracy is that of
argmax_y sum_k w_k p(y | z_k) for z_k drawn given the image. An image generated from a label is coherent if its nearest
training image has that label."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from experiments import cells
from experiments.cells import Cells, Workspace
from ppvae import data, generate, likelihoods, log_marginal, nn, objectives, posteriors, priors
from ppvae.inference import terms
from ppvae.models import MultimodalVAE, mixture_of_experts, product_of_experts
from ppvae.plots import image_grid


@dataclass(frozen=True)
class Settings:
    """The guides, the data and the networks."""

    guides: tuple[str, ...] = ("product", "mixture")
    seeds: tuple[int, ...] = (0, 1, 2)
    data: str = "mnist"
    latent: int = 20
    hidden: tuple[int, ...] = (200,)
    draws: int = 2
    steps: int = 4000
    batch_size: int = 100
    lr: float = 2e-3
    num_test: int = 1000
    particles: int = 300


SMOKE = {"data": "digits", "seeds": (0,), "latent": 4, "hidden": (16,), "steps": 15, "num_test": 20, "particles": 50}
EXPERTS = {"product": product_of_experts, "mixture": mixture_of_experts}
BOTH, IMAGE, LABEL = (True, True), (True, False), (False, True)
IMAGES_PER_LABEL = 8  # images sampled for each label


class LabelInput(nn.Labels):
    """A label v / 9 [..., 1] as a one-hot vector [..., 10]."""

    def forward(self, label: Tensor) -> Tensor:
        return super().forward((9 * label[..., 0]).round().long())


def with_modalities(x: Tensor, label: Tensor, *which: tuple[bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Images and labels (v / 9), once per combination of observed modalities."""
    present = torch.tensor(which).repeat_interleave(len(x), 0)
    return x.repeat(len(which), 1), label.reshape(-1, 1).float().repeat(len(which), 1) / 9, present


def label_probabilities(vae: MultimodalVAE, batch: tuple[Tensor, ...], particles: int = 100) -> Tensor:
    """p(label | image) of images alone, [batch, 10]."""
    with torch.no_grad():
        t = terms(vae.model, vae.guide, batch, particles)
        each = vae.likelihoods[1].net(t.guide["z"].value).softmax(-1)
        return (t.log_weight.softmax(0).unsqueeze(-1) * each).sum(0)


def compute(s: Settings, workspace: Workspace, guide: str, seed: int) -> dict[str, Any]:
    """Trains one pair; log p of both, of the image alone, and of each modality given the other."""
    train, valid, test = data.load(s.data, workspace.root, binarize="fixed")
    held = test.head(s.num_test)
    x, truth = held.read(), held.labels.long()
    torch.manual_seed(seed)
    dims = train.shape[1]
    decoder = nn.mlp(s.latent, dims, hidden=s.hidden)
    nn.set_output_bias(decoder, train.read().mean(0).clamp(1e-3, 1 - 1e-3).logit())
    image = nn.mlp(dims, 2 * s.latent, hidden=s.hidden)
    label = torch.nn.Sequential(LabelInput(10), nn.mlp(10, 2 * s.latent, hidden=(50,)))
    vae = MultimodalVAE(
        priors.StandardNormal(s.latent),
        [likelihoods.Bernoulli(decoder), likelihoods.Categorical(nn.mlp(s.latent, 10, hidden=(50,)), levels=10)],
        [posteriors.DiagonalNormal(image), posteriors.DiagonalNormal(label)],
        EXPERTS[guide],
    )
    seen, known = (with_modalities(d.read(), d.labels, BOTH, IMAGE, LABEL) for d in (train, valid))
    trained = cells.train(
        vae, seen, known, workspace, epochs=math.ceil(s.steps / math.ceil(len(seen[0]) / s.batch_size)), lr=s.lr,
        batch_size=s.batch_size, seed=seed, objective=objectives.ELBO(s.draws),
    )  # fmt: skip
    pair, of_image = (trained.model, trained.guide), with_modalities(x, truth, IMAGE)
    est = log_marginal(*pair, with_modalities(x, truth, BOTH), num_particles=s.particles, seed=seed, proposal="guide")
    alone = log_marginal(*pair, of_image, num_particles=s.particles, seed=seed, proposal="guide")
    torch.manual_seed(seed)
    found = label_probabilities(vae, of_image)
    every = torch.arange(10).repeat_interleave(IMAGES_PER_LABEL)
    given = with_modalities(x[:1].expand(len(every), -1), every, LABEL)
    drawn = generate.reconstructions(*pair, given, seed=seed)
    np.save(workspace.folder / "drawn.npy", drawn.reshape(10, IMAGES_PER_LABEL, *test.event_shape).numpy())
    near = KNeighborsClassifier(1).fit(train.read()[:5000].numpy(), train.labels[:5000].numpy())
    right = near.predict(torch.bernoulli(drawn, generator=torch.Generator().manual_seed(seed)).numpy()) == every.numpy()
    return cells.estimate_summary(est) | cells.training_summary(trained) | {
        "nll_image": alone.nll,
        "label_given_image": float((est.log_px - alone.log_px).mean()),
        "accuracy": float((found.argmax(-1) == truth).double().mean()),
        "coherence": float(right.mean()),
    }  # fmt: skip


def table(found: Cells) -> str:
    """One row per guide, compared with the product."""
    header = ("guide", "seeds", "-log p(image, label)", "ELBO", "-log p(image)", "log p(label given image)")
    header += ("accuracy", "coherent images", "unreliable", "gain on the product")
    lines, guides = [], cells.group_cells(found, "guide")
    for (guide,), r in guides.items():
        gain = cells.compare_rows(r, guides["product",]) if guide != "product" and ("product",) in guides else ""
        nats = [f"{cells.mean(r, key):.2f}" for key in ("elbo", "nll_image", "label_given_image")]
        shares = [f"{cells.mean(r, key):.1%}" for key in ("accuracy", "coherence")]
        untrusted = f"{cells.mean(r, 'unreliable') / cells.mean(r, 'num_data'):.0%}"
        total = f"{cells.mean(r):.2f} ± {cells.standard_error(r):.2f}"
        lines.append((guide, len(r), total, *nats, *shares, untrusted, gain))
    return cells.markdown(header, lines)


def draw_figure(found: Cells, folder: Path) -> None:
    """Images sampled given their label, one column per label, the first samples of each guide."""
    shown = {}
    for (guide,), r in cells.group_cells(found, "guide").items():
        path = Path(r[0]["folder"]) / "drawn.npy"
        if path.exists():
            shown |= {f"{guide} {i + 1}": row for i, row in enumerate(np.load(path).swapaxes(0, 1)[:4])}
    if shown:
        images = np.stack(list(shown.values()))
        fig = image_grid(images, images.shape[2:], row_titles=list(shown), col_titles=list("0123456789"))
        fig.savefig(folder / "given_label.png")


def main(args: list[str] | None = None) -> None:
    """Computes the table and draws the figure."""
    found, folder = cells.run("multimodal", Settings, ("guide", "seed"), compute, table, SMOKE, __doc__, args)
    draw_figure(found, folder)


if __name__ == "__main__":
    main()
