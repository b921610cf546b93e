"""Laws of the library's distributions, over a dict of constructors, and known answers where Pyro's are wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import mpmath as mp
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate
from torch import Tensor
from torch.distributions import constraints

from ppvae import distributions as D
from ppvae.distributions.log_gamma import log_rising_factorial_ratio, stirling_error
from tests.laws.goodness import FAILURE, TESTS, Support, bags, masses, p_value, points

mp.mp.dps = 40


class Case(NamedTuple):
    """A distribution of batch shape [3] from numbers of a dtype, its support as points or line, and values outside."""

    make: Callable[[Callable[..., Tensor]], Any]
    support: Support
    outside: list[Any]


def copying(x: Tensor) -> Any:
    logits = torch.stack([0.7 + 0 * x[..., 0], 2 * x[..., 0] - 1, x[..., 0] - 3 * x[..., 1]], -1)
    return D.Bernoulli(logits=logits).to_event(1)


def table(t: Callable[..., Tensor]) -> Any:
    return D.Columns(
        [
            (torch.tensor([2]), D.Bernoulli(logits=t(0.3, -1.0, 2.0)[:, None])),
            (torch.tensor([0]), D.Levels(t(0.3, -1.0, 2.0)[:, None, None] * t(0.0, 1.0, 2.0), top=2)),
            (torch.tensor([1]), D.Poisson(t(-2.0, -1.0, 0.0)[:, None])),
        ]
    )


def mixture(t: Callable[..., Tensor]) -> Any:
    """Two components, three channels, one pixel."""
    vary = t(-0.5, 0.0, 0.5)[:, None, None, None]
    return D.MixtureOfDiscretizedLogistics(
        t(-1.0, 0.0, 1.0)[:, None, None] * t(1.0, -1.0)[:, None],
        t(0.2, 0.9)[:, None, None] + vary * t(1.0, 0.5, 0.2)[:, None],
        t(-2.0, -1.0)[:, None, None] + vary * t(1.0, 1.0, -1.0)[:, None],
        t(0.8, -0.7)[:, None, None] * t(1.0, -0.5, 0.9)[:, None] + vary,
        levels=3,
    )


counts = points(range(400))
CASES: dict[str, Case] = {
    "Bernoulli": Case(lambda t: D.Bernoulli(logits=t(-1.0, 0.0, 2.0)), points([0, 1]), [0.5, 2.0, -1.0]),
    "ContinuousBernoulli": Case(lambda t: D.ContinuousBernoulli(t(-3.0, 0.1, 20.0)), "unit", [-0.1, 1.1]),
    "Beta": Case(lambda t: D.Beta(t(0.9, 2.0, 50.0), t(3.0, 1.0, 70.0)), "unit", [0.0, 1.0, 2.0]),
    "StudentT": Case(lambda t: D.StudentT(t(3.0, 8.0, 1e5), t(0.0, 1.0, -2.0), t(1.0, 0.1, 5.0)), "real", [math.nan]),
    "Levels": Case(
        lambda t: D.Levels(t(-1.0, 0.0, 1.0)[:, None] * t(0.0, 1.0, 3.0, 0.5)),
        points([0, 1 / 3, 2 / 3, 1]), [0.5, 4 / 3, 3.0, -1 / 3],
    ),
    "Levels of whole numbers": Case(
        lambda t: D.Levels(t(-1.0, 0.0, 1.0)[:, None] * t(0.0, 1.0, 3.0, 0.5), top=3), points(range(4)), [0.5, 4.0]
    ),
    "DiscretizedLogistic": Case(
        lambda t: D.DiscretizedLogistic(t(-0.3, 0.5, 0.9), t(-1.0, -4.0, 0.5), levels=16),
        points(k / 15 for k in range(16)), [0.5, 16 / 15, 15.0],
    ),
    "DiscretizedLogistic of two levels": Case(
        lambda t: D.DiscretizedLogistic(t(-0.3, 0.5, 0.9), t(-1.0, -4.0, 0.5), levels=2), points([0, 1]), [0.5]
    ),
    "MixtureOfDiscretizedLogistics": Case(mixture, points([0, 0.5, 1], 3), [[0.3, 0, 0], [0, 1, 1.5]]),
    "Poisson": Case(lambda t: D.Poisson(t(-3.0, 0.0, 3.0)), counts, [-1.0, 0.5]),
    "NegativeBinomial": Case(lambda t: D.NegativeBinomial(t(-1.0, 1.0, 2.0), t(0.0, 1.0, 30.0)), counts, [-1.0, 0.5]),
    "ZeroInflated": Case(lambda t: D.ZeroInflated(D.Poisson(t(-1.0, 0.0, 2.0)), t(-1.0, 0.0, 1.0)), counts, [-1.0]),
    "Multinomial": Case(
        lambda t: D.Multinomial(t(4.0).detach().round(), t(-1.0, 0.0, 2.0)[:, None] * t(0.0, 1.0, 0.5)), bags(4, 3),
        [[1.0, 1.0, 1.0], [-1.0, 3.0, 2.0], [0.5, 3.5, 0.0]],
    ),
    "Columns": Case(
        table, torch.cat([torch.cartesian_prod(torch.arange(3), torch.arange(40), torch.arange(2))]).double(),
        [[3.0, 0, 0], [0.0, -1, 0], [0.0, 0, 0.5], [0.0, math.inf, 0.0]],
    ),
    "Autoregressive": Case(
        lambda t: D.Autoregressive(
            copying, t(0.0).expand(3, 3), torch.arange(3), constraints.independent(constraints.boolean, 1)
        ), points([0, 1], 3), [[0.5, 0, 0]],
    ),
}  # fmt: skip


def numbers(dtype: torch.dtype, grad: bool = False) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A maker of leaf tensors of a dtype, and the list of those it made."""
    made: list[Tensor] = []

    def t(*values: float) -> Tensor:
        made.append(torch.tensor(values, dtype=dtype, requires_grad=grad))
        return made[-1]

    return t, made


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    return CASES[name].make(numbers(dtype)[0])


@pytest.mark.parametrize("name", CASES)
def test_sums_or_integrates_to_one(name: str) -> None:
    _, mass = masses(build(name), CASES[name].support)
    torch.testing.assert_close(mass.sum(0), torch.ones(3).double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sampler_fits_its_density(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    fn = build(name, dtype)
    assert fn.sample().dtype == dtype
    assert p_value(fn, CASES[name].support) > FAILURE / TESTS


@pytest.mark.parametrize("name", CASES)
def test_mode_has_the_largest_density(name: str) -> None:
    fn = build(name)
    try:
        mode = fn.mode
    except NotImplementedError:
        assert name in ("MixtureOfDiscretizedLogistics", "Autoregressive")
        return
    assert mode.shape == fn.shape()
    if isinstance(CASES[name].support, Tensor):
        x = CASES[name].support.double()
        x = x.reshape(len(x), *[1] * len(fn.batch_shape), *fn.event_shape).expand(len(x), *fn.shape())
    else:
        x = fn.sample((2000,))
        inner = mode.clamp(1e-9, 1 - 1e-9) if name == "Beta" else mode
        assert (fn.log_prob(inner) >= fn.log_prob(x).amax(0) - 1e-9).all()
        return
    assert (fn.log_prob(mode) >= fn.log_prob(x).amax(0) - 1e-12).all()


@pytest.mark.parametrize("name", ["Bernoulli", "Levels", "Levels of whole numbers", "DiscretizedLogistic"])
def test_probs_are_the_masses(name: str) -> None:
    fn = build(name)
    x = CASES[name].support.double()
    mass = fn.log_prob(x.reshape(-1, 1)).exp().T  # [batch, levels]
    assert torch.allclose(mass[:, -1] if name == "Bernoulli" else mass, fn.probs, atol=1e-12)


def test_the_mode_of_counts_of_a_large_total_is_found() -> None:
    torch.manual_seed(0)
    for total in (1000.0, 7.0, 0.0):
        fn = D.Multinomial(torch.tensor(total).double(), torch.randn(50).double())
        mode = fn.mode
        assert float(mode.sum()) == total
        for a in mode.nonzero()[:, 0].tolist():  # no move of one count from a kind to another is better
            for b in range(50):
                other = mode.clone()
                other[a] -= 1
                other[b] += 1
                assert fn.log_prob(mode) >= fn.log_prob(other) - 1e-9


@pytest.mark.parametrize("name", CASES)
def test_mean_is_that_of_the_density(name: str) -> None:
    fn = build(name)
    try:
        mean = fn.mean
    except NotImplementedError:
        assert name in ("MixtureOfDiscretizedLogistics", "Autoregressive")
        return
    known = ~mean.isnan()  # the codes of categories have none
    assert bool(known.all()) == (name != "Columns")
    assert known.any()
    x, mass = masses(fn, CASES[name].support)
    x = x.reshape(len(x), *(1,) * (mass.dim() - 1), *fn.event_shape)
    expected = (x * mass.reshape(*mass.shape, *(1,) * fn.event_dim)).sum(0)
    torch.testing.assert_close(mean[known], expected[known], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_shapes_expand_and_broadcast(name: str) -> None:
    torch.manual_seed(0)
    fn = build(name)
    event = tuple(fn.event_shape)
    assert (tuple(fn.batch_shape), fn.support.event_dim) == ((3,), len(event))
    x = fn.sample((5,))
    assert x.shape == (5, 3, *event)
    assert bool(fn.support.check(x).all())
    log_prob = fn.log_prob(x)
    assert log_prob.shape == (5, 3)
    for wide in (fn.expand((5, 3)), fn.expand((1, 3)).expand((5, 3))):
        assert type(wide) is type(fn)
        assert (wide.batch_shape, wide.event_shape) == ((5, 3), event)
        torch.testing.assert_close(wide.log_prob(x), log_prob)
        torch.testing.assert_close(wide.log_prob(x[0]), fn.log_prob(x[0]).expand(5, 3))
        assert wide.sample((2,)).shape == (2, 5, 3, *event)
    torch.testing.assert_close(
        fn.log_prob(x[:, None, :1]), torch.stack([fn.log_prob(row) for row in x[:, :1]])[:, None]
    )
    torch.testing.assert_close(fn.to_event(1).log_prob(x), log_prob.sum(-1))
    with pyro.plate("k", 5, dim=-2), pyro.plate("b", 3):
        assert pyro.sample("x", fn).shape == (5, 3, *event)


@pytest.mark.parametrize("name", CASES)
def test_expanded_particles_are_drawn_apart(name: str) -> None:
    torch.manual_seed(0)
    x = build(name).expand((200, 3)).sample()
    assert bool((x != x[:1]).any(0).reshape(3, -1).any(-1).all())


@pytest.mark.parametrize("name", CASES)
def test_has_rsample_is_honest(name: str) -> None:
    t, made = numbers(torch.float64, grad=True)
    fn = CASES[name].make(t)
    assert not fn.sample().requires_grad
    if fn.has_rsample:
        (gradient,) = torch.autograd.grad(fn.rsample((4,)).sum(), made[0])
        assert bool((gradient != 0).all())
    else:
        with pytest.raises(NotImplementedError):
            fn.rsample()


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    torch.manual_seed(0)
    x = build(name).sample((2,))
    t, made = numbers(torch.float64, grad=True)
    CASES[name].make(t)
    values = [m.detach().clone().requires_grad_() for m in made]

    def log_prob(*leaves: Tensor) -> Tensor:
        rest = iter(leaves)
        return CASES[name].make(lambda *_: next(rest)).log_prob(x)

    assert torch.autograd.gradcheck(log_prob, values, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_float32_is_close_to_float64(name: str) -> None:
    torch.manual_seed(0)
    single, double = build(name, torch.float32), build(name)
    x = single.sample((20,))
    log_prob = single.log_prob(x)
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob.double(), double.log_prob(x.double()), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_values_outside_the_support_are_refused(name: str) -> None:
    fn = build(name)
    for value in CASES[name].outside:
        x = torch.tensor(value).double().reshape(fn.event_shape).expand(3, *fn.event_shape)
        assert not bool(fn.support.check(x).all())
        with pytest.raises(ValueError, match="support"):
            fn.log_prob(x)


@pytest.mark.parametrize("name", CASES)
def test_log_prob_makes_nothing_on_another_device_and_waits_for_no_value(name: str) -> None:
    """The meta device has no values: what runs there neither reads one nor mixes devices."""
    x = build(name).sample()
    with pyro.validation_enabled(False):
        fn = CASES[name].make(lambda *v: torch.tensor(v).double().to("meta"))
        for value in vars(fn).get("groups", []):
            assert value[1].log_prob(x[:, :1].to("meta")).device.type == "meta"
        if name != "Columns":
            assert fn.log_prob(x.to("meta")).device.type == "meta"


# -- known answers ----------------------------------------------------------------------------------------------------

LOGITS = [0.0, 1e-8, 1e-3, 0.3, 0.4999, 0.5001, 1.0, 20.0, 200.0]


def exact_continuous_bernoulli(logit: float, x: float) -> Any:
    return mp.mpf(logit) * x - (mp.log(mp.expm1(logit) / mp.mpf(logit)) if logit else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_continuous_bernoulli_is_exact_at_any_logit(dtype: torch.dtype) -> None:
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for size in LOGITS:
        for value in (0.0, 0.125, 0.5, 1.0):
            for logit in (size, -size):
                at = torch.tensor(logit, dtype=dtype, requires_grad=True)
                fn = D.ContinuousBernoulli(at)
                log_prob = fn.log_prob(torch.tensor(value, dtype=dtype))
                (gradient,) = torch.autograd.grad(log_prob, at)
                exact = float(exact_continuous_bernoulli(at.item(), value))
                mean = float(1 / -mp.expm1(-mp.mpf(at.item())) - 1 / mp.mpf(at.item())) if logit else 0.5
                assert log_prob.item() == pytest.approx(exact, abs=tolerance, rel=tolerance)
                assert fn.mean.item() == pytest.approx(mean, abs=tolerance)
                assert gradient.item() == pytest.approx(value - mean, abs=tolerance)
    pyro_wrong = dist.ContinuousBernoulli(logits=torch.tensor(20.0)).log_prob(torch.tensor(0.5))
    assert abs(pyro_wrong.item() - float(exact_continuous_bernoulli(20.0, 0.5))) > 0.1  # why this class is here


def test_continuous_bernoulli_samples_at_any_logit() -> None:
    torch.manual_seed(0)
    for logit in (0.0, 1e-40, 1e-8, -1e-3, 80.0, -1e4):
        x = D.ContinuousBernoulli(torch.tensor(logit)).sample((4000,))
        fn = D.ContinuousBernoulli(torch.tensor(logit).double())
        assert bool(((x >= 0) & (x <= 1)).all())
        assert x.mean().item() == pytest.approx(
            fn.mean.item(), abs=5 * 0.29 / 4000**0.5 * min(1, 12 / max(abs(logit), 1))
        )


SIZES = [1e-6, 1e-3, 0.5, 3.0, 7.9, 8.1, 100.0, 1e5, 1e9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stirling_error_and_log_rising(dtype: torch.dtype) -> None:
    eps = 20 * torch.finfo(dtype).eps
    for a in SIZES:
        x = torch.tensor(a, dtype=dtype)
        exact = mp.loggamma(x.item()) - (mp.mpf(x.item()) - 0.5) * mp.log(x.item()) + x.item() - mp.log(2 * mp.pi) / 2
        assert stirling_error(x).item() == pytest.approx(float(exact), abs=eps, rel=eps)
        for n in (0.0, 0.5, 1.0, 30.0, 1e4):
            top = mp.mpf(x.item()) + n
            ratio = mp.loggamma(top) - mp.loggamma(x.item()) - n * mp.log(x.item())
            found = log_rising_factorial_ratio(x, torch.tensor(n, dtype=dtype)).item()
            assert found == pytest.approx(float(ratio), abs=eps * (1 + n), rel=eps)


def test_negative_binomial_from_one_success_to_the_poisson_limit() -> None:
    x = torch.tensor([0.0, 1.0, 3.0, 40.0])
    for mean in (1e-3, 1.0, 30.0):
        for c in (1e-3, 1.0, 1e3, 1e7):
            log_m, log_c = torch.tensor(mean).log(), torch.tensor(c).log()
            m, k = mp.exp(log_m.item()), mp.exp(log_c.item())
            exact = [
                float(
                    mp.loggamma(v + k) - mp.loggamma(k) - mp.loggamma(v + 1)
                    + v * mp.log(m / (m + k)) + k * mp.log(k / (m + k))
                )
                for v in x.tolist()
            ]  # fmt: skip
            found = D.NegativeBinomial(log_m, log_c).log_prob(x)
            torch.testing.assert_close(found, torch.tensor(exact), rtol=2e-5, atol=2e-5)
            double = D.NegativeBinomial(log_m.double(), log_c.double()).log_prob(x.double())
            torch.testing.assert_close(double, torch.tensor(exact).double(), rtol=1e-7, atol=1e-7)
    log_m = torch.tensor([0.0, 3.0]).double()[:, None]
    far = D.NegativeBinomial(log_m, torch.tensor(30.0).double()).log_prob(x.double())
    torch.testing.assert_close(far, D.Poisson(log_m).log_prob(x.double()), rtol=1e-9, atol=1e-9)


def test_poisson_where_the_rate_underflows_or_is_zero() -> None:
    log_rate = torch.tensor([-120.0, -120.0, -torch.inf, -torch.inf, 8.0], requires_grad=True)
    log_prob = D.Poisson(log_rate).log_prob(torch.tensor([0.0, 2.0, 0.0, 1.0, 2981.0]))
    expected = [0.0, -240 - math.log(2), 0.0, -math.inf, 2981 * 8 - math.exp(8) - math.lgamma(2982)]
    torch.testing.assert_close(log_prob, torch.tensor(expected), rtol=1e-6, atol=5e-3)
    gradient = torch.autograd.grad(log_prob[:2].sum(), log_rate)[0]
    assert gradient[:2].tolist() == [0.0, 2.0]


def test_student_t_up_to_the_normal_limit() -> None:
    x = torch.tensor([-30.0, 0.0, 0.5])
    for df in (0.5, 4.0, 1e4, 1e6, 1e12):
        v = mp.mpf(torch.tensor(df).item())
        exact = [
            float(
                mp.loggamma((v + 1) / 2) - mp.loggamma(v / 2) - mp.log(v * mp.pi * 4) / 2
                - (v + 1) / 2 * mp.log1p(mp.mpf((value - 1) / 2) ** 2 / v)
            )
            for value in x.tolist()
        ]  # fmt: skip
        found = D.StudentT(torch.tensor(df), torch.tensor(1.0), torch.tensor(2.0)).log_prob(x)
        torch.testing.assert_close(found, torch.tensor(exact), rtol=2e-6, atol=2e-6)


def test_beta_at_small_and_large_concentrations() -> None:
    for a, b, x in [(1e-4, 1e-4, 0.5), (0.5, 3.0, 1e-6), (1e5, 1e5, 0.5), (1e6, 3e6, 0.25), (2.0, 1e7, 2.0**-23)]:
        t = [torch.tensor(v) for v in (a, b, x)]
        p, q, v = (mp.mpf(s.item()) for s in t)
        exact = (p - 1) * mp.log(v) + (q - 1) * mp.log1p(-v) - mp.log(mp.beta(p, q))
        assert D.Beta(t[0], t[1]).log_prob(t[2]).item() == pytest.approx(float(exact), abs=2e-5, rel=2e-5)
        double = D.Beta(t[0].double(), t[1].double()).log_prob(t[2].double())
        assert double.item() == pytest.approx(float(exact), abs=1e-8, rel=1e-10)


def test_beta_samples_stay_off_the_ends() -> None:
    torch.manual_seed(0)
    fn = D.Beta(torch.tensor(0.01), torch.tensor(0.01))
    x = fn.rsample((5000,))
    assert bool(fn.support.check(x).all())
    assert bool(torch.isfinite(fn.log_prob(x)).all())


def exact_bin(value: float, loc: float, log_scale: float, levels: int) -> float:
    """The log-mass of a level, 1000 digits deep."""
    with mp.workdps(1000):
        scale, half = mp.exp(log_scale), mp.mpf(1) / (2 * (levels - 1))
        k = round(value * (levels - 1))
        at = mp.mpf(k) / (levels - 1)
        up = 1 if k == levels - 1 else 1 / (1 + mp.exp(-(at + half - loc) / scale))
        down = 0 if k == 0 else 1 / (1 + mp.exp(-(at - half - loc) / scale))
        return float(mp.log(up - down))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_discretized_logistic_at_extreme_locations_and_scales(dtype: torch.dtype) -> None:
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    for loc, log_scale in [(0.5, -8.0), (0.5, 30.0), (100.0, 0.0), (-100.0, 1.0), (0.25, -2.0), (3.0, -4.0)]:
        t = [torch.tensor(v, dtype=dtype, requires_grad=True) for v in (loc, log_scale)]
        x = torch.tensor([0.0, 1 / 255, 0.2, 254 / 255, 1.0], dtype=dtype)
        log_prob = D.DiscretizedLogistic(*t).log_prob(x)
        expected = torch.tensor([exact_bin(v, loc, log_scale, 256) for v in x.tolist()], dtype=dtype)
        torch.testing.assert_close(log_prob, expected, rtol=tolerance, atol=tolerance)
        for gradient in torch.autograd.grad(log_prob.sum(), t):
            assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("log_scale", [-500.0, -90.0, 90.0, 500.0])
def test_discretized_logistic_is_no_number_gone_wrong_beyond_float32(log_scale: float) -> None:
    t = [torch.tensor(v, requires_grad=True) for v in (0.2, log_scale)]
    log_prob = D.DiscretizedLogistic(*t, levels=3).log_prob(torch.tensor([0.0, 0.5, 1.0]))
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-5)
    for gradient in torch.autograd.grad(log_prob[0], t):
        assert bool(torch.isfinite(gradient))


def test_a_mixture_of_one_uncoupled_component_is_that_component() -> None:
    torch.manual_seed(0)
    loc, log_scale = torch.rand(5, 1, 3, 4).double(), torch.randn(5, 1, 3, 4).double() - 2
    zero = torch.zeros(5, 1, 3, 4).double()
    fn = D.MixtureOfDiscretizedLogistics(torch.randn(5, 1, 4).double(), loc, log_scale, zero)
    one = D.DiscretizedLogistic(loc[:, 0], log_scale[:, 0]).to_event(2)
    x = one.sample()
    torch.testing.assert_close(fn.log_prob(x), one.log_prob(x))


def test_channels_are_coupled_in_the_order_of_pixelcnn() -> None:
    """Green moves with red, blue with red and green, each by its own coefficient (equation 3)."""
    torch.manual_seed(0)
    logits, loc, log_scale = torch.zeros(1, 1), torch.rand(1, 3, 1), torch.full((1, 3, 1), -3.0)
    r, g, b = 0.2, 0.6, 0.8
    c = torch.tensor([0.3, -0.5, 0.7])
    fn = D.MixtureOfDiscretizedLogistics(logits, loc, log_scale, c.reshape(1, 3, 1))
    moved = loc[0, :, 0] + torch.stack([0 * c[0], c[0] * r, c[1] * r + c[2] * g])
    expected = D.DiscretizedLogistic(moved, log_scale[0, :, 0]).log_prob(torch.tensor([r, g, b])).sum()
    torch.testing.assert_close(fn.log_prob(torch.tensor([[r], [g], [b]])), expected)


def test_zero_inflation_of_nothing_is_its_base_and_of_everything_a_point_mass() -> None:
    base, x = D.NegativeBinomial(torch.zeros(4), torch.zeros(4)), torch.tensor([0.0, 1.0, 2.0, 7.0])
    torch.testing.assert_close(D.ZeroInflated(base, torch.full((4,), -torch.inf)).log_prob(x), base.log_prob(x))
    torch.testing.assert_close(D.ZeroInflated(base, torch.full((4,), -1000.0)).log_prob(x), base.log_prob(x))
    expected = torch.tensor([0.0, -1000, -1000, -1000]) + torch.where(x == 0, 0.0, base.log_prob(x))
    torch.testing.assert_close(D.ZeroInflated(base, torch.full((4,), 1000.0)).log_prob(x), expected)


def test_multinomial_takes_a_total_for_each_datum() -> None:
    torch.manual_seed(0)
    total, logits = torch.tensor([0.0, 1.0, 50.0, 7000.0]), torch.randn(4, 6)
    fn = D.Multinomial(total, logits)
    x = fn.sample((3,))
    assert bool((x.sum(-1) == total).all())
    for i, n in enumerate(total.int().tolist()):
        expected = dist.Multinomial(n, logits=logits[i].double()).log_prob(x[:, i].double()).float()
        torch.testing.assert_close(fn.log_prob(x)[:, i], expected, rtol=1e-4, atol=1e-2)
    with pyro.validation_enabled(False):
        assert D.Multinomial(total, logits).log_prob(x + 1).eq(-torch.inf).all()


def test_multinomial_draws_more_than_fit_into_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppvae.distributions.counts._MAX_DRAWS", 7)
    fn = D.Multinomial(torch.tensor([4.0, 4.0, 4.0]).double(), torch.tensor([[0.0, 1.0, 2.0]]).double().expand(3, 3))
    torch.manual_seed(0)
    assert p_value(fn, bags(4, 3)) > FAILURE / TESTS
    total = torch.tensor([0.0, 3.0, 100.0])
    assert torch.equal(D.Multinomial(total, torch.zeros(3, 5)).sample().sum(-1), total)


def test_multinomial_support_tells_for_each_count_whatever_the_batch() -> None:
    """A datum must suit every particle; the answer has the shape of the data."""
    fn = D.Multinomial(torch.tensor([[2.0, 2.0], [2.0, 3.0]]), torch.zeros(3))
    inside = fn.support.base_constraint.check(torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]))
    assert inside.tolist() == [[True] * 3, [False] * 3]


def test_missing_columns_are_summed_out() -> None:
    fn = build("Columns")
    every = CASES["Columns"].support
    assert isinstance(every, Tensor)
    total = fn.log_prob(every[:, None]).exp()
    for observed in ([0], [1], [2], [0, 2], [1, 2], []):
        row = torch.full((3,), math.nan).double()
        row[observed] = torch.tensor([2.0, 1.0, 1.0]).double()[observed]
        match = (every[:, observed] == row[observed]).all(-1)
        torch.testing.assert_close(fn.log_prob(row).exp(), total[match].sum(0), atol=1e-9, rtol=1e-9)


def test_gradients_pass_by_missing_values() -> None:
    loc = torch.zeros(2, requires_grad=True)
    fn = D.Columns([(torch.tensor([0, 1]), dist.Normal(loc, 1.0))])
    (gradient,) = torch.autograd.grad(fn.log_prob(torch.tensor([2.0, math.nan])), loc)
    assert gradient.tolist() == [2.0, 0.0]


def test_levels_are_read_within_the_rounding_of_float32() -> None:
    for levels in (2, 3, 256, 65536):
        values = torch.arange(levels).float() / (levels - 1)
        fn = D.Levels(torch.zeros(levels))
        assert bool(fn.support.check(values).all())
        logits = torch.arange(levels).float()
        found = D.Levels(logits).log_prob(values) + logits.logsumexp(-1)
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-2)
    assert not bool(D.Levels(torch.zeros(256)).support.check(torch.tensor([0.001, 256.0, 1.5 / 255])).any())


def test_bernoulli_sums_to_one_and_is_exact_at_extreme_logits() -> None:
    logits = torch.tensor([-800.0, -60.0, -25.0, -1.0, 0.0, 0.3, 25.0, 60.0, 800.0]).double()
    fn = D.Bernoulli(logits=logits)
    zero, one = fn.log_prob(torch.zeros(9).double()), fn.log_prob(torch.ones(9).double())
    torch.testing.assert_close(zero.exp() + one.exp(), torch.ones(9).double(), atol=1e-12, rtol=0)
    wanted = [-math.log1p(math.exp(-v)) if v > -700 else v for v in logits.tolist()]
    expected = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(
        one, dist.Bernoulli(logits=logits).log_prob(torch.ones(9).double()), rtol=1e-9, atol=1e-12
    )


def test_bernoulli_gradient_is_the_residual() -> None:
    logits = torch.linspace(-5, 5, 11).double().requires_grad_()
    x = (torch.arange(11) % 2).double()
    D.Bernoulli(logits=logits).log_prob(x).sum().backward()
    torch.testing.assert_close(logits.grad, x - torch.sigmoid(logits.detach()))


@pytest.mark.parametrize(
    ("build_wrong", "words"),
    [
        (lambda: D.Levels(torch.zeros(3, 1)), "2 levels"),
        (lambda: D.DiscretizedLogistic(torch.zeros(3), torch.zeros(3), levels=1), "levels"),
        (lambda: D.ZeroInflated(D.Poisson(torch.zeros(3)).to_event(1), torch.zeros(1)), "event shape"),
        (
            lambda: D.MixtureOfDiscretizedLogistics(
                torch.zeros(2, 4), *(torch.zeros(2, 3, 4) for _ in range(3)), event_shape=(4, 4)
            ),
            "channels",
        ),
    ],
)
def test_bad_arguments_are_refused(build_wrong: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_wrong()


DENSITIES = {
    "Gamma that is infinite at zero": (lambda: torch.distributions.Gamma(torch.tensor(0.5), torch.tensor(1.0)), 0.0),
    "Exponential": (lambda: torch.distributions.Exponential(torch.tensor(2.0)), 0.0),
    "LogNormal": (lambda: torch.distributions.LogNormal(torch.tensor(0.0), torch.tensor(1.0)), 0.0),
    "Normal": (lambda: torch.distributions.Normal(torch.tensor(0.5), torch.tensor(1.0)), -torch.inf),
    "Uniform": (lambda: torch.distributions.Uniform(torch.tensor(0.0), torch.tensor(3.0)), 0.0),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_a_mass_at_zero_beside_a_density(name):
    make, low = DENSITIES[name]
    gate = torch.tensor(-0.3, requires_grad=True)
    fn = D.ZeroInflated(make(), gate)
    zero = fn.log_prob(torch.tensor(0.0))
    assert float(zero) == pytest.approx(math.log(1 / (1 + math.exp(0.3))), rel=1e-6)
    zero.backward()
    assert float(gate.grad) == pytest.approx(1 - 1 / (1 + math.exp(0.3)), rel=1e-5)
    density = lambda x: float(fn.log_prob(torch.tensor(x)).exp())  # noqa: E731
    high = 3.0 if name == "Uniform" else torch.inf
    total = sum(integrate.quad(density, *ends)[0] for ends in ((low, 1.0), (1.0, high)))
    assert total + float(zero.exp()) == pytest.approx(1, abs=1e-4)
    x = fn.expand((20000,)).sample()  # 20,000 draws: a share off by 0.02 has p < 1e-7
    assert abs(float((x == 0).double().mean()) - float(zero.exp())) < 0.02
    with pytest.raises(NotImplementedError, match=r"mode .*\.sample"):
        _ = fn.mode
    if low == 0:
        with pytest.raises(ValueError, match="within the support"):
            D.ZeroInflated(make(), gate.detach(), validate_args=True).log_prob(torch.tensor(-1.0))


def test_the_variance_of_a_table_is_that_of_its_columns() -> None:
    fn = build("Columns")
    rate, p = torch.tensor([-2.0, -1.0, 0.0]).double().exp(), torch.tensor([0.3, -1.0, 2.0]).double().sigmoid()
    assert fn.variance.shape == fn.shape()
    assert bool(fn.variance[:, 0].isnan().all())  # codes of categories
    torch.testing.assert_close(fn.variance[:, 1:], torch.stack([rate, p * (1 - p)], -1))
