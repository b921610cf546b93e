"""Missing values: the mark of a split, log p of the observed values against closed forms, and errors."""

import json
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn as torch_nn

from ppvae import VAE, check, data, fit, likelihoods, load, log_marginal, nn, posteriors, priors
from ppvae.cli.main import main
from ppvae.errors import ContractError, DataError, TrainingError, UsageError
from ppvae.inference import terms
from ppvae.training import load as load_run

NAN = math.nan


@pytest.fixture(autouse=True)
def fresh_param_store():
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()


def with_random_gaps(x, share=0.3, seed=0):
    """A copy in which values are missing at random, at least one left in each row."""
    generator = torch.Generator().manual_seed(seed)
    gaps = torch.rand(x.shape, generator=generator) < share
    gaps[torch.arange(len(x)), torch.randint(x.shape[1], (len(x),), generator=generator)] = False
    return x.masked_fill(gaps, NAN)


class Gaussian(torch_nn.Module):
    """z ~ N(0, I), x | z ~ N(W z + b, s^2 I) with values of x missing; the guide is the exact posterior.

    p(x_o) = N(b_o, W_o W_o^T + s^2 I) is the closed form, whichever way (`how`) the missing values are left out.
    """

    def __init__(self, how, features=5, latent=2, scale=0.6):
        super().__init__()
        self.weight, self.scale, self.how = (
            torch_nn.Parameter(torch.randn(features, latent).double()),
            torch.tensor(scale).double(),
            how,
        )
        self.loc = torch_nn.Parameter(torch.randn(features).double())

    def model(self, x):
        pyro.module("gaussian", self)
        features, latent = self.weight.shape
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent).double(), 1.0).to_event(1))
            fn = dist.Normal(z @ self.weight.T + self.loc, self.scale)
            known, filled = ~x.isnan(), x.nan_to_num()
            if self.how == "mask":
                pyro.sample("x", fn.mask(known).to_event(1), obs=filled)
            elif self.how == "mask alone":
                pyro.sample("x", fn.mask(known).to_event(1), obs=x)
            elif self.how == "distribution":
                pyro.sample("x", Observed(fn.loc, fn.scale).to_event(1), obs=x)
            elif self.how == "filled":
                pyro.sample("x", fn.to_event(1), obs=filled)
            elif self.how == "nothing":
                pyro.sample("x", fn.to_event(1), obs=x)
            if self.how not in ("plate", "obs_mask", "filled plate"):
                return
            fn = dist.Normal(fn.loc.movedim(-1, -2), self.scale)
            with pyro.plate("columns", features, dim=-2):
                if self.how == "plate":
                    with poutine.mask(mask=known.T):
                        pyro.sample("x", fn, obs=filled.T)
                elif self.how == "obs_mask":
                    pyro.sample("x", fn, obs=x.T, obs_mask=known.T)
                else:
                    pyro.sample("x", fn, obs=filled.T)

    def guide(self, x):
        pyro.module("gaussian", self)
        known = (~x.isnan()).double()
        weight = known.unsqueeze(-1) * self.weight
        precision = torch.eye(self.weight.shape[1]).double() + weight.mT @ weight / self.scale**2
        pull = (weight.mT @ (x - self.loc).nan_to_num().unsqueeze(-1)).squeeze(-1) / self.scale**2
        loc = torch.linalg.solve(precision, pull)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, precision_matrix=precision))

    def log_px(self, x):
        """log p(x_o) in closed form, [rows]."""
        cov = self.weight @ self.weight.T + self.scale**2 * torch.eye(len(self.loc)).double()
        out = []
        for row in x:
            o = ~row.isnan()
            out.append(dist.MultivariateNormal(self.loc[o], cov[o][:, o]).log_prob(row[o]))
        return torch.stack(out).detach()

    def draw(self, count):
        z = torch.randn(count, self.weight.shape[1]).double()
        return (z @ self.weight.T + self.loc + self.scale * torch.randn(count, len(self.loc)).double()).detach()


class Observed(dist.Normal):
    """A user's distribution whose log-density is 0 at a missing value."""

    def log_prob(self, value):
        return torch.where(value.isnan(), 0.0, super().log_prob(value.nan_to_num()))

    def expand(self, batch_shape, _instance=None):
        return Observed(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


COLUMNS = ["real", "count", ("categorical", 3), "binary", "real"]


def table_with_gaps(count=120, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, generator=generator)
    x = torch.stack(
        [
            z + 0.3 * torch.randn(count, generator=generator),
            torch.poisson((1 + 0.5 * z).exp(), generator=generator),
            torch.bucketize(z + torch.randn(count, generator=generator), torch.tensor([-0.5, 0.5])).float(),
            torch.bernoulli(torch.sigmoid(2 * z), generator=generator),
            torch.randn(count, generator=generator),
        ],
        1,
    )
    return with_random_gaps(x, seed=seed)


def mixed_table_vae(latent=2):
    torch.manual_seed(0)
    return VAE(
        priors.StandardNormal(latent),
        likelihoods.Mixed(nn.mlp(latent, likelihoods.table_outputs(COLUMNS), hidden=(16,)), COLUMNS),
        posteriors.DiagonalNormal(nn.Missing(nn.mlp(2 * len(COLUMNS), 2 * latent, hidden=(16,)))),
    )


# The mark


def test_the_mark_survives_what_is_done_to_a_split(tmp_path):
    x = table_with_gaps(20)
    marked = data.with_missing(x, name="mine")
    assert type(marked) is data.Split
    assert (marked.missing, marked.shape, marked.name) == (True, x.shape, "mine")
    assert torch.equal(marked.detach().isnan(), x.isnan())
    kept = {
        "slice": marked[3:9], "list": marked[[1, 5]], "index": marked[torch.tensor([2, 4])], "head": marked.head(4),
        "mask": marked[torch.arange(20) > 5], "double": marked.double(), "to": marked.to("cpu"),
        "again": data.with_missing(marked), "fixed": marked.fixed(3),
    }  # fmt: skip
    for what, split in kept.items():
        assert isinstance(split, data.Split), what
        assert split.missing, what
        data.validated(split, what)
    assert "NaN missing" in marked[:5].description
    assert "5 of 20 rows" in marked[:5].description
    assert not data.load("digits")[0].missing


def test_the_mark_is_put_on_a_split_and_keeps_its_facts():
    test = data.load("digits")[2]
    marked = data.with_missing(test)
    assert torch.equal(marked.labels, test.labels)
    assert (marked.name, marked.event_shape, marked.levels) == ("digits/test", (1, 8, 8), 17)


def test_digests_do_not_depend_on_the_bits_of_nan():
    one = torch.tensor([[1.0, NAN], [2.0, 3.0]])
    other = one.clone()
    bits = other.view(torch.int32)
    bits[0, 1] = -4194303  # another NaN: the sign and the lowest bit set
    assert other.isnan().equal(one.isnan())
    assert not torch.equal(one.view(torch.int32), bits)
    assert data.digest(one) == data.digest(other)
    assert data.with_missing(one).digest == data.with_missing(other).digest
    moved = torch.tensor([[NAN, 1.0], [2.0, 3.0]])
    assert data.digest(one) != data.digest(moved)
    assert data.digest(one) != data.digest(one.nan_to_num())
    assert data.digest(one.double()) != data.digest(one)


def test_unmarked_nan_is_refused_with_its_place_and_the_way_out():
    x, pair = table_with_gaps(), mixed_table_vae()
    x[:7] = 1.0
    x[7] = torch.tensor([1.0, 1.0, NAN, 1.0, 1.0])
    for call in (
        lambda: fit(pair.model, pair.guide, x, epochs=1),
        lambda: fit(pair.model, pair.guide, data.with_missing(x), valid=x, epochs=1),
        lambda: log_marginal(pair.model, pair.guide, x, num_particles=30, proposal="guide"),
        lambda: data.validated(x, "x"),
    ):
        with pytest.raises(DataError, match=r"row 7, column 2 is nan.*data\.with_missing\(x\)"):
            call()


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.tensor([[1.0, NAN], [math.inf, 1.0]]), "row 1, column 0 is inf"),
        (torch.tensor([[1.0, NAN], [NAN, NAN], [NAN, NAN]]), "row 1 has no value that is not missing, nor .* 1 more"),
        (torch.full((2, 2, 2), NAN), "row 0 has no value"),
        (torch.tensor(NAN), "at least one row"),
        ([[NAN]], r"expected a torch\.Tensor"),
    ],
)
def test_what_the_mark_does_not_allow(value, match):
    with pytest.raises(DataError, match=match):
        data.with_missing(value)


def test_labels_may_have_gaps_anywhere():
    labels = data.with_missing(torch.tensor([0.0, NAN, 1.0]))
    assert labels.missing


# Files


def test_files_with_missing_values(tmp_path):
    x = table_with_gaps(60).numpy()
    np.save(tmp_path / "t.npy", x)
    np.savez(tmp_path / "parts.npz", train=x[:40], valid=x[40:50], test=x[50:], label=np.arange(60))
    with pytest.raises(DataError, match=r"row \d+, column.* is nan.*missing=True \(--missing\)"):
        data.load(tmp_path / "t.npy")
    splits = data.load(tmp_path / "t.npy", missing=True)
    assert sum(len(s) for s in splits) == 60
    assert all(s.missing for s in splits)
    rows = torch.cat([s.index for s in splits])
    together = torch.cat([s.detach() for s in splits])
    assert torch.equal(together.nan_to_num(-9), torch.from_numpy(x)[rows].nan_to_num(-9))
    parts = data.load(tmp_path / "parts.npz", missing=True)
    assert [len(s) for s in parts] == [40, 10, 10]
    assert parts[0].missing
    x[3] = np.nan
    np.save(tmp_path / "empty.npy", x)
    with pytest.raises(DataError, match="row 3 has no value"):
        data.load(tmp_path / "empty.npy", missing=True)
    x[3] = np.inf
    np.save(tmp_path / "inf.npy", x)
    with pytest.raises(DataError, match=r"row 3.*inf"):
        data.load(tmp_path / "inf.npy", missing=True)


def test_a_file_of_zeros_ones_and_gaps_is_binary(tmp_path):
    x = with_random_gaps(torch.bernoulli(torch.full((30, 4), 0.5))).numpy()
    np.save(tmp_path / "b.npy", x)
    assert data.load(tmp_path / "b.npy", missing=True)[0].base_measure == "binary"


@pytest.mark.parametrize("options", [{"binarize": "fixed"}, {"dequantize": True}])
def test_missing_goes_with_no_noise(tmp_path, options):
    np.save(tmp_path / "t.npy", table_with_gaps(60).numpy())
    with pytest.raises(UsageError, match="missing"):
        data.load(tmp_path / "t.npy", missing=True, **options)
    with pytest.raises(UsageError, match="digits"):
        data.load("digits", missing=True)


# log p(x) of what is observed


@pytest.mark.parametrize("how", ["mask", "mask alone", "plate", "obs_mask", "distribution"])
def test_exact_log_px_of_what_is_observed(how):
    """Plain pairs with the exact posterior: every weight is p(x_o), whichever way gaps are left out."""
    pair = Gaussian(how)
    x = with_random_gaps(pair.draw(60))
    poutine.trace(pair.model).get_trace(x)
    est = log_marginal(pair.model, pair.guide, data.with_missing(x), num_particles=30, proposal="guide")
    assert (est.log_px - pair.log_px(x)).abs().max() < 1e-9
    assert est.reliable.all()
    observed = float((~x.isnan()).double().sum(1).mean())
    assert est.dims == pytest.approx(observed, abs=1e-12)
    assert est.bits_per_dim == pytest.approx(est.nll / (observed * math.log(2)), abs=1e-12)
    assert f"{100 * float(x.isnan().double().mean()):.1f} % of the values are missing" in est.summary()
    assert "missing" in est.attributes()["notes"]
    whole = pair.draw(20)
    assert (
        log_marginal(pair.model, pair.guide, whole, num_particles=30, proposal="guide").log_px - pair.log_px(whole)
    ).abs().max() < 1e-9


def test_a_mixed_table_of_real_columns_is_the_linear_gaussian():
    """`Mixed` with a linear decoder against N(x_o; b_o, W_o W_o^T + s^2); 9 standard errors over 40 data: < 1e-15."""
    torch.manual_seed(3)
    decoder = torch_nn.Linear(2, 4)
    likelihood = likelihoods.Mixed(decoder, ["real"] * 4, floor=0.0)
    with torch.no_grad():
        likelihood.log_scale.copy_(torch.tensor([-0.5, 0.0, 0.3, -0.2]))
    encoder = torch_nn.Linear(8, 4)
    with torch.no_grad():
        for p in encoder.parameters():
            p.zero_()
    vae = VAE(priors.StandardNormal(2), likelihood, posteriors.DiagonalNormal(nn.Missing(encoder))).double()
    x = with_random_gaps(torch.randn(40, 4).double())
    est = log_marginal(vae.model, vae.guide, data.with_missing(x), num_particles=5000, proposal="guide")
    w, b = decoder.weight.detach(), decoder.bias.detach()
    cov = w @ w.T + torch.diag((2 * likelihood.log_scale.detach()).exp())
    for i, row in enumerate(x):
        o = ~row.isnan()
        exact = dist.MultivariateNormal(b[o], cov[o][:, o]).log_prob(row[o])
        assert abs(est.log_px[i] - exact) < 9 * est.std_error[i]
    assert est.base_measure == "density"


def test_enumerated_mixture_of_a_mixed_table():
    """Classes summed out exactly: log p(x_o) = log sum_c pi_c p(x_o | c), the gaps' terms left out by hand."""
    logits, rates, cats, coins = torch.tensor([0.2, -0.3]), torch.tensor([2.0, 5.0]), torch.randn(2, 3), torch.randn(2)
    locs = torch.tensor([[-1.0, 0.5], [1.0, 2.0]])
    outputs = torch.stack([
        torch.cat([locs[c, :1], rates[c : c + 1].log(), cats[c], coins[c : c + 1], locs[c, 1:]]) for c in range(2)
    ])  # fmt: skip
    likelihood = likelihoods.Mixed(torch_nn.Identity(), COLUMNS)

    def model(x):
        pyro.module("likelihood", likelihood)
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample("x", likelihood(outputs[c]), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.param("none", torch.zeros(()))

    x = table_with_gaps(60)
    scale = float(likelihood.log_scale[0].detach().exp() + likelihood.floor)
    each = torch.stack([
        torch.stack([
            dist.Normal(locs[c, 0], scale).log_prob(x[:, 0].nan_to_num()),
            dist.Poisson(rates[c]).log_prob(x[:, 1].nan_to_num()),
            dist.Categorical(logits=cats[c]).log_prob(x[:, 2].nan_to_num()),
            dist.Bernoulli(logits=coins[c]).log_prob(x[:, 3].nan_to_num()),
            dist.Normal(locs[c, 1], scale).log_prob(x[:, 4].nan_to_num()),
        ], 1).masked_fill(x.isnan(), 0.0).sum(1)
        for c in range(2)
    ])  # fmt: skip
    exact = (each + logits.log_softmax(0).unsqueeze(-1)).logsumexp(0)
    poutine.trace(model).get_trace(x)
    poutine.trace(guide).get_trace(x)
    est = log_marginal(model, guide, data.with_missing(x), num_particles=1, proposal="guide")
    assert (est.log_px - exact).abs().max() < 1e-5
    assert est.base_measure == "mixed"
    assert any("units" in note for note in est.notes)


def test_a_row_does_not_depend_on_the_gaps_of_others():
    pair, x = mixed_table_vae(), table_with_gaps()
    poutine.trace(pair.model).get_trace(x)
    marked = data.with_missing(x)
    alone = log_marginal(pair.model, pair.guide, marked, num_particles=30, rows=50, proposal="guide")
    together = log_marginal(pair.model, pair.guide, marked, num_particles=30, proposal="guide")
    assert (alone.log_px - together.log_px).abs().max() < 1e-4
    assert alone.digest == together.digest == data.digest(x)


# Training


def test_training_raises_the_elbo_of_what_is_observed_and_resumes(tmp_path):
    x = table_with_gaps(400)
    splits = data.with_missing(x[:300]), data.with_missing(x[300:])

    def trained(folder, epochs, resume=False):
        pair = mixed_table_vae()
        return fit(
            pair.model, pair.guide, splits[0], valid=splits[1], epochs=epochs, directory=tmp_path / folder,
            optimizer=lambda p: torch.optim.Adam(p, lr=0.01), resume=resume, checkpoint_seconds=0.0,
        )  # fmt: skip

    run = trained("a", 8)
    assert run.history[-1]["valid_elbo"] > run.history[0]["valid_elbo"] + 0.5
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["fit"]["digest"] == splits[0].digest
    assert "NaN missing" in config["fit"]["data"]
    trained("b", 3)
    again = trained("b", 8, resume=True)
    for (name, p), q in zip(run.model.scope.params.items(), again.model.scope.params.values(), strict=True):
        assert torch.equal(p, q), name
    pair = mixed_table_vae()
    back = load_run(tmp_path / "a", pair.model, pair.guide)
    est = log_marginal(back.model, back.guide, splits[1], num_particles=50, proposal="guide")
    est.save(tmp_path / "results")
    saved = json.loads((tmp_path / "results" / "log_marginal.json").read_text())
    assert (saved["base_measure"], saved["dims"]) == ("mixed", pytest.approx(est.dims))
    assert load is load_run


def test_masks_train_like_the_density_of_what_is_observed():
    """A step of a filled and masked pair moves the parameters as the closed form's gradient says."""
    pair = Gaussian("mask")
    x = with_random_gaps(pair.draw(50))
    run = fit(pair.model, pair.guide, data.with_missing(x), epochs=2, batch_size=50)
    assert math.isfinite(run.metrics["loss"])
    t = terms(run.model, run.guide, x, 3)
    assert torch.allclose(t.log_weight, pair.log_px(x).expand(3, -1), atol=1e-9)


def test_nan_under_a_mask_has_no_gradient_and_the_error_says_what_to_do():
    pair = Gaussian("mask alone")
    x = with_random_gaps(pair.draw(50))
    with pytest.raises(TrainingError, match=r"nan_to_num\(x\)"):
        fit(pair.model, pair.guide, data.with_missing(x), epochs=1)


# What is refused


@pytest.mark.parametrize("how", ["filled", "filled plate"])
def test_filled_gaps_are_no_data(how):
    pair = Gaussian(how)
    x = with_random_gaps(pair.draw(30))
    count = int(x.isnan().sum())
    with pytest.raises(ContractError, match=rf"site 'x'.*{count} of them observed as the numbers that fill.*Mixed"):
        log_marginal(pair.model, pair.guide, data.with_missing(x), num_particles=30, proposal="guide")
    with pytest.raises(ContractError, match="fill"):
        fit(pair.model, pair.guide, data.with_missing(x), epochs=1)
    whole = pair.draw(30)
    assert (
        log_marginal(pair.model, pair.guide, whole, num_particles=30, proposal="guide").log_px - pair.log_px(whole)
    ).abs().max() < 1e-9


def posterior_with_missing(net):
    return posteriors.DiagonalNormal(nn.Missing(net))


LIKELIHOODS = {
    "Normal": lambda: likelihoods.Normal(nn.mlp(2, 3, hidden=(4,))),
    "Bernoulli": lambda: likelihoods.Bernoulli(nn.mlp(2, 3, hidden=(4,))),
    "Poisson": lambda: likelihoods.Poisson(nn.mlp(2, 3, hidden=(4,))),
    "Categorical": lambda: likelihoods.Categorical(nn.mlp(2, 12, hidden=(4,)), levels=4),
    "DiscretizedLogistic": lambda: likelihoods.DiscretizedLogistic(nn.mlp(2, 6, hidden=(4,)), levels=4),
    "ContinuousBernoulli": lambda: likelihoods.ContinuousBernoulli(nn.mlp(2, 3, hidden=(4,))),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihoods_that_take_no_gaps(name):
    """Wherever the gap is: rows with gaps are among those that are looked at."""
    pair = VAE(priors.StandardNormal(2), LIKELIHOODS[name](), posterior_with_missing(nn.mlp(6, 4, hidden=(4,))))
    x = torch.ones(300, 3)
    x[270, 1] = NAN
    for call in (
        lambda: log_marginal(pair.model, pair.guide, data.with_missing(x), num_particles=30, proposal="guide"),
        lambda: fit(pair.model, pair.guide, data.with_missing(x), epochs=1),
        lambda: check(pair.model, pair.guide, x[250:]),
        lambda: terms(pair.model, pair.guide, x[250:]),
    ):
        with pytest.raises(ContractError, match=r"site 'x': .*leaves missing values.*likelihoods\.Mixed"):
            call()


def test_a_density_that_makes_a_number_of_nan_is_none():
    """Pyro's one-hot takes the largest entry, and NaN for it: finite, and wrong."""
    fn = dist.OneHotCategorical(logits=torch.tensor([0.0, 1.0, 2.0]))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", fn, obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    x = torch.eye(3)[torch.arange(30) % 3]
    assert log_marginal(model, guide, x, num_particles=30, proposal="guide").reliable.all()
    x[4, 0] = NAN
    with pyro.validation_enabled(False):
        assert fn.log_prob(x).isfinite().all()
    with pytest.raises(ContractError, match=r"site 'x'.*OneHotCategorical, which does not take NaN"):
        log_marginal(model, guide, data.with_missing(x), num_particles=30, proposal="guide")


def test_a_guide_that_takes_no_gaps():
    pair, x = mixed_table_vae(), data.with_missing(table_with_gaps())
    pair.posterior = posteriors.DiagonalNormal(nn.mlp(5, 4, hidden=(4,)))
    for call in (
        lambda: log_marginal(pair.model, pair.guide, x, num_particles=30, proposal="guide"),
        lambda: fit(pair.model, pair.guide, x, epochs=1),
    ):
        with pytest.raises(ContractError, match=r"site 'z': .*guide that takes missing values.*nn\.Missing"):
            call()


def test_a_value_outside_its_column_is_refused_beside_gaps():
    pair, x = mixed_table_vae(), table_with_gaps()
    x[5] = torch.tensor([NAN, 2.0, 7.0, 1.0, NAN])
    with pytest.raises(DataError, match="found 7 at row 5"):
        log_marginal(pair.model, pair.guide, data.with_missing(x), num_particles=30, proposal="guide")


def test_values_go_through_a_file_and_are_marked_again(tmp_path):
    marked = data.with_missing(table_with_gaps(10))
    torch.save(marked.detach(), tmp_path / "x.pt")
    assert data.with_missing(torch.load(tmp_path / "x.pt", weights_only=True)).digest == marked.digest


def test_labels_beside_the_data_are_not_taken_for_them():
    """A semi-supervised pair: y is NaN where it is not known, and x, which is never missing, is observed."""

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Bernoulli(logits=z).mask(~y.isnan()), obs=y.nan_to_num())

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    x, y = torch.ones(40).double(), torch.full((40,), NAN).double()
    y[0] = 1.0
    est = log_marginal(model, guide, (x, data.with_missing(y)), num_particles=100, proposal="guide")
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(torch.tensor(1.0))
    assert est.reliable.all()
    assert (est.log_px[1:] - exact).abs().max() < 0.2
    with pytest.raises(DataError, match=r"data\[1\]: row 1 is nan"):
        log_marginal(model, guide, (x, y), num_particles=100, proposal="guide")


# The command line

PAIR = """
from ppvae import VAE, likelihoods, nn, posteriors, priors

COLUMNS = ["real", "count", ("categorical", 3), "binary", "real"]


def pair(train, latent: int = 2):
    decoder = nn.mlp(latent, likelihoods.table_outputs(COLUMNS), hidden=(8,))
    encoder = nn.Missing(nn.mlp(2 * len(COLUMNS), 2 * latent, hidden=(8,)))
    return VAE(
        priors.StandardNormal(latent), likelihoods.Mixed(decoder, COLUMNS), posteriors.DiagonalNormal(encoder)
    )
"""


@pytest.mark.slow
def test_the_command_line_takes_a_table_with_gaps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pair.py").write_text(PAIR)
    np.savez("table.npz", x=table_with_gaps(200).numpy())
    fitting = ["fit", "pair.py:pair", "--data", "table.npz", "--epochs", "2", "--name", "a"]
    assert main(fitting) != 0
    assert "--missing" in capsys.readouterr().err
    assert main([*fitting, "--missing"]) == 0
    assert main(["evaluate", "runs/a", "--num-particles", "100"]) == 0
    out = capsys.readouterr().out
    assert "of the values are missing" in out
    assert "(mixed)" in out
    assert main(["generate", "runs/a", "--count", "4"]) == 0
    assert main(["check", "pair.py:pair", "--data", "table.npz", "--missing"]) == 0
    assert main(["data", "table.npz", "--missing"]) == 0
    assert "NaN missing" in capsys.readouterr().out
    page = (tmp_path / "runs" / "a" / "report.html").read_text()
    assert "mixed" in page
    assert "of the values are missing" in page
    for picture in ("log_px", "reconstructions", "samples"):
        assert (tmp_path / "runs" / "a" / "pictures" / f"{picture}.png").exists(), picture


@pytest.mark.parametrize("proposal", ["guide", "refined"])
@pytest.mark.parametrize("kind", ["columns", "vectors first and second", "inner plate"])
def test_dims_are_the_observed_numbers_per_datum(kind, proposal):
    """Exactly, whichever column the gaps are in: 202 numbers of 101 data, of which 50 and 7 are missing."""

    def model(a, b):
        with pyro.plate("data", len(a)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            if kind == "inner plate":
                both = torch.stack([a, b])
                with pyro.plate("two", 2, dim=-2):
                    pyro.sample("x", dist.Normal(z, 1.0).mask(~both.isnan()), obs=both.nan_to_num())
                return
            for name, x in (("a", a), ("b", b)):
                pyro.sample(name, dist.Normal(z, 1.0).mask(~x.isnan()), obs=x.nan_to_num())

    def guide(a, b):
        with pyro.plate("data", len(a)):
            pyro.sample("z", dist.Normal(torch.zeros(len(a)), 0.7))

    a, b = torch.randn(101), torch.randn(101)
    b[:50], a[60:67] = torch.nan, torch.nan
    columns = {"a": a, "b": b} if kind == "columns" else (a, b)
    est = log_marginal(model, guide, data.with_missing(columns), num_particles=30, proposal=proposal)
    assert est.dims == pytest.approx((202 - 57) / 101)
    assert f"{100 * 57 / 202:.1f} % of the values are missing" in est.summary()


@pytest.mark.parametrize("kind", ["real", "whole numbers"])
@pytest.mark.parametrize("form", ["dict", "tuple"])
def test_gaps_of_a_vector_that_are_filled_without_a_mask_are_refused(kind, form):
    """Columns [N] after the first, too; with the mask that the message asks for, the pair is taken."""

    def pair(masked):
        def model(a, b):
            with pyro.plate("data", len(a)):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
                pyro.sample("a", dist.Normal(z, 1.0), obs=a)
                fn = dist.Normal(z, 1.0)
                pyro.sample("b", fn.mask(~b.isnan()) if masked else fn, obs=b.nan_to_num())

        def guide(a, b):
            with pyro.plate("data", len(a)):
                pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 0.7))

        return model, guide

    a, b = torch.randn(60), torch.randn(60)
    if kind == "whole numbers":
        a, b = (a > 0).float(), (b > 0).float()
    b[::3] = NAN
    columns = data.with_missing({"a": a, "b": b} if form == "dict" else (a, b))
    pair(True)[1](a, b)  # an evaluation creates no parameters
    for use in (check, lambda *args: fit(*args, epochs=1), lambda *args: log_marginal(*args, num_particles=30)):
        with pytest.raises(ContractError, match=r"site 'b': .* of them observed as the numbers that fill them"):
            use(*pair(False), columns)
        use(*pair(True), columns)


def test_labels_that_agree_with_the_data_are_no_gaps_of_them():
    """A binary column that is complete, and labels that equal it wherever they are known."""

    def model(a, y):
        with pyro.plate("data", len(a)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("a", dist.Bernoulli(logits=z), obs=a)

    def guide(a, y):
        with pyro.plate("data", len(a)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    a = (torch.randn(60) > 0).float()
    for gap in (3, 20):
        y = a.clone()
        y[gap:] = NAN
        est = log_marginal(model, guide, (a, data.with_missing(y)), num_particles=30, proposal="guide")
        assert est.dims == 1


@pytest.mark.parametrize("folded", [False, True])
def test_dims_are_the_numbers_that_a_mask_keeps(folded):
    """Exactly, without a missing value and in every particle layout: rows 0 to 59 have 3 of 4 numbers, others 1."""
    keep = torch.ones(101, 4, dtype=torch.bool)
    keep[:60, 3], keep[60:, 1:] = False, False

    def model(x, keep):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            if folded:
                z = z.view(len(x))  # no dim for particles
            pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 4), 1.0).mask(keep).to_event(1), obs=x)
            with poutine.mask(mask=False):
                pyro.sample("w", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x, keep):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 0.7))

    est = log_marginal(model, guide, (torch.randn(101, 4), keep), num_particles=30, proposal="guide")
    assert est.dims == pytest.approx((60 * 3 + 41) / 101)
    assert "of the values are masked" in est.summary()
