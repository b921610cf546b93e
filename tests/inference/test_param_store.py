"""Parameters have one home: what Pyro's param store, a run, its modules and copies of them hold is evaluated."""

from __future__ import annotations

import copy
import functools
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from ppvae import VAE, fit, likelihoods, load, log_marginal, posteriors, priors
from ppvae import nn as networks
from ppvae.errors import ContractError
from ppvae.inference import from_param_store

ADAM = functools.partial(torch.optim.Adam, lr=0.05)
X = 1.5 * torch.randn(40, generator=torch.Generator().manual_seed(0)) + 1


@pytest.fixture(autouse=True)
def clean_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()
    pyro.settings.set(module_local_params=False)


def posterior(x, loc, scale):
    """z | x of z ~ Normal(loc, scale), x ~ Normal(z, 1/2)."""
    precision = scale**-2 + 4
    return dist.Normal((loc / scale**2 + 4 * x) / precision, precision**-0.5)


def log_px(loc, scale):
    """log p(x) of the same, exactly."""
    return dist.Normal(loc, (scale**2 + 0.25).sqrt()).log_prob(X).detach()


@pytest.fixture
def programs():
    """The pair as functions with parameters of `pyro.param`, which no run has trained."""

    def model(x, shift=0.0):
        loc, scale = params()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc + shift, scale))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x, shift=0.0):
        loc, scale = params()
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x, loc + shift, scale))

    return model, guide


def params():
    return (
        pyro.param("loc", torch.tensor(0.0)),
        pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive),
    )


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self):
        return self.loc, self.log_scale.exp()


class Pair(nn.Module):
    """The same pair with its parameters in a module."""

    def __init__(self, update=False):
        super().__init__()
        self.net, self.update = Net(), update

    def model(self, x):
        loc, scale = pyro.module("net", self.net, update_module_params=self.update)()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, scale))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(self, x):
        loc, scale = pyro.module("net", self.net, update_module_params=self.update)()
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x, loc, scale))


def closures():
    net = Net()

    def closed_model(x):
        loc, scale = pyro.module("net", net)()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, scale))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def closed_guide(x):
        loc, scale = pyro.module("net", net)()
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x, loc, scale))

    return closed_model, closed_guide, net


class Both(PyroModule):
    """The same in a PyroModule."""

    def __init__(self):
        super().__init__()
        self.loc = PyroParam(torch.tensor(0.0))
        self.scale = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def forward(self, x):
        loc, scale = self.loc, self.scale
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, scale))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def found(model, guide, x=X, particles=30):
    return log_marginal(
        model, guide, x, num_particles=particles, progress=False, compile=False, proposal="guide"
    ).log_px


def assert_is(estimate, exact):
    torch.testing.assert_close(estimate.float(), exact.float(), rtol=0, atol=2e-5)


def values(scope):
    with scope.entered():
        return tuple(p.detach().clone() for p in params())


def train_by_pyro(model, guide, steps=20):
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(steps):
        svi.step(X)


def trained(model, guide, **options):
    return fit(model, guide, X, **{"epochs": 2, "optimizer": ADAM, "progress": False, **options})


# -- Pyro's store and a run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["trained by Pyro", "loaded", "initialised by a bare call"])
def test_two_sets_of_parameters_are_refused_and_each_cure_gives_its_set(change, tmp_path, programs):
    model, guide = programs
    run = trained(model, guide)
    of_run = values(run.model.scope)
    if change == "trained by Pyro":
        train_by_pyro(model, guide)
    elif change == "loaded":
        params()
        pyro.get_param_store()["loc"] = torch.tensor(2.0)
        pyro.get_param_store().save(tmp_path / "params")
        pyro.clear_param_store()
        pyro.get_param_store().load(tmp_path / "params")
    else:
        Predictive(model, guide=guide, num_samples=2)(X)
    with pytest.raises(ContractError, match=r"(?s)two values.*run\.model and run\.guide.*from_param_store"):
        found(model, guide)
    assert_is(found(run.model, run.guide), log_px(*of_run))
    assert_is(found(*from_param_store(model, guide)), log_px(*params()))
    pyro.clear_param_store()
    assert_is(found(model, guide), log_px(*of_run))


@pytest.mark.parametrize("in_place", [False, True])
def test_what_the_store_held_before_the_run_is_older_than_the_run(in_place, programs):
    model, guide = programs
    params()
    pyro.get_param_store()["loc"] = torch.tensor(2.0)
    assert_is(found(model, guide), log_px(torch.tensor(2.0), torch.tensor(1.0)))
    run = trained(model, guide)
    assert_is(found(model, guide), log_px(*values(run.model.scope)))
    if in_place:
        train_by_pyro(model, guide)
    else:
        pyro.get_param_store()["loc"] = torch.tensor(3.0)
    with pytest.raises(ContractError, match="two values"):
        found(model, guide)


def test_a_fit_says_that_it_starts_anew_and_its_cure_goes_on(caplog, programs):
    model, guide = programs
    still = {"epochs": 1, "optimizer": functools.partial(torch.optim.SGD, lr=0.0)}
    params()
    trained(model, guide, **still)
    assert not caplog.records  # the store holds what the run starts from
    train_by_pyro(model, guide)
    stored = tuple(p.detach().clone() for p in params())
    trained(model, guide, **still)
    assert "'loc', 'scale' anew" in caplog.text
    assert "from_param_store" in caplog.text
    run = trained(*from_param_store(model, guide), **still)
    assert_is(found(run.model, run.guide), log_px(*stored))
    run = trained(run.model, run.guide)
    assert all(map(torch.equal, params(), stored))  # the store's are left as they were
    caplog.clear()
    pyro.clear_param_store()
    trained(model, guide, **still)
    assert "of an earlier run; to go on from there, pass run.model and run.guide" in caplog.text


def test_going_on_leaves_the_run_as_it_was(programs):
    model, guide = programs
    run = trained(model, guide)
    before, exact = found(run.model, run.guide), log_px(*values(run.model.scope))
    second = trained(run.model, run.guide)
    assert torch.equal(found(run.model, run.guide), before)
    assert_is(found(run.model, run.guide), exact)
    assert_is(found(second.model, second.guide), log_px(*values(second.model.scope)))
    with pytest.raises(ContractError, match="two runs that both have it"):
        trained(run.model, second.guide)


def test_training_on_from_a_run_by_pyro(programs):
    run = trained(*programs)
    before = values(run.model.scope)
    train_by_pyro(run.model, run.guide)
    after = values(run.model.scope)
    assert not torch.equal(before[0], after[0])
    with pytest.raises(ContractError, match=r"changed after its run.*passed to fit"):
        found(run.model, run.guide)
    assert_is(found(*programs), log_px(*after))
    assert not list(pyro.get_param_store())


def test_bare_programs_in_a_callback_have_the_parameters_of_the_run_that_calls(programs):
    estimates = []

    def callback(run, metrics):
        estimates.append((found(*programs), log_px(*params())))

    for _ in range(2):  # an earlier run's parameters are not taken
        trained(*programs, callbacks=[callback])
    for estimate, exact in estimates:
        assert_is(estimate, exact)
    run = trained(*programs)
    trained(*programs, epochs=3)
    with run.model.scope.entered():
        assert_is(found(*programs), log_px(*params()))


@pytest.mark.parametrize("build", [Pair, closures])
def test_modules_trained_on_by_pyro(build):
    made = build()
    bare, net = ((made.model, made.guide), made.net) if build is Pair else (made[:2], made[2])
    run = trained(*bare)
    train_by_pyro(*bare)
    assert_is(found(*bare), log_px(*net()))
    with pytest.raises(ContractError, match=r"changed after its run.*passed to fit"):
        found(run.model, run.guide)


@pytest.mark.parametrize("fitted", [False, True])
def test_a_loaded_store_and_update_module_params(fitted, tmp_path):
    before = Pair()
    train_by_pyro(before.model, before.guide)
    exact = log_px(*before.net())
    pyro.get_param_store().save(tmp_path / "params")
    pyro.clear_param_store()
    pair = Pair(update=True)
    if fitted:
        trained(pair.model, pair.guide, epochs=1)
    pyro.get_param_store().load(tmp_path / "params")
    assert_is(found(pair.model, pair.guide), exact)
    assert_is(log_px(*pair.net()), exact)


def test_a_loaded_store_and_modules_that_do_not_take_it(tmp_path):
    before = Pair()
    train_by_pyro(before.model, before.guide)
    exact = log_px(*before.net())
    pyro.get_param_store().save(tmp_path / "params")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "params")
    pair = Pair()
    with pytest.raises(ContractError, match="update_module_params=True"):
        found(pair.model, pair.guide)
    pyro.module("net", pair.net, update_module_params=True)
    assert_is(found(pair.model, pair.guide), exact)


@pytest.mark.parametrize("fitted", [False, True])
def test_a_loaded_store_and_an_autoguide(fitted, tmp_path):
    def shared(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    before = AutoNormal(shared)
    train_by_pyro(shared, before)
    exact, of_store = before.median()["z"], found(shared, before)
    pyro.get_param_store().save(tmp_path / "params")
    pyro.clear_param_store()
    after = AutoNormal(shared)
    if fitted:
        trained(shared, after, epochs=1, batch_size=40)
    pyro.get_param_store().load(tmp_path / "params")
    assert torch.equal(found(shared, after), of_store)
    assert torch.equal(after.median()["z"], exact)


# -- modules, their state dicts and copies -----------------------------------------------------------------------------


def vae():
    return VAE(
        priors.StandardNormal(2), likelihoods.Normal(networks.mlp(2, 3)), posteriors.DiagonalNormal(networks.mlp(3, 4))
    )


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("build", [Pair, vae])
def test_a_state_dict_loaded_into_trained_modules(build, assign):
    x = X if build is Pair else torch.randn(40, 3)
    pair, fresh = build(), build()
    fit(pair.model, pair.guide, x, epochs=2, optimizer=ADAM)
    averaged = {name: 0.9 * p for name, p in pair.state_dict().items()}
    for module in (pair, fresh):
        module.load_state_dict(copy.deepcopy(averaged), assign=assign)
    assert torch.equal(found(pair.model, pair.guide, x), found(fresh.model, fresh.guide, x))
    if build is Pair:
        assert_is(found(pair.model, pair.guide), log_px(*pair.net()))


def test_a_state_dict_assigned_to_a_trained_pyro_module():
    both = Both()
    state = {
        "loc_unconstrained": nn.Parameter(torch.tensor(1.5)),
        "scale_unconstrained": nn.Parameter(torch.tensor(0.3)),
    }

    def exact_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x, torch.tensor(1.5), torch.tensor(0.3).exp()))

    trained(both, exact_guide, epochs=1)
    both.load_state_dict(state, assign=True)
    assert_is(found(both, exact_guide), log_px(torch.tensor(1.5), torch.tensor(0.3).exp()))


def test_averaged_weights():
    pair, ema = Pair(), None
    swa = torch.optim.swa_utils.AveragedModel(pair)

    def average(run, metrics):
        nonlocal ema
        swa.update_parameters(pair)
        state = {k: v.clone() for k, v in pair.state_dict().items()}
        ema = state if ema is None else {k: 0.5 * ema[k] + 0.5 * v for k, v in state.items()}

    trained(pair.model, pair.guide, epochs=4, callbacks=[average])
    assert_is(found(swa.module.model, swa.module.guide), log_px(*swa.module.net()))
    last = log_px(*pair.net())
    pair.load_state_dict(ema)
    assert_is(found(pair.model, pair.guide), log_px(ema["net.loc"], ema["net.log_scale"].exp()))
    assert not torch.allclose(last, log_px(*pair.net()), atol=1e-3)


@pytest.mark.parametrize("kind", ["functions", "modules", "closures", "autoguide", "vae"])
def test_a_copy_of_a_run_is_a_run_of_its_own(kind, programs):
    x = torch.randn(40, 3) if kind == "vae" else X
    if kind in ("modules", "vae"):
        pair = vae() if kind == "vae" else Pair()
        programs = pair.model, pair.guide
    elif kind == "closures":
        programs = closures()[:2]
    elif kind == "autoguide":
        programs = programs[0], AutoNormal(programs[0])
    run = fit(*programs, x, epochs=2, optimizer=ADAM, batch_size=40)
    copied = copy.deepcopy(run)
    before = found(run.model, run.guide, x)
    assert torch.equal(found(copied.model, copied.guide, x), before)
    copied = copy.deepcopy(run)  # after an evaluation, which sets Pyro's weak references anew
    fit(run.model, run.guide, x, epochs=2, optimizer=ADAM, batch_size=40)
    if kind == "closures":  # a function is not copied, and its modules were trained on
        with pytest.raises(ContractError, match="changed after its run"):
            found(copied.model, copied.guide, x)
    else:
        assert torch.equal(found(copied.model, copied.guide, x), before)
    if kind in ("modules", "vae"):
        with pytest.raises(ContractError, match="changed after its run"):
            found(run.model, run.guide, x)


def test_a_trained_module_is_pickled_and_copied():
    pair = Pair()
    run = trained(pair.model, pair.guide)
    exact = log_px(*pair.net())
    for again in (pickle.loads(pickle.dumps(pair)), copy.deepcopy(pair)):
        assert_is(found(again.model, again.guide), exact)
    found(pair.model, pair.guide)
    found(run.model, run.guide)
    again = pickle.loads(pickle.dumps(run))
    assert_is(found(again.model, again.guide), exact)


# -- wrappers ----------------------------------------------------------------------------------------------------------


class Caller:
    def __init__(self, program):
        self.program = program

    def __call__(self, x):
        return self.program(x)


WRAPPERS = {
    "partial": functools.partial,
    "trace": poutine.trace,
    "scale of one": lambda f: poutine.scale(f, scale=1.0),
    "config_enumerate": config_enumerate,
    "partial of a handler": lambda f: functools.partial(poutine.trace(f)),
    "lambda": lambda f: lambda x: f(x),
    "wraps": lambda f: functools.wraps(f)(lambda x: f(x)),
    "object": Caller,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_programs_have_the_parameters_of_what_they_wrap(name, programs):
    model, guide = programs
    wrap = WRAPPERS[name]
    run = trained(model, guide)
    exact = log_px(*values(run.model.scope))
    for pair in ((wrap(model), guide), (model, wrap(guide)), (wrap(model), wrap(guide)), (wrap(run.model), run.guide)):
        assert_is(found(*pair), exact)


@pytest.mark.parametrize("name", ["partial", "trace", "config_enumerate"])
def test_what_was_trained_under_a_wrapper_is_trained(name, programs):
    model, guide = programs
    wrap = WRAPPERS[name]
    run = trained(wrap(model), wrap(guide))
    exact = log_px(*values(run.model.scope))
    assert_is(found(model, guide), exact)
    assert_is(found(wrap(model), wrap(guide)), exact)


def test_an_argument_bound_by_partial_counts(programs):
    model, guide = programs
    run = trained(model, guide)
    loc, scale = values(run.model.scope)
    shifted = functools.partial(model, shift=1.0), functools.partial(guide, shift=1.0)
    assert_is(found(*shifted), log_px(loc + 1, scale))


def test_another_model_beside_a_trained_guide(programs):
    """It has the parameters that the guide was trained with, as in Pyro's store."""
    model, guide = programs
    run = trained(model, guide)

    def other(x):
        loc, scale = params()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, scale))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    assert_is(found(other, guide), log_px(*values(run.model.scope)))
    assert_is(found(other, run.guide), log_px(*values(run.model.scope)))


def test_a_model_trained_by_pyro_beside_a_guide_without_parameters(caplog):
    """A guide that has no parameters has none of the run that trained another model beside it."""

    def model_of(scale):
        def model(x):
            loc = pyro.param("loc", torch.tensor(0.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(loc, scale))
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

        return model

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x, torch.tensor(1.0), torch.tensor(1.0)))

    first, second = model_of(1.0), model_of(1.0)
    run = trained(first, guide)
    train_by_pyro(second, guide)
    own = pyro.param("loc").detach().clone()
    est = log_marginal(second, guide, X, num_particles=2000, progress=False, proposal="guide").log_px
    assert (est - log_px(own, torch.tensor(1.0))).mean().abs() < 0.02
    assert (own - run.model.scope.params["loc"]).abs() > 0.01
    pyro.clear_param_store()
    trained(model_of(1.0), guide)
    assert not caplog.records
    est = log_marginal(first, guide, X, num_particles=2000, progress=False, proposal="guide").log_px
    assert (est - log_px(run.model.scope.params["loc"].detach(), torch.tensor(1.0))).mean().abs() < 0.02


def test_a_wrapper_of_two_trained_programs_is_neither(programs):
    model, guide = programs

    def second(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("other", torch.tensor(0.0)), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def second_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x, pyro.param("other", torch.tensor(0.0)), torch.tensor(1.0)))

    trained(model, guide)
    trained(second, second_guide)
    with pytest.raises(ContractError, match="does not exist"):
        found(lambda x: (model if len(x) else second)(x), lambda x: (guide if len(x) else second_guide)(x))


# -- module-local parameters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("Guide", [AutoNormal, AutoDiagonalNormal])
@pytest.mark.parametrize("compile", [False, True])
def test_module_local_parameters(Guide, compile, tmp_path):
    """log p(x) of one shared mean has a closed form, and the guide's family holds its posterior."""
    pyro.settings.set(module_local_params=True)
    x = X[:20]

    def shared(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    guide = Guide(shared)
    options = {"batch_size": 20, "optimizer": ADAM, "compile": compile, "progress": False}
    run = fit(shared, guide, x, epochs=300, directory=tmp_path / "run", **options)
    precision = len(x) + 1.0
    assert float(guide.median()["mu"]) == pytest.approx(float(x.sum() / precision), abs=0.1)
    covariance = torch.eye(len(x)) + 1
    exact = dist.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(x)
    assert float(found(shared, guide, x, 4000).sum()) == pytest.approx(float(exact), abs=0.05)
    assert float(found(run.model, run.guide, x, 4000).sum()) == pytest.approx(float(exact), abs=0.05)
    fresh = Guide(shared)
    again = load(tmp_path / "run", shared, fresh)
    assert torch.equal(found(again.model, again.guide, x), found(run.model, run.guide, x))
