"""Particle filters over windows of steps: memory, exact values, and how far back a step depends on latents."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ppvae.inference.inspection import inspect
from ppvae.inference.sequences.particle_filter import FilterResult, particle_filter
from ppvae.inference.sequences.windows import find_dependence
from tests.inference.sequences.test_backward import walk_pair
from tests.inference.sequences.test_particle_filter import SEQUENCES, bootstrap_chain, of
from tests.programs.sequences import draw_linear, hmm_pair, kalman, linear_pair

pytestmark = pytest.mark.usefixtures("float64")


def run(pair: Any, batch: Any, num_particles: int, windows: bool = True, **options: Any) -> FilterResult:
    torch.manual_seed(0)
    s = inspect(*pair, batch)
    found = find_dependence(*pair, batch, structure=s) if windows else None
    with torch.no_grad():
        return particle_filter(*pair, batch, num_particles, structure=s, dependence=found, **options)


class LiveElements(TorchDispatchMode):
    """Counts the elements of live tensors that are made inside, each storage once; `peak` is the largest number."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[int, list[int]] = {}  # storage: [live tensors, elements]
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().nbytes():
                key = t.untyped_storage().data_ptr()
                if key not in self.tensors:
                    size = t.untyped_storage().nbytes() // t.element_size()
                    self.tensors[key] = [0, size]
                    self.now += size
                    self.peak = max(self.peak, self.now)
                self.tensors[key][0] += 1
                weakref.finalize(t, self._drop, key)
        return out

    def _drop(self, key: int) -> None:
        self.tensors[key][0] -= 1
        if not self.tensors[key][0]:
            self.now -= self.tensors.pop(key)[1]


def peak(pair: Any, batch: Any, windows: bool) -> int:
    s = inspect(*pair, batch)
    found = find_dependence(*pair, batch, structure=s) if windows else None
    torch.manual_seed(0)
    with torch.no_grad(), LiveElements() as live:
        f = particle_filter(*pair, batch, 200, structure=s, dependence=found, threshold=0.5)
    assert int(f.resampled) > 0
    return live.peak


@pytest.mark.parametrize("chain", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_number_of_steps(chain: bool, monkeypatch: pytest.MonkeyPatch):
    """Between 10 and 30 steps: the same with windows of at most 4, to within data and one particle; else three times
    as much."""
    monkeypatch.setattr("ppvae.inference.sequences.particle_filter.LONGEST_WINDOW", 4)
    pair = of(bootstrap_chain()) if chain else linear_pair()
    short, long = ((x[..., None],) if chain else (x,) for x in (draw_linear(1, 10), draw_linear(1, 30)))
    assert peak(pair, long, windows=True) < 1.3 * peak(pair, short, windows=True)
    assert peak(pair, long, windows=False) > 2.5 * peak(pair, short, windows=False)


@pytest.mark.parametrize("name", SEQUENCES)
def test_windows_run_on_every_layout(name: str):
    build, data, count = SEQUENCES[name]
    f = run(build(), data(), 10, threshold=1.0)
    assert f.ess.shape == (count, 4)
    assert bool(f.log_px.isfinite().all())


def test_windows_without_resampling_are_importance_sampling():
    """The same noise: sites are drawn in the same order."""
    pair, x = linear_pair(), draw_linear(3, 30)
    windows, whole = (run(pair, (x,), 10, windows, threshold=0.0) for windows in (True, False))
    torch.testing.assert_close(windows.log_px, whole.log_px)
    torch.testing.assert_close(windows.ess, whole.ess)


# -- how far back -----------------------------------------------------------------------------------------------------

TABLE = (3 * torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(0)).double()).softmax(-1)
MEANS = torch.tensor([-2.0, 0.0, 1.5]).double()


def second_order() -> Any:
    """A hidden Markov model whose state depends on the two before."""

    def model(x: Tensor) -> None:
        before = last = torch.zeros((), dtype=torch.long)
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1]), history=2):
                state = pyro.sample(f"s_{t}", dist.Categorical(TABLE[before, last]))
                pyro.sample(f"x_{t}", dist.Normal(MEANS[state], 1.0), obs=x[:, t])
                before, last = last, state

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                pyro.sample(f"s_{t}", dist.Categorical(logits=-0.35 * (x[:, t, None] - MEANS) ** 2))

    return model, guide


def second_order_exact(x: Tensor) -> Tensor:
    alpha = torch.full((len(x), 3, 3), -torch.inf)
    alpha[:, 0, 0] = 0
    for now in x.T:
        alpha = (alpha[..., None] + TABLE.log()).logsumexp(1) + dist.Normal(MEANS, 1.0).log_prob(now[:, None, None])
    return alpha.logsumexp((1, 2))


SWITCH = torch.tensor([[0.9, 0.1], [0.3, 0.7]]).double()
GAIN, NOISE = torch.tensor([0.9, -0.5]).double(), torch.tensor([0.3, 1.0]).double()


def switching(swap: bool = False) -> Any:
    """Two latents a step, a discrete one that chooses the dynamics of the other; the guide may draw them swapped."""

    def model(x: Tensor) -> None:
        s, z = torch.zeros((), dtype=torch.long), torch.zeros(()).double()
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                s = pyro.sample(f"s_{t}", dist.Categorical(SWITCH[s]))
                z = pyro.sample(f"z_{t}", dist.Normal(GAIN[s] * z, NOISE[s]))
                pyro.sample(f"x_{t}", dist.Normal(z, 0.5), obs=x[:, t])

    def guide(x: Tensor) -> None:
        s, z = torch.zeros((), dtype=torch.long), torch.zeros(()).double()
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                if swap:
                    z = pyro.sample(f"z_{t}", dist.Normal(0.4 * x[:, t], 0.9))
                s = pyro.sample(f"s_{t}", dist.Categorical(SWITCH[s]))
                if not swap:
                    z = pyro.sample(f"z_{t}", dist.Normal(0.5 * GAIN[s] * z + 0.5 * x[:, t], 0.7))

    return model, guide


def switching_exact(x: Tensor) -> Tensor:
    """A Kalman filter for each sequence of switches."""
    total = []
    for path in itertools.product((0, 1), repeat=x.shape[1]):
        log_prob, mean, var, last = torch.zeros(len(x)), torch.zeros(len(x)), torch.zeros(()), 0
        for now, s in zip(x.T, path, strict=True):
            mean, var = GAIN[s] * mean, GAIN[s] ** 2 * var + NOISE[s] ** 2
            log_prob = log_prob + SWITCH[last, s].log() + dist.Normal(mean, (var + 0.25).sqrt()).log_prob(now)
            mean, var, last = mean + var / (var + 0.25) * (now - mean), 0.25 * var / (var + 0.25), s
        total.append(log_prob)
    return torch.stack(total).logsumexp(0)


def looking_ahead() -> Any:
    """Vectors under masks of the lengths; the guide reads the mean of the data to come."""

    def model(x: Tensor, lengths: Tensor) -> None:
        z = torch.zeros(2).double()
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", dist.Normal(0.8 * z, 0.5).to_event(1))
                    pyro.sample(f"x_{t}", dist.Normal(z.sum(-1), 0.6), obs=x[:, t])

    def guide(x: Tensor, lengths: Tensor) -> None:
        z = torch.zeros(2).double()
        ahead = x.flip(1).cumsum(1).flip(1) / torch.arange(x.shape[1], 0, -1)
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                with poutine.mask(mask=t < lengths):
                    mean = 0.6 * z + 0.15 * x[:, t, None] + 0.05 * ahead[:, t, None]
                    z = pyro.sample(f"z_{t}", dist.Normal(mean, 0.5).to_event(1))

    return model, guide


def looking_ahead_exact(x: Tensor) -> Tensor:
    """The sum of the two dims is a chain too: variance 2 * 0.5^2."""
    mean, var, total = torch.zeros(len(x)), torch.zeros(()), torch.zeros(len(x))
    for now in x[:, :7].T:
        mean, var = 0.8 * mean, 0.64 * var + 0.5
        total = total + dist.Normal(mean, (var + 0.36).sqrt()).log_prob(now)
        gain = var / (var + 0.36)
        mean, var = mean + gain * (now - mean), var - gain * var
    return total


def inner_plate() -> Any:
    """A latent of the datum, and one of each of three features in a plate of their own."""

    def model(x: Tensor) -> None:
        z = torch.zeros(()).double()
        data, features = pyro.plate("data", len(x), dim=-1), pyro.plate("features", 3, dim=-2)
        for t in range(x.shape[1]):
            with data:
                z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, 0.6))
                with features:
                    w = pyro.sample(f"w_{t}", dist.Normal(z, 0.5))
                    pyro.sample(f"x_{t}", dist.Normal(w, 0.4), obs=x[:, t].T)

    def guide(x: Tensor) -> None:
        z = torch.zeros(()).double()
        data, features = pyro.plate("data", len(x), dim=-1), pyro.plate("features", 3, dim=-2)
        for t in range(x.shape[1]):
            with data:
                z = pyro.sample(f"z_{t}", dist.Normal(0.4 * z + 0.5 * x[:, t].mean(-1), 0.4))
                with features:
                    pyro.sample(f"w_{t}", dist.Normal(0.4 * z + 0.6 * x[:, t].T, 0.35))

    return model, guide


def inner_plate_exact(x: Tensor) -> Tensor:
    steps = x.shape[1]
    rows, z = torch.zeros(3 * steps, steps), torch.zeros(steps)
    for t in range(steps):
        z = 0.9 * z
        z[t] = 0.6
        rows[3 * t : 3 * t + 3] = z
    covariance = rows @ rows.T + (0.5**2 + 0.4**2) * torch.eye(3 * steps)
    return dist.MultivariateNormal(torch.zeros(3 * steps), covariance).log_prob(x.flatten(1))


def with_static_latent() -> Any:
    """A latent of the whole sequence, which all steps read, beside the chain."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c, z = pyro.sample("c", dist.Normal(torch.zeros(()).double(), 1.0)), torch.zeros(()).double()
            for t in range(x.shape[1]):
                z = pyro.sample(f"z_{t}", dist.Normal(0.7 * z, 0.5))
                pyro.sample(f"x_{t}", dist.Normal(z + c, 0.7), obs=x[:, t])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c, z = pyro.sample("c", dist.Normal(0.6 * x.mean(1), 0.6)), torch.zeros(()).double()
            for t in range(x.shape[1]):
                z = pyro.sample(f"z_{t}", dist.Normal(0.5 * z + 0.4 * (x[:, t] - c), 0.5))

    return model, guide


def with_static_latent_exact(x: Tensor) -> Tensor:
    steps = x.shape[1]
    rows, z = torch.zeros(steps, steps), torch.zeros(steps)
    for t in range(steps):
        z = 0.7 * z
        z[t] = 0.5
        rows[t] = z
    covariance = rows @ rows.T + 1.0 + 0.49 * torch.eye(steps)
    return dist.MultivariateNormal(torch.zeros(steps), covariance).log_prob(x)


def with_reads(steps: int, reads: dict[int, tuple[int, ...]], in_guide: bool = False) -> Any:
    """A linear chain in which x_t, or q(z_t), reads the sum of further latents `reads[t]`, too."""

    def model(x: Tensor) -> None:
        z: list[Tensor] = []
        with pyro.plate("data", len(x)):
            for t in range(steps):
                z.append(pyro.sample(f"z_{t}", dist.Normal(0.9 * z[-1] if z else torch.zeros(()).double(), 0.6)))
                mean = z[t] + sum((0.5 * z[j] for j in reads.get(t, ())), torch.zeros(()).double())
                pyro.sample(f"x_{t}", dist.Normal(z[t] if in_guide else mean, 0.8), obs=x[:, t])

    def guide(x: Tensor) -> None:
        z: list[Tensor] = []
        with pyro.plate("data", len(x)):
            for t in range(steps):
                mean = 0.5 * x[:, t] + sum((0.1 * z[j] for j in (reads.get(t, ()) if in_guide else ())), 0.0)
                z.append(pyro.sample(f"z_{t}", dist.Normal(mean, 0.7)))

    return model, guide


LATE = {7: (5,)}  # the last x reads two steps back


def late_exact(x: Tensor) -> Tensor:
    rows, z = torch.zeros(STEPS, STEPS), torch.zeros(STEPS)
    latents = []
    for t in range(STEPS):
        z = 0.9 * z
        z[t] = 0.6
        latents.append(z.clone())
        rows[t] = z + sum((0.5 * latents[j] for j in LATE.get(t, ())), torch.zeros(STEPS))
    covariance = rows @ rows.T + 0.64 * torch.eye(STEPS)
    return dist.MultivariateNormal(torch.zeros(STEPS), covariance).log_prob(x)


READS: dict[str, tuple[dict[int, tuple[int, ...]], int | None]] = {  # of 40 steps: (what they read, lag)
    "nothing else": ({}, 1),
    "a label of the last twelve": ({39: tuple(range(28, 39))}, 11),
    "a jump in the second half": ({38: (23,)}, 15),
    "a jump at the end": ({39: (36,)}, 3),
    "a jump at the beginning": ({7: (1,)}, 6),
    "across the middle": ({22: (19,), 30: (11,)}, 19),
    "another lag from step 30 on": ({t: (t - 4,) for t in range(30, 40)}, 4),
    "a multiple of the spacing": ({20: (8,), 33: (21,)}, 12),
    "more than half": ({37: (5,)}, None),
}


@pytest.mark.parametrize("in_guide", [False, True])
@pytest.mark.parametrize("name", READS)
def test_the_lag_is_that_of_any_step(name: str, in_guide: bool):
    reads, lag = READS[name]
    pair, batch = with_reads(40, reads, in_guide), (draw_linear(2, 40),)
    assert find_dependence(*pair, batch, structure=inspect(*pair, batch)).lag == lag


STEPS, COPIES = 8, 1000
X = 1.3 * torch.randn(1, STEPS, generator=torch.Generator().manual_seed(1)).double()
FEATURES = torch.randn(1, STEPS, 3, generator=torch.Generator().manual_seed(2)).double()
EXACT: dict[str, Any] = {  # pair, batch, exact log p(x), lag
    "linear": (linear_pair, (X,), kalman, 1),
    "chain": (lambda: of(bootstrap_chain()), (X[..., None],), lambda x: kalman(x[..., 0]), 1),
    "second order": (second_order, (2 * X,), second_order_exact, 2),
    "switching": (switching, (X,), switching_exact, 1),
    "switching, swapped": (lambda: switching(swap=True), (X,), switching_exact, 1),
    "looking ahead": (looking_ahead, (X, torch.tensor([7])), looking_ahead_exact, 1),
    "inner plate": (inner_plate, (FEATURES,), inner_plate_exact, 1),
    "static latent": (with_static_latent, (X,), with_static_latent_exact, 1),
    "late": (lambda: with_reads(STEPS, LATE), (X,), late_exact, 2),
    "not Markov": (walk_pair, (X,), None, None),
}


@pytest.mark.parametrize("name", EXACT)
def test_unbiased_for_p_x(name: str):
    """The mean of Z / p(x) over filters is 1 within 4.5 standard errors: a failure by chance in 1e5 runs."""
    build, batch, exact, lag = EXACT[name]
    pair, rows = build(), tuple(t.expand(COPIES, *t.shape[1:]).contiguous() for t in batch)
    assert find_dependence(*pair, rows, structure=inspect(*pair, rows)).lag == lag
    if exact is None:
        return
    f = run(pair, rows, 20, threshold=0.7)
    assert float(f.resampled.double().mean()) > 1
    ratio = (f.log_px - exact(batch[0])).exp()
    assert abs(float(ratio.mean()) - 1) < 4.5 * float(ratio.std()) / COPIES**0.5


def test_a_lag_that_is_too_short_is_found_out():
    """Weights of a kept step then change with the particle whose latents stand before it: the filter starts anew."""
    pair, batch = walk_pair(), (draw_linear(3, STEPS),)
    s = inspect(*pair, batch)
    found = replace(find_dependence(*pair, batch, structure=s), lag=1)
    torch.manual_seed(0)
    with torch.no_grad():
        f = particle_filter(*pair, batch, 20, structure=s, dependence=found, threshold=1.0)
    assert len(f.first.model) == 2 * STEPS


def test_discrete_states_have_a_lag_in_small_batches():
    pair, batch = hmm_pair(), (draw_linear(2, 20),)
    assert find_dependence(*pair, batch, structure=inspect(*pair, batch)).lag == 1
