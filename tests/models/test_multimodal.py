"""Several modalities, some missing, against linear algebra and the VAE of those that are there."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch

from ppvae import VAE, check, likelihoods, log_marginal, nn, posteriors, priors, terms
from ppvae.distributions.normal_mixture import NormalMixture
from ppvae.errors import ContractError, DataError
from ppvae.models import MultimodalVAE, mixture_of_experts, product_of_experts
from tests.laws.latents import FAILURE, fit_of, integral

pytestmark = pytest.mark.usefixtures("float64")
SIZES = (3, 2)
EXPERTS = {"product": product_of_experts, "mixture": mixture_of_experts}
PRESENT = torch.tensor([[True, True], [True, False], [False, True], [True, True]])


class ExactExpert(torch.nn.Module):
    """What p(x | z) = N(x; w z + b, 0.8^2 I) says of z alone: a normal in z, of one dim."""

    def __init__(self, decoder: torch.nn.Linear):
        super().__init__()
        self.decoder = decoder

    def forward(self, x: torch.Tensor) -> dist.TorchDistribution:
        w = self.decoder.weight[:, 0]
        return dist.Normal(((x - self.decoder.bias) @ w / (w @ w))[:, None], 0.8 * (w @ w).rsqrt()).to_event(1)


def linear(experts: Any = product_of_experts) -> MultimodalVAE:
    decoders = [torch.nn.Linear(1, size) for size in SIZES]
    return MultimodalVAE(
        priors.StandardNormal(1),
        [likelihoods.Normal(d, scale=0.8) for d in decoders],
        [ExactExpert(d) for d in decoders],
        experts,
    )


def deep(experts: Any = product_of_experts) -> MultimodalVAE:
    return MultimodalVAE(
        priors.StandardNormal(2),
        [likelihoods.Normal(nn.mlp(2, size, hidden=(5,))) for size in SIZES],
        [posteriors.DiagonalNormal(nn.mlp(size, 4, hidden=(5,))) for size in SIZES],
        experts,
    )


def data() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(4, size) for size in SIZES)


def dense(vae: MultimodalVAE, x: torch.Tensor, which: list[int]) -> torch.Tensor:
    """log p of the modalities that are there: jointly normal where all is linear."""
    weight = torch.cat([vae.likelihoods[m].net.weight for m in which])
    bias = torch.cat([vae.likelihoods[m].net.bias for m in which])
    return torch.distributions.MultivariateNormal(bias, weight @ weight.T + 0.64 * torch.eye(len(bias))).log_prob(x)


def test_linear_modalities_are_jointly_normal_whichever_are_there():
    vae, x = linear(), data()
    whole = torch.cat(x, -1)
    exact = dense(vae, whole, [0, 1])
    exact[1], exact[2] = dense(vae, x[0], [0])[1], dense(vae, x[1], [1])[2]
    with torch.no_grad():
        est = log_marginal(vae.model, vae.guide, (*x, PRESENT), num_particles=30, progress=False, proposal="guide")
        full = log_marginal(vae.model, vae.guide, x, num_particles=30, progress=False, proposal="guide")
    assert float((est.log_px - exact).abs().max()) < 1e-9  # the product of exact experts is the posterior
    assert float((full.log_px - dense(vae, whole, [0, 1])).abs().max()) < 1e-9


@pytest.mark.parametrize("experts", EXPERTS)
def test_what_stands_for_a_missing_modality_is_not_looked_at(experts):
    vae, x = deep(EXPERTS[experts]), data()
    z = terms(vae.model, vae.guide, (*x, PRESENT), 3).guide["z"].value
    others = [torch.where(PRESENT[:, m, None], t, 9 * torch.randn(t.shape)) for m, t in enumerate(x)]
    ours, theirs = (terms(vae.model, vae.guide, (*t, PRESENT), 3, values={"z": z}).log_weight for t in (x, others))
    torch.testing.assert_close(ours, theirs)


def test_importance_sampling_by_a_mixture_is_right_whichever_are_there():
    """Exact log p(x) within 5 standard errors of 8 data: once in 200,000 draws."""
    torch.manual_seed(0)
    vae, x = linear(mixture_of_experts), data()
    whole = torch.cat(x, -1)
    exact = dense(vae, whole, [0, 1])
    some = torch.stack([exact[0], dense(vae, x[0], [0])[1], dense(vae, x[1], [1])[2], exact[3]])
    with torch.no_grad():
        for batch, expected in (((*x, PRESENT), some), (x, exact)):
            est = log_marginal(vae.model, vae.guide, batch, num_particles=6000, progress=False, proposal="guide")
            assert bool(est.reliable.all())
            assert float(est.std_error.max()) < 0.1
            assert float(((est.log_px - expected) / est.std_error).abs().max()) < 5


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("m", [0, 1])
def test_a_missing_modality_leaves_the_model_of_the_other(experts, m):
    vae, x = deep(EXPERTS[experts]), data()
    present = torch.arange(2).eq(m).expand(4, 2)
    t = terms(vae.model, vae.guide, (*x, present), 3)
    alone = MultimodalVAE(vae.prior, [vae.likelihoods[m]], [vae.posteriors[m]], EXPERTS[experts])
    other = terms(alone.model, alone.guide, x[m], 3, values={"z": t.guide["z"].value})
    for name in ("log_prior", "log_lik", "log_guide"):
        torch.testing.assert_close(getattr(t, name), getattr(other, name))


def test_a_mixture_of_one_is_a_vae_and_one_of_equals_is_the_expert():
    vae, (x, _) = deep(), data()
    expert, likelihood = vae.posteriors[0], vae.likelihoods[0]
    plain = VAE(vae.prior, likelihood, expert)
    t = terms(plain.model, plain.guide, x, 3)
    for count in (1, 3):
        several = MultimodalVAE(vae.prior, [likelihood] * count, [expert] * count, mixture_of_experts)
        other = terms(several.model, several.guide, (x,) * count, 3, values={"z": t.guide["z"].value})
        torch.testing.assert_close(other.log_guide, t.log_guide)
        torch.testing.assert_close(other.log_lik, count * t.log_lik)


def test_one_modality_with_the_prior_as_an_expert_is_a_vae():
    """Of a posterior whose precision is one more than the network's own, its location nearer to 0."""
    vae, (x, _) = deep(), data()
    one = MultimodalVAE(vae.prior, list(vae.likelihoods)[:1], list(vae.posteriors)[:1])
    plain = VAE(vae.prior, vae.likelihoods[0], posteriors.DiagonalNormal(torch.nn.Identity()))
    loc, log_scale = vae.posteriors[0].net(x).chunk(2, -1)
    precision = 1 + (-2 * log_scale).exp()
    theirs = torch.cat([loc * (-2 * log_scale).exp() / precision, -precision.log() / 2], -1)
    t = terms(one.model, one.guide, x, 3)
    torch.testing.assert_close(t.log_guide, plain.posterior(theirs).log_prob(t.guide["z"].value))


def two(dims: int = 1, grad: bool = False) -> NormalMixture:
    """Two components of weights 0.3 and 0.7 that overlap, and one that is left out."""
    loc = torch.tensor([[-1.0, 0.5], [1.0, -0.3], [9.0, 9.0]])[:, :dims]
    scale = torch.tensor([[0.5, 1.5], [1.2, 0.4], [1.0, 1.0]])[:, :dims]
    weight = torch.tensor([0.3, 0.7, 0.0]).log()
    return NormalMixture(loc.requires_grad_(grad), scale.requires_grad_(grad), weight)


@pytest.mark.parametrize("dims", [1, 2])
def test_a_mixture_of_normals_is_a_density_that_its_draws_follow(dims):
    torch.manual_seed(0)
    assert abs(integral(two(dims), "real") - 1) < 1e-6
    assert fit_of(two(dims), "real") > FAILURE / 2
    many = two(dims).expand([4, 5])
    draws = many.rsample((2,))
    assert (many.batch_shape, draws.shape, many.log_prob(draws).shape) == ((4, 5), (2, 4, 5, dims), (2, 4, 5))
    torch.testing.assert_close(many.log_prob(draws), two(dims).log_prob(draws))
    mean = sum(w * loc for w, loc in zip((0.3, 0.7), two(dims).loc, strict=False))
    torch.testing.assert_close(many.mean, mean.expand(4, 5, dims))


@pytest.mark.parametrize("dims", [1, 2])
def test_paths_of_a_mixture_give_the_gradient_of_an_expectation(dims):
    """Of E[tanh(a z) ] = sum_m w_m E_m[tanh(a z)], by paths in each component: 5 standard errors, 8 numbers."""
    torch.manual_seed(0)
    a, draws = torch.tensor([1.3, -0.8])[:dims], 200_000

    def gradients(fn: NormalMixture, height: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(height, [fn.loc, fn.scale]))

    parts, exact = [], two(dims, grad=True)
    for _ in range(20):
        fn = two(dims, grad=True)
        parts.append(torch.stack(gradients(fn, (fn.rsample((draws // 20,)) @ a).tanh().mean())))
    noise = torch.randn(draws, 3, dims)
    each = ((exact.loc + exact.scale * noise) @ a).tanh().mean(0)
    expected = torch.stack(gradients(exact, (each * exact.log_weight.exp()).sum()))
    found, error = torch.stack(parts).mean(0), torch.stack(parts).std(0) / 20**0.5
    assert bool((found[:, 2] == 0).all())
    assert float(((found - expected) / error)[:, :2].abs().max()) < 5 * math.sqrt(2)  # both sides are drawn


def test_weights_with_a_gradient_are_refused():
    with pytest.raises(ValueError, match="log_weight: expected constant weights"):
        NormalMixture(torch.zeros(2, 1), torch.ones(2, 1), torch.zeros(2, requires_grad=True))


@pytest.mark.parametrize("use", [
    lambda v, d: check(v.model, v.guide, d),
    lambda v, d: log_marginal(v.model, v.guide, d, num_particles=2, progress=False, proposal="guide"),
])  # fmt: skip
@pytest.mark.parametrize("experts", EXPERTS)
def test_a_datum_with_nothing_is_refused_by_its_row(use, experts):
    none = PRESENT.clone()
    none[2] = False
    with pytest.raises(DataError, match="present: expected 1 to 2 modalities of each datum, found 0 at row 2"):
        use(deep(EXPERTS[experts]), (*data(), none))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="posteriors: expected one for each of 2 likelihoods, found 1"):
        MultimodalVAE(priors.StandardNormal(2), list(deep().likelihoods), list(deep().posteriors)[:1])
    vae = deep()
    with pytest.raises(DataError, match="data: expected 2 modalities"):
        check(vae.model, vae.guide, data()[:1])
    vae.prior = priors.Laplace(2)
    with pytest.raises(ContractError, match="prior: expected a normal with independent dims, found Laplace"):
        check(vae.model, vae.guide, data())
