"""Proposals fitted to each datum, against closed forms, quadrature and enumeration."""

from __future__ import annotations

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate

from ppvae import log_marginal
from ppvae.errors import ContractError, UsageError
from ppvae.evaluation import load_estimate, quadrature, refined_log_marginal
from ppvae.evaluation.proposals.densities import Elliptical, choose
from ppvae.evaluation.unconstrained import compiled_potential
from ppvae.models import LinearGaussian
from tests.evaluation.evidence.pairs import coin, coin_guide

pytestmark = pytest.mark.usefixtures("float64")


def linear_gaussian(latent: int = 4):
    pair = LinearGaussian(10, latent).double()
    return pair, torch.randn(60, 10) * 1.5


@pytest.mark.parametrize("df", [3.0, 20.0, math.inf])
def test_densities_are_those_of_pyro(df):
    """The same log-densities as Pyro's, for each of three data; draws have the mean and covariance of the law."""
    loc, tril = torch.randn(3, 2), torch.randn(3, 2, 2).tril()
    tril.diagonal(dim1=-2, dim2=-1).abs_().add_(0.2)
    q = Elliptical(loc, tril, torch.full((3,), df))
    u = torch.randn(7, 3, 2)
    if math.isfinite(df):
        law = dist.MultivariateStudentT(torch.tensor(df), loc, tril)
    else:
        law = dist.MultivariateNormal(loc, scale_tril=tril)
    torch.testing.assert_close(q.log_prob(u), law.log_prob(u), rtol=1e-10, atol=1e-10)
    z = torch.linalg.solve_triangular(tril, (q.sample(40_000) - loc)[..., None], upper=False)[..., 0]
    # P(|z_1| < 1) of Student's t: 6 standard errors of 40,000 draws fail with probability 2e-9 each
    inside = torch.distributions.StudentT(df).rsample((400_000,)) if math.isfinite(df) else torch.randn(400_000)
    expected = float((inside.abs() < 1).double().mean())
    assert ((z.abs() < 1).double().mean(0) - expected).abs().max() < 6 * 0.5 / math.sqrt(40_000)


def test_a_choice_takes_every_datum_from_its_candidate():
    a, b = (
        Elliptical(torch.full((2, 1), v), torch.eye(1).expand(2, 1, 1), torch.full((2,), math.inf)) for v in (1.0, 2.0)
    )
    assert choose(torch.tensor([1, 0]), [a, b]).loc[:, 0].tolist() == [2.0, 1.0]


def prior_guide(pair):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))

    return guide


def wrong_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(3 * torch.ones(len(x), 4), 0.4).to_event(1))


@pytest.mark.parametrize("name", ["exact", "mean field", "prior", "wrong"])
def test_linear_gaussian_pairs_come_out_exact_whatever_the_guide(name):
    """The Laplace approximation is the posterior: what is left is the noise of the guide's share, 5 % of the draws."""
    pair, x = linear_gaussian()
    guide = {"exact": pair.guide, "mean field": pair.mean_field, "prior": prior_guide(pair), "wrong": wrong_guide}[name]
    est = log_marginal(pair.model, guide, x, num_particles=1000, proposal="refined")
    error = est.log_px - pair.log_px(x)
    assert float((error.abs() - 6 * est.std_error).max()) < 1e-9
    assert float(est.std_error.max()) < 0.01
    assert abs(float(error.detach().mean())) < 1e-3
    assert bool(est.reliable.all())


def test_the_estimate_of_p_x_is_unbiased():
    """The mean of p-hat / p over 25 copies of ten data; six standard errors fail with probability 2e-9."""
    pair, x = linear_gaussian(2)
    x = x[:10].repeat(5, 1)
    ratios = []
    for seed in range(5):
        est = log_marginal(pair.model, pair.mean_field, x, num_particles=20, proposal="refined", seed=seed)
        ratios.append((est.log_px - pair.log_px(x)).exp())
    ratio = torch.stack(ratios)
    error = float(ratio.std() / math.sqrt(ratio.numel()))
    assert abs(float(ratio.mean()) - 1) < 6 * error + 1e-6


ONE, THREE = torch.ones(1), torch.ones(3)
LATENTS = {  # prior, what the observation sees of the latent, guide
    "real": (lambda: dist.StudentT(4.0, 0 * ONE, 1.0), lambda z: z, lambda: dist.Normal(0 * ONE, 1.0)),
    "half-line": (lambda: dist.Gamma(2 * ONE, 1.0), lambda z: z.log(), lambda: dist.LogNormal(0 * ONE, 1.0)),
    "interval": (lambda: dist.Beta(2 * ONE, 3.0), lambda z: 4 * z, lambda: dist.Beta(2 * ONE, 2.0)),
    "simplex": (
        lambda: dist.Dirichlet(torch.tensor([2.0, 1.0, 3.0])),
        lambda z: 3 * z[..., :1],
        lambda: dist.Dirichlet(THREE),
    ),
}


def declared(fn):
    """A distribution over one event."""
    return fn if fn.event_dim else fn.to_event(1)


@pytest.mark.parametrize("name", LATENTS)
def test_every_kind_of_support_agrees_with_quadrature(name):
    prior, seen, posterior = LATENTS[name]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", declared(prior()))
            pyro.sample("x", dist.Normal(seen(z), 0.3).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", declared(posterior()))

    x = torch.linspace(0.3, 2.0, 12)[:, None]
    est = log_marginal(model, guide, x, num_particles=2000, proposal="refined")
    exact = quadrature(model, guide, x)
    assert float(((est.log_px - exact.log_px) / est.std_error.clamp(min=1e-6)).abs().max()) < 6
    assert float((est.log_px - exact.log_px).abs().max()) < 0.05


def test_a_hierarchy_with_an_enumerated_site_is_summed_out():
    """Two levels and a class: log p(x) = log sum_c N(x; loc_c, total variance) / 3."""
    locs = torch.tensor([-2.0, 0.0, 3.0])

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 0.5))
            c = pyro.sample("c", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(b + locs[c], 0.7), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.2))
            pyro.sample("b", dist.Normal(0.5 * a, 1.0))

    x = torch.linspace(-3, 4, 15)
    exact = dist.Normal(locs, (1.25 + 0.49) ** 0.5).log_prob(x[:, None]).logsumexp(1) - math.log(3)
    est = log_marginal(model, guide, x, num_particles=4000, proposal="refined")
    assert float(((est.log_px - exact) / est.std_error).abs().max()) < 6
    assert float((est.log_px - exact).abs().max()) < 0.1


def test_masked_latents_count_for_nothing():
    """A latent that is masked for a datum is integrated out by its own normal coordinate."""
    keep = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(0.0, 1.0).mask(keep))
            pyro.sample("x", dist.Normal(z + torch.where(keep, w, 0.0), 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 0.8))
            pyro.sample("w", dist.Normal(0.3 * x, 0.9).mask(keep))

    x = torch.tensor([0.5, -1.0, 2.0])
    exact = dist.Normal(0.0, torch.where(keep, 2.25, 1.25).sqrt()).log_prob(x)
    est = log_marginal(model, guide, x, num_particles=2000, proposal="refined")
    assert float((est.log_px - exact).abs().max()) < 0.02


def test_the_result_depends_neither_on_rows_nor_on_the_presence_of_draws(tmp_path):
    pair, x = linear_gaussian()
    once = log_marginal(pair.model, pair.mean_field, x, num_particles=300, proposal="refined", posterior_draws=4)
    again = log_marginal(
        pair.model, pair.mean_field, x, num_particles=300, proposal="refined", rows=70, directory=tmp_path / "blocks"
    )
    cached = log_marginal(
        pair.model, pair.mean_field, x, num_particles=300, proposal="refined", rows=70, directory=tmp_path / "blocks"
    )
    torch.testing.assert_close(once.log_px, again.log_px, rtol=0, atol=1e-9)
    assert torch.equal(again.log_px, cached.log_px)
    assert once.posterior is not None
    assert once.posterior["z"].shape == (4, 60, 4)
    assert once.settings["proposal"] == "refined"
    assert "proposals by datum" in " ".join(once.notes)


def test_what_cannot_be_refined_says_so():
    with pytest.raises(ContractError, match=r"'z'.*discrete"):
        log_marginal(coin, coin_guide, torch.zeros(3), proposal="refined")
    with pytest.raises(UsageError, match="proposal: expected 'guide' or 'refined', found 'best'"):
        log_marginal(coin, coin_guide, torch.zeros(3), proposal="best")


def test_refined_estimates_have_those_of_the_guide_beside_them(tmp_path):
    """Kept in files, and told: the refined one is nearer to the exact value."""
    pair, x = linear_gaussian()
    est = refined_log_marginal(pair.model, wrong_guide, x, num_particles=200, guide_particles=100)
    guide, exact = est.guide_estimate, pair.log_px(x).detach()
    alone = log_marginal(pair.model, wrong_guide, x, num_particles=100, proposal="guide")
    assert torch.equal(guide.log_px, alone.log_px)
    assert float((est.log_px - exact).abs().max()) < 0.1 < float((guide.log_px - exact).abs().max())
    assert est.seconds > 0 < guide.seconds
    assert est.verdict == "reliable"
    assert guide.verdict.startswith("not reliable")
    assert f"by L_100 of the guide, reliable for {0:.1f} % of the data" in est.summary()
    again = load_estimate(est.save(tmp_path))
    assert again.table() == est.table()
    assert torch.equal(again.guide_estimate.log_px, guide.log_px)
    assert load_estimate(tmp_path / "log_marginal_guide.json").guide_estimate is None
    log_marginal(pair.model, wrong_guide, x[:7], num_particles=100, proposal="guide").save(
        tmp_path, "log_marginal_guide"
    )
    assert load_estimate(tmp_path / "log_marginal.json").guide_estimate is None  # of other data
    without = refined_log_marginal(pair.model, wrong_guide, x, num_particles=200, guide_particles=0)
    assert without.guide_estimate is None
    assert torch.equal(without.log_px, est.log_px)
    assert load_estimate(without.save(tmp_path)).guide_estimate is None


def test_pairs_that_cannot_be_refined_are_drawn_from_the_guide():
    est = refined_log_marginal(coin, coin_guide, torch.zeros(3), guide_particles=70)
    assert est.guide_estimate is None
    assert est.num_particles == 70
    assert est.notes[0].startswith("drawn from the guide, as no proposal can be refined: site 'z'")
    assert "proposal" not in est.settings

    def with_global(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide_of_global(x):
        pyro.sample("mu", dist.Normal(0.0, 0.7))
        with pyro.plate("data", len(x)):
            pass

    est = refined_log_marginal(with_global, guide_of_global, torch.zeros(3), guide_particles=70)
    exact = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(torch.zeros(3))
    assert est.joint  # one posterior, and one proposal, of the whole data set
    assert abs(float(est.log_px) - float(exact)) < 0.01


def test_compiled_fits_give_the_same(monkeypatch):
    """Up to rounding, in float64."""
    monkeypatch.setattr(compiled_potential, "MIN_ROWS", 1)
    pair, x = linear_gaussian(2)
    once, again = (
        log_marginal(pair.model, pair.mean_field, x, num_particles=200, proposal="refined", compile=compile)
        for compile in (True, False)
    )
    torch.testing.assert_close(once.log_px, again.log_px, rtol=0, atol=1e-8)


def test_the_default_is_refined_with_bounds_and_elbo_of_the_guide():
    """In one call: log p(x) is that of the refined proposal alone, L_k and the ELBO those of the guide alone."""
    pair, x = linear_gaussian()
    est = log_marginal(pair.model, wrong_guide, x, num_particles=200)
    refined = log_marginal(pair.model, wrong_guide, x, num_particles=200, proposal="refined")
    guide = log_marginal(pair.model, wrong_guide, x, num_particles=200, proposal="guide")
    for name in ("log_px", "ess", "k_hat", "std_error"):
        assert torch.equal(getattr(est, name), getattr(refined, name)), name
    assert torch.equal(est.elbo, guide.elbo)
    assert torch.equal(est.bound(10), guide.bound(10))
    assert torch.equal(est.bound(200), guide.log_px)
    assert float((est.log_px - est.bound(200)).min()) > 0.1


def test_the_default_draws_from_the_guide_where_nothing_can_be_refined():
    est = log_marginal(coin, coin_guide, torch.zeros(3), num_particles=100)
    guide = log_marginal(coin, coin_guide, torch.zeros(3), num_particles=100, proposal="guide")
    assert torch.equal(est.log_px, guide.log_px)
    assert est.guide_estimate is None
    assert est.notes[0].startswith("drawn from the guide, as no proposal can be refined: site 'z'")


@pytest.mark.parametrize("enumerated", ["model", "guide"])
@pytest.mark.parametrize("options", [{}, {"method": "auto"}])
def test_a_pair_whose_latents_are_summed_out_draws_nothing_and_says_so(enumerated, options):
    model, guide = (config_enumerate(coin), no_guide) if enumerated == "model" else (coin, config_enumerate(coin_guide))
    x = torch.tensor([0.0, 2.0])
    est = log_marginal(model, guide, x, num_particles=30, **options)
    exact = torch.stack([dist.Normal(z, 1.0).log_prob(x) + math.log(p) for z, p in ((0.0, 0.7), (1.0, 0.3))])
    torch.testing.assert_close(est.log_px, exact.double().logsumexp(0), rtol=0, atol=1e-6)
    assert est.notes[0] == "every latent of the pair is summed out: log p(x) is exact, and nothing is drawn"


def no_guide(x):
    """The guide of a model whose latents are all summed out."""


def test_an_adaptive_default_has_the_guide_beside_it():
    pair, x = linear_gaussian()
    est = log_marginal(pair.model, pair.mean_field, x, num_particles="auto", max_particles=400)
    assert int(est.particles.max()) <= 400
    assert est.guide_estimate.num_particles == 400


def test_files_with_the_elbo_of_the_proposal_are_read_with_that_of_the_guide(tmp_path):
    """As estimates were saved before `est.elbo` was the guide's."""
    pair, x = linear_gaussian()
    est = log_marginal(pair.model, wrong_guide, x, num_particles=100)
    again = load_estimate(dataclasses.replace(est, elbo=est.elbo + 1.0).save(tmp_path))
    assert torch.equal(again.elbo, est.elbo)
