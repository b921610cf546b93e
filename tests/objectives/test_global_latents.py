"""Bounds on log p of all data from mini-batches, for pairs with global latents.

Statistical tests fail by chance with probability below 1e-5 each.
"""

import math
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import nn

from ppvae.errors import ContractError
from ppvae.objectives import CIWAE, ELBO, IWAE, MIWAE, TVO, Capacity, Renyi, ReweightedWakeSleep
from tests.laws.objectives import COMBINATIONS, ESTIMATORS, GLOBAL, OBJECTIVES
from tests.programs.conjugate import CONJUGATE, Conjugate, mixture, normal_mean, regression


@pytest.fixture(autouse=True)
def _empty_store():
    pyro.clear_param_store()
    torch.manual_seed(0)


class DatumNoise:
    """Standard normal noise as a function of (particle, row of the data set), and of the draw of a global latent."""

    def __init__(self, num_data: int, global_dims: int):
        generator = torch.Generator().manual_seed(0)
        self.local = torch.randn(20, num_data, generator=generator).double()
        self.globals = torch.randn(20, 1, global_dims, generator=generator).double()
        self.rows = torch.arange(num_data)

    def __call__(self, shape, dtype, device):
        if len(shape) == 3 or shape[-1] == 2:  # [draws, 1, dims], or [dims] of one draw
            return self.globals[: shape[0]] if len(shape) == 3 else self.globals[0, 0]
        local = self.local[:, self.rows[: shape[-1]]]
        return local[: shape[0]] if len(shape) == 2 else local[0]

    def __enter__(self):
        names = ("torch.distributions.normal", "torch.distributions.multivariate_normal")
        self.patches = [mock.patch(f"{name}._standard_normal", self) for name in names]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_):
        for patch in self.patches:
            patch.stop()


def loss_and_grads(c: Conjugate, objective, batch):
    params = dict(pyro.get_param_store().named_parameters())
    for p in params.values():
        p.grad = None
    loss = objective.loss_and_grads(*c.pair, *batch)
    return loss, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in params.items()}


# a capacity is a penalty on the rate of a batch as a whole
TAKEN = [
    pytest.param(n, g, marks=() if g in ("pathwise", "own", "covariance") or n == "iwae" else pytest.mark.slow)
    for n, g in COMBINATIONS
    if n != "capacity" and not OBJECTIVES[n].refuses & GLOBAL
]


@pytest.mark.parametrize(("name", "gradient"), TAKEN)
def test_the_mean_over_mini_batches_is_the_value_on_all_data(name, gradient, float64):
    """Loss and gradients, of the same noise at each datum: exact."""
    case, estimator = OBJECTIVES[name], ESTIMATORS[gradient]
    c = regression()
    with DatumNoise(12, 2) as noise:
        objective = case.build(3, estimator.build())
        loss, grads = loss_and_grads(c, objective, c.batch)
        parts = []
        for rows in torch.arange(12).split(4):
            noise.rows = rows
            parts.append(loss_and_grads(c, case.build(3, estimator.build()), [t[rows] for t in c.batch]))
    assert sum(part for part, _ in parts) / 3 == pytest.approx(loss, rel=1e-10)
    for parameter, gradient in grads.items():
        assert gradient.abs().max() > 0, parameter
        mean = sum(g[parameter] for _, g in parts) / 3
        torch.testing.assert_close(mean, gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", CONJUGATE)
@pytest.mark.parametrize("rows", [2, 5])
def test_the_elbo_of_a_mini_batch_is_pyros(name, rows):
    c = CONJUGATE[name]()
    batch = [t[:rows] for t in c.batch]
    objective = ELBO()
    objective.loss(*c.pair, *batch)
    enumerated = name.startswith("mixture")
    theirs = TraceEnum_ELBO(max_plate_nesting=1) if enumerated else Trace_ELBO()
    losses = []
    for loss in (objective, theirs):
        torch.manual_seed(7)
        losses.append(loss.loss(*c.pair, *batch))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def mean_and_error(objective, c, batches, count):
    """The mean of minus the loss over batches in turn, with its standard error."""
    losses = []
    for i in range(count):
        losses.append(-objective.loss(*c.pair, *batches[i % len(batches)]))
    values = torch.tensor(losses, dtype=torch.float64)
    by_epoch = values.reshape(-1, len(batches)).mean(1)
    return by_epoch.mean().item(), by_epoch.std().item() / len(by_epoch) ** 0.5


@pytest.mark.parametrize("build", [normal_mean, regression])
def test_the_elbo_of_mini_batches_is_the_exact_one(build):
    c = build()
    batches = [[t[rows] for t in c.batch] for rows in torch.arange(len(c.batch[0])).split(4)]
    mean, error = mean_and_error(ELBO(10), c, batches, 120 * len(batches))
    assert abs(mean - c.elbo) < 5 * error
    assert error < 0.1


def test_importance_weighting_tightens_the_local_part_alone():
    """As K grows the bound tends to E_q[log p(x | w)] - KL(q(w) || p(w)), which `local=1` has at any K."""
    bounds = {}
    limit = regression(local=1.0).elbo  # exact local guides: the ELBO is the limit
    pyro.clear_param_store()
    c = regression()
    batches = [[t[rows] for t in c.batch] for rows in torch.arange(12).split(6)]
    for name, objective in {"1": IWAE(1), "5": IWAE(5), "50": IWAE(50), "miwae": MIWAE(5, 4)}.items():
        bounds[name], error = mean_and_error(objective, c, batches, 240)
        assert bounds[name] < limit + 5 * error
        assert bounds[name] > c.elbo - 5 * error
    assert abs(bounds["1"] - c.elbo) < 0.8
    assert bounds["5"] > c.elbo + 0.1
    assert abs(bounds["50"] - limit) < 0.5
    assert limit < c.log_px


@pytest.mark.parametrize("objective", [IWAE(4), MIWAE(2, 2), Renyi(0.5, 4), CIWAE(0.3, 4), TVO(4, 3)])
@pytest.mark.parametrize("in_plate", [False, True])
def test_where_local_latents_are_summed_out_every_bound_is_the_elbo_at_one_draw(objective, in_plate):
    c = mixture(in_plate)
    batch = [c.batch[0][:4]]
    objective.loss(*c.pair, *batch)
    elbo = ELBO(1)
    elbo.loss(*c.pair, *batch)
    found = []
    for bound in (objective, elbo):
        torch.manual_seed(5)
        found.append(bound.loss(*c.pair, *batch))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def gradient_samples(c, objective, batch, count):
    """Independent gradients of the loss, each from the noise of its number."""
    objective.loss(*c.pair, *batch)
    grads = []
    for i in range(count):
        torch.manual_seed(i)
        grads.append(loss_and_grads(c, objective, batch)[1])
    return {n: torch.stack([g[n] for g in grads]) for n in grads[0]}


@pytest.mark.parametrize(
    "objective",
    [
        lambda: IWAE(4, "dreg"),
        pytest.param(lambda: IWAE(4, "gdreg"), marks=pytest.mark.slow),
        pytest.param(lambda: Renyi(0.4, 4, "dreg"), marks=pytest.mark.slow),
        pytest.param(lambda: CIWAE(0.3, 4, "dreg"), marks=pytest.mark.slow),
        pytest.param(lambda: ELBO(3, gradient="stl"), marks=pytest.mark.slow),
        pytest.param(lambda: ELBO(3, gradient="dreg"), marks=pytest.mark.slow),
        pytest.param(lambda: ELBO(3, analytic_kl=True), marks=pytest.mark.slow),
    ],
)
def test_gradients_of_global_latents_have_the_mean_of_the_pathwise_ones(objective):
    """The local guide is given w, so that w is among what its score depends on; differences are of the same noise."""
    c = regression(local=1.6)
    dict(pyro.get_param_store().named_parameters())["a"].data.fill_(0.3)  # off centre: weights and score correlate
    batch = [t[:3] for t in c.batch]
    estimated = objective()
    plain = {IWAE: lambda: IWAE(4), Renyi: lambda: Renyi(0.4, 4), CIWAE: lambda: CIWAE(0.3, 4), ELBO: lambda: ELBO(3)}
    found, reference = (gradient_samples(c, o, batch, 250) for o in (estimated, plain[type(estimated)]()))
    for name, samples in found.items():
        difference = samples - reference[name]
        error = difference.std(0) / 250**0.5 + 1e-9
        assert float((difference.mean(0) / error).abs().max()) < 5, name


def test_wake_sleep_gives_global_latents_the_gradient_of_its_bound():
    c = regression()
    batch = [t[:3] for t in c.batch]
    found = {}
    for name, objective in {"wake": ReweightedWakeSleep(4), "iwae": IWAE(4)}.items():
        objective.loss(*c.pair, *batch)
        with DatumNoise(12, 2):
            found[name] = loss_and_grads(c, objective, batch)[1]
    # w reaches the draws z of the pathwise gradient, which wake-sleep holds constant: the densities' part is the same
    assert found["wake"]["w_mean"].abs().max() > 0
    assert found["wake"]["w_tril"].abs().max() > 0


# -- a discrete global latent, and points ------------------------------------------------------------------------------


def coin(x, logits=0.3):
    """x_n ~ N(2 s - 1, 1), s ~ Bernoulli for all data."""
    s = pyro.sample("s", dist.Bernoulli(logits=torch.tensor(logits, dtype=torch.float64)))
    with pyro.plate("data", 12, subsample=x):
        pyro.sample("x", dist.Normal(2 * s - 1, 1.0), obs=x)


def coin_guide(x):
    pyro.sample("s", dist.Bernoulli(logits=pyro.param("u", torch.tensor(-0.4, dtype=torch.float64))))


@pytest.mark.parametrize("objective", [ELBO(1, gradient="score"), ELBO(4, gradient="vimco"), ELBO(3, gradient="score")])
def test_the_score_of_a_discrete_global_latent_has_the_mean_of_the_exact_gradient(objective):
    x = torch.randn(12, generator=torch.Generator().manual_seed(3)).double() * 0.3
    batch = x[:4]
    u = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    total = 0.0
    for s in (0.0, 1.0):
        q = dist.Bernoulli(logits=u).log_prob(torch.tensor(s).double())
        p = dist.Bernoulli(logits=torch.tensor(0.3).double()).log_prob(torch.tensor(s).double())
        local = 3 * dist.Normal(2 * s - 1, 1.0).log_prob(batch).sum()
        total = total + q.exp() * (local + p - q)
    (exact,) = torch.autograd.grad(-total, u)
    coin_guide(x)
    c = Conjugate(coin, coin_guide, (x,), 0.0, x, x, x)
    samples = gradient_samples(c, objective, [batch], 600)["u"]
    assert abs(samples.mean() - exact) < 5 * samples.std() / 600**0.5


@pytest.mark.parametrize("objective", [IWAE(3, "score"), TVO(3), ReweightedWakeSleep(3)])
def test_a_discrete_global_latent_that_particles_share_is_refused(objective):
    coin_guide(torch.zeros(4))
    with pytest.raises(ContractError, match=r"'s'.*reparameterised global latent.*ELBO"):
        objective.loss(coin, coin_guide, torch.zeros(4).double())
    assert math.isfinite(ELBO(2, gradient="vimco").loss(coin, coin_guide, torch.zeros(4).double()))  # the cure


def test_a_point_mass_on_a_global_latent_bounds_the_density_of_data_and_point():
    c = regression(local=1.0)  # exact local guides given w
    point = nn.Parameter(torch.tensor([0.6, -1.0], dtype=torch.float64))

    def guide(y, f):
        w = pyro.sample("w", dist.Delta(pyro.param("point", point), event_dim=1))
        share = 0.64 / 0.89
        with pyro.plate("data", 12, subsample=y):
            loc = share * y + (1 - share) * (w * f).sum(-1)
            pyro.sample("z", dist.Normal(loc, (share * 0.25) ** 0.5))

    y, f = c.batch
    exact = dist.Normal(f @ point, 0.89**0.5).log_prob(y).sum() + dist.Normal(0.0, 1.5).log_prob(point).sum()
    for objective in (IWAE(3), ELBO(2), Renyi(0.3, 2)):
        assert -objective.loss(c.model, guide, *c.batch) == pytest.approx(exact.item(), abs=1e-6)


# -- pairs without weights of each datum -------------------------------------------------------------------------------


def local_pair(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", 6, subsample=x):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def local_first(x):
    loc = pyro.param("z_loc", torch.zeros(()))
    with pyro.plate("data", 6, subsample=x):
        z = pyro.sample("z", dist.Normal(loc + 0.8 * x, 0.5))
    pyro.sample("loc", dist.Normal(z.mean(-1, keepdim=True), 0.5))


def test_without_weights_of_each_datum_batches_hold_all_data():
    x = torch.randn(6, generator=torch.Generator().manual_seed(1))
    auto = AutoMultivariateNormal(local_pair)
    for guide in (auto, local_first):
        guide(x)
        for objective in (ELBO(2), IWAE(2), IWAE(3, "dreg")):
            assert math.isfinite(objective.loss_and_grads(local_pair, guide, x))
    for objective in (ELBO(2), IWAE(3)):
        with pytest.raises(
            ContractError, match=r"expected all 6 of them in the batch, found 3.*depends on a local latent"
        ):
            objective.loss(local_pair, local_first, x[:3])


@pytest.mark.parametrize("first", [4, 12])
@pytest.mark.parametrize("kind", ["global and local", "local alone"])
def test_the_scale_of_a_batch_does_not_depend_on_the_one_that_was_inspected(first, kind):
    c, x = regression(), torch.randn(12, generator=torch.Generator().manual_seed(2)).double()

    def model(x):
        with pyro.plate("data", 12, subsample=x):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0 * x, 1.0)), 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", 12, subsample=x):
            pyro.sample("z", dist.Normal(0.7 * x, 0.5))

    program, q, batch = (*c.pair, c.batch) if kind == "global and local" else (model, guide, (x,))
    objective = ELBO()
    objective.loss(program, q, *(t[:first] for t in batch))
    for rows in (12, 5, 1):
        losses = []
        for loss in (objective, Trace_ELBO()):
            torch.manual_seed(7)
            losses.append(loss.loss(program, q, *(t[:rows] for t in batch)))
        assert losses[0] == pytest.approx(losses[1], rel=1e-9), rows


@pytest.mark.parametrize("reads", ["rows", "their number"])
def test_a_prior_of_a_global_latent_that_depends_on_the_batch_wants_all_data(reads):
    """Zellner's prior of the weights has the covariance of the inputs: that of a batch is another one."""
    c = regression()

    def model(y, f):
        precision = f.mT @ f / 12 if reads == "rows" else len(y) * torch.eye(2).double()
        w = pyro.sample("w", dist.MultivariateNormal(torch.zeros(2).double(), precision_matrix=precision))
        with pyro.plate("data", 12, subsample=y):
            z = pyro.sample("z", dist.Normal((w * f).sum(-1), 0.8))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    for whole_first in (False, True):
        objective = IWAE(2)
        if whole_first:
            assert math.isfinite(objective.loss(model, c.guide, *c.batch))
        with pytest.raises(ContractError, match=r"all 12 of them in the batch, found 4.*model or guide.*rows"):
            objective.loss(model, c.guide, *(t[:4] for t in c.batch))


def test_capacity_is_of_local_latents():
    """At the capacity that the local rate has, the bound is the ELBO of the same draws."""
    c = regression()
    batch = [t[:4] for t in c.batch]
    with DatumNoise(12, 2):
        plain = ELBO(3).loss(*c.pair, *batch)
        for capacity in (0.0, 5.0):
            found = Capacity(capacity, gamma=0.0, num_particles=3).loss(*c.pair, *batch)
            rate = ELBO(3, beta=0.0).loss(*c.pair, *batch)
            assert found < plain  # without the local rate
            assert found > rate  # with the global one
