"""Predictive checks: p-values that are uniform under the model, wrong models that are found, groups for ArviZ."""

import dataclasses
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from ppvae import VAE, data, likelihoods, nn, posteriors, priors
from ppvae.errors import ContractError, UsageError
from ppvae.evaluation import PredictiveCheck, predictive_check
from ppvae.evaluation.arviz import write_netcdf
from ppvae.evaluation.calibration import p_value, pointwise_p_values
from ppvae.evaluation.predictive.p_values import predictive_p, random_ranks
from ppvae.inference import simulate
from ppvae.models import LinearGaussian
from tests.programs.strangers import PAIRS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # 0.23 warns of 1.0 on import
    az = pytest.importorskip("arviz")

FEW = {"num_draws": 9, "num_particles": 20, "replications": 40, "calibrations": 9, "alpha": 0.2, "progress": False}
MEAN = {"mean": lambda x: x.mean(1)}


@pytest.fixture(autouse=True)
def clean():
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()


def oracle(count, features=4):
    """A pair whose parameters are known, and data from it."""
    torch.manual_seed(1)
    pair = LinearGaussian(features, 3, 0.8).requires_grad_(False).eval()
    return pair, simulate(pair.model, torch.zeros(count, features))["x"]


def uniformity(p, bins=20):
    """The p-value of the uniformity of numbers in (0, 1)."""
    return p_value((p * bins).long().clamp(max=bins - 1), bins, pointwise_p_values(len(p), bins))


# -- p-values ---------------------------------------------------------------------------------------------------------


def test_p_values_by_hand():
    replicated = torch.tensor([[1.0, 3.0], [2.0, 3.0], [4.0, 3.0]])
    assert predictive_p(torch.tensor([2.0, 3.0]), replicated).tolist() == [0.5, 0.5]
    ranks = torch.stack([
        random_ranks(torch.tensor([2.5, 3.0]), replicated, torch.Generator().manual_seed(i)) for i in range(200)
    ])  # fmt: skip
    assert (ranks[:, 0] == 1).all()
    assert ranks[:, 1].unique().tolist() == [0, 1, 2, 3]  # ties: any rank


@pytest.mark.parametrize("guide", ["guide", "mean_field", "wrong"])
def test_p_values_are_uniform_under_the_model_whatever_the_guide(guide):
    """Prior and calibrated p-values per datum; each test fails by chance once in 10,000."""
    pair, x = oracle(2000)

    def wrong(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.7 + 0 * x[:, :3], 1.3).to_event(1))

    fn = wrong if guide == "wrong" else getattr(pair, guide)
    square = {"square": lambda x: x.square().mean(1)}
    found = predictive_check(pair.model, fn, x, square, **FEW | {"calibrations": 30})
    assert uniformity(found.prior_p["square"]) > 1e-4
    assert uniformity(found.calibrated_p["square"]) > 1e-4
    if guide == "guide":  # the uncalibrated ones are closer to one half
        found = predictive_check(pair.model, fn, x, square, **FEW | {"calibrations": 0, "num_draws": 99})
        assert uniformity(found.posterior_p["square"]) < 1e-6
        assert float(found.posterior_p["square"].var()) < 0.9 / 12
        assert not found.calibrated_p


def test_p_values_over_the_set_are_uniform_under_the_model():
    """Over 100 data sets of ten data; fails by chance once in 5000."""
    pair, x = oracle(1000)
    checks = [
        predictive_check(pair.model, pair.mean_field, part, MEAN, over={"largest": torch.max}, seed=i, **FEW)
        for i, part in enumerate(x.split(10))
    ]
    for p in ("set_prior_p", "set_calibrated_p"):
        values = torch.stack([getattr(c, p)["mean, largest over data"] for c in checks])
        assert uniformity(values, 10) > 1e-4


def test_ties_of_discrete_statistics_leave_p_values_uniform():
    """The number of ones of three bits; fails by chance once in 10,000."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z[..., None].expand(*z.shape, 3)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.sum(-1) / 3 - 0.5, 1.0))

    found = predictive_check(
        model, guide, simulate(model, torch.zeros(1500, 3))["x"], {"ones": lambda x: x.sum(1)},
        **FEW | {"calibrations": 20},
    )  # fmt: skip
    assert uniformity(found.prior_p["ones"]) > 1e-4
    assert uniformity(found.calibrated_p["ones"]) > 1e-4


# -- verdicts ---------------------------------------------------------------------------------------------------------


def test_a_true_model_passes_and_wrong_scales_are_named():
    """The first fails by chance once in 100."""
    pair, x = oracle(300)
    statistics = {"mean": lambda x: x.mean(1), "square": lambda x: x.square().mean(1)}
    options = {"calibrations": 20, "progress": False}
    right = predictive_check(pair.model, pair.guide, x, statistics, **options)
    assert right.passed
    assert "no difference found" in right.table()["verdict"]
    wrong = predictive_check(pair.model, pair.guide, 1.5 * x, statistics, **options)
    assert not wrong.passed
    failed = {name for name, p in wrong.tests.items() if p < wrong.level}
    assert {"square, mean over data", "square of each datum", "mean, standard deviation over data"} <= failed
    assert "mean, mean over data" not in failed
    assert "the model's data differ in mean of each datum, square of" in wrong.table()["verdict"]
    low = wrong.set_prior_p["square, mean over data"], wrong.set_calibrated_p["square, mean over data"]
    assert all(float(p) < 0.06 for p in low)  # replicates are smaller than the data, in both orientations


def test_posterior_replicates_follow_the_exact_posterior_predictive():
    """Means of x | z, z | x_n against the closed form, within five standard errors."""
    pair, x = oracle(40)
    found = predictive_check(pair.model, pair.guide, x, MEAN, **FEW | {"num_draws": 500, "num_particles": 500})
    posterior = pair.posterior(x)
    mean = (posterior.loc @ pair.weight.T + pair.loc).mean(1)
    cov = pair.weight @ posterior.covariance_matrix[0] @ pair.weight.T + 0.64 * torch.eye(4)
    error = (float(cov.sum() / 16) / 500) ** 0.5
    assert (found.posterior["mean"].mean(0) - mean).abs().max() < 7 * error  # draws repeat, so that errors are larger
    assert found.posterior["mean"].var(0).mean() == pytest.approx(float(cov.sum() / 16), rel=0.1)


def test_log_px_of_the_draws_is_log_px():
    pair, x = oracle(30)
    found = predictive_check(pair.model.__self__.model, pair.guide, x, MEAN, **FEW)
    assert torch.allclose(found.log_px, pair.log_px(x).double().expand(9, 30), atol=1e-4)
    z = found.latents["z"]
    expected = dist.Normal(z @ pair.weight.T, 0.8).log_prob(x).sum(-1) + dist.Normal(0, 1).log_prob(z).sum(-1)
    assert torch.allclose(found.log_joint, expected.double(), atol=1e-4)


# -- any pair ---------------------------------------------------------------------------------------------------------

REFUSED = (
    dict.fromkeys(("masked", "obs_mask"), "numbers of the batch")
    | dict.fromkeys(
        ("enumerated_model", "enumerated_both", "enumerated_vector", "markov"), "one that the model sums out"
    )
    | {"shared_latent": "shared by all data"}
)


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_every_pair_of_strangers_is_checked(name):
    model, guide, batch = PAIRS[name]()
    for fn in (guide, model):
        pyro.poutine.trace(fn).get_trace(*batch)
    words = FEW | {"calibrations": 2, "num_draws": 3, "replications": 90}
    if name in REFUSED:
        with pytest.raises(ContractError, match=REFUSED[name]):
            predictive_check(model, guide, batch, **words)
        return
    found = predictive_check(model, guide, batch, **words)
    first = found.statistics[0]
    assert found.posterior[first].shape == (3, len(batch[0]))
    again = predictive_check(model, guide, batch, **words)
    assert torch.equal(found.prior_p[first], again.prior_p[first])
    assert torch.equal(found.calibrated_p[first], again.calibrated_p[first])


def test_gaps_stay_gaps():
    """Replicates have missing values where the data have them."""
    x = torch.randn(60, 4)
    x[:, 1:][torch.rand(60, 3) < 0.3] = torch.nan
    columns = ["real"] * 4
    torch.manual_seed(0)
    vae = VAE(
        priors.StandardNormal(2),
        likelihoods.Mixed(nn.mlp(2, likelihoods.table_outputs(columns), hidden=(8,)), columns),
        posteriors.DiagonalNormal(nn.Missing(nn.mlp(8, 4, hidden=(8,)))),
    )
    known = {"known": lambda x: (~x.isnan()).sum(1), "mean": lambda x: x.nanmean(1).nan_to_num()}
    found = predictive_check(vae.model, vae.guide, data.with_missing(x), known, **FEW | {"alpha": 0.3})
    assert (found.prior["known"] == found.observed["known"]).all()
    assert (found.posterior["known"] == found.observed["known"]).all()
    assert not (found.prior["mean"] == found.observed["mean"]).all()
    with pytest.raises(UsageError, match=r"statistics\['m'\]: expected finite numbers, found nan.*nanmean"):
        predictive_check(vae.model, vae.guide, data.with_missing(x), {"m": lambda x: x.mean(1)}, **FEW)


def test_covariates_reach_model_and_statistics():
    """y shifts x, and a statistic of both sees it."""

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 0.1))
            pyro.sample("x", dist.Normal(z + 10 * y, 0.1), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - 10 * y) / 2, 0.1))

    y = (torch.arange(30) % 2).float()
    found = predictive_check(
        model, guide, (10 * y, y), {"apart": lambda x, y: x - 10 * y}, **FEW,
    )  # fmt: skip
    assert found.prior["apart"].abs().max() < 2


# -- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [False, True])
def test_variables_have_the_names_of_sites_and_not_of_arguments(columns, tmp_path):
    def model(age, income=None):
        with pyro.plate("data", len(age)):
            z = pyro.sample("trait", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("years", dist.Normal(z, 1.0), obs=age)
            if income is not None:
                pyro.sample("euros", dist.Normal(z, 1.0), obs=income)

    def guide(age, income=None):
        with pyro.plate("data", len(age)):
            pyro.sample("trait", dist.Normal(age / 2, 1.0))

    x = {"age": torch.randn(20), "income": torch.randn(20)} if columns else torch.randn(20)
    found = predictive_check(model, guide, x, keep_data=not columns, **FEW | {"replications": 60})
    tree = found.to_arviz()
    names = {"years", "euros"} if columns else {"years", "value"}
    for group in ("observed_data", "posterior_predictive", "prior_predictive"):
        assert set(tree[group].data_vars) == names
    assert set(tree["posterior"].data_vars) == {"trait"}
    assert set(tree["log_likelihood"].data_vars) == {"x" if columns else "years"}  # of both sites together
    again = PredictiveCheck.load(found.save(tmp_path))
    assert set(again.to_arviz()["log_likelihood"].data_vars) == set(tree["log_likelihood"].data_vars)


def test_arviz_draws_the_checks_and_compares_models():
    """`plot_ppc` and `compare` take the groups as they are; `loo` of ArviZ 1.x takes 25 draws or more."""
    pair, x = oracle(25)
    worse = LinearGaussian(4, 3, 2.0).requires_grad_(False).eval()
    trees = {
        name: predictive_check(
            p.model, p.guide, x, keep_data=True, **FEW | {"replications": 180, "num_draws": 30}
        ).to_arviz()
        for name, p in (("true", pair), ("worse", worse))
    }
    tree = trees["true"]
    for group, draws in (("posterior_predictive", 30), ("prior_predictive", 180)):
        assert tree[group]["x"].dims == ("chain", "draw", "datum", "x_dim_0")
        assert tree[group]["x"].shape == (1, draws, 25, 4)
        assert tree[group]["mean"].shape == (1, draws, 25)
        np.testing.assert_allclose(tree[group]["x"].mean("x_dim_0"), tree[group]["mean"], atol=1e-5)
    np.testing.assert_allclose(tree["observed_data"]["x"], x)
    assert tree["sample_stats"]["lp"].dims == ("chain", "draw", "datum")
    assert tree["posterior"]["z"].dims == ("chain", "draw", "datum", "z_dim_0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 25 data and 30 draws
        whole = {} if hasattr(az, "plot_ppc") else {"round_to": "none"}  # ArviZ 0.x, 1.x
        table = az.compare(trees, **whole)
        assert list(table.index) == ["true", "worse"]
        elpd = next(c for c in ("elpd_loo", "elpd") if c in table)
        assert table[elpd]["true"] == pytest.approx(float(pair.log_px(x).sum()), abs=1e-2)
        assert az.loo(tree) is not None
        if hasattr(az, "plot_ppc"):
            import matplotlib as mpl

            mpl.use("Agg")
            for name in ("x", "mean"):
                assert az.plot_ppc(tree, var_names=[name], num_pp_samples=5) is not None
            assert az.plot_ppc(tree, var_names=["x"], group="prior", num_pp_samples=5) is not None
        else:
            for name in ("x", "mean"):
                assert az.plot_ppc_dist(tree, var_names=[name], backend="matplotlib") is not None


def test_results_are_written_and_read(tmp_path):
    pair, x = oracle(25)
    found = predictive_check(pair.model, pair.guide, x, MEAN, **FEW)
    path = found.save(tmp_path)
    again = PredictiveCheck.load(path)
    for field in dataclasses.fields(PredictiveCheck):
        if field.name in ("latents", "replicated"):
            continue
        one, two = getattr(found, field.name), getattr(again, field.name)
        if isinstance(one, dict):
            assert all(torch.equal(v, two[n]) for n, v in one.items())
        else:
            assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
    assert again.table() == found.table()
    tree = az.from_netcdf(path.with_suffix(".nc"))
    assert tree["posterior_predictive"]["mean"].shape == (1, 9, 25)
    write_netcdf(again.to_arviz(), tmp_path / "again.nc")  # without the latents, which are not saved


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistics": {}}, "statistics: expected one at least"),
        ({"statistics": lambda x: x.mean(1)}, "statistics: expected a dict of functions by name"),
        ({"statistics": {"a": lambda x: x.max(1)}}, r"statistics\['a'\]: .*found a max, as .*return its .values"),
        ({"statistics": {"a": lambda x: x}}, r"statistics\['a'\]: expected one number per datum, shape \[25\]"),
        ({"replications": 10}, "replications: expected at least 29, for 1 statistics and alpha = 0.2; found 10"),
        ({"num_draws": 0}, "num_draws: expected at least 1"),
        ({"alpha": 1.5}, "alpha: expected a probability"),
        ({"over": {"all": lambda v: v}}, "over: expected a number, found shape"),
    ],
)
def test_bad_arguments(options, message):
    pair, x = oracle(25)
    with pytest.raises(UsageError, match=message):
        predictive_check(pair.model, pair.guide, x, **{"statistics": MEAN} | FEW | options)


def test_the_smallest_number_of_replications_is_enough():
    pair, x = oracle(25)
    found = predictive_check(pair.model, pair.guide, 50 + x, MEAN, **FEW | {"replications": 29})
    assert not found.passed
