"""Rate, distortion, active units and ELBO surgery against closed forms of the linear-Gaussian pair, and as sums."""

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from ppvae import VAE, likelihoods, log_marginal, posteriors, priors
from ppvae import nn as networks
from ppvae.errors import CheckpointError, ContractError, UsageError
from ppvae.evaluation.aggregate_posterior import split_rate
from ppvae.evaluation.block_cache import concatenate
from ppvae.evaluation.blocks import Block, inspect_columns
from ppvae.evaluation.local.gaps import Gaps
from ppvae.evaluation.representation import LatentStatistics, Representation, representation
from ppvae.inference import terms
from ppvae.inference.evaluation_mode import evaluation_mode
from ppvae.models import LinearGaussian
from tests.programs.strangers import PAIRS


@pytest.fixture(autouse=True)
def clean():
    """float64 and an empty param store, and both as they were afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(before)


def registered(name):
    model, guide, batch = PAIRS[name]()
    for fn in (guide, model):
        poutine.trace(fn).get_trace(*batch)
    return model, guide, batch


def oracle(count, features=4, latent=2, scale=1.5, unused=0):
    """A linear-Gaussian pair with frozen parameters, and data of its own; `unused` latents do not reach x."""
    torch.manual_seed(1)
    pair = LinearGaussian(features, latent, scale).requires_grad_(False)
    pair.weight[:, latent - unused :] = 0.0
    return pair, torch.randn(count, latent) @ pair.weight.T + scale * torch.randn(count, features)


def of_population(pair, shift=0.0):
    """Closed forms for the mean-field guide moved by `shift`, x from the model: (rate, information, marginal KL)."""
    exact = pair.posterior(torch.eye(len(pair.loc)) + pair.loc)
    gain = exact.loc.T  # E[z | x] = gain @ (x - loc)
    scale = exact.precision_matrix[0].diagonal().rsqrt()
    of_x = pair.weight @ pair.weight.T + (2 * pair.log_scale).exp() * torch.eye(len(pair.loc))
    of_means = gain @ of_x @ gain.T
    aggregate = of_means + torch.diag(scale**2)
    information = (torch.logdet(aggregate) - 2 * scale.log().sum()) / 2
    q = dist.MultivariateNormal(shift * torch.ones(len(scale)), aggregate)
    marginal = torch.distributions.kl_divergence(
        q, dist.MultivariateNormal(torch.zeros(len(scale)), torch.eye(len(scale)))
    )
    per_dim = (of_means.diagonal() + shift**2 + scale**2 - 1) / 2 - scale.log()
    return per_dim, information, marginal, of_means.diagonal()


def moved(pair, shift):
    def guide(x):
        exact = pair.posterior(x)
        scale = exact.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(exact.loc + shift, scale).to_event(1))

    return guide


def error(values):
    return float(values.std() / math.sqrt(len(values)))


# -- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_rate_information_and_marginal_kl_of_the_linear_gaussian(shift):
    pair, x = oracle(1500)
    found = representation(pair.model, moved(pair, shift), x, num_particles=20)
    per_dim, information, marginal, of_means = of_population(pair, shift)
    # each fails by chance once in 16,000
    assert abs(float(found.rate.mean() - per_dim.sum())) < 4 * error(found.rate)
    assert ((found.kl["z"] - per_dim).abs() < 4 * found.kl_error["z"]).all()
    assert (found.variance["z"] / of_means - 1).abs().max() < 4 * math.sqrt(2 / 1500)
    low, high = found.information_lower, found.information_upper
    slack = 4 * error(low)
    assert low.mean() - slack < information < high.mean() + slack
    assert high.mean() - low.mean() < 0.05
    slack = 4 * error(found.marginal_kl_lower)
    assert found.marginal_kl_lower.mean() - slack < marginal < found.marginal_kl_upper.mean() + slack
    assert marginal > 0.2 * (shift > 0)


def test_the_bias_of_few_data_has_the_direction_that_is_said():
    """Over many small data sets: the lower estimate is below, the upper one above, and the truth between."""
    pair, x = oracle(30 * 12, scale=0.5)
    found = [
        representation(pair.model, moved(pair, 0.0), part, num_particles=10, surgery_draws=10) for part in x.split(12)
    ]
    low = torch.stack([f.information_lower.mean() for f in found])
    high = torch.stack([f.information_upper.mean() for f in found])
    _, information, _, _ = of_population(pair)
    assert low.mean() + 4 * error(low) < information < high.mean() - 4 * error(high)
    assert all(f.information_lower.mean() < math.log(12) for f in found)


def test_distortion_and_elbo():
    pair, x = oracle(60)
    found = representation(pair.model, pair.guide, x, num_particles=50, surgery_draws=0)
    assert (found.elbo - pair.log_px(x)).abs().max() < 1e-9  # its weights are all equal
    exact = pair.posterior(x)
    trace = (pair.weight @ exact.covariance_matrix @ pair.weight.T).diagonal(dim1=-2, dim2=-1).sum(-1)
    squares = ((x - exact.loc @ pair.weight.T - pair.loc) ** 2).sum(-1) + trace
    variance = (2 * pair.log_scale).exp()
    expected = squares / (2 * variance) + 4 / 2 * (2 * math.pi * variance).log()
    assert (found.distortion - expected).mean().abs() < 4 * error(found.distortion - expected)
    assert found.information_lower is None
    assert "mutual information" not in found.table()
    with pytest.raises(UsageError, match="surgery_draws"):
        _ = found.information


def test_unused_dims_are_inactive_and_cost_nothing():
    pair, x = oracle(400, latent=4, unused=2)
    found = representation(pair.model, pair.mean_field, x, num_particles=200)
    assert found.active("z").tolist() == [True, True, False, False]
    assert found.variance["z"][2:].abs().max() < 2e-3  # without its correction it would be 1 / 200
    assert found.kl["z"][2:].abs().max() < 1e-9
    assert "2 of 4" in found.table()["active units of z"]


def test_a_guide_that_ignores_the_data_carries_no_information():
    pair, x = oracle(100)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.full((2,), 0.5), 0.8).to_event(1))

    found = representation(pair.model, guide, x, num_particles=20)
    assert found.information_lower.abs().max() < 1e-9
    assert found.information_upper.abs().max() < 1e-9
    kl = torch.distributions.kl_divergence(dist.Normal(0.5, 0.8), dist.Normal(0.0, 1.0))
    assert ((found.kl["z"] - kl).abs() < 4 * found.kl_error["z"]).all()


def test_a_code_that_tells_all_data_apart_carries_log_n():
    x = 100.0 * torch.arange(64.0)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1000.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    found = representation(model, guide, x)
    assert (found.information_lower - math.log(64)).abs().max() < 1e-9
    assert found.information_upper.min() > 1000  # nothing is known about how much more it could carry
    assert torch.equal(found.information[1], found.surgery_rate)  # but that it is no more than the rate
    assert "between 0 and" in found.table()["marginal KL"]


# -- laws on any pair -------------------------------------------------------------------------------------------------

REFUSED = {
    "shared_latent": "shared by all data", "enumerated_model": "enumerated", "enumerated_vector": "enumerated",
    "markov": "enumerated", "semi_supervised": "enumerated", "enumerated_both": "enumerated",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_every_pair_of_strangers_keeps_the_laws(name):
    model, guide, batch = registered(name)
    if name in REFUSED:
        with pytest.raises(ContractError, match=REFUSED[name]):
            representation(model, guide, batch)
        return
    found = representation(model, guide, batch, num_particles=40, surgery_draws=3)
    count = len(batch[0])
    assert found.rate.shape == found.distortion.shape == (count,)
    # the parts of the rate add up to it, over sites and dims and by surgery
    latents = torch.stack([v.sum() for v in found.kl.values()]).sum()
    if name != "auto_normal" and name != "auxiliary":  # there the helper's density is no latent's
        assert latents == pytest.approx(float(found.rate.mean()), abs=1e-6)
    assert torch.allclose(found.information_lower + found.marginal_kl_upper, found.surgery_rate)
    assert torch.allclose(found.information_upper + found.marginal_kl_lower, found.surgery_rate)
    assert found.information_lower.mean() <= math.log(count) + 1e-9
    elbo = log_marginal(model, guide, batch, num_particles=2000, proposal="guide").elbo
    noise = 6 * (found.elbo - elbo).abs().mean() / math.sqrt(count) + 0.5
    assert (found.elbo - elbo).mean().abs() < noise


@pytest.mark.parametrize(
    "name",
    [
        "modules",
        "hierarchical",
        "discrete",
        "supports",
        "flow",
        "indexes",
        "rnn",
        "inner_plate",
        "masked",
        "auto_normal",
    ],
)
def test_the_aggregate_posterior_is_the_mean_of_the_guides(name):
    """Against the density of the guide at every draw under every datum, one draw at a time, by `terms`."""
    model, guide, batch = registered(name)
    count = len(batch[0])
    with torch.no_grad(), evaluation_mode(model, guide):
        s, size = inspect_columns(model, guide, batch, torch.device("cpu"))
        starts = enumerate(range(0, count, size))
        blocks = [Block(batch, a, min(a + size, count), i, s, torch.device("cpu")) for i, a in starts]
        parts = []
        for block in blocks:
            statistics = LatentStatistics(s, block.size, 1)
            statistics.add(terms(model, guide, block.batch, 1, structure=s, index=block.index))
            parts.append(statistics.result())
        joined = concatenate(parts)
        latents = {n.removeprefix("draws/"): v.transpose(0, 1) for n, v in joined.items() if n.startswith("draws/")}
        log_q, log_p = joined["log_q"].T, joined["log_p"].T
        table = torch.zeros(count, count)  # [draw, datum]
        for block in blocks:
            rows = s.subsample_size if s.draws_subsample else block.size
            for n in range(count):
                values = {}
                for site, v in latents.items():
                    data = v[:, n].dim() - s.event_dims[site]
                    values[site] = torch.stack([v[:, n]] * rows, data)
                t = terms(model, guide, block.batch, 1, structure=s, index=block.index, values=values)
                table[n, block.start : block.start + block.size] = t.log_guide[0, : block.size]
        (rate, lower, upper), why = split_rate(guide, latents, log_q, log_p, blocks, s)
    assert why == ""
    assert torch.allclose(table.diagonal(), log_q[0])
    assert torch.allclose(rate, log_q[0] - log_p[0])
    assert torch.allclose(lower, log_q[0] - table.logsumexp(1) + math.log(count))
    without = table.masked_fill(torch.eye(count, dtype=torch.bool), -torch.inf).logsumexp(1)
    assert torch.allclose(upper, log_q[0] - without + math.log(count - 1))


def test_the_surgery_of_several_blocks_is_that_of_one_formula():
    pair, x = oracle(130)
    whole = representation(pair.model, pair.mean_field, x, num_particles=4, surgery_draws=2)
    q = pair.posterior(x)
    scale = q.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
    assert whole.rate.shape == (130,)
    # the aggregate at the draws themselves, by a formula of its own
    normal = dist.Normal(q.loc, scale).to_event(1)
    torch.manual_seed(4)
    z = normal.sample((200,))
    table = normal.log_prob(z.unsqueeze(-2))  # [200, 130 draws, 130 guides]
    lower = (normal.log_prob(z) - table.logsumexp(-1) + math.log(130)).mean(0)
    assert (lower - whole.information_lower).mean().abs() < 4 * error(lower - whole.information_lower)
    table[:, torch.arange(130), torch.arange(130)] = -torch.inf
    upper = (normal.log_prob(z) - table.logsumexp(-1) + math.log(129)).mean(0)
    assert (upper - whole.information_upper).mean().abs() < 4 * error(upper - whole.information_upper)


def test_a_prior_that_does_not_factorise_has_one_kl():
    x = (torch.rand(20, 6) < 0.5).double()
    vae = VAE(
        priors.MixtureOfNormals(2, 3), likelihoods.Bernoulli(networks.mlp(2, 6)),
        posteriors.DiagonalNormal(networks.mlp(6, 4)),
    ).double()  # fmt: skip
    found = representation(vae.model, vae.guide, x, num_particles=10)
    assert found.kl["z"].shape == (1,)
    assert float(found.kl["z"]) == pytest.approx(float(found.rate.mean()), abs=1e-9)
    assert "KL of the whole latent: z" in found.table()["note 1"]
    assert found.variance["z"].shape == (2,)


def test_results_are_written_and_read(tmp_path):
    pair, x = oracle(8)
    for draws in (0, 1):
        found = representation(pair.model, pair.guide, x, num_particles=4, surgery_draws=draws)
        again = Representation.load(found.save(tmp_path))
        for field in dataclasses.fields(Representation):
            a, b = getattr(found, field.name), getattr(again, field.name)
            if isinstance(a, dict):
                assert a.keys() == b.keys()
                assert all(torch.equal(a[n], b[n]) for n in a)
            else:
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
    with pytest.raises(CheckpointError, match="kind"):
        Gaps.load(tmp_path / "representation.json")


def test_bad_arguments():
    pair, x = oracle(4)
    with pytest.raises(UsageError, match="num_particles: expected at least 2"):
        representation(pair.model, pair.guide, x, num_particles=1)
    with pytest.raises(UsageError, match="surgery_draws"):
        representation(pair.model, pair.guide, x, num_particles=2, surgery_draws=3)
    one = representation(pair.model, pair.guide, x[:1])
    assert one.information_lower is None
    assert "two data" in " ".join(one.notes)
