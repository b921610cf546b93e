"""One log-density per datum: data that depend on each other given their latents, and densities of too few dims."""

import math
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppvae import check, fit, log_marginal
from ppvae.errors import ContractError
from ppvae.inference import inspect, terms

N = 6

pytestmark = pytest.mark.usefixtures("float64")


def model_with(decoder):
    """z ~ Normal(0, 1), x ~ Normal(decoder(z, x), 1), numbers [N, 1]."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z, x), 1.0).to_event(1), obs=x)

    return model


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5).to_event(1))


def previous(z, x):
    return z + torch.cat([torch.zeros_like(x[:1]), x[:-1]])


def batch_norm(track):
    norm = nn.BatchNorm1d(1, affine=False, track_running_stats=track)
    return lambda z, x: norm(z.reshape(-1, 1)).reshape(z.shape)


DEPENDENT = {
    "batch norm": batch_norm(track=False),
    "mean of the latents": lambda z, x: z - 0.1 * z.mean(-2, keepdim=True),
    "first row": lambda z, x: z + 0.1 * x[0],
    "row before": previous,
    "largest": lambda z, x: z / z.abs().amax(-2, keepdim=True),
}


@pytest.mark.parametrize("rows", [2, N, 60])
@pytest.mark.parametrize("name", DEPENDENT)
def test_a_decoder_that_looks_at_other_rows_is_refused_for_what_it_is(name, rows):
    model, x = model_with(DEPENDENT[name]), torch.randn(rows, 1)
    for ask in (inspect, log_marginal, terms):
        with pytest.raises(ContractError, match=r"'x'.*its own row alone.*as other rows change") as caught:
            ask(model, guide, x)
        assert "plate" not in str(caught.value)
    assert "can be trained" in check(model, guide, x)


def test_batch_norm_with_running_statistics_is_taken():
    """The cure of the refusal, followed: in eval mode, its initial statistics change nothing."""
    x = torch.randn(N, 1)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x[:, 0])
    est = log_marginal(model_with(batch_norm(track=True)), guide, x, num_particles=400, proposal="guide")
    torch.testing.assert_close(est.log_px, exact, rtol=0, atol=1e-3)  # the eps of batch norm


GLOBAL_NOISE = {
    "numpy": lambda shape: torch.as_tensor(np.random.randn(*shape)),  # noqa: NPY002
    "random": lambda shape: torch.tensor([random.gauss(0, 1) for _ in range(shape[0])])[:, None],
    "torch": torch.randn,
}
NUMPY, TORCH = np.random.default_rng(0), torch.Generator()
OWN_NOISE = {
    "numpy": lambda shape: torch.as_tensor(NUMPY.standard_normal(shape)),
    "torch": lambda shape: torch.randn(shape, generator=TORCH),
}


@pytest.mark.parametrize("name", GLOBAL_NOISE)
def test_noise_in_the_model_is_averaged_over_whatever_it_is_drawn_by(name):
    x = torch.randn(N, 1)
    exact = dist.Normal(0.0, 2.25**0.5).log_prob(x[:, 0])
    model = model_with(lambda z, x: z + 0.5 * GLOBAL_NOISE[name](x.shape))
    before = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (
        log_marginal(model, guide, x, num_particles=1000, progress=False, proposal="guide").log_px for _ in range(2)
    )
    assert (first - exact).abs().max() < 0.2
    assert torch.equal(first, second)
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


@pytest.mark.parametrize("name", OWN_NOISE)
def test_noise_of_a_generator_of_its_own_is_refused_for_what_it_is(name):
    model, x = model_with(lambda z, x: z + 0.5 * OWN_NOISE[name](x.shape)), torch.randn(N, 1)
    with pytest.raises(ContractError, match=r"'x'.*two runs of the same rows at one seed.*as by torch.randn"):
        log_marginal(model, guide, x, num_particles=3, proposal="guide")


def test_a_guide_may_look_at_other_rows():
    def looks(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + 0.3 * (x - x.mean(0)), 1.0).to_event(1))

    x = torch.randn(40, 1)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x[:, 0])
    est = log_marginal(model_with(lambda z, x: z), looks, x, num_particles=4000, proposal="guide")
    assert float((est.log_px - exact).abs().max()) < 0.1


def test_a_pair_that_couples_rows_can_be_trained():
    shift = nn.Linear(1, 1)

    def model(x):
        pyro.module("shift", shift)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(shift(z) - z.mean(-2, keepdim=True), 1.0).to_event(1), obs=x)

    run = fit(model, guide, torch.randn(N, 1), epochs=2)
    with pytest.raises(ContractError, match="its own row alone"):
        log_marginal(run.model, run.guide, torch.randn(N, 1), proposal="guide")


# -- a graph as one observation ---------------------------------------------------------------------------------------

ADJACENCY = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])


def graph(inside):
    """Nodes with a latent each, all edges observed together, inside the plate of the nodes or outside of it."""

    def model(adj):
        with pyro.plate("data", len(adj)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            if inside:
                pyro.sample("adj", dist.Bernoulli(logits=z @ z.mT).to_event(1), obs=adj)
        if not inside:
            pyro.sample("adj", dist.Bernoulli(logits=z @ z.mT).to_event(2), obs=adj)

    return model


def node_guide(adj):
    with pyro.plate("data", len(adj)):
        pyro.sample("z", dist.Normal(0.5 - adj[:, 2:], 1.0).to_event(1))


@pytest.mark.parametrize(("inside", "words"), [(True, "its own row alone"), (False, "couples all 3 rows")])
def test_a_graph_as_one_observation_is_refused_for_what_it_is(inside, words):
    with pytest.raises(ContractError, match=f"'adj'.*{words}") as caught:
        log_marginal(graph(inside), node_guide, ADJACENCY, proposal="guide")
    assert "pyro.plate" not in str(caught.value)


def test_a_graph_as_one_datum():
    """The cure of the refusal, followed: log p of the graph, by quadrature over the three latents."""

    def model(adj):
        with pyro.plate("data", len(adj)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, 1), 1.0).to_event(2))
            pyro.sample("adj", dist.Bernoulli(logits=z @ z.mT).to_event(2), obs=adj)

    def guide(adj):
        with pyro.plate("data", len(adj)):
            pyro.sample("z", dist.Normal(0.5 - adj[..., 2:], 1.2).to_event(2))

    t = torch.linspace(-6, 6, 61)
    z = torch.cartesian_prod(t, t, t)[:, :, None]
    joint = dist.Bernoulli(logits=z @ z.mT).log_prob(ADJACENCY).sum((1, 2)) + dist.Normal(0.0, 1.0).log_prob(z).sum(
        (1, 2)
    )
    exact = joint.logsumexp(0) + 3 * math.log(float(t[1] - t[0]))
    est = log_marginal(model, guide, ADJACENCY[None], num_particles=40_000, proposal="guide")
    assert abs(float(est.log_px - exact)) < 5 * float(est.std_error)
    assert float(est.std_error) < 0.05


def test_rows_without_a_plate_are_told_to_open_one():
    """Independent rows outside of a plate: there the plate is the cure."""

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(2))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(2), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(2))

    with pytest.raises(ContractError, match=r"'x'.*plates none.*with pyro.plate\('data', len\(x\)\)"):
        log_marginal(model, guide, torch.randn(N, 1), proposal="guide")


# -- too few dims -----------------------------------------------------------------------------------------------------


class Circle(dist.TorchDistribution):
    """Uniform on the circle; `declared` says whether the two numbers of a point are its event, or a batch dim."""

    arg_constraints, support = {}, dist.constraints.real

    def __init__(self, batch, declared):
        self.declared = declared
        shapes = ((*batch,), (2,)) if declared else ((*batch, 2), ())
        super().__init__(*map(torch.Size, shapes), validate_args=False)

    def expand(self, shape, _instance=None):
        return Circle(shape if self.declared else shape[:-1], self.declared)

    def sample(self, shape=()):
        return nn.functional.normalize(torch.randn(*shape, *self.batch_shape, *self.event_shape), dim=-1)

    def log_prob(self, value):
        return torch.full(value.shape[:-1], -math.log(2 * math.pi))


WEIGHT = torch.tensor([[1.0, -1.0, 0.5], [0.3, 1.0, -2.0]])


def circle_model(prior):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(len(x)))
            pyro.sample("x", dist.Normal(z @ WEIGHT.to(z), 1.0).to_event(1), obs=x)

    return model


def circle_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.ProjectedNormal(0.5 * x[..., :2]))


def test_one_density_for_all_data_is_refused():
    model = circle_model(lambda n: Circle([n], declared=False).to_event(1))
    with pytest.raises(ContractError, match=r"'z'.*each of the 20 elements.*shape \[\].*event_shape"):
        log_marginal(model, circle_guide, torch.randn(20, 3), proposal="guide")


def test_a_density_with_its_event_declared_is_taken():
    """The cure of the refusal, followed, against quadrature over the circle."""
    x = torch.randn(20, 3)
    angle = torch.arange(2000) * (2 * math.pi / 2000)
    grid = torch.stack([angle.cos(), angle.sin()], -1) @ WEIGHT.double()
    exact = dist.Normal(grid, 1.0).to_event(1).log_prob(x[:, None]).logsumexp(1) - math.log(2000)
    est = log_marginal(
        circle_model(lambda n: Circle([n], declared=True)), circle_guide, x, num_particles=4000, proposal="guide"
    )
    assert bool(((est.log_px - exact).abs() < 6 * est.std_error).all())


class OneNumber(dist.Normal):
    """A normal whose log_prob forgets that it has a batch: [] or [1] for D data."""

    def __init__(self, loc, keepdim):
        super().__init__(loc, 1.0)
        self.keepdim = keepdim

    def expand(self, shape, _instance=None):
        return OneNumber(self.loc.expand(shape), self.keepdim)

    def log_prob(self, value):
        return super().log_prob(value).sum(-1, keepdim=self.keepdim)


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("side", ["prior", "likelihood", "guide"])
def test_one_number_for_all_data_is_refused_on_every_side(side, keepdim):
    def normal(here, loc):
        return OneNumber(loc, keepdim) if here == side else dist.Normal(loc, 1.0)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal("prior", torch.zeros(len(x))))
            pyro.sample("x", normal("likelihood", z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal("guide", x / 2))

    name = "x" if side == "likelihood" else "z"
    with pytest.raises(ContractError, match=f"'{name}'.*each of the 6 elements"):
        inspect(model, guide, torch.randn(N))


# -- a data plate at another dim --------------------------------------------------------------------------------------


def plated(D, rows_dim):
    """Factor analysis whose rows stand at dim `rows_dim` of the sites, and its exact posterior as guide."""
    weight = torch.linspace(-1, 1, 2 * D).reshape(2, D)
    S = torch.linalg.inv(torch.eye(2) + weight @ weight.T)

    def model(x):
        with pyro.plate("rows", len(x), dim=rows_dim):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            if rows_dim == -2:
                with pyro.plate("features", D, dim=-1):
                    pyro.sample("x", dist.Normal((z @ weight).squeeze(-2), 1.0), obs=x)
            else:
                pyro.sample("x", dist.Normal(z @ weight, 1.0).to_event(1), obs=x)

    def guide(x):
        loc = x @ weight.T @ S
        with pyro.plate("rows", len(x), dim=rows_dim):
            pyro.sample("z", dist.MultivariateNormal(loc if rows_dim == -1 else loc[:, None], S))

    return model, guide, dist.MultivariateNormal(torch.zeros(D), torch.eye(D) + weight.T @ weight)


@pytest.mark.parametrize("features", [4, N])
def test_rows_at_another_dim_are_refused_by_the_plate_s_name(features):
    model, guide, _ = plated(features, -2)
    with pytest.raises(ContractError, match=r"'features'.*'rows' over them at dim -2.*dim=-1"):
        log_marginal(model, guide, torch.randn(N, features), proposal="guide")


@pytest.mark.parametrize("features", [4, N])
def test_rows_at_the_right_dim_are_taken(features):
    model, guide, p = plated(features, -1)
    x = torch.randn(N, features)
    torch.testing.assert_close(terms(model, guide, x, 2).log_weight, p.log_prob(x).expand(2, N), rtol=0, atol=1e-9)


def test_an_inner_plate_of_the_batch_s_size_is_taken():
    """As many features as data, in a plate at dim -2 below rows at dim -1."""

    def model(x):
        with pyro.plate("rows", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            with pyro.plate("features", N, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("rows", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.sum(-1) / (N + 1), (1 / (N + 1)) ** 0.5))

    x = torch.randn(N, N)
    exact = dist.MultivariateNormal(torch.zeros(N), torch.eye(N) + 1).log_prob(x)
    torch.testing.assert_close(terms(model, guide, x, 2).log_weight, exact.expand(2, N), rtol=0, atol=1e-9)
