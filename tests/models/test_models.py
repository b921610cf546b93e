"""Probabilistic PCA and factor analysis against dense linear algebra and scikit-learn."""

from __future__ import annotations

import functools

import pytest
import sklearn.decomposition
import torch

from ppvae import fit
from ppvae.models import LinearGaussian

SCALES = {"probabilistic PCA": 0.7, "factor analysis": torch.tensor([0.7, 0.2, 1.0, 1.5, 0.4])}
each_model = pytest.mark.parametrize("model", SCALES)


def pair(model: str = "probabilistic PCA", features: int = 5, latent: int = 2) -> LinearGaussian:
    torch.manual_seed(0)
    made = LinearGaussian(features, latent, SCALES[model]).double()
    with torch.no_grad():
        made.loc.normal_()
    return made


@each_model
def test_log_px_is_the_dense_normal(model: str) -> None:
    p, x = pair(model), torch.randn(7, 5).double()
    cov = p.weight @ p.weight.T + torch.exp(2 * p.log_scale) * torch.eye(5)
    dense = torch.distributions.MultivariateNormal(p.loc, cov).log_prob(x)
    torch.testing.assert_close(p.log_px(x), dense)


@each_model
def test_bayes_rule_holds_at_every_latent(model: str) -> None:
    p, x, z = pair(model), torch.randn(7, 5).double(), torch.randn(7, 2).double()
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


def data() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(500, 2).double() @ torch.randn(2, 6).double() + torch.linspace(0.4, 1.4, 6) * torch.randn(500, 6)


def fitted(p: LinearGaussian, x: torch.Tensor, guide: str = "guide") -> float:
    adam = functools.partial(torch.optim.Adam, lr=1e-1)
    fit(p.model, getattr(p, guide), x, optimizer=adam, epochs=100, batch_size=len(x), progress=False)
    return float(p.log_px(x).mean().detach())


@pytest.mark.parametrize("guide", ["guide", "mean_field"])
def test_svi_reaches_the_closed_form_maximum_of_ppca(guide: str) -> None:
    x = data()
    best = float(LinearGaussian.maximum_likelihood(x, 2).log_px(x).mean().detach())
    torch.manual_seed(0)
    assert best - 0.05 < fitted(LinearGaussian(6, 2).double(), x, guide) < best + 1e-6


def test_svi_reaches_what_em_reaches_in_factor_analysis() -> None:
    x = data()
    torch.manual_seed(0)
    found = fitted(LinearGaussian(6, 2, torch.ones(6)).double(), x)
    em = sklearn.decomposition.FactorAnalysis(2, tol=1e-9, max_iter=10000).fit(x.numpy())
    assert abs(found - em.score(x.numpy())) < 0.01
    assert found > float(LinearGaussian.maximum_likelihood(x, 2).log_px(x).mean().detach())


def test_scales_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scale: expected a number or \[5\], found \[4\]"):
        LinearGaussian(5, 2, torch.ones(4))
