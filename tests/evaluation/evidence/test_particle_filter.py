"""log p(x) of sequences by particle filters: a Kalman filter, reliability, draws, options."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppvae import log_marginal
from ppvae.errors import ContractError, DataError, UsageError
from ppvae.evaluation import load_estimate
from ppvae.evaluation.reliability import NUM_FILTERS, assess_filters
from ppvae.inference.inspection import inspect
from ppvae.inference.sequences.backward import sample_backward
from ppvae.inference.sequences.particle_filter import particle_filter
from tests.inference.sequences.test_windows import LiveElements
from tests.programs.sequences import R, draw_linear, forward_pass, hmm_pair, kalman, kalman_smoother, linear_pair
from tests.programs.strangers import PAIRS

pytestmark = pytest.mark.usefixtures("float64")
filtered = functools.partial(log_marginal, method="particle_filter", progress=False)


@pytest.mark.parametrize("steps", [5, 50, pytest.param(200, marks=pytest.mark.slow)])
def test_a_kalman_filter_within_its_errors(steps: int):
    """Of the reliable data none is off by over 5 standard errors: each is with probability under 0.005."""
    x = draw_linear(4, steps, seed=2)
    est = filtered(*linear_pair(), x, num_particles=1000 if steps < 200 else 3000)
    assert int(est.reliable.sum()) >= 3
    off = (est.log_px - kalman(x)).abs()
    assert bool((off < 5 * est.std_error)[est.reliable].all())
    assert est.ess_by_step is not None
    assert est.ess_by_step.shape == (4, steps)
    torch.testing.assert_close(est.ess, est.ess_by_step.amin(1))


@pytest.mark.parametrize("steps", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_importance_sampling_is_flagged_where_a_filter_is_reliable(steps: int):
    """The filter is within 5 standard errors; importance sampling is off by nats at T = 200, and says so at T = 40."""
    x, pair = draw_linear(2, steps, seed=2), linear_pair()
    plain = log_marginal(*pair, x, num_particles=1000, progress=False, proposal="guide")
    assert not bool(plain.reliable.any())
    est = filtered(*pair, x, num_particles=1000 if steps < 200 else 3000)
    assert bool(est.reliable.all())
    assert bool(((est.log_px - kalman(x)).abs() < 5 * est.std_error).all())
    if steps == 200:
        assert float((plain.log_px - kalman(x)).max()) < -2
    assert float((est.elbo - plain.elbo).abs().max()) < 0.02 * float(plain.elbo.abs().min())  # of the same guide


def test_hidden_markov_model():
    x = 2 * draw_linear(3, 12, seed=4)
    est = filtered(*hmm_pair(), x, num_particles=500)
    assert bool(est.reliable.all())
    assert bool(((est.log_px - forward_pass(x)).abs() < 5 * est.std_error).all())


def test_sequences_of_different_lengths():
    x, lengths = draw_linear(3, 12, seed=6), torch.tensor([12, 3, 7])
    est = filtered(*linear_pair(), (x, lengths), num_particles=1000)
    assert bool(((est.log_px - kalman(x, lengths)).abs() < 5 * est.std_error).all())


def test_few_particles_are_unreliable():
    est = filtered(*linear_pair(shift=0.8), draw_linear(4, 60), num_particles=30)
    assert not bool(est.reliable.any())
    assert "filters that disagree" in est.reliability.summary
    assert est.reliability.recommendation == "more than 30 particles, or a better guide"


def test_the_standard_error_is_that_of_few_filters_that_differ():
    """Of 400 copies of a sequence, estimates with a standard deviation near 0.5: 0.8 of it by the delta method.

    Fails by chance in one of 1e4 runs: 4 standard errors of the ratio are 0.16.
    """
    x = draw_linear(1, 30, seed=3).expand(400, -1).contiguous()
    est = filtered(*linear_pair(shift=0.2), x, num_particles=100)
    spread = float(est.log_px.std())
    assert 0.3 < spread < 0.8
    assert abs(float(est.std_error.square().mean().sqrt()) / spread - 1) < 0.16


def test_rule_of_reliability():
    one = torch.ones(4)
    found = assess_filters(
        ess=torch.tensor([100.0, 9.0, 100.0, 100.0]), filter_ess=torch.tensor([9.0, 9.0, 4.0, 9.0]),
        nonfinite=torch.tensor([0, 0, 0, 1]), particles=100 * one,
    )  # fmt: skip
    assert found.reliable.tolist() == [True, False, False, False]
    assert sum(int(which.sum()) for which in found.reasons.values()) == 3


COPIES, DRAWS = 40, 20


def distinct(draws: Tensor) -> float:
    """The share of distinct values among the draws [draws, N] of each datum."""
    return float(torch.tensor([float(len(of.unique())) for of in draws.T]).mean()) / len(draws)


@pytest.mark.parametrize("steps", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_draws_are_of_the_smoothing_distribution(steps: int):
    """Means and variances by a Kalman smoother, within 6 standard errors over independent copies of a sequence.

    They fail by chance in one of 1e4 runs: p = 5e-7 with 39 degrees of freedom, 2 T of them.
    """
    x = draw_linear(1, steps, seed=7)
    est = filtered(
        *linear_pair(shift=0.2), x.expand(COPIES, steps).contiguous(), num_particles=1000, posterior_draws=DRAWS
    )
    assert est.posterior is not None
    z = torch.stack([est.posterior[f"z_{t}"] for t in range(steps)], -1)
    assert z.shape == (DRAWS, COPIES, steps)
    mean, variance = kalman_smoother(x)
    for found, expected in ((z, mean), ((z - mean).square(), variance)):
        by_copy = found.mean(0)
        assert bool(((by_copy.mean(0) - expected[0]).abs() < 6 * by_copy.std(0) / COPIES**0.5).all())
    assert distinct(est.posterior["z_0"]) > 0.9


def test_memory_of_smoothing_draws_is_bounded_by_fewer_rows(monkeypatch: pytest.MonkeyPatch):
    """As long as the particles of one datum fit: 8 and 24 steps take about the same."""
    monkeypatch.setattr("ppvae.evaluation.evidence.particle_filter.STEPS_HELD", 4)

    def peak(steps: int) -> int:
        with LiveElements() as live:
            filtered(*linear_pair(), draw_linear(10, steps), num_particles=400, posterior_draws=2)
        return live.peak

    assert peak(24) < 1.5 * peak(8)


def test_backward_sampling_undoes_the_degeneracy_of_ancestors():
    """Of 500 particles at the end of 30 steps few first ancestors are left; 40 draws have nearly as many."""
    x = draw_linear(4, 30, seed=3)
    pair = linear_pair(shift=0.2)
    torch.manual_seed(0)
    with torch.no_grad():
        f = particle_filter(*pair, (x,), 500, structure=inspect(*pair, x), keep_history=True)
        assert distinct(f.last.guide["z_0"].value) < 0.1
        assert f.history is not None
        rows = torch.arange(4).repeat(40)
        held = f.history.select_rows(rows, f.first.structure)
        draws = sample_backward(*pair, (x[rows],), held, structure=f.first.structure)
    assert distinct(draws["z_0"].reshape(40, 4)) > 0.8


def test_a_result_is_a_function_of_its_seed_and_is_saved(tmp_path: Path):
    pair, x = linear_pair(), draw_linear(60, 6)
    first, again = (filtered(*pair, x, num_particles=50, seed=3) for _ in range(2))
    assert torch.equal(first.log_px, again.log_px)
    assert not torch.equal(first.log_px, filtered(*pair, x, num_particles=50, seed=4).log_px)
    assert first.log_px[:50].std() > 0
    held = load_estimate(first.save(tmp_path))
    assert held.method == "particle filter"
    assert torch.equal(held.reliable, first.reliable)
    assert held.summary() == first.summary()
    assert first.ess_by_step is not None
    assert held.ess_by_step is not None
    assert torch.equal(held.ess_by_step, first.ess_by_step)
    assert first.to_arviz()["marginal_likelihood"]["ess_by_step"].dims == ("datum", "step")


# -- refusals ---------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    "proposal": "refined", "conditional": True, "bounds": (5,), "local_particles": 2, "rows": 100, "precision": "bf16",
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_a_filter_does_not_take(name: str):
    pair, x = linear_pair(), draw_linear(2, 3)
    with pytest.raises(UsageError, match=rf"^{name}: expected .* beside method='particle_filter', found .* Leave it"):
        filtered(*pair, x, num_particles=50, **{name: OPTIONS[name]})
    assert filtered(*pair, x, num_particles=50).num_particles == 50


@pytest.mark.parametrize("count", ["auto", 2 * NUM_FILTERS - 1])
def test_too_few_particles(count: Any):
    with pytest.raises(UsageError, match="num_particles: expected at least 20, two for each of 10 particle filters"):
        filtered(*linear_pair(), draw_linear(2, 3), num_particles=count)


def test_a_site_summed_out_has_no_steps():
    model, guide, batch = PAIRS["markov"]()
    model(*batch)  # its parameters exist
    guide(*batch)
    with pytest.raises(ContractError, match=r"expected latents that the guide samples, for a particle filter"):
        filtered(model, guide, batch, num_particles=50)


def test_a_plate_that_draws_its_rows():
    """Every datum once, the short last block too; draws are those of its own data."""
    x = draw_linear(5, 4, seed=8) + 20 * torch.arange(5)[:, None]

    def model(x: Tensor) -> None:
        z = torch.zeros(())
        with pyro.plate("data", 5, subsample_size=2) as rows:
            for t in range(4):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 10.0))
                pyro.sample(f"x_{t}", dist.Normal(z, R), obs=x[rows, t])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 5, subsample_size=2) as rows:
            for t in range(4):
                pyro.sample(f"z_{t}", dist.Normal(x[rows, t], R))

    est = filtered(model, guide, x, num_particles=200, posterior_draws=6)
    assert est.log_px.shape == (5,)
    assert est.posterior is not None
    assert est.posterior["z_3"].shape == (6, 5)
    assert float((est.posterior["z_3"] - x[:, 3]).abs().max()) < 6 * R


def test_a_guide_with_one_parameter_a_datum():
    """It takes its rows alone, in their order: each filter is a run of the pair, and draws are of the right datum."""
    x = draw_linear(3, 6, seed=5)
    model, _ = linear_pair()
    mean, variance = kalman_smoother(x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                pyro.sample(f"z_{t}", dist.Normal(mean[:, t], 0.8))

    est = filtered(model, guide, x, num_particles=2000, posterior_draws=400)
    assert bool(est.reliable.all())
    assert bool(((est.log_px - kalman(x)).abs() < 5 * est.std_error).all())
    assert est.posterior is not None
    z = torch.stack([est.posterior[f"z_{t}"] for t in range(6)], -1)
    assert bool(((z.mean(0) - mean).abs() < 6 * variance.sqrt() / 20).all())


def test_no_effective_particles_beyond_the_end():
    """NaN there and nowhere else, and the smallest of the others is that of the datum."""
    x, lengths = draw_linear(4, 9, seed=2), torch.tensor([9, 1, 4, 8])
    est = filtered(*linear_pair(), (x, lengths), num_particles=200)
    assert est.ess_by_step is not None
    assert torch.equal(est.ess_by_step.isnan(), torch.arange(9) >= lengths[:, None])
    torch.testing.assert_close(est.ess, est.ess_by_step.nan_to_num(torch.inf).amin(1))
    alone = filtered(*linear_pair(), x, num_particles=200)
    assert alone.ess_by_step is not None
    assert not bool(alone.ess_by_step.isnan().any())


@pytest.mark.parametrize("count", [7, 16])
def test_runs_of_fewer_rows_count_what_a_mask_leaves_out(count: int, monkeypatch: pytest.MonkeyPatch):
    """Where particles are many, a run has a part of the rows: log p(x) and dims are as with all of them."""
    pair, x = linear_pair(), draw_linear(count, 6, seed=2)
    whole = filtered(*pair, x, num_particles=1000)
    monkeypatch.setattr("ppvae.evaluation.evidence.particle_filter.PARTICLE_BLOCK", 10)  # 5 rows in a run
    est = filtered(*pair, x, num_particles=1000)
    assert bool(((est.log_px - kalman(x)).abs() < 6 * est.std_error).all())
    assert est.dims == whole.dims == 6


def masked_pair():
    """Steps of a random walk, of which a datum has the first `lengths`."""

    def model(x, lengths):
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x))
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                with pyro.poutine.mask(mask=t < lengths):
                    pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    def guide(x, lengths):
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x))
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))

    return model, guide


def test_masked_steps_in_runs_of_fewer_rows(monkeypatch: pytest.MonkeyPatch):
    x, lengths = torch.zeros(13, 4), torch.arange(13) % 4 + 1
    monkeypatch.setattr("ppvae.evaluation.evidence.particle_filter.PARTICLE_BLOCK", 10)
    est = filtered(*masked_pair(), (x, lengths), num_particles=1000)
    assert est.dims == pytest.approx(float(lengths.double().mean()))


def test_a_value_out_of_support_is_named_by_its_row_in_a_later_run(monkeypatch: pytest.MonkeyPatch):
    def model(x):
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x))
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x_{t}", dist.Exponential(z.exp()), obs=x[:, t])

    def guide(x):
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                pyro.sample(f"z_{t}", dist.Normal(torch.zeros(len(x)), 1.0))

    x = torch.ones(12, 3)
    x[9, 1] = -1.0
    monkeypatch.setattr("ppvae.evaluation.evidence.particle_filter.PARTICLE_BLOCK", 10)
    with pytest.raises((ContractError, DataError), match="row 9"):
        filtered(model, guide, x, num_particles=1000)
