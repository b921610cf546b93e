"""Captured steps: the same losses, gradients, buffers and noise as the pair's own runs, and never stale."""

from __future__ import annotations

import functools
import math
import random
import sys
import types
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from ppvae import VAE, fit, likelihoods, log_marginal, objectives, posteriors, priors
from ppvae import nn as networks
from ppvae.compilation import function as functions
from ppvae.compilation import graph as graphs
from ppvae.compilation.graph import CaptureError, Graph, compile_module
from ppvae.compilation.random_ops import with_fixed_noise
from ppvae.errors import TrainingError
from ppvae.evaluation.importance import compiled_weights as compiled
from ppvae.inference import compiled_step as capture
from ppvae.inference.evaluation_mode import eval_mode
from ppvae.inference.optimizers.fused import FusedAdam
from ppvae.inference.param_store import ParamScope
from ppvae.inference.svi import SVI
from ppvae.models import LinearGaussian
from ppvae.objectives.auxiliary import AuxiliaryLoss
from ppvae.objectives.gradients import REBAR, ScoreFunction
from ppvae.objectives.gradients.control_variates import Baseline, Learned
from ppvae.objectives.schedules import Cyclical
from ppvae.training import validation
from tests.laws import parts
from tests.likelihoods import test_likelihoods
from tests.posteriors import test_posteriors
from tests.priors import test_priors
from tests.programs.strangers import PAIRS

ADAM = functools.partial(torch.optim.Adam, lr=1e-2)
SGD = functools.partial(torch.optim.SGD, lr=1e-3)  # Adam would blow up gradients that are rounding alone
OBJECTIVES = {
    "ELBO": objectives.ELBO,
    "beta": lambda: objectives.ELBO(2, beta=0.5),
    "IWAE": lambda: objectives.IWAE(3),
    "Trace_ELBO": lambda: Trace_ELBO(num_particles=2),
    "Trace_ELBO in one plate": lambda: Trace_ELBO(num_particles=2, vectorize_particles=True),
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
}
EAGER_PARTS = {"PerDatum", "PerDatum FullRank"}  # they look at values: an index
UNFIT = {  # what the pair cannot be trained on, captured or not
    ("discrete", "ELBO"), ("discrete", "IWAE"), ("enumerated_both", "IWAE"), ("enumerated_both", "Trace_ELBO"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def clean():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


@pytest.fixture
def at_once(monkeypatch):
    """A graph is made as soon as a kind of batch is met, instead of after some steps."""
    monkeypatch.setattr(capture, "WAIT", 1)


def trained(pair, objective, kernels: str, steps: int = 6, optim: Any = ADAM) -> tuple[Any, ...]:
    """(losses, gradients, parameters, buffers, random state) after some steps, and the SVI that took them."""
    model, guide, batch = pair
    svi = SVI(model, guide, optim, objective)
    svi.use(kernels, settled=True)
    torch.manual_seed(5)
    losses, grads = [], []
    for _ in range(steps):
        losses.append(svi.gradients(*batch))
        grads.append([None if p.grad is None else p.grad.clone() for p in svi.params])
        svi.update()
    modules = [m for fn in (model, guide) for m in _modules(fn)]
    buffers = [b.clone() for m in modules for b in m.buffers()]
    return losses, grads, [p.detach().clone() for p in svi.params], buffers, torch.get_rng_state(), svi


def _modules(fn: Any) -> list[nn.Module]:
    things = [getattr(fn, "__self__", fn), *(c.cell_contents for c in getattr(fn, "__closure__", None) or ())]
    return [t for t in things if isinstance(t, nn.Module)]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return bool(torch.equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def refusals(caplog) -> list[str]:
    return [r.message for r in caplog.records if "without a captured graph" in r.message]


def check_same(build, objective, caplog, may_refuse: bool = False) -> None:
    """Captured and eager, to the last bit; the fourth step is the first that the graph takes unwatched."""
    with ParamScope().entered():
        eager = trained(build(), objective(), "eager", 4)
    with ParamScope().entered():
        pair = build()
        captured = trained(pair, objective(), "graph", 4)
        kept = may_refuse or is_kept_through_evaluation(*pair, captured[-1])
    assert bool(refusals(caplog)) == may_refuse, refusals(caplog)
    assert captured[-1].kernels == ("eager" if may_refuse else "graph")
    assert all(same(a, b) for a, b in zip(eager[:-1], captured[:-1], strict=True))
    assert any(g is not None and bool((g != 0).any()) for g in eager[1][-1])
    assert kept, "the graph was made anew after an evaluation"


def is_kept_through_evaluation(model, guide, batch, svi) -> bool:
    """Whether the next step is taken by the same graph after the pair was run as a validation runs it."""
    graphs = dict(svi._compiled_step.function.graphs)
    with torch.no_grad(), eval_mode(model, guide):
        drawn = pyro.poutine.trace(guide).get_trace(*batch)
        pyro.poutine.replay(model, drawn)(*batch)
    svi.gradients(*batch)
    return bool(graphs) and svi._compiled_step.function.graphs == graphs


# -- the same as the pair's own runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "objective"), [
    *((name, ("ELBO", "Trace_ELBO")[i % 2]) for i, name in enumerate(PAIRS)),
    *(pytest.param(name, "IWAE", marks=pytest.mark.slow) for name in PAIRS),
    *(pytest.param(name, ("Trace_ELBO", "ELBO")[i % 2], marks=pytest.mark.slow) for i, name in enumerate(PAIRS)),
])  # fmt: skip
def test_strangers_are_captured_to_the_last_bit(name, objective, caplog):
    if (name, objective) in UNFIT:
        pytest.skip("cannot be trained on it")
    check_same(PAIRS[name], OBJECTIVES[objective], caplog)


@pytest.mark.parametrize("objective", [n for n in OBJECTIVES if n not in ("ELBO", "Trace_ELBO")])
@pytest.mark.parametrize("name", ["modules", pytest.param("inner_plate", marks=pytest.mark.slow)])
def test_objectives_are_captured_to_the_last_bit(name, objective, caplog):
    check_same(PAIRS[name], OBJECTIVES[objective], caplog)


TWICE = {  # objectives that run a side more than once in a step
    "stl": lambda: objectives.ELBO(3, gradient="stl"),
    "dreg": lambda: objectives.IWAE(3, "dreg"),
    "gdreg": lambda: objectives.IWAE(3, "gdreg"),
    "piwae": lambda: objectives.PIWAE(2, 2),
    "wake": lambda: objectives.ReweightedWakeSleep(3),
    "sleep": lambda: objectives.ReweightedWakeSleep(3, 1.0, 1.0),
    "infovae": lambda: objectives.InfoVAE(num_particles=2),
}


@pytest.mark.parametrize(("name", "objective"), [
    ("modules", "stl"), ("conv", "dreg"), ("modules", "gdreg"), ("conv", "sleep"),
    *(pytest.param(n, o, marks=pytest.mark.slow) for n in ("modules", "conv", "hierarchical") for o in TWICE),
])  # fmt: skip
def test_sides_that_run_twice_are_captured_to_the_last_bit(name, objective, caplog):
    check_same(PAIRS[name], TWICE[objective], caplog)


def test_dropout_in_a_side_that_runs_twice_is_run_eagerly(caplog):
    """It has to draw the same again, and a graph cannot go back in its noise."""

    def build():
        vae, x = dropped()
        return vae.model, vae.guide, (x,)

    check_same(build, TWICE["dreg"], caplog, may_refuse=True)


def prior_pair(name):
    part, prior, fn = test_priors.made(name)
    size = fn.event_shape[0]
    x = (torch.rand(5, parts.FEATURES) > 0.5).double()
    given = () if part.context is None else (part.context.expand(5, *part.context.shape[1:]),)
    decoder = networks.mlp(size, parts.FEATURES, hidden=(6,))
    vae = VAE(prior, likelihoods.Bernoulli(decoder), test_priors.posterior_for(part.kind, size)).double()
    return vae.model, vae.guide, (x, *given)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, p in parts.PRIORS.items() if p.kind != "discrete"])
def test_priors_are_captured_or_say_why(name, caplog):
    check_same(functools.partial(prior_pair, name), objectives.ELBO, caplog, may_refuse=name in EAGER_PARTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in parts.POSTERIORS if n != "Categorical"])
def test_posteriors_are_captured_or_say_why(name, caplog):
    def build():
        vae, batch = test_posteriors.pair_of(name)
        return vae.model, vae.guide, batch

    by_paths = parts.POSTERIORS[name].reparameterised
    check_same(build, objectives.ELBO if by_paths else Trace_ELBO, caplog, may_refuse=name in EAGER_PARTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", parts.LIKELIHOODS)
def test_likelihoods_are_captured_or_say_why(name, caplog):
    def build():
        part, x = test_likelihoods.drawn(name)
        vae = test_likelihoods.vae_of(name, part)
        return vae.model, vae.guide, test_likelihoods.batch_of(name, x)

    check_same(build, objectives.ELBO, caplog, may_refuse=name in EAGER_PARTS)


def dropped(x_size: int = 6):
    """A VAE with batch norm and dropout."""
    torch.manual_seed(3)
    body = nn.Sequential(nn.Linear(x_size, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 4))
    likelihood = likelihoods.Bernoulli(networks.mlp(2, x_size, hidden=(5,)))
    vae = VAE(priors.StandardNormal(2), likelihood, posteriors.DiagonalNormal(body))
    return vae, (torch.rand(7, x_size) > 0.5).float()


def test_batch_norm_and_dropout_are_as_in_an_eager_run(caplog):
    def build():
        vae, x = dropped()
        return vae.model, vae.guide, (x,)

    check_same(build, Trace_ELBO, caplog)
    vae, x = dropped()
    before = vae.posterior.net[1].running_mean.clone()
    trained((vae.model, vae.guide, (x,)), Trace_ELBO(), "graph", 5)
    assert int(vae.posterior.net[1].num_batches_tracked) == 5
    assert not torch.equal(before, vae.posterior.net[1].running_mean)


def compare(svi: SVI, eager: SVI, *batch: torch.Tensor) -> None:
    """One step of both, from the same noise."""
    torch.manual_seed(11)
    a = svi.step(*batch)
    torch.manual_seed(11)
    assert a == eager.step(*batch)
    assert all(map(torch.equal, svi.params, eager.params))


class Beta:
    """A pair whose model reads plain Python state in many places."""

    table = (0.0, 1.0)

    def __init__(self):
        self.options, self.shift, self.hidden = {"scale": [1.0]}, torch.zeros(3), types.SimpleNamespace(loc=0.0)
        self.temperature = torch.tensor(1.0)
        self.prefix = f"beta{next(_names)}"

    def model(self, x):
        w = pyro.param(f"{self.prefix}.w", lambda: torch.full((2, 3), 0.3))
        loc = self.hidden.loc + self.table[1] * GLOBAL + settings.number
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc * torch.ones(2), float(self.temperature)).to_event(1))
            pyro.sample("x", dist.Normal(z @ w + self.shift, self.options["scale"][0]).to_event(1), obs=x)

    def guide(self, x):
        loc = pyro.param(f"{self.prefix}.loc", lambda: torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).expand([len(x), 2]).to_event(1))


GLOBAL = 1.0
settings = types.ModuleType("settings_of_a_user")
settings.number = 0.5
_names = iter(range(1000))
CHANGES = {
    "an attribute of an attribute": lambda pair: setattr(pair.hidden, "loc", 1.5),
    "a list in a dict": lambda pair: pair.options["scale"].__setitem__(0, 2.0),
    "a dict": lambda pair: pair.options.update(scale=[3.0]),
    "an attribute of the class": lambda pair: setattr(Beta, "table", (0.0, Beta.table[1] + 1.0)),
    "a global": lambda pair: globals().update(GLOBAL=GLOBAL + 1.0),
    "a module's number": lambda pair: setattr(settings, "number", settings.number + 1.0),
    "a tensor that is another": lambda pair: setattr(pair, "shift", torch.ones(3)),
    "a tensor in place": lambda pair: pair.shift.add_(1.0),
    "a tensor that is read into Python": lambda pair: pair.temperature.fill_(2.0),
    "a parameter in place": lambda pair: pyro.get_param_store()._params[f"{pair.prefix}.w"].data.mul_(2.0),
    "a parameter's storage": lambda pair: setattr(
        p := pyro.get_param_store()._params[f"{pair.prefix}.w"], "data", p * 2
    ),
    "the method": lambda pair: setattr(pair, "model", types.MethodType(Beta.other, pair)),
}


def _other(self, x):
    self.__class__.model(self, 2 * x)


Beta.other = _other


def _called(pair, x):
    pair.model(x)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_at_the_next_step(change, at_once, caplog):
    x = torch.randn(5, 3)
    loss = Trace_ELBO()
    pairs = [Beta(), Beta()]
    svis = [SVI(functools.partial(_called, p), p.guide, ADAM, loss) for p in pairs]
    svis[0].use("graph")
    for _ in range(3):
        compare(*svis, x)
    graph = next(iter(svis[0]._compiled_step.function.graphs.values()))
    assert graph.calls == 2
    CHANGES[change](pairs[0])
    if change not in ("an attribute of the class", "a global", "a module's number"):
        CHANGES[change](pairs[1])
    for _ in range(3):
        compare(*svis, x)
    assert not refusals(caplog)


def test_the_objective_is_watched(at_once):
    x, objective = torch.randn(5, 3), objectives.ELBO(beta=1.0)
    svis = []
    for kernels in ("graph", "eager"):
        torch.manual_seed(0)
        pair = LinearGaussian(3, 2)
        svis.append(SVI(pair.model, pair.mean_field, ADAM, objective))
        svis[-1].use(kernels)
    for beta in (1.0, 1.0, 0.3, 0.3, 0.3, 0.7):
        objective.beta = beta
        compare(*svis, x)


def test_shapes_types_modes_and_loaded_weights(at_once):
    made = [dropped() for _ in range(2)]
    svis = [SVI(vae.model, vae.guide, ADAM, Trace_ELBO()) for vae, _ in made]
    svis[0].use("graph")
    x = made[0][1]
    weights = {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in made[0][0].state_dict().items()}
    for rows in (7, 7, 3, 7, 3):
        compare(*svis, x[:rows])
    assert len(svis[0]._compiled_step.function.graphs) == 2
    for act in (lambda vae: vae.load_state_dict(weights), lambda vae: vae.eval(), lambda vae: vae.train()):
        for vae, _ in made:
            act(vae)
        for _ in range(3):
            compare(*svis, x)


def test_a_graph_waits_longer_after_each_change(monkeypatch, caplog):
    real = functions.capture
    torch.manual_seed(0)
    pair, x, objective = LinearGaussian(3, 2).double(), torch.randn(50, 3).double(), objectives.ELBO()
    svi = SVI(pair.model, pair.mean_field, ADAM, objective)
    svi.use("graph")
    svi.step(x)
    made = []
    monkeypatch.setattr(functions, "capture", lambda *a: made.append(real(*a)) or made[-1])
    for step in range(150):  # a warm-up: each step has another beta
        objective.beta = 0.5 + step / 1000
        svi.step(x)
    assert len(made) == 2  # after 40 steps, after 80 more; not yet after the next 160
    for _ in range(160):
        svi.step(x)
    assert svi._compiled_step.function.graphs
    said = []
    for _ in range(3):  # once, however often
        objective.beta += 0.1
        for _ in range(641):
            svi.step(x)
        said += [r.message for r in caplog.records if r.levelname == "WARNING"]
        caplog.clear()
    assert said == ["ppvae: captured steps are made anew, later after each change (4): loss.beta"]


SCHEDULES = {
    "warm-up": lambda: objectives.ELBO(2, warmup=15),
    "cycles": lambda: objectives.ELBO(beta=Cyclical(5), free_bits=0.1),
    "capacity": lambda: objectives.Capacity(2.0, gamma=1.0, warmup=15),
    "of a sum": lambda: AuxiliaryLoss(objectives.ELBO(warmup=4), lambda x: x.sum(-1)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_followed_by_one_graph(name, caplog):
    ends = []
    for kernels in ("eager", "graph"):
        with ParamScope().entered():
            objective = SCHEDULES[name]()
            ends.append((*trained(PAIRS["modules"](), objective, kernels, 20), objective.scheduled_values()))
    assert all(same(a, b) for i, (a, b) in enumerate(zip(*ends, strict=True)) if i != 5)
    graph = next(iter(ends[1][5]._compiled_step.function.graphs.values()))
    assert graph.calls == 19
    assert not refusals(caplog)
    assert ends[1][-1].keys() == {"capacity" if name == "capacity" else "beta"}


def test_a_warm_up_is_resumed_with_the_same_bits(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(sys.modules["ppvae.training.trainer"], "WORTH_CAPTURING", 0.0)
    monkeypatch.setattr(capture, "SECONDS_PER_NODE", 1e9)  # nothing is worth compiling
    ends = []
    for epochs, options in (((4,), {"compile": False}), ((2, 4), {"directory": tmp_path / "run", "resume": True})):
        for number in epochs:
            run, end = fitted_with(epochs=number, objective=objectives.ELBO(warmup=12), **options)
        ends.append((list(end.values()), [m["beta"] for m in run.history], [m["loss"] for m in run.history]))
    assert run.config["kernels"] == "graph"
    assert ends[0][1] == [4 / 12, 8 / 12, 1.0, 1.0]
    assert same(*ends)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["warm-up", "cycles", "capacity"])
def test_compiled_steps_follow_schedules(name):
    check_compiled(PAIRS["modules"], SCHEDULES[name])


def bits():
    """Two layers of binary latents, and a batch."""
    torch.manual_seed(4)
    nets = nn.ModuleDict(
        {"x": nn.Linear(3, 6), "a": nn.Linear(2, 3), "q": nn.Linear(6, 3), "r": nn.Linear(3, 2)}
    ).double()

    def bernoulli(name, logits, **options):
        return pyro.sample(name, dist.Bernoulli(logits=logits, validate_args=False).to_event(1), **options)

    def model(x):
        pyro.module("nets", nets)
        with pyro.plate("data", len(x)):
            a = bernoulli("a", torch.zeros(2).double())
            bernoulli("x", nets["x"](bernoulli("b", nets["a"](a))), obs=x)

    def guide(x):
        pyro.module("nets", nets)
        with pyro.plate("data", len(x)):
            bernoulli("a", nets["r"](bernoulli("b", nets["q"](x))))

    return model, guide, ((torch.rand(7, 6) > 0.5).double(),)


LEARNING = {
    "a network": lambda: ScoreFunction(Learned(nn.Linear(6, 1).double())),
    "a network, in part": lambda: ScoreFunction(Learned(half_frozen())),
    "REBAR": lambda: {"a": "rebar", "b": "rebar"},
    "RELAX": lambda: {"a": "vimco", "b": REBAR(network=True)},
}


def half_frozen():
    net = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 1)).double()
    net[0].requires_grad_(False)
    return net


@pytest.mark.parametrize("name", LEARNING)
def test_what_learns_beside_the_pair_learns_the_same_in_a_graph(name, caplog):
    states = []
    for kernels in ("eager", "graph"):
        torch.manual_seed(2)
        objective = objectives.ELBO(2, gradient=LEARNING[name]())
        trained(bits(), objective, kernels)
        states.append(objective.state_dict())
        pyro.clear_param_store()
    assert same(*states)
    assert states[0]["gradient"]
    torch.manual_seed(2)
    first = objectives.ELBO(2, gradient=LEARNING[name]()).state_dict()
    assert not same(states[0], first | {"step": states[0]["step"]})
    check_same(bits, lambda: (torch.manual_seed(2), objectives.ELBO(2, gradient=LEARNING[name]()))[1], caplog)


def test_what_learns_twice_in_a_step_is_not_captured(caplog):
    def objective():
        torch.manual_seed(2)
        shared = ScoreFunction(Learned(nn.Linear(6, 1).double()))
        return objectives.ELBO(2, gradient={"a": shared, "b": shared})

    check_same(bits, objective, caplog, may_refuse=True)
    assert "learns twice" in refusals(caplog)[0]


def test_a_baseline_that_learns_by_code_of_its_own_is_not_captured(caplog):
    class Own(Baseline):
        def __call__(self, objective, log_weight, batch):
            return torch.zeros_like(log_weight)

    pair = LinearGaussian(3, 2)
    SVI(pair.model, pair.mean_field, ADAM, objectives.ELBO(gradient=ScoreFunction(Own()))).use("graph")
    assert "baseline that learns" in caplog.records[0].message


# -- what is not captured, and says so --------------------------------------------------------------------------------


class Refused:
    """A pair with a habit."""

    def __init__(self, habit):
        self.habit, self.calls, self.net = habit, 0, nn.Linear(2, 3)
        self.prefix = f"refused{next(_names)}"

    def model(self, x):
        pyro.module(self.prefix, self.net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z) + self.habit(self, x, z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        loc = pyro.param(f"{self.prefix}.loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).expand([len(x), 2]).to_event(1))


def counts(pair, x, z):
    pair.calls += 1
    return 0.1 * pair.calls


HABITS = {
    "if on a value": (lambda pair, x, z: 1.0 if z.mean() > 0 else 0.0, "values of tensors"),
    "item of a datum": (lambda pair, x, z: x[0, 0].item(), "values of tensors"),
    "tolist": (lambda pair, x, z: x[0].tolist()[0], "tolist"),
    "numpy": (lambda pair, x, z: float(x.numpy()[0, 0]), "numpy"),
    "boolean index": (lambda pair, x, z: x[x > 0].mean(), "depends on values"),
    "random numbers of Python": (lambda pair, x, z: random.random(), "random numbers"),
    "random numbers of numpy": (lambda pair, x, z: float(np.random.rand()), "random numbers"),  # noqa: NPY002
    "a count of its runs": (counts, "calls"),
    "an iterator": (lambda pair, x, z: next(ITERATOR), "another loss"),
    "seeds torch": (lambda pair, x, z: (torch.manual_seed(1), 0.0)[1], "noise"),
}
ITERATOR = iter(float(i % 7) for i in range(10_000))


@pytest.mark.parametrize("habit", HABITS)
def test_what_a_graph_cannot_hold_is_run_eagerly_with_one_line(habit, caplog):
    act, why = HABITS[habit]
    torch.manual_seed(0)
    pair = Refused(act)
    svi = SVI(pair.model, pair.guide, ADAM, Trace_ELBO())
    svi.use("graph")
    for _ in range(5):
        assert math.isfinite(svi.step(torch.randn(4, 3)))
    lines = refusals(caplog)
    assert len(lines) == 1, lines
    assert why in lines[0]
    assert svi.kernels == "eager"


def test_a_change_that_is_not_seen_is_found_by_looking_again(caplog):
    """State that hides in an iterator which stands still while the graph is made."""
    steps = iter([*[0.0] * 6, *[1.0] * 1000])
    torch.manual_seed(0)
    pair = Refused(lambda pair, x, z: next(steps))
    svi = SVI(pair.model, pair.guide, ADAM, Trace_ELBO())
    svi.use("graph")
    for _ in range(20):
        svi.step(torch.randn(4, 3))
    assert len(refusals(caplog)) == 1
    assert "another loss or gradient" in refusals(caplog)[0]
    assert svi.kernels == "eager"


def test_a_loss_that_reads_its_values_is_run_eagerly_with_one_line(caplog):
    for name, loss in (("semi_supervised", TraceEnum_ELBO()), ("modules", RenyiELBO(num_particles=3))):
        caplog.clear()
        with ParamScope().entered():
            svi = trained(PAIRS[name](), loss, "graph", 4)[-1]
        assert len(refusals(caplog)) == (svi.kernels == "eager")


def test_handlers_around_a_step_are_respected():
    x = torch.randn(5, 3)
    losses = []
    for kernels in ("graph", "eager"):
        torch.manual_seed(0)
        pair = LinearGaussian(3, 2)
        svi = SVI(pair.model, pair.mean_field, ADAM, Trace_ELBO())
        svi.use(kernels)
        for _ in range(3):  # the next use of the graph is none that is checked
            svi.step(x)
        with pyro.poutine.scale(scale=3.0):
            losses.append(svi.step(x))
    assert losses[0] == losses[1]


def test_no_compiler_means_the_graph_with_one_line(monkeypatch, caplog):
    def fails(*_):
        raise FileNotFoundError("g++")

    monkeypatch.setattr("ppvae.compilation.graph.compile_module", fails)
    pair = LinearGaussian(3, 2)
    svi = SVI(pair.model, pair.mean_field, ADAM, Trace_ELBO(), compile=True)
    for _ in range(3):
        svi.step(torch.randn(5, 3))
    assert svi.kernels == "graph"
    assert [r.message for r in caplog.records if "not compiled" in r.message] == [
        "ppvae: captured steps are not compiled: FileNotFoundError: g++"
    ]


# -- fit --------------------------------------------------------------------------------------------------------------


def test_fit_captures_where_that_pays_and_ends_with_the_same_bits(monkeypatch, tmp_path, at_once):
    fit_module = sys.modules["ppvae.training.trainer"]
    monkeypatch.setattr(capture, "SECONDS_PER_NODE", 1e9)  # nothing is worth compiling
    ends = {}
    for name, worth, options in (
        ("eager", math.inf, {}), ("off", 0.0, {"compile": False}), ("graph", 0.0, {"directory": tmp_path / "run"}),
    ):  # fmt: skip
        monkeypatch.setattr(fit_module, "WORTH_CAPTURING", worth)
        run, ends[name] = fitted_with(epochs=4, **options)
        assert run.config["kernels"] == {"off": "eager"}.get(name, name)
    assert all(same(list(ends["eager"].values()), list(ends[n].values())) for n in ("off", "graph"))
    monkeypatch.setattr(fit_module, "WORTH_CAPTURING", 0.0)
    fitted_with(epochs=2, directory=tmp_path / "half")
    monkeypatch.setattr(fit_module, "WORTH_CAPTURING", math.inf)  # the choice is the run's, and measured once
    run, resumed = fitted_with(epochs=4, directory=tmp_path / "half", resume=True)
    assert run.config["kernels"] == "graph"
    assert same(list(ends["eager"].values()), list(resumed.values()))


def fitted_with(**options):
    vae, _ = dropped()
    x = (torch.rand(50, 6, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    run = fit(vae.model, vae.guide, x, batch_size=16, optimizer=ADAM, progress=False, **{"compile": None, **options})
    return run, {k: v.clone() for k, v in vae.state_dict().items()}


def test_a_step_that_is_not_finite_leaves_the_parameters_and_names_the_site(at_once, monkeypatch):
    monkeypatch.setattr(sys.modules["ppvae.training.trainer"], "WORTH_CAPTURING", 0.0)
    monkeypatch.setattr(capture, "SECONDS_PER_NODE", 1e9)
    torch.manual_seed(0)
    pair = LinearGaussian(3, 2)
    x = torch.randn(40, 3)
    x[33] = 1e30
    kept = []

    def keep(*_):
        kept[:] = [p.detach().clone() for p in pair.parameters()]

    step = SVI.update
    monkeypatch.setattr(SVI, "update", lambda self: (step(self), keep())[0])
    with pytest.raises(TrainingError, match=r"site 'x'|not finite|gradient"):
        fit(pair.model, pair.mean_field, x, epochs=3, batch_size=5, progress=False, compile=None)
    assert all(map(torch.equal, kept, pair.parameters()))


@pytest.mark.slow
def test_a_compiled_step_that_is_not_finite_leaves_the_parameters_and_is_named(monkeypatch):
    monkeypatch.setattr(
        capture, "_seconds", lambda graph, args: float("compile_with_inductor" not in repr(graph._forward))
    )
    torch.manual_seed(0)
    pair = LinearGaussian(3, 2)
    x = torch.randn(60, 3)
    x[33] = 1e30
    kept = []
    step = FusedAdam.scaled_step

    def take(self, scale):
        step(self, scale)
        kept[:] = [p.detach().clone() for p in pair.parameters()]

    monkeypatch.setattr(FusedAdam, "scaled_step", take)
    with pytest.raises(
        TrainingError, match=r"step \d+ \(epoch 1\): the (loss|gradient) is .*; the parameters are as they"
    ):
        fit(pair.model, pair.mean_field, x, epochs=1, batch_size=5, progress=False, compile=True)
    assert kept
    assert all(map(torch.equal, kept, pair.parameters()))
    assert all(bool(p.isfinite().all()) for p in pair.parameters())


# -- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["modules", "indexes", "conv", "enumerated_model", "obs_mask", "rnn", "supports", "labelled"]
)
def test_compiled_steps_are_the_same_up_to_rounding(name, caplog):
    check_compiled(PAIRS[name], lambda: objectives.IWAE(3), "graph" if name == "supports" else "compiled")


def check_compiled(build, objective, kernels: str = "compiled") -> None:
    """Loss and gradients over 20 steps on the same noise."""
    with ParamScope().entered():
        eager = trained(build(), objective(), "eager", 20, SGD)
    with ParamScope().entered():
        captured = trained(build(), objective(), "compiled", 20, SGD)
    assert captured[-1].kernels == kernels
    torch.testing.assert_close(captured[0], eager[0], rtol=1e-4, atol=1e-4)
    for step, own in zip(captured[1], eager[1], strict=True):
        largest = max(float(g.abs().max()) for g in own if g is not None)
        torch.testing.assert_close(step, own, rtol=1e-3, atol=1e-4 * largest)
    torch.testing.assert_close(captured[3], eager[3], rtol=1e-4, atol=1e-5)
    assert torch.equal(captured[4], eager[4])


def choosing():
    """A stranger's pair with bits, a class as a number, and a class as a vector, one after another."""
    torch.manual_seed(4)
    encoder, decoder = nn.Linear(6, 9), nn.Linear(9, 6)
    one_hot = functools.partial(nn.functional.one_hot, num_classes=3)

    def model(x):
        pyro.module("choosing.decoder", decoder)
        with pyro.plate("data", len(x)):
            bits = pyro.sample("bits", dist.Bernoulli(torch.full((3,), 0.4)).to_event(1))
            number = pyro.sample("number", dist.Categorical(logits=bits))
            vector = pyro.sample("vector", dist.OneHotCategorical(logits=one_hot(number).float()))
            logits = decoder(torch.cat((bits, one_hot(number).float(), vector), -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x):
        pyro.module("choosing.encoder", encoder)
        with pyro.plate("data", len(x)):
            of_bits, of_number, of_vector = encoder(x).chunk(3, -1)
            bits = pyro.sample("bits", dist.Bernoulli(logits=of_bits).to_event(1))
            pyro.sample("number", dist.Categorical(logits=of_number + bits))
            pyro.sample("vector", dist.OneHotCategorical(logits=of_vector - bits))

    return model, guide, ((torch.rand(7, 6) > 0.5).float(),)


def discrete_pair(name):
    torch.manual_seed(3)
    decoder = networks.mlp(6, parts.FEATURES, hidden=(6,))
    decoder = parts.Reading(decoder, 3) if name == "Categorical" else decoder
    net, prior = {
        "Bernoulli": (6, lambda: priors.Bernoulli(6)),
        "Categorical": (6, lambda: priors.Categorical(3, 2)),
        "OneHot": (6, lambda: priors.OneHot(3, 2)),
    }[name]
    options = {} if name == "Bernoulli" else {"classes": 3}
    posterior = getattr(posteriors, name)(parts.net(net), **options)
    vae = VAE(prior(), likelihoods.Bernoulli(decoder), posterior)
    return vae.model, vae.guide, ((torch.rand(5, parts.FEATURES) > 0.5).float(),)


DISCRETE = {
    "vimco": lambda: objectives.IWAE(4, "vimco"),
    "average": lambda: objectives.ELBO(2, gradient="score"),
    "wake and sleep": lambda: objectives.ReweightedWakeSleep(3, 1.0, 1.0),
    "Trace_ELBO": lambda: Trace_ELBO(num_particles=2),
}


@pytest.mark.slow
@pytest.mark.parametrize(("build", "objective"), [
    (build, name) for name in DISCRETE
    for build in (choosing, *(functools.partial(discrete_pair, p) for p in ("Bernoulli", "Categorical", "OneHot")))
])  # fmt: skip
def test_compiled_steps_with_discrete_draws_are_the_same_up_to_rounding(build, objective):
    check_compiled(build, DISCRETE[objective])


@pytest.mark.parametrize("objective", DISCRETE)
def test_discrete_draws_are_captured_to_the_last_bit(objective, caplog):
    check_same(choosing, DISCRETE[objective], caplog)


def test_steps_whose_discrete_draws_stand_apart_are_the_same(monkeypatch):
    """What is given to the compiler, before it is compiled."""

    def together(noise, rest, *_):
        return lambda *inputs: rest(*noise(*inputs), *inputs)

    monkeypatch.setattr(graphs, "compile_with_inductor", together)
    check_compiled(choosing, DISCRETE["wake and sleep"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (1, 16), (7, 33), (500, 11)])
def test_discrete_draws_are_rewritten_to_the_last_bit(shape, dtype):
    def draws(p):
        return [torch.bernoulli(p), torch.multinomial(p, 1), torch.bernoulli(p), torch.multinomial(p, 1, True)]

    torch.manual_seed(0)
    p = torch.rand(shape, dtype=dtype)
    p[..., -1], p[..., 0] = 0, 1
    for laid in (p, p.mT.contiguous().mT if p.dim() > 1 else p, p[:1].expand(shape)):
        module = make_fx(draws)(laid)
        rewritten = with_fixed_noise(module)
        assert not {"aten.bernoulli.default", "aten.multinomial.default"} & {
            str(n.target) for n in rewritten.graph.nodes
        }
        results = []
        for run in (draws, rewritten):
            torch.manual_seed(1)
            results.append((*run(laid), torch.get_rng_state()))
        assert all(
            torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride() for a, b in zip(*results, strict=True)
        )


def test_a_compiled_graph_that_differs_once_is_looked_at_again(monkeypatch, caplog):
    """A drawn bit can fall to the other side by rounding, as seldom as once in thousands of steps."""
    monkeypatch.setattr(Graph, "compile", lambda graph, *_: graph)
    agree, differs = capture.CompiledStep._agree, []

    def doubtful(self, *args):
        if differs.pop(0):
            raise CaptureError("another loss")
        agree(self, *args)

    monkeypatch.setattr(capture.CompiledStep, "_agree", doubtful)
    pair = LinearGaussian(3, 2)
    svi = SVI(pair.model, pair.mean_field, ADAM, Trace_ELBO())
    svi.use("compiled", settled=True)
    differs += [False, False, True, False]  # made, compiled, at its first use, and once more
    for _ in range(3):
        svi.step(torch.randn(5, 3))
    assert not differs
    assert not refusals(caplog)
    differs += [True, True]  # at the fourth use and at the fifth
    for _ in range(3):
        svi.step(torch.randn(5, 3))
    assert svi.kernels == "eager"
    assert "another loss" in refusals(caplog)[0]


@pytest.mark.parametrize(("share", "kernels"), [(1.0, "compiled"), (-1.0, "compiled"), (20.0, "graph")])
def test_a_graph_may_round_as_much_as_the_pair_itself(share, kernels, monkeypatch, caplog):
    """Two rows that cancel but for what bfloat16 rounds away: the weight's gradient is 2^-9 of the bias's, and by the
    pair itself 0. The graph adds a share of the exact one."""
    x, net = torch.tensor([[8.0], [-8.0 * (1 + 2**-12)]]), torch.nn.Linear(1, 1)

    def guide(x):
        pyro.module("net", net)
        pyro.sample("z", dist.Normal(net(x).sum(), 1.0))

    def shifted(graph, *_):
        def forward(*args):
            loss, *grads = graph.module(*args)
            bias = next(g for g in grads if g.shape == (1,)) / 2  # one half a row
            return [loss, *(g - share * 2**-9 * bias if g.shape == (1, 1) else g for g in grads)]

        new = Graph(graph.module, graph.tensors, graph.read)
        new._forward = forward
        return new

    monkeypatch.setattr(Graph, "compile", shifted)
    svi = SVI(lambda x: pyro.sample("z", dist.Normal(3.0, 1.0)), guide, ADAM, Trace_ELBO())
    svi.precision = "bf16"
    svi.use("compiled", settled=True)
    for _ in range(4):
        svi.step(x)
    weight = next(p for p in svi.params if p.shape == (1, 1))
    assert weight.grad is not None
    assert svi.kernels == kernels, refusals(caplog)


@pytest.mark.slow
def test_a_compiled_run_is_resumed_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(
        capture,
        "_seconds",
        lambda graph, args: len(graph.tensors) * (2.0 - ("compile_with_inductor" in repr(graph._forward))),
    )
    ends = []
    for name, epochs in (("whole", (6,)), ("halves", (3, 6))):
        for number in epochs:
            run, end = fitted_with(epochs=number, directory=tmp_path / name, resume=True, compile=True)
            assert run.config["kernels"] == "compiled"
        ends.append(list(end.values()))
    assert same(*ends)
    eager, _ = fitted_with(epochs=6, compile=False)
    for a, b in zip(run.history, eager.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["modules", "hierarchical", "enumerated_model", "conv"])
def test_compiled_log_weights_are_the_same_up_to_rounding(name, monkeypatch, caplog):
    monkeypatch.setattr(compiled, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(compiled, "SECONDS_PER_NODE", 0.0)
    made = []
    monkeypatch.setattr(
        "ppvae.compilation.graph.compile_module", lambda *a: made.append(compile_module(*a)) or made[-1]
    )
    model, guide, (x,) = PAIRS[name]()
    x = x.repeat(100 // len(x) + 1, *[1] * (x.dim() - 1))[:100]
    if name == "hierarchical":
        model, guide, _ = PAIRS[name]()
    results = []
    for use in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model, guide, _ = PAIRS[name]()
        with torch.no_grad():
            model(x[:50]), guide(x[:50])
        results.append(log_marginal(model, guide, x, num_particles=1050, progress=False, compile=use, proposal="guide"))
    assert len(made) == 1
    assert all("folded" in r.message for r in caplog.records if r.name == "ppvae")
    for field in ("log_px", "elbo", "std_error"):
        torch.testing.assert_close(*(getattr(r, field) for r in results), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_validation_by_a_compiled_graph_is_that_of_the_pair(monkeypatch, caplog):
    monkeypatch.setattr(capture, "_seconds", lambda graph, _: 2.0 - ("compile_with_inductor" in repr(graph._forward)))
    monkeypatch.setattr(validation, "ROWS", 16)
    sums: list[bool] = []
    real = validation.ValidationMetrics._sums_by_graph
    monkeypatch.setattr(
        validation.ValidationMetrics,
        "_sums_by_graph",
        lambda *args: (out := real(*args), sums.append(out is not None))[0],
    )
    x = torch.bernoulli(torch.full((40, 6), 0.4), generator=torch.Generator().manual_seed(0))  # 16, 16 and 8 rows
    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        pair = VAE(
            priors.StandardNormal(2),
            likelihoods.Bernoulli(nn.Linear(2, 6)),  # each layer more takes seconds to compile
            posteriors.DiagonalNormal(nn.Linear(6, 4)),
        )
        run = fit(pair.model, pair.guide, x, valid=x, epochs=3, batch_size=20, compile=compile)
        found.append(([m["valid_elbo"] for m in run.history], [m["valid_rate"] for m in run.history]))
    assert run.config["kernels"] == "compiled"
    assert sums == [True] * 3  # the second block of each epoch; the first is looked at, the last is smaller
    assert torch.allclose(torch.tensor(found[0]), torch.tensor(found[1]), atol=1e-4)
    assert not refusals(caplog)


def test_a_strangers_loss_may_have_a_method_of_any_name():
    class Mine(Trace_ELBO):
        def advance(self):
            raise AssertionError("it is not ours to call")

    model, guide, batch = PAIRS["modules"]()
    svi = SVI(model, guide, ADAM, Mine())
    svi.use("graph")
    for _ in range(3):
        svi.step(*batch)
    assert svi.kernels == "graph"
