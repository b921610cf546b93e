"""Hierarchies of latents against quadrature, linear algebra and the VAE."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ppvae import VAE, check, fit, likelihoods, log_marginal, nn, objectives, posteriors, priors, terms
from ppvae.errors import ContractError
from ppvae.models import HierarchicalVAE, LadderVAE
from ppvae.models.hierarchical import _product_of_normals

pytestmark = pytest.mark.usefixtures("float64")
FEATURES = 4


def normal(inputs: int, latent: int) -> posteriors.DiagonalNormal:
    return posteriors.DiagonalNormal(nn.mlp(inputs, 2 * latent, hidden=(5,)))


def bits(latent: int) -> likelihoods.Bernoulli:
    return likelihoods.Bernoulli(nn.mlp(latent, FEATURES, hidden=(5,)))


def bottom_up(sizes: tuple[int, ...]) -> HierarchicalVAE:
    """z1 of the first size, next to the data, to zL of the last."""
    layers = [normal(above, below) for below, above in itertools.pairwise(sizes)]
    up = [normal(below, above) for below, above in zip((FEATURES, *sizes[:-1]), sizes, strict=True)]
    return HierarchicalVAE(priors.StandardNormal(sizes[-1]), layers, bits(sizes[0]), up)


def ladder(sizes: tuple[int, ...]) -> LadderVAE:
    layers = [normal(above, below) for below, above in itertools.pairwise(sizes)]
    encoders = [nn.mlp(FEATURES if i == 0 else 6, 6, hidden=(5,)) for i in range(len(sizes))]
    return LadderVAE(priors.StandardNormal(sizes[-1]), layers, bits(sizes[0]), encoders, [normal(6, s) for s in sizes])


BOTH = {"bottom-up": bottom_up, "ladder": ladder}
each = pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)


def data(rows: int = 5) -> Tensor:
    return torch.rand(rows, FEATURES).lt(0.5).double()


def posterior_of(vae: HierarchicalVAE | LadderVAE) -> torch.nn.Module:
    """q(z1 | x) of one layer as a VAE takes it."""
    if isinstance(vae, HierarchicalVAE):
        return vae.posteriors[0]
    return posteriors.DiagonalNormal(torch.nn.Sequential(vae.encoders[0], vae.posteriors[0].net))


@each
def test_one_layer_is_the_vae(make):
    vae = make((3,))
    plain, x = VAE(vae.prior, vae.likelihood, posterior_of(vae)), data()
    torch.manual_seed(3)
    ours = terms(vae.model, vae.guide, x, 4)
    torch.manual_seed(3)
    theirs = terms(plain.model, plain.guide, x, 4)
    assert torch.equal(ours.log_weight, theirs.log_weight)
    assert torch.equal(ours.guide["z1"].value, theirs.guide["z"].value)


def log_px(vae: HierarchicalVAE | LadderVAE, x: Tensor) -> Tensor:
    """By Gauss-Hermite quadrature over the noise of z2 and then of z1, one number each."""
    node, weight = np.polynomial.hermite_e.hermegauss(40)
    noise, mass = torch.tensor(node), torch.tensor(weight / weight.sum()).log()
    loc, log_scale = vae.layers[0].net(noise[:, None]).chunk(2, -1)
    z1 = loc + log_scale.exp() * noise  # [z2, z1]
    log_lik = torch.distributions.Bernoulli(logits=vae.likelihood.net(z1[..., None, None])).log_prob(x).sum(-1)
    return (log_lik + mass[:, None] + mass[:, None, None]).logsumexp((0, 1))


@each
def test_log_px_is_what_quadrature_gives(make):
    vae, x = make((1, 1)), data()
    with torch.no_grad():  # a guide near the prior: the weights are as bounded as the likelihood is
        for p in [*vae.posteriors.parameters(), *vae.layers.parameters()]:
            p.mul_(0.3)
        est = log_marginal(vae.model, vae.guide, x, num_particles=6000, seed=1, progress=False, proposal="guide")
        exact = log_px(vae, x)
    assert bool((est.ess >= 50).all())
    assert bool((est.std_error < 0.02).all())
    assert bool(((est.log_px - exact).abs() < 4.5 * est.std_error).all())  # fails once in 30000


@each
def test_any_number_of_layers_trains_and_each_has_its_kl(make):
    vae, x = make((4, 3, 2)), data(20)
    run = fit(vae.model, vae.guide, x, valid=x, objective=objectives.ELBO(), epochs=2, batch_size=10, progress=False)
    kls = [run.metrics[f"valid_kl_z{i}"] for i in (1, 2, 3)]
    assert sum(kls) == pytest.approx(run.metrics["valid_rate"], abs=1e-9)
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in vae.parameters())


def test_a_layer_of_the_ladder_is_the_product_of_two_normals():
    vae, x = ladder((2, 3)), data()
    t = terms(vae.model, vae.guide, x, 3)
    d1 = vae.encoders[0](x)
    ours, below = vae.posteriors[0](d1), vae.layers[0](t.guide["z2"].value)
    q = t.guide["z1"].distribution
    z = torch.randn(7, 3, 5, 2)
    left, right = q.log_prob(z), ours.log_prob(z) + below.log_prob(z)
    torch.testing.assert_close(left - left[:1], right - right[:1])  # but for its constant


def test_a_layer_of_the_ladder_stays_finite_where_a_scale_is_tiny():
    """Its precision would be infinite in float32."""
    a, b = (torch.distributions.Normal(torch.tensor([loc]), scale) for loc, scale in ((2.0, 1e-30), (5.0, 0.5)))
    for left, right in ((a, b), (b, a)):
        fn = _product_of_normals(left, right).base_dist
        assert fn.loc.tolist() == pytest.approx([2.0])
        assert fn.scale.tolist() == pytest.approx([1e-30])


def linear(inputs: int, latent: int, scale: float) -> posteriors.DiagonalNormal:
    net = torch.nn.Linear(inputs, 2 * latent)
    with torch.no_grad():
        net.weight[latent:] = 0
        net.bias[latent:] = math.log(scale)
    return posteriors.DiagonalNormal(net)


def test_a_linear_hierarchy_has_the_dense_normals_log_px():
    """z2 ~ N(0, I), z1 | z2 and x | z1 linear: x is normal; a bottom-up guide near it gives its log-density."""
    top, middle = linear(1, 2, 0.7), torch.nn.Linear(2, FEATURES)
    vae = HierarchicalVAE(
        priors.StandardNormal(1), [top], likelihoods.Normal(middle, scale=0.9),
        [linear(FEATURES, 2, 1.5), linear(2, 1, 1.2)],
    )  # fmt: skip
    w2, w1 = top.net.weight[:2], middle.weight
    inner = w2 @ w2.T + 0.49 * torch.eye(2)
    mean = w1 @ top.net.bias[:2] + middle.bias
    x = torch.randn(4, FEATURES)
    exact = torch.distributions.MultivariateNormal(mean, w1 @ inner @ w1.T + 0.81 * torch.eye(FEATURES)).log_prob(x)
    with torch.no_grad():
        for p in vae.posteriors.parameters():
            if p.dim() == 2:
                p.mul_(0.3)
        est = log_marginal(vae.model, vae.guide, x, num_particles=10000, progress=False, proposal="guide")
    assert bool((est.std_error < 0.03).all())
    assert bool(((est.log_px - exact).abs() < 4.5 * est.std_error).all())


def test_parts_that_do_not_count_are_refused():
    with pytest.raises(ValueError, match=r"posteriors: expected 2, one for each latent .* 1 layers, found 1"):
        HierarchicalVAE(priors.StandardNormal(2), [normal(2, 3)], bits(3), [normal(4, 3)])
    with pytest.raises(ValueError, match="encoders: expected 1"):
        LadderVAE(priors.StandardNormal(2), [], bits(2), [], [normal(4, 2)])


def test_sizes_that_do_not_fit_are_refused_by_the_part():
    vae = HierarchicalVAE(priors.StandardNormal(2), [normal(2, 3)], bits(3), [normal(4, 3), normal(3, 1)])
    with pytest.raises(ContractError, match=r"layers.0: DiagonalNormal does not take float64 \[5, 1\]"):
        check(vae.model, vae.guide, data())


def test_a_ladder_of_what_is_not_normal_is_refused_by_the_part():
    vae = ladder((2, 2))
    vae.layers[0] = likelihoods.Laplace(torch.nn.Linear(2, 2))
    with pytest.raises(ContractError, match=r"layers.0: expected a normal with independent dims, found Laplace"):
        check(vae.model, vae.guide, data())
