"""Backward sampling: smoothing means in closed form on chains, sites, other lengths, and a model that is not Markov."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppvae.inference.inspection import inspect
from ppvae.inference.sequences.backward import sample_backward
from ppvae.inference.sequences.particle_filter import particle_filter
from ppvae.inference.sequences.resampling import multinomial_ancestors
from tests.inference.sequences.test_particle_filter import SEQUENCES, bootstrap_chain, of
from tests.programs.sequences import Q, R, draw_linear, kalman_smoother, linear_pair

pytestmark = pytest.mark.usefixtures("float64")
COPIES, STEPS = 4000, 6


def walk_pair() -> Any:
    """(model, guide) of x_t = z_1 + .. + z_t + noise: given z_t alone, x_t depends on all earlier latents."""

    def model(x: Tensor) -> None:
        total = torch.zeros(()).double()
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                total = total + pyro.sample(f"z_{t}", dist.Normal(torch.zeros(()).double(), Q))
                pyro.sample(f"x_{t}", dist.Normal(total, R), obs=x[:, t])

    def guide(x: Tensor) -> None:
        total = torch.zeros(()).double()
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                total = total + pyro.sample(f"z_{t}", dist.Normal(0.3 * (x[:, t] - total), Q))

    return model, guide


def walk_smoother(x: Tensor) -> Tensor:
    lower = torch.ones(STEPS, STEPS).double().tril()
    precision = torch.eye(STEPS) / Q**2 + lower.T @ lower / R**2
    return torch.linalg.solve(precision, lower.T @ x[0] / R**2)[None]


def of_sites(draws: dict[str, Tensor]) -> Tensor:
    return torch.stack([draws[f"z_{t}"][0] for t in range(len(draws))], -1)


def of_chain(draws: dict[str, Tensor]) -> Tensor:
    return draws["z"][0, ..., 0]


X = draw_linear(1, STEPS, seed=5)
CASES: dict[str, Any] = {  # pair, batch, its latents as [batch, T], smoothing means [1, T]
    "sites": (linear_pair(shift=0.3), (X,), of_sites, kalman_smoother(X)[0]),
    "lengths": (linear_pair(), (X, torch.tensor([4])), of_sites, kalman_smoother(X[:, :4])[0]),
    "chain": (lambda: of(bootstrap_chain()), (X[..., None],), of_chain, kalman_smoother(X)[0]),
    "not Markov": (walk_pair(), (X,), of_sites, walk_smoother(X)),
}


@pytest.mark.parametrize("name", CASES)
def test_smoothing_means(name: str):
    """Draws of filters weighted by their estimates of p(x), within 5 standard errors: one failure in 4e4 runs."""
    build, batch, latents, expected = CASES[name]
    pair = build() if callable(build) else build
    batch = tuple(t.expand(COPIES, *t.shape[1:]).contiguous() for t in batch)
    torch.manual_seed(0)
    with torch.no_grad():
        s = inspect(*pair, batch)
        f = particle_filter(
            *pair, batch, 10, structure=s, threshold=1.0, ancestors=multinomial_ancestors, keep_history=True
        )
        assert f.history is not None
        z = latents(sample_backward(*pair, batch, f.history, structure=s))
    count = expected.shape[1]
    weight = f.log_px.softmax(0)[:, None]
    off = z[:, :count] - expected
    mean, error = (weight * off).sum(0), (weight * off).square().sum(0).sqrt()
    assert bool((mean.abs() < 5 * error).all())


@pytest.mark.parametrize("name", SEQUENCES)
def test_every_layout(name: str):
    """A draw is made of the latents of particles, each step's of one of them."""
    build, data, count = SEQUENCES[name]
    pair, batch = build(), data()
    torch.manual_seed(0)
    with torch.no_grad():
        s = inspect(*pair, batch)
        f = particle_filter(*pair, batch, 5, structure=s, threshold=1.0, keep_history=True)
        assert f.history is not None
        draws = sample_backward(*pair, batch, f.history, structure=s)
    for site, value in draws.items():
        held = f.history.sites[site].value
        assert value.shape == (1, *held.shape[1:])
        steps = value.unbind(2) if name == "chain" else [value]
        of_held = held.unbind(2) if name == "chain" else [held]
        assert all(
            bool((a == b).reshape(*b.shape[:2], -1).all(-1).any(0).all()) for a, b in zip(steps, of_held, strict=True)
        )
    assert len(draws) == (1 if name in ("chain", "one step") else count)
