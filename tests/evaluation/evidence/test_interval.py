"""Intervals of log p(x) for given data, against closed forms and quadrature."""

from __future__ import annotations

import math

import pytest
import torch

from ppvae import plots
from ppvae.errors import ContractError, UsageError
from ppvae.evaluation import Interval, interval, quadrature
from ppvae.models import LinearGaussian
from tests.evaluation.evidence.pairs import (
    coin,
    coin_guide,
    funnel,
    funnel_guide,
    one_mode_guide,
    two_modes,
    two_modes_log_px,
)

pytestmark = pytest.mark.usefixtures("float64")


def test_a_linear_gaussian_interval_is_narrow_and_holds_the_truth(tmp_path):
    """Limits at three standard errors: the mean of 50 data lies outside with probability 0.3 %."""
    pair = LinearGaussian(8, 3).double().requires_grad_(False)
    x = 1.5 * torch.randn(50, 8)
    found = interval(pair.model, pair.mean_field, x, directory=tmp_path / "blocks")
    exact = pair.log_px(x)
    assert found.low - 1e-9 <= float(exact.mean()) <= found.high + 1e-9
    assert found.high - found.low < 0.01
    assert not found.method.any()
    assert found.inverted == 0
    again = interval(pair.model, pair.mean_field, x, directory=tmp_path / "blocks")
    assert torch.equal(again.upper, found.upper)
    other = interval(pair.model, pair.mean_field, x, rows=333)
    torch.testing.assert_close(other.upper, found.upper, rtol=0, atol=1e-9)
    loaded = Interval.load(found.save(tmp_path))
    assert loaded.summary() == found.summary()
    assert loaded.table() == found.table()
    assert plots.bracket(found).axes


@pytest.mark.slow
def test_a_funnel_is_held_between_its_bounds():
    """Annealed in both directions: six standard errors of each bound, and the mean within three."""
    x = torch.tensor([-0.6, -0.3, -0.1, 0.1, 0.3, 0.6])
    exact = quadrature(funnel, funnel_guide, x, num_nodes=257).log_px
    found = interval(funnel, funnel_guide, x)
    assert int(found.method.sum()) >= 4
    assert bool((found.lower - 6 * found.lower_std_error <= exact).all())
    assert bool((exact <= found.upper + 6 * found.upper_std_error).all())
    assert found.low <= float(exact.mean()) <= found.high
    assert found.width < 0.2
    assert float(found.acceptance.mean()) > 0.5
    assert "by annealing in both directions" in found.summary()


def test_what_follows_where_the_assumption_fails():
    """Chains that never see the second mode give an interval about log p(x) - log 2, as the docstring says."""
    x = torch.tensor([2.0, 3.0, 4.0])
    found = interval(two_modes, one_mode_guide, x)
    torch.testing.assert_close(found.upper, two_modes_log_px(x) - math.log(2), rtol=0, atol=0.02)
    assert "a mode that none finds lowers it" in found.summary()


def test_what_cannot_be_bounded_is_named():
    with pytest.raises(ContractError, match=r"'z'.*discrete"):
        interval(coin, coin_guide, torch.zeros(3))
    with pytest.raises(UsageError, match="num_particles: expected at least 100, found 50"):
        interval(coin, coin_guide, torch.zeros(3), num_particles=50)
