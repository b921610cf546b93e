"""`ppvae.inference.SVI` in the place of `pyro.infer.SVI`: the same losses, parameters, gradients, to the last bit."""

from __future__ import annotations

import functools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import EnergyDistance, ReweightedWakeSleep, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.abstract_infer import EmpiricalMarginal
from pyro.optim import ClippedAdam, ExponentialLR
from torch import nn

from ppvae import objectives
from ppvae.errors import UsageError
from ppvae.inference import SVI, compiled_step
from ppvae.models import LinearGaussian

X = torch.tensor([0.3, -0.2, 0.9, 1.4])
KERNELS = ["eager", "graph"]


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(compiled_step, "WAIT", 1)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def model(x, *_):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)
    return z


class Guide:
    """Reads "early" or "late", both, or both and uses one, by `mode`, which a step may change."""

    mode = "both"

    def __call__(self, x, *_):
        weight = 0.0
        if self.mode != "late":
            weight = weight + pyro.param("early", torch.tensor(0.1))
        if self.mode != "early":
            late = pyro.param("late", torch.tensor(0.5))
            weight = weight if self.mode == "early of both" else weight + late
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(weight * x, 0.4))


def adam():
    return pyro.optim.Adam({"lr": 0.1})


def in_steps(*modes):
    def run(SVI, guide):
        svi = SVI(model, guide, adam(), Trace_ELBO())
        return [_step(svi, guide, mode) for mode in modes]

    return run


def _step(svi, guide, mode, *args):
    guide.mode = mode
    return svi.step(X, *args)


def met_later_though_stored(SVI, guide):
    guide(X)  # both are in the store
    return in_steps("early", "early", "late", "late", "both", "late")(SVI, guide)


def gradients_left_by_the_caller(SVI, guide):
    svi = SVI(model, guide, adam(), Trace_ELBO())
    losses = [svi.loss_and_grads(model, guide, X), svi.step(X), svi.step(X)]
    losses += [svi.loss_and_grads(svi.model, svi.guide, X), svi.loss_and_grads(svi.model, svi.guide, X), svi.step(X)]
    for p in pyro.get_param_store()._params.values():
        p.grad.add_(1.0)
    return [*losses, svi.step(X), svi.step(X)]


def left_by_another_svi(SVI, guide):
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO())
    return [svi.step(X), SVI(model, guide, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO()).step(X), svi.evaluate_loss(X)]


def of_loss(loss, **options):
    def run(SVI, guide):
        svi = SVI(model, guide, adam(), loss(), **options)
        return [*(svi.step(X) for _ in range(4)), svi.evaluate_loss(X)]

    return run


def a_function(model, guide, *args):
    return Trace_ELBO().differentiable_loss(model, guide, *args)


def own_gradients(model, guide, *args):
    loss = a_function(model, guide, *args)
    (2 * loss).backward()
    return loss


def with_schedule_and_clipping(SVI, guide):
    optim = ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5}, {"clip_norm": 0.3})
    svi, losses = SVI(model, guide, optim, Trace_ELBO()), []
    for mode in ("both", "early of both", "both", "late"):
        losses.append(_step(svi, guide, mode))
        optim.step()
    return losses


def with_arguments_by_parameter(SVI, guide):
    optim = ClippedAdam(lambda name: {"lr": 0.3 if name == "late" else 0.01, "weight_decay": 0.1})
    svi = SVI(model, guide, optim, Trace_ELBO())
    return [_step(svi, guide, mode) for mode in ("early", "both", "early of both", "early of both")]


def with_keywords(SVI, guide):
    svi = SVI(lambda x, unused: model(x), lambda x, unused: guide(x), adam(), Trace_ELBO())
    return [svi.step(X, unused=3), svi.step(x=X, unused=None), svi.evaluate_loss(X, unused=1)]


def without_arguments(SVI, guide):
    svi = SVI(lambda: subsampled(X), lambda: guide(X), adam(), Trace_ELBO())
    return [*(svi.step() for _ in range(6)), svi.evaluate_loss()]


def subsampled(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("some", len(x), subsample_size=2) as rows:
        pyro.sample("x", dist.Normal(z[rows], 0.5), obs=x[rows])


def with_a_distribution_made_once(SVI, guide):
    svi = SVI(model_of_prior(), guide, adam(), Trace_ELBO())
    return [*(svi.step(X) for _ in range(4)), svi.evaluate_loss(X)]


def model_of_prior():
    """Its prior keeps the validation of arguments that was on when it was made."""
    prior = dist.Normal(0.0, 1.0, validate_args=True).expand([len(X)])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 0.5, validate_args=True), obs=x)

    return model


def with_baseline(SVI, guide):
    def score_guide(x):
        weight = pyro.param("early", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            normal = dist.Normal(weight * x, 0.4).has_rsample_(False)
            pyro.sample("z", normal, infer={"baseline": {"nn_baseline": net, "nn_baseline_input": x}})

    torch.manual_seed(3)
    net = nn.Linear(4, 4)
    svi = SVI(model, score_guide, adam(), TraceGraph_ELBO())
    return [*(svi.step(X) for _ in range(4)), *net.weight.detach().flatten().tolist()]


def in_a_run(SVI, guide):
    svi = SVI(model, guide, adam(), Trace_ELBO(), num_samples=3, num_steps=4)
    traces = svi.run(X).exec_traces
    marginal = EmpiricalMarginal(svi, "z").mean
    return [len(traces), *(t.nodes["z"]["value"].sum().item() for t in traces), marginal.sum().item()]


PROGRAMS = {
    "met later": in_steps("early", "both", "late", "early"),
    "met later though stored": met_later_though_stored,
    "without a gradient in some steps": in_steps("both", "both", "early of both", "early of both", "both"),
    "without a gradient at first": in_steps("early of both", "early of both", "both", "early of both"),
    "not met in some steps": in_steps("both", "both", "early", "early", "both"),
    "gradients left by the caller": gradients_left_by_the_caller,
    "left by another SVI": left_by_another_svi,
    "a function": of_loss(lambda: a_function),
    "a method": of_loss(lambda: Trace_ELBO(num_particles=2).differentiable_loss),
    "own gradients": of_loss(lambda: a_function, loss_and_grads=own_gradients),
    "a tuple": of_loss(lambda: ReweightedWakeSleep(num_particles=3, vectorize_particles=False)),
    "no ELBO": of_loss(lambda: EnergyDistance(num_particles=2)),
    "schedule and clipping": with_schedule_and_clipping,
    "arguments by parameter": with_arguments_by_parameter,
    "keywords": with_keywords,
    "no arguments": without_arguments,
    "a distribution made once": with_a_distribution_made_once,
    "baseline": with_baseline,
    "run": in_a_run,
}


def outcome(make, program):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Pyro's, of num_samples, num_steps and run
        losses = program(make, Guide())
    params = dict(pyro.get_param_store().named_parameters())
    gradients = {name: None if p.grad is None else p.grad.tolist() for name, p in params.items()}
    return losses, {name: p.tolist() for name, p in params.items()}, gradients


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_as_pyro(name, kernels):
    def ours(*args, **options):
        svi = SVI(*args, **options)
        svi.use(kernels)
        return svi

    losses, params, gradients = outcome(pyro.infer.SVI, PROGRAMS[name])
    found = outcome(ours, PROGRAMS[name])
    for a, b in zip(found[0], losses, strict=True):
        assert a == (pytest.approx(b, rel=1e-6) if kernels == "graph" else b)
    assert found[1:] == (params, gradients)
    assert type(found[0][0]) is type(losses[0])


class OfAType:
    """A model that holds a type with arguments, whose `__dict__` is no dict."""

    def __init__(self):
        self.kind = list[int]

    def __call__(self, x):
        return model(x)


@pytest.mark.parametrize(("model", "args", "loss"), [
    (model, (X,), Trace_ELBO()), (model, (X,), a_function), (model, (X,), Trace_ELBO().differentiable_loss),
    (lambda: subsampled(X), (), Trace_ELBO()), (model_of_prior(), (X,), Trace_ELBO()),
    (OfAType(), (X,), Trace_ELBO()), (model, (X,), EnergyDistance(num_particles=2)),
])  # fmt: skip
def test_a_graph_takes_these_steps(model, args, loss):
    """The comparison above is of graphs where it should be."""
    guide = Guide()
    svi = SVI(model, lambda *_: guide(X), adam(), loss)
    svi.use("graph")
    for _ in range(3):
        svi.step(*args)
    assert svi.kernels == "graph"
    assert len(svi._compiled_step.function.graphs) == 1


class Trainer:
    """Holds its model, its optimizer and its SVI, so that the model's state has all of them."""

    def __init__(self, make):
        self.optim = ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5})
        self.svi = make(self.model, Guide(), self.optim, Trace_ELBO())

    def model(self, x):
        return model(x)

    def steps(self):
        losses = []
        for _ in range(5):
            losses.append(self.svi.step(X))
            self.optim.step()
        return losses


def test_what_trains_a_model_is_no_state_of_it(caplog):
    def steps(make):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        trainer = Trainer(make)
        return trainer.steps(), trainer.svi

    expected, _ = steps(pyro.infer.SVI)
    with caplog.at_level("INFO", "ppvae"):
        found, svi = steps(lambda *args: SVI(*args, compile=True))
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(svi._compiled_step.function.graphs) == 1
    assert "made anew" not in caplog.text


@pytest.mark.parametrize(("loss", "own", "why"), [
    (ReweightedWakeSleep(num_particles=3, vectorize_particles=False), None, "values of tensors"),
    (a_function, own_gradients, "a function of the caller's"),
])  # fmt: skip
def test_what_no_graph_takes_is_said(loss, own, why, caplog):
    svi = SVI(model, Guide(), adam(), loss, own, compile=True)
    for _ in range(3):
        svi.step(X)
    assert svi.kernels == "eager"
    assert why in caplog.text


def test_a_program_that_is_replaced():
    def step_of_both(make):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = make(model, Guide(), adam(), Trace_ELBO())
        losses = [svi.step(X) for _ in range(3)]
        svi.model = lambda x: model(x - 1.0)
        return [*losses, *(svi.step(X) for _ in range(3))]

    expected = step_of_both(pyro.infer.SVI)
    assert step_of_both(lambda *args: SVI(*args, compile=True)) == pytest.approx(expected, rel=1e-5)


def test_it_is_a_pyro_svi():
    svi = SVI(model, Guide(), adam(), Trace_ELBO())
    assert isinstance(svi, pyro.infer.SVI)
    for name in ("run", "step", "evaluate_loss", "loss", "loss_and_grads", "marginal", "information_criterion"):
        assert callable(getattr(svi, name))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("factory", [
    functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), functools.partial(torch.optim.Adam, lr=0.1),
    functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1),
])  # fmt: skip
def test_one_torch_optimizer_for_all_takes_the_steps_of_one_for_each(factory, kernels):
    """A parameter that is not met keeps its value and its momentum; one that is met moves on by its momentum."""
    modes = ("both", "both", "early", "early of both", "late", "both", "early of both")

    def joint(SVI, guide):
        svi = SVI(model, guide, factory, Trace_ELBO())
        svi.use(kernels)
        return [_step(svi, guide, mode) for mode in modes]

    def each(SVI, guide):
        options = dict(factory.keywords)
        return [
            _step(svi, guide, mode)
            for svi in [SVI(model, guide, pyro.optim.PyroOptim(factory.func, options), Trace_ELBO())]
            for mode in modes
        ]

    _, params, gradients = outcome(pyro.infer.SVI, each)
    _, found, found_gradients = outcome(SVI, joint)
    assert found == pytest.approx(params, abs=1e-6)
    assert found_gradients == gradients


def test_what_is_no_optimizer():
    params = [torch.zeros(1, requires_grad=True)]
    with pytest.raises(UsageError, match=r"optim: expected a PyroOptim, or a function .* found Adam"):
        SVI(model, Guide(), torch.optim.Adam(params), Trace_ELBO())


def test_state_of_a_pyro_optim_that_no_parameter_takes_is_said(caplog):
    """Two pairs of a process never share names, so that state of the first one does not fit the second."""

    def trained(state=None, late=False):
        pyro.clear_param_store()
        torch.manual_seed(0)
        pair, optim = LinearGaussian(3, 2), adam()
        if state is not None and not late:
            optim.set_state(state)
        svi = SVI(pair.model, pair.mean_field, optim, Trace_ELBO())
        losses = [svi.step(torch.ones(4, 3)) for _ in range(2)]
        if late:
            optim.set_state(optim.get_state())
            svi.step(torch.ones(4, 3))
        return optim.get_state(), losses

    state, _ = trained()
    assert not caplog.messages
    other, _ = trained(state)
    assert not state.keys() & other.keys()
    assert len(caplog.messages) == 1
    assert f"no parameter takes the state of {len(state)}, as of {next(iter(state))!r}" in caplog.messages[0]
    assert repr(min(other)) in caplog.messages[0]
    trained(late=True)
    assert "it was set after the first step" in caplog.messages[1]


def test_state_of_a_pyro_optim_is_taken_as_parameters_are_met(caplog):
    guide = Guide()
    svi = SVI(model, guide, adam(), Trace_ELBO())
    svi.step(X)
    state = svi.optim.get_state()
    again = SVI(model, guide, adam(), Trace_ELBO())
    again.optim.set_state(state)
    for mode in ("early", "late"):  # the second one is met later
        _step(again, guide, mode)
    assert not caplog.messages
    assert not again.optim._state_waiting_to_be_consumed


# -- several steps in one call ---------------------------------------------------------------------------------------


def trained(kernels, together, steps=20, dtype=torch.float64):
    """(losses, parameters, gradients, kernels) of a small pair after steps one by one, or in one call."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    pair = LinearGaussian(5, 2).to(dtype)
    batches = [(torch.randn(7, 5, dtype=dtype),) for _ in range(steps)]
    svi = SVI(pair.model, pair.mean_field, functools.partial(torch.optim.Adam, lr=0.05), Trace_ELBO())
    svi.use(kernels, settled=True)
    torch.manual_seed(1)
    losses = svi.steps(iter(batches)) if together else [svi.step(*batch) for batch in batches]
    params = [p.detach().clone() for p in pair.parameters()]
    return losses, params, [p.grad for p in pair.parameters()], svi.kernels


@pytest.mark.parametrize("kernels", KERNELS)
def test_several_steps_are_eager_steps_to_the_last_bit(kernels):
    losses, params, gradients, _ = trained("eager", together=False)
    found = trained(kernels, together=True)
    assert found[0] == (pytest.approx(losses, rel=1e-12) if kernels == "graph" else losses)
    torch.testing.assert_close(found[1:3], (params, gradients), rtol=0, atol=0)
    assert found[3] == kernels


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "digits"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_several_compiled_steps_are_eager_steps_up_to_rounding(dtype, digits):
    eager, alone, together = (
        trained(kernels, many, dtype=dtype)
        for kernels, many in (("eager", False), ("compiled", False), ("compiled", True))
    )
    assert together[3] == "compiled"
    assert together[0] == alone[0]
    torch.testing.assert_close(together[1:3], alone[1:3], rtol=0, atol=0)
    assert together[0] == pytest.approx(eager[0], rel=digits)
    torch.testing.assert_close(together[1], eager[1], rtol=digits, atol=digits)


def fresh_svi():
    """A guide with its first parameters, and its SVI."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    guide = Guide()
    return guide, SVI(model, guide, adam(), Trace_ELBO())


@pytest.mark.parametrize("kernels", KERNELS)
def test_several_steps_take_the_gradient_that_the_caller_has_left(kernels):
    ends = []
    for together in (False, True):
        guide, svi = fresh_svi()
        svi.use(kernels)
        svi.step(X)
        for p in svi.params:
            p.grad = torch.ones_like(p)
        guide.mode = "early"  # "late" is met no more, and keeps its gradient
        batches = [(X,)] * 4
        _ = svi.steps(batches) if together else [svi.step(*batch) for batch in batches]
        ends.append([(p.detach().clone(), p.grad) for p in svi.params])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_a_change_between_two_calls_of_several_steps_is_seen():
    """Guards are asked at the first step of each call."""
    guide = Guide()
    svi = SVI(model, guide, adam(), Trace_ELBO())
    svi.use("graph")
    svi.steps([(X,)] * 5)
    late = pyro.param("late").detach().clone()
    guide.mode = "early"
    svi.steps([(X,)] * 2)
    assert torch.equal(pyro.param("late"), late)
    guide.mode = "both"
    for _ in range(20):  # a graph is captured anew, whose next check would not be due
        svi.step(X)
    late = pyro.param("late").detach().clone()
    guide.mode = "early"
    svi.steps([(X,)] * 2)
    assert torch.equal(pyro.param("late"), late)


def test_a_parameter_that_the_loss_depends_on_no_more_counts_as_of_zero_gradient():
    """It is met, and momentum moves it, in several steps as in single ones."""
    ends = []
    for together in (False, True):
        guide, svi = fresh_svi()

        def batches(guide=guide):
            for mode in ("both", "both", "early of both", "early of both", "both"):
                guide.mode = mode
                yield (X,)

        _ = svi.steps(batches()) if together else [svi.step(*batch) for batch in batches()]
        ends.append([(p.detach().clone(), p.grad) for p in svi.params])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def compiled_svi(optim):
    """A small pair whose steps are compiled and whose Adam is a kernel, after two steps."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    pair = LinearGaussian(5, 2)
    svi = SVI(pair.model, pair.mean_field, optim, Trace_ELBO())
    svi.use("compiled", settled=True)
    batch = (torch.randn(7, 5),)
    svi.steps([batch] * 2)
    assert svi.kernels == "compiled"
    return svi, batch


def test_steps_on_a_list_ask_for_the_kernel_of_adam_as_seldom_as_for_changes(monkeypatch):
    svi, batch = compiled_svi(functools.partial(torch.optim.Adam, lr=0.05))
    asked = []
    own = type(svi.optim).native

    def native(optim, params):
        asked.append(1)
        return own(optim, params)

    monkeypatch.setattr(type(svi.optim), "native", native)
    svi.steps([batch] * 66)
    among_list = len(asked)
    assert 3 <= among_list <= 12, "at each look and comparison"
    svi.steps(iter([batch] * 66))
    assert len(asked) - among_list == 66, "the iterator's code may have changed the optimizer"
    svi.step(*batch)
    assert len(asked) - among_list == 67


@pytest.mark.slow
@pytest.mark.parametrize("of_pyro", [True, False])
def test_a_learning_rate_that_changes_among_several_compiled_steps_is_taken(of_pyro):
    ends = []
    for together in (False, True):
        optim = pyro.optim.Adam({"lr": 0.05}) if of_pyro else functools.partial(torch.optim.Adam, lr=0.05)
        svi, batch = compiled_svi(optim)

        def batches(svi=svi, batch=batch):
            for i in range(40):
                if i == 20:
                    own = svi.optim.optim_objs.values() if of_pyro else [svi.optimizer]
                    for o in own:
                        o.param_groups[0]["lr"] = 0.5
                yield batch

        torch.manual_seed(1)
        _ = svi.steps(batches()) if together else [svi.step(*b) for b in batches()]
        ends.append([p.detach().clone() for p in svi.params])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def guide_by_batch(x):
    """Meets "late" unless the batch asks for a gradient."""
    weight = pyro.param("early", torch.tensor(0.1))
    if not x.requires_grad:
        weight = weight + pyro.param("late", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(weight * x.detach(), 0.4))


def test_a_batch_that_is_not_captured_among_several_compiled_steps_takes_the_optimizers_own_step():
    """Its step is eager and meets fewer parameters, which the kept kernel of Adam has not seen."""
    ends = []
    for together in (False, True):
        pyro.clear_param_store()
        svi = SVI(model, guide_by_batch, functools.partial(torch.optim.Adam, lr=0.1), Trace_ELBO())
        svi.use("compiled", settled=True)
        batches = [(X,)] * 4 + [(X.clone().requires_grad_(),)] + [(X,)] * 2
        torch.manual_seed(0)
        _ = svi.steps(batches) if together else [svi.step(*b) for b in batches]
        assert svi.kernels == "compiled"
        ends.append([p.detach().clone() for p in svi.params])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_a_step_that_fails_among_several_leaves_zero_gradients():
    svi = SVI(model, Guide(), adam(), Trace_ELBO())
    with pytest.raises(ZeroDivisionError):
        svi.steps((X / (1 if i < 3 else 1 // 0),) for i in range(5))
    assert all(p.grad is not None and not p.grad.any() for p in svi.params)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_tensor_read_into_python_that_changes_among_several_steps_is_seen(kernels):
    """Its values are no Python state: they are compared at every step, not at one of 32."""
    scale, ends = torch.ones(()), []

    def reading(x):
        return model(x * float(scale))

    def batches():
        for i in range(60):
            if i == 40:
                scale.fill_(5.0)
            yield (X,)

    for together in (False, True):
        _, svi = fresh_svi()
        scale.fill_(1.0)
        svi.model = reading
        svi.use(kernels)
        found = svi.steps(batches()) if together else [svi.step(*batch) for batch in batches()]
        ends.append((found, [p.detach().clone() for p in svi.params]))
    assert ends[0][0] == ends[1][0]
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=0, atol=0)


class Staircase(objectives.ELBO):
    """A loss that a subclass scales by a number of its own, which it changes at step 40."""

    scale = 1.0

    def set_step(self, step):
        super().set_step(step)
        self.scale = 1.0 if step < 40 else 3.0

    def differentiable_loss(self, *args, **kwargs):
        return self.scale * super().differentiable_loss(*args, **kwargs)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_schedule_of_a_subclass_is_followed_among_several_steps(kernels):
    ends = []
    for together in (False, True):
        guide, _ = fresh_svi()
        svi = SVI(model, guide, adam(), Staircase())
        svi.use(kernels)
        found = svi.steps([(X,)] * 60) if together else [svi.step(X) for _ in range(60)]
        ends.append((found, [p.detach().clone() for p in svi.params]))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-12)
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=0, atol=0)
