"""The recipe of `ppvae.evaluation` for a new evaluation, here the mean squared reconstruction error per datum."""

import pytest
import torch

from ppvae.errors import UsageError
from ppvae.evaluation.blocks import run_blocks, start_evaluation
from ppvae.models import LinearGaussian

pytestmark = pytest.mark.usefixtures("float64")


def squared_error(t):
    """|x - E[x | z]|^2 of each particle and datum, [particles, N]."""
    site = t.model["x"]
    return (site.value - site.distribution.mean).square().sum(-1)


def reconstruction_error(model, guide, data, *, num_particles=200, seed=0, rows=5000, directory=None, on_block=None):
    """E_q |x - E[x | z]|^2 per datum, [N]."""
    with start_evaluation(model, guide, data, seed=seed) as run:

        def compute(block):
            if on_block is not None:
                on_block(block.number)
            errors = [squared_error(t) for _, _, t in block.weights(run.model, run.guide, num_particles, seed, rows)]
            return {"error": torch.cat(errors).mean(0)}

        settings = {"what": "reconstruction error", "num_particles": num_particles}
        found = run_blocks(run, compute, settings, desc="reconstruction error", directory=directory)
    return found["error"]


@pytest.fixture
def pair():
    torch.manual_seed(1)
    return LinearGaussian(6, 2, 0.7).requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(170, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_it_is_the_closed_form(pair, x):
    """|x - W m - b|^2 + tr(W S W^T) under the posterior N(m, S); the mean over data is off by 5 sd with p < 1e-6."""
    posterior = pair.posterior(x)
    bias = (x - posterior.loc @ pair.weight.T - pair.loc).square().sum(-1)
    exact = bias + (pair.weight @ posterior.covariance_matrix @ pair.weight.T).diagonal(dim1=-2, dim2=-1).sum(-1)
    difference = reconstruction_error(pair.model, pair.guide, x, num_particles=500) - exact
    assert difference.mean().abs() < 5 * difference.std() / len(x) ** 0.5


@pytest.mark.parametrize("rows", [1, 333, 5000])
def test_it_does_not_depend_on_rows(pair, x, rows):
    whole = reconstruction_error(pair.model, pair.guide, x, rows=10**6)
    found = reconstruction_error(pair.model, pair.guide, x, rows=rows)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)
    assert not torch.equal(reconstruction_error(pair.model, pair.guide, x, rows=rows, seed=1), whole)


def test_it_resumes_from_its_cache(pair, x, tmp_path):
    visited = []

    def interrupt(number):
        visited.append(number)
        if len(visited) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reconstruction_error(pair.model, pair.guide, x, directory=tmp_path, on_block=interrupt)
    resumed = reconstruction_error(pair.model, pair.guide, x, directory=tmp_path, on_block=visited.append)
    assert visited == [0, 1, 2, 2, 3]
    assert torch.equal(resumed, reconstruction_error(pair.model, pair.guide, x))
    with pytest.raises(UsageError, match="num_particles is 200 there and 100 here"):
        reconstruction_error(pair.model, pair.guide, x, num_particles=100, directory=tmp_path)


def test_it_leaves_the_random_state_and_the_mode_alone(pair, x):
    state = torch.get_rng_state()
    pair.train()
    reconstruction_error(pair.model, pair.guide, x, num_particles=10)
    assert torch.equal(torch.get_rng_state(), state)
    assert pair.training
