"""What a VAE says of parts that a user wrote: their shape, their space, what is no distribution."""

from __future__ import annotations

import re

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppvae import VAE, likelihoods, posteriors, priors
from ppvae.errors import ContractError
from ppvae.nn import mlp


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
