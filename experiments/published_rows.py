"""The rows of `published`: published figures, the pairs and data that they are for, and how each is trained."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor
from torch import nn as tnn

from experiments import iwae, table1
from ppvae import likelihoods, nn, objectives, posteriors, priors
from ppvae.models import VAE, Annealed, HierarchicalVAE


class Stage(NamedTuple):
    """One run of training; its learning rate falls to zero along a cosine unless `decay` is another schedule."""

    name: str
    objective: Callable[[], PyroELBO]
    epochs: int
    batch: int
    lr: float
    patience: int | None = None
    precision: str = "bf16"
    decay: Callable[[torch.optim.Optimizer], Any] | None = None

    @property
    def text(self) -> str:
        stop = f", best of validation (patience {self.patience})" if self.patience else ""
        return f"{self.name}: {self.epochs} epochs x {self.batch} at {self.lr:g}{stop}"


class Row(NamedTuple):
    """A published number, in nats or (`bits`) bits per dimension, the pair and data that it is for, and schedules."""

    published: float
    source: str
    pair: dict[str, Any]
    data: str
    binarize: str
    stages: tuple[Stage, ...]
    paper: tuple[Stage, ...]
    pythae: float | None = None
    factory: str = "ppvae.models:vae"
    bits: bool = False
    particles: int = 5000
    other: str = ""  # how the data differ from the published ones, where that may matter

    @property
    def family(self) -> str:
        """The pair and the data in a word, by which rows share stages."""
        sizes = "-".join(str(v["name"] if isinstance(v, dict) else v) for v in self.pair.values())
        return "".join(c for c in f"{self.data}-{self.binarize}-{sizes}" if c.isalnum() or c in "-.")


def two_layers(train: Tensor, hidden: tuple[int, ...] = (200, 200)) -> HierarchicalVAE:
    """The two-layer networks of Burda et al. 2016.

    Args:
        train: the training data.
        hidden: the widths of the encoder's first hidden layers.
    """
    pair = table1.build_pair(table1.Settings(hidden=hidden), 2, train.mean(0))
    assert isinstance(pair, HierarchicalVAE)
    return pair


def hamiltonian(train: Tensor, latent: int = 64, hidden: tuple[int, ...] = (450,), steps: int = 3) -> Annealed:
    """A Hamiltonian VAE (Caterini et al. 2018) on flat square images, its networks convolutional.

    Args:
        train: the training data.
        latent: the size of z.
        hidden: the width of the dense layer between convolutions and z, the first of these.
        steps: the number of leapfrog steps.
    """
    event = (1, *[int(train.shape[1] ** 0.5)] * 2)
    sizes: Any = {"channels": (16, 32), "hidden": hidden[0]}
    encoder = tnn.Sequential(tnn.Unflatten(-1, event), nn.conv_encoder(event, 2 * latent, **sizes))
    decoder = nn.conv_decoder(latent, event, channels=(32, 16), hidden=hidden[0])
    likelihood = likelihoods.Bernoulli(tnn.Sequential(decoder, tnn.Flatten(-3)))
    base = VAE(priors.StandardNormal(latent), likelihood, posteriors.DiagonalNormal(encoder))
    return Annealed(base.model, base.guide, train[:4], steps=steps, refresh=False)


def vae(draws: int, **options: Any) -> Callable[[], PyroELBO]:
    return functools.partial(objectives.ELBO, draws, **options)


def bound(draws: int, **options: Any) -> Callable[[], PyroELBO]:
    return functools.partial(objectives.IWAE, draws, **options)


def by_paper(name: str, objective: Callable[[], PyroELBO], batch: int = 20) -> tuple[Stage]:
    """The schedule of Burda et al. 2016: 3280 epochs in float32."""
    decay = iwae.stepwise_decay(iwae.PAPER)
    return (Stage(f"{name}, paper", objective, len(iwae.PAPER), batch, 1e-3, None, "float32", decay),)


def by_vamp_paper(warmup: int) -> tuple[Stage]:
    """The schedule of Tomczak and Welling 2018: early stopping, and a warm-up of beta in steps."""
    constant = functools.partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0)
    return (Stage("VAE-1, paper", vae(1, warmup=warmup), 2000, 100, 5e-4, 50, "float32", constant),)


DYNAMIC = ("mnist-59600", "dynamic")
ONE, TWO = {"latent": 50, "hidden": (200, 200)}, {"hidden": (200, 200)}
VAMP = {"latent": 40, "hidden": (300, 300)}
FREY = VAMP | {"likelihood": {"name": "DiscretizedLogistic"}}
PSEUDO = {"prior": {"name": "VampPrior.from_data", "components": 500}}
SPHERE = {"latent": 11, "hidden": (256, 128)}
SPHERE |= {"prior": {"name": "UniformOnSphere"}, "posterior": {"name": "PowerSpherical"}}
BURDA, TOMCZAK = "Burda et al. 2016 (arXiv 1509.00519)", "Tomczak and Welling 2018 (arXiv 1705.07120)"
RAINFORTH, DAVIDSON = "Rainforth et al. 2018 (arXiv 1802.04537)", "Davidson et al. 2018 (arXiv 1804.00891)"
CATERINI = "Caterini et al. 2018 (arXiv 1805.11328)"
IMAGES = "other images"
TWO_LAYERS = "experiments.published_rows:two_layers"

VAE900 = Stage("VAE-1-900", vae(1, gradient="stl"), 900, 100, 2e-3)
VAE600 = VAE900._replace(name="VAE-1-600", epochs=600)
VAE5 = Stage("VAE-5", vae(5, gradient="stl"), 150, 100, 1e-3)
VAE50 = Stage("VAE-50", vae(50, gradient="stl"), 20, 50, 5e-4)
IWAE5 = Stage("IWAE-5", bound(5, gradient="dreg"), 200, 100, 1e-3)
IWAE50 = Stage("IWAE-50", bound(50, gradient="dreg"), 60, 50, 5e-4)
CIWAE = functools.partial(objectives.CIWAE, 0.05, 64)
PIWAE = functools.partial(objectives.PIWAE, 8, 8)
STATIC = Stage("VAE-1-600", vae(1, gradient="stl"), 600, 100, 1e-3, 60)
FREY1 = Stage("VAE-1", vae(1), 600, 100, 1e-3, 150, "float32")
FREY900 = FREY1._replace(name="VAE-1-900", epochs=900)  # validation ELBO at seed 0: -1800.1, after 600 -1814.3


def burda(published: float, name: str, stages: tuple[Stage, ...], layers: int = 1) -> Row:
    """A cell of Burda's Table 1 on dynamically binarised MNIST."""
    kind, draws = name.split("-")
    paper = by_paper(name, (vae if kind == "VAE" else bound)(int(draws)))
    factory, pair = ("ppvae.models:vae", ONE) if layers == 1 else (TWO_LAYERS, TWO)
    return Row(published, BURDA, pair, *DYNAMIC, stages, paper, factory=factory)


ROWS = {
    "frey": Row(4.63, TOMCZAK, FREY, "freyfaces", "none", (FREY1,), by_vamp_paper(1600), bits=True),
    "frey-VampPrior": Row(
        4.57, TOMCZAK, FREY | PSEUDO, "freyfaces", "none", (FREY900,), by_vamp_paper(1600), bits=True
    ),
    "S-VAE": Row(
        93.16, DAVIDSON, SPHERE, *DYNAMIC, (Stage("S-VAE", vae(1, analytic_kl=True), 600, 100, 2e-3),),
        (Stage("S-VAE, paper", vae(1, analytic_kl=True), 1000, 64, 1e-3, 50, "float32"),), 93.13, particles=500,
    ),
    "1-VAE-1": burda(86.76, "VAE-1", (VAE900,)),
    "1-IWAE-5": burda(85.54, "IWAE-5", (VAE900, IWAE5)),
    "1-VAE-5": burda(86.47, "VAE-5", (VAE900, VAE5)),
    "1-IWAE-50": burda(84.78, "IWAE-50", (VAE900, IWAE5, IWAE50)),
    "1-VAE-50": burda(86.35, "VAE-50", (VAE900, VAE5, VAE50)),
    "CIWAE": Row(
        84.57, RAINFORTH, ONE, *DYNAMIC, (VAE900, IWAE5, IWAE50, Stage("CIWAE", functools.partial(CIWAE,
        gradient="dreg"), 15, 50, 5e-4)), by_paper("CIWAE", CIWAE, 64), 84.74,
    ),
    "MIWAE": Row(
        84.97, RAINFORTH, ONE, *DYNAMIC, (VAE900, IWAE5, IWAE50, Stage("MIWAE", functools.partial(objectives.MIWAE, 8,
        8, gradient="dreg"), 15, 50, 5e-4)), by_paper("MIWAE", functools.partial(objectives.MIWAE, 8, 8), 64), 85.09,
    ),
    "PIWAE": Row(
        84.46, RAINFORTH, ONE, *DYNAMIC, (VAE900, IWAE5, IWAE50, Stage("PIWAE-75", functools.partial(PIWAE,
        gradient="dreg"), 75, 50, 1e-3)), by_paper("PIWAE", PIWAE, 64), 84.58,
    ),
    "2-VAE-1": burda(85.33, "VAE-1", (VAE600,), 2),
    "2-IWAE-5": burda(83.89, "IWAE-5", (VAE600, IWAE5), 2),
    "2-VAE-5": burda(85.01, "VAE-5", (VAE600, VAE5), 2),
    "2-IWAE-50": burda(82.90, "IWAE-50", (VAE600, IWAE5, IWAE50), 2),
    "2-VAE-50": burda(84.78, "VAE-50", (VAE600, VAE5, VAE50), 2),
    "fixed-VAE-1": Row(88.71, BURDA, ONE, "mnist", "fixed", (STATIC,), by_paper("VAE-1", vae(1))),
    "fixed-IWAE-50": Row(
        87.10, BURDA, ONE, "mnist", "fixed", (STATIC, IWAE50._replace(name="IWAE-50-30", epochs=30)),
        by_paper("IWAE-50", bound(50)), 86.82,
    ),
    "fixed-VampPrior": Row(
        85.57, TOMCZAK, VAMP | PSEUDO, "mnist", "fixed", (STATIC._replace(name="VAE-1-120", epochs=120, patience=30),),
        by_vamp_paper(50_000), 85.79,
    ),
    "fixed-HVAE": Row(
        86.40, CATERINI, {"hidden": (450,)}, "mnist", "fixed", (Stage("HVAE", vae(1), 20, 100, 1e-3, 5),),
        (Stage("HVAE, paper", vae(1), 2000, 100, 1e-3, 100, "float32"),), 86.21,
        factory="experiments.published_rows:hamiltonian", particles=1000,
    ),
    "omniglot-VAE-1": Row(
        108.11, BURDA, ONE, "omniglot-random", "dynamic", (VAE900,), by_paper("VAE-1", vae(1)), other=IMAGES
    ),
    "omniglot-IWAE-50": Row(
        104.67, BURDA, ONE, "omniglot-random", "dynamic", (VAE900, IWAE5, IWAE50), by_paper("IWAE-50", bound(50)),
        other=IMAGES,
    ),
}  # fmt: skip
