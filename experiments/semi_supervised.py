"""A semi-supervised VAE (M2) on images of which few have their label: how many of the test images q(y | x) names right,
beside the same classifier trained on the labelled images alone. Kingma et al. 2014 report 88.0 % with 100 labels.
"""

from __future__ import annotations

import functools
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.cells import Cells, Here, collected, markdown, mean, of_estimate, run
from ppvae import data, fit, likelihoods, log_marginal, nn, objectives, posteriors, priors
from ppvae.models import SemiSupervisedVAE
from ppvae.objectives.plus import Plus


@dataclass(frozen=True)
class Settings:
    """The data, the networks, and what labels count for."""

    data: str = "mnist"
    labels: tuple[int, ...] = (100,)
    seeds: tuple[int, ...] = (0, 1, 2)
    latent: int = 50
    hidden: tuple[int, ...] = (500,)
    share: float = 0.1  # of the rows of an epoch that have a label: each labelled image is repeated so often
    weight: float = 50.0  # of log q(label | x) on a labelled row
    epochs: int = 50
    batch_size: int = 200
    lr: float = 1e-3
    num_test: int = 1000
    particles: int = 50


SMOKE = {
    "data": "digits", "labels": (50,), "seeds": (0,), "latent": 4, "hidden": (32,), "epochs": 2, "num_test": 30,
    "particles": 25,
}  # fmt: skip


def few_labels(truth: Tensor, count: int, classes: int, seed: int) -> Tensor:
    """The labels [N] with as many kept of each class, `count` in all, and -1 elsewhere."""
    order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(seed))
    kept = torch.cat([order[truth[order] == c][: count // classes] for c in range(classes)])
    label = torch.full_like(truth, -1)
    label[kept] = truth[kept]
    return label


def accuracy(classifier: torch.nn.Module, x: Tensor, truth: Tensor) -> float:
    """The share of images whose most likely class is the right one."""
    with torch.no_grad():
        found = classifier(x.to(next(classifier.parameters()).device)).argmax(-1)
    return float((found.cpu() == truth).double().mean())


def alone(s: Settings, classifier: torch.nn.Module, x: Tensor, label: Tensor) -> None:
    """Trains a classifier on the labelled images alone."""
    adam = torch.optim.Adam(classifier.parameters(), lr=s.lr)
    for _ in range(300):
        adam.zero_grad()
        torch.nn.functional.cross_entropy(classifier(x), label).backward()
        adam.step()


def compute(s: Settings, here: Here, label: int, seed: int) -> dict[str, Any]:
    """Trains one VAE and one classifier by itself; both are tested on the same images."""
    train, _, test = data.load(s.data, here.root, binarize="fixed")
    x, truth, classes = train.read(), train.labels.long(), int(train.labels.max()) + 1
    known = few_labels(truth, label, classes, seed)
    rows = (known >= 0).nonzero()[:, 0]
    often = max(1, round(s.share * len(x) / len(rows)))
    every = torch.cat([torch.arange(len(x)), rows.repeat(often - 1)])
    torch.manual_seed(seed)
    features = x.shape[1]
    vae = SemiSupervisedVAE(
        priors.OneHot(classes),
        priors.StandardNormal(s.latent),
        likelihoods.Bernoulli(nn.mlp(s.latent + classes, features, hidden=s.hidden)),
        posteriors.DiagonalNormal(nn.mlp(features + classes, 2 * s.latent, hidden=s.hidden)),
        posteriors.OneHot(nn.mlp(features, classes, hidden=s.hidden, activation=torch.nn.ReLU), classes),
    )
    by_itself = nn.mlp(features, classes, hidden=s.hidden, activation=torch.nn.ReLU)
    alone(s, by_itself, x[rows], known[rows])
    trained = fit(
        vae.model, vae.guide, (x[every], known[every]), objective=Plus(objectives.ELBO(), vae.log_label, s.weight),
        optimizer=functools.partial(torch.optim.Adam, lr=s.lr), epochs=s.epochs, batch_size=s.batch_size, seed=seed,
        device=here.device, directory=here.folder, resume=True,
    )  # fmt: skip
    held, right = test.read(), test.labels.long()
    est = log_marginal(trained.model, trained.guide, test[: s.num_test], num_particles=s.particles, seed=seed)
    return of_estimate(est) | {
        "accuracy": accuracy(vae.classifier.net, held, right),
        "alone": accuracy(by_itself, held, right),
    }


def table(cells: Cells) -> str:
    """One row a number of labels."""
    lines = []
    for (label,), r in collected(cells, "label").items():
        found = [100 * c["result"]["accuracy"] for c in r]
        spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
        lines.append((label, len(r), f"{mean(r, 'accuracy'):.1%}{spread}", f"{mean(r, 'alone'):.1%}", f"{mean(r):.2f}"))
    return markdown(("labels", "seeds", "accuracy", "without the VAE", "test NLL"), lines)


def main(args: list[str] | None = None) -> None:
    """Fills the table."""
    run("semi_supervised", Settings, ("label", "seed"), compute, table, SMOKE, __doc__, args)


if __name__ == "__main__":
    main()
