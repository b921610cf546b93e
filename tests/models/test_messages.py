"""What a VAE says of parts that a user wrote: their shape, their space, what is no distribution."""

from __future__ import annotations

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppvae import VAE, check, data, fit, likelihoods, posteriors, priors
from ppvae.errors import ContractError, UsageError
from ppvae.models import SemiSupervisedVAE
from ppvae.nn import mlp
from ppvae.objectives import ELBO
from ppvae.objectives.auxiliary import AuxiliaryLoss


class Part(nn.Module):
    """A part that returns whatever a function makes."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def message(**parts) -> str:
    made = {
        "prior": priors.StandardNormal(2),
        "likelihood": likelihoods.Bernoulli(mlp(2, 6)),
        "posterior": posteriors.DiagonalNormal(mlp(6, 4)),
    } | parts
    with pytest.raises(ContractError) as caught:
        VAE(**made).guide(torch.zeros(5, 6))
    return str(caught.value)


def normal(shape, dims: int = 0):
    return dist.Normal(torch.zeros(shape), 1.0).to_event(dims)


CASES = {
    "a prior of scalars": ({"prior": lambda d: Part(lambda: normal(2, d))}, r"\[\] and \[2\]; add \.to_event\(1\)"),
    "a posterior of scalars": (
        {"posterior": lambda d: Part(lambda x: normal((len(x), 2), d))}, r"found \[5, 2\].*add \.to_event\(1\)",
    ),
    "a likelihood of scalars": (
        {"likelihood": lambda d: Part(lambda z: normal((*z.shape[:-1], 6), d))},
        r"\[6\] of x, found \[\]; add \.to_event\(1\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_missing_event_dim_is_named_and_the_cure_works(name):
    parts, words = CASES[name]
    found = message(**{role: make(0) for role, make in parts.items()})
    assert re.search(words, found), found
    dims = int(re.search(r"to_event\((\d)\)", found)[1])
    cured = {role: make(dims) for role, make in parts.items()}
    made = {"prior": priors.StandardNormal(2), "likelihood": likelihoods.Bernoulli(mlp(2, 6))}
    VAE(**{**made, "posterior": posteriors.DiagonalNormal(mlp(6, 4)), **cured}).guide(torch.zeros(5, 6))


@pytest.mark.parametrize("role", ["prior", "likelihood", "posterior"])
def test_a_part_that_returns_a_tensor_is_named(role):
    found = message(**{role: Part(lambda *_: torch.zeros(5, 6))})
    assert found.startswith(f"{role} Part: expected a distribution, found a tensor float32 [5, 6]")


def test_spaces_have_short_names():
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), dist.Normal(torch.zeros(2, 3), 1.0)).to_event(1)
    found = message(prior=Part(lambda: dist.Exponential(torch.ones(2)).to_event(1)))
    assert "prior Part (nonnegative numbers) and posterior DiagonalNormal (real)" in found
    assert "(real)" in message(prior=Part(lambda: mixture), posterior=Part(lambda x: normal((len(x), 3), 1)))


class Own(torch.distributions.Distribution):
    """A distribution of torch's interface alone, without `expand`."""

    support = torch.distributions.constraints.real_vector

    def __init__(self):
        super().__init__(event_shape=torch.Size([2]), validate_args=False)

    def sample(self, sample_shape=()):
        return torch.randn(torch.Size(sample_shape) + self.event_shape)

    def log_prob(self, value):
        return dist.Normal(0.0, 1.0).log_prob(value).sum(-1)


def test_a_part_that_returns_a_distribution_of_torch_is_named():
    found = message(prior=Part(lambda: torch.distributions.Normal(torch.zeros(2), 1.0)))
    assert found.startswith("prior Part: expected a distribution of Pyro, found Normal of torch.distributions")
    assert "TorchDistribution" in message(prior=Part(Own))


@pytest.mark.parametrize("fn", [lambda: torch.distributions.Normal(0.0, 1.0), Own], ids=["torch", "own"])
def test_a_plain_model_with_a_distribution_of_torch_is_refused_by_its_site(fn):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", fn())
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    with pytest.raises(
        ContractError, match=r"site 'z'.*derive one of your own from pyro.distributions.TorchDistribution"
    ):
        check(model, guide, torch.zeros(5, 2))


def test_a_missing_event_dim_of_images_is_not_taken_for_rows_of_a_layer():
    """Eight channels, eight columns: the weight of the layer has as many rows as the pair would run on data."""
    encoder, decoder = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(2, 64)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z).reshape(-1, 1, 8, 8), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x).mean((2, 3))[:, :2], 1.0).to_event(1))

    with pytest.raises(ContractError, match=r"declare the dims of one event with \.to_event\(n\)"):
        check(model, guide, torch.zeros(20, 1, 8, 8))


def test_whole_numbers_in_a_network_of_floats_are_named_with_the_cast():
    vae = VAE(priors.StandardNormal(2), likelihoods.Poisson(mlp(2, 6)), posteriors.DiagonalNormal(mlp(6, 4)))
    counts = torch.arange(30).reshape(5, 6)
    with pytest.raises(ContractError, match=r"The parameters are float32: pass x\.to\(torch\.float32\)"):
        check(vae.model, vae.guide, counts)
    check(vae.model, vae.guide, counts.to(torch.float32))


def semi_supervised(likelihood=likelihoods.Bernoulli):
    return SemiSupervisedVAE(
        priors.OneHot(3), priors.StandardNormal(2), likelihood(mlp(5, 4)), posteriors.DiagonalNormal(mlp(7, 4)),
        posteriors.OneHot(mlp(4, 3), 3),
    )  # fmt: skip


def test_an_auxiliary_loss_of_labels_says_that_the_data_have_none():
    pair, x = semi_supervised(), torch.ones(20, 4)
    objective = AuxiliaryLoss(ELBO(), pair.log_label)
    with pytest.raises(UsageError, match=r"term: log_label takes 2 tensors, and the batch has 1: .*\(x, labels\)"):
        fit(pair.model, pair.guide, x, objective=objective, epochs=1)
    labels = torch.arange(20) % 3
    assert fit(pair.model, pair.guide, (x, labels), objective=objective, epochs=1, compile=False).metrics["epoch"] == 1
    assert fit(pair.model, pair.guide, x, objective=ELBO(), epochs=1, compile=False).metrics["epoch"] == 1
    assert pair.classify(x.numpy()).shape == (20, 3)
    with pytest.raises(UsageError, match=r"classify: .* found a tuple of 2: pass x alone"):
        pair.classify((x, labels))


@pytest.mark.parametrize("likelihood", [likelihoods.Bernoulli, likelihoods.Normal])
def test_a_classifier_that_takes_no_gaps_is_named_whatever_the_likelihood(likelihood):
    pair, x = semi_supervised(likelihood), torch.full((20, 4), 0.3)
    x[::3, 1] = torch.nan
    with pytest.raises(ContractError, match=r"site 'y': expected a guide that takes missing values .*nn\.Missing"):
        fit(pair.model, pair.guide, data.with_missing(x), objective=ELBO(), epochs=1)
