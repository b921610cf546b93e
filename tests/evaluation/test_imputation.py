"""Imputations against the closed form of a linear-Gaussian model, whichever way a pair leaves gaps out."""

import json
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn as torch_nn

from ppvae import data, likelihoods, log_marginal
from ppvae.cli.main import main
from ppvae.errors import ContractError, DataError, UsageError
from ppvae.evaluation import impute, predictive_check
from tests.inference.test_missing import (
    COLUMNS,
    PAIR,
    Gaussian,
    Observed,
    mixed_table_vae,
    table_with_gaps,
    with_random_gaps,
)

NAN = math.nan


@pytest.fixture(autouse=True)
def clean():
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()


def conditional(pair, row):
    """Mean and covariance of the missing values of a row, in closed form."""
    with torch.no_grad():
        cov = pair.weight @ pair.weight.T + pair.scale**2 * torch.eye(len(pair.loc)).double()
        m, o = row.isnan(), ~row.isnan()
        gain = cov[m][:, o] @ torch.linalg.inv(cov[o][:, o])
        return pair.loc[m] + gain @ (row[o] - pair.loc[o]), cov[m][:, m] - gain @ cov[o][:, m]


def faults(pair, x, filled):
    """Which laws the imputations break. Each is a t-test over the data, |t| < 5: p < 1e-5 for 120 data."""
    found = []
    means, spreads, averages = [], [], []
    for i, row in enumerate(x):
        if not bool(row.isnan().any()):
            continue
        m = row.isnan()
        loc, cov = conditional(pair, row)
        whitened = torch.linalg.solve_triangular(
            torch.linalg.cholesky(cov), (filled.values[:, i, m] - loc).T, upper=False
        )
        means.append(whitened.mean())
        spreads.append((whitened**2).mean() - 1)
        averages.append(((filled.mean[i, m] - loc) / cov.diagonal().sqrt()).mean())
    for name, values in (("mean", means), ("covariance", spreads), ("average", averages)):
        v = torch.stack(values)
        if abs(float(v.mean() / (v.std() / len(v) ** 0.5 + 1e-12))) > 5 or abs(float(v.mean())) > 0.1:
            found.append(name)
    return found


class Wide(Gaussian):
    """The guide is too wide and beside the posterior, so that weights matter."""

    def guide(self, x):
        with poutine.block(), poutine.trace() as tracer:
            super().guide(x)
        fn = tracer.trace.nodes["z"]["fn"]
        with pyro.plate("data", len(x)):
            scale = 2 * fn.variance.sqrt()
            pyro.sample("z", dist.Normal(fn.mean + 0.5 * scale, scale).to_event(1))


@pytest.mark.parametrize("how", ["mask", "mask alone", "plate", "obs_mask", "distribution"])
def test_imputations_are_draws_of_the_closed_form(how):
    pair = Wide(how)
    x = with_random_gaps(pair.draw(120))
    poutine.trace(pair.model).get_trace(x)
    filled = impute(pair.model, pair.guide, data.with_missing(x), num_particles=1000, draws=60)
    assert filled.values.shape == (60, *x.shape)
    assert torch.equal(filled.missing, x.isnan())
    known = ~x.isnan()
    assert torch.equal(filled.values[:, known], x[known].expand(60, -1))
    assert torch.equal(filled.mean[known], x[known])
    assert not filled.values.isnan().any()
    assert faults(pair, x, filled) == []
    assert filled.estimate.reliable.all()
    est = log_marginal(pair.model, pair.guide, data.with_missing(x), num_particles=1000, proposal="guide")
    assert torch.equal(filled.estimate.log_px, est.log_px)
    assert filled.estimate.dims == pytest.approx(est.dims)
    assert filled.estimate.digest == est.digest
    assert filled.estimate.notes == est.notes


def test_the_laws_see_what_is_wrong():
    """Unweighted draws, the other sign, and a spread that is too small each break a law."""
    pair = Wide("mask")
    x = with_random_gaps(pair.draw(120))
    filled = impute(pair.model, pair.guide, data.with_missing(x), num_particles=1000, draws=60)
    lone = impute(pair.model, pair.guide, data.with_missing(x), num_particles=1, draws=60)
    assert faults(pair, x, lone)
    centre = filled.mean
    for planted in (2 * centre - filled.values + 0.2, centre + 0.8 * (filled.values - centre)):
        assert faults(pair, x, type(filled)(planted, centre, filled.missing, filled.estimate))


class Particular(Gaussian):
    """A network that takes a flat batch alone, or one datum's own size; particles are folded, or taken one by one."""

    def __init__(self, layout):
        super().__init__("mask")
        self.layout = layout

    def model(self, x):
        pyro.module("gaussian", self)
        features, latent = self.weight.shape
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent).double(), 1.0).to_event(1))
            flat = z.view(len(x), latent)
            mean = flat @ self.weight.T + self.loc
            if self.layout == "one by one":
                mean = mean + 0.0 * torch.zeros(120, features).double()[: self.count(x)]
            pyro.sample("x", dist.Normal(mean, self.scale).mask(~x.isnan()).to_event(1), obs=x.nan_to_num())

    def count(self, x):
        if len(x) > 60:
            raise ValueError("too many rows")
        return len(x)


@pytest.mark.parametrize("layout", ["folded", "one by one"])
def test_however_particles_are_laid_out(layout):
    pair = Particular(layout)
    x = with_random_gaps(pair.draw(60))
    few = {"num_particles": 60, "draws": 12, "seed": 3}
    filled = impute(pair.model, pair.guide, data.with_missing(x), **few)
    assert filled.values.shape == (12, 60, 5)
    assert (filled.estimate.log_px - pair.log_px(x)).abs().max() < 1e-9
    plain = Gaussian("mask")
    plain.load_state_dict(pair.state_dict())
    same = impute(plain.model, plain.guide, data.with_missing(x), **few)
    # the same latents, drawn by the same guide; the mean needs no further noise
    assert (filled.mean - same.mean).abs().max() < (1e-9 if layout == "folded" else 1.0)
    exact = torch.stack([conditional(pair, row)[0].sum() for row in x])
    error = (filled.mean.masked_fill(~x.isnan(), 0.0).sum(1) - exact) / 60**-0.5
    assert error.mean().abs() < 5 * error.std() / 60**0.5


def test_a_plate_that_draws_its_own_rows():
    """The pair gets all data and its plate the rows; a ragged last block is padded."""
    pair = Gaussian("mask")
    x = with_random_gaps(pair.draw(70))

    def model(x):
        pyro.module("gaussian", pair)
        with pyro.plate("data", 70, subsample_size=30) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            fn = dist.Normal(z @ pair.weight.T + pair.loc, pair.scale)
            own = x[rows]
            pyro.sample("x", fn.mask(~own.isnan()).to_event(1), obs=own.nan_to_num())

    def guide(x):
        with poutine.block(), poutine.trace() as tracer:
            pair.guide(x)
        fn = tracer.trace.nodes["z"]["fn"]
        with pyro.plate("data", 70, subsample_size=30) as rows:
            pyro.sample("z", dist.MultivariateNormal(fn.mean[rows], fn.covariance_matrix[rows]))

    filled = impute(model, guide, data.with_missing(x), num_particles=300, draws=60)
    assert filled.values.shape == (60, 70, 5)
    assert faults(pair, x, filled) == []


def test_the_result_does_not_depend_on_how_memory_is_cut_nor_on_other_rows():
    pair = Wide("mask")
    x = with_random_gaps(pair.draw(60))
    whole = impute(pair.model, pair.guide, data.with_missing(x), num_particles=250, draws=15)
    cut = impute(pair.model, pair.guide, data.with_missing(x), num_particles=250, draws=15, rows=170)
    assert torch.equal(whole.values, cut.values)
    assert (whole.mean - cut.mean).abs().max() < 1e-9
    state = torch.get_rng_state()
    other = impute(pair.model, pair.guide, data.with_missing(x), num_particles=250, draws=15, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(other.values, whole.values)


def test_a_mixed_table_gets_values_of_its_columns():
    pair, x = mixed_table_vae(), table_with_gaps()
    filled = impute(pair.model, pair.guide, data.with_missing(x), num_particles=100, draws=8)
    fn = likelihoods.Mixed(torch_nn.Identity(), COLUMNS)(torch.zeros(1, likelihoods.table_outputs(COLUMNS)))
    assert fn.support.check(filled.values.reshape(-1, 5)).all()
    assert not filled.values.isnan().any()
    codes = torch.tensor([c == ("categorical", 3) for c in COLUMNS])
    assert torch.equal(filled.mean.isnan(), filled.missing & codes)
    counts = filled.missing[:, 1]
    assert (filled.mean[counts, 1] > 0).all()


def test_one_broken_datum_leaves_the_others_alone():
    pair = Wide("distribution")
    x = with_random_gaps(pair.draw(30))
    clean = impute(pair.model, pair.guide, data.with_missing(x), num_particles=100)
    x[4, ~x[4].isnan()] = 1e200
    broken = impute(pair.model, pair.guide, data.with_missing(x), num_particles=100)
    others = torch.arange(30) != 4
    assert not broken.estimate.reliable[4]
    assert torch.equal(broken.values[:, others], clean.values[:, others])


def halves(x):
    """x_d ~ N(z, 1), the first two of five and the others observed by a site each; z ~ N(0, 1)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        for name, part in (("a", x[:, :2]), ("b", x[:, 2:])):
            pyro.sample(name, Observed(z[..., None].expand(*z.shape, part.shape[1]), 1.0).to_event(1), obs=part)


def from_prior(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))


def test_columns_of_one_tensor_that_several_sites_observe_are_imputed():
    x = with_random_gaps(torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).double())
    found = impute(halves, from_prior, data.with_missing(x), num_particles=20_000, draws=3)
    known = ~x.isnan()
    mean = x.nan_to_num().sum(1) / (known.sum(1) + 1)  # E[z | observed]
    expected = torch.where(known, x, mean[:, None])
    # the sd of a self-normalised mean of 20,000 draws of the prior is below 0.02 here, of 20 data: 5 sd
    assert float((found.mean - expected).abs().max()) < 0.1
    assert torch.equal(found.missing, ~known)
    assert bool(torch.where(known, found.values == x, found.values.isfinite()).all())


def test_what_cannot_be_imputed_is_refused():
    pair = Gaussian("mask")
    x = pair.draw(20)
    with pytest.raises(UsageError, match="missing values"):
        impute(pair.model, pair.guide, data.with_missing(x))
    with pytest.raises(DataError, match="with_missing"):
        impute(pair.model, pair.guide, with_random_gaps(x))
    for words in ({"draws": 0}, {"num_particles": 0}):
        with pytest.raises(UsageError, match=f"{next(iter(words))}: expected at least 1, found 0"):
            impute(pair.model, pair.guide, data.with_missing(with_random_gaps(x)), **words)
    filled = Gaussian("filled")
    with pytest.raises(ContractError, match=r"site 'x'.*fill"):
        impute(filled.model, filled.guide, data.with_missing(with_random_gaps(x)))

    def scaled(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            for name, part in (("a", x[:, :2]), ("b", 2 * x[:, 2:])):
                pyro.sample(name, Observed(z[..., None].expand(*z.shape, part.shape[1]), 1.0).to_event(1), obs=part)

    with pytest.raises(ContractError, match=r"observed site that holds the data.*\['a', 'b'\]"):
        impute(scaled, from_prior, data.with_missing(with_random_gaps(x)))

    def classes(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.3)), infer={"enumerate": "parallel"})
            pyro.sample("x", Observed(c[..., None].expand(*c.shape, 5).double(), 1.0).to_event(1), obs=x)

    def nothing(x):
        with pyro.plate("data", len(x)):
            pyro.param("none", torch.zeros(()))

    poutine.trace(nothing).get_trace(x)
    with pytest.raises(ContractError, match=r"site 'c'.*summed out"):
        impute(classes, nothing, data.with_missing(with_random_gaps(x)))


def test_generate_writes_the_imputations_of_a_run_with_gaps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pair.py").write_text(PAIR)
    x = table_with_gaps(200).numpy()
    np.savez("table.npz", x=x)
    fitting = ["fit", "pair.py:pair", "--data", "table.npz", "--epochs", "1", "--name", "a", "--missing", "--no-report"]
    assert main(fitting) == 0
    assert main(["generate", "runs/a", "--count", "4"]) == 0
    assert "imputations.npz" in capsys.readouterr().out
    with np.load("runs/a/generated/imputations.npz") as found:
        values, missing, mean = found["values"], found["missing"], found["mean"]
        assert found["reliable"].shape == found["ess"].shape == (len(mean),)
    rows = data.load("table.npz", missing=True)[2]
    assert values.shape == (10, *rows.shape)
    assert np.array_equal(missing, rows.isnan().numpy())
    assert not np.isnan(values).any()
    assert np.array_equal(values[0][~missing], rows.numpy()[~missing])
    config = json.loads((tmp_path / "runs" / "a" / "config.json").read_text())
    assert config["data"]["missing"]


def _masked(loc, x):
    return dist.Normal(loc, x.new_ones(())).mask(~x.isnan())


def _of_matrix(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", _masked(z[..., None].expand(*z.shape, 2), x).to_event(1), obs=x.nan_to_num())


def _of_columns(age, visits):
    with pyro.plate("data", len(age)):
        z = pyro.sample("z", dist.Normal(age.new_zeros(()), 1.0))
        pyro.sample("age", _masked(z, age), obs=age.nan_to_num())
        pyro.sample("visits", _masked(z, visits), obs=visits.nan_to_num())


def _guide(*columns):
    x = columns[0] if len(columns) == 1 else torch.stack(columns, -1)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.nan_to_num().sum(-1) / 3, 0.6))


def _guide_of_columns(age, visits):
    return _guide(age, visits)


def _gaps():
    x = torch.randn(120, 2, generator=torch.Generator().manual_seed(0))
    x[::3, 1] = NAN
    x[1::4, 0] = NAN
    x[0] = 1.0
    x[x.isnan().all(1)] = 0.5
    return x


def test_columns_by_name_are_imputed_as_those_of_a_matrix():
    """Stacked by the model they give the same numbers; observed apart, the same distribution."""
    x = _gaps()
    whole = impute(_of_matrix, _guide, data.with_missing(x), num_particles=200, draws=400, seed=1)
    columns = data.with_missing({"visits": x[:, 1], "age": x[:, 0]})
    stacked = lambda age, visits: _of_matrix(torch.stack([age, visits], -1))  # noqa: E731
    for model, same in ((stacked, True), (_of_columns, False)):
        filled = impute(model, _guide_of_columns, columns, num_particles=200, draws=400, seed=1)
        assert torch.equal(filled.estimate.log_px, whole.estimate.log_px) or not same
        for i, name in enumerate(("age", "visits")):
            assert torch.equal(filled.missing[name], x[:, i].isnan())
            torch.testing.assert_close(filled.mean[name], whole.mean[:, i], atol=1e-5, rtol=1e-4)
            assert torch.equal(filled.values[name], whole.values[:, :, i]) or not same
            gap = x[:, i].isnan()  # about 30 x 400 draws: means of all differ by 0.06 with p < 1e-5
            assert abs(float((filled.values[name] - whole.values[:, :, i])[:, gap].mean())) < 0.06
        assert {"values/age", "mean/visits", "missing/age"} <= set(filled.arrays())


def test_the_order_in_which_a_model_joins_columns_does_not_matter():
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    x[::3, 1] = NAN
    x[1::3, 0] = NAN

    def matrix(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            loc = z[..., None] * torch.tensor([1.0, 2.0, 3.0])
            pyro.sample("x", _masked(loc, x).to_event(1), obs=x.nan_to_num())

    joined = lambda both, one: torch.cat([both.flip(-1), one[:, None]], -1)  # noqa: E731
    whole = impute(matrix, _guide, data.with_missing(x), num_particles=50, draws=4)
    columns = data.with_missing({"both": x[:, :2].flip(-1), "one": x[:, 2]})
    filled = impute(
        lambda both, one: matrix(joined(both, one)), lambda both, one: _guide(joined(both, one)), columns,
        num_particles=50, draws=4,
    )  # fmt: skip
    assert list(filled.values) == ["both"]
    assert torch.equal(filled.values["both"].flip(-1), whole.values[..., :2])
    assert torch.equal(filled.mean["both"].flip(-1), whole.mean[:, :2])


def test_columns_by_name_without_gaps_are_refused():
    x = torch.ones(5, 2)
    with pytest.raises(UsageError, match="missing values in a column of age, visits; found none"):
        impute(_of_columns, _guide_of_columns, {"age": x[:, 0], "visits": x[:, 1]})


def test_a_predictive_check_takes_columns_by_name():
    x = _gaps()
    options = {"replications": 1200, "calibrations": 0, "num_draws": 20, "seed": 2}
    of_matrix = {"age": lambda x: x[:, 0].nan_to_num(), "visits": lambda x: x[:, 1].nan_to_num()}
    whole = predictive_check(_of_matrix, _guide, data.with_missing(x), of_matrix, **options)
    stacked = lambda age, visits: _of_matrix(torch.stack([age, visits], -1))  # noqa: E731
    columns = data.with_missing({"age": x[:, 0], "visits": x[:, 1]})
    for model, same in ((stacked, True), (_of_columns, False)):
        found = predictive_check(model, _guide_of_columns, columns, **options)
        assert list(found.observed) == ["age", "visits"]  # every column by default
        for name in of_matrix:
            assert torch.equal(found.observed[name], whole.observed[name])
            assert torch.equal(found.prior[name], whole.prior[name]) or not same
            assert torch.equal(found.prior[name] == 0, whole.prior[name] == 0)  # gaps stay gaps


def test_categories_have_probabilities_and_one_best_code():
    """By Bayes' rule over the values of z, with z known exactly: p(y | x) = sum_z p(z | x) p(y | z)."""
    table = torch.tensor([[2.0, 0.0, -1.0], [-1.0, 0.5, 1.5]])  # logits of y given the sign of z
    x = torch.randn(30)
    y = torch.randint(0, 3, (30,)).double()
    y[::2], x[1::6] = torch.nan, torch.nan
    missing = torch.stack([x, y], -1).isnan()

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5).mask(~x.isnan()), obs=x.nan_to_num())
            fn = dist.Categorical(logits=table[(z > 0).long()])
            pyro.sample("y", fn.mask(~y.isnan()), obs=y.nan_to_num())

    def guide(x, y):
        with pyro.plate("data", len(x)):
            loc = torch.where(x.isnan(), 0.0, 0.8 * x.nan_to_num())
            pyro.sample("z", dist.Normal(loc, torch.where(x.isnan(), 1.0, 0.2**0.5)))

    found = impute(model, guide, data.with_missing({"x": x, "y": y}), num_particles=4000, draws=3, progress=False)
    gap = y.isnan()
    positive = dist.Normal(0.0, 1.0).cdf(torch.where(x.isnan(), 0.0, 0.8 * x.nan_to_num() / 0.2**0.5))
    exact = torch.stack([1 - positive, positive], -1) @ table.softmax(-1)
    assert set(found.probs) == {"y"}
    probs, best = found.probs["y"], found.completed["y"]
    assert (probs[gap] - exact[gap]).abs().max() < 0.05  # six standard errors of 4000 draws
    assert torch.equal(best[gap], probs[gap].argmax(-1).double())
    assert torch.equal(best[~gap], y[~gap])
    assert bool(probs[~gap].isnan().all())
    assert not bool(found.completed["x"].isnan().any())
    assert "probs/y" in found.arrays()
    for text in (str(found), repr(found)):
        rows = int(missing.any(1).sum())
        assert text.startswith(f"{int(missing.sum())} values imputed in {rows} of 30 rows")
        assert "tensor" not in text
        assert len(text) < 300


def test_a_table_has_probabilities_of_its_categories_alone():
    pair, x = mixed_table_vae(), table_with_gaps()
    found = impute(pair.model, pair.guide, data.with_missing(x), num_particles=50, draws=2, progress=False)
    codes = found.mean.isnan()
    assert torch.equal(~found.probs[..., 0].isnan(), codes)
    torch.testing.assert_close(found.probs[codes].sum(-1), torch.ones(int(codes.sum())).to(x), atol=1e-5, rtol=0)
    best = found.completed
    assert not bool(best.isnan().any())
    whole = (found.values == found.values.round()).flatten(0, 1).all(0)
    assert 0 < int(whole.sum()) < len(whole)
    assert torch.equal(best[:, whole], best[:, whole].round())  # counts, binary numbers and codes
    assert torch.equal(best[:, ~whole], found.mean[:, ~whole])
