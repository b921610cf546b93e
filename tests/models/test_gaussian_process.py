"""Sequences whose latents are Gaussian processes, with times missing, against multivariate normals."""

from __future__ import annotations

import functools
import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppvae import VAE, check, data, fit, generate, likelihoods, log_marginal, nn, objectives, posteriors, priors, terms
from ppvae.errors import ContractError, DataError
from ppvae.evaluation import impute
from ppvae.inference.svi import SVI
from ppvae.models import GaussianProcessVAE, smoothed, stepwise

pytestmark = pytest.mark.usefixtures("float64")
LATENT, FEATURES, STEPS, NOISE = 2, 3, 6, 0.7
GUIDES = {"smoothed": smoothed, "stepwise": stepwise}
KNOWN = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0]]).bool()
W = torch.tensor([[1.0, 0.5], [-0.5, 1.0], [0.3, 0.0]]).double()
W[2, 1] = -(W[:2, 0] @ W[:2, 1]) / 0.3  # orthogonal columns: p(x_t | z_t) factorises over z_t
BIAS = torch.tensor([0.3, -0.2, 0.1]).double()


class Factor(torch.nn.Module):
    """What p(x_t | z_t) = N(x_t; W z_t + b, NOISE^2 I) says of z_t: alone, or with the prior N(0, I) at that time."""

    def __init__(self, prior: float):
        super().__init__()
        self.prior = prior

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        precision = W.square().sum(0) / NOISE**2 + self.prior
        loc = (x - BIAS) @ W / NOISE**2 / precision
        return dist.Normal(loc, precision.rsqrt().expand(loc.shape)).to_event(1)


def linear(steps: Any = smoothed, lengthscale: float = 1.5, prior: float = 0.0) -> GaussianProcessVAE:
    net = torch.nn.Linear(LATENT, FEATURES)
    with torch.no_grad():
        net.weight.copy_(W)
        net.bias.copy_(BIAS)
    process = priors.GaussianProcess(LATENT, lengthscale=lengthscale)
    with torch.no_grad():
        process.log_lengthscale[1] += 0.5
    return GaussianProcessVAE(process, likelihoods.Normal(net, scale=NOISE), Factor(prior), steps)


def deep(steps: Any = smoothed, **options: Any) -> GaussianProcessVAE:
    torch.manual_seed(0)
    return GaussianProcessVAE(
        priors.GaussianProcess(LATENT, lengthscale=1.5, **options),
        likelihoods.Normal(nn.mlp(LATENT, FEATURES, hidden=(5,)), scale=NOISE),
        posteriors.DiagonalNormal(nn.mlp(FEATURES, 2 * LATENT, hidden=(5,))),
        steps,
    )


def sequences(known: Tensor = KNOWN) -> Tensor:
    x = torch.randn(4, STEPS, FEATURES, generator=torch.Generator().manual_seed(1)).double()
    return data.with_missing(torch.where(known.unsqueeze(-1), x, torch.nan))


def covariances(pair: GaussianProcessVAE, times: Tensor) -> list[Tensor]:
    """Of each latent dim over the times of one sequence, [T, T]."""
    r = (times[:, None] - times[None]).abs()
    lengths = pair.prior.log_lengthscale.detach().exp()
    return [(-((r / length) ** 2) / 2).exp() + 1e-4 * torch.eye(len(times)) for length in lengths]


def dense(pair: GaussianProcessVAE, times: Tensor) -> dist.MultivariateNormal:
    """p(x) of one sequence under the linear model, over [T * FEATURES]."""
    total = sum(torch.kron(k, torch.outer(W[:, d], W[:, d])) for d, k in enumerate(covariances(pair, times)))
    return dist.MultivariateNormal(BIAS.repeat(len(times)), total + NOISE**2 * torch.eye(len(total)))


def exact(pair: GaussianProcessVAE, x: Tensor, times: Tensor) -> Tensor:
    """log p of what is known of each sequence."""
    rows = [~row.isnan().any(-1) for row in x]
    each = [dense(pair, t[k]).log_prob(row[k].flatten()) for row, t, k in zip(x, times, rows, strict=True)]
    return torch.stack(each)


# -- the linear model is a multivariate normal ------------------------------------------------------------------------


@pytest.mark.parametrize("given", [False, True])
def test_a_linear_model_is_jointly_normal_whatever_is_missing(given):
    pair, x = linear(), sequences().as_subclass(Tensor)
    times = torch.arange(STEPS).double().expand(4, STEPS)
    times = times + torch.rand(4, STEPS) / 2 if given else times
    batch = (data.with_missing(x), times) if given else data.with_missing(x)
    with torch.no_grad():
        est = log_marginal(pair.model, pair.guide, batch, num_particles=30, progress=False, proposal="guide")
    assert float((est.log_px - exact(pair, x, times)).abs().max()) < 1e-6
    assert float((est.elbo - exact(pair, x, times)).abs().max()) < 1e-6  # every draw: the guide is the posterior
    assert bool(est.reliable.all())


def test_importance_sampling_by_a_stepwise_guide_is_right():
    """Within 5 standard errors of 4 data: once in 400,000 draws."""
    pair, x = linear(stepwise, 0.4, prior=1.0), sequences()  # nearly white noise, which the guide suits
    times = torch.arange(STEPS).double().expand(4, STEPS)
    with torch.no_grad():
        est = log_marginal(pair.model, pair.guide, x, num_particles=6000, progress=False, proposal="guide")
    off = (est.log_px - exact(pair, x.as_subclass(Tensor), times)) / est.std_error
    assert bool(est.reliable.all())
    assert float(est.std_error.max()) < 0.1
    assert float(off.abs().max()) < 5


def test_gaps_are_filled_by_regression():
    """E[x_missing | x_known] of the linear model: 5 standard errors of a mean of independent draws."""
    pair, x = linear(), sequences()
    filled = impute(pair.model, pair.guide, x, num_particles=4000, draws=10, progress=False)
    assert bool(filled.estimate.reliable.all())
    times = torch.arange(STEPS).double()
    for row, found, known in zip(x.as_subclass(Tensor), filled.mean, KNOWN, strict=True):
        joint, at = dense(pair, times), known.repeat_interleave(FEATURES)
        gain = torch.linalg.solve(joint.covariance_matrix[at][:, at], joint.covariance_matrix[at][:, ~at]).T
        mean = joint.loc[~at] + gain @ (row.flatten()[at] - joint.loc[at])
        error = 2 / math.sqrt(4000)  # of W z_t, whose variance is at most W W^T
        torch.testing.assert_close(found.flatten()[~at], mean, rtol=0, atol=5 * error)
        torch.testing.assert_close(found.flatten()[at], row.flatten()[at])


# -- guides -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", GUIDES)
def test_a_guide_is_what_it_says(steps):
    """log q less its factors of known times, and less the prior of what it fills in, is one number for all z."""
    pair, x = deep(GUIDES[steps]), sequences()
    t = terms(pair.model, pair.guide, x, 5, values={"z": torch.randn(5, 4, STEPS * LATENT)})
    z = t.guide["z"].value.unflatten(-1, (STEPS, LATENT))
    each = pair.posterior(x.as_subclass(Tensor).nan_to_num()).base_dist.log_prob(z).sum(-1)
    left = t.log_guide - torch.where(KNOWN, each, 0.0).sum(-1) - t.log_prior
    if steps == "smoothed":
        torch.testing.assert_close(left, left[:1].expand(5, 4))
        return
    for i, known in enumerate(KNOWN):
        of_known = sum(
            dist.MultivariateNormal(torch.zeros(int(known.sum())), k[known][:, known]).log_prob(z[:, i, known, d])
            for d, k in enumerate(covariances(pair, torch.arange(STEPS).double()))
        )
        torch.testing.assert_close(left[:, i], -of_known, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", GUIDES)
def test_draws_have_the_guides_moments(steps):
    pair, x = deep(GUIDES[steps]), sequences()
    with torch.no_grad():
        drawn = terms(pair.model, pair.guide, x, 20_000).guide["z"]
    fn = drawn.distribution
    spread = (fn.scale_tril @ fn.scale_tril.mT).diagonal(dim1=-2, dim2=-1).sqrt().mT.flatten(-2)
    assert float((drawn.value.mean(0) - fn.mean).div(spread / 20_000**0.5).abs().max()) < 5
    assert float((drawn.value.std(0) / spread - 1).abs().max()) < 5 / 40_000**0.5


def test_white_noise_is_a_vae_of_each_step():
    def white(r: Tensor) -> Tensor:
        return (r == 0).to(r.dtype)

    pair, x = deep(stepwise, kernel=white, jitter=1e-9), sequences(torch.ones_like(KNOWN)).as_subclass(Tensor)
    plain = VAE(priors.StandardNormal(LATENT), pair.likelihood, pair.posterior)
    t = terms(pair.model, pair.guide, x, 3)
    z = t.guide["z"].value.reshape(3, 4 * STEPS, LATENT)
    other = terms(plain.model, plain.guide, x.flatten(0, 1), 3, values={"z": z})
    for name in ("log_prior", "log_lik", "log_guide", "log_weight"):
        each = getattr(other, name).unflatten(1, (4, STEPS)).sum(-1)
        torch.testing.assert_close(getattr(t, name), each, rtol=1e-6, atol=1e-6)


# -- missing times ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", GUIDES)
def test_missing_times_change_nothing(steps):
    """However many stand before, between or behind, and whatever z is there, the weights are as without them."""
    pair, x = deep(GUIDES[steps]), sequences()
    wide = torch.full((4, STEPS + 3, FEATURES), torch.nan)
    wide[:, 1 : STEPS + 1] = x
    times = torch.arange(STEPS).double().expand(4, STEPS)
    later = torch.cat([torch.full((4, 1), -2.0), times, torch.tensor([[5.5, 9.0]]).expand(4, 2)], 1)
    t = terms(pair.model, pair.guide, (x, times), 3)
    z = 3 * torch.randn(3, 4, STEPS + 3, LATENT)
    z[:, :, 1 : STEPS + 1] = t.guide["z"].value.unflatten(-1, (STEPS, LATENT))
    z[:, :, 1 : STEPS + 1][:, ~KNOWN] += torch.randn(3, int((~KNOWN).sum()), LATENT) / 10
    other = terms(pair.model, pair.guide, (data.with_missing(wide), later), 3, values={"z": z.flatten(-2)})
    for name in ("log_lik", "log_weight"):
        torch.testing.assert_close(getattr(other, name), getattr(t, name), rtol=1e-6, atol=1e-5)


def test_each_sequence_is_as_it_is_alone():
    pair, x = deep(), sequences()
    t = terms(pair.model, pair.guide, x, 3)
    z = t.guide["z"].value.unflatten(-1, (STEPS, LATENT))
    for i, known in enumerate(KNOWN):
        times = torch.arange(STEPS).double()[known][None]
        alone = terms(
            pair.model, pair.guide, (x[i : i + 1, known], times), 3, values={"z": z[:, i : i + 1, known].flatten(-2)}
        )
        torch.testing.assert_close(alone.log_weight[:, 0], t.log_weight[:, i], rtol=1e-6, atol=1e-6)


def test_training_finds_the_lengthscale():
    """Noisy smooth curves: the lengthscale comes near the one that they were drawn with, from one far below."""
    torch.manual_seed(0)
    truth = priors.GaussianProcess(1, lengthscale=3.0)(context=torch.arange(12.0)[None]).sample((200,))
    x = truth.unsqueeze(-1) * torch.tensor([1.0, -1.0]) + 0.3 * torch.randn(200, 12, 2)
    x[torch.rand(200, 12) < 0.3] = torch.nan
    pair = GaussianProcessVAE(
        priors.GaussianProcess(1, lengthscale=0.7),
        likelihoods.Normal(torch.nn.Linear(1, 2), scale=0.3),
        posteriors.DiagonalNormal(torch.nn.Linear(2, 2)),
    )
    fit(
        pair.model, pair.guide, data.with_missing(x), objective=objectives.ELBO(), epochs=40, batch_size=50,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.03), progress=False,
    )  # fmt: skip
    assert 2.2 < float(pair.prior.log_lengthscale.detach().exp()) < 4.0


# -- positions --------------------------------------------------------------------------------------------------------


def test_positions_that_show_as_shared_give_the_densities_of_those_that_do_not():
    pair = deep()
    times = torch.linspace(0, 4, STEPS).expand(4, STEPS)
    for shared in (times, times[:1], times.clone()):
        assert pair.prior(context=shared).batch_shape == ()
    near = times.clone()
    near[0, 0] += 1e-9
    assert pair.prior(context=near).batch_shape == (4,)
    z = torch.randn(4, STEPS * LATENT)
    one, each = (pair.prior(context=t).log_prob(z) for t in (times, near))
    torch.testing.assert_close(one, each, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("layout", "kernels"), [("one row", "graph"), ("expanded", "graph"), ("each its own", "eager")]
)
def test_steps_are_captured_where_positions_show_as_shared(layout, kernels):
    x = torch.where(sequences().isnan(), torch.zeros(()).double(), sequences()).as_subclass(Tensor)
    times = torch.arange(STEPS).double().expand(4, STEPS)
    batch = (x,) if layout == "one row" else (x, times if layout == "expanded" else times + torch.rand(4, STEPS) / 2)
    ends = []
    for wanted in ("eager", "graph"):
        pair = deep()
        svi = SVI(pair.model, pair.guide, functools.partial(torch.optim.Adam, lr=1e-2), objectives.ELBO())
        svi.use(wanted)
        torch.manual_seed(3)
        ends.append([svi.step(*batch) for _ in range(6)] + [p.detach() for p in pair.parameters()])
    assert svi.kernels == kernels
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*ends, strict=True))


def test_fit_keeps_one_row_of_positions_in_memory():
    x, seen = sequences(torch.ones_like(KNOWN)), []
    times = torch.arange(STEPS).double().expand(4, STEPS)
    pair = deep()

    def model(x, times):
        seen.append(times)
        return pair.model(x, times)

    fit(model, pair.guide, (x, times), epochs=1, batch_size=2, progress=False)
    batches = [t for t in seen if len(t) == 2]
    assert len(batches) > 1
    assert all(t.stride(0) == 0 and torch.equal(t, times[:2]) for t in batches)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("use", "words"), [
    (lambda p, d: terms(p.model, p.guide, d, 2), "x: expected 1 to 6 known times of each sequence, found 0 at row 2"),
    (lambda p, d: check(p.model, p.guide, d), "row 2 has no value that is not missing"),
])  # fmt: skip
def test_a_sequence_of_length_0_is_refused_by_its_row(use, words):
    x = sequences().as_subclass(Tensor).clone()
    x[2] = torch.nan
    with pytest.raises(DataError, match=words):
        use(deep(), x)
    with pytest.raises(DataError, match="row 2"):
        data.with_missing(x)


def test_what_does_not_fit_is_refused():
    pair, x = deep(), sequences(torch.ones_like(KNOWN)).as_subclass(Tensor)
    with pytest.raises(DataError, match=r"times: expected \[4, 6\], as x has, found \[4, 5\]"):
        check(pair.model, pair.guide, (x, torch.zeros(4, 5)))
    with pytest.raises(DataError, match=r"x: expected sequences \[batch, T, \*event\], found \[4, 6\]"):
        check(pair.model, pair.guide, x[..., 0])
    pair.prior = priors.StandardNormal(STEPS * LATENT)
    with pytest.raises(ContractError, match="prior: expected a Gaussian process, found Independent"):
        check(pair.model, pair.guide, x)


def test_filled_curves_have_the_shape_of_the_data():
    pair, x = deep(), sequences()
    assert generate.reconstructions(pair.model, pair.guide, x).shape == x.shape
    assert bool(generate.reconstructions(pair.model, pair.guide, x).isfinite().all())
    assert generate.samples(pair.model, pair.guide, x, count=3).shape == (3, STEPS, FEATURES)
