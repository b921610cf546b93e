"""Training: what `fit` promises of gradients, parameters, randomness, stopping, NaN, and run folders."""

import functools
import hashlib
import io
import json
import math
import random
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, config_enumerate
from torch import nn
from torch.optim import lr_scheduler

from ppvae import VAE, data, fit, generate, likelihoods, load, log_marginal, posteriors, priors
from ppvae import nn as networks
from ppvae.errors import CheckpointError, ContractError, DataError, PpvaeError, TrainingError, UsageError
from ppvae.factories.pairs import resolve
from ppvae.models import LinearGaussian
from ppvae.training.run import Run
from ppvae.training.step import TrainingStep

PAIRS = Path(__file__).parents[1] / "programs" / "factory_files"
ADAM = functools.partial(torch.optim.Adam, lr=1e-2)
SGD = functools.partial(torch.optim.SGD, lr=1e-3)
STILL = functools.partial(torch.optim.SGD, lr=0.0)
WILD = functools.partial(torch.optim.SGD, lr=1e12)


def pair(name: str):
    """A fresh copy of a stranger's file."""
    return resolve(str(PAIRS / f"{name}.py"))


def linear(seed: int = 0, features: int = 5, latent: int = 2) -> LinearGaussian:
    torch.manual_seed(seed)
    return LinearGaussian(features, latent)


def gaussian_data(rows: int = 120, features: int = 5, seed: int = 7) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    factors = torch.randn(rows, 2, generator=g) @ torch.randn(2, features, generator=g)
    return factors + 0.5 * torch.randn(rows, features, generator=g)


def small_vae(seed: int = 0, hidden: int = 24, latent: int = 3) -> VAE:
    torch.manual_seed(seed)
    return VAE(
        prior=priors.StandardNormal(latent),
        likelihood=likelihoods.Bernoulli(networks.mlp(latent, 64, hidden=(hidden,))),
        posterior=posteriors.DiagonalNormal(networks.mlp(64, 2 * latent, hidden=(hidden,))),
    )


class Noisy(nn.Module):
    """An encoder with batch norm and dropout, in a stranger's plain pair."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.ReLU())
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.body(x)).chunk(2, -1)


def noisy_pair(seed: int = 0):
    torch.manual_seed(seed)
    encoder, decoder = Noisy(), nn.Linear(2, 64)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide, encoder, decoder


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", binarize="fixed")


@pytest.fixture(autouse=True)
def clean_store():
    """No test finds parameters in Pyro's store, and none leaves any there."""
    pyro.clear_param_store()
    yield
    left = list(pyro.get_param_store())
    pyro.clear_param_store()
    assert left == []


# What comes back


def test_history_and_metrics(digits):
    train, valid, _ = digits
    vae = small_vae()
    run = fit(vae.model, vae.guide, train, valid=valid, epochs=3, optimizer=ADAM)
    assert [m["epoch"] for m in run.history] == [1, 2, 3]
    steps = math.ceil(len(train) / 100)
    assert [m["step"] for m in run.history] == [steps, 2 * steps, 3 * steps]
    assert run.metrics == run.history[-1]
    assert run.directory is None
    for m in run.history:
        assert set(m) == {
            "epoch", "step", "loss", "grad_norm", "valid_elbo", "valid_rate", "valid_distortion", "lr", "seconds"
        }  # fmt: skip
        assert m["lr"] == 1e-2
        assert m["valid_elbo"] == pytest.approx(-(m["valid_rate"] + m["valid_distortion"]), abs=1e-9)
        assert m["valid_rate"] > 0
    assert run.history[-1]["valid_elbo"] > run.history[0]["valid_elbo"] + 1
    assert run.history[-1]["loss"] < run.history[0]["loss"] - 1
    assert "train_elbo" in fit(vae.model, vae.guide, train.head(50), epochs=1).metrics


def test_metrics_are_in_nats_per_datum():
    """One batch of SGD at a rate of zero: the loss is the mean negative ELBO of the data, however it is batched."""
    x, oracle = gaussian_data(100).double(), linear().double()
    exact = -float(oracle.log_px(x).mean().detach())  # with the exact posterior as guide every draw's ELBO is log p(x)
    for size in (100, 64, 7):
        run = fit(oracle.model, oracle.guide, x, valid=x[:33], epochs=1, batch_size=size, optimizer=STILL)
        assert run.metrics["loss"] == pytest.approx(exact, abs=1e-9)
        assert run.metrics["valid_elbo"] == pytest.approx(float(oracle.log_px(x[:33]).mean().detach()), abs=1e-9)


def test_a_validation_elbo_has_the_same_noise_every_epoch():
    x, oracle = gaussian_data(), linear()
    run = fit(oracle.model, oracle.mean_field, x, valid=x, epochs=3, optimizer=STILL)
    assert len({m["valid_elbo"] for m in run.history}) == 1
    assert len({m["loss"] for m in run.history}) == 3


# Objectives and optimizers


def iwae():
    from ppvae import objectives

    return objectives.IWAE(num_particles=3)


OBJECTIVES = {
    "default": lambda: None,
    "Trace_ELBO": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "RenyiELBO": lambda: RenyiELBO(alpha=0.0, num_particles=3),
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "TraceEnum_ELBO": TraceEnum_ELBO,
    "IWAE": iwae,
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(digits, name):
    train, valid, _ = digits
    vae = small_vae()
    run = fit(vae.model, vae.guide, train, valid=valid, objective=OBJECTIVES[name](), epochs=3, optimizer=ADAM)
    assert run.history[-1]["valid_elbo"] > run.history[0]["valid_elbo"] + 1


NEEDS_MORE = ("Optimizer", "LBFGS", "SparseAdam", "Muon")  # a closure, sparse gradients, matrices
TORCH_OPTIMIZERS = sorted(
    name for name, value in vars(torch.optim).items() if isinstance(value, type) and name not in NEEDS_MORE
)


@pytest.mark.parametrize("name", TORCH_OPTIMIZERS)
def test_torch_optimizers(name):
    x, oracle = gaussian_data(), linear()
    before = float(oracle.log_px(x).mean().detach())
    run = fit(oracle.model, oracle.mean_field, x, epochs=3, batch_size=20, optimizer=getattr(torch.optim, name))
    assert float(oracle.log_px(x).mean().detach()) > before
    assert "lr" in run.metrics


PYRO_OPTIMIZERS = {
    "Adam": lambda: pyro.optim.Adam({"lr": 1e-2}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 1e-2, "clip_norm": 1.0, "lrd": 0.99}),
    "per parameter": lambda: pyro.optim.Adam(lambda name: {"lr": 1e-2 if "weight" in name else 1e-3}),
    "ExponentialLR": lambda: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}, "gamma": 0.5}
    ),
    "StepLR": lambda: pyro.optim.StepLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 1e-2}, "step_size": 1}),
}


@pytest.mark.parametrize("name", PYRO_OPTIMIZERS)
def test_pyro_optimizers(name):
    x, oracle = gaussian_data(), linear()
    before = float(oracle.log_px(x).mean().detach())
    fit(oracle.model, oracle.mean_field, x, epochs=3, batch_size=20, optimizer=PYRO_OPTIMIZERS[name]())
    assert float(oracle.log_px(x).mean().detach()) > before


def test_pyro_optimizers_do_what_torchs_do():
    """Adam by Pyro, one optimizer a parameter, and by torch, one for all, take the same steps."""
    x, a, b = gaussian_data(), linear(), linear()
    fit(a.model, a.mean_field, x, epochs=3, batch_size=20, optimizer=pyro.optim.Adam({"lr": 1e-2}))
    fit(b.model, b.mean_field, x, epochs=3, batch_size=20, optimizer=ADAM)
    for p, q in zip(weights(a), weights(b), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def test_pyro_schedulers_step_every_epoch():
    x, oracle = gaussian_data(40), linear()
    scheduler = PYRO_OPTIMIZERS["ExponentialLR"]()
    fit(oracle.model, oracle.mean_field, x, epochs=3, batch_size=10, optimizer=scheduler)
    assert {s.get_last_lr()[0] for s in scheduler.optim_objs.values()} == {1e-2 * 0.5**3}


def test_pyros_plateau_scheduler():
    x, oracle = gaussian_data(40), linear()
    for rate, want in ((1e-12, 1e-14), (1e-3, 1e-3)):  # no better after the first epoch; better and better
        options = {"optimizer": torch.optim.SGD, "optim_args": {"lr": rate}, "patience": 0, "factor": 0.1, "eps": 0}
        plateau = pyro.optim.ReduceLROnPlateau(options)
        fit(oracle.model, oracle.mean_field, x, valid=x, epochs=3, optimizer=plateau)
        rates = [s.optimizer.param_groups[0]["lr"] for s in plateau.optim_objs.values()]
        assert rates == pytest.approx([want] * 3, rel=1e-6, abs=0)


def test_torch_schedulers_step_every_epoch():
    x, oracle = gaussian_data(40), linear()
    half = functools.partial(lr_scheduler.StepLR, step_size=1, gamma=0.5)
    run = fit(oracle.model, oracle.mean_field, x, epochs=3, batch_size=10, optimizer=ADAM, scheduler=half)
    assert [m["lr"] for m in run.history] == [1e-2, 5e-3, 2.5e-3]  # the rate of the epoch, not the next one's


def test_a_plateau_scheduler_watches_the_validation_elbo():
    x, oracle = gaussian_data(40), linear()
    plateau = functools.partial(lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.1, eps=0)
    slow = functools.partial(torch.optim.SGD, lr=1e-12)  # no better after the first epoch: the rate falls from then on
    run = fit(oracle.model, oracle.mean_field, x, valid=x, epochs=4, optimizer=slow, scheduler=plateau)
    assert [m["lr"] for m in run.history] == pytest.approx([1e-12, 1e-12, 1e-13, 1e-14], rel=1e-6, abs=0)
    better = fit(oracle.model, oracle.mean_field, x, valid=x, epochs=4, optimizer=SGD, scheduler=plateau)
    assert better.metrics["lr"] == 1e-3


def test_a_torch_schedule_needs_a_torch_optimizer():
    oracle = linear()
    adam = pyro.optim.Adam({"lr": 1e-2})
    steps = functools.partial(lr_scheduler.StepLR, step_size=1)
    with pytest.raises(UsageError, match="PyroOptim"):
        fit(oracle.model, oracle.guide, gaussian_data(), epochs=1, optimizer=adam, scheduler=steps)


def test_an_optimizer_and_callbacks_of_another_form_are_named():
    oracle, x = linear(), gaussian_data()
    optimizer = torch.optim.Adam(torch.nn.Linear(1, 1).parameters())
    with pytest.raises(UsageError, match=r"optimizer: .*partial\(torch.optim.Adam, lr=1e-3\).* an object of Adam"):
        fit(oracle.model, oracle.guide, x, epochs=1, optimizer=optimizer)
    seen = []
    with pytest.raises(UsageError, match=r"callbacks: expected a list of functions of \(run, metrics\)"):
        fit(oracle.model, oracle.guide, x, epochs=1, callbacks=lambda run, metrics: seen.append(metrics["epoch"]))
    fit(oracle.model, oracle.guide, x, epochs=1, callbacks=[lambda run, metrics: seen.append(metrics["epoch"])])
    assert seen == [1]


# The gradient


class Spied(Trace_ELBO):
    """Keeps the random state and the batch of every step."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def loss_and_grads(self, model, guide, *args, **kwargs):
        self.seen.append((torch.get_rng_state(), args[0].clone()))
        return super().loss_and_grads(model, guide, *args, **kwargs)


class Kept(torch.optim.SGD):
    """Keeps the parameters and gradients that it is handed."""

    def __init__(self, params, lr=1.0):
        super().__init__(params, lr=lr)
        self.steps: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
        Kept.last = self

    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"]]
        self.steps.append(([p.detach().clone() for p in params], [p.grad.clone() for p in params]))
        return super().step(closure)


def ppca_pair(full: int | None):
    """A stranger's PPCA by pyro.param; its plate is as long as the batch, or knows the size of the data."""

    def plate(x):
        return pyro.plate("data", len(x)) if full is None else pyro.plate("data", full, subsample=x)

    def model(x):
        weight = pyro.param("weight", torch.linspace(-1, 1, 6).double().reshape(2, 3))
        with plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, 0.7).to_event(1), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.linspace(-0.5, 1, 6).double().reshape(3, 2))
        with plate(x):
            pyro.sample("z", dist.Normal(x @ slope, 0.6).to_event(1))

    return model, guide


def mean_negative_elbo(weight, slope, x):
    """The same by hand; the draw is the guide's, from the random state as it is."""
    loc = x @ slope
    z = loc + 0.6 * torch.randn(loc.shape, dtype=loc.dtype)
    normal = torch.distributions.Normal
    log_q = normal(loc, 0.6).log_prob(z).sum()
    log_p = normal(0.0, 1.0).log_prob(z).sum() + normal(z @ weight, 0.7).log_prob(x).sum()
    return (log_q - log_p) / len(x)


@pytest.mark.parametrize("full", [None, 10], ids=["len(x)", "subsample=x"])
@pytest.mark.parametrize("batch_size", [10, 4])
def test_the_gradient_is_of_the_mean_negative_elbo_per_datum(full, batch_size):
    x = gaussian_data(10, 3).double()
    spy = Spied()
    kept = functools.partial(Kept, lr=0.1)
    run = fit(*ppca_pair(full), x, objective=spy, optimizer=kept, epochs=1, batch_size=batch_size)
    steps = Kept.last.steps
    assert [len(batch) for _, batch in spy.seen] == ([10] if batch_size == 10 else [4, 4, 2])
    assert len(steps) == len(spy.seen)
    losses = []
    for (state, batch), (before, grads) in zip(spy.seen, steps, strict=True):
        weight, slope = (p.requires_grad_() for p in sorted(before, key=lambda p: p.shape != (2, 3)))
        with torch.random.fork_rng():
            torch.set_rng_state(state)
            loss = mean_negative_elbo(weight, slope, batch)
        loss.backward()
        found = sorted(grads, key=lambda g: g.shape != (2, 3))
        assert torch.allclose(found[0], weight.grad, rtol=1e-9, atol=1e-12)
        assert torch.allclose(found[1], slope.grad, rtol=1e-9, atol=1e-12)
        losses.append(float(loss.detach()) * len(batch))
    assert run.metrics["loss"] == pytest.approx(sum(losses) / 10, abs=1e-9)


def test_training_does_not_depend_on_how_the_plate_is_written():
    x = gaussian_data(10, 3).double()
    found = []
    for full in (None, 10):
        fit(*ppca_pair(full), x, optimizer=functools.partial(Kept, lr=0.01), epochs=3, batch_size=4)
        found.append([p for before, _ in Kept.last.steps for p in before])
    assert len(found[0]) == 2 * 9
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_ppca_reaches_the_closed_form_maximum():
    """Within 0.05 nats per datum, with the exact posterior as guide and with independent dims."""
    x = gaussian_data(400, 6, seed=3)
    best = float(LinearGaussian.maximum_likelihood(x, 2).log_px(x).mean())
    falling = functools.partial(lr_scheduler.CosineAnnealingLR, T_max=100)
    for name in ("guide", "mean_field"):
        oracle = linear(1, 6)
        start = float(oracle.log_px(x).mean().detach())
        fit(oracle.model, getattr(oracle, name), x, epochs=100, optimizer=functools.partial(torch.optim.Adam, lr=0.05),
            scheduler=falling)  # fmt: skip
        reached = float(oracle.log_px(x).mean().detach())
        assert start < best - 0.5
        assert best - 0.05 < reached <= best + 1e-4


def test_a_strangers_ppca_reaches_the_closed_form_maximum():
    """pyro.param alone, a plate per batch, a linear guide: the bound itself comes within 0.05 nats of log p(x)."""
    x = gaussian_data(400, 6, seed=3)
    best = float(LinearGaussian.maximum_likelihood(x, 2).log_px(x).mean())
    mine = pair("params_only")
    falling = functools.partial(lr_scheduler.CosineAnnealingLR, T_max=150)
    adam = functools.partial(torch.optim.Adam, lr=0.05)
    run = fit(mine.model, mine.guide, x, epochs=150, optimizer=adam, scheduler=falling)
    est = log_marginal(run.model, run.guide, x, num_particles=200, seed=1, proposal="guide")
    assert float(est.log_px.mean()) == pytest.approx(best, abs=0.05)
    assert float(est.elbo.mean()) == pytest.approx(best, abs=0.05)


# Stopping


def test_early_stopping_gives_the_best_parameters_back(digits):
    train, valid, _ = digits
    vae = small_vae(hidden=64, latent=8)
    seen = []
    run = fit(
        vae.model, vae.guide, train.head(40), valid=valid, epochs=200, batch_size=20, patience=4,
        optimizer=functools.partial(torch.optim.Adam, lr=2e-2), callbacks=[lambda run, m: seen.append(weights(vae))],
    )  # fmt: skip
    elbos = [m["valid_elbo"] for m in run.history]
    best = int(np.argmax(elbos))
    assert len(elbos) == best + 1 + 4
    assert len(elbos) < 200
    assert same(weights(vae), seen[best])
    assert not same(weights(vae), seen[-1])
    again = fit(run.model, run.guide, train, valid=valid, epochs=1, optimizer=STILL)
    assert again.metrics["valid_elbo"] == elbos[best]


def test_the_best_batch_norm_comes_back(digits):
    """Buffers belong to the best state as parameters do."""
    train, valid, _ = digits
    model, guide, encoder, _ = noisy_pair()
    seen = []

    def keep(run, metrics):
        seen.append([b.clone() for b in encoder.buffers()])

    run = fit(model, guide, train.head(40), valid=valid, epochs=100, batch_size=20, patience=3, callbacks=[keep],
              optimizer=functools.partial(torch.optim.Adam, lr=5e-2))  # fmt: skip
    best = int(np.argmax([m["valid_elbo"] for m in run.history]))
    assert best < len(seen) - 1
    assert same(list(encoder.buffers()), seen[best])


def test_patience_needs_validation_data():
    oracle = linear()
    with pytest.raises(UsageError, match="patience"):
        fit(oracle.model, oracle.guide, gaussian_data(), epochs=1, patience=2)


def test_callbacks():
    x, oracle = gaussian_data(), linear()
    calls = []

    def note(run, metrics):
        calls.append((metrics["epoch"], run.metrics is metrics, len(run.history)))

    run = fit(oracle.model, oracle.guide, x, epochs=5, callbacks=[note, lambda run, m: m["epoch"] == 3, note])
    assert calls == [(e, True, e) for e in (1, 1, 2, 2, 3, 3)]
    assert len(run.history) == 3


def test_a_callback_may_evaluate_and_changes_nothing():
    x = gaussian_data()
    quiet, watched = linear(), linear()
    fit(quiet.model, quiet.mean_field, x, epochs=3, batch_size=30)
    values = []

    def look(run, metrics):
        values.append(log_marginal(run.model, run.guide, x, num_particles=10, proposal="guide").nll)
        generate.samples(run.model, run.guide, x, count=3)
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002

    fit(watched.model, watched.mean_field, x, epochs=3, batch_size=30, callbacks=[look])
    assert same(weights(quiet), weights(watched))
    assert len(set(values)) == 3


def test_clip():
    x = gaussian_data(10, 3).double()
    norms = []
    for clip in (None, 1e6, 1e-3):
        run = fit(*ppca_pair(None), x, optimizer=Kept, epochs=1, batch_size=10, clip=clip)
        grads = torch.cat([g.flatten() for g in Kept.last.steps[0][1]])
        norms.append((float(grads.norm()), run.metrics["grad_norm"], grads / grads.norm()))
    assert norms[0][0] == norms[1][0] == pytest.approx(norms[0][1])
    assert norms[2][0] == pytest.approx(1e-3)
    assert norms[2][1] == pytest.approx(norms[0][1])  # the norm as it was before the clip
    assert torch.allclose(norms[2][2], norms[0][2])


@pytest.mark.slow
def test_compiled_and_eager_epochs_leave_the_same_gradients():
    """Those of the last step, per datum and clipped, by which the parameters were moved."""
    left = []
    for compile in (False, True):
        pair = linear()

        def keep(*_, module=pair):
            left.append([p.grad.clone() for p in module.parameters()])

        settings = {"batch_size": 40, "optimizer": ADAM, "clip": 0.5, "compile": compile, "progress": False}
        fit(pair.model, pair.mean_field, gaussian_data(), epochs=2, callbacks=[keep], **settings)
        assert math.sqrt(sum(float((g**2).sum()) for g in left[-1])) == pytest.approx(0.5, rel=1e-5)
    torch.testing.assert_close(left[3], left[1], rtol=1e-3, atol=1e-5)


def test_a_negative_clip_is_refused():
    with pytest.raises(UsageError, match="clip"):
        fit(*ppca_pair(None), gaussian_data(10, 3).double(), epochs=1, clip=-1.0)


@pytest.mark.parametrize(("name", "value"), [("epochs", 0), ("epochs", -1), ("batch_size", 0)])
def test_numbers_that_make_no_sense(name, value):
    oracle = linear()
    with pytest.raises(UsageError, match=f"{name}.*{value}"):
        fit(oracle.model, oracle.guide, gaussian_data(), **{"epochs": 1, name: value})


# Randomness


def test_the_same_seed_gives_the_same_bits(digits):
    train = data.load("digits", binarize="dynamic")[0].head(200)

    def trained(seed, start=0):
        model, guide, encoder, decoder = noisy_pair()
        torch.manual_seed(start)
        run = fit(model, guide, train, epochs=2, seed=seed, optimizer=ADAM)
        history = [{k: v for k, v in m.items() if k != "seconds"} for m in run.history]
        return [*weights(encoder), *weights(decoder), *encoder.buffers()], history

    first, history = trained(0)
    second, again = trained(0, start=99)
    assert same(first, second)
    assert history == again
    assert not same(first, trained(1)[0])


@pytest.mark.parametrize("fails", [False, True])
def test_global_random_states_are_left_alone(fails, digits):
    torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
    vae = small_vae()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    if fails:
        with pytest.raises(TrainingError):
            fit(vae.model, vae.guide, digits[0], epochs=3, optimizer=WILD)
    else:
        fit(vae.model, vae.guide, digits[0], valid=digits[1], epochs=1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    after = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(before[2], after, strict=True))


def test_numpys_and_pythons_noise_is_seeded_too():
    def noisy():
        def model(x):
            loc = pyro.param("loc", torch.zeros(3))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                shift = 0.1 * random.random() + 0.1 * np.random.rand()  # noqa: NPY002
                pyro.sample("x", dist.Normal(loc + z + shift, 1.0).to_event(1), obs=x)

        def guide(x):
            width = pyro.param("width", torch.zeros(3))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2, width.exp()).to_event(1))

        return model, guide

    losses = {fit(*noisy(), gaussian_data(60, 3), epochs=2, batch_size=20).metrics["loss"] for _ in range(2)}
    assert len(losses) == 1


def test_order_is_a_permutation_that_depends_on_epoch_and_seed():
    x = torch.arange(10.0).double()[:, None].expand(10, 3)
    orders = []
    for seed in (0, 1):
        spy = Spied()
        fit(*ppca_pair(None), x, objective=spy, epochs=2, batch_size=4, seed=seed)
        rows = torch.cat([batch[:, 0] for _, batch in spy.seen]).tolist()
        orders += [tuple(rows[:10]), tuple(rows[10:])]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len(set(orders)) == 4


def test_a_lone_last_datum_joins_the_batch_before(digits):
    """Batch norm cannot take one; every datum is still seen once."""
    model, guide, _, _ = noisy_pair()
    run = fit(model, guide, digits[0].head(21), epochs=1, batch_size=10)
    assert run.metrics["step"] == 2


# Modules


@pytest.mark.parametrize("fails", [False, True])
def test_train_modes_are_as_they_were(fails, digits):
    model, guide, encoder, decoder = noisy_pair()
    encoder.body[2].eval()  # the dropout is off, the batch norm on
    flags = [m.training for m in (*encoder.modules(), *decoder.modules())]
    if fails:
        with pytest.raises(TrainingError):
            fit(model, guide, digits[0], valid=digits[1], epochs=9, optimizer=WILD)
    else:
        fit(model, guide, digits[0], valid=digits[1], epochs=1)
    assert [m.training for m in (*encoder.modules(), *decoder.modules())] == flags
    assert encoder.body[1].training
    assert not encoder.body[2].training


def test_looking_at_a_pair_leaves_its_batch_norm_alone(digits):
    """The running statistics are those of the training steps: not of the look beforehand, nor of validation."""
    train, valid, _ = digits
    model, guide, encoder, _ = noisy_pair()
    run = fit(model, guide, train.head(100), valid=valid, epochs=3, batch_size=50)
    assert int(encoder.body[1].num_batches_tracked) == run.metrics["step"] == 6


def test_dropout_is_off_in_validation_and_on_in_training(digits):
    model, guide, _, _ = noisy_pair()
    run = fit(model, guide, digits[0].head(100), valid=digits[1], epochs=2, batch_size=100, optimizer=STILL)
    assert run.history[0]["loss"] != run.history[1]["loss"]


# Scopes


def test_two_experiments_do_not_leak():
    x, y = gaussian_data(100, 4, seed=1), gaussian_data(100, 7, seed=2)
    first, second = pair("params_only"), pair("params_only")  # the same names, other shapes
    run1 = fit(first.model, first.guide, x, epochs=2)
    alone = log_marginal(run1.model, run1.guide, x, num_particles=20, proposal="guide").log_px
    run2 = fit(second.model, second.guide, y, epochs=2)
    assert torch.equal(log_marginal(run1.model, run1.guide, x, num_particles=20, proposal="guide").log_px, alone)
    assert run1.model.scope.params["loc"].shape == (4,)
    assert run2.model.scope.params["loc"].shape == (7,)


def test_a_fit_neither_takes_from_the_store_nor_leaves_anything_there():
    x = gaussian_data(100, 4)
    clean = pair("params_only")
    alone = fit(clean.model, clean.guide, x, epochs=2).metrics["loss"]
    pyro.param("loc", torch.full((4,), 9.0))
    mine = pair("params_only")
    assert fit(mine.model, mine.guide, x, epochs=2).metrics["loss"] == alone
    assert list(pyro.get_param_store()) == ["loc"]
    assert torch.equal(pyro.param("loc"), torch.full((4,), 9.0))
    pyro.clear_param_store()


def test_a_failed_fit_leaves_the_store_alone(digits):
    vae = small_vae()
    with pytest.raises(TrainingError):
        fit(vae.model, vae.guide, digits[0], epochs=2, optimizer=WILD)
    with pytest.raises(ContractError):
        fit(*resolve(str(PAIRS / "misses_latent.py"))(), digits[0], epochs=1)
    assert list(pyro.get_param_store()) == []


@pytest.mark.parametrize("name", ["params_only", "pyromodule", "vae"])
def test_the_bare_pair_is_the_trained_pair(name, digits):
    x = gaussian_data(100, 64) if name != "vae" else digits[0].head(100)
    mine = small_vae() if name == "vae" else pair(name) if name == "params_only" else pair(name)(x)
    run = fit(mine.model, mine.guide, x, epochs=2)
    of_run = log_marginal(run.model, run.guide, x, num_particles=10, proposal="guide")
    bare = log_marginal(mine.model, mine.guide, x, num_particles=10, proposal="guide")
    assert torch.equal(of_run.log_px, bare.log_px)
    assert torch.equal(
        generate.reconstructions(run.model, run.guide, x), generate.reconstructions(mine.model, mine.guide, x)
    )


def test_the_first_run_after_a_second_fit_of_its_modules():
    x, oracle = gaussian_data(), linear()
    run1 = fit(oracle.model, oracle.mean_field, x, epochs=1)
    before = log_marginal(run1.model, run1.guide, x, num_particles=5, proposal="guide")
    run2 = fit(oracle.model, oracle.mean_field, x, epochs=1)
    after = log_marginal(run2.model, run2.guide, x, num_particles=5, proposal="guide")
    assert not torch.equal(before.log_px, after.log_px)
    for use in (
        lambda: log_marginal(run1.model, run1.guide, x, num_particles=5, proposal="guide"),
        lambda: generate.samples(run1.model, run1.guide, x),
    ):
        with pytest.raises(ContractError, match="changed after its run had ended"):
            use()


def test_going_on_from_a_run():
    """fit(run.model, run.guide) starts at the run's parameters, and leaves a run of pyro.param as it was."""
    x, mine = gaussian_data(100, 4), pair("params_only")
    run1 = fit(mine.model, mine.guide, x, valid=x, epochs=5, optimizer=ADAM)
    run2 = fit(run1.model, run1.guide, x, valid=x, epochs=1, optimizer=STILL)
    assert run2.metrics["valid_elbo"] == run1.metrics["valid_elbo"]


# NaN


def test_an_exploding_pair_stops_before_the_step(digits, tmp_path):
    vae = small_vae()
    with pytest.raises(TrainingError) as caught:
        fit(vae.model, vae.guide, digits[0], epochs=5, optimizer=WILD)
    text = str(caught.value)
    assert text.startswith("step ")
    assert "'z'" in text or "'x'" in text
    assert text.count("\n") < 3
    assert all(bool(torch.isfinite(p).all()) for p in vae.parameters())


def test_an_explosion_names_the_last_good_checkpoint(tmp_path):
    x, oracle = gaussian_data(), linear()

    class Late(lr_scheduler.LRScheduler):
        def get_lr(self):
            return [1e-3 if self.last_epoch < 2 else 1e30 for _ in self.base_lrs]

    with pytest.raises(TrainingError) as caught:
        fit(oracle.model, oracle.mean_field, x, epochs=9, optimizer=SGD, scheduler=Late, batch_size=30,
            directory=tmp_path / "run", checkpoint_seconds=0)  # fmt: skip
    text = str(caught.value)
    assert "epoch 3" in text
    assert str(tmp_path / "run" / "checkpoints") in text
    assert all(bool(torch.isfinite(p).all()) for p in oracle.parameters())
    fresh = linear(1)
    run = load(tmp_path / "run", fresh.model, fresh.mean_field)
    assert len(run.history) == 2
    assert all(bool(torch.isfinite(p).all()) for p in fresh.parameters())


@pytest.mark.parametrize("kind", ["gradient", "loss"])
def test_nan_at_the_first_step(kind):
    def model(x):
        w = pyro.param("w", torch.zeros(3))
        # a slope of infinity times zero; or the logarithm of a negative number
        shift = 0 * torch.sqrt(w.abs()) if kind == "gradient" else torch.log(-1 - w.abs())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + shift, 1.0, validate_args=False).to_event(1), obs=x)

    def guide(x):
        width = pyro.param("width", torch.zeros(3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, width.exp()).to_event(1))

    with pytest.raises(TrainingError) as caught:
        fit(model, guide, gaussian_data(50, 3), epochs=2)
    assert f"step 1 (epoch 1): the {kind} is nan" in str(caught.value)
    assert ("'w'" if kind == "gradient" else "'x'") in str(caught.value)


def test_a_last_step_to_infinity(tmp_path):
    """The weights that come back, and those of the last checkpoint, are finite."""
    x, oracle = (gaussian_data(100, 64) > 0).float(), small_vae()
    run = fit(oracle.model, oracle.guide, x, epochs=1, batch_size=100, optimizer=SGD, directory=tmp_path)
    far = functools.partial(torch.optim.SGD, lr=3e38)
    with pytest.raises(TrainingError, match="step 1"):
        fit(run.model, run.guide, x, epochs=1, batch_size=100, optimizer=far, directory=tmp_path / "far")
    assert all(bool(torch.isfinite(p).all()) for p in oracle.parameters())


def test_a_validation_that_fails():
    x, oracle = gaussian_data(), linear()
    far = functools.partial(torch.optim.SGD, lr=1e30)  # one step, and the guide's Cholesky factor is gone

    def guide(x):
        torch.linalg.cholesky(torch.eye(2) - (oracle.weight.abs().max() > 1e20) * 2)
        oracle.mean_field(x)

    with pytest.raises(TrainingError, match="epoch 1"):
        fit(oracle.model, guide, x, valid=x, epochs=2, batch_size=120, optimizer=far)


def test_validation_data_of_another_shape():
    oracle, x, calls = linear(), gaussian_data(), []
    with pytest.raises(PpvaeError, match=r"\[.*4\]"):
        fit(oracle.model, oracle.mean_field, x, valid=x[:, :4], epochs=1, callbacks=[lambda *_: calls.append(1)])


def test_nan_in_the_data_is_refused():
    oracle, x = linear(), gaussian_data()
    x[7, 2] = math.nan
    with pytest.raises(DataError, match="row 7, column 2"):
        fit(oracle.model, oracle.guide, x, epochs=1)
    with pytest.raises(DataError, match=r"valid.*row 7, column 2"):
        fit(oracle.model, oracle.guide, gaussian_data(), valid=x, epochs=1)


def test_data_that_do_not_belong_together():
    oracle, x = linear(), gaussian_data()
    with pytest.raises(DataError, match="120 rows"):
        fit(oracle.model, oracle.guide, (x, x[:7]), epochs=1)
    with pytest.raises(UsageError, match="list"):
        fit(oracle.model, oracle.guide, [x.tolist()], epochs=1)
    with pytest.raises(ContractError, match=r"\[100, 4\]|\[120, 4\]"):
        fit(oracle.model, oracle.guide, x[:, :4], epochs=1)


# Kinds of pairs


def test_a_delta_guide_trains():
    """MAP: no ELBO is reported, and log p(x) is refused by the site's name."""
    x = gaussian_data()
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(5, 2), nn.Linear(2, 5)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(encoder(x)).to_event(1))

    run = fit(model, guide, x, epochs=20, optimizer=ADAM)
    assert run.metrics["loss"] < run.history[0]["loss"] - 1
    assert not any("elbo" in name for name in run.metrics)
    with pytest.raises(ContractError, match=r"'z'.*Delta"):
        log_marginal(run.model, run.guide, x, proposal="guide")


def delta_pair():
    torch.manual_seed(0)
    decoder = nn.Linear(2, 5)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.zeros(5, 2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x @ slope).to_event(1))

    return model, guide


def test_patience_without_an_elbo_is_refused():
    with pytest.raises(PpvaeError, match="patience"):
        fit(*delta_pair(), gaussian_data(), valid=gaussian_data(), epochs=10, patience=2)


def test_a_plateau_scheduler_without_an_elbo():
    """It looks at the training loss instead."""
    slow = functools.partial(torch.optim.SGD, lr=1e-12)
    plateau = functools.partial(lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.1, eps=0)
    run = fit(*delta_pair(), gaussian_data(), epochs=4, optimizer=slow, scheduler=plateau)
    assert [m["lr"] for m in run.history] == pytest.approx([1e-12, 1e-12, 1e-13, 1e-14], rel=1e-6, abs=0)
    run = fit(*delta_pair(), gaussian_data(), epochs=4, optimizer=SGD, scheduler=plateau)
    assert run.metrics["lr"] == 1e-3


def mixture():
    """Two Gaussians; which one is summed out in the model, and a latent is sampled in the guide."""

    @config_enumerate
    def model(x):
        means = pyro.param("means", torch.tensor([[-1.0], [1.0]]))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))
            z = pyro.sample("z", dist.Normal(means[k], 0.5).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 0.5).to_event(1))

    return model, guide


def test_an_enumerated_model():
    g = torch.Generator().manual_seed(0)
    x = torch.where(torch.rand(200, 1, generator=g) < 0.5, -3.0, 3.0) + 0.5 * torch.randn(200, 1, generator=g)
    with pytest.raises(ContractError, match=r"'k'.*enumerated.*Trace_ELBO.*TraceEnum_ELBO"):
        fit(*mixture(), x, epochs=1)
    adam = functools.partial(torch.optim.Adam, lr=0.05)
    run = fit(*mixture(), x, valid=x, epochs=60, objective=TraceEnum_ELBO(), optimizer=adam)
    means = run.model.scope.params["means"].detach().flatten()
    assert means[0] == pytest.approx(-3, abs=0.3)
    assert means[1] == pytest.approx(3, abs=0.3)
    assert run.metrics["valid_elbo"] > run.history[0]["valid_elbo"] + 1
    assert log_marginal(run.model, run.guide, x, num_particles=100, proposal="guide").reliable.float().mean() > 0.9


def subsampling(full: int, size: int):
    seen = []

    def model(x):
        weight = pyro.param("weight", torch.ones(2, 5))
        with pyro.plate("data", full, subsample_size=size) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, 1.0).to_event(1), obs=x[rows])

    def guide(x):
        loc = pyro.param("loc", torch.zeros(full, 2))
        with pyro.plate("data", full, subsample_size=size) as rows:
            seen.append(rows)
            pyro.sample("z", dist.Normal(loc[rows], 0.7).to_event(1))

    return model, guide, seen


@pytest.mark.parametrize(("full", "size"), [(60, 20), (50, 20)])
def test_a_pair_whose_plate_draws_its_own_subsample(full, size):
    """An epoch has ceil(N / b) steps, the loss is per datum, and the pair gets all data."""
    x = gaussian_data(full)
    model, guide, seen = subsampling(full, size)
    run = fit(model, guide, x, epochs=30, optimizer=functools.partial(torch.optim.Adam, lr=0.05))
    steps = math.ceil(full / size)
    assert [m["step"] for m in run.history] == [steps * (e + 1) for e in range(30)]
    assert all(len(rows) == size for rows in seen)
    assert len(torch.cat(seen).unique()) == full
    assert run.metrics["train_elbo"] > run.history[0]["train_elbo"] + 1
    assert run.metrics["loss"] == pytest.approx(-run.metrics["train_elbo"], abs=2)  # both in nats per datum
    assert len(log_marginal(run.model, run.guide, x, num_particles=10, proposal="guide").log_px) == full


def test_all_strangers_train(digits):
    train, valid, _ = digits
    images = data.load("digits", binarize="fixed", flat=False)
    grey = data.load("digits")
    cases = {
        "two_latents": (pair("two_latents")(train), train, valid),
        "conv_batchnorm": (pair("conv_batchnorm")(), images[0], images[1]),
        "params_only": (pair("params_only"), grey[0], grey[1]),
        "pyromodule": (pair("pyromodule")(grey[0]), grey[0], grey[1]),
        "labelled": (pair("labelled")(train), (train, train.labels), (valid, valid.labels)),
    }
    for name, (made, x, held_out) in cases.items():
        model, guide = made if isinstance(made, tuple) else (made.model, made.guide)
        run = fit(model, guide, x, valid=held_out, epochs=2, optimizer=ADAM)
        assert run.history[1]["valid_elbo"] > run.history[0]["valid_elbo"], name


def test_binarisation_at_every_read(digits):
    """Every epoch sees other values with the grey levels' means; validation sees one drawing."""
    train, valid, _ = data.load("digits", binarize="dynamic")
    train = train.head(200)
    seen = []

    class Watch(Trace_ELBO):
        def loss_and_grads(self, model, guide, *args, **kwargs):
            seen.append(args[0].clone())
            return super().loss_and_grads(model, guide, *args, **kwargs)

    vae = small_vae()
    run = fit(vae.model, vae.guide, train, valid=valid, epochs=20, objective=Watch(), batch_size=200)
    grey = train.detach().as_subclass(torch.Tensor)
    assert all(set(batch.unique().tolist()) == {0.0, 1.0} for batch in seen)
    totals = torch.stack([batch.sum() for batch in seen])
    assert len(totals.unique()) > 10
    # the total of 20 drawings is within 6 standard deviations of its mean but with probability 2e-9
    spread = math.sqrt(20 * float((grey * (1 - grey)).double().sum()))
    assert abs(float(totals.double().sum()) - 20 * float(grey.double().sum())) < 6 * spread
    assert run.metrics["valid_elbo"] > run.history[0]["valid_elbo"]


def test_a_pair_without_parameters_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))

    with pytest.raises(ContractError, match="no parameters"):
        fit(model, guide, gaussian_data(), epochs=1)


# Run folders


def test_what_a_run_folder_holds(tmp_path):
    x, oracle = gaussian_data(), linear()
    run = fit(oracle.model, oracle.mean_field, x, valid=x, epochs=3, clip=5.0, directory=tmp_path / "run",
              checkpoint_seconds=0, config={"note": "mine"})  # fmt: skip
    folder = tmp_path / "run"
    assert run.directory == folder
    assert {p.name for p in folder.iterdir()} - {"tensorboard"} == {"config.json", "metrics.jsonl", "checkpoints"}
    name = (folder / "checkpoints" / "last").read_text()
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"last", name}
    assert hashlib.sha256((folder / "checkpoints" / name).read_bytes()).hexdigest() + ".pt" == name
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == run.history
    config = json.loads((folder / "config.json").read_text())
    assert config == run.config
    assert config["note"] == "mine"
    assert config["epochs"] == 3
    assert config["fit"] | {"digest": ""} == {
        "objective": "Trace_ELBO", "optimizer": "Adam(lr=0.001)", "scheduler": None, "batch_size": 100, "seed": 0,
        "clip": 5.0, "precision": "float32", "rows": 20_000, "patience": None,
        "num_data": 120, "data": "", "digest": "", "valid": data.digest(x),
    }  # fmt: skip
    assert config["fit"]["digest"] == data.digest(x)
    assert set(config["versions"]) >= {"ppvae", "torch", "pyro", "numpy", "python"}


def test_a_run_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    oracle = linear()
    fit(oracle.model, oracle.guide, gaussian_data(), epochs=1)
    assert list(tmp_path.iterdir()) == []


def test_load_with_the_pair(tmp_path):
    x, oracle = gaussian_data(), linear()
    run = fit(oracle.model, oracle.mean_field, x, epochs=3, optimizer=ADAM, directory=tmp_path)
    want = log_marginal(run.model, run.guide, x, num_particles=10, proposal="guide").log_px
    fresh = linear(seed=5)
    loaded = load(tmp_path, fresh.model, fresh.mean_field)
    assert same(weights(fresh), weights(oracle))
    assert loaded.history == run.history
    assert loaded.config == run.config
    assert torch.equal(log_marginal(loaded.model, loaded.guide, x, num_particles=10, proposal="guide").log_px, want)
    assert torch.equal(log_marginal(fresh.model, fresh.mean_field, x, num_particles=10, proposal="guide").log_px, want)
    assert torch.equal(log_marginal(run.model, run.guide, x, num_particles=10, proposal="guide").log_px, want)


def test_load_brings_buffers_back(tmp_path, digits):
    model, guide, encoder, _ = noisy_pair()
    fit(model, guide, digits[0], epochs=1, directory=tmp_path)
    model, guide, other, _ = noisy_pair(seed=3)
    load(tmp_path, model, guide)
    assert same(list(encoder.buffers()), list(other.buffers()))
    assert other.training


def test_load_with_params_only(tmp_path):
    x, mine = gaussian_data(), pair("params_only")
    run = fit(mine.model, mine.guide, x, epochs=3, optimizer=ADAM, directory=tmp_path)
    other = pair("params_only")
    loaded = load(tmp_path, other.model, other.guide)
    assert torch.equal(
        log_marginal(loaded.model, loaded.guide, x, num_particles=10, proposal="guide").log_px,
        log_marginal(run.model, run.guide, x, num_particles=10, proposal="guide").log_px,
    )


def test_load_refuses_another_pair(tmp_path):
    x, oracle = gaussian_data(), linear()
    fit(oracle.model, oracle.mean_field, x, epochs=1, directory=tmp_path)
    wrong = linear(features=5, latent=3)
    before = weights(wrong)
    with pytest.raises(CheckpointError, match=r"'linear_gaussian#0\$\$\$weight'.*\[5, 2\].*\[5, 3\]"):
        load(tmp_path, wrong.model, wrong.mean_field)
    assert same(weights(wrong), before)
    mine = pair("params_only")
    with pytest.raises(CheckpointError, match="fit the checkpoint"):
        load(tmp_path, mine.model, mine.guide)
    with pytest.raises(UsageError, match=r"load\(directory, model, guide\)"):
        load(tmp_path)


def test_load_from_a_factory(tmp_path):
    x = gaussian_data(100, 64)
    mine = pair("pyromodule")(x, latent=2, hidden=9)
    name = f"{PAIRS / 'pyromodule.py'}:pyromodule"
    entry = {"name": name, "arguments": {"latent": 2, "hidden": 9}, "train": [[list(x.shape), "float32"]]}
    run = fit(mine.model, mine.guide, x, epochs=2, directory=tmp_path, config={"pair": entry})
    loaded = load(tmp_path)
    assert torch.equal(
        log_marginal(loaded.model, loaded.guide, x, num_particles=10, proposal="guide").log_px,
        log_marginal(run.model, run.guide, x, num_particles=10, proposal="guide").log_px,
    )


def test_load_leaves_the_random_state_alone(tmp_path):
    x = gaussian_data(100, 64)
    mine = pair("pyromodule")(x)
    name = f"{PAIRS / 'pyromodule.py'}:pyromodule"
    entry = {"name": name, "arguments": {}, "train": [[list(x.shape), "float32"]]}
    fit(mine.model, mine.guide, x, epochs=1, directory=tmp_path, config={"pair": entry})
    torch.manual_seed(42)
    before = torch.get_rng_state()
    load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_load_takes_the_best_or_the_last(tmp_path, digits):
    train, valid, _ = digits
    seen = []
    vae = small_vae(hidden=64, latent=8)
    adam = functools.partial(torch.optim.Adam, lr=2e-2)
    run = fit(vae.model, vae.guide, train.head(40), valid=valid, epochs=80, batch_size=20, optimizer=adam,
              callbacks=[lambda run, m: seen.append(weights(vae))], directory=tmp_path / "a")  # fmt: skip
    best = int(np.argmax([m["valid_elbo"] for m in run.history]))
    assert best < 79
    for choice, want in ((None, seen[-1]), (False, seen[-1]), (True, seen[best])):
        fresh = small_vae(1, hidden=64, latent=8)
        load(tmp_path / "a", fresh.model, fresh.guide, best=choice)
        assert same(weights(fresh), want)
    vae = small_vae(hidden=64, latent=8)
    fit(vae.model, vae.guide, train.head(40), valid=valid, epochs=200, batch_size=20, optimizer=adam, patience=3,
        directory=tmp_path / "b")  # fmt: skip
    fresh = small_vae(1, hidden=64, latent=8)
    load(tmp_path / "b", fresh.model, fresh.guide)  # what fit returned: the best
    assert same(weights(fresh), weights(vae))
    vae = small_vae()
    fit(vae.model, vae.guide, train.head(40), epochs=1, directory=tmp_path / "c")
    with pytest.raises(CheckpointError, match="no validation data"):
        load(tmp_path / "c", vae.model, vae.guide, best=True)


def test_load_of_nothing(tmp_path):
    oracle = linear()
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="not a run"):
            load(place, oracle.model, oracle.guide)


def test_a_valid_digest_around_something_else(tmp_path):
    """A file that is named by its digest and loads, but is no checkpoint of ours."""
    oracle = linear()
    fit(oracle.model, oracle.mean_field, gaussian_data(), epochs=1, directory=tmp_path)
    for content in ([1, 2], torch.zeros(3), "text"):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        name = hashlib.sha256(buffer.getvalue()).hexdigest() + ".pt"
        (tmp_path / "checkpoints" / name).write_bytes(buffer.getvalue())
        (tmp_path / "checkpoints" / "last").write_text(name)
        with pytest.raises(CheckpointError, match="not the checkpoint of a run"):
            load(tmp_path, oracle.model, oracle.mean_field)


def test_a_valid_digest_around_another_dict(tmp_path):
    oracle = linear()
    fit(oracle.model, oracle.mean_field, gaussian_data(), epochs=1, directory=tmp_path)
    buffer = io.BytesIO()
    torch.save({"weights": torch.zeros(3)}, buffer)
    name = hashlib.sha256(buffer.getvalue()).hexdigest() + ".pt"
    (tmp_path / "checkpoints" / name).write_bytes(buffer.getvalue())
    (tmp_path / "checkpoints" / "last").write_text(name)
    with pytest.raises(CheckpointError):
        load(tmp_path, oracle.model, oracle.mean_field)


def test_progress_shows_nats_per_datum(capsys):
    oracle = linear()
    fit(oracle.model, oracle.guide, gaussian_data(), epochs=2, progress=True)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "ELBO" in shown
    assert "nats" in shown
    fit(oracle.model, oracle.guide, gaussian_data(), epochs=1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("clip", [None, 0.5])
def test_steps_whose_numbers_are_read_at_the_end_of_an_epoch_are_the_same(monkeypatch, clip):
    found = []
    for reads in (True, False):
        monkeypatch.setattr(TrainingStep, "synchronous", reads)
        pair = small_vae()
        run = fit(pair.model, pair.guide, torch.eye(64)[:12], epochs=2, batch_size=4, clip=clip)
        found.append([p.detach() for p in pair.parameters()])
        assert math.isfinite(run.metrics["grad_norm"])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_a_loss_that_is_read_late_puts_the_parameters_back_to_the_epoch_before(monkeypatch):
    monkeypatch.setattr(TrainingStep, "synchronous", False)
    pair, x = small_vae(), torch.eye(64)[:12]
    kept = []

    def note(run, metrics):
        kept.append([p.detach().clone() for p in pair.parameters()])
        if metrics["epoch"] == 2:
            pair.likelihood.net[0].register_forward_hook(lambda *args: torch.full_like(args[-1], torch.nan))

    with pytest.raises(TrainingError, match=r"step 7 \(epoch 3\): the loss is nan; the parameters are put back"):
        fit(pair.model, pair.guide, x, epochs=4, batch_size=4, callbacks=[note])
    for a, b in zip(kept[1], pair.parameters(), strict=True):
        assert torch.equal(a, b)


def test_validation_data_without_a_finite_elbo_are_named_once(caplog):
    pair, x = LinearGaussian(3, 2), torch.randn(50, 3)
    valid = x.clone()
    valid[7] = 1e25
    run = fit(pair.model, pair.mean_field, x, valid=valid, epochs=3, progress=False)
    assert not math.isfinite(run.metrics["valid_elbo"])
    assert [r.message for r in caplog.records if "row 7 of these data" in r.message] == [
        "ppvae: valid_elbo is not finite, as the ELBO of row 7 of these data: mend that row, or leave it out"
    ]


def test_a_run_of_plain_functions_is_bound_to_their_parameters():
    """Those of Pyro's store, as its own SVI leaves them, or those of the run that trained the functions."""

    def model(x):
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None] + loc, 1.0).to_event(1), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.zeros(3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ slope, 1.0))

    x = torch.randn(20, 3)
    pyro.clear_param_store()
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(x)
    run, loc = Run(model, guide, history=[]), pyro.param("loc").detach().clone()
    pyro.clear_param_store()
    assert run.model.scope.params.keys() == {"loc", "slope"}
    assert torch.equal(run.model.scope.params["loc"], loc)
    assert run.metrics == {}
    trained = fit(model, guide, x, epochs=1, compile=False)
    again = Run(model, guide, trained.history)
    options = {"num_particles": 20, "seed": 0}
    found, expected = (log_marginal(r.model, r.guide, x, **options).log_px for r in (again, trained))
    assert torch.equal(found, expected)
    with pytest.raises(UsageError, match="guide: expected a function with sample statements, found str"):
        Run(model, "guide", history=[])
