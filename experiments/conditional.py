"""A conditional VAE of images with labels (Sohn et al. 2015), compared with the unconditional VAE: log p(x | y) of the
label of an image, and log p(x) = log sum_y p(y) p(x | y). The difference of the two is log p(y | x) - log p(y), at most
2.3 nats for ten equally frequent classes. The most likely label under p(y) p(x | y) is a classifier by Bayes' rule."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.cells import Cells, Workspace, estimate_summary, group_cells, markdown, mean, run, train, values
from ppvae import VAE, data, generate, likelihoods, log_marginal, nn, plots, posteriors, priors
from ppvae.evaluation import Estimate
from ppvae.models import ConditionalVAE

PLAIN, GIVEN = "VAE", "conditional VAE"


@dataclass(frozen=True)
class Settings:
    """Sizes and training budget, the same for both models."""

    models: tuple[str, ...] = (PLAIN, GIVEN)
    seeds: tuple[int, ...] = (0, 1, 2)
    data: str = "mnist"
    latent: int = 20
    hidden: tuple[int, ...] = (200,)
    epochs: int = 10
    lr: float = 1e-3
    num_test: int = 300
    particles: int = 400


SMOKE = {"data": "digits", "seeds": (0,), "latent": 4, "hidden": (32,), "epochs": 2, "num_test": 20, "particles": 25}


def compute(s: Settings, workspace: Workspace, model: str, seed: int) -> dict[str, Any]:
    """Trains one model and evaluates it; the conditional one gives log p(x | y) for every label."""
    fitted, valid, test = data.load(s.data, workspace.root, binarize="fixed")
    labels = [part.labels.long() for part in (fitted, valid, test)]
    classes, dims = int(labels[0].max()) + 1, fitted.shape[1]
    extra = classes if model == GIVEN else 0
    torch.manual_seed(seed)
    decoder = nn.mlp(s.latent + extra, dims, hidden=s.hidden)
    nn.set_output_bias(decoder, fitted.read().mean(0).clamp(1e-3, 1 - 1e-3).logit())
    encoder = nn.mlp(dims + extra, 2 * s.latent, hidden=s.hidden)
    parts = priors.StandardNormal(s.latent), likelihoods.Bernoulli(decoder), posteriors.DiagonalNormal(encoder)
    images = test.read()[: s.num_test]
    if model == PLAIN:
        vae = VAE(*parts)
        trained = train(vae, fitted, valid, workspace, epochs=s.epochs, lr=s.lr, seed=seed)
        est = log_marginal(trained.model, trained.guide, images, num_particles=s.particles, seed=seed, proposal="guide")
        return estimate_summary(est) | {"marginal": -est.nll}
    vae = ConditionalVAE(*parts, nn.Labels(classes))
    (x, held), (y, of_held, of_test) = (fitted, valid), labels
    trained = train(vae, (x, y), (held, of_held), workspace, epochs=s.epochs, lr=s.lr, seed=seed)
    pair, of_test = (trained.model, trained.guide), of_test[: s.num_test]

    def of_label(label: Tensor) -> Estimate:
        return log_marginal(*pair, (images, label), num_particles=s.particles, seed=seed, proposal="guide")

    each = torch.stack([of_label(torch.full_like(of_test, c)).log_px for c in range(classes)], -1)
    joint = each + (torch.bincount(y, minlength=classes) / len(y)).log()
    asked = images[:1].expand(10 * classes, -1), torch.arange(classes).repeat_interleave(10)
    np.savez(workspace.folder / "shown.npz", drawn=generate.samples(*pair, asked, 10 * classes, seed=seed).cpu())
    return estimate_summary(of_label(of_test)) | {
        "marginal": float(joint.logsumexp(-1).mean()),
        "accuracy": float((joint.argmax(-1) == of_test).double().mean()),
    }


def table(cells: Cells) -> str:
    """One row per model; ± is over seeds."""
    header = (
        "model",
        "seeds",
        "log p(x given label)",
        "log p(x)",
        "information of the label",
        "accuracy",
        "unreliable",
    )
    lines = []
    for (model,), r in group_cells(cells, "model").items():
        marginal, given = values(r, "marginal"), model == GIVEN
        spread = f" ± {statistics.stdev(marginal) / len(marginal) ** 0.5:.2f}" if len(marginal) > 1 else ""
        label = (f"{-mean(r):.2f}", f"{-mean(r) - mean(r, 'marginal'):.2f}") if given else ("", "")
        right = f"{mean(r, 'accuracy'):.1%}" if given else ""
        doubt = f"{100 * mean(r, 'unreliable') / mean(r, 'num_data'):.0f} %"
        lines.append((model, len(r), label[0], f"{mean(r, 'marginal'):.2f}{spread}", label[1], right, doubt))
    return markdown(header, lines)


def main(args: list[str] | None = None) -> None:
    """Computes the table and draws ten images of each class, of the first seed."""
    cells, folder = run("conditional", Settings, ("model", "seed"), compute, table, SMOKE, __doc__, args)
    shown = [path for c in cells if (path := Path(c["folder"]) / "shown.npz").exists()]
    if shown:
        drawn = np.load(shown[0])["drawn"]
        side = int(drawn.shape[1] ** 0.5)
        titles = [str(label) for label in range(len(drawn) // 10)]
        grid = plots.image_grid(drawn.reshape(-1, 10, drawn.shape[1]), (1, side, side), row_titles=titles)
        grid.savefig(folder / "conditional.png")


if __name__ == "__main__":
    main()
