"""log p of all data and predictive densities of pairs with global latents, against exact ones.

A standard error covers the exact value within five of them: false by chance with probability below 1e-5 in all.
"""

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal

from ppvae import log_marginal
from ppvae.errors import ContractError, UsageError
from ppvae.evaluation import annealed, load_estimate
from ppvae.evaluation.global_latents import blocks
from tests.programs.conjugate import CONJUGATE, MIXING, TRIALS, mixture, normal_mean, regression
from tests.programs.strangers import PAIRS

QUICK = [pytest.param(n, marks=pytest.mark.slow if n.endswith("plate") else ()) for n in CONJUGATE]


@pytest.fixture(autouse=True)
def _empty_store():
    pyro.clear_param_store()
    torch.manual_seed(0)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("particles", [1, 12])
def test_the_joint_and_the_predictive_densities_are_the_exact_ones(name, particles):
    c = CONJUGATE[name]()
    n = len(c.batch[0])
    if particles > 1:
        joint = log_marginal(*c.pair, c.batch, num_particles=1000, local_particles=particles)
        assert joint.joint
        assert joint.log_px.shape == (1,)
        assert joint.dims == n
        assert abs(joint.log_px.item() - c.log_px) < 5 * joint.std_error.item() < 0.5
        if c.elbo is not None:
            assert abs(joint.elbo.item() - c.elbo) < 0.2
    est = log_marginal(*c.pair, c.batch, num_particles=1000, local_particles=particles, conditional=True)
    assert not est.joint
    assert est.log_px.shape == (n,)
    assert est.dims == 1
    assert bool(est.reliable.all())
    assert float(((est.log_px - c.predictive).abs() / est.std_error).max()) < 5
    assert float(est.std_error.max()) < 0.15
    assert bool((est.elbo < est.log_px).all())
    assert "predictive density" in est.summary()


@pytest.mark.parametrize("options", [{"proposal": "refined"}, {"method": "auto"}])
def test_refined_and_escalated_joint_estimates_are_exact_within_their_errors(options):
    c = regression()
    est = log_marginal(*c.pair, c.batch, num_particles=1000, **options)
    assert est.joint
    assert bool(est.reliable.all())
    assert abs(est.log_px.item() - c.log_px) < 5 * est.std_error.item() < 0.2


def test_annealing_of_global_and_local_latents_is_exact_within_its_error():
    c = regression()
    est = annealed(*c.pair, c.batch, num_chains=32, num_temperatures=50)
    assert abs(est.log_px.item() - c.log_px) < 5 * est.std_error.item() < 1.0


def test_particles_of_local_latents_lower_the_error_of_the_joint():
    c = regression()
    errors = [log_marginal(*c.pair, c.batch, num_particles=500, local_particles=k).std_error.item() for k in (2, 50)]
    plain = log_marginal(*c.pair, c.batch, num_particles=500, proposal="guide").std_error.item()
    assert errors[1] < 0.5 * plain
    assert errors[1] < errors[0] < plain


def test_kept_log_likelihoods_are_those_of_the_kept_draws():
    c = mixture()
    est = log_marginal(*c.pair, c.batch, num_particles=150, conditional=True, posterior_draws=120)
    p = est.posterior["p"]
    assert p.shape == (120, 2)
    by_component = dist.Binomial(TRIALS, p[..., None]).log_prob(c.batch[0]) + torch.tensor(MIXING)[:, None].log()
    torch.testing.assert_close(est.log_likelihood, by_component.logsumexp(1), rtol=0, atol=1e-6)
    whole = log_marginal(*c.pair, c.batch, num_particles=150, conditional=True, posterior_draws=150)
    expected = whole.log_likelihood.logsumexp(0) - np.log(150)
    torch.testing.assert_close(whole.log_px, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(est.log_px, whole.log_px, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["mixture", "normal_mean"])
def test_a_saved_estimate_has_its_draws_and_log_likelihoods(name, tmp_path):
    """Global latents of an event [2], and scalars."""
    c = {"mixture": mixture, "normal_mean": normal_mean}[name]()
    est = log_marginal(*c.pair, c.batch, num_particles=60, conditional=True, posterior_draws=30)
    again = load_estimate(est.save(tmp_path))
    assert torch.equal(again.log_likelihood, est.log_likelihood)
    assert set(again.posterior) == set(est.posterior)
    assert all(torch.equal(again.posterior[site], draws) for site, draws in est.posterior.items())
    plain = log_marginal(*c.pair, c.batch, num_particles=60, conditional=True)
    again = load_estimate(plain.save(tmp_path, "plain"))
    assert again.log_likelihood is None
    assert again.posterior is None


@pytest.mark.parametrize("conditional", [True, False])
def test_the_result_depends_neither_on_rows_nor_where_it_is_exact_given_a_draw_on_blocks(conditional, monkeypatch):
    options = {"num_particles": 130, "local_particles": 7, "conditional": conditional}
    c = regression()
    results = [log_marginal(*c.pair, c.batch, **options, rows=rows) for rows in (1, 50, 10**6)]
    for other in results[1:]:
        torch.testing.assert_close(other.log_px, results[0].log_px, rtol=0, atol=1e-9)
        torch.testing.assert_close(other.std_error, results[0].std_error, rtol=0, atol=1e-9)
    pyro.clear_param_store()
    c = normal_mean()
    found = []
    for size in (500, 7):
        monkeypatch.setattr(blocks, "LOCAL_BLOCK", size)
        found.append(log_marginal(*c.pair, c.batch, **options))
    torch.testing.assert_close(found[0].log_px, found[1].log_px, rtol=0, atol=1e-9)


def test_an_interrupted_evaluation_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "LOCAL_BLOCK", 5)
    c = regression()
    options = {"num_particles": 50, "local_particles": 5, "conditional": True, "posterior_draws": 20}
    first = log_marginal(*c.pair, c.batch, **options, directory=tmp_path)
    again = log_marginal(*c.pair, c.batch, **options, directory=tmp_path)
    assert bool((first.log_likelihood == again.log_likelihood).all())
    plain = log_marginal(*c.pair, c.batch, **options)
    torch.testing.assert_close(plain.log_px, first.log_px, rtol=0, atol=1e-12)


def test_new_data_of_any_number_have_a_predictive_density():
    c = normal_mean()
    x = torch.linspace(-3, 5, 7).double()
    est = log_marginal(*c.pair, x, num_particles=4000, conditional=True)
    mean, scale = pyro.param("mean").detach(), pyro.param("log_scale").detach().exp()
    exact = dist.Normal(mean, (scale**2 + 1.25).sqrt()).log_prob(x)
    assert float(((est.log_px - exact).abs() / est.std_error).max()) < 5


# -- guides ------------------------------------------------------------------------------------------------------------

X = torch.randn(40, generator=torch.Generator().manual_seed(1)) + 1.0


def local_model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, scale))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def with_local(auto):
    def guide(x):
        loc, scale = (v for _, v in sorted(auto(x).items()))
        with pyro.plate("data", len(x)):
            share = scale**2 / (scale**2 + 0.25)
            pyro.sample("z", dist.Normal(loc + share * (x - loc), share**0.5 * 0.5))

    return guide


def test_a_point_of_the_global_latents_has_log_p_of_each_datum_and_no_joint_one():
    auto = AutoDelta(poutine.block(local_model, hide=["z"]), init_loc_fn=lambda site: torch.tensor(0.7))
    guide = with_local(auto)
    guide(X)
    est = log_marginal(local_model, guide, X, num_particles=50, local_particles=3, conditional=True, posterior_draws=2)
    exact = dist.Normal(0.7, (0.49 + 0.25) ** 0.5).log_prob(X)  # the local guide is exact
    torch.testing.assert_close(est.log_px, exact.double(), rtol=0, atol=1e-4)
    assert bool((est.posterior["loc"] == 0.7).all())
    for particles in (1, 3):
        with pytest.raises(ContractError, match=r"'(loc|scale)'.*point mass"):
            log_marginal(local_model, guide, X, num_particles=50, local_particles=particles)


def test_a_guide_that_reads_the_rows_is_evaluated_on_all_of_them(monkeypatch):
    monkeypatch.setattr(blocks, "LOCAL_BLOCK", 5)

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    precision = 0.25 + len(X)

    def guide(x):
        pyro.sample("loc", dist.Normal(x.sum() / precision, 1.2 * precision**-0.5))

    est = log_marginal(model, guide, X, num_particles=500, local_particles=2)
    exact = dist.MultivariateNormal(torch.zeros(40), torch.eye(40) + 4.0).log_prob(X).item()
    assert abs(est.log_px.item() - exact) < 5 * est.std_error.item() < 0.2


@pytest.mark.parametrize("subsample", [5, 40])
def test_a_plate_that_draws_its_subsample_visits_all_data(subsample):
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x), subsample_size=subsample) as i:
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[i])

    def guide(x):
        precision = 1 / 4 + len(x) / 1.25
        loc = pyro.sample("loc", dist.Normal(x.sum() / 1.25 / precision, 1.3 * precision**-0.5))
        with pyro.plate("data", len(x), subsample_size=subsample) as i:
            pyro.sample("z", dist.Normal(0.2 * loc + 0.8 * x[i], 0.2**0.5))

    est = log_marginal(model, guide, X, num_particles=1000, local_particles=2)
    exact = dist.MultivariateNormal(torch.zeros(40), 1.25 * torch.eye(40) + 4.0).log_prob(X).item()
    assert abs(est.log_px.item() - exact) < 5 * est.std_error.item() < 0.3
    per_datum = log_marginal(model, guide, X, num_particles=200, conditional=True)
    assert per_datum.log_px.shape == (40,)


# -- refusals and files ------------------------------------------------------------------------------------------------


def test_what_weights_given_global_latents_do_not_take_is_refused():
    c = regression()
    for options in ({"proposal": "refined"}, {"method": "auto"}, {"bounds": (3,)}, {"num_particles": "auto"}):
        with pytest.raises(UsageError, match=f"{next(iter(options))}: expected"):
            log_marginal(*c.pair, c.batch, conditional=True, **options)
    with pytest.raises(UsageError, match="local_particles: expected at least 1, found 0"):
        log_marginal(*c.pair, c.batch, local_particles=0)
    with pytest.raises(UsageError, match="posterior_draws: expected at most the 20 draws"):
        log_marginal(*c.pair, c.batch, num_particles=20, conditional=True, posterior_draws=21)
    model, guide, batch = PAIRS["modules"]()
    guide(*batch)
    with pytest.raises(UsageError, match="no latent is shared by all data"):
        log_marginal(model, guide, batch, num_particles=20, conditional=True)


def test_the_log_likelihoods_go_to_arviz(tmp_path):
    c = normal_mean(wide=1.0)
    est = log_marginal(*c.pair, c.batch, num_particles=500, conditional=True, posterior_draws=500)
    est.save(tmp_path)
    tree = az.from_netcdf(tmp_path / "log_marginal.nc")
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "datum")
    assert tree["posterior"]["mu"].shape == (1, 500)
    found = az.loo(tree, pointwise=True)
    assert len(found.loo_i if hasattr(found, "loo_i") else found.elpd_i) == 20  # ArviZ 0.x, 1.x


def test_auto_normal_of_global_latents_beside_an_amortised_guide():
    auto = AutoNormal(poutine.block(local_model, hide=["z"]), init_scale=0.1)
    guide = with_local(auto)
    guide(X)
    est = log_marginal(local_model, guide, X, num_particles=300, conditional=True, posterior_draws=300)
    loc, scale = est.posterior["loc"][:, None], est.posterior["scale"][:, None]
    exact = dist.Normal(loc, (scale**2 + 0.25).sqrt()).log_prob(X)
    torch.testing.assert_close(est.log_likelihood, exact.double(), rtol=0, atol=1e-3)
