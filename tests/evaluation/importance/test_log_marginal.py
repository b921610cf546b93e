"""log p(x) by importance sampling against closed forms, enumeration and direct formulas on all the weights."""

import itertools
import json
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from ppvae import data as datasets
from ppvae import fit, likelihoods, log_marginal
from ppvae.errors import ContractError, DataError, UsageError
from ppvae.evaluation.importance import sampler
from ppvae.evaluation.importance.accumulators import LogWeightAccumulator
from ppvae.evaluation.importance.psis import smoothed
from ppvae.evaluation.reliability import k_hat_upper
from ppvae.inference import terms
from ppvae.models import LinearGaussian
from ppvae.nn import MADE
from ppvae.rng import derive_seed
from tests.programs.strangers import PAIRS

pytestmark = pytest.mark.usefixtures("float64")


def oracle(features, latent, scale, count):
    """A linear-Gaussian pair and data of its own."""
    torch.manual_seed(1)
    pair = LinearGaussian(features, latent, scale)
    for p in pair.parameters():
        p.requires_grad_(False)
    pair.loc.normal_()
    x = dist.LowRankMultivariateNormal(pair.loc, pair.weight, scale**2 * torch.ones(features)).sample((count,))
    return pair, x


def from_prior(latent):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(latent), 1.0).to_event(1))

    return guide


def registered(name):
    """A pair of `strangers` whose parameters are in the store, as after training."""
    model, guide, batch = PAIRS[name]()
    for fn in (guide, model):
        poutine.trace(fn).get_trace(*batch)
    return model, guide, batch


# -- the linear-Gaussian oracle ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("features", "latent"), [(5, 2), (784, 8)])
def test_the_exact_guide_gives_log_px_with_one_particle(features, latent):
    pair, x = oracle(features, latent, 0.5, 60)
    est = log_marginal(pair.model, pair.guide, x, num_particles=1, proposal="guide")
    assert (est.log_px - pair.log_px(x)).abs().max() < 1e-9
    assert est.nll == pytest.approx(-float(pair.log_px(x).mean()), abs=1e-9)
    assert est.bits_per_dim == pytest.approx(est.nll / (features * math.log(2)), abs=1e-12)
    assert est.dims == features


def test_the_exact_guide_is_never_flagged():
    pair, x = oracle(20, 4, 0.5, 60)
    est = log_marginal(pair.model, pair.guide, x, num_particles=200, proposal="guide")
    assert est.reliable.all()
    assert (est.k_hat == -math.inf).all()
    assert (est.std_error < 1e-7).all()
    assert (est.ess - 200).abs().max() < 1e-6


@pytest.mark.parametrize("count", [25, 30, 50])
def test_equal_weights_are_reliable_from_25_draws_on(count):
    pair, x = oracle(5, 2, 0.5, 60)
    assert log_marginal(pair.model, pair.guide, x, num_particles=count, proposal="guide").reliable.all()


def test_a_good_mean_field_guide_is_near_and_trusted():
    """D = 8, N = 200, K = 5000. The mean error's standard error is 0.0007: 0.02 is beyond 20 of them."""
    pair, x = oracle(40, 8, 2.0, 200)
    est = log_marginal(pair.model, pair.mean_field, x, num_particles=5000, proposal="guide")
    error = est.log_px - pair.log_px(x)
    assert error.mean().abs() < 0.02
    assert error.abs().mean() > 1e-4  # the guide is not exact: this is a test of averaging
    assert (est.elbo - pair.log_px(x)).mean() < -0.1
    assert (~est.reliable).double().mean() < 0.05  # measured: 0 of 1200, so that 10 of 200 have p < 1e-9
    # the errors are as large as std_error says: the mean of 200 squared z-scores is 1 with sd 0.1 (p < 1e-6)
    assert 0.5 < (error / est.std_error).square().mean() < 1.5


def test_the_prior_as_guide_is_flagged_where_it_fails():
    """Error about -13 nats (as large as RELIABILITY's -12), and more than 95 % flagged; measured: all."""
    pair, x = oracle(64, 8, 0.5, 100)
    est = log_marginal(pair.model, from_prior(8), x, num_particles=5000, proposal="guide")
    error = est.log_px - pair.log_px(x)
    assert error.mean() < -8
    assert (~est.reliable).double().mean() > 0.95
    assert "are unreliable" in est.summary()


def test_bounds_rise_with_k_and_stay_below_log_px():
    """L_K <= L_2K + 4 se and L_K <= log p + 4 se over 200 data: each fails with p < 4e-5 where they were equal."""
    pair, x = oracle(20, 8, 0.5, 200)
    k = 512
    est = log_marginal(pair.model, pair.mean_field, x, num_particles=k, proposal="guide")
    exact = pair.log_px(x)
    for small in [2**i for i in range(9)]:
        rise = est.bound(2 * small) - est.bound(small)
        assert (rise > -1e-9).all()  # groups of 2k are two groups of k: Jensen holds draw by draw
        slack = 4 * (est.bound(small) - exact).std() / math.sqrt(len(x))
        assert (est.bound(small) - exact).mean() < slack
    other = log_marginal(
        pair.model, pair.mean_field, x, num_particles=2 * k, seed=5, proposal="guide"
    )  # independent draws
    gap = est.log_px - other.log_px
    assert gap.mean() < 4 * gap.std() / math.sqrt(len(x))
    assert (est.bound(1) - exact).mean() < -0.3  # the law is not empty


def test_a_point_mass_is_refused():
    pair, x = oracle(5, 2, 0.5, 10)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(pair.posterior(x).mean, event_dim=1))

    with pytest.raises(ContractError, match="Delta"):
        log_marginal(pair.model, guide, x, proposal="guide")


# -- discrete and shared latents --------------------------------------------------------------------------------------


def binary_latents(features, latent, enumerate_):
    """z_d ~ Bernoulli(0.3), d = 1..D, x ~ Bernoulli(sigmoid(weight z + bias)); and log p(x) over all 2^D."""
    torch.manual_seed(2)
    weight, bias = 2 * torch.randn(latent, features), torch.randn(features)
    infer = {"enumerate": "parallel"} if enumerate_ else {}

    def model(x):
        with pyro.plate("data", len(x)):
            logits = bias
            for d in range(latent):
                z = pyro.sample(f"z{d}", dist.Bernoulli(torch.tensor(0.3)), infer=infer)
                logits = logits + z[..., None] * weight[d]
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def log_px(x):
        total = []
        for values in itertools.product((0.0, 1.0), repeat=latent):
            z = torch.tensor(values)
            log_prior = dist.Bernoulli(0.3).log_prob(z).sum()
            total.append(log_prior + dist.Bernoulli(logits=bias + z @ weight).log_prob(x).sum(-1))
        return torch.stack(total).logsumexp(0)

    x = (torch.rand(60, features) < 0.5).double()
    return model, log_px, x, weight


def test_enumerated_latents_are_summed_out_exactly():
    model, log_px, x, _ = binary_latents(6, 7, True)
    est = log_marginal(model, lambda x: None, x, num_particles=1, proposal="guide")
    assert (est.log_px - log_px(x)).abs().max() < 1e-10


def test_a_discrete_guide_agrees_with_enumeration():
    """Each of 60 data within 5 standard errors: fails with p < 60 * 6e-7 = 4e-5 (largest of 300 measured: 3.1)."""
    model, log_px, x, weight = binary_latents(6, 5, False)

    def guide(x):
        logits = 0.3 * (x - 0.5) @ weight.T - 0.5
        with pyro.plate("data", len(x)):
            for d in range(5):
                pyro.sample(f"z{d}", dist.Bernoulli(logits=logits[..., d]))

    est = log_marginal(model, guide, x, num_particles=4000, proposal="guide")
    z = (est.log_px - log_px(x)) / est.std_error
    assert z.abs().max() < 5
    assert 0.3 < z.square().mean() < 2.2  # 60 squared z-scores have mean 1 and sd 0.18: p < 1e-6
    assert est.reliable.all()


def test_a_latent_enumerated_in_the_guide_is_summed_out_exactly():
    """A semi-supervised y with nothing else to draw: log p(x) for any q(y | x), and the elbo is below it."""

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(2 * y, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x), infer={"enumerate": "parallel"})

    x = torch.randn(60)
    p = [math.log(w) + dist.Normal(m, 1.0).log_prob(x) for w, m in ((0.7, 0.0), (0.3, 2.0))]
    q = [torch.sigmoid(-x), torch.sigmoid(x)]
    est = log_marginal(model, guide, x, num_particles=3, proposal="guide")
    assert (est.log_px - torch.logaddexp(*p)).abs().max() < 1e-10
    elbo = sum(w * (v - w.log()) for w, v in zip(q, p, strict=True))
    assert (est.elbo - elbo).abs().max() < 1e-10


def test_a_shared_latent_gives_one_joint_number():
    """x_i ~ N(loc, 1.25), loc ~ N(0, 4), in more than one block: the joint density is known; within 5 se (p < 6e-7)."""
    model, _, (x,) = PAIRS["shared_latent"]()
    x = torch.cat([x] * 12)
    n = len(x)
    precision = 1 / 4 + n / 1.25

    def guide(x):
        loc = pyro.sample("loc", dist.Normal(x.sum(0) / 1.25 / precision, 1.3 * precision**-0.5).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x + 0.2 * loc, 0.2**0.5).to_event(1))  # exact given loc

    est = log_marginal(model, guide, x, num_particles=2000, proposal="guide")
    joint = dist.MultivariateNormal(torch.zeros(n), 1.25 * torch.eye(n) + 4 * torch.ones(n, n))
    exact = joint.log_prob(x.T).sum()
    assert est.joint
    assert est.log_px.shape == (1,)
    assert 0 < est.std_error[0] < 0.05
    assert (est.log_px[0] - exact).abs() < 5 * est.std_error[0]
    assert est.dims == x.numel()
    assert "whole data set" in est.summary()


# -- the same result however it is computed ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_the_result_does_not_depend_on_chunks(name):
    """K over two particle blocks; rows: all at once, a few particles, and one."""
    model, guide, batch = registered(name)
    options = {"num_particles": 120, "seed": 3, "proposal": "guide"}
    first = log_marginal(model, guide, batch, **options, rows=10**6)
    assert torch.isfinite(first.log_px).all()
    for rows in (100, 1):
        again = log_marginal(model, guide, batch, **options, rows=rows)
        for key in ("log_px", "elbo", "std_error", "ess"):
            torch.testing.assert_close(getattr(again, key), getattr(first, key), rtol=1e-9, atol=1e-9)
        for k, value in first.bounds.items():
            torch.testing.assert_close(again.bound(k), value, rtol=0, atol=1e-9)
        assert torch.equal(again.reliable, first.reliable)


@pytest.mark.parametrize("name", ["modules", "conv", "rnn", "inner_plate", "auxiliary", "flow", "supports"])
def test_in_float32_the_result_does_not_depend_on_chunks_either(name):
    torch.set_default_dtype(torch.float32)
    model, guide, batch = registered(name)
    found = [
        log_marginal(model, guide, batch, num_particles=120, rows=rows, proposal="guide") for rows in (10**6, 100, 1)
    ]
    for est in found[1:]:
        assert est.log_px.dtype is torch.float64
        assert (est.log_px - found[0].log_px).abs().max() < 1e-4


def linear_helper(count):
    """A helper, and a Delta at a matrix product of it, which rounds differently for other numbers of rows."""
    torch.manual_seed(4)
    tril, net = torch.randn(37, 37).tril() + 3 * torch.eye(37), torch.randn(37, 5)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(37), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(0.1 * z @ net, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Normal(torch.zeros(37), 0.3).to_event(1), infer={"is_auxiliary": True})
            log_density = -tril.diagonal().abs().log().sum().expand(h.shape[:-1])
            pyro.sample("z", dist.Delta(h @ tril.T, log_density=log_density, event_dim=1))

    return model, guide, torch.randn(count, 5)


@pytest.mark.parametrize("count", [1, 2])
def test_a_delta_at_a_matrix_product_does_not_depend_on_chunks(count):
    model, guide, x = linear_helper(count)
    found = [log_marginal(model, guide, x, num_particles=100, rows=rows, proposal="guide") for rows in (10**6, 7, 1)]
    for est in found[1:]:
        assert (est.log_px - found[0].log_px).abs().max() < 1e-9


def test_imputed_values_do_not_disturb_the_noise_of_the_guide():
    _, guide, (x, seen) = registered("obs_mask")

    def stubborn(x, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0)).view(6)  # neither vectorised nor folded
            pyro.sample("x", dist.Normal(z, 0.5), obs=x, obs_mask=seen)

    found = [
        log_marginal(stubborn, guide, (x, seen), num_particles=50, rows=rows, proposal="guide") for rows in (10**6, 6)
    ]
    assert (found[0].log_px - found[1].log_px).abs().max() < 1e-9


def test_a_delta_beside_an_enumerated_site_does_not_depend_on_chunks():
    _, guide, x = linear_helper(1)
    net = torch.randn(37, 5)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(37), 1.0).to_event(1))
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(0.1 * z @ net + k[..., None], 1.0).to_event(1), obs=x)

    found = [log_marginal(model, guide, x, num_particles=100, rows=rows, proposal="guide") for rows in (10**6, 7, 1)]
    for est in found[1:]:
        assert (est.log_px - found[0].log_px).abs().max() < 1e-9


def test_a_flow_without_an_inverse_can_be_cut_in_chunks():
    steps = dist.transforms.Planar(2)

    def guide(x):
        pyro.module("planar", steps)
        with pyro.plate("data", len(x)):
            base = dist.Normal(x[..., :2], 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [steps]))

    pair, x = oracle(5, 2, 0.5, 6)
    found = [log_marginal(pair.model, guide, x, num_particles=50, rows=rows, proposal="guide") for rows in (10**6, 12)]
    assert (found[0].log_px - found[1].log_px).abs().max() < 1e-9


def test_noise_belongs_to_seed_block_and_particle():
    pair, x = oracle(20, 4, 0.5, 120)
    whole = log_marginal(pair.model, pair.mean_field, x, num_particles=250, proposal="guide")
    again = log_marginal(pair.model, pair.mean_field, x, num_particles=250, proposal="guide")
    assert torch.equal(whole.log_px, again.log_px)
    first = log_marginal(
        pair.model, pair.mean_field, x[:50], num_particles=250, proposal="guide"
    )  # the first block alone
    torch.testing.assert_close(whole.log_px[:50], first.log_px, rtol=0, atol=1e-9)
    fewer = log_marginal(
        pair.model, pair.mean_field, x, num_particles=100, proposal="guide"
    )  # the first particle block alone
    longer = log_marginal(pair.model, pair.mean_field, x, num_particles=199, bounds=(100,), proposal="guide")
    torch.testing.assert_close(longer.bound(100), fewer.log_px, rtol=0, atol=1e-9)
    other = log_marginal(pair.model, pair.mean_field, x, num_particles=250, seed=1, proposal="guide")
    assert (other.log_px - whole.log_px).abs().min() > 0
    same = log_marginal(pair.model, pair.mean_field, torch.cat([x[:50], x[:50]]), num_particles=250, proposal="guide")
    assert (same.log_px[:50] - same.log_px[50:]).abs().min() > 0  # blocks do not share their noise


def test_evaluation_does_not_disturb_the_noise():
    pair, x = oracle(5, 2, 0.5, 60)
    state = torch.get_rng_state()
    log_marginal(pair.model, pair.mean_field, x, num_particles=30, posterior_draws=2, proposal="guide")
    assert torch.equal(torch.get_rng_state(), state)


# -- what is reported, from all the weights ---------------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch):
    """Every log-weight and elbo of the next log_marginal, [K, N] each."""
    blocks = []

    class Recording(sampler.LogWeightAccumulator):
        def __init__(self, *args):
            super().__init__(*args)
            blocks.append([])

        def add(self, log_weight, elbo):
            blocks[-1].append((log_weight.clone(), elbo.clone()))
            super().add(log_weight, elbo)

    monkeypatch.setattr(sampler, "LogWeightAccumulator", Recording)

    def collect():
        return tuple(torch.cat([torch.cat([part[i] for part in b]) for b in blocks], 1) for i in (0, 1))

    return collect


@pytest.mark.parametrize("count", [1, 2, 30, 537, 4321])
def test_every_number_is_that_of_the_weights(recorded, count):
    pair, x = oracle(20, 4, 0.5, 60)
    est = log_marginal(pair.model, pair.mean_field, x, num_particles=count, bounds=(7, 300), rows=333, proposal="guide")
    w, elbo = recorded()
    assert w.shape == (count, 60)
    z = w.exp() / w.amax(0).exp()
    torch.testing.assert_close(est.log_px, w.logsumexp(0) - math.log(count), rtol=0, atol=1e-12)
    torch.testing.assert_close(est.elbo, elbo.mean(0), rtol=0, atol=1e-11)
    torch.testing.assert_close(est.elbo, w.mean(0), rtol=0, atol=1e-11)
    torch.testing.assert_close(est.ess, z.sum(0) ** 2 / (z**2).sum(0), rtol=1e-9, atol=0)
    if count == 1:
        assert est.std_error.isnan().all()
    else:
        torch.testing.assert_close(est.std_error, z.std(0) / z.mean(0) / math.sqrt(count), rtol=1e-6, atol=0)
    if count < 25:
        assert est.k_hat.isnan().all()
        assert not est.reliable.any()
    else:
        torch.testing.assert_close(est.k_hat, smoothed(w)[1], rtol=1e-9, atol=1e-12)
        upper, limit = k_hat_upper(est.k_hat, est.particles), min(0.6, 1 - 1 / math.log10(count))
        assert torch.equal(est.reliable, (est.ess >= 50) & (upper < limit))
    for k in est.bounds:
        groups = w[: count // k * k].reshape(count // k, k, 60).logsumexp(1) - math.log(k)
        torch.testing.assert_close(est.bound(k), groups.mean(0), rtol=0, atol=1e-11)
    if count > 1:
        assert est.nll_std_error == pytest.approx(float(est.log_px.std()) / math.sqrt(60))
    assert {7, 300} & set(est.bounds) == {k for k in (7, 300) if k <= count}
    assert count in est.bounds


def test_the_weights_are_those_of_the_terms(recorded):
    """What is reduced is log p(x, z) - log q(z | x) of draws from q: by hand, for the recorded noise."""
    pair, x = oracle(5, 2, 0.5, 20)
    log_marginal(pair.model, pair.mean_field, x, num_particles=300, proposal="guide")
    w, _ = recorded()
    exact = pair.posterior(x)
    scale = exact.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
    found = []
    for number in range(3):
        torch.manual_seed(derive_seed(0, 0, number))
        z = exact.loc + scale * torch.randn(100, 20, 2)
        log_q = dist.Normal(exact.loc, scale).log_prob(z).sum(-1)
        log_p = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        found.append(log_p + dist.Normal(z @ pair.weight.T + pair.loc, 0.5).log_prob(x).sum(-1) - log_q)
    torch.testing.assert_close(w, torch.cat(found), rtol=0, atol=1e-9)


def test_a_bound_that_was_not_recorded():
    pair, x = oracle(5, 2, 0.5, 5)
    est = log_marginal(pair.model, pair.guide, x, num_particles=30, proposal="guide")
    with pytest.raises(UsageError, match=r"bound\(3\).*\[1, 2, 4, 5, 8, 10, 16, 20, 30\].*bounds=\(3,\)"):
        est.bound(3)


def test_few_particles_judge_nothing():
    pair, x = oracle(5, 2, 0.5, 5)
    est = log_marginal(pair.model, pair.guide, x, num_particles=24, proposal="guide")
    assert not est.reliable.any()
    assert est.k_hat.isnan().all()
    assert "too few to judge" in est.summary()


def broken_pair(what, where):
    """z ~ N(0, 1), x ~ N(z, 1) with a factor of `what` wherever `where(z, row number)` holds."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            row = torch.arange(len(x)).expand(z.shape)
            factor = torch.where(where(z, row), torch.full_like(z, what), torch.zeros_like(z))
            pyro.sample("broken", dist.Unit(factor, validate_args=False), obs=torch.empty(*z.shape, 0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    return model, guide, torch.randn(6)


def test_some_weights_of_zero_are_legal(recorded):
    """The exact guide with half of its draws cut off: log p(x) + log of the fraction that is kept, for every datum."""
    model, guide, x = broken_pair(-torch.inf, lambda z, row: (z > 0) & (row > 2))
    est = log_marginal(model, guide, x, num_particles=1000, proposal="guide")
    w, _ = recorded()
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    kept = (w > -torch.inf).double().mean(0)
    assert ((kept[3:] > 0.05) & (kept[3:] < 0.98)).all()
    torch.testing.assert_close(est.log_px, exact + kept.log(), rtol=0, atol=1e-9)
    torch.testing.assert_close(est.ess, 1000 * kept, rtol=1e-9, atol=0)
    torch.testing.assert_close(est.std_error, ((1 - kept) / kept / 999).sqrt(), rtol=1e-9, atol=1e-9)
    assert (est.nonfinite == 0).all()
    assert est.reliable.all()
    assert (est.elbo[3:] == -torch.inf).all()


def test_a_draw_outside_the_support_of_the_prior_has_weight_zero():
    """z ~ U(0, 1) under a normal guide: log p(x) in closed form; each of 6 data within 5 se (p < 4e-6)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 + 0 * x, 0.5))

    x = torch.randn(6)
    est = log_marginal(model, guide, x, num_particles=2000, proposal="guide")
    exact = (dist.Normal(0.0, 1.0).cdf(x) - dist.Normal(0.0, 1.0).cdf(x - 1)).log()
    assert (est.log_px - exact).abs().max() < 5 * est.std_error.max()
    assert est.reliable.all()


def test_an_observation_outside_a_support_that_a_latent_sets_has_weight_zero():
    """x ~ U(0, z), z ~ Gamma(2, 1): p(x) = exp(-x). Draws z < x have weight zero; each of 5 within 5 se (p < 3e-6)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.tensor(2.0), 1.0))
            pyro.sample("x", dist.Uniform(0.0, z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(x.log() + 0.5, 1.0))

    x = 0.2 + torch.rand(5)
    est = log_marginal(model, guide, x, num_particles=4000, proposal="guide")
    assert ((est.log_px + x).abs() < 5 * est.std_error).all()


def test_draws_where_a_gamma_prior_has_no_mass_have_weight_zero():
    """torch's Gamma gives NaN at a negative value; x = 0 observed under N(z, 1) leaves E[exp(-z^2/2)], z ~ Gamma(2)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.tensor(2.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(1 + 0 * x, 1.0))

    est = log_marginal(model, guide, torch.zeros(2), num_particles=4000, proposal="guide")
    grid = torch.linspace(0, 12, 200_001)
    exact = torch.trapezoid(grid * (-grid - grid**2 / 2).exp(), grid).log() - 0.5 * math.log(2 * math.pi)
    assert (est.nonfinite == 0).all()
    assert ((est.log_px - exact).abs() < 5 * est.std_error).all()  # p < 2e-6


@pytest.mark.parametrize("what", [-torch.inf, torch.inf, torch.nan])
def test_data_without_a_usable_weight_are_flagged_and_counted(what):
    model, guide, x = broken_pair(what, lambda z, row: row == 2)
    est = log_marginal(model, guide, x, num_particles=200, proposal="guide")
    good = torch.arange(6) != 2
    assert torch.equal(est.reliable, good)
    assert torch.equal(est.nonfinite > 0, ~good)
    if what != -torch.inf:
        assert est.nonfinite[2] == 200
        assert not math.isfinite(est.nll)  # never skipped
    else:
        assert est.log_px[2] == -torch.inf
        assert est.nll == math.inf
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    assert (est.log_px - exact)[good].abs().max() < 1e-9
    assert "1 with non-finite weights" in est.summary()
    assert "(1 of 6)" in est.summary()


@pytest.mark.parametrize("row", [7, 65])
def test_a_datum_whose_encoding_is_nan_is_flagged_wherever_it_stands(row):
    """A guide that overflows for one datum of 70: the others are evaluated, in the first block and in a later one."""
    pair, x = oracle(5, 2, 0.5, 70)
    x[row] = 1e200

    def guide(x):
        with pyro.plate("data", len(x)):
            loc = x[:, :2].pow(3)
            pyro.sample("z", dist.Normal(loc - loc + pair.posterior(x).mean, 1.0).to_event(1))

    est = log_marginal(pair.model, guide, x, num_particles=100, proposal="guide")
    bad = torch.arange(70) == row
    assert torch.equal(est.nonfinite > 0, bad)
    assert torch.isfinite(est.log_px[~bad]).all()


def test_one_bad_weight_of_many_is_enough():
    """A NaN or +inf for about one draw in five hundred of each datum."""
    for what in (torch.nan, torch.inf):
        model, guide, x = broken_pair(what, lambda z, row: (z.sin() * 1e4).frac() > 0.995)
        est = log_marginal(model, guide, x, num_particles=2000, proposal="guide")
        assert ((est.nonfinite > 0) & (est.nonfinite < 200)).all()
        assert not est.reliable.any()


# -- posterior draws --------------------------------------------------------------------------------------------------


def whitened(exact, z):
    """Residuals [draws, N, D] that are standard normal where z is drawn from the exact posterior."""
    tril = torch.linalg.cholesky(exact.covariance_matrix)
    return torch.linalg.solve_triangular(tril, (z - exact.loc).unsqueeze(-1), upper=False).squeeze(-1)


def test_posterior_draws_are_draws_from_the_posterior():
    """Mean and covariance of 60 x 400 whitened draws against 0 and I, each of 9 numbers within 5 sd: p < 6e-6.

    Draws of one datum share particles, so that a mean over draws has variance (1 / draws + 1 / ess) / 60. The guide's
    own draws must fail by the same measure (24 measured).
    """
    pair, x = oracle(12, 3, 1.0, 60)
    est = log_marginal(pair.model, pair.mean_field, x, num_particles=3000, posterior_draws=400, proposal="guide")
    z = est.posterior["z"]
    assert z.shape == (400, 60, 3)
    exact = pair.posterior(x)
    spread = ((1 / 400 + (1 / est.ess).mean()) / 60).sqrt()

    def scores(z):
        r = whitened(exact, z)
        mean = r.mean((0, 1)) / spread
        cov = torch.einsum("sni,snj->ij", r, r) / (r.shape[0] * r.shape[1])
        return mean.abs().max(), ((cov - torch.eye(3)) / (spread * (1 + torch.eye(3)).sqrt())).abs().max()

    assert max(scores(z)) < 5
    with torch.no_grad():
        own = terms(pair.model, pair.mean_field, x, 400).guide["z"].value
    assert max(scores(own)) > 15


def test_posterior_draws_do_not_depend_on_chunks():
    pair, x = oracle(6, 3, 0.7, 20)
    found = [
        log_marginal(
            pair.model, pair.mean_field, x, num_particles=300, posterior_draws=5, rows=rows, proposal="guide"
        ).posterior["z"]
        for rows in (10**6, 400)
    ]
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "name",
    ["modules", "hierarchical", "indexes", "labelled", "supports", "conv", "rnn", "inner_plate", "masked"],
)
def test_posterior_draws_of_strangers(name):
    model, guide, batch = registered(name)
    est = log_marginal(model, guide, batch, num_particles=50, posterior_draws=4, proposal="guide")
    own = terms(model, guide, batch).guide
    assert est.posterior is not None
    assert set(est.posterior) == {n for n, s in own.items() if s.role == "latent"}
    for n, draws in est.posterior.items():
        assert draws.shape[:2] == (4, len(batch[0])), n
        assert torch.isfinite(draws).all()


# -- files ------------------------------------------------------------------------------------------------------------


def opened(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ 0.23 warns of 1.0 on import
        import arviz
    return arviz.from_netcdf(path)["marginal_likelihood"]


def test_files_come_back(tmp_path):
    pair, x = oracle(6, 3, 0.7, 20)
    est = log_marginal(pair.model, pair.mean_field, x, num_particles=100, posterior_draws=3, seed=4, proposal="guide")
    path = est.save(tmp_path / "new", "test")
    content = json.loads(path.read_text())
    for key, value in est.per_datum().items():
        assert torch.equal(torch.tensor(content["per_datum"][key]).to(value), value), key
    assert content["nll"] == est.nll
    assert (content["num_particles"], content["seed"], content["dims"], content["num_data"]) == (100, 4, 6, 20)
    assert content["curve"]["100"] == pytest.approx(-est.nll)
    assert content["summary"] == est.summary().splitlines()
    group = opened(tmp_path / "new" / "test.nc")
    for key, value in est.per_datum().items():
        assert torch.equal(torch.as_tensor(group[key].values).to(value), value), key
    assert torch.equal(torch.as_tensor(group["bound_10"].values), est.bound(10))
    tree = est.to_arviz()
    assert tree["posterior"]["z"].shape == (1, 3, 20, 3)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["test.json", "test.nc"]


@pytest.mark.parametrize("particles", [1, 30])
def test_files_hold_what_is_not_finite_per_datum(tmp_path, particles):
    pair, x = oracle(6, 3, 0.7, 4)
    est = log_marginal(pair.model, pair.guide, x, num_particles=particles, proposal="guide")
    content = json.loads(est.save(tmp_path).read_text())
    expected = ("k_hat", "nan") if particles == 1 else ("k_hat", "-inf")
    assert content["per_datum"][expected[0]] == [expected[1]] * 4
    k_hat = torch.as_tensor(opened(tmp_path / "log_marginal.nc")["k_hat"].values)
    assert torch.equal(k_hat.nan_to_num(-1), est.k_hat.nan_to_num(-1))


@pytest.mark.parametrize("case", ["one datum", "joint", "zero", "nan"])
def test_files_hold_means_that_are_not_finite(tmp_path, case):
    if case == "joint":
        model, guide, batch = registered("shared_latent")
    else:
        value = {"one datum": 0.0, "zero": -torch.inf, "nan": torch.nan}[case]
        model, guide, batch = broken_pair(value, lambda z, row: row == 0)
        batch = batch[:1] if case == "one datum" else batch
    est = log_marginal(model, guide, batch, num_particles=30, proposal="guide")
    content = json.loads(est.save(tmp_path).read_text())
    assert float(content["nll"]) == pytest.approx(est.nll, nan_ok=True)


def test_bits_per_dim_name_what_they_are_relative_to():
    """Three distributions that ignore z: bits are those of a coin, of 17 equal levels, and of a density of one."""

    def model_of(likelihood):
        def model(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", likelihood.to_event(1), obs=x)

        return model

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    coin, flat = dist.Bernoulli(0.5 * torch.ones(64)), dist.Uniform(torch.zeros(64), torch.ones(64))
    binary = log_marginal(
        model_of(coin), guide, datasets.load("digits", binarize="fixed")[2], num_particles=2, proposal="guide"
    )
    assert (binary.base_measure, binary.levels, binary.dims) == ("binary", None, 64)
    assert binary.bits_per_dim == pytest.approx(1.0, abs=1e-6)
    levels = log_marginal(
        model_of(flat), guide, datasets.load("digits", dequantize=True)[2], num_particles=2, proposal="guide"
    )
    assert (levels.base_measure, levels.levels) == ("17 levels", 17)
    assert levels.bits_per_dim == pytest.approx(math.log2(17), abs=1e-6)
    plain = log_marginal(model_of(flat), guide, torch.rand(10, 64), num_particles=2, proposal="guide")
    assert (plain.base_measure, plain.bits_per_dim) == ("density", pytest.approx(0.0, abs=1e-12))
    assert plain.nll_std_error == pytest.approx(0.0, abs=1e-12)
    assert binary.digest != levels.digest
    assert "binarized" in binary.data


def no_latent(fn):
    """A pair whose latent says nothing: log p(x) is that of the distribution."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", fn, obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    return model, guide


class Constant(nn.Module):
    """A network that gives zeros [..., outputs], whatever z."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, z):
        return torch.zeros(*z.shape[:-1], *self.outputs)


def grey(levels, count=20, event=(6,)):
    """Grey levels v / (levels - 1)."""
    return torch.randint(levels, (count, *event)) / (levels - 1)


def autoregressive(levels):
    net = MADE(6, latent=1, hidden=(4,), outputs=1 if levels == 2 else levels)
    for p in net.parameters():
        torch.nn.init.zeros_(p)
    return likelihoods.Autoregressive(net, levels=levels)


def of(part):
    """The distribution of 20 data."""
    return part.requires_grad_(False)(torch.zeros(20, 1))


UNIFORM = {  # a uniform mass: the pair's distribution, the data, the measure's name, the bits of one number
    "Bernoulli": (lambda: of(likelihoods.Bernoulli(Constant(6))), grey(2), "binary", 1.0),
    "Categorical, 2 levels": (lambda: of(likelihoods.Categorical(Constant(12), 2)), grey(2), "binary", 1.0),
    "Categorical": (lambda: of(likelihoods.Categorical(Constant(6 * 256))), grey(256), "256 levels", 8.0),
    "Categorical, 17 levels": (
        lambda: of(likelihoods.Categorical(Constant(6 * 17), 17)), grey(17), "17 levels", math.log2(17)
    ),
    "Autoregressive, binary": (lambda: of(autoregressive(2)), grey(2), "binary", 1.0),
    "Autoregressive": (lambda: of(autoregressive(4)), grey(4), "4 levels", 2.0),
    "Pyro's Categorical": (
        lambda: dist.Categorical(logits=torch.zeros(6, 256)).to_event(1), torch.randint(256, (20, 6)), "256 levels", 8.0
    ),
    "masked": (lambda: dist.Bernoulli(torch.full((6,), 0.5)).mask(True).to_event(1), grey(2), "binary", 1.0),
    "a table of coins": (lambda: of(likelihoods.Mixed(Constant(6), ["binary"] * 6)), grey(2), "binary", 1.0),
    "a table of categories": (
        lambda: of(likelihoods.Mixed(Constant(12), [("categorical", 2)] * 6)), grey(2), "binary", 1.0
    ),
    "uniform density": (lambda: of(likelihoods.ContinuousBernoulli(Constant(6))), grey(9), "density on [0, 1]", 0.0),
    "Beta": (lambda: dist.Beta(torch.ones(6), 1.0).to_event(1), torch.rand(20, 6), "density on [0, 1]", 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", UNIFORM)
def test_bits_per_dim_of_uniform_masses(name):
    """log2 of the number of levels, exactly, with no offset: a mass is a mass already."""
    fn, x, measure, bits = UNIFORM[name]
    est = log_marginal(*no_latent(fn()), x.double() if x.is_floating_point() else x, num_particles=30, proposal="guide")
    assert est.base_measure == measure
    assert est.levels is None
    assert est.dims == 6
    assert est.bits_per_dim == pytest.approx(bits, abs=1e-5)
    assert f"bits per dim ({measure})" in est.summary()
    assert measure in est.table()["bits per dim"]
    assert est.to_arviz().attrs["base_measure"] == est.attributes()["base_measure"] == measure


def test_256_levels_by_mass_and_by_density_are_the_same_bits(tmp_path):
    """A uniform mass and, of the same images dequantised, a uniform density on [0, 1]: 8 bits a number each."""
    np.savez(tmp_path / "grey.npz", images=np.random.default_rng(0).integers(0, 256, (50, 6), dtype=np.uint8))
    plain = datasets.load(tmp_path / "grey.npz")[0]
    filled = datasets.load(tmp_path / "grey.npz", dequantize=True)[2]
    mass = log_marginal(
        *no_latent(of(likelihoods.Categorical(Constant(6 * 256)))), plain[:20], num_particles=30, proposal="guide"
    )
    density = log_marginal(
        *no_latent(dist.Uniform(torch.zeros(6), torch.ones(6)).to_event(1)), filled, num_particles=30, proposal="guide"
    )
    assert mass.bits_per_dim == pytest.approx(8.0, abs=1e-5)
    assert density.bits_per_dim == pytest.approx(8.0, abs=1e-5)
    assert mass.base_measure == density.base_measure == "256 levels"
    assert mass.notes == ()
    assert "lower bound" in density.notes[0]
    raw = log_marginal(
        *no_latent(dist.Normal(torch.zeros(6), 1.0).to_event(1)), plain, num_particles=30, proposal="guide"
    )
    assert raw.base_measure == "density on [0, 1]"
    assert "no ceiling" in raw.notes[0]


MEASURES = {
    "DiscretizedLogistic": (lambda: of(likelihoods.DiscretizedLogistic(Constant(12))), grey(256), "256 levels"),
    "MixtureOfDiscretizedLogistics": (
        lambda: of(likelihoods.MixtureOfDiscretizedLogistics(Constant(5 * 3 * 6), 5)), grey(256), "256 levels"
    ),
    "Poisson": (lambda: of(likelihoods.Poisson(Constant(6))), torch.arange(120.0).reshape(20, 6) % 3, "discrete"),
    "ZeroInflatedNegativeBinomial": (
        lambda: of(likelihoods.ZeroInflatedNegativeBinomial(Constant(12))), torch.ones(20, 6), "discrete"
    ),
    "Binomial": (lambda: dist.Binomial(9, torch.full((6,), 0.3)).to_event(1), torch.ones(20, 6), "discrete"),
    "one hot": (lambda: dist.OneHotCategorical(logits=torch.zeros(6)), torch.eye(6)[torch.arange(20) % 6], "discrete"),
    "Normal": (lambda: dist.Normal(torch.zeros(6), 1.0).to_event(1), torch.randn(20, 6), "density"),
    "LogNormal": (lambda: dist.LogNormal(torch.zeros(6), 1.0).to_event(1), torch.ones(20, 6), "density"),
    "a table": (
        lambda: of(likelihoods.Mixed(Constant(6), [*["real"] * 4, "binary", "count"])), torch.ones(20, 6), "mixed"
    ),
    "a table of counts and coins": (
        lambda: of(likelihoods.Mixed(Constant(6), ["count"] * 3 + ["binary"] * 3)), torch.ones(20, 6), "discrete"
    ),
    "a table of real numbers": (
        lambda: of(likelihoods.Mixed(Constant(6), ["real"] * 6)), torch.ones(20, 6), "density"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURES)
def test_what_a_log_density_is_relative_to(name):
    fn, x, measure = MEASURES[name]
    est = log_marginal(*no_latent(fn()), x, num_particles=30, proposal="guide")
    assert (est.base_measure, est.levels) == (measure, None)
    assert ("units" in est.summary()) == (measure == "mixed")
    assert est.bits_per_dim == pytest.approx(est.nll / (6 * math.log(2)), abs=1e-12)


def test_sites_of_two_kinds_are_mixed():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Poisson(z.exp()), obs=y)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    est = log_marginal(model, guide, (torch.randn(5), torch.ones(5)), num_particles=30, proposal="guide")
    assert (est.base_measure, est.dims) == ("mixed", 2)


# -- data and plates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subsample", [4, 7, 50, 64, 70])
@pytest.mark.parametrize("count", [30, 150])
def test_a_plate_that_draws_its_rows_visits_every_one(subsample, count):
    """The exact guide gives log p(x) of each row: any row left out or taken twice would show; the end is ragged."""
    pair, x = oracle(5, 2, 0.5, 70)

    def model(x):
        with pyro.plate("rows", len(x), subsample_size=subsample) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ pair.weight.T + pair.loc, 0.5).to_event(1), obs=x[index])

    def guide(x):
        with pyro.plate("rows", len(x), subsample_size=subsample) as index:
            pyro.sample("z", pair.posterior(x[index]))

    est = log_marginal(model, guide, x, num_particles=count, proposal="guide")
    assert est.log_px.shape == (70,)
    assert (est.log_px - pair.log_px(x)).abs().max() < 1e-9


@pytest.mark.parametrize("full", [70, 1000])
@pytest.mark.parametrize("count", [30, 150])
def test_a_plate_of_fixed_size_takes_any_batch(full, count):
    pair, x = oracle(5, 2, 0.5, 70)

    def model(x):
        with pyro.plate("rows", full, subsample=x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ pair.weight.T + pair.loc, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("rows", full, subsample=x):
            pyro.sample("z", pair.posterior(x))

    est = log_marginal(model, guide, x, num_particles=count, proposal="guide")
    assert (est.log_px - pair.log_px(x)).abs().max() < 1e-9


def test_a_plate_of_the_whole_size_gets_the_whole_data():
    pair, x = oracle(5, 2, 0.5, 70)

    def model(x):
        with pyro.plate("rows", 70):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ pair.weight.T + pair.loc, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("rows", 70):
            pyro.sample("z", pair.posterior(x))

    assert (
        log_marginal(model, guide, x, num_particles=30, proposal="guide").log_px - pair.log_px(x)
    ).abs().max() < 1e-9


def test_columns_go_together():
    model, guide, (x, label) = registered("labelled")
    model_of = [
        log_marginal(model, guide, (x, (label + s) % 3), num_particles=2000, seed=1, proposal="guide") for s in (0, 1)
    ]
    assert (model_of[0].log_px - model_of[1].log_px).abs().max() > 0.01
    tiled = log_marginal(model, guide, (x.repeat(10, 1), label.repeat(10)), num_particles=2000, proposal="guide")
    # ten estimates of each datum: within 6 of their standard errors of the first (60 numbers, p < 1e-6)
    first = model_of[0].log_px.repeat(10)
    assert ((tiled.log_px - first).abs() < 6 * (tiled.std_error + model_of[0].std_error.repeat(10))).all()
    with pytest.raises(DataError, match=r"data\[1\]: expected 6 rows as in the first column, found 5"):
        log_marginal(model, guide, (x, label[:5]), proposal="guide")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"num_particles": 0}, UsageError, "num_particles: expected at least 1, found 0"),
        ({"rows": 0}, UsageError, "rows: expected at least 1, found 0"),
        ({"data": "digits"}, UsageError, r"data: expected a tensor or a split, found str"),
        ({"data": ()}, UsageError, "found an empty tuple"),
        ({"data": torch.tensor([[0.0, math.nan]])}, DataError, "row 0, column 1"),
        ({"data": torch.zeros(0, 5)}, DataError, "at least one row"),
    ],
)
def test_arguments_that_cannot_be_used(arguments, error, words):
    pair, x = oracle(5, 2, 0.5, 5)
    data = arguments.pop("data", x)
    with pytest.raises(error, match=words):
        log_marginal(pair.model, pair.guide, data, **arguments)


# -- whose parameters -------------------------------------------------------------------------------------------------


def module_pair(name="experiment"):
    """A small VAE of plain functions, whose modules are registered under a name that others may use too."""
    encoder, net = nn.Linear(3, 2), nn.Linear(2, 3)

    def model(x):
        pyro.module(f"{name}.net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module(f"{name}.encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    return model, guide


def param_pair():
    """A pair whose parameters live in the param store alone, under names that every such pair uses."""

    def model(x):
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + loc, 1.0).to_event(1), obs=x)

    def guide(x):
        shift = pyro.param("shift", torch.zeros(3))
        scale = pyro.param("scale", torch.ones(3), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift, scale).to_event(1))

    return model, guide


@pytest.mark.parametrize("build", [module_pair, param_pair])
def test_the_bare_pair_evaluates_as_the_run_does(build):
    model, guide = build()
    x = 1 + torch.randn(80, 3)
    run = fit(model, guide, x, epochs=3, optimizer=lambda p: torch.optim.Adam(p, lr=0.05))
    found = [
        log_marginal(*pair, x, num_particles=40, proposal="guide") for pair in ((run.model, run.guide), (model, guide))
    ]
    assert torch.equal(found[0].log_px, found[1].log_px)
    assert not list(pyro.get_param_store().keys())
    fresh = build()
    for fn in fresh:
        poutine.trace(fn).get_trace(x)
    start = log_marginal(*fresh, x, num_particles=40, proposal="guide")
    assert found[0].nll < start.nll - 0.05  # trained parameters are used, and not the initial ones


@pytest.mark.parametrize("build", [module_pair, param_pair])
def test_two_experiments_under_the_same_names_do_not_leak(build):
    x, y = 3 + torch.randn(60, 3), -3 + torch.randn(60, 3)
    adam = {"epochs": 3, "optimizer": lambda p: torch.optim.Adam(p, lr=0.05)}
    first = fit(*build(), x, **adam)
    before = log_marginal(first.model, first.guide, x, num_particles=40, proposal="guide")
    second = fit(*build(), y, **adam)
    after = log_marginal(first.model, first.guide, x, num_particles=40, proposal="guide")
    assert torch.equal(before.log_px, after.log_px)
    crossed = log_marginal(second.model, second.guide, x, num_particles=40, proposal="guide")
    assert crossed.nll > after.nll + 0.05
    alone = log_marginal(second.model, second.guide, y, num_particles=40, proposal="guide")
    assert alone.nll < log_marginal(first.model, first.guide, y, num_particles=40, proposal="guide").nll


def test_a_run_of_one_pair_twice():
    """The same functions fitted again: pyro.param has both runs apart, modules that were changed are noticed."""
    x = torch.randn(60, 3)
    model, guide = param_pair()
    first = fit(model, guide, x, epochs=1)
    before = log_marginal(first.model, first.guide, x, num_particles=30, proposal="guide")
    second = fit(model, guide, x + 5, epochs=5, optimizer=lambda p: torch.optim.Adam(p, lr=0.1))
    assert torch.equal(
        log_marginal(first.model, first.guide, x, num_particles=30, proposal="guide").log_px, before.log_px
    )
    newest = [
        log_marginal(*pair, x, num_particles=30, proposal="guide")
        for pair in ((model, guide), (second.model, second.guide))
    ]
    assert torch.equal(newest[0].log_px, newest[1].log_px)
    model, guide = module_pair()
    first = fit(model, guide, x, epochs=1)
    fit(model, guide, x + 5, epochs=1)
    with pytest.raises(ContractError, match="was changed after its run had ended"):
        log_marginal(first.model, first.guide, x, proposal="guide")


PEAK = """
import re, torch
from ppvae import log_marginal
from ppvae.models import LinearGaussian
pair = LinearGaussian(784, 20)
log_marginal(pair.model, pair.mean_field, torch.zeros({count}, 784), num_particles={particles}, compile=False)
print(re.search(r"VmHWM:\\s+([0-9]+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="its memory is read from /proc")
def test_memory_grows_neither_with_particles_nor_with_data():
    """Peaks of processes of their own, whose malloc gives freed blocks back at once and leaves no holes.

    A block of weights takes 16 MB for each tensor of the size of x, and a process 0.7 GB.
    """

    def peak(count, particles):
        code, env = PEAK.format(count=count, particles=particles), os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
        return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=env).stdout)

    few = peak(50, 500)
    assert peak(50, 2500) < 1.02 * few
    assert peak(250, 500) < 1.02 * few


@pytest.mark.parametrize("sizes", [(100,) * 10, (7, 300, 1, 692), (1000,)])
def test_bounds_are_means_over_disjoint_groups_however_draws_arrive(sizes):
    generator = torch.Generator().manual_seed(0)
    w = 3 * torch.randn(1000, 4, dtype=torch.float64, generator=generator)
    w[:3, 0] = -torch.inf
    bounds = (1000, 1, 3, 4, 8, 24, 100, 333, 499)
    accumulator = LogWeightAccumulator(1000, bounds)
    for part in w.split(sizes):
        accumulator.add(part, part)
        accumulator._reduce()
    found = accumulator.result()
    for k in bounds:
        groups = 1000 // k
        exact = (w[: groups * k].view(groups, k, 4).logsumexp(1) - math.log(k)).mean(0)
        torch.testing.assert_close(found[f"bound_{k}"], exact, rtol=1e-12, atol=1e-12)
    assert torch.equal(found["bound_1000"], found["log_px"])
