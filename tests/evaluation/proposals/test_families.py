"""Proposals fitted to latents of every kind, in one to three dims: against quadrature, enumeration and closed forms."""

from __future__ import annotations

import math
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppvae import data, log_marginal
from ppvae.errors import ContractError
from ppvae.evaluation import quadrature
from ppvae.evaluation.annealing.fitted_start import FittedStart
from ppvae.evaluation.blocks import start_evaluation
from ppvae.evaluation.proposals import fit
from ppvae.evaluation.proposals.densities import Elliptical, LowRank
from ppvae.evaluation.proposals.log_weights import RefinedProposal
from ppvae.models import LinearGaussian

pytestmark = pytest.mark.usefixtures("float64")


def agrees(est, exact, nats=0.05):
    """No datum is off by six standard errors, nor by more than so many nats."""
    error = (est.log_px - exact).abs()
    assert float((error / est.std_error.clamp(min=1e-6)).max()) < 6
    assert float(error.max()) < nats


def draws(model, guide, x, **settings):
    return log_marginal(model, guide, x, **{"num_particles": 2000, "proposal": "refined", **settings})


def test_latents_on_a_circle():
    """A direction of which a noisy x is seen; log p(x) by the trapezoid rule over the angle."""
    angle = torch.arange(2000) * (2 * math.pi / 2000)
    points = torch.stack([angle.cos(), angle.sin()], -1)

    class Uniform(dist.TorchDistribution):
        """Uniform on the circle."""

        arg_constraints: ClassVar[dict] = {}
        support = dist.constraints.sphere
        has_rsample = True

        def __init__(self, shape=()):
            super().__init__(torch.Size(shape), torch.Size((2,)), validate_args=False)

        def expand(self, shape, _instance=None):
            return Uniform(shape)

        def rsample(self, sample_shape=()):
            z = torch.randn(*sample_shape, *self.batch_shape, 2)
            return z / z.norm(dim=-1, keepdim=True)

        def log_prob(self, value):
            return torch.full(value.shape[:-1], -math.log(2 * math.pi))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Uniform())
            pyro.sample("x", dist.Normal(z, 0.4).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Uniform())

    x = torch.tensor([[1.0, 0.2], [-0.5, -0.9], [0.0, -1.2], [0.3, 0.1]])
    exact = dist.Normal(points, 0.4).to_event(1).log_prob(x[:, None]).logsumexp(1) - math.log(2000)
    agrees(draws(model, guide, x), exact, 0.15)


def test_a_hierarchy_over_a_half_line():
    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            z = pyro.sample("z", dist.Exponential(rate))
            pyro.sample("x", dist.Normal(z.log(), 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.LogNormal(0.0, 1.0))
            pyro.sample("z", dist.LogNormal(x, 1.0))

    x = torch.linspace(-2.0, 1.5, 8)
    agrees(draws(model, guide, x), quadrature(model, guide, x).log_px)


def test_conditional_pairs_take_several_columns():
    def model(x, label):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(5.0, label, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x, label):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(label, 1.0))

    columns = torch.linspace(-2.0, 3.0, 9), (torch.arange(9) % 3).double()
    agrees(draws(model, guide, columns), quadrature(model, guide, columns).log_px)


def test_missing_values_are_left_out():
    """Two views of one latent, one of them missing now and then: normal in closed form."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            seen = ~x.isnan()
            for i in range(2):
                likelihood = dist.Normal(z, 0.5).mask(seen[:, i])
                pyro.sample(f"x{i}", likelihood, obs=torch.where(seen[:, i], x[:, i], 0.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.nan_to_num(0.0).mean(-1), 0.8))

    x = data.with_missing(torch.tensor([[0.5, 1.0], [torch.nan, -1.0], [2.0, torch.nan]]))
    exact = []
    for row in torch.as_tensor(x).tolist():
        seen = torch.tensor([v for v in row if not math.isnan(v)])
        covariance = torch.ones(len(seen), len(seen)) + 0.25 * torch.eye(len(seen))
        exact.append(dist.MultivariateNormal(torch.zeros(len(seen)), covariance).log_prob(seen))
    agrees(draws(model, guide, x), torch.stack(exact))


def test_an_inner_plate_and_a_discrete_latent_beside_continuous_ones():
    """Two latents a datum and a class that is summed out, against enumeration of closed forms."""
    locs = torch.tensor([-1.0, 2.0])

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + locs[c][..., None], 0.6).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 0.9).to_event(1))

    x = torch.tensor([[0.0, 1.0], [2.0, 3.0], [-2.0, -1.0]])
    by_class = dist.Normal(locs[:, None], 1.36**0.5).log_prob(x[:, None]).sum(-1)
    agrees(draws(model, guide, x), (by_class + torch.tensor([0.3, 0.7]).log()).logsumexp(1))


def test_a_mixture_as_guide_keeps_both_modes():
    """The guide is the best candidate, and is kept; log p(x) in closed form is in tests/evaluation/evidence."""
    from tests.evaluation.evidence.pairs import both_modes_guide, one_mode_guide, two_modes, two_modes_log_px

    x = torch.linspace(1.0, 5.0, 6)
    est = draws(two_modes, both_modes_guide, x)
    agrees(est, two_modes_log_px(x))
    assert bool(est.reliable.all())
    assert not est.diagnostics["family"].any()
    # a guide of one mode: what the defensive share cannot show, the weights of no draw can
    missed = draws(two_modes, one_mode_guide, x)
    torch.testing.assert_close(missed.log_px, two_modes_log_px(x) - math.log(2), atol=0.02, rtol=0)


def planar_pair():
    flow = dist.transforms.planar(2).requires_grad_(False)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(0.8 * x, 0.5).to_event(1), [flow]))

    return model, guide


@pytest.mark.parametrize("settings", [{"proposal": "refined"}, {"method": "auto"}])
def test_a_flow_without_an_inverse_gives_way_to_the_prior(settings):
    model, guide = planar_pair()
    x = torch.tensor([[0.5, -1.0], [2.0, 0.3]])
    est = log_marginal(model, guide, x, num_particles=2000, **settings)
    agrees(est, dist.Normal(0.0, 1.25**0.5).log_prob(x).sum(-1))
    assert "the prior takes the place of the guide: site 'z'" in est.summary()
    assert bool(est.reliable.all())


def test_a_discrete_latent_that_is_sampled_is_refused_by_its_name():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.3))
            z = pyro.sample("z", dist.Normal(3.0 * c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(0.5))
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ContractError, match=r"site 'c'.*discrete.*enumerate"):
        draws(model, guide, torch.zeros(3))


@pytest.mark.parametrize("df", [20.0, math.inf])
def test_a_low_rank_density_is_the_full_rank_one_of_the_same_scale(df):
    factor, diagonal, loc = torch.randn(3, 5, 2), torch.rand(3, 5) + 0.3, torch.randn(3, 5)
    q = LowRank(loc, factor, diagonal, torch.full((3,), df))
    covariance = factor @ factor.mT + torch.diag_embed(diagonal.square())
    full = Elliptical(loc, torch.linalg.cholesky(covariance), q.df)
    u = torch.randn(4, 3, 5)
    torch.testing.assert_close(q.log_prob(u), full.log_prob(u))
    torch.testing.assert_close(q.grad_log_prob(u), full.grad_log_prob(u))
    # covariances of 50,000 draws: entries have a standard error below 0.03
    torch.manual_seed(0)
    for law in (q, full):
        centred = law.sample(50_000) - loc
        found = torch.einsum("knd,kne->nde", centred, centred) / 50_000
        scale = 1.0 if math.isinf(df) else df / (df - 2)
        assert float((found - scale * covariance).abs().max()) < 0.3


def test_many_dims_get_a_low_rank_scale(monkeypatch):
    """As beyond 256 dims, in three: the linear-Gaussian posterior has a scale of this form, and comes out exact."""
    monkeypatch.setattr(fit, "MAX_FULL_RANK_DIMS", 2)
    pair = LinearGaussian(8, 3).double().requires_grad_(False)
    x = 1.5 * torch.randn(10, 8)
    est = draws(pair.model, pair.mean_field, x)
    agrees(est, pair.log_px(x), 0.02)
    assert bool(est.reliable.all())
    with start_evaluation(pair.model, pair.mean_field, x, seed=0) as run:
        start = FittedStart(RefinedProposal(run, run.block(0), 1000))
        v = start.sample_start(4)
        step = torch.zeros_like(v)
        step[..., 1] = 1e-5
        slope = (start(v + step).log_start - start(v - step).log_start) / 2e-5
        torch.testing.assert_close(slope, start(v).grad_start[..., 1], rtol=1e-5, atol=1e-5)


def test_three_hundred_dims_are_annealed_from_a_low_rank_scale():
    """Within 0.5 nats and six standard errors of the closed form, where the guide's weights say nothing."""
    pair = LinearGaussian(10, 300).double().requires_grad_(False)
    x = 10 * torch.randn(2, 10)
    est = log_marginal(pair.model, pair.mean_field, x, num_particles=500, method="auto")
    agrees(est, pair.log_px(x), 0.5)
    assert set(est.diagnostics["family"].tolist()) <= {0, 3, 4}
