"""The inference gap and its parts against closed forms, and the laws that they keep on any pair."""

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from ppvae import VAE, likelihoods, log_marginal, posteriors, priors
from ppvae import nn as networks
from ppvae.errors import CheckpointError, ContractError, UsageError
from ppvae.evaluation.local.full_rank import JointNormalFamily
from ppvae.evaluation.local.gaps import Gaps, gaps
from ppvae.evaluation.local.guides import NetworkCopyGuide
from ppvae.evaluation.local.parameters import PerDatumDistribution, UnsupportedDistribution
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


def oracle(features=5, latent=2, scale=0.7, count=30, frozen=True):
    """A linear-Gaussian pair and data of its own."""
    torch.manual_seed(1)
    pair = LinearGaussian(features, latent, scale)
    with torch.no_grad():
        pair.loc.normal_()
    pair.requires_grad_(not frozen)
    noise = scale * torch.randn(count, features)
    return pair, (pair.loc + torch.randn(count, latent) @ pair.weight.T + noise).detach()


def registered(name):
    model, guide, batch = PAIRS[name]()
    for fn in (guide, model):
        poutine.trace(fn).get_trace(*batch)
    return model, guide, batch


def moved(pair, shift, stretch=1.0):
    """The mean-field guide with its mean moved by some of its own standard deviations, and its scale stretched."""

    def guide(x):
        pyro.module("moved", pair)
        exact = pair.posterior(x)
        scale = exact.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(exact.loc + shift * scale, stretch * scale).to_event(1))

    return guide


def to_posterior(pair, x, shift=0.0, stretch=1.0):
    """KL from the moved guide to p(z | x) in closed form, [N]."""
    exact = pair.posterior(x)
    scale = exact.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
    q = dist.MultivariateNormal(exact.loc + shift * scale, torch.diag_embed((stretch * scale) ** 2))
    return torch.distributions.kl_divergence(q, exact)


def off(values):
    """How many standard errors over the data the mean is from zero."""
    return float(values.mean().abs() / (values.std() / math.sqrt(len(values)) + 1e-9))


# -- closed forms -----------------------------------------------------------------------------------------------------


def test_an_exact_guide_has_no_gap():
    pair, x = oracle()
    found = gaps(pair.model, pair.guide, x, steps=20, num_particles=100, richer=None)
    for part in (found.inference, found.approximation, found.amortisation):
        assert part.abs().max() < 1e-9
    assert (found.log_px - pair.log_px(x)).abs().max() < 1e-6
    assert found.reliable.all()
    assert found.rounds == 1


def test_the_nearest_mean_field_guide_has_an_approximation_gap_alone():
    pair, x = oracle(latent=3)
    found = gaps(pair.model, pair.mean_field, x, log_px=pair.log_px(x), steps=100, num_particles=1000, richer=None)
    expected = to_posterior(pair, x)
    assert expected.min() > 0.02
    assert off(found.approximation - expected) < 4  # fails by chance once in 16,000
    assert (found.approximation - expected).abs().mean() < 0.02
    # the refit may end a little below the optimum where it started, but only by what its selection cannot see
    assert found.amortisation.abs().mean() < 0.005


@pytest.mark.parametrize(("shift", "stretch"), [(1.5, 1.0), (0.0, 2.5), (-2.0, 0.3)])
def test_a_planted_amortisation_gap_is_found(shift, stretch):
    pair, x = oracle(frozen=False)
    guide, log_px = moved(pair, shift, stretch), pair.log_px(x).detach()
    found = gaps(pair.model, guide, x, log_px=log_px, steps=100, num_particles=1000, richer=None)
    with torch.no_grad():
        best, planted = to_posterior(pair, x), to_posterior(pair, x, shift, stretch) - to_posterior(pair, x)
    assert planted.min() > 0.5
    assert off(found.amortisation - planted) < 4  # fails by chance once in 16,000
    assert float((found.amortisation - planted).abs().mean()) < 0.2
    assert abs(float((found.approximation - best).mean())) < 0.02
    assert (found.gained >= 0).all()


def test_the_planted_gap_of_a_guide_with_parameters_and_of_another_family():
    """A log-normal guide: learned arguments by pyro.param, a support that is not the line."""
    x = torch.linspace(0.5, 3.0, 40)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.LogNormal(z.log(), 0.5), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.3))
        scale = pyro.param("scale", torch.tensor(0.6), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(loc, scale))

    poutine.trace(guide).get_trace(x)
    exact = dist.Normal(x.log() / 0.25 / 5, math.sqrt(1 / 5) * torch.ones(40))
    planted = torch.distributions.kl_divergence(dist.Normal(0.3, 0.6).expand((40,)), exact)
    found = gaps(model, guide, x, steps=100, num_particles=1000)
    assert off(found.amortisation - planted) < 4
    assert (found.amortisation - planted).abs().max() < 0.3
    assert found.approximation.abs().mean() < 0.01
    assert found.reliable.all()


def test_a_full_covariance_closes_the_gap_of_a_mean_field_guide():
    pair, x = oracle(latent=3)
    found = gaps(pair.model, pair.mean_field, x, steps=100, num_particles=500)
    assert found.richer_elbo is not None
    assert (pair.log_px(x) - found.richer_elbo).abs().max() < 0.02
    assert (found.log_px - pair.log_px(x)).abs().max() < 0.02
    assert "any covariance" in found.richer


def test_arguments_that_do_not_depend_on_data_or_parameters_stay():
    """A fixed scale belongs to the family: its cost is an approximation gap."""
    pair, x = oracle(latent=1)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pair.posterior(x).loc, 2 * torch.ones(1)).to_event(1))

    found = gaps(pair.model, guide, x, log_px=pair.log_px(x), steps=50, num_particles=500, richer=None)
    exact = pair.posterior(x)
    kl = torch.distributions.kl_divergence(dist.MultivariateNormal(exact.loc, 4 * torch.eye(1)), exact)
    assert kl.min() > 1
    assert off(found.approximation - kl) < 4
    assert found.amortisation.abs().mean() < 0.01


# -- a copy of the network --------------------------------------------------------------------------------------------


def hierarchical(pair):
    """A stranger's guide in two steps, of which the second sees the first; exact where its shift is zero."""
    shift = nn.Parameter(torch.tensor([1.0, -0.5]))

    def guide(x):
        pyro.param("shift", shift)
        exact = pair.posterior(x)
        cov = exact.covariance_matrix
        with pyro.plate("data", len(x)):
            first = pyro.sample("a", dist.Normal(exact.loc[:, 0] + shift[0], cov[:, 0, 0].sqrt()))
            slope = cov[:, 0, 1] / cov[:, 0, 0]
            rest = (cov[:, 1, 1] - slope * cov[:, 0, 1]).sqrt()
            loc = exact.loc[:, 1] + slope * (first - exact.loc[:, 0]) + shift[1]
            pyro.sample("b", dist.Normal(loc, rest))

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            mean = torch.stack([a, b], -1) @ pair.weight.T + pair.loc
            pyro.sample("x", dist.Normal(mean, pair.log_scale.exp()).to_event(1), obs=x)

    return model, guide, shift


def test_a_hierarchical_guide_gets_a_copy_of_its_network_for_each_datum(monkeypatch):
    monkeypatch.setattr(NetworkCopyGuide, "learning_rate", 0.03)
    pair, x = oracle(count=2)
    model, guide, shift = hierarchical(pair)
    poutine.trace(guide).get_trace(x)
    version, before = shift._version, shift.detach().clone()
    found = gaps(model, guide, x, log_px=pair.log_px(x), steps=100, num_particles=500, richer=None)
    assert "copy of the guide's network" in found.refit
    assert "'b' depends on the latents drawn before it" in found.refit
    assert found.inference.min() > 0.5
    assert found.approximation.abs().max() < 0.02
    assert torch.equal(shift, before)
    assert shift._version == version
    assert shift.grad is None


def test_what_guide_and_model_share_is_not_refit():
    pair, x = oracle(count=2)
    model, guide, shift = hierarchical(pair)

    def sharing(x):
        pyro.param("shift", shift)
        model(x)

    poutine.trace(guide).get_trace(x)
    found = gaps(sharing, guide, x, log_px=pair.log_px(x), steps=20, rounds=2, num_particles=50, richer=None)
    assert found.amortisation.abs().max() == 0


def test_a_flow_gets_a_copy_of_its_network_and_a_diagonal_guide_does_not():
    x = (torch.rand(2, 6) < 0.5).double()
    likelihood = likelihoods.Bernoulli(networks.mlp(2, 6, hidden=(4,)))
    for posterior, copied in (
        (posteriors.IAF(networks.mlp(6, 4 + 3, hidden=(4,)), 2, features=3), True),
        (posteriors.DiagonalNormal(networks.mlp(6, 4, hidden=(4,))), False),
        (
            posteriors.SemiAmortized(networks.mlp(6, 4, hidden=(4,)), priors.StandardNormal(2), likelihood, steps=2),
            False,
        ),
    ):
        vae = VAE(priors.StandardNormal(2), likelihood, posterior.double()).double()
        found = gaps(vae.model, vae.guide, x, steps=10, rounds=1, num_particles=50)
        assert ("copy" in found.refit) == copied
        assert found.amortisation.min() > -0.05
    model, guide, batch = registered("flow")
    found = gaps(model, guide, batch, steps=2, rounds=1, num_particles=20, richer=None)
    assert "a transform with parameters" in found.refit


# -- laws on any pair -------------------------------------------------------------------------------------------------

REFUSED = {"shared_latent": "shared by all data", "discrete": "reparameterised"}


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_every_pair_of_strangers_keeps_the_laws(name):
    model, guide, batch = registered(name)
    store = dict(pyro.get_param_store().named_parameters())
    before = {n: (p.detach().clone(), p._version) for n, p in store.items()}
    if name in REFUSED:
        with pytest.raises(ContractError, match=REFUSED[name]):
            gaps(model, guide, batch)
        return
    found = gaps(model, guide, batch, steps=5, rounds=1, num_particles=100)
    assert len(found.elbo) == len(batch[0])
    assert (found.inference - found.approximation - found.amortisation).abs().max() < 1e-9
    assert found.amortisation.mean() > -0.05
    if "copy" not in found.refit:  # the same blocks, and so the same draws
        assert (
            found.elbo - log_marginal(model, guide, batch, num_particles=100, proposal="guide").elbo
        ).abs().max() < 1e-6
    assert all(torch.equal(p, before[n][0]) and p._version == before[n][1] for n, p in store.items())
    assert all(p.grad is None for p in store.values())


def test_blocks_and_an_interruption_do_not_change_the_result(tmp_path):
    pair, x = oracle(count=70)
    words = {"steps": 5, "rounds": 1, "num_particles": 50}
    whole = gaps(pair.model, pair.mean_field, x, **words)
    gaps(pair.model, pair.mean_field, x, directory=tmp_path, **words)
    (tmp_path / "block-00001.npz").unlink()
    again = gaps(pair.model, pair.mean_field, x, directory=tmp_path, **words)
    for name in ("log_px", "elbo", "best_elbo", "richer_elbo"):
        assert torch.equal(getattr(whole, name), getattr(again, name))
    with pytest.raises(UsageError, match="steps"):
        gaps(pair.model, pair.mean_field, x, directory=tmp_path, **(words | {"steps": 6}))


def test_results_are_written_and_read(tmp_path):
    pair, x = oracle(count=4)
    for richer in (None, JointNormalFamily):
        found = gaps(pair.model, pair.mean_field, x, steps=2, rounds=1, num_particles=30, richer=richer)
        again = Gaps.load(found.save(tmp_path))
        for field in dataclasses.fields(Gaps):
            a, b = getattr(found, field.name), getattr(again, field.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
    (tmp_path / "gaps.npz").unlink()
    with pytest.raises(CheckpointError, match="not a saved Gaps"):
        Gaps.load(tmp_path / "gaps.json")


def test_the_words_say_what_the_numbers_do_not():
    pair, x = oracle(count=5)
    found = gaps(pair.model, pair.mean_field, x, steps=2, rounds=1, num_particles=20)
    assert "5 of 5 data is unreliable" in found.summary()  # 20 particles are too few to judge
    assert "lower bound" in found.summary()
    assert set(found.table()) >= {"inference gap", "approximation gap", "amortisation gap", "log p(x)", "refit"}
    assert "±" in found.table()["amortisation gap"]


def test_bad_arguments():
    pair, x = oracle(count=4)
    with pytest.raises(UsageError, match="steps: expected at least 1"):
        gaps(pair.model, pair.guide, x, steps=0)
    with pytest.raises(UsageError, match="one for each of 4 data"):
        gaps(pair.model, pair.guide, x, log_px=torch.zeros(3))
    with pytest.raises(UsageError, match="of others"):
        gaps(
            pair.model,
            pair.guide,
            x,
            log_px=log_marginal(pair.model, pair.guide, x + 1, num_particles=30, proposal="guide"),
        )


# -- per-datum distributions ------------------------------------------------------------------------------------------

SHAPE = (4, 3)
LOWER = 0.3 * torch.ones(3, 3, dtype=torch.float64).tril(-1)
DISTRIBUTIONS = {
    "scalar": lambda v: dist.Normal(v[:, 0], v[:, 1].exp()),
    "event": lambda v: dist.Normal(v, v.exp()).to_event(1),
    "masked": lambda v: dist.Normal(v, 1.0).mask(torch.arange(4)[:, None] > 1).to_event(1),
    "log_normal": lambda v: dist.LogNormal(v, v.exp()).to_event(1),
    "gamma": lambda v: dist.Gamma(v.exp(), 2 * v.exp()).to_event(1),
    "beta": lambda v: dist.Beta(v.exp(), 1 + v.exp()).to_event(1),
    "dirichlet": lambda v: dist.Dirichlet(v.exp()),
    "student": lambda v: dist.StudentT(4.0, v, v.exp()).to_event(1),
    "full": lambda v: dist.MultivariateNormal(
        v, scale_tril=torch.diag_embed(v.exp()) + 0.3 * torch.ones(3, 3).tril(-1)
    ),
    "precision": lambda v: dist.MultivariateNormal(v, precision_matrix=torch.diag_embed(v.exp()) + 0.1),
    "low_rank": lambda v: dist.LowRankMultivariateNormal(v, v.unsqueeze(-1), v.exp()),
    "bernoulli": lambda v: dist.Bernoulli(logits=v).to_event(1),
    "categorical": lambda v: dist.Categorical(logits=v),
    "relaxed": lambda v: dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), logits=v).to_event(1),
    "expanded": lambda v: dist.Normal(v[:1], 1.0).expand(SHAPE).to_event(1),
    "pushed": lambda v: dist.TransformedDistribution(
        dist.Normal(v, 1.0).to_event(1), [torch.distributions.transforms.ExpTransform()]
    ),
}


@pytest.mark.parametrize("name", sorted(DISTRIBUTIONS))
def test_a_per_datum_distribution_starts_equal_and_moves_datum_by_datum(name):
    torch.manual_seed(3)
    fn = DISTRIBUTIONS[name](torch.randn(*SHAPE).requires_grad_())
    site = PerDatumDistribution(fn)
    value = fn.sample()
    assert torch.allclose(fn.log_prob(value), site().log_prob(value))
    assert site.params
    folded = site(2).log_prob(torch.cat([value, value]))
    assert torch.allclose(folded, torch.cat([fn.log_prob(value)] * 2))
    with torch.no_grad():
        for param in site.params:
            param[(1, *(0,) * (param.dim() - 1))] += 0.3
    inside = site().log_prob(value)
    changed = (inside - fn.log_prob(value)).abs().reshape(4, -1).amax(1) > 1e-6
    assert changed.tolist() == [False, name != "masked", False, False]


def test_constants_stay_and_unsupported_distributions_are_named():
    v = torch.randn(*SHAPE).requires_grad_()
    assert len(PerDatumDistribution(dist.StudentT(4.0, v, v.exp())).params) == 2
    assert len(PerDatumDistribution(dist.Normal(torch.zeros(SHAPE), torch.ones(SHAPE))).params) == 0
    assert (
        len(PerDatumDistribution(dist.Normal(torch.randn(SHAPE), torch.ones(SHAPE))).params) == 1
    )  # differs between data
    step = dist.transforms.affine_autoregressive(3, hidden_dims=[4])
    for fn, why in (
        (dist.TransformedDistribution(dist.Normal(v, 1.0).to_event(1), [step]), "with parameters"),
        (dist.StudentT(math.inf + 0 * v, v, 1.0), "edge"),
    ):
        with pytest.raises(UnsupportedDistribution, match=why):
            PerDatumDistribution(fn)
