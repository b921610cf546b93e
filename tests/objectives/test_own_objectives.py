"""An objective, or a baseline, of a user's own: what it is asked for, what stands in for what it leaves out."""

from __future__ import annotations

import inspect
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppvae.errors import ContractError, UsageError
from ppvae.models import LinearGaussian
from ppvae.objectives import CIWAE, ELBO, IWAE, MIWAE, Objective, Renyi
from ppvae.objectives.gradients import ScoreFunction
from ppvae.objectives.gradients.control_variates import Baseline, Learned, LeaveOneOut, MovingAverage, NoBaseline

pytestmark = pytest.mark.usefixtures("float64")


class Tempered(Objective):
    """log (1/K sum w^power) / power, whose attribute is set after the constructor of the base class."""

    def __init__(self, num_particles: int = 5, power: float = 0.5, gradient: str = "pathwise"):
        super().__init__(num_particles, gradient)
        self.power = power

    def reduce(self, log_weight):
        return ((self.power * log_weight).logsumexp(0) - math.log(len(log_weight))) / self.power


class MinusUpper(Objective):
    """Minus the chi upper bound, log (1/K sum w^2) / 2 (Dieng et al. 2017)."""

    homogeneity = -1.0

    def reduce(self, log_weight):
        return -((2 * log_weight).logsumexp(0) - math.log(len(log_weight))) / 2


class Square(Objective):
    """Minus the mean square of log-weights: a function that is no bound."""

    homogeneity = None

    def reduce(self, log_weight):
        return -log_weight.square().mean(0)


def loss(objective: Objective) -> float:
    pair = LinearGaussian(3, 2)
    return objective.loss(pair.model, pair.mean_field, torch.randn(4, 3))


@pytest.mark.parametrize("objective", [Tempered(), MinusUpper(5), Square(5), Tempered(1), IWAE(1), ELBO(beta=0.3)])
def test_bounds_of_every_kind_are_taken(objective):
    assert math.isfinite(loss(objective))


WRONG = {
    "a sum over the data": (lambda w: w.logsumexp(0).mean(), r"\[batch\] = \[2\].*found shape \[\]"),
    "no reduction": (lambda w: w, r"found shape \[5, 2\]"),
    "the wrong dim": (lambda w: w.mean(1), r"found shape \[5\]"),
    "a number": (lambda w: 0.0, "found float"),
    "a temperature": (lambda w: 0.7 * w.mean(0), "adds 1 to the bound.*found 0.7.*homogeneity"),
    "an upper bound": (lambda w: -w.logsumexp(0) + math.log(5), "found -1.*-1 for minus an upper bound"),
    "a sum over the draws": (lambda w: w.logsumexp(0), r"expected 1 for 5 log-weights.*found 2.609.*[Dd]ivide"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_reduction_is_named_on_first_use(name):
    reduction, words = WRONG[name]

    class Mine(Objective):
        def reduce(self, log_weight):
            return reduction(log_weight)

    with pytest.raises(UsageError, match=rf"(?s)Mine\.reduce: .*{words}"):
        loss(Mine(5))


@pytest.mark.parametrize(
    "objective",
    [IWAE(4), MIWAE(2, 3), CIWAE(0.3, 4), Renyi(0.4, 4), Renyi(1.0, 4), ELBO(4)],
    ids=lambda o: type(o).__name__,
)
def test_doubly_reparameterised_weights_by_autograd_are_those_in_closed_form(objective):
    log_weight = torch.randn(objective.draws, 6)
    by_autograd = Objective.dreg_weights(objective, log_weight)
    assert torch.allclose(by_autograd, objective.dreg_weights(log_weight), atol=1e-10)


def test_an_objective_with_reduce_alone_takes_every_estimator():
    """Their mean gradients agree: 3000 batches of 5 draws, within 5 standard errors in all 3 numbers."""
    target = {}
    for gradient in ("pathwise", "dreg", "gdreg"):
        torch.manual_seed(0)
        pyro.clear_param_store()
        pair = LinearGaussian(1, 1)
        objective, x = Tempered(5, gradient=gradient), torch.full((3000, 1), 0.7)
        own = torch.nn.ParameterList([torch.zeros(3000), torch.zeros(3000)])
        loc, log_scale = own

        def guide(x, own=own):
            pyro.module("own", own)
            loc, log_scale = own
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal((loc + 0.4)[:, None], (log_scale - 0.2).exp()[:, None]).to_event(1))

        objective.differentiable_loss(pair.model, guide, x).backward()
        assert loc.grad is not None
        assert log_scale.grad is not None
        grads = torch.stack([loc.grad, log_scale.grad])
        target[gradient] = grads.mean(1), grads.std(1) / math.sqrt(3000)
    for gradient in ("dreg", "gdreg"):
        mean, error = target[gradient]
        reference, reference_error = target["pathwise"]
        assert ((mean - reference).abs() < 5 * (error.square() + reference_error.square()).sqrt()).all()
        assert (error < 0.8 * reference_error).any()  # less noise is what they are for


def test_the_signature_of_an_objective_is_that_of_its_constructor():
    assert list(inspect.signature(Tempered).parameters) == ["num_particles", "power", "gradient"]
    assert list(inspect.signature(MIWAE).parameters) == ["num_particles", "num_bounds", "gradient"]


def test_estimators_are_checked_against_the_whole_objective():
    with pytest.raises(UsageError, match="at least 2"):
        Tempered(1, gradient="vimco")
    with pytest.warns(UserWarning, match="STL is biased for Tempered"):
        Tempered(3, gradient="stl")


# Baselines


def bits(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


LOGIT = torch.nn.ParameterList([torch.zeros((), dtype=torch.float64)])


def guess(x):
    pyro.module("logit", LOGIT)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=LOGIT[0].expand(len(x))))


class Constant(Baseline):
    def __init__(self, value):
        self.value = value

    def __call__(self, objective, log_weight, batch):
        return torch.full_like(log_weight, self.value)


def gradient_of_logit(baseline: Baseline, x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    objective = IWAE(3, gradient=ScoreFunction(baseline))
    (found,) = torch.autograd.grad(objective.differentiable_loss(bits, guess, x), LOGIT[0])
    return found


def test_a_baseline_is_what_is_subtracted():
    """The same draws, with a baseline of 2 and of 0: the gradients differ by -2 times the summed score."""
    x = torch.randn(50)
    torch.manual_seed(0)
    objective = IWAE(3, gradient=ScoreFunction(NoBaseline()))
    seen = {}

    class Recorder(Baseline):
        def __call__(self, objective, log_weight, batch):
            seen["log_weight"] = log_weight
            return torch.zeros_like(log_weight)

    zero = gradient_of_logit(Recorder(), x)
    two = gradient_of_logit(Constant(2.0), x)
    torch.manual_seed(0)
    call = objective._call(bits, guess, (x,), {})
    z = call.terms().guide["z"].value
    score = (z - LOGIT[0].sigmoid()).sum().detach()  # of the loss, which is minus the bound
    assert float(two - zero) == pytest.approx(2 * float(score), abs=1e-9)
    assert float(gradient_of_logit(NoBaseline(), x)) == pytest.approx(float(zero), abs=1e-12)


@pytest.mark.parametrize("baseline", [MovingAverage(), LeaveOneOut(), Learned(torch.nn.Unflatten(0, (-1, 1)))])
@pytest.mark.parametrize("objective", [IWAE(3), ELBO(3), MIWAE(3, 2), CIWAE(0.3, 3), Tempered(3)])
def test_baselines_have_the_documented_shape(objective, baseline):
    log_weight = torch.randn(objective.draws, 4)
    if isinstance(baseline, Learned):
        baseline = Learned(torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 1)), torch.nn.Linear(1, 1)))
    assert baseline(objective, log_weight, (torch.zeros(4),)).shape == log_weight.shape


def test_a_leave_one_out_baseline_does_not_depend_on_its_own_draw():
    for objective in (IWAE(4), ELBO(4), MIWAE(2, 2), CIWAE(0.3, 4)):
        log_weight = torch.randn(4, 5)
        other = log_weight.clone()
        other[1] += 3.0
        before, after = (LeaveOneOut()(objective, w, ())[1] for w in (log_weight, other))
        assert torch.allclose(before, after, atol=1e-10)


@pytest.mark.parametrize("shape", [(), (50,), (3,), (3, 1)])
def test_a_baseline_of_another_shape_is_refused(shape):
    class Flat(Baseline):
        def __call__(self, objective, log_weight, batch):
            return torch.zeros(shape)

    with pytest.raises(ContractError, match=r"Flat: expected b_k of each draw, \[particles, batch\] = \[3, 50\]"):
        gradient_of_logit(Flat(), torch.randn(50))


@pytest.mark.parametrize(("given", "found"), [(MovingAverage, "the class MovingAverage"), (lambda *_: 0, "a function")])
def test_a_baseline_is_an_object_of_its_class(given, found):
    with pytest.raises(UsageError, match=f"baseline: expected an object of a subclass of Baseline.*found {found}"):
        ScoreFunction(given)
