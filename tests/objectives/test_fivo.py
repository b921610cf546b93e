"""The filtering bound: between the IWAE bound and log p(x), its gradient with and without the resampling term."""

from __future__ import annotations

import functools
from typing import Any

import pyro
import pytest
import torch

from ppvae import fit
from ppvae.errors import ContractError, UsageError
from ppvae.inference.param_store import ParamScope
from ppvae.objectives import FIVO, IWAE
from tests.inference.sequences.test_windows import LiveElements
from tests.programs.sequences import draw_linear, hmm_pair, kalman, linear_pair
from tests.programs.strangers import PAIRS

pytestmark = pytest.mark.usefixtures("float64")


def bound(objective: Any, pair: Any, x: Any) -> float:
    torch.manual_seed(1)
    return -objective.loss(*pair, x) / len(x)


def test_between_the_bound_of_importance_sampling_and_log_px():
    """Means over 150 filters: the differences are over 5 of their standard errors."""
    pair, x = linear_pair(shift=0.3), draw_linear(1, 25, seed=3)
    rows = x.expand(150, 25).contiguous()
    iwae, fivo, exact = bound(IWAE(10), pair, rows), bound(FIVO(10), pair, rows), float(kalman(x))
    assert iwae + 0.8 < fivo < exact - 0.3
    assert fivo + 0.2 < bound(FIVO(40), pair, rows) < exact


def test_without_resampling_it_is_iwae():
    pair, x = linear_pair(), draw_linear(5, 6)
    assert bound(FIVO(4, resample=0.0), pair, x) == pytest.approx(bound(IWAE(4), pair, x), abs=1e-9)


def gradients(objective: Any, x: Any, a: float, shift: float, seed: int = 2) -> tuple[float, dict[str, float]]:
    """(bound, its gradients) per datum at parameters of the linear pair."""
    with ParamScope().entered():
        pair = linear_pair(shift, learned=True)
        for program in pair:
            program(x[:2])
        store = pyro.get_param_store()
        with torch.no_grad():
            store._params["a"].fill_(a)
        torch.manual_seed(seed)
        loss = objective.loss_and_grads(*pair, x)
        return -loss / len(x), {name: -float(store._params[name].grad) / len(x) for name in ("a", "shift")}


def test_gradient_with_the_resampling_term_is_that_of_the_bound():
    """Against central differences of the mean of 20,000 filters that resample at every step, of a standard error of
    0.04; the pathwise gradient leaves a term of 0.5 out."""
    x, at, step = draw_linear(1, 4, seed=9).expand(20_000, 4).contiguous(), {"a": 0.4, "shift": 0.7}, 0.1
    exact = {}
    for name in at:
        up, down = (gradients(FIVO(4, 1.0), x, **(at | {name: at[name] + d}))[0] for d in (step, -step))
        exact[name] = (up - down) / (2 * step)
    _, full = gradients(FIVO(4, 1.0, "ancestor_score"), x, **at)
    _, paths = gradients(FIVO(4, 1.0), x, **at)
    assert max(abs(full[name] - exact[name]) for name in at) < 0.2
    assert abs(paths["shift"] - exact["shift"]) > 0.3


def test_training_raises_the_bound():
    pair, x = linear_pair(shift=0.8, learned=True), draw_linear(64, 8)
    optimizer = functools.partial(torch.optim.Adam, lr=0.05)
    run = fit(*pair, x, objective=FIVO(8), optimizer=optimizer, epochs=6, batch_size=16, seed=0)
    assert run.history[-1]["loss"] < run.history[0]["loss"] - 0.5


# -- windows ----------------------------------------------------------------------------------------------------------


def test_windows_without_resampling_have_the_gradient_of_iwae():
    """Of 30 steps in windows of 16, in the same noise."""
    x, at = draw_linear(5, 30), {"a": 0.4, "shift": 0.3}
    value, found = gradients(FIVO(4, resample=0.0), x, **at)
    expected, of_iwae = gradients(IWAE(4), x, **at)
    assert value == pytest.approx(expected, abs=1e-9)
    assert found == pytest.approx(of_iwae, rel=1e-9)


@pytest.mark.slow
def test_windows_have_the_gradients_of_whole_sequences(monkeypatch):
    """Means over 20 batches of 200 filters of 18 steps; they differ by over 5 standard errors with p < 1e-4."""
    x, at = draw_linear(1, 18, seed=9).expand(200, 18).contiguous(), {"a": 0.4, "shift": 0.7}
    found = {}
    for longest in (4, 100):
        monkeypatch.setattr("ppvae.inference.sequences.particle_filter.LONGEST_WINDOW", longest)
        for gradient in ("pathwise", "ancestor_score"):
            of = [gradients(FIVO(4, 1.0, gradient), x, **at, seed=seed)[1] for seed in range(20)]
            found[longest, gradient] = torch.tensor([[one[name] for name in at] for one in of])
    for gradient in ("pathwise", "ancestor_score"):
        windows, whole = found[4, gradient], found[100, gradient]
        error = ((windows.var(0) + whole.var(0)) / 20).sqrt()
        assert bool(((windows.mean(0) - whole.mean(0)).abs() < 5 * error).all())
    pathwise = found[4, "pathwise"]
    assert bool((pathwise.mean(0).abs() > 10 * pathwise.std(0) / 20**0.5).all())  # there is a gradient to compare


def test_memory_of_windows_grows_with_the_steps_and_not_with_their_square(monkeypatch):
    """Between 8 and 24 steps, resampled at each: about three times as much, and nine times for whole sequences."""

    def peak(steps: int, longest: int) -> int:
        monkeypatch.setattr("ppvae.inference.sequences.particle_filter.LONGEST_WINDOW", longest)
        x = draw_linear(2, steps)
        with LiveElements() as live:
            gradients(FIVO(200, 1.0), x, a=0.4, shift=0.3)
        return live.peak

    assert peak(24, 4) < 4 * peak(8, 4)
    assert peak(24, 100) > 6 * peak(8, 100)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_estimators_that_are_not_defined():
    with pytest.raises(UsageError, match="FIVO: expected gradient 'pathwise' or 'ancestor_score', found DReG"):
        FIVO(4, gradient="dreg")
    with pytest.raises(UsageError, match="IWAE: expected a gradient other than 'ancestor_score'"):
        IWAE(4, gradient="ancestor_score")


def test_discrete_latents_have_no_path():
    with pytest.raises(ContractError, match="site 's_0'"):
        FIVO(4).loss(*hmm_pair(), draw_linear(3, 4))


def test_sites_summed_out_have_no_steps():
    model, guide, batch = PAIRS["markov"]()
    with pytest.raises(ContractError, match="expected latents that the guide samples, for FIVO"):
        FIVO(4).loss(model, guide, *batch)
