"""probs, mean and mode of the distributions that priors and posteriors return."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch

from ppvae import posteriors, priors
from ppvae.priors.discrete_vectors import DiscreteVector, OneHotVector
from ppvae.priors.mixture import Mixture

pytestmark = pytest.mark.usefixtures("float64")


def test_one_hot_vectors_have_those_of_their_classes():
    logits = torch.randn(5, 2, 3)
    fn = OneHotVector(DiscreteVector(dist.Categorical(logits=logits), 1), 3, torch.float64)
    x = fn.enumerate_support()  # [9, 5, 6]
    mass = fn.log_prob(x).exp().unsqueeze(-1)
    assert torch.allclose((mass * x).sum(0), fn.mean)
    assert torch.equal(fn.probs, fn.mean)
    assert torch.equal(fn.mode, x[mass[..., 0].argmax(0), torch.arange(5)])
    with pytest.raises(NotImplementedError, match="dependent variables"):
        _ = priors.AutoregressiveOneHot(3, variables=2)().probs


def test_relaxed_posteriors_name_the_probabilities_that_they_relax():
    net = torch.nn.Linear(4, 6)
    x = torch.randn(5, 4)
    assert torch.allclose(
        posteriors.RelaxedOneHot(net, 3)(x).probs, net(x).unflatten(-1, (2, 3)).softmax(-1).flatten(-2)
    )


def test_a_mixture_has_the_mean_of_its_components():
    fn = Mixture(dist.Normal(torch.tensor([[-1.0, 2.0], [3.0, 0.0]]), 1.0).to_event(1), torch.tensor([0.0, 3.0]).log())
    assert torch.allclose(fn.expand([4]).mean, torch.tensor([3.0, 0.0]).expand(4, 2))
    assert torch.allclose(Mixture(fn.components).mean, torch.tensor([1.0, 1.0]))


def test_directions_have_a_mean_inside_the_sphere():
    """The mean of 20,000 draws, within 5 standard errors in each of 3 elements."""
    torch.manual_seed(0)
    fn = posteriors.PowerSpherical(torch.nn.Identity())(torch.tensor([0.5, -1.0, 0.3, 2.0]))
    z = fn.sample((20_000,))
    assert ((z.mean(0) - fn.mean).abs() < 5 * z.std(0) / 20_000**0.5).all()
    assert (fn.log_prob(fn.mode) >= fn.log_prob(z).max()).all()
    assert torch.equal(priors.UniformOnSphere(3)().mean, torch.zeros(3))
