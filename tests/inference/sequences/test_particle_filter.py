"""Particle filters over the steps of a pair: exact values, and pairs that have no steps."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppvae import likelihoods, nn, posteriors, terms
from ppvae.distributions.markov_chain import MarkovChain
from ppvae.errors import ContractError
from ppvae.inference.inspection import inspect
from ppvae.inference.sequences.particle_filter import FilterResult, particle_filter
from ppvae.inference.sequences.resampling import multinomial_ancestors, systematic_ancestors
from ppvae.inference.sequences.steps import steps_of
from ppvae.models import DeepMarkovModel, LinearGaussian
from tests.programs.sequences import (
    draw_linear,
    forward_pass,
    hmm_pair,
    kalman,
    linear_pair,
)

pytestmark = pytest.mark.usefixtures("float64")
LENGTHS = torch.tensor([6, 2, 4, 1])


def run(pair: Any, batch: Any, num_particles: int = 10, **options: Any) -> FilterResult:
    torch.manual_seed(0)
    with torch.no_grad():
        return particle_filter(*pair, batch, num_particles, structure=inspect(*pair, batch), **options)


def bootstrap_chain() -> DeepMarkovModel:
    """The linear model as a chain in one site, with its own transition as the guide."""
    transition, emission, combiner = torch.nn.Linear(1, 2), torch.nn.Linear(1, 1), torch.nn.Linear(2, 2)
    with torch.no_grad():
        transition.weight.copy_(torch.tensor([[0.9], [0.0]]))
        transition.bias.copy_(torch.tensor([0.0, torch.tensor(0.6).log()]))
        emission.weight.fill_(1.0)
        emission.bias.zero_()
        combiner.weight.copy_(torch.tensor([[0.9, 0.0], [0.0, 0.0]]))
        combiner.bias.copy_(transition.bias)

    class Last(torch.nn.Module):
        def forward(self, x: Tensor, *, context: Tensor | None = None) -> Tensor:
            return x

    return DeepMarkovModel(
        1, posteriors.DiagonalNormal(transition), likelihoods.Normal(emission, scale=0.8), Last(),
        posteriors.DiagonalNormal(combiner),
    )  # fmt: skip


def deep() -> DeepMarkovModel:
    torch.manual_seed(0)
    return DeepMarkovModel(
        2,
        posteriors.DiagonalNormal(nn.mlp(2, 4, hidden=(5,))),
        likelihoods.Normal(nn.mlp(2, 3, hidden=(5,)), scale=0.7),
        nn.Backward(torch.nn.GRU(3, 6, batch_first=True)),
        posteriors.DiagonalNormal(nn.mlp(8, 4, hidden=(5,))),
    )


def of(pair: Any) -> tuple[Any, Any]:
    return pair.model, pair.guide


SEQUENCES = {  # constructor of the pair, batch, steps
    "sites": (linear_pair, lambda: (draw_linear(4, 6),), 6),
    "lengths": (linear_pair, lambda: (draw_linear(4, 6), LENGTHS), 6),
    "folded": (lambda: linear_pair(require=lambda z, x: z.shape == x.shape[:1]), lambda: (draw_linear(4, 6),), 6),
    "one by one": (
        lambda: linear_pair(require=lambda z, x: z.shape == x.shape[:1] and len(x) <= 4),
        lambda: (draw_linear(4, 6),),
        6,
    ),
    "discrete": (hmm_pair, lambda: (draw_linear(4, 6),), 6),
    "chain": (lambda: of(deep()), lambda: (torch.randn(4, 6, 3), LENGTHS), 6),
    "one step": (lambda: of(LinearGaussian(3, 2).double()), lambda: (torch.randn(4, 3),), 1),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_weights_of_steps_add_up(name: str):
    build, data, count = SEQUENCES[name]
    pair, batch = build(), data()
    t = terms(*pair, batch, 3)
    steps = steps_of(t)
    assert steps.count == count
    assert steps.log_weight.shape == (count, 3, 4)
    torch.testing.assert_close(steps.log_weight.sum(0), t.log_weight)


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_filter_runs_on_every_layout(name: str):
    """Kept steps have the weights of their ancestors, which the filter itself checks in each round."""
    build, data, count = SEQUENCES[name]
    pair, batch = build(), data()
    placement = "vectorized" if name not in ("folded", "one by one") else name
    assert inspect(*pair, batch).layout == placement
    f = run(pair, batch, threshold=1.0)
    assert f.ess.shape == (count, 4)
    assert bool(f.log_px.isfinite().all())
    if count > 1:
        assert int(f.resampled.max()) >= count - 2


COPIES = 2000
EXACT = {
    "linear": (linear_pair, draw_linear(1, 8, seed=3), kalman),
    "off": (lambda: linear_pair(shift=0.3), draw_linear(1, 8, seed=3), kalman),
    "hidden Markov": (hmm_pair, 2 * draw_linear(1, 8, seed=4), forward_pass),
    "bootstrap": (lambda: of(bootstrap_chain()), draw_linear(1, 6, seed=5)[..., None], lambda x: kalman(x[..., 0])),
}


@pytest.mark.parametrize("threshold", [0.6, 1.0])
@pytest.mark.parametrize("ancestors", [systematic_ancestors, multinomial_ancestors])
@pytest.mark.parametrize("name", EXACT)
def test_unbiased_for_p_x(name: str, ancestors: Any, threshold: float):
    """The mean of Z / p(x) over filters is 1 within 4.5 standard errors: a failure by chance in 1e5 runs."""
    build, x, exact = EXACT[name]
    f = run(build(), (x.expand(COPIES, *x.shape[1:]).contiguous(),), threshold=threshold, ancestors=ancestors)
    assert float(f.resampled.double().mean()) > 0.3
    ratio = (f.log_px - exact(x)).exp()
    assert abs(float(ratio.mean()) - 1) < 4.5 * float(ratio.std()) / COPIES**0.5


def test_sequences_of_different_lengths():
    x, lengths = draw_linear(3, 8, seed=6), torch.tensor([8, 3, 5])
    rows = torch.arange(3).repeat(700)
    f = run(linear_pair(), (x[rows], lengths[rows]), threshold=0.7)
    ratio = (f.log_px - kalman(x, lengths)[rows]).exp().reshape(700, 3)
    assert bool(((ratio.mean(0) - 1).abs() < 5 * ratio.std(0) / 700**0.5).all())


@pytest.mark.slow
def test_long_sequences():
    """Standard deviation of log Z grows with T, where that of importance sampling's weights is beyond any number."""
    x = draw_linear(4, 200)
    f = run(linear_pair(), (x,), 1000)
    assert float((f.log_px - kalman(x)).abs().max()) < 1.5  # seven standard deviations
    importance = f.first.log_weight.logsumexp(0) - torch.tensor(1000.0).log()
    assert float((importance - kalman(x)).max()) < -2


def test_no_resampling_is_importance_sampling():
    pair, x = linear_pair(), draw_linear(4, 6)
    f = run(pair, (x,), threshold=0.0)
    torch.manual_seed(0)
    expected = terms(*pair, x, 10).log_weight.logsumexp(0) - torch.tensor(10.0).log()
    torch.testing.assert_close(f.log_px, expected)


def test_ancestors_follow_the_weights():
    log_weight = torch.tensor([0.1, 0.0, 0.6, 0.3]).log()[:, None].expand(4, 20_000).contiguous()
    for ancestors in (systematic_ancestors, multinomial_ancestors):
        share = ancestors(log_weight).flatten().bincount(minlength=4) / 80_000
        assert float((share - log_weight[:, 0].exp()).abs().max()) < 0.01  # above 5 standard errors


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_step_that_depends_on_later_latents_is_refused():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            chain = MarkovChain(lambda z, at: dist.Normal(z, 1.0).to_event(1), torch.zeros(1), torch.ones(x.shape) > 0)
            z = pyro.sample("z", chain)
            pyro.sample("x", dist.Normal(z[..., 0].flip(-1), 0.3).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            chain = MarkovChain(lambda z, at: dist.Normal(z, 1.5).to_event(1), torch.zeros(1), torch.ones(x.shape) > 0)
            pyro.sample("z", chain)

    with pytest.raises(ContractError, match=r"a function of the data and of the latents up to this step"):
        run((model, guide), (torch.randn(4, 6),))


def test_a_guide_in_another_order_is_refused():
    model, _ = linear_pair()

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for t in reversed(range(x.shape[1])):
                pyro.sample(f"z_{t}", dist.Normal(x[:, t], 1.0))

    with pytest.raises(ContractError, match=r"site 'z_\d': expected latents that the guide samples in the order"):
        run((model, guide), (draw_linear(4, 3),))
