"""What is said of parts that are no modules, or whose forward takes something else."""

import pyro.distributions as dist
import pytest
import torch

from ppvae import VAE, check, likelihoods, nn, posteriors, priors
from ppvae.errors import ContractError

X = (torch.arange(60).reshape(10, 6) % 5 < 2).float()


class TakesData(torch.nn.Module):
    def forward(self, x):
        return dist.Normal(x, 1.0).to_event(1)


def vae(**parts):
    given = {
        "prior": priors.StandardNormal(2),
        "likelihood": likelihoods.Bernoulli(nn.mlp(2, 6)),
        "posterior": posteriors.DiagonalNormal(nn.mlp(6, 4)),
    }
    return VAE(**given | parts)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"prior": lambda: 0}, "prior: expected a torch.nn.Module .* found an object of function; return"),
        (
            {"prior": dist.Normal(0.0, 1.0)},
            "prior: expected a torch.nn.Module .* found the distribution Normal",
        ),
        ({"likelihood": TakesData}, r"likelihood: .* found the class TakesData; pass an object of it"),
    ],
)
def test_a_part_is_a_module(parts, message):
    with pytest.raises(ContractError, match=message):
        vae(**parts)


def test_a_prior_whose_forward_takes_data_is_named():
    pair = vae(prior=TakesData())
    with pytest.raises(ContractError, match=r"prior TakesData: expected a forward without arguments, found: .*'x'"):
        check(pair.model, pair.guide, X)


def test_data_of_another_type_are_cast_as_the_message_says():
    pair = vae()
    with pytest.raises(ContractError, match=r"does not take data x of float64 .*pass x.to\(torch.float32\)"):
        check(pair.model, pair.guide, X.double())
    check(pair.model, pair.guide, X.double().to(torch.float32))
