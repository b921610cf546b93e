"""Leave-one-out, K-fold and WAIC against exact leave-one-out densities of conjugate models.

Numbers lie within five of their standard errors: false by chance with probability below 1e-4 in all.
"""

import dataclasses
import inspect

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta

from ppvae.errors import UsageError
from ppvae.evaluation import kfold, loo, waic
from ppvae.evaluation.global_latents import blocks
from tests.programs.conjugate import CONJUGATE, normal_mean, regression
from tests.programs.strangers import PAIRS

ARVIZ_1 = int(az.__version__.split(".")[0]) > 0
QUICK = [pytest.param(n, marks=pytest.mark.slow if n.endswith("plate") else ()) for n in CONJUGATE]


@pytest.fixture(autouse=True)
def _empty_store():
    pyro.clear_param_store()
    torch.manual_seed(0)


@pytest.mark.parametrize("name", QUICK)
def test_leave_one_out_is_exact_within_its_errors(name):
    c = CONJUGATE[name]()
    result = loo(*c.pair, c.batch, num_particles=2000, local_particles=10)
    assert bool(result.reliable.all())
    assert result.guide_k_hat < 0.5
    assert float(((result.elpd - c.loo).abs() / result.std_error).max()) < 5
    assert float(result.std_error.max()) < 0.15
    assert float((result.lpd - c.posterior_predictive).abs().max()) < 0.1
    exact = (c.posterior_predictive - c.loo).sum().item()
    assert abs(result.effective_parameters - exact) < 0.35
    assert "reliable" in result.summary()


def test_few_particles_of_a_wide_local_guide_do_not_raise_the_density_of_fitted_data():
    """The weights hold the noise of p(x_n | theta): times the same estimate it would count twice, 0.12 nats here."""
    c = regression(local=2.2)
    difference = loo(*c.pair, c.batch, num_particles=2000, local_particles=5).lpd - c.posterior_predictive
    assert abs(difference.mean().item()) < 0.04
    assert float(difference.abs().max()) < 0.12
    single = loo(*c.pair, c.batch, num_particles=200, local_particles=1)
    assert bool(single.lpd.isnan().all())
    assert bool(single.elpd.isfinite().all())


def test_the_guide_is_corrected_for():
    """A guide of another scale and place gives the same number; plain averages over its draws do not."""
    narrow = normal_mean(wide=0.8)
    expected = narrow.loo
    for wide in (1.0, 1.5):
        pyro.clear_param_store()
        c = normal_mean(wide=wide)
        with torch.no_grad():
            pyro.get_param_store()["mean"].data.add_(0.1)
        result = loo(*c.pair, c.batch, num_particles=3000)
        assert float(((result.elpd - expected).abs() / result.std_error).max()) < 5


def test_arvizs_leave_one_out_of_posterior_draws_is_the_same():
    """Draws of the exact posterior of one parameter, where no correction is needed."""
    c = normal_mean(wide=1.0)
    with torch.no_grad():
        pyro.get_param_store()["mean"].data.copy_(c.batch[0].sum() / 1.25 / (0.25 + 20 / 1.25))
    result = loo(*c.pair, c.batch, num_particles=1000)
    from ppvae import log_marginal

    est = log_marginal(*c.pair, c.batch, num_particles=1000, conditional=True, posterior_draws=1000)
    theirs = az.loo(est.to_arviz(), pointwise=True, reff=1.0)
    elpd, p_loo = (theirs.elpd_i, theirs.p) if ARVIZ_1 else (theirs.loo_i, theirs.p_loo)
    digits = 2e-4 if ARVIZ_1 else 1e-5  # 1.x rounds the length of the tail in another way
    torch.testing.assert_close(result.elpd, torch.tensor(elpd.values), rtol=0, atol=digits)
    se = theirs.se * (19 / 20) ** 0.5 if ARVIZ_1 else theirs.se  # 1.x divides the squares of 20 data by 19
    assert result.total_std_error == pytest.approx(se, rel=1e-4)
    assert result.effective_parameters == pytest.approx(p_loo, abs=1e-3)
    if ARVIZ_1:  # which has no waic
        return
    theirs = az.waic(est.to_arviz(), pointwise=True)
    ours = waic(*c.pair, c.batch, num_particles=1000)
    torch.testing.assert_close(ours.elpd, torch.tensor(theirs.waic_i.values), rtol=0, atol=1e-5)


def test_arvizs_correction_for_approximate_posteriors_is_the_same():
    stats = pytest.importorskip("arviz_stats")
    import xarray

    from ppvae import log_marginal, terms
    from ppvae.inference import inspect

    c = normal_mean(wide=1.4)
    result = loo(*c.pair, c.batch, num_particles=500)
    est = log_marginal(*c.pair, c.batch, num_particles=500, conditional=True, posterior_draws=500)
    s, mu = inspect(*c.pair, c.batch), est.posterior["mu"]
    t = terms(*c.pair, c.batch, 500, structure=s, values={"mu": mu[:, None]})
    log_p = est.log_likelihood.sum(1) + t.globals.log_prior[:, 0]
    arrays = [
        xarray.DataArray(v.detach().numpy()[None], dims=("chain", "draw")) for v in (log_p, t.globals.log_guide[:, 0])
    ]
    theirs = stats.loo_approximate_posterior(est.to_arviz(), *arrays, pointwise=True)
    torch.testing.assert_close(result.elpd, torch.tensor(theirs.elpd_i.values), rtol=0, atol=1e-4)


@pytest.mark.parametrize("build", [normal_mean, pytest.param(regression, marks=pytest.mark.slow)])
def test_waic_is_near_leave_one_out(build):
    c = build()
    ours = waic(*c.pair, c.batch, num_particles=2000, local_particles=100)
    assert abs(ours.total - c.loo.sum().item()) < 0.35
    assert ours.to_arviz()["elpd" if ARVIZ_1 else "elpd_waic"] == ours.total


def test_the_error_of_waic_is_that_of_its_own_number():
    """Of 60 runs, of data that fit and of one that does not, whose variance term is most of it: false below 1e-2."""
    x = torch.cat([normal_mean().batch[0][:19], torch.tensor([8.0]).double()])
    pair = conjugate_refit(x)
    runs = [waic(*pair, x, num_particles=200, seed=seed) for seed in range(60)]
    spread = torch.stack([r.elpd for r in runs]).std(0)
    ratio = spread / torch.stack([r.std_error for r in runs]).mean(0)
    assert float((ratio[:-1] - 1).abs().median()) < 0.3
    assert 0.72 < ratio[-1].item() < 1.35


def test_what_is_reliable_depends_on_the_guide_and_on_the_effective_sample_size():
    c = normal_mean()
    good = loo(*c.pair, c.batch, num_particles=300)
    assert bool(good.reliable.all())
    far = dataclasses.replace(good, guide_k_hat=1.0)
    assert not bool(far.reliable.any())
    assert bool(dataclasses.replace(far, refitted=~far.refitted).reliable.all())  # their guides are others
    assert dataclasses.replace(good, ess=torch.arange(35.0, 55.0)).reliable.tolist() == [False] * 15 + [True] * 5
    raw = good.ess / 300
    assert bool((raw < 1).all())
    assert bool((raw > 0.5).all())


def test_waic_of_an_outlier_is_unreliable():
    x, _, pair = outlier()
    result = waic(*pair, x, num_particles=1000)
    assert result.reliable.tolist() == [True] * 19 + [False]
    assert "variance above 0.4): take loo" in result.summary()
    assert bool((result.k_hat == result.guide_k_hat).all())


def test_blocks_rows_and_caches_do_not_change_the_result(monkeypatch, tmp_path):
    c = normal_mean()
    first = loo(*c.pair, c.batch, num_particles=200)
    monkeypatch.setattr(blocks, "LOCAL_BLOCK", 6)
    for options in ({"rows": 1}, {"rows": 10**6}, {"directory": tmp_path}, {"directory": tmp_path}):
        again = loo(*c.pair, c.batch, num_particles=200, **options)
        torch.testing.assert_close(again.elpd, first.elpd, rtol=0, atol=1e-9)
        torch.testing.assert_close(again.k_hat, first.k_hat, rtol=0, atol=1e-6)


# -- refits ------------------------------------------------------------------------------------------------------------


def conjugate_refit(x):
    """The exact posterior of mu of `normal_mean`, a little wide."""
    n, rho = len(x), 1.25**0.5

    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 2.0))
        with pyro.plate("data", n, subsample=x):
            pyro.sample("x", dist.Normal(mu, rho), obs=x)

    precision = 0.25 + n / 1.25
    loc = x.sum() / 1.25 / precision

    def guide(x):
        pyro.sample("mu", dist.Normal(loc, 1.1 * precision**-0.5))

    return model, guide


def outlier():
    """20 data of which the last is far from the others, its exact leave-one-out density, and a pair."""
    x = torch.cat([normal_mean().batch[0][:19], torch.tensor([18.0]).double()])
    rest = x[:-1]
    precision = 0.25 + 19 / 1.25
    exact = dist.Normal(rest.sum() / 1.25 / precision, (1 / precision + 1.25) ** 0.5).log_prob(x[-1])
    return x, exact.item(), conjugate_refit(x)


def test_a_datum_that_fails_is_told_and_refitted():
    x, exact, pair = outlier()
    plain = loo(*pair, x, num_particles=1000)
    assert plain.reliable.tolist() == [True] * 19 + [False]
    assert abs(plain.elpd[-1].item() - exact) > 0.3
    assert "1 of 20 data is unreliable" in plain.summary()
    asked = []

    def refit(rest):
        asked.append(len(rest))
        return conjugate_refit(rest)

    again = loo(*pair, x, num_particles=1000, refit=refit)
    assert asked == [19]
    assert again.refitted.tolist() == [False] * 19 + [True]
    assert bool(again.reliable.all())
    assert abs(again.elpd[-1].item() - exact) < 5 * again.std_error[-1].item() < 2.5
    assert bool((again.elpd[:-1] == plain.elpd[:-1]).all())
    precision = 0.25 + 20 / 1.25
    fitted = dist.Normal(x.sum() / 1.25 / precision, (1 / precision + 1.25) ** 0.5).log_prob(x)
    assert (
        float((again.lpd - fitted).abs().max()) < 0.5 < abs(fitted[-1].item() - exact)
    )  # of all data, also where a datum is refitted


@pytest.mark.parametrize("folds", [4, 20])
def test_k_fold_is_exact_within_its_errors(folds):
    x = normal_mean().batch[0]
    result = kfold(*conjugate_refit(x), x, conjugate_refit, folds=folds, num_particles=1000)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    for fold in range(folds):
        left = order[fold::folds]
        rest = x[[i for i in range(20) if i not in left]]
        precision = 0.25 + len(rest) / 1.25
        exact = dist.Normal(rest.sum() / 1.25 / precision, (1 / precision + 1.25) ** 0.5).log_prob(x[left])
        assert float(((result.elpd[left] - exact).abs() / result.std_error[left]).max()) < 5
    assert bool(result.refitted.all())
    precision = 0.25 + 20 / 1.25
    fitted = dist.Normal(x.sum() / 1.25 / precision, (1 / precision + 1.25) ** 0.5).log_prob(x)
    assert abs(result.effective_parameters - (fitted.sum() - result.elpd.sum()).item()) < 0.1
    with pytest.raises(UsageError, match="folds: expected a number from 2 to the 20 data, found 1"):
        kfold(*conjugate_refit(x), x, conjugate_refit, folds=1)


# -- comparisons and refusals ------------------------------------------------------------------------------------------


def test_arviz_compares_results():
    c = normal_mean()
    x = c.batch[0]

    def wrong(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 2.0))
        with pyro.plate("data", 20, subsample=x):
            pyro.sample("x", dist.Normal(mu, 4.0), obs=x)

    results = {"right": loo(*c.pair, x, num_particles=500), "wrong": loo(wrong, c.guide, x, num_particles=500)}
    whole = {"round_to": "none"} if "round_to" in inspect.signature(az.compare).parameters else {}
    table = az.compare({name: r.to_arviz() for name, r in results.items()}, **whole)
    assert list(table.index) == ["right", "wrong"]
    difference = (results["right"].elpd - results["wrong"].elpd).sum().item()
    assert table["elpd_diff"].iloc[1] == pytest.approx(-difference if ARVIZ_1 else difference, rel=1e-6)


def test_a_guide_far_from_the_posterior_is_told():
    c = normal_mean(wide=0.15)
    result = loo(*c.pair, c.batch, num_particles=500)
    assert result.guide_k_hat > result.k_hat_limit
    assert not bool(result.reliable.any())
    assert "far from the posterior" in result.summary()
    assert result.to_arviz()["warning"]


def test_what_has_no_posterior_is_refused():
    c = normal_mean()
    point = AutoDelta(c.model)
    point(*c.batch)
    with pytest.raises(UsageError, match=r"posterior of the global latents.*point mass.*conditional=True"):
        loo(c.model, point, c.batch)
    model, guide, batch = PAIRS["modules"]()
    guide(*batch)
    with pytest.raises(UsageError, match="no latent is shared"):
        loo(model, guide, batch)
    with pytest.raises(UsageError, match="num_particles: expected"):
        loo(*c.pair, c.batch, num_particles=0)
