"""Mixtures of posteriors: stratified draws, a two-mode posterior weighed right, refusals."""

from __future__ import annotations

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppvae import fit, log_marginal, objectives, posteriors
from ppvae.distributions.mixture import StratifiedMixture
from ppvae.errors import ContractError
from ppvae.inference.param_store import ParamScope
from tests.laws.parts import net

pytestmark = pytest.mark.usefixtures("float64")
PRIOR, NOISE = dist.Normal(0.4, 1.0), 0.2  # of x = z^2 + noise: modes at the roots, the positive one is larger


def normals(*locs: float) -> list[dist.TorchDistribution]:
    return [dist.Normal(torch.tensor([loc]), 1.0).to_event(1) for loc in locs]


@pytest.mark.parametrize("weights", [[1.0, 1.0, 2.0], [0.0, 0.3, 0.7]])
def test_each_component_gets_its_share(weights: list[float]):
    """Counts of components over K draws are K w to within one; a place has each component as often as its weight."""
    fn = StratifiedMixture(normals(0.0, 100.0, 200.0), torch.tensor(weights)).expand([3, 5])
    torch.manual_seed(0)
    which = (fn.rsample((20,))[..., 0] / 100).round()
    share = torch.tensor(weights) / sum(weights)
    for m in range(3):
        assert float(((which == m).sum(0) - 20 * share[m]).abs().max()) <= 1 + 1e-9
    many = torch.stack([(fn.rsample((4,))[0, 0, 0, 0] / 100).round() for _ in range(4000)])
    found = many.long().bincount(minlength=3) / 4000
    assert bool(((found - share).abs() < 5 * (share * (1 - share) / 4000).sqrt() + 1e-9).all())  # 2e-6 by chance


def test_stratified_draws_have_less_noise():
    """The variance of a mean over 8 draws is that within components, here 1 of 1 + 100^2 / 4."""
    fn = StratifiedMixture(normals(0.0, 100.0)).expand([8, 2000])
    torch.manual_seed(0)
    assert float(fn.sample().mean(0).var() * 8) == pytest.approx(1.0, rel=0.2)  # 6 standard errors


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", PRIOR)
        pyro.sample("x", dist.Normal(z**2, NOISE), obs=x)


def guide(x: Tensor) -> None:
    root = x.clamp(min=0.3).sqrt().unsqueeze(-1)
    scale = NOISE / (2 * root)
    wide = dist.StudentT(4.0, root, 2 * scale).to_event(1)  # a family of its own
    fn = StratifiedMixture([dist.Normal(-root, 1.5 * scale).to_event(1), wide])
    with pyro.plate("data", len(x)):
        pyro.sample("z", Unvector(fn))


class Unvector(dist.TorchDistribution):
    """A distribution of one-element vectors as one of numbers."""

    support, has_rsample = dist.constraints.real, True

    def __init__(self, fn: StratifiedMixture):
        self.fn = fn
        super().__init__(fn.batch_shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Unvector(self.fn.expand(batch_shape))

    def rsample(self, sample_shape=()):
        return self.fn.rsample(sample_shape).squeeze(-1)

    def log_prob(self, value):
        return self.fn.log_prob(value.unsqueeze(-1))


def exact(x: Tensor) -> tuple[Tensor, Tensor]:
    """(log p(x), P(z > 0 | x)) by quadrature, [N]."""
    z = torch.linspace(-8, 8, 400_001)
    log_joint = PRIOR.log_prob(z) + dist.Normal(z**2, NOISE).log_prob(x[:, None])
    log_px = log_joint.logsumexp(1) + (z[1] - z[0]).log()
    return log_px, log_joint.softmax(1)[:, z > 0].sum(1)


def test_a_posterior_of_two_modes_is_weighed_right():
    x = torch.tensor([0.8, 1.5, 3.0, 5.0]).repeat_interleave(10)
    log_px, positive = exact(x)
    assert float(positive.min()) > 0.6
    est = log_marginal(model, guide, x, num_particles=2000, posterior_draws=200, progress=False, proposal="guide")
    assert bool(est.reliable.all())
    assert bool(((est.log_px - log_px).abs() < 5 * est.std_error).all())  # one of 4e4 runs by chance
    assert est.posterior is not None
    share = (est.posterior["z"] > 0).double().mean(0)
    assert float((share - positive).abs().max()) < 0.2  # 6 standard errors of 200 draws


def test_the_multiple_importance_sampling_bound():
    """The mean ELBO of two components, (1/2) sum_m E_m[log p - log q], lies above that of the larger mode alone."""
    x = torch.tensor([1.5])
    torch.manual_seed(0)
    scale = NOISE / (2 * x.sqrt())
    modes = [dist.Normal(sign * x.sqrt().unsqueeze(-1), scale.unsqueeze(-1)).to_event(1) for sign in (-1, 1)]
    bounds = {}
    for name, fn in (("both", StratifiedMixture(modes)), ("larger", StratifiedMixture([modes[1], modes[1]]))):

        def of(x: Tensor, fn: StratifiedMixture = fn) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", Unvector(fn))

        bounds[name] = float(-objectives.ELBO(num_particles=4000).loss(model, of, x))
    assert bounds["larger"] + 0.1 < bounds["both"] < float(exact(x)[0])


# -- weights that are trained -----------------------------------------------------------------------------------------

LOGITS = torch.tensor([[0.0, 0.0, 0.0], [1.0, -0.5, 0.3], [-4.0, 2.0, 0.0]]).double()  # [batch, components]


def test_density_of_weights_of_each_datum():
    fn = StratifiedMixture(normals(0.0, 1.0, 2.0), logits=LOGITS)
    z = torch.randn(4, 3, 1)
    assert fn.batch_shape == (3,)
    expected = sum(LOGITS.softmax(-1)[:, m] * dist.Normal(float(m), 1.0).log_prob(z[..., 0]).exp() for m in range(3))
    torch.testing.assert_close(fn.log_prob(z), expected.log())
    torch.testing.assert_close(fn.mean[:, 0], LOGITS.softmax(-1) @ torch.tensor([0.0, 1.0, 2.0]))


def test_each_component_gets_its_share_of_each_datum():
    fn = StratifiedMixture(normals(0.0, 100.0, 200.0), logits=LOGITS).expand([20, 3])
    torch.manual_seed(0)
    with torch.no_grad():
        which = (fn.sample()[..., 0] / 100).round()
        first = (torch.stack([fn.sample()[0, :, 0] for _ in range(4000)]) / 100).round()
    for m in range(3):
        assert float(((which == m).sum(0) - 20 * LOGITS.softmax(-1)[:, m]).abs().max()) <= 1 + 1e-9
    for m in range(3):  # 2e-6 by chance for each of 9
        share = LOGITS.softmax(-1)[:, m]
        found = (first == m).double().mean(0)
        assert bool(((found - share).abs() < 5 * (share * (1 - share) / 4000).sqrt() + 1e-9).all())


@pytest.mark.parametrize("objective", [objectives.ELBO(4, gradient="vimco"), objectives.ELBO(4, gradient="vargrad")])
def test_gradient_of_weights(objective: objectives.ELBO):
    """The mean over 30,000 data of one kind is the derivative by quadrature, within 5 standard errors."""
    logits, loc = torch.tensor([0.4, -0.2], requires_grad=True), torch.tensor([-0.8, 1.2], requires_grad=True)
    x = torch.full((30_000,), 1.5)
    of_each = {name: t.detach().expand(len(x), 2).clone() for name, t in (("logits", logits), ("loc", loc))}

    def q(logits: Tensor, loc: Tensor) -> StratifiedMixture:
        parts = [dist.Normal(at.unsqueeze(-1), 0.3).to_event(1) for at in loc.unbind(-1)]
        return StratifiedMixture(parts, logits=logits)

    class Score(Unvector):
        has_rsample = False

        def expand(self, batch_shape, _instance=None):
            return Score(self.fn.expand(batch_shape))

        def sample(self, sample_shape=()):
            return self.fn.sample(sample_shape).squeeze(-1)

    def of(x: Tensor) -> None:
        each = [pyro.param(name, start) for name, start in of_each.items()]
        with pyro.plate("data", len(x)):
            pyro.sample("z", Score(q(*each)))

    z = torch.linspace(-6, 6, 20_001)
    log_q = q(logits, loc).log_prob(z[:, None])
    log_joint = PRIOR.log_prob(z) + dist.Normal(z**2, NOISE).log_prob(x[0])
    exact = torch.autograd.grad((log_q.exp() * (log_joint - log_q)).sum() * (z[1] - z[0]), (logits, loc))
    torch.manual_seed(0)
    with ParamScope().entered():
        objective.loss_and_grads(model, of, x)
        grads = [-pyro.get_param_store()._params[name].grad for name in of_each]
    for found, expected in zip(grads, exact, strict=True):
        assert bool(((found.mean(0) - expected).abs() < 5 * found.std(0) / len(x) ** 0.5).all())


@pytest.mark.parametrize("weights", ["learned", "network"])
def test_training_of_weights(weights: str):
    """Two components at fixed places find the shares of two modes; the pathwise gradient is refused by its name."""
    torch.manual_seed(0)
    at = [torch.nn.Linear(1, 2), torch.nn.Linear(1, 2)]
    for network, mean in zip(at, (-2.0, 2.0), strict=True):
        torch.nn.init.zeros_(network.weight)
        with torch.no_grad():
            network.bias.copy_(torch.tensor([mean, -0.5]))
        network.requires_grad_(False)
    logits = "learned" if weights == "learned" else torch.nn.Linear(1, 2)
    posterior = posteriors.Mixture([posteriors.DiagonalNormal(network) for network in at], weights=logits)
    modes = StratifiedMixture(
        [dist.Normal(torch.tensor([m]), torch.tensor(-0.5).exp()).to_event(1) for m in (-2.0, 2.0)],
        torch.tensor([0.2, 0.8]),
    )

    def prior(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", modes)
            pyro.sample("x", dist.Normal(torch.zeros(1), 1.0).to_event(1), obs=x)

    def of(x: Tensor) -> None:
        pyro.module("posterior", posterior)
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x))

    x = torch.randn(200, 1)
    run = fit(
        prior, of, x, objective=objectives.ELBO(4, gradient="vargrad"), epochs=30, batch_size=50, seed=0,
        optimizer=functools.partial(torch.optim.Adam, lr=0.05),
    )  # fmt: skip
    share = posterior(x).log_weight.detach().exp()[..., 1]
    assert float((share - 0.8).abs().mean()) < 0.05
    est = log_marginal(run.model, run.guide, x[:20], num_particles=100, progress=False, proposal="guide")
    torch.testing.assert_close(est.log_px, dist.Normal(0.0, 1.0).log_prob(x[:20, 0]), atol=0.02, rtol=0)
    with pytest.raises(ContractError, match=r"site 'z'.*reparameterised"):
        objectives.ELBO(4).loss_and_grads(prior, of, x)


def test_refusals():
    with pytest.raises(ValueError, match="two or more posteriors"):
        posteriors.Mixture([posteriors.DiagonalNormal(net(4))])
    with pytest.raises(ValueError, match="one event shape and support"):
        StratifiedMixture([*normals(0.0), dist.Normal(torch.zeros(2), 1.0).to_event(1)])
    with pytest.raises(ValueError, match="Delta, a point mass"):
        StratifiedMixture([*normals(0.0), dist.Delta(torch.zeros(1), event_dim=1)])
    with pytest.raises(ValueError, match="constant weights"):
        StratifiedMixture(normals(0.0, 1.0), torch.ones(2, requires_grad=True))
    with pytest.raises(ValueError, match="weights: expected 'equal', 'learned' or a network of logits, found 'free'"):
        posteriors.Mixture([posteriors.DiagonalNormal(net(4)), posteriors.DiagonalNormal(net(4))], weights="free")
    with pytest.raises(ValueError, match=r"logits: expected \[..., 2\], one a component"):
        StratifiedMixture(normals(0.0, 1.0), logits=torch.zeros(4, 3))
