"""A semi-supervised VAE (M2) with few labelled images: the accuracy of q(y | x) on test images, compared with the same
small convolutional classifier trained on the labelled images alone; both see labelled images rotated, scaled and
shifted at random. Kingma et al. 2014 report 88.0 % with 100 labels, for a perceptron without augmentation. Settings
were chosen on the validation images."""

from __future__ import annotations

import functools
import statistics
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import cells
from experiments.cells import Cells, Workspace, estimate_summary, group_cells, markdown, mean, run
from ppvae import data, likelihoods, log_marginal, nn, objectives, posteriors, priors
from ppvae.models import SemiSupervisedVAE
from ppvae.objectives.auxiliary import AuxiliaryLoss


@dataclass(frozen=True)
class Settings:
    """The data, the networks, and the weight of labels."""

    data: str = "mnist"
    labels: tuple[int, ...] = (100,)
    seeds: tuple[int, ...] = (0, 1, 2)
    latent: int = 50
    hidden: int = 200
    channels: tuple[int, ...] = (16, 32)  # of the classifier
    num_train: int = 50_000  # images, most without a label
    share: float = 0.25  # of labelled rows in an epoch, reached by repeating labelled images
    weight: float = 100.0  # of log q(label | x) on a labelled row
    epochs: int = 5
    batch_size: int = 50
    lr: float = 1e-3
    num_valid: int = 1000
    num_test: int = 1000
    particles: int = 50


SMOKE = {
    "data": "digits", "labels": (50,), "seeds": (0,), "latent": 4, "hidden": 32, "channels": (8,), "epochs": 2,
    "num_test": 30, "particles": 25,
}  # fmt: skip


class LabelledEncoder(torch.nn.Module):
    """A network of [x, y] with one hidden layer, tanh(A x + B y + a), in which A x is computed once for all classes."""

    def __init__(self, inputs: int, classes: int, outputs: int, hidden: int):
        super().__init__()
        self.of_x, self.of_y = torch.nn.Linear(inputs, hidden), torch.nn.Linear(classes, hidden, bias=False)
        self.rest = torch.nn.Linear(hidden, outputs)
        nn.glorot(self)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.rest(torch.tanh(self.of_x(x) + self.of_y(context)))


def hide_labels(truth: Tensor, count: int, classes: int, seed: int) -> Tensor:
    """The labels [N] of `count` images, equally many per class, and -1 for the others."""
    order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(seed))
    kept = torch.cat([order[truth[order] == c][: count // classes] for c in range(classes)])
    return torch.full_like(truth, -1).index_copy(0, kept, truth[kept])


def augment(x: Tensor, size: tuple[int, ...], seed: int) -> Tensor:
    """Flat images of a size, rotated by about 8 degrees, scaled by a tenth and shifted by a twentieth, at random."""
    g = torch.Generator().manual_seed(seed)
    turn, (wide, high) = 0.15 * torch.randn(len(x), generator=g), 1 + 0.1 * torch.randn(2, len(x), generator=g)
    across, down = 0.1 * torch.randn(2, len(x), generator=g)
    rows = [wide * turn.cos(), -turn.sin(), across, turn.sin(), high * turn.cos(), down]
    grid = F.affine_grid(torch.stack(rows, -1).reshape(-1, 2, 3), [len(x), *size], align_corners=False)
    return F.grid_sample(x.reshape(-1, *size), grid, align_corners=False).reshape(len(x), -1)


def accuracy(net: torch.nn.Module, images: Any) -> float:
    """The share of images whose most likely class is correct."""
    with torch.no_grad():
        found = net(images.read().to(next(net.parameters()).device)).argmax(-1)
    return float((found.cpu() == images.labels.long()).double().mean())


def train_classifier(s: Settings, net: torch.nn.Module, x: Tensor, label: Tensor) -> None:
    """Trains a classifier on the labelled images alone."""
    adam = torch.optim.Adam(net.parameters(), lr=s.lr)
    for rows in [part for _ in range(5) for part in torch.randperm(len(x)).split(s.batch_size)]:
        adam.zero_grad()
        F.cross_entropy(net(x[rows]), label[rows]).backward()
        adam.step()


def compute(s: Settings, workspace: Workspace, label: int, seed: int) -> dict[str, Any]:
    """Trains a classifier, and a VAE initialised with it; each copy of an image is binarised anew."""
    every, valid, test = data.load(s.data, workspace.root, binarize="dynamic")
    train = every.head(s.num_train)
    truth, classes, features = train.labels.long(), int(train.labels.max()) + 1, train.shape[1]
    known = hide_labels(truth, label, classes, seed)
    rows = (known >= 0).nonzero()[:, 0]
    often = max(1, round(s.share * len(train) / len(rows) / (1 - s.share)))
    torch.manual_seed(seed)
    network = functools.partial(nn.conv_encoder, train.event_shape, classes, s.channels, hidden=128, flat=True)
    copies = rows.repeat(often)
    more = augment(train.as_subclass(Tensor)[copies], train.event_shape, seed).clamp(0, 1).bernoulli()
    x, y = torch.cat([train.read(), more]), torch.cat([known, known[copies]])
    vae = SemiSupervisedVAE(
        priors.OneHot(classes),
        priors.StandardNormal(s.latent),
        likelihoods.Bernoulli(nn.mlp(s.latent + classes, features, hidden=(s.hidden,))),
        posteriors.DiagonalNormal(LabelledEncoder(features, classes, 2 * s.latent, s.hidden)),
        posteriors.OneHot(network(), classes),
    )
    by_itself = network()
    train_classifier(s, by_itself, more, known[copies])
    vae.classifier.net.load_state_dict(by_itself.state_dict())
    held = valid.head(s.num_valid)
    trained = cells.train(
        vae, (x, y), (held, torch.full((len(held),), -1)), workspace, epochs=s.epochs, lr=s.lr,
        objective=AuxiliaryLoss(objectives.ELBO(), vae.log_label, s.weight), batch_size=s.batch_size, seed=seed,
    )  # fmt: skip
    est = log_marginal(
        trained.model, trained.guide, test.head(s.num_test), num_particles=s.particles, seed=seed, proposal="guide"
    )
    found = {"accuracy": accuracy(vae.classifier.net, test), "valid_accuracy": accuracy(vae.classifier.net, valid)}
    return estimate_summary(est) | cells.training_summary(trained) | found | {"alone": accuracy(by_itself, test)}


def table(found: Cells) -> str:
    """One row per number of labels."""
    lines = []
    for (label,), r in group_cells(found, "label").items():
        shares = [100 * share for share in cells.values(r, "accuracy")]
        spread = f" ± {statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
        figures = f"{100 * mean(r, 'alone'):.1f} %", f"{mean(r):.2f}", f"{mean(r, 'training_cpu_seconds') / 60:.1f}"
        lines.append((label, len(r), f"{statistics.fmean(shares):.1f}{spread} %", *figures))
    header = ("labels", "seeds", "accuracy", "without the VAE", "test NLL", "CPU minutes")
    return markdown(header, lines) + "\n\n± is the standard deviation over seeds."


def main(args: list[str] | None = None) -> None:
    """Computes the table."""
    run("semi_supervised", Settings, ("label", "seed"), compute, table, SMOKE, __doc__, args)


if __name__ == "__main__":
    main()
