"""Brackets on simulated data: they contain the truth, see lost modes, and name what closes them."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppvae import plots
from ppvae.errors import ContractError, UsageError
from ppvae.evaluation import ProposalBracket, bracket, load_estimate, refined_log_marginal
from ppvae.evaluation.evidence.two_sided import Z_LIMITS
from ppvae.models import LinearGaussian
from tests.evaluation.evidence.pairs import both_modes_guide, one_mode_guide, two_modes, two_modes_log_px

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def pair():
    return LinearGaussian(6, 3).double().requires_grad_(False)


@pytest.mark.parametrize(("proposal", "runs", "size"), [("guide", 200, 5), ("refined", 200, 5)])
def test_the_bracket_contains_the_truth(pair, proposal, runs, size):
    """200 runs, each of data and noise of its own: the mean log p(x) lies between `low` and `high` in 198 or more.

    With limits at three standard errors a run fails with probability 0.27 % at most, three or more of 200 with 2 %.
    """
    found = bracket(
        pair.model, pair.mean_field, torch.zeros(7, 6), num_data=runs * size, num_particles=200, proposal=proposal
    )
    exact = pair.log_px(found.data[0]).reshape(runs, size).mean(1)

    def limit(bound, error):
        return bound.reshape(runs, size).mean(1), error.square().reshape(runs, size).sum(1).sqrt() / size

    low, low_error = limit(found.lower, found.lower_std_error)
    high, high_error = limit(found.upper, found.upper_std_error)
    inside = (low - Z_LIMITS * low_error <= exact + 1e-9) & (exact <= high + Z_LIMITS * high_error + 1e-9)
    assert int(inside.sum()) >= 198
    assert found.low <= float(exact.mean()) <= found.high
    assert found.sufficient
    assert found.width < 0.05
    assert not found.further
    if proposal == "guide":  # two standard errors
        assert found.width > 2 * found.width_std_error > 0


def test_a_mode_that_the_guide_misses_is_seen_and_what_closes_it_is_named(tmp_path):
    """Half of the posterior is where no draw comes from; ess and k_hat of the draws show nothing."""
    found = bracket(two_modes, one_mode_guide, torch.ones(5), num_data=40, num_particles=500, directory=tmp_path / "b")
    exact = two_modes_log_px(found.data[0])
    assert not found.sufficient
    assert found.width > 10
    assert 8 <= found.missed <= 32
    assert found.low < float(exact.mean()) < found.high
    # data away from zero, where the modes are apart: the draws see one of the two, log 2 too low
    apart = found.data[0] > 1.5
    assert float((exact - found.lower)[apart].median()) == pytest.approx(math.log(2), abs=0.05)
    assert list(found.further) == ["annealed", "prior"]
    assert "annealing from the prior" in found.remedy
    assert "misses modes" in found.verdict
    assert f"of {len(found.lower)} data outweighs" in found.summary()
    again = bracket(two_modes, one_mode_guide, torch.ones(5), num_data=40, num_particles=500, directory=tmp_path / "b")
    assert torch.equal(found.gap, again.gap)
    loaded = ProposalBracket.load(found.save(tmp_path))
    assert loaded.verdict == found.verdict
    assert loaded.table() == found.table()
    assert plots.bracket(found).axes


def test_a_guide_that_knows_both_modes_is_not_flagged():
    found = bracket(two_modes, both_modes_guide, torch.ones(5), num_data=60, num_particles=500)
    assert found.sufficient
    assert abs(float((found.lower - two_modes_log_px(found.data[0])).mean())) < 0.02


def test_the_next_rung_is_the_one_that_closes():
    """A prior as guide is wide at K = 10, and the refined proposal closes it."""
    pair = LinearGaussian(20, 3).double().requires_grad_(False)

    def prior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    found = bracket(pair.model, prior, torch.zeros(5, 20), num_data=20, num_particles=10, proposal="guide")
    assert not found.sufficient
    assert found.remedy == "a refined proposal"
    assert list(found.further) == ["refined"]
    assert found.remedy in found.verdict
    alone = bracket(
        pair.model, prior, torch.zeros(5, 20), num_data=20, num_particles=10, proposal="guide", further=False
    )
    assert torch.equal(alone.gap, found.gap)
    assert not alone.further


def test_rows_and_the_number_of_data_change_nothing(pair):
    x = torch.zeros(3, 6)
    once = bracket(pair.model, pair.mean_field, x, num_data=60, num_particles=150)
    again = bracket(pair.model, pair.mean_field, x, num_data=60, num_particles=150, rows=70)
    torch.testing.assert_close(once.gap, again.gap, rtol=0, atol=1e-9)
    fewer = bracket(pair.model, pair.mean_field, x, num_data=50, num_particles=150)
    torch.testing.assert_close(once.gap[:50], fewer.gap, rtol=0, atol=1e-12)


def test_discrete_latents_are_bracketed_by_the_guide_and_a_note_says_so():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.2, 0.8])))
            pyro.sample("x", dist.Normal(3.0 * c, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(torch.tensor([0.5, 0.5])))

    found = bracket(model, guide, torch.zeros(4), num_data=200, num_particles=400)
    x = found.data[0]
    exact = torch.stack(
        [math.log(0.2) + dist.Normal(0.0, 1.0).log_prob(x), math.log(0.8) + dist.Normal(3.0, 1.0).log_prob(x)]
    )
    assert found.low <= float(exact.logsumexp(0).mean()) <= found.high
    assert found.proposal == "guide"
    assert "site 'c'" in found.summary()


def test_enumerated_and_masked_latents_are_bracketed():
    keep = torch.tensor([True, False])
    locs = torch.tensor([-2.0, 0.0, 3.0])

    def model(x):
        with pyro.plate("data", len(x)):
            on = keep.repeat(len(x))[: len(x)]
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(0.0, 1.0).mask(on))
            c = pyro.sample("c", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + torch.where(on, w, 0.0) + locs[c], 0.7), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.3 * x, 1.0))
            pyro.sample("w", dist.Normal(0.2 * x, 1.0).mask(keep.repeat(len(x))[: len(x)]))

    found = bracket(model, guide, torch.zeros(4), num_data=40, num_particles=1000)
    x, on = found.data[0], keep.repeat(20)
    variance = torch.where(on, 2.49, 1.49)
    exact = dist.Normal(locs, variance.sqrt()[:, None]).log_prob(x[:, None]).logsumexp(1) - math.log(3)
    assert found.low <= float(exact.mean()) <= found.high
    assert found.sufficient


def test_what_cannot_be_bracketed_is_named(pair):
    with pytest.raises(UsageError, match="num_particles: expected at least 2, found 1"):
        bracket(pair.model, pair.guide, torch.zeros(3, 6), num_particles=1)
    with pytest.raises(UsageError, match="proposal: expected 'guide' or 'refined', found 'best'"):
        bracket(pair.model, pair.guide, torch.zeros(3, 6), proposal="best")

    def doubled(x):
        pair.model(2 * x)

    with pytest.raises(ContractError, match="assemble"):
        bracket(doubled, pair.guide, torch.ones(3, 6))


def test_the_verdict_on_an_estimate_follows_the_bracket(pair, tmp_path):
    est = refined_log_marginal(
        pair.model, pair.mean_field, torch.zeros(4, 6).double(), num_particles=200, guide_particles=0, bracket_data=20
    )
    assert est.verdict == "reliable"
    assert "suffices" in est.table()["bracket"]
    assert load_estimate(est.save(tmp_path)).verdict == "reliable"
    missed = refined_log_marginal(
        two_modes, one_mode_guide, torch.full((4,), 3.0), num_particles=500, guide_particles=0, bracket_data=30
    )
    assert missed.verdict.startswith("not reliable: the proposal is too far")
    assert load_estimate(missed.save(tmp_path)).verdict == missed.verdict
