"""Probabilistic PCA against dense linear algebra."""

from __future__ import annotations

import pytest
import torch

from ppvae.models import LinearGaussian


def pair(features: int = 5, latent: int = 2) -> LinearGaussian:
    torch.manual_seed(0)
    made = LinearGaussian(features, latent, scale=0.7).double()
    with torch.no_grad():
        made.loc.normal_()
    return made


def test_log_px_is_the_dense_normal() -> None:
    p, x = pair(), torch.randn(7, 5).double()
    cov = p.weight @ p.weight.T + torch.exp(2 * p.log_scale) * torch.eye(5)
    dense = torch.distributions.MultivariateNormal(p.loc, cov).log_prob(x)
    torch.testing.assert_close(p.log_px(x), dense)


def test_bayes_rule_holds_at_every_latent() -> None:
    p, x, z = pair(), torch.randn(7, 5).double(), torch.randn(7, 2).double()
    prior = torch.distributions.Normal(torch.zeros(2).double(), 1.0).log_prob(z).sum(-1)
    likelihood = torch.distributions.Normal(z @ p.weight.T + p.loc, p.log_scale.exp()).log_prob(x).sum(-1)
    torch.testing.assert_close(prior + likelihood - p.posterior(x).log_prob(z), p.log_px(x))


def test_maximum_likelihood_is_a_maximum() -> None:
    torch.manual_seed(1)
    x = torch.randn(300, 2).double() @ torch.randn(2, 5).double() + 0.3 * torch.randn(300, 5).double()
    best = LinearGaussian.maximum_likelihood(x, 2)
    gradients = torch.autograd.grad(best.log_px(x).mean(), list(best.parameters()))
    assert max(float(g.abs().max()) for g in gradients) < 1e-8
    value = best.log_px(x).mean()
    for _ in range(20):
        other = LinearGaussian.maximum_likelihood(x, 2)
        with torch.no_grad():
            for p in other.parameters():
                p.add_(0.05 * torch.randn_like(p))
        assert other.log_px(x).mean() < value


@pytest.mark.parametrize("latent", [0, 5])
def test_maximum_likelihood_refuses_a_latent_that_leaves_no_noise(latent: int) -> None:
    with pytest.raises(ValueError, match="latent"):
        LinearGaussian.maximum_likelihood(torch.randn(10, 5), latent)
