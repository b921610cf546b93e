"""log_marginal(..., method="auto"): importance sampling where it suffices, annealing where it does not."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from ppvae import log_marginal
from ppvae.errors import UsageError
from ppvae.evaluation import compare, load_estimate, quadrature
from ppvae.evaluation.annealing.fitted_start import FittedStart
from ppvae.evaluation.blocks import start_evaluation
from ppvae.evaluation.estimate import MIXED_METHOD
from ppvae.evaluation.proposals.log_weights import RefinedProposal
from ppvae.models import LinearGaussian
from tests.evaluation.evidence.pairs import coin, coin_guide, funnel, funnel_guide

pytestmark = pytest.mark.usefixtures("float64")


def test_importance_sampling_is_kept_where_it_suffices():
    pair = LinearGaussian(10, 4).double()
    x = 1.5 * torch.randn(20, 10)
    est = log_marginal(pair.model, pair.mean_field, x, method="auto")
    refined = log_marginal(pair.model, pair.mean_field, x, proposal="refined")
    assert torch.equal(est.log_px, refined.log_px)
    assert not est.diagnostics["method"].any()
    assert est.method == "importance sampling"
    assert bool(est.reliable.all())
    assert "by refined importance sampling: all data" in est.notes
    # models are compared by estimates of one tightness, whether a datum needed annealing or not
    annealed = dataclasses.replace(est, method=MIXED_METHOD)
    assert len(set(compare({"a": est, "b": annealed}).methods)) == 1


def test_a_funnel_is_annealed_and_agrees_with_quadrature(tmp_path):
    """Weights of many data are heavy-tailed whatever was fitted: they go on to chains, and none is off by 6 errors."""
    x = torch.tensor([-5.0, -0.6, -0.3, -0.1, 0.1, 0.3, 0.6, 5.0])
    exact = quadrature(funnel, funnel_guide, x, num_nodes=385)
    assert not bool(log_marginal(funnel, funnel_guide, x, proposal="refined").reliable.all())
    folder = tmp_path / "blocks"
    est = log_marginal(funnel, funnel_guide, x, method="auto", posterior_draws=40, directory=folder)
    assert int(est.diagnostics["method"].sum()) >= 4
    assert est.method == "importance sampling and annealing"
    assert int(est.reliable.sum()) >= 6
    assert float(((est.log_px - exact.log_px) / est.std_error).abs().max()) < 6
    assert float((est.log_px - exact.log_px).abs().mean()) < 0.1
    assert "by annealing from the refined proposal" in est.summary()
    assert est.posterior["b"].shape == (40, 8)
    assert float((est.posterior["b"].mean(0) - x).abs().max()) < 0.5  # the posterior of b has a sd of 0.3 at most
    resumed = log_marginal(funnel, funnel_guide, x, method="auto", posterior_draws=40, directory=folder, rows=50)
    assert torch.equal(est.log_px, resumed.log_px)
    again = load_estimate(est.save(tmp_path))
    assert torch.equal(again.reliable, est.reliable)
    assert again.summary() == est.summary()
    assert torch.equal(again.diagnostics["method"], est.diagnostics["method"].double())


def test_the_result_does_not_depend_on_rows():
    x = torch.tensor([-4.0, 0.5, 3.0])
    once = log_marginal(funnel, funnel_guide, x, method="auto", num_particles=200)
    again = log_marginal(funnel, funnel_guide, x, method="auto", num_particles=200, rows=17)
    assert torch.equal(once.diagnostics["method"], again.diagnostics["method"])
    torch.testing.assert_close(once.log_px, again.log_px, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("values", "copies", "most"),
    [pytest.param((0.1, 0.3), 30, 60, marks=pytest.mark.slow), ((-6.0, 6.0), 75, 100)],
    ids=["all annealed", "few"],
)
def test_p_x_stays_unbiased_where_the_method_is_chosen_by_datum(values, copies, most):
    """Copies of two data, each with its own noise, some annealed: six standard errors fail with p = 2e-9."""
    x = torch.tensor(values).repeat_interleave(copies)
    exact = quadrature(funnel, funnel_guide, x[[0, -1]], num_nodes=385).log_px.repeat_interleave(copies)
    est = log_marginal(funnel, funnel_guide, x, method="auto", num_particles=150)
    assert int(est.diagnostics["method"].sum()) <= most
    assert most < 2 * copies or bool(est.diagnostics["method"].all())
    ratio = (est.log_px - exact).exp()
    assert abs(float(ratio.mean()) - 1) < 6 * float(ratio.std()) / math.sqrt(2 * copies)
    assert float(ratio.std()) < 0.5


def test_an_adaptive_allocation_sends_on_what_its_budget_does_not_reach():
    x = torch.linspace(-6.0, 6.0, 4)
    exact = quadrature(funnel, funnel_guide, x, num_nodes=385)
    est = log_marginal(
        funnel, funnel_guide, x, method="auto", num_particles="auto", max_particles=400, target_std_error=0.02
    )
    assert int(est.diagnostics["method"].sum()) > 0
    assert float(((est.log_px - exact.log_px) / est.std_error).abs().max()) < 6


def test_gradients_of_a_fitted_proposal_are_those_of_autograd():
    x = torch.tensor([-2.0, 0.5, 3.0])
    with start_evaluation(funnel, funnel_guide, x, seed=0) as run:
        start = FittedStart(RefinedProposal(run, run.block(0), 1000))
        v = start.sample_start(5).requires_grad_()
        state = start(v.detach())
        for i in range(v.shape[-1]):
            step = torch.zeros_like(v)
            step[..., i] = 1e-5
            high, low = start((v + step).detach()), start((v - step).detach())
            for value, gradient in (("log_start", state.grad_start), ("log_joint", state.grad_joint)):
                slope = (getattr(high, value) - getattr(low, value)) / 2e-5
                torch.testing.assert_close(slope, gradient[..., i], rtol=1e-4, atol=1e-4)


def test_a_pair_that_cannot_be_refined_keeps_its_guide_and_says_so():
    est = log_marginal(coin, coin_guide, torch.zeros(3), method="auto")
    plain = log_marginal(coin, coin_guide, torch.zeros(3), proposal="guide")
    assert torch.equal(est.log_px, plain.log_px)
    assert "method='auto' kept to the guide's own draws" in est.summary()
    assert "site 'z'" in est.summary()
    with pytest.raises(UsageError, match="method: expected 'importance', 'auto' or 'particle_filter', found 'best'"):
        log_marginal(coin, coin_guide, torch.zeros(3), method="best")
