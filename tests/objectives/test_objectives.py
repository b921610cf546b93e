"""Values of objectives: against Pyro's, against closed forms, one against another, over strangers' pairs, in fit."""

from __future__ import annotations

import itertools
import logging
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from ppvae import fit, load, objectives
from ppvae.errors import ContractError, UsageError
from ppvae.factories.choices import ClassChoice
from ppvae.inference import terms
from ppvae.inference.param_store import ParamScope
from ppvae.models import LinearGaussian
from ppvae.objectives import (
    CIWAE,
    ELBO,
    IWAE,
    MIWAE,
    PIWAE,
    TCVAE,
    TVO,
    Capacity,
    InfoVAE,
    Renyi,
    ReweightedWakeSleep,
)  # fmt: skip
from ppvae.objectives.aggregate_posterior import mmd
from ppvae.objectives.auxiliary import AuxiliaryLoss
from ppvae.objectives.gradients.control_variates import Learned, MovingAverage
from ppvae.objectives.gradients.estimators import ScoreFunction
from ppvae.objectives.schedules import Cyclical, Linear
from tests.programs.strangers import PAIRS, hierarchy
from tests.programs.toys import MIXED, ONE, TWO


def pair() -> tuple[LinearGaussian, Tensor]:
    torch.manual_seed(0)
    return LinearGaussian(5, 2).double(), torch.randn(6, 5).double()


def test_elbo_is_pyros_on_the_same_noise() -> None:
    p, x = pair()
    ours, pyros = objectives.ELBO(num_particles=3), Trace_ELBO(num_particles=3, vectorize_particles=True)
    with ParamScope().activate():
        losses, gradients = [], []
        for objective in (ours, pyros):
            objective.loss(p.model, p.mean_field, x)  # whatever is done once
            torch.manual_seed(1)
            p.zero_grad()
            losses.append(objective.loss_and_grads(p.model, p.mean_field, x))
            gradients.append([q.grad.clone() for q in p.parameters()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_exact_guide_gives_log_px_at_any_number_of_particles() -> None:
    p, x = pair()
    for objective in (objectives.ELBO(4), objectives.IWAE(1), objectives.IWAE(7)):
        assert objective.loss(p.model, p.guide, x) == pytest.approx(-float(p.log_px(x).sum()), abs=1e-10)


def test_bounds_are_ordered() -> None:
    # means over 4000 draws: a reversal by chance has probability below 1e-9 (gaps are over 6 standard errors)
    p, x = pair()
    x = x[:1].expand(4000, 5)
    elbo, iwae2, iwae20 = (-o.loss(p.model, p.mean_field, x) / 4000 for o in (
        objectives.ELBO(1), objectives.IWAE(2), objectives.IWAE(20)
    ))  # fmt: skip
    assert elbo < iwae2 < iwae20 < float(p.log_px(x[:1])) + 0.01


def test_beta_weighs_the_rate_alone() -> None:
    p, x = pair()
    values = []
    for beta in (0.0, 1.0, 3.0):
        torch.manual_seed(1)
        objective = objectives.ELBO(beta=beta)
        objective.loss(p.model, p.mean_field, x)
        torch.manual_seed(2)
        values.append(objective.loss(p.model, p.mean_field, x))
    rate = values[1] - values[0]
    assert rate != 0
    assert values[2] == pytest.approx(values[0] + 3 * rate, abs=1e-9)


def test_a_subsampled_plate_scales_the_loss_outside_the_logarithm() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 1).double()

    def build(size: int | None) -> tuple[object, object]:
        def plate() -> object:
            return pyro.plate("data", size or 8, subsample=torch.arange(8))

        def model(x: Tensor) -> None:
            with plate():
                z = pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            with plate():
                pyro.sample("z", dist.Normal(x / 3, 1.0).to_event(1))

        return model, guide

    losses = []
    for size in (None, 80):
        objective = objectives.IWAE(5)
        model, guide = build(size)
        objective.loss(model, guide, x)
        torch.manual_seed(3)
        losses.append(objective.loss(model, guide, x))
    assert losses[1] == pytest.approx(10 * losses[0], rel=1e-12)


def test_a_latent_that_is_not_reparameterised_is_refused_by_name() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(p))

    with ParamScope().activate(), pytest.raises(ContractError, match=r"'k'.*reparameterised"):
        objectives.ELBO().loss(model, guide, torch.zeros(3))


def test_fit_trains_on_iwae() -> None:
    p, x = pair()
    before = float(p.log_px(x).mean())
    run = fit(p.model, p.guide, x, objective=objectives.IWAE(4), epochs=30, batch_size=6)
    assert float(p.log_px(x).mean()) > before
    assert math.isfinite(run.metrics["loss"])


# -- one against another, on the same draws ---------------------------------------------------------------------------


@pytest.fixture
def doubles():
    """float64 and an empty param store."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    pyro.clear_param_store()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="STL is biased")
        yield
    pyro.clear_param_store()
    torch.set_default_dtype(before)


def value(objective, model, guide, *batch, seed: int = 1) -> float:
    """The loss on the draws of a seed, after whatever the objective does but once."""
    objective.loss(model, guide, *batch)
    torch.manual_seed(seed)
    return objective.loss(model, guide, *batch)


ESTIMATORS = {
    "elbo": (lambda g: ELBO(3, gradient=g), ("pathwise", "stl", "dreg", "gdreg", "score", "vimco")),
    "beta": (lambda g: ELBO(3, beta=0.5, gradient=g), ("pathwise", "stl", "dreg", "gdreg", "score", "vimco")),
    "kl": (lambda g: ELBO(3, analytic_kl=True, gradient=g), ("pathwise", "score", "vimco")),
    "iwae": (lambda g: IWAE(3, g), ("pathwise", "stl", "dreg", "gdreg", "score", "vimco")),
    "renyi": (lambda g: Renyi(0.4, 3, g), ("pathwise", "stl", "dreg", "gdreg", "score", "vimco")),
    "ciwae": (lambda g: CIWAE(0.4, 3, g), ("pathwise", "stl", "dreg", "gdreg", "score", "vimco")),
    "miwae": (lambda g: MIWAE(3, 2, g), ("pathwise", "stl", "dreg", "gdreg", "score", "vimco")),
    "piwae": (lambda g: PIWAE(3, 2, g), ("pathwise", "dreg")),
    "tvo": (lambda g: TVO(3, 3, gradient=g), ("covariance", "pathwise", "score", "vimco")),
}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("toy", [TWO, MIXED], ids=["paths", "mixed"])
def test_a_value_does_not_depend_on_its_gradient(name, toy, doubles):
    build, gradients = ESTIMATORS[name]
    model, guide, x, params = toy.pair(5)
    found = []
    for gradient in gradients:
        objective = build(gradient)
        if toy is MIXED and gradient not in ("score", "vimco", "covariance"):
            with pytest.raises(ContractError, match=r"'a'.*reparameterised"):
                objective.loss(model, guide, x)
            continue
        found.append(value(objective, model, guide, x))
        torch.manual_seed(1)
        found.append(objective.loss_and_grads(model, guide, x))
        torch.manual_seed(1)
        found.append(float(objective.differentiable_loss(model, guide, x).detach()))
    if found:
        assert max(found) - min(found) < 1e-10
        assert not any(p.grad is None for p in params.values())


def test_bounds_that_are_the_same_are_the_same_on_the_same_draws(doubles):
    model, guide, x, _ = TWO.pair(5)
    pairs = [
        (CIWAE(0.0, 6), IWAE(6)),
        (CIWAE(1.0, 6), ELBO(6)),
        (Renyi(1.0, 6), ELBO(6)),
        (Renyi(0.0, 6), IWAE(6)),
        (MIWAE(6, 1), IWAE(6)),
        (MIWAE(1, 6), ELBO(6)),
        (PIWAE(3, 2), IWAE(6)),
        (TVO(6, 1), ELBO(6)),
        (ReweightedWakeSleep(6), IWAE(6)),
        (ELBO(6, free_bits=-0.0), ELBO(6)),
        (InfoVAE(0.0, 1.0, num_particles=6), ELBO(6)),
    ]
    for ours, same in pairs:
        assert value(ours, model, guide, x) == pytest.approx(value(same, model, guide, x), abs=1e-10), ours
    for alpha, far in ((1 - 1e-4, 1e-3), (1 + 1e-4, 1e-3), (1e-4, 1e-3)):
        same = ELBO(6) if alpha > 0.5 else IWAE(6)
        assert value(Renyi(alpha, 6), model, guide, x) == pytest.approx(value(same, model, guide, x), abs=far)
    distinct = [ELBO(6), IWAE(6), Renyi(0.5, 6), CIWAE(0.5, 6), MIWAE(2, 3), MIWAE(3, 2), TVO(6, 2), TVO(6, 5)]
    values = sorted(value(o, model, guide, x) for o in distinct)
    assert min(b - a for a, b in itertools.pairwise(values)) > 1e-4


def test_bounds_are_reductions_of_the_weights(doubles):
    """Groups of K follow one another in MIWAE; TVO's terms are means under tempered weights."""
    model, guide, x, _ = TWO.pair(5)
    MIWAE(2, 3).loss(model, guide, x)
    torch.manual_seed(1)
    t = terms(model, guide, x, 6)
    w, lw = t.log_weight.exp(), t.log_weight
    miwae = torch.stack([w[:2].mean(0), w[2:4].mean(0), w[4:].mean(0)]).log().mean(0)
    assert value(MIWAE(2, 3), model, guide, x) == pytest.approx(-float(miwae.sum()), abs=1e-10)
    renyi = w.pow(0.3).mean(0).log() / 0.3
    assert value(Renyi(0.7, 6), model, guide, x) == pytest.approx(-float(renyi.sum()), abs=1e-10)
    ends, tvo = [0.0, 0.1, 0.1**0.5, 1.0], torch.zeros(5)
    for low, high in itertools.pairwise(ends):
        tvo = tvo + (high - low) * (w**low / (w**low).sum(0) * lw).sum(0)
    assert value(TVO(6, 3, first=0.1), model, guide, x) == pytest.approx(-float(tvo.sum()), abs=1e-10)


def test_means_of_bounds_are_ordered_by_their_particles(doubles):
    """E[ELBO] <= E[MIWAE(2, 3)] = E[IWAE_2] <= E[IWAE_6] <= E[IWAE_12] <= log p(x): gaps of many standard errors."""
    model, guide, x, _ = ONE.pair(40_000)
    p = ONE.points(ONE.leaves())
    log_px = float((p.log_mass + p.log_weight).logsumexp(0))
    bounds = [-value(o, model, guide, x) / len(x) for o in (ELBO(1), MIWAE(2, 3), IWAE(6), IWAE(12))]
    assert all(a < b for a, b in itertools.pairwise([*bounds, log_px + 1e-3])), bounds
    iwae2 = -value(IWAE(2), model, guide, x, seed=2) / len(x)
    assert bounds[1] == pytest.approx(iwae2, abs=0.03)  # standard error 0.005
    pyro.clear_param_store()
    model, guide, x, _ = ONE.pair(2000)
    tvo = [-value(TVO(200, n), model, guide, x) / len(x) for n in (1, 2, 8, 40)]
    assert all(a < b for a, b in itertools.pairwise([*tvo, log_px + 0.02])), tvo


# -- rates ------------------------------------------------------------------------------------------------------------


def exact_kl(toy_values) -> float:
    loc, s, m, t = toy_values["a"] * 0.8 + toy_values["b"], toy_values["t"], toy_values["m"], toy_values["s"]
    return t - s + (math.exp(2 * s) + (loc - m) ** 2) / (2 * math.exp(2 * t)) - 0.5


def test_a_rate_in_closed_form_is_the_kl(doubles):
    model, guide, x, _ = ONE.pair(7)
    difference = value(ELBO(beta=2.0, analytic_kl=True), model, guide, x) - value(
        ELBO(beta=1.0, analytic_kl=True), model, guide, x
    )
    assert difference == pytest.approx(7 * exact_kl(ONE.values), abs=1e-10)


def test_capacity_charges_the_distance_from_the_rate(doubles):
    model, guide, x, _ = ONE.pair(7)
    kl = exact_kl(ONE.values)
    distortion = value(ELBO(beta=0.0, analytic_kl=True), model, guide, x)
    for capacity in (kl - 0.3, kl + 0.2):
        found = value(Capacity(capacity, 10.0, analytic_kl=True), model, guide, x)
        assert found - distortion == pytest.approx(7 * 10 * abs(kl - capacity), abs=1e-9)


def dims_pair():
    """Two dims, whose KLs are 0.5 (1 + log-free) each by hand: loc (0.2, 1.0), scale 1, against N(0, 1)."""
    loc = nn.Parameter(torch.tensor([0.2, 1.0]))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", loc) * torch.ones(2), 1.0).to_event(1))

    return model, guide, torch.zeros(4, 2), loc


@pytest.mark.parametrize("layout", ["vectorized", "folded", "one by one"])
def test_free_bits_are_granted_to_each_dim(layout, doubles, monkeypatch):
    """KL is 0.02 in one dim and 0.5 in the other: at 0.1 the first is charged 0.1 and has no gradient from its rate."""
    monkeypatch.setattr("ppvae.inference.inspection.find_layout", lambda *_: layout)
    model, guide, x, loc = dims_pair()
    options = {"num_particles": 3, "analytic_kl": True}
    plain = value(ELBO(**options), model, guide, x)
    free = ELBO(free_bits=0.1, **options)
    assert value(free, model, guide, x) - plain == pytest.approx(4 * (0.1 - 0.02), abs=1e-10)
    assert value(ELBO(free_bits=0.9, **options), model, guide, x) - plain == pytest.approx(4 * (1.8 - 0.52), abs=1e-10)
    torch.manual_seed(1)
    free.loss_and_grads(model, guide, x)
    granted = loc.grad.clone()
    loc.grad = None
    torch.manual_seed(1)
    ELBO(**options).loss_and_grads(model, guide, x)  # looks at the pair first, but keeps the noise as it is
    assert float((loc.grad - granted)[0]) == pytest.approx(4 * 0.2, abs=1e-10)
    assert float((loc.grad - granted)[1]) == pytest.approx(0, abs=1e-10)
    drawn = ELBO(3, free_bits=0.9)  # draws in the place of the closed form: the same law in the mean
    assert math.isfinite(value(drawn, model, guide, x))


def test_tcvae_with_weights_of_one_is_the_elbo_and_its_parts_are_what_they_are(doubles):
    model, guide, x, loc = dims_pair()
    for particles in (1, 3):
        same = TCVAE(1.0, 1.0, 1.0, num_data=50, num_particles=particles)
        assert value(same, model, guide, x) == pytest.approx(value(ELBO(particles), model, guide, x), abs=1e-10)

    torch.manual_seed(3)
    x, net = torch.randn(5, 2), nn.Linear(2, 4)

    def amortised(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            loc, log_scale = net(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    value(ELBO(), model, amortised, x)
    torch.manual_seed(1)
    t = terms(model, amortised, x)
    loc, log_scale = net(x).chunk(2, -1)
    z = t.guide["z"].value[0]
    pairs = dist.Normal(loc, log_scale.exp()).log_prob(z[:, None])  # [draw, datum, dim]
    log_qz = pairs.sum(-1).logsumexp(1) - math.log(5 * 200)
    log_dims = (pairs.logsumexp(1) - math.log(5 * 200)).sum(-1)
    parts = [t.log_guide[0] - log_qz, log_qz - log_dims, log_dims - t.log_prior[0]]
    elbo = value(ELBO(), model, amortised, x)
    for place, weights in enumerate(((1.0, 3.0, 1.0), (3.0, 1.0, 1.0), (1.0, 1.0, 3.0))):
        beta, alpha, gamma = weights[1], weights[0], weights[2]
        found = value(TCVAE(beta, alpha, gamma, num_data=200), model, amortised, x)
        part = parts[weights.index(3.0)]
        assert found - elbo == pytest.approx(2 * float(part.sum().detach()), abs=1e-9), place


def test_tcvae_takes_the_size_of_the_data_from_the_plate_or_asks_for_it(doubles):
    model, guide, x, _ = dims_pair()
    with pytest.raises(ContractError, match="num_data"):
        TCVAE().loss(model, guide, x)


def test_mmd_is_unbiased_and_tells_distributions_apart(doubles):
    """In one dim the kernel's mean is known: E exp(-(x - y)^2 / 2), x - y ~ N(m, 2), is exp(-m^2 / 6) / sqrt(3)."""
    torch.manual_seed(0)
    found = torch.stack([mmd(torch.randn(20, 1), 1.5 + torch.randn(20, 1), 1.0) for _ in range(1000)])
    exact = 2 * (1 - math.exp(-(1.5**2) / 6)) / math.sqrt(3)
    assert abs(float(found.mean()) - exact) < 5 * float(found.std()) / 1000**0.5  # wrong with probability 6e-7
    none = torch.stack([mmd(torch.randn(20, 1), torch.randn(20, 1), 1.0) for _ in range(1000)])
    assert abs(float(none.mean())) < 5 * float(none.std()) / 1000**0.5


def test_infovae_draws_latents_of_the_guide_to_the_prior(doubles):
    model, guide, x, loc = dims_pair()
    x = torch.zeros(40, 2)
    objective = InfoVAE(alpha=1.0, weight=1000.0, num_particles=2)
    objective.loss_and_grads(model, guide, x)
    assert loc.grad[1] > 0  # a step down takes the location to zero


# -- Pyro's -----------------------------------------------------------------------------------------------------------


def same_as_pyro(ours, pyros, model, guide, batch) -> None:
    """Loss and gradients, on the same noise."""
    results = []
    for objective in (ours, pyros):
        objective.loss(model, guide, *batch)
        params = dict(pyro.get_param_store().named_parameters())
        for p in params.values():
            p.grad = None
        torch.manual_seed(2)
        loss = objective.loss_and_grads(model, guide, *batch)
        results.append((loss, {n: p.grad for n, p in params.items()}))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-9)
    for name, gradient in results[0][1].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", ["modules", "hierarchical", "params", "masked", "inner_plate", "flow", "classes"])
def test_elbo_is_pyros(name, doubles):
    model, guide, batch = PAIRS[name]()
    plate_nesting = 2 if name == "inner_plate" else 1
    pyros = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=plate_nesting)
    same_as_pyro(ELBO(3), pyros, model, guide, batch)


@pytest.mark.parametrize("name", ["modules", "params", "labelled", "classes"])
def test_elbo_with_closed_kl_is_pyros(name, doubles):
    model, guide, batch = PAIRS[name]()
    pyros = TraceMeanField_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    same_as_pyro(ELBO(3, analytic_kl=True), pyros, model, guide, batch)


@pytest.mark.parametrize("name", ["enumerated_model", "enumerated_vector", "markov", "semi_supervised"])
def test_elbo_of_enumerated_sites_is_pyros(name, doubles):
    model, guide, batch = PAIRS[name]()
    plate_nesting = 2 if name == "enumerated_vector" else 1
    pyros = TraceEnum_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=plate_nesting)
    same_as_pyro(ELBO(3), pyros, model, guide, batch)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("name", ["modules", "params", "masked"])
def test_renyi_is_pyros_where_the_plate_has_no_scale(name, alpha, doubles):
    model, guide, batch = PAIRS[name]()
    pyros = RenyiELBO(alpha=alpha, num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    same_as_pyro(Renyi(alpha, 3), pyros, model, guide, batch)


@pytest.mark.parametrize(
    "build",
    [
        lambda: IWAE(3), lambda: IWAE(3, "dreg"), lambda: ELBO(2, beta=0.3), lambda: ELBO(2, analytic_kl=True),
        lambda: Renyi(0.5, 3), lambda: CIWAE(0.5, 3), lambda: MIWAE(2, 2), lambda: PIWAE(2, 2), lambda: TVO(3, 2),
        lambda: ReweightedWakeSleep(3), lambda: ReweightedWakeSleep(3, 0.0, 1.0), lambda: InfoVAE(),
    ],
)  # fmt: skip
def test_the_plates_scale_is_outside_of_the_bound(build, doubles):
    """A plate of 6 and one of 600 with the same 6 data: loss and gradients are a hundred times as large."""
    found = []
    for full in (6, 600):
        pyro.clear_param_store()
        model, guide, batch = hierarchy(full)
        objective = build()
        objective.loss(model, guide, *batch)
        torch.manual_seed(4)
        loss = objective.loss_and_grads(model, guide, *batch)
        grads = {n: p.grad for n, p in pyro.get_param_store().named_parameters()}
        found.append((loss, grads))
    assert found[1][0] == pytest.approx(100 * found[0][0], rel=1e-12)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], 100 * gradient, rtol=1e-9, atol=1e-12)


# -- strangers --------------------------------------------------------------------------------------------------------

ALL = {
    "elbo": lambda: ELBO(2),
    "elbo score": lambda: ELBO(2, gradient="vimco"),
    "elbo stl": lambda: ELBO(2, gradient="stl"),
    "beta": lambda: ELBO(2, beta=0.5, warmup=3),
    "kl": lambda: ELBO(2, analytic_kl=True),
    "free bits": lambda: ELBO(2, free_bits=0.1),
    "capacity": lambda: Capacity(1.0, num_particles=2),
    "iwae": lambda: IWAE(3),
    "dreg": lambda: IWAE(3, "dreg"),
    "gdreg": lambda: IWAE(3, "gdreg"),
    "vimco": lambda: IWAE(3, "vimco"),
    "score": lambda: IWAE(3, "score"),
    "renyi": lambda: Renyi(0.5, 3, "dreg"),
    "ciwae": lambda: CIWAE(0.5, 3, "dreg"),
    "miwae": lambda: MIWAE(2, 3, "dreg"),
    "piwae": lambda: PIWAE(2, 3),
    "piwae dreg": lambda: PIWAE(2, 3, "dreg"),
    "tvo": lambda: TVO(3, 3),
    "tvo paths": lambda: TVO(3, 3, gradient="pathwise"),
    "wake": lambda: ReweightedWakeSleep(3),
    "sleep": lambda: ReweightedWakeSleep(3, 1.0, 1.0),
    "tcvae": lambda: TCVAE(num_data=50, num_particles=2),
    "infovae": lambda: InfoVAE(num_particles=2),
}
ENUMERATED = {"enumerated_model", "enumerated_vector", "markov", "semi_supervised", "enumerated_both"}
IN_GUIDE = {"semi_supervised", "enumerated_both"}
HELPED = {"auto_normal", "auxiliary"}
PATHS = {"elbo", "elbo stl", "beta", "kl", "free bits", "capacity", "iwae", "dreg", "gdreg", "renyi", "ciwae", "miwae"}
PATHS |= {"piwae", "piwae dreg", "tvo paths", "tcvae", "infovae"}
SEVERAL = {"hierarchical", "inner_plate", "sequential_plate", "masked", "supports"}
REFUSED = {  # objective -> pairs that it refuses, each for a reason of mathematics
    **{name: {"discrete"} for name in PATHS},
    "beta": {"discrete"} | ENUMERATED,
    "kl": {"discrete"} | ENUMERATED,
    "capacity": {"discrete"} | ENUMERATED,
    "free bits": {"discrete", "shared_latent"} | ENUMERATED | HELPED,
    "elbo stl": {"discrete"} | IN_GUIDE,
    "dreg": {"discrete"} | IN_GUIDE,
    "gdreg": {"discrete"} | ENUMERATED,
    **{name: {"discrete"} | IN_GUIDE for name in ("renyi", "ciwae", "miwae", "piwae", "piwae dreg", "tvo paths")},
    "tvo": IN_GUIDE,
    "wake": IN_GUIDE,
    "sleep": IN_GUIDE | HELPED | {"shared_latent", "indexes", "local_params", "enumerated_vector", "markov"}
    | {"inner_plate", "sequential_plate", "obs_mask", "masked"},
    "tcvae": {"discrete", "shared_latent", "indexes", "local_params", "flow"} | ENUMERATED | HELPED | SEVERAL,
    "infovae": {"discrete", "shared_latent"} | ENUMERATED | HELPED,
}  # fmt: skip
UNTAUGHT = {("iwae", name) for name in IN_GUIDE} | {(n, p) for n in ("vimco", "score") for p in IN_GUIDE}


@pytest.mark.parametrize("pair", PAIRS)
def test_every_objective_takes_every_pair_or_says_why_not(pair, doubles, caplog):
    caplog.set_level(logging.ERROR, logger="ppvae")
    refused = {}
    for name, build in ALL.items():
        pyro.clear_param_store()
        model, guide, batch = PAIRS[pair]()
        objective = build()
        losses = []
        try:
            for loss in (objective.loss, objective.loss, objective.loss_and_grads):  # the first looks at the pair
                torch.manual_seed(3)
                losses.append(loss(model, guide, *batch))
        except ContractError as error:
            refused[name] = str(error)
            continue
        assert math.isfinite(losses[1])
        assert losses[2] == pytest.approx(losses[1], abs=1e-9)
        for n, p in pyro.get_param_store().named_parameters():
            if p.grad is None:
                assert (name, pair) in UNTAUGHT, (name, n)
            else:
                assert torch.isfinite(p.grad).all(), (name, n)
    assert refused.keys() == {name for name, pairs in REFUSED.items() if pair in pairs}
    assert all("expected" in reason and "found" in reason for reason in refused.values())


@pytest.mark.parametrize("name", ALL)
def test_a_step_leaves_batch_norm_as_one_run_of_the_pair_does(name, doubles):
    """Whatever is run besides, for a frozen density or on other draws, is not gathered."""

    def gathered(build):
        pyro.clear_param_store()
        model, guide, batch = PAIRS["conv"]()
        nets = [
            c.cell_contents for f in (model, guide) for c in f.__closure__ if isinstance(c.cell_contents, nn.Module)
        ]
        objective = build()
        objective.loss(model, guide, *batch)
        torch.manual_seed(3)
        objective.loss_and_grads(model, guide, *batch)
        return [b for net in nets for b in net.buffers()], objective.draws

    found, draws = gathered(ALL[name])
    once, _ = gathered(lambda: ELBO(draws))
    assert len(found) == 6
    for a, b in zip(found, once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_bound_that_sums_a_guides_site_out_says_that_it_teaches_it_nothing(doubles, caplog):
    model, guide, batch = PAIRS["semi_supervised"]()
    with caplog.at_level(logging.WARNING, logger="ppvae"):
        IWAE(3).loss(model, guide, *batch)
    assert any("'y'" in m or "y:" in m for m in caplog.messages), caplog.messages


def point_pair():
    loc = nn.Parameter(torch.tensor(0.4))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(pyro.param("loc", loc)))

    return model, guide, torch.tensor([1.0, 2.0]), loc


def test_a_point_mass_trains_by_the_elbo_and_has_no_weights(doubles):
    model, guide, x, loc = point_pair()
    ELBO().loss_and_grads(model, guide, x)
    assert float(loc.grad) == pytest.approx(2 * 0.4 - (0.6 + 1.6))  # d/dz of log p(x, z), summed over two data
    for objective in (IWAE(3), Renyi(0.5, 3), CIWAE(0.5, 3), MIWAE(2, 2), PIWAE(2, 2), TVO(3), ReweightedWakeSleep(3)):
        with pytest.raises(ContractError, match=r"'z'.*absolutely continuous"):
            objective.loss(model, guide, x)


def test_other_scales_and_keywords_are_refused(doubles):
    model, guide, x, _ = ONE.pair(3)
    for objective in (ELBO(), IWAE(3)):
        with pytest.raises(ContractError, match="scale"):
            objective.loss(poutine.scale(model, 0.5), guide, x)
        with pytest.raises(UsageError, match="no keywords"):
            objective.loss(model, guide, x, annealing=0.5)


def test_a_shared_latent_wants_all_data_in_the_batch(doubles):
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 50, subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        pyro.sample("loc", dist.Normal(pyro.param("q", torch.tensor(0.0)), 1.0))

    with pytest.raises(ContractError, match="shared by all data"):
        ELBO().loss(model, guide, torch.zeros(3))


def test_particles_of_a_plate_that_draws_its_subsample_look_at_the_same_data(doubles, monkeypatch):
    monkeypatch.setattr("ppvae.inference.inspection.find_layout", lambda *_: "one by one")
    x = torch.tensor([0.0, 100.0, 200.0, 300.0])

    def model(x):
        with pyro.plate("data", 4, subsample_size=1) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1e-3))
            pyro.sample("x", dist.Normal(z + pyro.param("shift", torch.tensor(0.0)), 1.0), obs=x[index])

    def guide(x):
        with pyro.plate("data", 4, subsample_size=1):
            pyro.sample("z", dist.Normal(0.0, 1e-3))

    objective = ELBO(20)
    objective.loss(model, guide, x)
    exact = sorted(4 * float(0.5 * v**2 + 0.5 * math.log(2 * math.pi)) for v in x)
    for _ in range(10):
        loss = objective.loss(model, guide, x)
        assert min(abs(loss - e) for e in exact) < 10


# -- schedules, and fit -----------------------------------------------------------------------------------------------


def test_a_warm_up_counts_steps_in_pyros_svi(doubles):
    model, guide, x, _ = ONE.pair(3)
    objective = ELBO(beta=0.8, warmup=4)
    svi = pyro.infer.SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), objective)
    objective.loss(model, guide, x)
    seen, losses = [], []
    for _ in range(6):
        seen.append(objective.scheduled()["beta"])
        torch.manual_seed(1)
        losses.append(svi.step(x))
    assert seen == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8])
    torch.manual_seed(1)
    assert losses[2] == pytest.approx(value(ELBO(beta=0.4), model, guide, x))
    objective.load_state_dict({**objective.state_dict(), "step": 3})
    assert objective.scheduled()["beta"] == pytest.approx(0.6)
    assert ELBO(beta=Cyclical(4)).scheduled() == {"beta": 0.0}
    assert Capacity(5.0, warmup=10).scheduled() == {"capacity": 0.0}


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
        with ParamScope().activate():
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


def test_names_for_the_command_line():
    for name in objectives.__all__:
        thing = getattr(objectives, name)
        assert issubclass(thing, objectives.Objective)
        if name != "Objective":
            thing()  # every argument has a default
            assert "Args:" in thing.__doc__
    flags = ClassChoice(("ppvae.objectives",), objectives.Objective).flags
    assert {"num_particles", "gradient"} == flags(IWAE).keys()
    assert {"num_particles", "beta", "free_bits", "analytic_kl", "gradient", "warmup"} == flags(ELBO).keys()


def test_a_beta_that_is_set_later_is_the_one_that_counts() -> None:
    pair, x = LinearGaussian(3, 2), torch.randn(5, 3)
    objective = ELBO(num_particles=4)
    objective.beta = 0.25
    torch.manual_seed(0)
    later = objective.loss(pair.model, pair.mean_field, x)
    torch.manual_seed(0)
    assert later == ELBO(num_particles=4, beta=0.25).loss(pair.model, pair.mean_field, x)


@pytest.mark.parametrize("of", [lambda: ELBO(3), lambda: IWAE(3, gradient="dreg"), lambda: objectives.TVO(4)])
def test_plus_adds_a_term_of_the_batch_to_loss_and_gradient(of) -> None:
    p, x = pair()
    shift = torch.tensor([0.5], dtype=torch.float64)
    losses, gradients = [], []
    for objective in (of(), AuxiliaryLoss(of(), lambda x: (p.loc * shift - x).sum(-1), weight=2.0)):
        with ParamScope().activate():
            objective.loss(p.model, p.mean_field, x)
            torch.manual_seed(1)
            p.zero_grad()
            losses.append(objective.loss_and_grads(p.model, p.mean_field, x))
            gradients.append(p.loc.grad.clone())
    term = 2.0 * (p.loc.detach() * shift - x).sum()
    assert losses[1] == pytest.approx(losses[0] - float(term), abs=1e-9)
    torch.testing.assert_close(gradients[1], gradients[0] - 2.0 * 6 * shift.expand(5))


def test_plus_follows_the_schedules_of_its_bound() -> None:
    p, x = pair()
    objective = AuxiliaryLoss(ELBO(warmup=4), lambda x: x.sum(-1))
    for step in range(3):
        assert objective.scheduled()["beta"] == step / 4
        objective.loss_and_grads(p.model, p.mean_field, x)
    again = AuxiliaryLoss(ELBO(warmup=4), lambda x: x.sum(-1))
    again.load_state_dict(objective.state_dict())
    assert again.scheduled() == objective.scheduled()


def test_plus_refuses_what_it_cannot_add() -> None:
    p, x = pair()
    with pytest.raises(UsageError, match="bound: expected an objective of ppvae, found Trace_ELBO"):
        AuxiliaryLoss(Trace_ELBO(), lambda x: x.sum(-1))
    with pytest.raises(UsageError, match=r"term: expected a number a datum \[6\], found \[\]"):
        AuxiliaryLoss(ELBO(), lambda x: x.sum()).loss(p.model, p.mean_field, x)
