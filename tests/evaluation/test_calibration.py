"""Simulation-based calibration: the test's exact probability, and guides that are right or wrong by a known amount."""

import dataclasses
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam

from ppvae.errors import ContractError, UsageError
from ppvae.evaluation import bdmc
from ppvae.evaluation.calibration import (
    Calibration,
    band,
    bounds,
    calibration,
    escape_probability,
    p_value,
    pointwise_p_values,
)
from ppvae.inference import inspect
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


def oracle():
    torch.manual_seed(1)
    return LinearGaussian(4, 3, 0.8).requires_grad_(False)


def changed(pair, shift=0.0, stretch=1.0, dim=1):
    """The exact guide with one dim moved by so many standard deviations, or stretched about its mean."""

    def guide(x):
        exact = pair.posterior(x)
        one = torch.eye(3)[dim]
        scale = exact.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
        matrix = torch.diag(1 + (stretch - 1) * one)
        loc = exact.loc + shift * scale * one
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=matrix @ exact.scale_tril))

    return guide


# -- the test ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "bins"), [(4, 3), (5, 4), (7, 2)])
def test_the_probability_of_leaving_the_band_is_exact(count, bins):
    """Against every outcome there is."""
    table = pointwise_p_values(count, bins)
    outcomes = torch.tensor(list(itertools.product(range(bins), repeat=count)))
    counts = torch.stack([torch.bincount(o, minlength=bins).cumsum(0)[:-1] for o in outcomes])
    smallest = torch.stack([table[torch.arange(bins - 1), c].min() for c in counts])
    for level in smallest.unique().tolist():
        expected = float((smallest <= level).double().mean())
        assert escape_probability(level, count, bins, table) == pytest.approx(expected, abs=1e-12)
    row = outcomes[len(outcomes) // 3]
    at = float((smallest <= smallest[len(outcomes) // 3]).double().mean())
    assert p_value(row, bins, table) == pytest.approx(at, abs=1e-12)


def test_the_probability_is_exact_in_single_precision_too():
    """The computation must not follow torch's default type."""
    torch.set_default_dtype(torch.float32)
    assert pointwise_p_values(20, 10).dtype == torch.float64
    assert 0.0 < escape_probability(1e-8, 500, 50, pointwise_p_values(500, 50)) < 1e-6
    assert 0.0 < p_value(torch.zeros(500), 50, pointwise_p_values(500, 50)) < 1e-9


def test_pointwise_p_values_are_binomial():
    table = pointwise_p_values(10, 4)
    mass = torch.tensor([math.comb(10, c) * 0.5**10 for c in range(11)])
    expected = (2 * torch.minimum(mass.cumsum(0), mass.flip(0).cumsum(0).flip(0))).clamp(max=1)
    assert torch.allclose(table[1], expected)


def test_p_values_of_uniform_ranks_are_as_small_as_they_should_be():
    """P(p <= a) <= a, and nearly a; each line fails by chance once in 30,000."""
    table = pointwise_p_values(300, 20)
    ranks = torch.randint(20, (500, 300))
    found = torch.tensor([p_value(r, 20, table) for r in ranks])
    for a in (0.05, 0.2, 0.5):
        share = float((found <= a).double().mean())
        assert share < a + 4 * math.sqrt(a * (1 - a) / 500)
        assert share > 0.8 * a - 4 * math.sqrt(a * (1 - a) / 500)


def test_the_band_leaves_out_what_fails():
    table = pointwise_p_values(500, 30)
    low, high = band(0.05, 500, 30, table)
    inside, outside = 0, 0
    for r in torch.randint(30, (300, 500)):
        counts = torch.bincount(r, minlength=30).cumsum(0)[:-1]
        left = bool(((counts < low) | (counts > high)).any())
        assert left == (p_value(r, 30, table) <= 0.05)
        inside, outside = inside + (not left), outside + left
    assert inside > 10 * outside > 0
    level = 1e-3
    a, b = bounds(level, table)
    edges = torch.arange(29)
    assert (table[edges, a] > level).all()
    assert (table[edges, a - 1] <= level).all()
    assert (table[edges, b + 1] <= level).all()


# -- guides that are known --------------------------------------------------------------------------------------------


def test_an_exact_guide_passes_and_a_shift_of_a_fifth_of_a_standard_deviation_fails():
    """The first fails by chance once in 10,000; the second passes much more rarely."""
    pair, x = oracle(), torch.randn(100, 4)
    words = {"replications": 2000, "alpha": 1e-4}
    right = calibration(pair.model, pair.guide, x, **words)
    assert right.passed
    assert right.level == pytest.approx(1e-4 / 3)
    assert right.ranks["z"].shape == (2000, 3)
    for shift in (0.2, -0.2):
        wrong = calibration(pair.model, changed(pair, shift), x, **words)
        assert not wrong.passed
        assert (wrong.p_values["z"] < wrong.level).tolist() == [False, True, False]
        assert wrong.verdict("z", 1) == ("too high" if shift > 0 else "too low")
        assert wrong.verdict("z", 0) == "uniform"
        assert f"draws are {wrong.verdict('z', 1)}" in wrong.table()["z"]


@pytest.mark.parametrize(("stretch", "words"), [(0.7, "too narrow"), (1.4, "too wide")])
def test_a_wrong_spread_is_named(stretch, words):
    pair, x = oracle(), torch.randn(50, 4)
    found = calibration(pair.model, changed(pair, stretch=stretch), x, replications=1000, alpha=1e-3)
    assert not found.passed
    assert found.verdict("z", 1) == words


def test_discrete_latents_have_random_ranks_among_their_ties():
    """A guide that is the exact posterior of a binary and a categorical latent."""
    table = torch.tensor([[-1.0, 0.5, 2.0], [0.0, 1.0, -2.0]])
    prior = torch.tensor([0.2, 0.5, 0.3])

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.3)))
            b = pyro.sample("b", dist.Categorical(prior))
            pyro.sample("x", dist.Normal(table[a.long(), b], 0.7), obs=x)

    def guide_of(tilt):
        def guide(x):
            log_prior = torch.tensor([0.7, 0.3]).log()[:, None] + prior.log()
            joint = log_prior + dist.Normal(table, 0.7).log_prob(x[:, None, None])
            joint = joint + tilt * torch.tensor([0.0, 1.0])[:, None]
            with pyro.plate("data", len(x)):
                a = pyro.sample("a", dist.Bernoulli(logits=joint[:, 1].logsumexp(-1) - joint[:, 0].logsumexp(-1)))
                rows = torch.arange(len(x)).expand(a.shape)
                pyro.sample("b", dist.Categorical(logits=joint[rows, a.long()]))

        return guide

    words = {"replications": 1500, "alpha": 1e-4, "num_draws": 19}
    assert calibration(model, guide_of(0.0), torch.zeros(50), **words).passed
    wrong = calibration(model, guide_of(0.8), torch.zeros(50), **words)
    assert wrong.p_values["a"][0] < wrong.level
    assert wrong.verdict("a", 0) == "too high"


def test_a_guide_that_returns_the_prior_passes_as_is_said():
    pair, x = oracle(), torch.zeros(20, 4)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    assert calibration(pair.model, guide, x, replications=300, alpha=1e-4).passed


# -- any pair ---------------------------------------------------------------------------------------------------------

REFUSED = dict.fromkeys(("masked", "obs_mask"), "numbers of the batch") | {
    "shared_latent": "shared by all data",
    "enumerated_vector": "one at least, to rank",
}


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_every_pair_of_strangers_has_ranks(name):
    model, guide, batch = registered(name)
    words = {"replications": 25, "num_draws": 9}
    if name in REFUSED:
        with pytest.raises(ContractError, match=REFUSED[name]):
            calibration(model, guide, batch, **words)
        return
    found = calibration(model, guide, batch, **words)
    assert all(len(r) == 25 and int(r.min()) >= 0 and int(r.max()) <= 9 for r in found.ranks.values())
    again = calibration(model, guide, batch, **words)
    assert all(torch.equal(found.ranks[n], again.ranks[n]) for n in found.ranks)


def test_a_latent_that_a_mask_hides_has_no_ranks():
    def model(x, there):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=there):
                pyro.sample("extra", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, there):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))
            with poutine.mask(mask=there):
                pyro.sample("extra", dist.Normal(3.0, 1.0))

    found = calibration(model, guide, (torch.randn(50), torch.arange(50) % 2 == 0), replications=200, alpha=1e-4)
    assert found.passed
    assert list(found.ranks) == ["z"]
    assert "extra" in found.table()["note 1"]


def test_sites_that_observe_a_part_of_the_batch_are_put_in_place():
    """Three observed sites, each a column of one tensor, as if they were assembled by hand; the guide is exact."""

    def model(x):
        with pyro.plate("data", len(x)):
            for i in range(3):
                z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
                pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[:, i])

    def guide(x):
        with pyro.plate("data", len(x)):
            for i in range(3):
                pyro.sample(f"z{i}", dist.Normal(x[:, i] / 2, math.sqrt(0.5)))

    x, words = torch.randn(10, 3), {"replications": 300, "alpha": 1e-4}
    found = calibration(model, guide, x, **words)
    by_hand = calibration(
        model, guide, x, assemble=lambda seen, batch: (torch.stack([seen[f"x{i}"] for i in range(3)], -1),), **words
    )
    assert all(torch.equal(found.ranks[n], by_hand.ranks[n]) for n in by_hand.ranks)
    assert found.passed
    assert sorted(found.ranks) == ["z0", "z1", "z2"]


def test_a_reparameterised_latent_is_no_observation():
    """`poutine.reparam` leaves an observed site in its place, a function of the latents, which no data stand for."""
    x = 1.5 * torch.randn(40, 1, generator=torch.Generator().manual_seed(0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.full((1,), 0.5), 2.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):  # exact: z = 0.5 + 2 z_decentered
        with pyro.plate("data", len(x)):
            pyro.sample("z_decentered", dist.Normal(0.4 * (x - 0.5), 0.2**0.5).to_event(1))

    model = poutine.reparam(model, {"z": LocScaleReparam(0.0)})
    assert inspect(model, guide, x).observed_dims == 1
    assert float(calibration(model, guide, x, replications=300, progress=False).p_values["z_decentered"]) > 0.01
    found = bdmc(model, guide, x[:4], num_temperatures=5, progress=False)
    assert (found.upper - found.lower).abs().max() < 1e-5


def test_results_are_written_and_read(tmp_path):
    pair = oracle()
    found = calibration(pair.model, pair.guide, torch.zeros(10, 4), replications=50, num_draws=9)
    again = Calibration.load(found.save(tmp_path))
    assert torch.equal(found.ranks["z"], again.ranks["z"])
    assert torch.equal(found.p_values["z"], again.p_values["z"])
    plain = [f.name for f in dataclasses.fields(Calibration) if f.name not in ("ranks", "p_values")]
    assert all(getattr(found, name) == getattr(again, name) for name in plain)


def test_bad_arguments():
    pair, x = oracle(), torch.zeros(10, 4)
    with pytest.raises(UsageError, match="replications: expected at least 20"):
        calibration(pair.model, pair.guide, x, replications=1)
    with pytest.raises(UsageError, match="alpha"):
        calibration(pair.model, pair.guide, x, alpha=1.0)
