"""Objectives in `fit` and in Pyro's SVI: schedules, checkpoints, metrics."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import nn

from ppvae import fit, load, objectives
from ppvae.inference.param_store import ParamScope
from ppvae.objectives import (
    ELBO,
    IWAE,
    Capacity,
    ReweightedWakeSleep,
)  # fmt: skip
from ppvae.objectives.gradients import ScoreFunction
from ppvae.objectives.gradients.control_variates import Learned, MovingAverage
from ppvae.objectives.schedules import Cyclical, Linear
from tests.laws.objectives import (
    value,
)
from tests.objectives.pairs import pair
from tests.programs.strangers import PAIRS
from tests.programs.toys import ONE

pytestmark = pytest.mark.filterwarnings("ignore:STL is biased")


def test_fit_trains_on_iwae() -> None:
    p, x = pair()
    before = float(p.log_px(x).mean())
    run = fit(p.model, p.guide, x, objective=objectives.IWAE(4), epochs=30, batch_size=6)
    assert float(p.log_px(x).mean()) > before
    assert math.isfinite(run.metrics["loss"])


def test_a_warm_up_counts_steps_in_pyros_svi(float64):
    model, guide, x, _ = ONE.pair(3)
    objective = ELBO(beta=0.8, warmup=4)
    svi = pyro.infer.SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), objective)
    objective.loss(model, guide, x)
    seen, losses = [], []
    for _ in range(6):
        seen.append(objective.scheduled_values()["beta"])
        torch.manual_seed(1)
        losses.append(svi.step(x))
    assert seen == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8])
    torch.manual_seed(1)
    assert losses[2] == pytest.approx(value(ELBO(beta=0.4), model, guide, x))
    objective.load_state_dict({**objective.state_dict(), "step": 3})
    assert objective.scheduled_values()["beta"] == pytest.approx(0.6)
    assert ELBO(beta=Cyclical(4)).scheduled_values() == {"beta": 0.0}
    assert Capacity(5.0, warmup=10).scheduled_values() == {"capacity": 0.0}


def small(seed: int):
    """A pair of two layers, its last latents discrete, with modules of its own."""
    torch.manual_seed(seed)
    encoder, net = nn.Linear(4, 3), nn.Linear(3, 4)

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(3)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=encoder(x)).to_event(1))

    return model, guide


RESUMED = {
    "schedule": lambda: ELBO(2, beta=Linear(9, end=0.5), warmup=5, gradient="score"),
    "average": lambda: IWAE(3, ScoreFunction(MovingAverage(0.8))),
    "learned": lambda: IWAE(3, ScoreFunction(Learned(nn.Linear(4, 1)))),
    "vimco": lambda: IWAE(3, "vimco"),
    "double_cv": lambda: ELBO(3, gradient="double_cv"),
    "relax": lambda: IWAE(2, {"z": "relax"}),
    "arms": lambda: IWAE(2, "arms"),
    "sleep": lambda: ReweightedWakeSleep(3, 1.0, 0.5),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_with_the_same_bits(name, tmp_path):
    torch.manual_seed(5)
    x = (torch.rand(30, 4) < 0.4).float()
    ends = []
    for epochs in ((4,), (2, 4)):
        folder = tmp_path / str(len(epochs))
        for until in epochs:
            model, guide = small(0)
            torch.manual_seed(9)
            run = fit(
                model, guide, x, objective=RESUMED[name](), epochs=until, batch_size=10, directory=folder,
                resume=True, checkpoint_seconds=0.0,
            )  # fmt: skip
        ends.append((run.model.scope.params, [{k: v for k, v in m.items() if k != "seconds"} for m in run.history]))
    assert ends[0][1] == ends[1][1]
    assert all(torch.equal(p, ends[1][0][n]) for n, p in ends[0][0].items())
    assert load(folder, model=small(1)[0], guide=small(1)[1]).metrics["epoch"] == 4


def test_fit_keeps_terms_raw_beside_a_weighted_loss():
    p, x = pair()
    run = fit(p.model, p.mean_field, x, objective=ELBO(beta=0.5, warmup=4), epochs=3, batch_size=3)
    last = run.history[-1]
    assert [m["beta"] for m in run.history] == pytest.approx([0.25, 0.5, 0.5])
    assert last["train_elbo"] == pytest.approx(-(last["train_rate"] + last["train_distortion"]))
    again = fit(p.model, p.mean_field, x, objective=ELBO(beta=0.5, warmup=4), epochs=1, batch_size=3)
    assert again.history[0]["beta"] == pytest.approx(0.25)


def test_an_objective_begins_anew_in_every_run():
    p, x = pair()
    objective = ELBO(warmup=4)
    for _ in range(2):
        run = fit(p.model, p.mean_field, x, objective=objective, epochs=1, batch_size=3)
        assert run.history[0]["beta"] == pytest.approx(0.5)


def test_fit_tells_the_rate_of_each_latent():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with ParamScope().entered():
            model, guide, batch = PAIRS["hierarchical"]()
            run = fit(model, guide, batch[0], objective=IWAE(3, "dreg"), epochs=1)
        last = run.history[-1]
        assert last["train_kl_z1"] + last["train_kl_z2"] == pytest.approx(last["train_rate"], abs=1e-5)
    finally:
        torch.set_default_dtype(before)


def test_a_resume_with_another_gradient_is_refused(tmp_path):
    p, x = pair()
    fit(p.model, p.mean_field, x, objective=IWAE(3, "dreg"), epochs=1, directory=tmp_path / "run")
    with pytest.raises(Exception, match="DReG"):
        fit(p.model, p.mean_field, x, objective=IWAE(3), epochs=2, directory=tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "objective",
    [Trace_ELBO(num_particles=2), TraceMeanField_ELBO(), RenyiELBO(alpha=0.5, num_particles=2), TraceEnum_ELBO()],
)  # fmt: skip
def test_pyros_objectives_train_in_fit(objective):
    p, x = pair()
    before = float(p.log_px(x).mean())
    fit(p.model, p.mean_field, x, objective=objective, epochs=30, batch_size=6)
    assert float(p.log_px(x).mean()) > before
