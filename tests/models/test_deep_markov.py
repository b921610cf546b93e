"""Deep Markov models: a linear one against a Kalman filter, and sequences of different lengths."""

from __future__ import annotations

import functools
import math

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppvae import check, fit, generate, likelihoods, log_marginal, nn, objectives, posteriors, terms
from ppvae.errors import DataError
from ppvae.evaluation import annealed, gaps
from ppvae.inference import simulate
from ppvae.models import DeepMarkovModel

pytestmark = pytest.mark.usefixtures("float64")
LATENT, FEATURES, STEPS = 2, 3, 6
LENGTHS = torch.tensor([6, 3, 1, 5])


def deep() -> DeepMarkovModel:
    torch.manual_seed(0)
    return DeepMarkovModel(
        LATENT,
        posteriors.DiagonalNormal(nn.mlp(LATENT, 2 * LATENT, hidden=(5,))),
        likelihoods.Normal(nn.mlp(LATENT, FEATURES, hidden=(5,)), scale=0.7),
        nn.Backward(torch.nn.GRU(FEATURES, 6, batch_first=True)),
        posteriors.DiagonalNormal(nn.mlp(LATENT + 6, 2 * LATENT, hidden=(5,))),
    )


def padded(rows: int = 4) -> Tensor:
    known = torch.arange(STEPS) < LENGTHS[:, None]
    return torch.where(known[..., None], torch.randn(rows, STEPS, FEATURES), 0.0)


# -- the linear model is a Kalman filter's ----------------------------------------------------------------------------

A = torch.tensor([[0.9, 0.2], [-0.3, 0.7]]).double()
C = torch.tensor([[1.0, 0.5], [0.0, 1.2], [-0.7, 0.3]]).double()
Z0 = torch.tensor([0.5, -1.0]).double()
Q, R = 0.6**2, 0.8**2


def kalman(x: Tensor, length: int) -> Tensor:
    """log p(x_1 .. x_length) of one sequence by the filter: predict, compare, update (Kalman 1960)."""
    mean, cov, total = Z0, torch.zeros(2, 2), torch.zeros(())
    for t in range(length):
        mean, cov = A @ mean, A @ cov @ A.T + Q * torch.eye(2)
        spread = C @ cov @ C.T + R * torch.eye(3)
        total = total + torch.distributions.MultivariateNormal(C @ mean, spread).log_prob(x[t])
        gain = cov @ C.T @ torch.linalg.inv(spread)
        mean, cov = mean + gain @ (x[t] - C @ mean), cov - gain @ C @ cov
    return total


class Information(torch.nn.Module):
    """What p(z_t | z_(t-1), x_t .. x_n) is made of, from the end backwards: its precision and the linear term of x."""

    def forward(self, x: Tensor, *, context: Tensor) -> Tensor:
        batch, steps, _ = x.shape
        later, term = torch.zeros(batch, 2, 2), torch.zeros(batch, 2)
        out = []
        for t in reversed(range(steps)):
            known = (t < context)[:, None]
            precision = torch.eye(2) / Q + C.T @ C / R + later
            linear = x[:, t] @ C / R + term
            out.append(torch.cat([precision.flatten(1), linear], -1))
            inverse = torch.linalg.inv(precision)
            later = torch.where(known[..., None], A.T @ (torch.eye(2) / Q - inverse / Q**2) @ A, 0.0)
            term = torch.where(known, (inverse @ linear[..., None])[..., 0] @ A / Q, 0.0)
        return torch.stack(out[::-1], 1)


class Exact(torch.nn.Module):
    """p(z_t | z_(t-1), x_t .. x_n), given z_(t-1) and its information."""

    def forward(self, inputs: Tensor) -> dist.TorchDistribution:
        z, precision, linear = inputs.split([2, 4, 2], -1)
        precision = precision.unflatten(-1, (2, 2))
        loc = torch.linalg.solve(precision, (z @ A.T / Q + linear)[..., None])[..., 0]
        return dist.MultivariateNormal(loc, precision_matrix=precision)


def linear() -> DeepMarkovModel:
    transition, emission = torch.nn.Linear(2, 4), torch.nn.Linear(2, 3)
    with torch.no_grad():
        transition.weight.copy_(torch.cat([A, torch.zeros(2, 2)]))
        transition.bias.copy_(torch.cat([torch.zeros(2), torch.full((2,), Q).log() / 2]))
        emission.weight.copy_(C)
        emission.bias.zero_()
    pair = DeepMarkovModel(
        2, posteriors.DiagonalNormal(transition), likelihoods.Normal(emission, scale=R**0.5), Information(), Exact()
    )
    with torch.no_grad():
        pair.start.value.copy_(Z0)
        pair.guide_start.value.copy_(Z0)
    return pair


def test_a_linear_model_is_a_kalman_filter():
    pair, x = linear(), padded()
    exact = torch.stack([kalman(row, int(n)) for row, n in zip(x, LENGTHS, strict=True)])
    with torch.no_grad():
        est = log_marginal(pair.model, pair.guide, (x, LENGTHS), num_particles=30, progress=False, proposal="guide")
    assert float((est.log_px - exact).abs().max()) < 1e-6
    assert float((est.elbo - exact).abs().max()) < 1e-6
    assert bool(est.reliable.all())


@pytest.mark.parametrize("method", ["guide", "refined", "particle_filter", "annealed"])
def test_padding_is_no_dim(method):
    """Exactly: dims are the numbers of the steps before the ends, and bits per dim are divided by them."""
    pair, data = linear(), (padded(), LENGTHS)
    if method == "annealed":
        est = annealed(pair.model, pair.guide, data, num_chains=2, num_temperatures=2, progress=False)
    elif method == "particle_filter":
        est = log_marginal(pair.model, pair.guide, data, num_particles=300, method=method, progress=False)
        assert est.ess_by_step is not None
        assert torch.equal(est.ess_by_step.isnan(), torch.arange(STEPS) >= LENGTHS[:, None])
    else:
        est = log_marginal(pair.model, pair.guide, data, num_particles=30, proposal=method, progress=False)
    dims = float(LENGTHS.double().mean()) * 3
    assert est.dims == pytest.approx(dims, abs=1e-12)
    assert est.bits_per_dim == pytest.approx(est.nll / (dims * math.log(2)), abs=1e-12)
    share = 100 * (1 - dims / padded()[0].numel())
    assert any(note.startswith(f"{share:.1f} % of the values are masked") for note in est.notes)


def test_sequences_of_one_length_need_no_lengths():
    pair, x = deep(), torch.randn(4, STEPS, FEATURES)
    full = torch.full((4,), STEPS)
    torch.manual_seed(1)
    alone = terms(pair.model, pair.guide, x, 3)
    torch.manual_seed(1)
    told = terms(pair.model, pair.guide, (x, full), 3)
    torch.testing.assert_close(alone.log_weight, told.log_weight)


def test_one_step_is_a_vae():
    pair, x = deep(), torch.randn(4, 1, FEATURES)
    t = terms(pair.model, pair.guide, x, 3)
    z = t.guide["z"].value[..., 0, :]
    h = pair.encoder.rnn(x)[0][:, 0].expand(3, 4, 6)
    prior = pair.transition(pair.start.value)
    q = pair.combiner(torch.cat([pair.guide_start.value.expand(3, 4, 2), h], -1))
    expected = prior.log_prob(z) + pair.emission(z).log_prob(x[:, 0]) - q.log_prob(z)
    torch.testing.assert_close(t.log_weight, expected)


# -- padding ----------------------------------------------------------------------------------------------------------


def test_padding_changes_nothing():
    """What stands behind an end, in the data and in the latents, and how much of it, has no part in any density."""
    pair, x = deep(), padded()
    t = terms(pair.model, pair.guide, (x, LENGTHS), 3)
    behind = torch.arange(STEPS + 2) >= LENGTHS[:, None]
    wider = torch.cat([x, torch.zeros(4, 2, FEATURES)], 1)
    wider = torch.where(behind[..., None], 9 * torch.randn(wider.shape), wider)
    z = torch.cat([t.guide["z"].value, torch.zeros(3, 4, 2, LATENT)], -2)
    z = torch.where(behind[..., None], 9 * torch.randn(z.shape), z)
    other = terms(pair.model, pair.guide, (wider, LENGTHS), 3, values={"z": z})
    for name in ("log_lik", "log_prior", "log_guide", "log_weight"):
        torch.testing.assert_close(getattr(other, name), getattr(t, name))


def test_each_sequence_is_as_it_is_alone():
    pair, x = deep(), padded()
    t = terms(pair.model, pair.guide, (x, LENGTHS), 3)
    for i, n in enumerate(LENGTHS.tolist()):
        z = t.guide["z"].value[:, i : i + 1, :n]
        alone = terms(pair.model, pair.guide, x[i : i + 1, :n], 3, values={"z": z})
        torch.testing.assert_close(alone.log_weight[:, 0], t.log_weight[:, i])


def test_padding_has_no_part_in_a_refined_estimate():
    """Steps behind the end have no density: a proposal that counted them gave 90 nats too much."""
    model, guide, x = linear().model, deep().guide, padded()
    found = log_marginal(model, guide, (x, LENGTHS), num_particles=500, proposal="refined", progress=False)
    exact = torch.stack([kalman(row, int(n)) for row, n in zip(x, LENGTHS, strict=True)])
    assert bool(((found.log_px - exact).abs() < 0.05).all())


@pytest.mark.slow
def test_padding_has_no_part_in_the_gaps():
    """The richer family is exact for a linear model, for sequences that are shorter than the others, too."""
    model, guide, x = linear().model, deep().guide, padded()
    found = gaps(model, guide, (x, LENGTHS), steps=150, rounds=2, num_particles=100)
    exact = torch.stack([kalman(row, int(n)) for row, n in zip(x, LENGTHS, strict=True)])
    assert found.richer_elbo is not None
    assert bool(((found.richer_elbo - exact).abs() < 0.3).all())
    assert bool(((found.log_px - exact).abs() < 0.05).all())


def test_gradients_see_no_padding():
    pair, x = deep(), padded()
    x.requires_grad_(True)
    terms(pair.model, pair.guide, (x, LENGTHS), 2).elbo.sum().backward()
    known = torch.arange(STEPS) < LENGTHS[:, None]
    assert bool((x.grad[known] != 0).all())
    assert bool((x.grad[~known] == 0).all())


def test_a_draw_is_zero_behind_the_end():
    pair, x = deep(), padded()
    z = simulate(pair.model, (x, LENGTHS))["z"]
    known = torch.arange(STEPS) < LENGTHS[:, None]
    assert bool((z[known] != 0).all())
    assert bool((z[~known] == 0).all())
    assert generate.samples(pair.model, pair.guide, (x, LENGTHS), count=3).shape == (3, STEPS, FEATURES)


@pytest.mark.slow
def test_training_comes_near_the_kalman_filters_log_px():
    """Data of a linear model: a deep one learns them to within 0.5 nats a sequence of the truth."""
    truth = linear()
    lengths = torch.randint(1, STEPS + 1, (300,))
    with torch.no_grad():
        x = simulate(truth.model, (torch.zeros(300, STEPS, FEATURES), lengths))["x"]
    x = torch.where((torch.arange(STEPS) < lengths[:, None])[..., None], x, 0.0)
    pair = deep()
    adam = functools.partial(torch.optim.Adam, lr=1e-2)
    fit(
        pair.model, pair.guide, (x, lengths), objective=objectives.ELBO(), optimizer=adam, epochs=40, batch_size=50,
        progress=False,
    )  # fmt: skip
    with torch.no_grad():
        best = torch.stack([kalman(row, int(n)) for row, n in zip(x, lengths, strict=True)]).mean()
        found = log_marginal(
            pair.model, pair.guide, (x, lengths), num_particles=100, progress=False, proposal="guide"
        ).log_px.mean()
    assert best - 0.5 < found < best + 0.1


# -- what is refused --------------------------------------------------------------------------------------------------

USES = {
    "check": lambda p, d: check(p.model, p.guide, d),
    "fit": lambda p, d: fit(p.model, p.guide, d, objective=objectives.ELBO(), epochs=1, batch_size=2, progress=False),
    "log_marginal": lambda p, d: log_marginal(p.model, p.guide, d, num_particles=2, progress=False, proposal="guide"),
}


@pytest.mark.parametrize("wrong", [0, -1, 7])
@pytest.mark.parametrize("use", USES)
def test_a_length_that_is_none_is_refused_by_its_row(use, wrong):
    lengths = torch.tensor([6, 3, 1, wrong])
    with pytest.raises(DataError, match=f"lengths: expected 1 to 6, as there are steps, found {wrong} at row ."):
        USES[use](deep(), (padded(), lengths))


def test_flat_data_are_refused():
    with pytest.raises(DataError, match=r"x: expected sequences \[batch, T, \*event\], found \[4, 3\]"):
        check(deep().model, deep().guide, torch.randn(4, 3))


def test_a_mask_in_place_of_lengths_is_named_and_its_sum_works():
    pair, x = deep(), padded()
    mask = torch.arange(STEPS) < LENGTHS[:, None]
    with pytest.raises(DataError, match=r"found torch.bool \[4, 6\]; of a mask .* pass mask\.sum\(1\)"):
        check(pair.model, pair.guide, (x, mask))
    check(pair.model, pair.guide, (x, mask.sum(1)))


def bernoulli() -> DeepMarkovModel:
    torch.manual_seed(0)
    return DeepMarkovModel(
        LATENT,
        posteriors.DiagonalNormal(nn.mlp(LATENT, 2 * LATENT, hidden=(5,))),
        likelihoods.Bernoulli(nn.mlp(LATENT, FEATURES, hidden=(5,))),
        nn.Backward(torch.nn.GRU(FEATURES, 6, batch_first=True)),
        posteriors.DiagonalNormal(nn.mlp(LATENT + 6, 2 * LATENT, hidden=(5,))),
    )


@pytest.mark.parametrize("filler", [-1.0, 0.5, 2.0])
def test_padding_may_be_outside_the_support(filler):
    """Results are those of padding by zeros, bit for bit; a value before the end is still checked, by its place."""
    x = (torch.randn(4, STEPS, FEATURES) > 0).double()
    beyond = (torch.arange(STEPS) >= LENGTHS[:, None])[..., None]
    zeros, other = ((x.masked_fill(beyond, number), LENGTHS) for number in (0.0, filler))
    found = []
    for data in (zeros, other):
        pair = bernoulli()
        assert "masked" in check(pair.model, pair.guide, data)
        run = fit(pair.model, pair.guide, data, epochs=2, compile=False)
        est = log_marginal(run.model, run.guide, data, num_particles=30, progress=False, proposal="guide")
        found.append((run.metrics["loss"], est.log_px))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    wrong = other[0].clone()
    wrong[1, 2, 0] = filler
    for use in (check, functools.partial(log_marginal, num_particles=30), functools.partial(fit, epochs=1)):
        with pytest.raises(DataError, match=rf"{filler:g} at row 1, position \[2, 0\]"):
            use(bernoulli().model, bernoulli().guide, (wrong, LENGTHS))
