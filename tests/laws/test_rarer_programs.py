"""Every objective and every gradient on pairs of a rarer build, against sums over all draws."""

from __future__ import annotations

import functools

import pyro
import pytest
import torch

from ppvae.errors import ContractError
from ppvae.objectives import ELBO, IWAE, PIWAE, TVO, ReweightedWakeSleep
from tests.laws.gradients import LIMIT, SIZE, covariance, errors, exact_of_surrogate, samples, wake
from tests.laws.objectives import OBJECTIVES, log_mean_exp, mean
from tests.programs.rarer import RARER, WITH_PATHS

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:STL is biased")]

BOUNDS = {name: OBJECTIVES[name] for name in ("elbo", "iwae", "renyi", "ciwae", "miwae")}
REFUSED = {  # of gdreg, which moves the noise of a learnt prior
    "helped": r"'z'.*auxiliary site",
    "gaps": r"'extra'.*mask",
    "rate": r"'z'.*Gamma",
    "summed": r"'k'.*summed out",
}


@functools.cache
def exact(toy, count, reduce):
    return RARER[toy].gradient(count, reduce)


@pytest.mark.parametrize("gradient", ["pathwise", "stl", "dreg", "gdreg"])
@pytest.mark.parametrize("toy", WITH_PATHS)
def test_gradients_have_the_gradient_of_the_bound_as_mean(toy, gradient):
    """Of each bound in turn."""
    for name, case in BOUNDS.items():
        if gradient == "stl" and name != "elbo":
            continue
        if gradient == "gdreg" and toy in REFUSED:
            with pytest.raises(ContractError, match=REFUSED[toy]):
                samples(WITH_PATHS[toy], case.build(2, gradient), 10)
            continue
        found = errors(samples(WITH_PATHS[toy], case.build(2, gradient)), exact(toy, case.draws, case.reduce))
        assert max(found.values()) < LIMIT, (name, found)


@pytest.mark.parametrize("gradient", ["score", "vimco"])
def test_scores_of_a_category_and_of_counts_without_end(gradient):
    for name, case in BOUNDS.items():
        found = errors(samples(RARER["counted"], case.build(2, gradient)), exact("counted", case.draws, case.reduce))
        assert max(found.values()) < LIMIT, (name, found)
    for case in BOUNDS.values():
        for other in ("pathwise", "stl", "dreg", "gdreg"):
            with pytest.raises(ContractError, match=r"'k'.*reparameterised"):
                samples(RARER["counted"], case.build(2, other), 10)
    with pytest.raises(ContractError, match=r"'k'.*reparameterised"):
        samples(RARER["counted"], PIWAE(2, 2), 10)


@pytest.mark.parametrize("toy", WITH_PATHS)
@pytest.mark.parametrize("gradient", ["pathwise", "dreg"])
def test_piwae_gives_the_model_iwae_and_the_guide_miwae(gradient, toy):
    own, iwae, elbo = WITH_PATHS[toy], exact(toy, 2, log_mean_exp), exact(toy, 1, mean)
    if toy == "tied":  # parameters of both sides get both parts: as one bound, it is IWAE
        found = errors(samples(own, PIWAE(2, 1, gradient)), iwae)
    else:
        target = {n: (iwae if n in own.model_params else elbo)[n] for n in iwae}
        found = errors(samples(own, PIWAE(1, 2, gradient)), target)
    assert max(found.values()) < LIMIT, found


@pytest.mark.parametrize("toy", ["rate", "counted"])
def test_wake_sleep_and_tvo_have_the_gradients_that_they_state(toy):
    """Their draws are held, and have to be in what is listed: so are those of a grid."""
    found = errors(samples(RARER[toy], ReweightedWakeSleep(2)), exact_of_surrogate(RARER[toy], 2, wake))
    assert max(found.values()) < LIMIT, found
    objective = TVO(2, 3)
    exactly = exact_of_surrogate(RARER[toy], 2, functools.partial(covariance, partition=objective.partition()))
    found = errors(samples(RARER[toy], objective), exactly)
    assert max(found.values()) < LIMIT, found


@pytest.mark.parametrize("toy", RARER)
def test_values_have_the_bound_as_mean(toy):
    """And what is listed sums to one."""
    own = RARER[toy]
    points = own.points(own.leaves())
    for build, count, reduce in ((lambda: ELBO(1), 1, mean), (lambda: IWAE(2), 2, log_mean_exp)):
        objective = build()
        if toy == "counted":
            objective = type(objective)(count, gradient="score")
        target = own.expectation(
            count, lambda p, i, r=reduce: r(torch.stack([p.log_weight[k] for k in i])), own.leaves()
        )
        pyro.clear_param_store()
        model, guide, x, _ = own.pair(SIZE)
        found = torch.stack([torch.tensor(-objective.loss(model, guide, x) / SIZE) for _ in range(10)])
        error = float(found.std()) / 10**0.5
        assert abs(float(found.mean()) - float(target)) < 8 * error + 1e-9  # t of 9 degrees: wrong with 2e-5
    assert float(points.log_mass.logsumexp(0)) == pytest.approx(0, abs=2e-5)
