"""One posterior over several latents: exact on a Gaussian pair of two sites, right on other supports, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppvae import check, fit, log_marginal, nn, objectives, posteriors, terms
from ppvae.errors import ContractError
from ppvae.models import JointPosterior

pytestmark = pytest.mark.usefixtures("float64")
A, B = 1.0, 0.2  # z1 = z2 + A noise, x = z1 + z2 + B noise


def chain(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        z1 = pyro.sample("z1", dist.Normal(z2[..., 0], A))
        pyro.sample("x", dist.Normal(z1 + z2[..., 0], B), obs=x[:, 0])


class Exact(torch.nn.Module):
    """The posterior of (z2, z1) given x in closed form."""

    def forward(self, x: Tensor) -> dist.MultivariateNormal:
        prior = torch.tensor([[1.0, 1.0], [1.0, 1.0 + A**2]])
        gain = prior @ torch.ones(2)
        spread = gain.sum() + B**2
        loc = gain * x / spread
        return dist.MultivariateNormal(loc, prior - torch.outer(gain, gain) / spread)


def log_px(x: Tensor) -> Tensor:
    return dist.Normal(0.0, (4 + A**2 + B**2) ** 0.5).log_prob(x[:, 0])


def test_equal_weights_under_the_exact_posterior():
    """Both latents are images of one correlated draw, and each weight is p(x) itself."""
    x = torch.randn(6, 1)
    pair = JointPosterior(chain, lambda size: Exact(), x)
    assert pair.size == 2
    t = terms(pair.model, pair.guide, x, 7)
    torch.testing.assert_close(t.log_weight, log_px(x).expand(7, 6))
    est = log_marginal(pair.model, pair.guide, x, num_particles=50, progress=False, proposal="guide")
    torch.testing.assert_close(est.log_px, log_px(x))


FAMILIES: dict[str, Callable[[int], torch.nn.Module]] = {
    "SplineCoupling": lambda d: posteriors.SplineCoupling(nn.mlp(1, 2 * d + 4, hidden=(8,)), d, 4, hidden=(8,)),
    "FullRank": lambda d: posteriors.FullRank(nn.mlp(1, posteriors.FullRank.outputs(d), hidden=(8,))),
    "IAF": lambda d: posteriors.IAF(nn.mlp(1, 2 * d + 4, hidden=(8,)), d, 4, hidden=(8,)),
}


@pytest.mark.parametrize("name", [pytest.param("SplineCoupling", marks=pytest.mark.slow), "FullRank", "IAF"])
def test_flows_and_other_families(name: str):
    """The gap is under half of that of independent latents at their best, -0.5 log(1 - r^2) = 0.86 nats."""
    torch.manual_seed(0)
    x = torch.randn(200, 1) * 2
    pair = JointPosterior(chain, FAMILIES[name], x[:5]).double()
    assert "guide site 'joint_latent': auxiliary" in str(check(pair.model, pair.guide, x[:5]))
    run = fit(
        pair.model, pair.guide, x, epochs=60, progress=False, compile=False, objective=objectives.ELBO(5),
        optimizer=lambda ps: torch.optim.Adam(ps, lr=0.03),
    )  # fmt: skip
    est = log_marginal(run.model, run.guide, x[:50], num_particles=2000, progress=False, proposal="guide")
    assert bool(((est.log_px - log_px(x[:50])).abs() < 5 * est.std_error)[est.reliable].all())  # 3e-5 by chance
    covariance = Exact()(x[:1]).covariance_matrix[0]
    correlation = covariance[0, 1] ** 2 / (covariance[0, 0] * covariance[1, 1])
    independent = 0.5 * float((1 - correlation).log())
    gap = float((est.elbo - log_px(x[:50])).mean())
    assert gap > independent / 2


def test_latents_on_other_supports():
    """A scale and proportions are images of real numbers; log p(x) by a guide of each alone is the same."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            scale = pyro.sample("scale", dist.Gamma(torch.tensor(3.0), 3.0))
            share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Normal(share, scale.unsqueeze(-1)).to_event(1), obs=x)

    def prior(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("scale", dist.Gamma(torch.tensor(3.0), 3.0))
            pyro.sample("share", dist.Dirichlet(torch.ones(3)))

    torch.manual_seed(0)
    x = torch.rand(5, 3)
    pair = JointPosterior(model, lambda d: posteriors.DiagonalNormal(nn.mlp(3, 2 * d)), x).double()
    assert pair.size == 3
    ours = log_marginal(pair.model, pair.guide, x, num_particles=5000, progress=False, proposal="guide")
    theirs = log_marginal(model, prior, x, num_particles=5000, progress=False, proposal="guide")
    error = (ours.std_error**2 + theirs.std_error**2).sqrt()
    assert bool(((ours.log_px - theirs.log_px).abs() < 5 * error).all())  # one of 3e5 runs by chance


ROWS = torch.tensor([[1.0, 0.5, 0.0, 0.0], [1.0, 0.0, 0.5, 0.0], [1.0, 0.0, 0.0, 0.5]]).double()  # x of (z, noise)


class ExactOfPlates(torch.nn.Module):
    """The posterior of (z, w_1, w_2, w_3) given x in closed form, w_i = z + 0.5 noise and x_i = w_i + B noise."""

    def forward(self, x: Tensor) -> dist.MultivariateNormal:
        latents = torch.cat([torch.eye(4)[:1], ROWS])
        prior = latents @ latents.T
        gain = prior[:, 1:] @ torch.linalg.inv(prior[1:, 1:] + B**2 * torch.eye(3))
        return dist.MultivariateNormal(x @ gain.T, prior - gain @ prior[1:])


def plates(x: Tensor) -> None:
    data, features = pyro.plate("data", len(x), dim=-1), pyro.plate("features", 3, dim=-2)
    with data:
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        with features:
            w = pyro.sample("w", dist.Normal(z, 0.5))
            pyro.sample("x", dist.Normal(w, B), obs=x.T)


def test_equal_weights_under_the_exact_posterior_of_plates():
    x = torch.randn(6, 3)
    pair = JointPosterior(plates, lambda size: ExactOfPlates(), x)
    assert pair.size == 4
    covariance = ROWS @ ROWS.T + B**2 * torch.eye(3)
    exact = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x)
    t = terms(pair.model, pair.guide, x, 7)
    torch.testing.assert_close(t.log_weight, exact.expand(7, 6))
    est = log_marginal(pair.model, pair.guide, x, num_particles=50, posterior_draws=5, progress=False, proposal="guide")
    torch.testing.assert_close(est.log_px, exact)
    assert est.posterior is not None
    assert est.posterior["w"].numel() == 5 * 3 * 6


def test_latents_in_plates_of_different_depth():
    """Positive scales and simplexes in two plates, one in each; against importance sampling from the prior."""

    def model(x: Tensor) -> None:
        data = pyro.plate("data", len(x), dim=-1)
        rows, cols = pyro.plate("rows", 2, dim=-2), pyro.plate("cols", 3, dim=-3)
        with data:
            with cols:
                scale = pyro.sample("scale", dist.Gamma(torch.tensor(3.0), 3.0))
            with rows:
                share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
            with rows, cols:
                pyro.sample("x", dist.Normal(3 * share[..., 0], scale), obs=x.permute(2, 1, 0))

    def prior(x: Tensor) -> None:
        data = pyro.plate("data", len(x), dim=-1)
        with data:
            with pyro.plate("cols", 3, dim=-3):
                pyro.sample("scale", dist.Gamma(torch.tensor(3.0), 3.0))
            with pyro.plate("rows", 2, dim=-2):
                pyro.sample("share", dist.Dirichlet(torch.ones(3)))

    torch.manual_seed(0)
    x = torch.randn(4, 2, 3)
    pair = JointPosterior(model, lambda d: Wide(d), x)
    assert pair.size == 3 + 2 * 2
    ours = log_marginal(pair.model, pair.guide, x, num_particles=20_000, progress=False, proposal="guide")
    theirs = log_marginal(model, prior, x, num_particles=20_000, progress=False, proposal="guide")
    error = (ours.std_error**2 + theirs.std_error**2).sqrt()
    assert bool(((ours.log_px - theirs.log_px).abs() < 5 * error).all())  # one of 4e5 runs by chance


class Wide(torch.nn.Module):
    """A broad normal of the free coordinates, whatever the data."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        return dist.Normal(torch.zeros(len(x), self.size), 1.3).to_event(1)


def test_refusals():
    def make(latent: Any, inner: int = 0, where: str = "data") -> Any:
        def model(x: Tensor) -> None:
            with pyro.plate(where, len(x)):
                if inner:
                    with pyro.plate("inner", inner, subsample_size=2):
                        pyro.sample("z", latent)
                else:
                    pyro.sample("z", latent)
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[:, 0])

        return model

    def shared(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[:, 0])

    x, flow = torch.randn(4, 1), FAMILIES["FullRank"]
    normal = dist.Normal(0.0, 1.0)
    for model in (make(normal, inner=3), shared):
        with pytest.raises(ContractError, match="site 'z': expected a latent in one plate over the 4 data"):
            JointPosterior(model, flow, x)
    for fn in (dist.Bernoulli(0.5), dist.Uniform(torch.zeros(4), torch.arange(1.0, 5))):
        with pytest.raises(ContractError, match="site 'z': expected a continuous latent with a support of its own"):
            JointPosterior(make(fn), flow, x)
    with pytest.raises(ContractError, match="expected latents in one plate"):
        JointPosterior(lambda x: pyro.sample("x", normal.expand([4]).to_event(1), obs=x[:, 0]), flow, x)
    wrong = JointPosterior(make(normal), lambda d: FAMILIES["FullRank"](2), x)
    with pytest.raises(ContractError, match="expected one over the 1 unconstrained numbers of z, found event shape"):
        wrong.double().guide(x)
