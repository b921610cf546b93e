"""Every part of the library by a constructor each: what the laws of a room run over, and what is composed of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppvae import likelihoods, nn, posteriors, priors
from ppvae.likelihoods import table_outputs
from tests.laws.goodness import Support, bags, points
from tests.laws.latents import Part

FEATURES, LATENT = 6, 3  # of a flat datum; of z, for likelihoods


def net(outputs: int) -> torch.nn.Module:
    return nn.mlp(FEATURES, outputs, hidden=(6,))


# -- priors, by the size of z


def vamp(latent: int, components: int = 3) -> priors.VampPrior:
    return priors.VampPrior(posteriors.DiagonalNormal(net(2 * latent)), torch.rand(components, FEATURES))


def times(count: int) -> Tensor:
    return torch.tensor([[0.0, 0.3, 1.0, 1.5, 2.5]])[:, :count].double()


PRIORS: dict[str, Part] = {
    "StandardNormal": Part(priors.StandardNormal),
    "Normal": Part(priors.Normal),
    "Laplace": Part(lambda d: priors.Laplace(d, scale=0.7), size=1),
    "StudentT": Part(lambda d: priors.StudentT(d, df=4.0, scale=1.3), size=1),
    "MixtureOfNormals": Part(lambda d: priors.MixtureOfNormals(d, components=3)),
    "VampPrior": Part(vamp),
    "RealNVP": Part(lambda d: priors.RealNVP(d, transforms=3, hidden=(8,))),
    "MAF": Part(lambda d: priors.MAF(d, transforms=2, hidden=(8,))),
    "MAF of one dim": Part(lambda d: priors.MAF(d, transforms=2, hidden=(8,)), size=1),
    # splines have kinks, at which the trapezoid rule loses digits: one dim has points enough
    "NeuralSpline": Part(lambda d: priors.NeuralSpline(d, hidden=(8,), bins=5), size=1),
    "Autoregressive": Part(lambda d: priors.Autoregressive(d, components=2, hidden=(8,))),
    "AutoregressiveCategorical": Part(lambda d: priors.AutoregressiveCategorical(3, d, hidden=(8,)), "discrete"),
    "AutoregressiveOneHot": Part(lambda d: priors.AutoregressiveOneHot(3, d, hidden=(8,)), "discrete"),
    "Bernoulli": Part(lambda d: priors.Bernoulli(d), "discrete", size=3),
    "Bernoulli learned": Part(lambda d: priors.Bernoulli(d, learned=True), "discrete", size=3),
    "Categorical": Part(lambda d: priors.Categorical(3, d, learned=True), "discrete"),
    "OneHot": Part(lambda d: priors.OneHot(3, d, learned=True), "discrete"),
    "RelaxedBernoulli": Part(lambda d: priors.RelaxedBernoulli(d, temperature=0.7, learned=True), "interval", size=1),
    "RelaxedOneHot": Part(lambda d: priors.RelaxedOneHot(d, temperature=0.7, learned=True), "simplex", size=3),
    "UniformOnSphere": Part(priors.UniformOnSphere, "sphere", size=3),
    "UniformOnSphere circle": Part(priors.UniformOnSphere, "sphere", size=2),
    "Dirichlet": Part(lambda d: priors.Dirichlet(d, concentration=0.8, learned=True), "simplex", size=3),
    "LogisticNormal": Part(priors.LogisticNormal, "simplex", size=3),
    "ConditionalNormal": Part(lambda d: priors.ConditionalNormal.of_labels(3, d), context=torch.tensor(1)),
    "GaussianProcess": Part(lambda d: priors.GaussianProcess(1), context=times(2)),
}

# -- posteriors, by the size of z


def semi(latent: int, **options: Any) -> posteriors.SemiAmortized:
    prior, likelihood = priors.StandardNormal(latent), likelihoods.Bernoulli(nn.mlp(latent, FEATURES, hidden=(4,)))
    return posteriors.SemiAmortized(net(2 * latent), prior, likelihood, steps=2, **options)


def flow(family: Any, **options: Any) -> Callable[[int], torch.nn.Module]:
    return lambda d: family(net(2 * d + 3), latent=d, features=3, hidden=(8,), **options)


POSTERIORS: dict[str, Part] = {
    "DiagonalNormal": Part(lambda d: posteriors.DiagonalNormal(net(2 * d))),
    "FullRank": Part(lambda d: posteriors.FullRank(net(posteriors.FullRank.outputs(d)))),
    "LowRank": Part(lambda d: posteriors.LowRank(net(3 * d), rank=1)),
    "IAF": Part(flow(posteriors.IAF)),
    "IAF of one dim": Part(flow(posteriors.IAF), size=1),
    # splines have kinks, at which the trapezoid rule loses digits: one dim has points enough
    "SplineCoupling": Part(flow(posteriors.SplineCoupling, bins=5), size=1),
    "PowerSpherical": Part(lambda d: posteriors.PowerSpherical(net(d + 1)), "sphere", size=3),
    "PowerSpherical circle": Part(lambda d: posteriors.PowerSpherical(net(d + 1)), "sphere", size=2),
    "Dirichlet": Part(lambda d: posteriors.Dirichlet(net(d), floor=0.1), "simplex", size=3),
    "LogisticNormal": Part(lambda d: posteriors.LogisticNormal(net(2 * d)), "simplex", size=3),
    "Bernoulli": Part(lambda d: posteriors.Bernoulli(net(d)), "discrete", size=3),
    "Categorical": Part(lambda d: posteriors.Categorical(net(3 * d), classes=3), "discrete"),
    "OneHot": Part(lambda d: posteriors.OneHot(net(3 * d), classes=3), "discrete"),
    "RelaxedBernoulli": Part(lambda d: posteriors.RelaxedBernoulli(net(d), temperature=0.7), "interval", size=1),
    "RelaxedOneHot": Part(lambda d: posteriors.RelaxedOneHot(net(d), d, temperature=0.7), "simplex", size=3),
    "PerDatum": Part(lambda d: posteriors.PerDatum(9, 2 * d), context=torch.tensor([3, 1, 4, 0, 8])),
    "PerDatum FullRank": Part(
        lambda d: posteriors.PerDatum(9, posteriors.FullRank.outputs(d), posteriors.FullRank),
        context=torch.tensor([3, 1, 4, 0, 8]),
    ),
    "Mixture": Part(lambda d: posteriors.Mixture([posteriors.DiagonalNormal(net(2 * d)) for _ in range(3)])),
    "Mixture of learned weights": Part(
        lambda d: posteriors.Mixture([posteriors.DiagonalNormal(net(2 * d)) for _ in range(2)], weights=net(2)),
        paths=False,
    ),
    "Mixture of families": Part(
        lambda d: posteriors.Mixture(
            [
                posteriors.DiagonalNormal(net(2 * d)),
                posteriors.FullRank(net(posteriors.FullRank.outputs(d))),
            ]
        )
    ),
    "SemiAmortized": Part(semi),
    "SemiAmortized constant": Part(lambda d: semi(d, through=False)),
}
POINT = {"Delta": Part(lambda d: posteriors.Delta(net(d)))}  # without a density

# -- likelihoods, by their networks


class Reading(torch.nn.Module):
    """A decoder, of z or of (x, z), that takes classes z [..., variables] as one-hot vectors."""

    def __init__(self, net: torch.nn.Module, classes: int):
        super().__init__()
        self.net, self.classes = net, classes
        for name in ("event_shape", "order"):
            if hasattr(net, name):
                setattr(self, name, getattr(net, name))

    def forward(self, *args: Tensor) -> Tensor:
        return self.net(*args[:-1], torch.nn.functional.one_hot(args[-1], self.classes).flatten(-2).float())


@dataclass(frozen=True)
class Nets:
    """Makes networks for data of an event shape: `nets(n)` gives n blocks of numbers for every one of the datum."""

    event: tuple[int, ...]
    latent: int = LATENT
    classes: int = 0  # z is [latent] integers below this

    @property
    def inputs(self) -> int:
        return self.latent * max(1, self.classes)

    def read(self, net: torch.nn.Module) -> torch.nn.Module:
        return Reading(net, self.classes) if self.classes else net

    def __call__(self, blocks: int, channels: int = 1) -> torch.nn.Module:
        """With `channels`, n blocks for every pixel of so many channels."""
        first, *rest = self.event
        shape = (blocks * first // channels, *rest)
        return self.flat(shape[0]) if not rest else nn.conv_decoder(LATENT, shape, channels=(4,), hidden=8)

    def flat(self, outputs: int) -> torch.nn.Module:
        return self.read(nn.mlp(self.inputs, outputs, hidden=(8,)))

    def made(self, outputs: int, hidden: tuple[int, ...]) -> torch.nn.Module:
        return self.read(nn.MADE(self.event[0], self.inputs, outputs, hidden))

    def pixels(self, outputs: int) -> torch.nn.Module:
        """A masked convolution, of images or of their pixels in a row."""
        shape = self.event if len(self.event) == 3 else (1, 1, self.event[0])
        unflatten = torch.nn.Unflatten(-1, (2, *shape[1:]))
        decoder = torch.nn.Sequential(nn.mlp(self.inputs, 2 * shape[1] * shape[2], hidden=()), unflatten)
        return self.read(
            nn.PixelCNN(shape, decoder, 2, outputs, channels=3, layers=1, size=3, flat=len(self.event) == 1)
        )


class Raised(torch.nn.Module):
    """One more than a network's output: small beta concentrations put mass between the last float below 1 and 1."""

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net = net

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z) + 1


@dataclass(frozen=True)
class Case:
    """How to make a likelihood, and the support of one so small that it can be summed or integrated over."""

    make: Callable[[Nets], torch.nn.Module]
    support: Support
    features: int = 6  # of the flat data that the laws use
    context: float | None = None
    outside: float = math.nan  # a value that is refused
    cure: str = ""  # a word of what the refusal advises
    images: bool = True

    @property
    def dims(self) -> int:
        """The size of a datum of the support."""
        return self.support.shape[-1] if isinstance(self.support, Tensor) else 1

    def given(self, *shape: int) -> dict[str, Tensor]:
        return {} if self.context is None else {"context": torch.full(shape, self.context).double()}


two, four, counts = points([0, 1], 3), points([0, 1 / 3, 2 / 3, 1], 2), points(range(400))
COLUMNS = ["real", "count", ("categorical", 3), "binary", "real", ("categorical", 3)]
LIKELIHOODS: dict[str, Case] = {
    "Bernoulli": Case(lambda n: likelihoods.Bernoulli(n(1)), two, outside=0.25, cure="binarize"),
    "ContinuousBernoulli": Case(lambda n: likelihoods.ContinuousBernoulli(n(1)), "unit", outside=1.5, cure="Normal"),
    "Beta": Case(lambda n: likelihoods.Beta(Raised(n(2))), "unit", outside=0.0, cure="dequantize"),
    "Normal fixed": Case(lambda n: likelihoods.Normal(n(1), scale=0.5), "real"),
    "Normal learned": Case(lambda n: likelihoods.Normal(n(1), scale="learned"), "real"),
    "Normal per dim": Case(lambda n: likelihoods.Normal(n(1), scale=n.event), "real"),
    "Normal of the network": Case(lambda n: likelihoods.Normal(n(2), scale="network"), "real"),
    "Laplace fixed": Case(lambda n: likelihoods.Laplace(n(1), scale=0.5), "real"),
    "Laplace per dim": Case(lambda n: likelihoods.Laplace(n(1), scale=n.event), "real"),
    "Laplace of the network": Case(lambda n: likelihoods.Laplace(n(2), scale="network"), "real"),
    "StudentT": Case(lambda n: likelihoods.StudentT(n(1), df=5.0, scale=0.5), "real"),
    "StudentT learned": Case(lambda n: likelihoods.StudentT(n(2), df="learned", scale="network"), "real"),
    "Categorical": Case(
        lambda n: likelihoods.Categorical(n(4), levels=4), four, outside=256.0, cure="Divide whole numbers 0..3 by 3"
    ),
    "Categorical of two": Case(lambda n: likelihoods.Categorical(n(2), levels=2), two, outside=0.5, cure="levels="),
    "DiscretizedLogistic": Case(
        lambda n: likelihoods.DiscretizedLogistic(n(2), levels=4), four, outside=0.5, cure="ContinuousBernoulli"
    ),
    "Mixture of one channel": Case(
        lambda n: likelihoods.MixtureOfDiscretizedLogistics(n(9), components=3, levels=4), four, outside=2.0
    ),
    "Mixture of three channels": Case(
        lambda n: likelihoods.MixtureOfDiscretizedLogistics(n(20, channels=3), components=2, channels=3, levels=4),
        points([0, 1 / 3, 2 / 3, 1], 3), outside=0.5, cure="set levels=",
    ),
    "Poisson": Case(lambda n: likelihoods.Poisson(n(1)), counts, outside=-1.0, cure="Laplace"),
    "Poisson of a library": Case(
        lambda n: likelihoods.Poisson(n(1), library=True), points(range(40), 2), context=5.0, outside=0.5
    ),
    "NegativeBinomial": Case(lambda n: likelihoods.NegativeBinomial(n(1)), counts, outside=-1.0, cure="Normal"),
    "NegativeBinomial per dim of a library": Case(
        lambda n: likelihoods.NegativeBinomial(n(1), n.event, library=True), counts, context=5.0, outside=0.5
    ),
    "NegativeBinomial of the network": Case(lambda n: likelihoods.NegativeBinomial(n(2), "network"), counts),
    "ZeroInflatedPoisson": Case(lambda n: likelihoods.ZeroInflatedPoisson(n(2)), counts, outside=-1.0, cure="Normal"),
    "ZeroInflatedPoisson of a library": Case(
        lambda n: likelihoods.ZeroInflatedPoisson(n(2), library=True), counts, context=5.0
    ),
    "ZeroInflatedNegativeBinomial": Case(lambda n: likelihoods.ZeroInflatedNegativeBinomial(n(2)), counts, outside=0.5),
    "ZeroInflatedNegativeBinomial of the network and a library": Case(
        lambda n: likelihoods.ZeroInflatedNegativeBinomial(n(3), "network", library=True), counts, context=5.0
    ),
    "Multinomial": Case(
        lambda n: likelihoods.Multinomial(n(1)), bags(4, 3), context=4.0, outside=7.0, cure="sum", images=False
    ),
    "Autoregressive MADE": Case(
        lambda n: likelihoods.Autoregressive(n.made(1, (9,))), two, outside=0.5,
        cure="binarize", images=False,
    ),
    "Autoregressive MADE of levels": Case(
        lambda n: likelihoods.Autoregressive(n.made(4, (9, 7)), levels=4), four,
        outside=0.5, cure="Divide", images=False,
    ),
    "Autoregressive PixelCNN": Case(lambda n: likelihoods.Autoregressive(n.pixels(1)), two, outside=0.5),
    "Autoregressive PixelCNN of levels": Case(
        lambda n: likelihoods.Autoregressive(n.pixels(4), levels=4), four, outside=0.5, cure="Divide"
    ),
    "Mixed": Case(
        lambda n: likelihoods.Mixed(n.flat(table_outputs(COLUMNS)), COLUMNS), "real",
        outside=0.5, cure="NaN", images=False,
    ),
}  # fmt: skip
