"""Every objective that the command line lists trains, on batches of which the last is smaller; so do Pyro's others."""

import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.gp.kernels import RBF
from pyro.infer import (
    EnergyDistance,
    JitTrace_ELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    Trace_MMD,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)

from ppvae import fit
from ppvae.cli.fit import OBJECTIVES
from ppvae.errors import ContractError, UsageError
from ppvae.inference import SVI
from ppvae.objectives.pyro_losses import single_loss

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(57, 5, generator=torch.Generator().manual_seed(0))


def make_pair(full_size=None):
    torch.manual_seed(0)
    net, enc = torch.nn.Linear(2, 5), torch.nn.Linear(5, 4)

    def plate(x):
        return pyro.plate("data", len(x)) if full_size is None else pyro.plate("data", full_size, subsample=x)

    def model(x):
        pyro.module("net", net)
        with plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 0.5).to_event(1), obs=x)

    def guide(x):
        pyro.module("enc", enc)
        with plate(x):
            loc, s = enc(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, s.exp()).to_event(1))

    return model, guide, net, enc


@pytest.mark.parametrize("name", OBJECTIVES.classes)
def test_a_listed_objective_trains_both_sides(name):
    objective = OBJECTIVES.build({"name": name, **({"num_data": 57} if name == "TCVAE" else {})}, "objective")()
    model, guide, net, enc = make_pair()
    before = [p.detach().clone() for p in (net.weight, enc.weight)]
    with warnings.catch_warnings():
        run = fit(model, guide, X, valid=X, objective=objective, epochs=2, batch_size=20, compile=False)
    assert torch.tensor(run.metrics["loss"]).isfinite()
    assert all(not torch.equal(a, b) for a, b in zip(before, (net.weight, enc.weight), strict=True))


def test_objectives_that_cannot_train_from_the_command_line_are_not_listed():
    assert not {"Trace_MMD", "TraceTailAdaptive_ELBO"} & set(OBJECTIVES.classes)
    model, guide, *_ = make_pair()
    with pytest.raises(UsageError, match=r"TraceTailAdaptive_ELBO, which has gradients alone.*Renyi"):
        fit(model, guide, X, objective=TraceTailAdaptive_ELBO(num_particles=2, vectorize_particles=True), epochs=1)
    kernel = RBF(2)
    mmd = Trace_MMD(kernel=kernel, vectorize_particles=True, num_particles=4, max_plate_nesting=1)
    assert torch.tensor(fit(model, guide, X, objective=mmd, epochs=1, compile=False).metrics["loss"]).isfinite()


@pytest.mark.parametrize("full_size", [None, 57], ids=["plate of the batch", "plate of the data"])
def test_a_traced_objective_has_the_loss_of_an_eager_one_on_every_batch(full_size):
    pyro.clear_param_store()
    model, guide, net, _ = make_pair(full_size)
    traced, found = single_loss(JitTrace_ELBO(ignore_jit_warnings=True)), []
    for batch in (X[:20], X[40:], X[:20], X[40:]):
        traced.loss_and_grads(model, guide, batch)  # a trace draws noise of its own
        for objective in (Trace_ELBO(), traced):
            torch.manual_seed(0)
            net.weight.grad = None
            loss = objective.loss_and_grads(model, guide, batch)
            found.append((loss, net.weight.grad.norm().item()))
    for eager, graph in zip(found[::2], found[1::2], strict=True):
        assert graph == pytest.approx(eager, rel=1e-4)


def test_several_losses_are_summed_and_have_pyros_gradients():
    gradients, losses = [], []
    for wrap in (lambda loss: loss, single_loss):
        pyro.clear_param_store()
        model, guide, net, enc = make_pair()
        loss = wrap(ReweightedWakeSleep(num_particles=4, vectorize_particles=True, max_plate_nesting=1))
        torch.manual_seed(1)
        losses.append(loss.loss_and_grads(model, guide, X))
        gradients.append([net.weight.grad.clone(), enc.weight.grad.clone()])
    assert losses[1] == pytest.approx(sum(losses[0]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    model, guide, *_ = make_pair()
    rws = ReweightedWakeSleep(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    assert torch.tensor(fit(model, guide, X, objective=rws, epochs=2, batch_size=20).metrics["loss"]).isfinite()


@pytest.mark.parametrize(
    ("objective", "found"),
    [
        (Trace_ELBO, r"the class Trace_ELBO. Pass an object of it, as Trace_ELBO\(\)"),
        (EnergyDistance(num_particles=2), "EnergyDistance. Train on it with ppvae.inference.SVI"),
    ],
    ids=["class", "EnergyDistance"],
)
def test_a_loss_that_is_no_elbo_is_refused_with_what_takes_it(objective, found):
    pyro.clear_param_store()
    model, guide, net, _ = make_pair()
    with pytest.raises(UsageError, match=f"pyro.infer.ELBO.*found {found}"):
        fit(model, guide, X, objective=objective, epochs=1)
    if not isinstance(objective, type):
        before = net.weight.detach().clone()
        SVI(model, guide, lambda p: torch.optim.Adam(p, lr=0.1), objective).step(X)
        assert not torch.equal(before, net.weight)


def loss_of_traces(model, guide, *batch):
    guide_trace = poutine.trace(guide).get_trace(*batch)
    model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*batch)
    return guide_trace.log_prob_sum() - model_trace.log_prob_sum()


@pytest.mark.parametrize("full_size", [None, 57])
@pytest.mark.parametrize("loss", [loss_of_traces, Trace_ELBO().differentiable_loss, partial(loss_of_traces)])
def test_a_function_of_the_pair_and_the_batch_trains_as_the_elbo_that_it_computes(loss, full_size):
    runs = []
    for objective in (Trace_ELBO(), loss):
        pyro.clear_param_store()
        model, guide, net, enc = make_pair(full_size)
        sgd = partial(torch.optim.SGD, lr=1e-3)  # which a factor of the loss would change
        run = fit(model, guide, X, objective=objective, optimizer=sgd, epochs=3, batch_size=20, compile=False)
        runs.append((run.metrics["loss"], net.weight.detach().clone(), enc.weight.detach().clone()))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-6)
    torch.testing.assert_close(runs[0][1:], runs[1][1:], rtol=1e-5, atol=1e-6)


def test_a_run_with_a_function_as_objective_resumes(tmp_path):
    ends = []
    for folder, epochs in (("a", (4,)), ("b", (2, 4))):
        for last in epochs:
            pyro.clear_param_store()
            model, guide, net, _ = make_pair()
            fit(model, guide, X, objective=loss_of_traces, epochs=last, directory=tmp_path / folder, resume=True)
        ends.append(net.weight.detach().clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (Trace_ELBO().loss, r"found float. Of an ELBO pass the object, or its differentiable_loss \(loss\)"),
        (lambda model, guide, x: x.sum(1), r"found one of shape \[57\]: sum it over the batch"),
        (lambda model, guide, x: loss_of_traces(model, guide, x).detach(), r"found one without a gradient"),
        (lambda model, guide: torch.zeros(()), r"found <lambda>\(model, guide\)"),
    ],
)
def test_a_function_without_a_loss_that_can_be_followed_is_refused(loss, found):
    pyro.clear_param_store()
    model, guide, *_ = make_pair()
    with pytest.raises(UsageError, match=f"objective: .*{found}"):
        fit(model, guide, X, objective=loss, epochs=1)


def test_a_guide_factor_without_a_gradient_is_refused_under_the_mean_field_loss_alone():
    model, guide, *_ = make_pair()

    def guide_with(has_rsample):
        def with_factor(x):
            guide(x)
            pyro.factor("f", torch.tensor(-3.0), has_rsample=has_rsample)

        return with_factor

    options = {"epochs": 1, "progress": False, "compile": False}
    with pytest.raises(ContractError, match=r"site 'f'.*TraceMeanField_ELBO.*has_rsample=False.*Trace_ELBO\(\)"):
        fit(model, guide_with(False), X, objective=TraceMeanField_ELBO(), **options)
    for objective, has_rsample in ((Trace_ELBO(), False), (TraceMeanField_ELBO(), True)):
        assert fit(model, guide_with(has_rsample), X, objective=objective, **options).metrics["loss"] > 0


@pytest.mark.parametrize("vectorize", [False, True])
def test_the_sleep_phase_asks_for_a_guide_that_takes_observations(vectorize):
    model, guide, _, enc = make_pair()
    rws = ReweightedWakeSleep(num_particles=4, insomnia=0.5, vectorize_particles=vectorize, max_plate_nesting=1)
    with pytest.raises(UsageError, match=r"insomnia < 1.*observations=None.*insomnia=1"):
        fit(model, guide, X, objective=rws, epochs=1, progress=False)
    before = enc.weight.detach().clone()
    guide_of_both = lambda x, observations=None: guide(observations["x"] if observations else x)  # noqa: E731
    fit(lambda x, observations=None: model(x), guide_of_both, X, objective=rws, epochs=1, progress=False)
    assert not torch.equal(before, enc.weight)
