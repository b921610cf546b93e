"""Objectives against Pyro's and against closed forms."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from ppvae import fit, objectives
from ppvae.errors import ContractError
from ppvae.inference.scope import Scope
from ppvae.models import LinearGaussian


def pair() -> tuple[LinearGaussian, Tensor]:
    torch.manual_seed(0)
    return LinearGaussian(5, 2).double(), torch.randn(6, 5).double()


def test_elbo_is_pyros_on_the_same_noise() -> None:
    p, x = pair()
    ours, pyros = objectives.ELBO(num_particles=3), Trace_ELBO(num_particles=3, vectorize_particles=True)
    with Scope().entered():
        losses, gradients = [], []
        for objective in (ours, pyros):
            objective.loss(p.model, p.mean_field, x)  # whatever is done once
            torch.manual_seed(1)
            p.zero_grad()
            losses.append(objective.loss_and_grads(p.model, p.mean_field, x))
            gradients.append([q.grad.clone() for q in p.parameters()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_exact_guide_gives_log_px_at_any_number_of_particles() -> None:
    p, x = pair()
    for objective in (objectives.ELBO(4), objectives.IWAE(1), objectives.IWAE(7)):
        assert objective.loss(p.model, p.guide, x) == pytest.approx(-float(p.log_px(x).sum()), abs=1e-10)


def test_bounds_are_ordered() -> None:
    # means over 4000 draws: a reversal by chance has probability below 1e-9 (gaps are over 6 standard errors)
    p, x = pair()
    x = x[:1].expand(4000, 5)
    elbo, iwae2, iwae20 = (-o.loss(p.model, p.mean_field, x) / 4000 for o in (
        objectives.ELBO(1), objectives.IWAE(2), objectives.IWAE(20)
    ))  # fmt: skip
    assert elbo < iwae2 < iwae20 < float(p.log_px(x[:1])) + 0.01


def test_beta_weighs_the_rate_alone() -> None:
    p, x = pair()
    values = []
    for beta in (0.0, 1.0, 3.0):
        torch.manual_seed(1)
        objective = objectives.ELBO(beta=beta)
        objective.loss(p.model, p.mean_field, x)
        torch.manual_seed(2)
        values.append(objective.loss(p.model, p.mean_field, x))
    rate = values[1] - values[0]
    assert rate != 0
    assert values[2] == pytest.approx(values[0] + 3 * rate, abs=1e-9)


def test_a_subsampled_plate_scales_the_loss_outside_the_logarithm() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 1).double()

    def build(size: int | None) -> tuple[object, object]:
        def plate() -> object:
            return pyro.plate("data", size or 8, subsample=torch.arange(8))

        def model(x: Tensor) -> None:
            with plate():
                z = pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            with plate():
                pyro.sample("z", dist.Normal(x / 3, 1.0).to_event(1))

        return model, guide

    losses = []
    for size in (None, 80):
        objective = objectives.IWAE(5)
        model, guide = build(size)
        objective.loss(model, guide, x)
        torch.manual_seed(3)
        losses.append(objective.loss(model, guide, x))
    assert losses[1] == pytest.approx(10 * losses[0], rel=1e-12)


def test_a_latent_that_is_not_reparameterised_is_refused_by_name() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(p))

    with Scope().entered(), pytest.raises(ContractError, match=r"'k'.*reparameterised"):
        objectives.ELBO().loss(model, guide, torch.zeros(3))


def test_fit_trains_on_iwae() -> None:
    p, x = pair()
    before = float(p.log_px(x).mean())
    run = fit(p.model, p.guide, x, objective=objectives.IWAE(4), epochs=30, batch_size=6)
    assert float(p.log_px(x).mean()) > before
    assert math.isfinite(run.metrics["loss"])
