"""Every objective that the command line lists trains, on batches of which the last is smaller; so do Pyro's others."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.gp.kernels import RBF
from pyro.infer import (
    JitTrace_ELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    Trace_MMD,
    TraceTailAdaptive_ELBO,
)

from ppvae import fit
from ppvae.cli.fit import OBJECTIVES
from ppvae.errors import UsageError
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
