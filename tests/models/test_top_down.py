"""Top-down VAEs against the VAE, quadrature and linear algebra; the VDVAE of images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ppvae import VAE, check, likelihoods, log_marginal, nn, posteriors, terms
from ppvae.errors import ContractError
from ppvae.models import Block, TopDownVAE, very_deep_vae

pytestmark = pytest.mark.usefixtures("float64")
FEATURES, WIDTH, SEEN = 4, 3, 2


def normal(inputs: int, latent: int) -> posteriors.DiagonalNormal:
    return posteriors.DiagonalNormal(nn.mlp(inputs, 2 * latent, hidden=(5,)))


def block(latent: int) -> Block:
    return Block(
        normal(WIDTH, latent), normal(WIDTH + SEEN, latent), nn.Added(nn.mlp(latent, WIDTH), nn.mlp(WIDTH, WIDTH))
    )


def top_down(*latents: int) -> TopDownVAE:
    likelihood = likelihoods.Bernoulli(nn.mlp(WIDTH, FEATURES, hidden=(5,)))
    return TopDownVAE(torch.randn(WIDTH), [block(n) for n in latents], likelihood, nn.mlp(FEATURES, SEEN))


def data(rows: int = 5) -> Tensor:
    return torch.rand(rows, FEATURES).lt(0.5).double()


class Of(torch.nn.Module):
    """A function of some modules as a part."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function, self.modules_ = function, torch.nn.ModuleList(modules)

    def forward(self, *given):
        return self.function(*given)


def test_one_block_is_the_vae():
    vae, x = top_down(2), data()
    (only,) = vae.blocks
    plain = VAE(
        Of(lambda: only.prior(vae.start()), vae),
        Of(lambda z: vae.likelihood(only.step(vae.start(), z)), vae),
        Of(lambda x: only.posterior(vae.start(), context=vae.encoder(x)), vae),
    )
    torch.manual_seed(3)
    ours = terms(vae.model, vae.guide, x, 4)
    torch.manual_seed(3)
    theirs = terms(plain.model, plain.guide, x, 4)
    assert torch.equal(ours.guide["z1"].value, theirs.guide["z"].value)
    torch.testing.assert_close(ours.log_weight, theirs.log_weight)


def log_px(vae: TopDownVAE, x: Tensor) -> Tensor:
    """Of two blocks of a number each, by Gauss-Hermite quadrature over the noise of z2 and then of z1."""
    node, weight = np.polynomial.hermite_e.hermegauss(40)
    noise, mass = torch.tensor(node)[:, None], torch.tensor(weight / weight.sum()).log()
    h: Tensor = vae.start()
    for each in vae.blocks:
        loc, log_scale = each.prior.net(h).unsqueeze(-2).expand(*h.shape[:-1], 40, 2).chunk(2, -1)
        z = loc + log_scale.exp() * noise  # [40, 1], then [40, 40, 1]
        h = each.step.then(h.unsqueeze(-2) + each.step.net(z))
    log_lik = torch.distributions.Bernoulli(logits=vae.likelihood.net(h).unsqueeze(-2)).log_prob(x).sum(-1)
    return (log_lik + mass[:, None, None] + mass[:, None]).logsumexp((0, 1))


def test_log_px_is_what_quadrature_gives():
    vae, x = top_down(1, 1), data()
    with torch.no_grad():  # a guide near the prior: the weights are as bounded as the likelihood is
        for each in vae.blocks:
            for p in [*each.prior.parameters(), *each.posterior.parameters()]:
                p.mul_(0.3)
        est = log_marginal(vae.model, vae.guide, x, num_particles=6000, seed=1, progress=False, proposal="guide")
        exact = log_px(vae, x)
    assert bool(est.reliable.all())
    assert bool((est.std_error < 0.02).all())
    assert bool(((est.log_px - exact).abs() < 4.5 * est.std_error).all())  # fails once in 30000


def linear(inputs: int, latent: int, scale: float) -> posteriors.DiagonalNormal:
    net = torch.nn.Linear(inputs, 2 * latent)
    with torch.no_grad():
        net.weight[latent:] = 0
        net.bias[latent:] = math.log(scale)
    return posteriors.DiagonalNormal(net)


def test_linear_blocks_have_the_dense_normals_log_px():
    """z2 ~ N(m, s^2), h = start + A z2, z1 ~ N(B h + b, s^2), h += C z1, x ~ N(W h + w, I): x is normal."""
    top = Block(linear(WIDTH, 1, 0.7), linear(WIDTH + FEATURES, 1, 0.9), nn.Added(torch.nn.Linear(1, WIDTH)))
    low = Block(linear(WIDTH, 2, 0.5), linear(WIDTH + FEATURES, 2, 0.7), nn.Added(torch.nn.Linear(2, WIDTH)))
    out = torch.nn.Linear(WIDTH, FEATURES)
    vae = TopDownVAE(torch.randn(WIDTH), [top, low], likelihoods.Normal(out, scale=1.0), torch.nn.Identity())
    with torch.no_grad():
        for each in vae.blocks:  # a guide near the prior
            net, of = each.posterior.module.net, each.prior.net
            net.weight[: of.out_features // 2].zero_()[:, :WIDTH] = of.weight[: of.out_features // 2]
            net.bias.copy_(torch.cat([of.bias.chunk(2)[0], net.bias.chunk(2)[1]]))
        h, cov = vae.start().clone(), torch.zeros(WIDTH, WIDTH)
        for each, scale in ((top, 0.7), (low, 0.5)):
            latent = each.prior.net.out_features // 2
            b, a = each.prior.net.weight[:latent], each.step.net.weight
            h = h + a @ (b @ h + each.prior.net.bias[:latent]) + each.step.net.bias
            on = torch.eye(WIDTH) + a @ b
            cov = on @ cov @ on.T + scale**2 * a @ a.T
        x = torch.randn(4, FEATURES)
        exact = torch.distributions.MultivariateNormal(
            out(h), out.weight @ cov @ out.weight.T + torch.eye(FEATURES)
        ).log_prob(x)
        est = log_marginal(vae.model, vae.guide, x, num_particles=6000, progress=False, proposal="guide")
    assert bool((est.std_error < 0.03).all())
    assert bool(((est.log_px - exact).abs() < 4.5 * est.std_error).all())


def images(rows: int = 3) -> Tensor:
    return torch.randint(0, 4, (rows, 3, 4, 4)).double() / 3


def deep() -> TopDownVAE:
    made = very_deep_vae(images(), sides=(1, 2, 4), blocks=(1, 2, 1), width=4, latent=2, components=2, levels=4)
    return made.double()


def test_a_vdvae_has_latent_images_of_rising_sizes_and_sums_to_one_over_each_pixel():
    vae, x = deep(), images()
    t = terms(vae.model, vae.guide, x, 3)
    assert [t.guide[f"z{i}"].value.shape[-1] for i in (4, 3, 2, 1)] == [2, 8, 8, 32]
    assert bool(t.log_weight.isfinite().all())
    levels = torch.cartesian_prod(*[torch.arange(4.0) / 3] * 3)  # every colour of a pixel
    with torch.no_grad():
        every = torch.zeros(64, 3, 4, 4)
        h = torch.randn(4 * 16)
        fn = vae.likelihood(h)
        base = fn.log_prob(every[:1])
        every[:, :, 1, 2] = levels
        other = fn.log_prob(every)
        black = 1 / (other - base).exp().sum()  # p(black) of that pixel, if its colours sum to one
        m = fn.logits.softmax(-2)[..., 6], fn.loc[..., 6], fn.log_scale[..., 6]
        edge = torch.sigmoid((1 / 6 - m[1]) / m[2].exp()).prod(-1)  # black: nothing to couple with
        torch.testing.assert_close(black, (m[0] * edge).sum())


def test_log_px_of_a_vdvae_is_the_mean_over_its_prior():
    x = torch.randint(0, 4, (3, 1, 2, 2)).double() / 3
    vae = very_deep_vae(x, sides=(1, 2), blocks=(1, 1), width=4, latent=1, components=2, levels=4).double()
    with torch.no_grad():  # a guide near the prior, and a likelihood that does not vary much with z
        for each in vae.blocks:
            for p in [*each.prior.parameters(), *each.posterior.parameters(), *each.step.net.parameters()]:
                p.mul_(0.5)
        est = log_marginal(vae.model, vae.guide, x, num_particles=5000, seed=1, progress=False, proposal="guide")
        h, draws = vae.start(), 20000
        for each in vae.blocks:
            fn = each.prior(h)
            h = each.step(h, fn.sample(() if fn.batch_shape else (draws,)))
        masses = vae.likelihood(h.unsqueeze(1)).log_prob(x).exp()
    exact = masses.mean(0).log()
    error = (est.std_error**2 + masses.var(0) / draws / masses.mean(0) ** 2).sqrt()
    assert bool((error < 0.05).all())
    assert bool(((est.log_px - exact).abs() < 4.5 * error).all())  # fails once in 50000


def test_features_that_do_not_count_are_refused():
    vae = top_down(1, 1)
    vae.encoder = Of(lambda x: [x])
    with pytest.raises(ContractError, match="encoder: expected features for each of 2 blocks, found 1"):
        check(vae.model, vae.guide, data())


def test_a_part_that_does_not_fit_is_refused_by_its_place():
    vae = top_down(1, 1)
    vae.blocks[1].prior = normal(7, 1)
    with pytest.raises(ContractError, match=r"blocks.1.prior: DiagonalNormal does not take float64"):
        check(vae.model, vae.guide, data())


@pytest.mark.parametrize(("given", "message"), [
    ({"sides": (1, 3, 4), "blocks": (1, 1, 1)}, "sides: expected each to divide the next, found 3 before 4"),
    ({"sides": (1, 8), "blocks": (1, 1)}, r"expected images \[N, C, 8, 8\]"),
    ({"sides": (1, 4), "blocks": (1,)}, "a number of blocks for each of 2 sides, found .* 1 numbers"),
])  # fmt: skip
def test_sizes_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        very_deep_vae(images(), **given)
