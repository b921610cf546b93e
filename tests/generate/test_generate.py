"""Sampling, reconstructing, interpolating, traversing: known answers on a linear-Gaussian pair, laws on any pair."""

import functools
import random
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from scipy import stats
from torch import nn

from ppvae import data, fit, generate
from ppvae.errors import ContractError, UsageError
from ppvae.factories.pairs import resolve
from ppvae.models import LinearGaussian

PAIRS = Path(__file__).parents[1] / "programs" / "factory_files"


def pair(name: str, *args):
    """(model, guide) of a stranger's file."""
    torch.manual_seed(0)
    made = resolve(str(PAIRS / f"{name}.py"))
    made = made(*args) if callable(made) else made
    return made if isinstance(made, tuple) else (made.model, made.guide)


def linear(features: int = 5, latent: int = 3) -> LinearGaussian:
    torch.manual_seed(0)
    return LinearGaussian(features, latent, scale=0.4).double()


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture(autouse=True)
def clean_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def decoded(oracle: LinearGaussian, z: torch.Tensor) -> torch.Tensor:
    """The mean of p(x | z) in closed form."""
    return (z @ oracle.weight.T + oracle.loc).detach()


# Known answers


def test_posterior_means(x):
    oracle = linear()
    found = generate.posterior_means(oracle.model, oracle.guide, x)
    assert list(found) == ["z"]
    assert torch.allclose(found["z"], oracle.posterior(x).loc, atol=1e-12)


def test_reconstructions_have_the_closed_forms_mean_and_covariance(x):
    """4000 reconstructions of a datum: a chi-squared of their mean, failing for 1e-6 of seeds, and their covariance."""
    oracle, n = linear(), 4000
    found = generate.reconstructions(oracle.model, oracle.guide, x[:1].expand(n, 5), seed=2)
    with torch.no_grad():
        posterior = oracle.posterior(x[:1])
    want = decoded(oracle, posterior.loc)[0]
    basis = torch.linalg.qr(oracle.weight.detach())[0]  # the reconstructions vary in the span of the weights alone
    mapped = basis.T @ oracle.weight.detach()
    cov = mapped @ posterior.covariance_matrix[0] @ mapped.T
    off = (found.mean(0) - want) @ basis
    assert float(n * off @ torch.linalg.solve(cov, off)) < stats.chi2.isf(1e-6, 3)
    outside = (found - want) @ (torch.eye(5).double() - basis @ basis.T)
    assert float(outside.abs().max()) < 1e-9
    # the relative error of a variance of n draws has standard deviation sqrt(2 / n) = 0.022; seven of them: p < 1e-10
    spread = torch.linalg.eigvals(torch.linalg.solve(cov, torch.cov((found @ basis).T))).real
    assert float((spread - 1).abs().max()) < 7 * 0.0224 + 0.01


def test_sharp_reconstructions_are_the_posterior_mean_mapped_through(x):
    """As the noise falls, the posterior closes on its mean."""
    oracle = linear()
    with torch.no_grad():
        oracle.log_scale.fill_(-16)
    found = generate.reconstructions(oracle.model, oracle.guide, x)
    assert torch.allclose(found, decoded(oracle, oracle.posterior(x).loc), atol=1e-5)


def test_samples_have_the_models_mean_and_covariance(x):
    """20000 means and draws: every eigenvalue of the covariance ratio within seven standard deviations, p < 1e-9."""
    oracle, n = linear(), 20_000
    w, noise = oracle.weight.detach(), float(oracle.log_scale.detach().exp()) ** 2
    drawn = generate.samples(oracle.model, oracle.guide, x, count=n, mean=False)
    means = generate.samples(oracle.model, oracle.guide, x, count=n)
    assert drawn.shape == means.shape == (n, 5)
    limit = 7 * (2 / n) ** 0.5 + 0.02
    cov = w @ w.T + noise * torch.eye(5).double()
    ratio = torch.linalg.eigvals(torch.linalg.solve(cov, torch.cov(drawn.T))).real
    assert float((ratio - 1).abs().max()) < limit
    basis = torch.linalg.qr(w)[0]
    inner = basis.T @ w @ w.T @ basis
    ratio = torch.linalg.eigvals(torch.linalg.solve(inner, torch.cov((means @ basis).T))).real
    assert float((ratio - 1).abs().max()) < limit
    assert torch.linalg.matrix_rank(means - means.mean(0), rtol=1e-9) == 3  # means lie in the span of the weights


def test_draws_add_the_likelihoods_noise(x):
    """The same latents under the same seed: a draw less its mean is the likelihood's noise (8 sd, p < 1e-14)."""
    oracle = linear()
    many = x[:1].expand(2000, 5)
    mean = generate.reconstructions(oracle.model, oracle.guide, many, seed=4)
    draw = generate.reconstructions(oracle.model, oracle.guide, many, seed=4, mean=False)
    rest = (draw - mean) / float(oracle.log_scale.detach().exp())
    assert abs(float(rest.mean())) < 8 / 10_000**0.5
    assert abs(float(rest.var()) - 1) < 8 * (2 / 10_000) ** 0.5


def test_interpolations_are_straight_and_end_at_the_means(x):
    oracle = linear()
    found = generate.interpolations(oracle.model, oracle.guide, x[:3], x[3:6], steps=5)
    assert found.shape == (5, 3, 5)
    means = oracle.posterior(x).loc.detach()
    assert torch.allclose(found[0], decoded(oracle, means[:3]), atol=1e-10)
    assert torch.allclose(found[-1], decoded(oracle, means[3:6]), atol=1e-10)
    assert torch.allclose(found[1], decoded(oracle, 0.75 * means[:3] + 0.25 * means[3:6]), atol=1e-6)
    assert torch.allclose(found.diff(dim=0), found.diff(dim=0)[:1].expand(4, 3, 5), atol=1e-6)


def test_traversals_walk_in_one_dim(x):
    oracle = linear()
    values = (-2.0, 0.0, 1.5)
    found = generate.traversals(oracle.model, oracle.guide, x, values=values)
    assert found.shape == (3, 3, 5)
    mean = oracle.posterior(x).loc[0].detach()
    for d in range(3):
        for i, value in enumerate(values):
            z = mean.clone()
            z[d] = value
            assert torch.allclose(found[d, i], decoded(oracle, z), atol=1e-10)
    some = generate.traversals(oracle.model, oracle.guide, x, values=values, dims=[2, 0], site="z")
    assert torch.equal(some, found[[2, 0]])


def test_a_traversal_to_where_it_is_changes_nothing(x):
    oracle = linear()
    mean = oracle.posterior(x).loc[0].detach()
    for d in range(3):
        found = generate.traversals(oracle.model, oracle.guide, x, dims=[d], values=[float(mean[d])])
        assert torch.allclose(found[0, 0], decoded(oracle, mean), atol=1e-10)


def test_an_attribute_vector_is_the_slope_of_the_means(x):
    """Of a yes-or-no attribute the difference of two means; of a number, the truth where the means are linear in it."""
    oracle = linear()
    means, has = oracle.posterior(x).loc.detach(), torch.tensor([1, 0, 1, 1, 0, 0, 1]).bool()
    found = generate.attribute_vector(oracle.model, oracle.guide, x, has)
    assert torch.allclose(found, means[has].mean(0) - means[~has].mean(0), atol=1e-12)
    slope, a = torch.linspace(-1, 2, 5).double(), torch.tensor([0.0, 3, 1, -2, 5, 2, 2])
    line = torch.ones(5).double() + a[:, None] * slope
    want = oracle.posterior((oracle.loc.detach() + slope)[None]).loc[0].detach()  # linear in x - loc
    assert torch.allclose(generate.attribute_vector(oracle.model, oracle.guide, line, a), want, atol=1e-10)


def test_moved_data_are_the_means_at_moved_latents(x):
    oracle, amounts = linear(), (-1.0, 0.0, 2.5)
    direction = torch.tensor([1.0, -2.0, 0.5]).double()
    found = generate.moved(oracle.model, oracle.guide, x, direction, amounts)
    assert found.shape == (7, 3, 5)
    for i, t in enumerate(amounts):
        want = decoded(oracle, oracle.posterior(x).loc.detach() + t * direction)
        assert torch.allclose(found[:, i], want, atol=1e-10)


# Laws over strangers


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", binarize="fixed")[2].head(6)


@pytest.fixture(scope="module")
def images():
    return data.load("digits", binarize="fixed", flat=False)[2].head(6)


def subsampling(full: int, size: int):
    """The plate draws rows of data that the pair gets whole."""
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(64, 3), nn.Linear(3, 64)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", full, subsample_size=size) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x[rows])

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", full, subsample_size=size) as rows:
            pyro.sample("z", dist.Normal(encoder(x[rows]), 0.1).to_event(1))

    return model, guide


@pytest.fixture(params=["two_latents", "conv_batchnorm", "params_only", "pyromodule", "labelled", "subsampling"])
def stranger(request, digits, images):
    """(model, guide, data, shape of a datum), trained for an epoch where it has parameters of its own to make."""
    name = request.param
    if name == "conv_batchnorm":
        made, x = pair(name), images
    elif name == "labelled":
        made, x = pair(name, digits), (digits, digits.labels)
    elif name == "subsampling":
        made, x = subsampling(6, 4), digits
    else:
        made, x = pair(name, *([digits] if name in ("two_latents", "pyromodule") else [])), digits
    run = fit(*made, x, epochs=1)
    return run.model, run.guide, x, (1, 8, 8) if name == "conv_batchnorm" else (64,)


def test_shapes(stranger):
    model, guide, x, event = stranger
    assert generate.samples(model, guide, x, count=10).shape == (10, *event)
    assert generate.samples(model, guide, x, count=1).shape == (1, *event)
    assert generate.reconstructions(model, guide, x).shape == (6, *event)
    means = generate.posterior_means(model, guide, x)
    assert all(len(v) == 6 for v in means.values())
    found = generate.traversals(model, guide, x, values=(-1.0, 1.0))
    assert found.shape == (next(iter(means.values())).shape[1], 2, *event)
    assert torch.isfinite(found).all()


def test_interpolations_between_strangers_end_at_their_means(stranger):
    model, guide, x, event = stranger
    whole = tuple(x) if isinstance(x, tuple) else (x,)
    back = tuple(t[torch.arange(5, -1, -1)] for t in whole)
    back = back if isinstance(x, tuple) else back[0]
    found = generate.interpolations(model, guide, x, back, steps=4)
    assert found.shape == (4, 6, *event)
    if not isinstance(x, tuple):  # labels are those of the start, so that the way back differs
        again = generate.interpolations(model, guide, back, x, steps=4)
        assert torch.allclose(found.flip(0), again, atol=1e-5)
        assert torch.allclose(found[0], found[-1].flip(0), atol=1e-5)
    still = generate.interpolations(model, guide, x, x, steps=3)
    assert torch.allclose(still, found[:1].expand(3, *found.shape[1:]), atol=1e-5)


def test_a_traversal_of_a_stranger_to_where_it_is_changes_nothing(stranger):
    model, guide, x, _ = stranger
    still = generate.interpolations(model, guide, x, x, steps=2)[0, 0]
    for site, mean in generate.posterior_means(model, guide, x).items():
        for d in range(mean.shape[-1]):
            found = generate.traversals(model, guide, x, site=site, dims=[d], values=[float(mean[0, d])])
            assert torch.allclose(found[0, 0], still, atol=1e-5)


def test_strangers_are_moved_along_the_vector_of_an_attribute(stranger):
    model, guide, x, event = stranger
    site, mean = next(iter(generate.posterior_means(model, guide, x).items()))
    vector = generate.attribute_vector(model, guide, x, torch.arange(6) % 2 == 0, site=site)
    assert torch.allclose(vector, mean[::2].mean(0) - mean[1::2].mean(0), atol=1e-5)
    found = generate.moved(model, guide, x, vector, (0.0, 1.0), site=site)
    assert found.shape == (6, 2, *event)
    assert torch.allclose(found[:, 0], generate.interpolations(model, guide, x, x, steps=2)[0], atol=1e-5)


def test_the_seed_decides(stranger):
    model, guide, x, _ = stranger
    for function in (
        functools.partial(generate.samples, count=5),
        functools.partial(generate.samples, count=5, mean=False),
        generate.reconstructions,
        functools.partial(generate.reconstructions, mean=False),
    ):
        first = function(model, guide, x, seed=3)
        torch.manual_seed(random.getrandbits(30))
        assert torch.equal(first, function(model, guide, x, seed=3))
        assert not torch.equal(first, function(model, guide, x, seed=4))
    for function in (generate.posterior_means, generate.traversals):
        torch.manual_seed(random.getrandbits(30))
        values = [function(model, guide, x, seed=s) for s in (3, 4)]
        if isinstance(values[0], dict):
            values = [torch.cat([v.flatten() for v in found.values()]) for found in values]
        assert torch.allclose(*values, atol=1e-6)  # nothing is drawn


def test_random_states_and_the_store_are_left_alone(stranger):
    model, guide, x, _ = stranger
    torch.manual_seed(8), random.seed(8), np.random.seed(8)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate()
    generate.samples(model, guide, x, count=3)
    generate.reconstructions(model, guide, x)
    generate.interpolations(model, guide, x, x)
    generate.traversals(model, guide, x)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert len(pyro.get_param_store()) == 0


def test_means_are_probabilities_and_draws_are_binary(digits):
    run = fit(*pair("two_latents", digits), digits, epochs=1)
    for function in (functools.partial(generate.samples, count=20), generate.reconstructions):
        means = function(run.model, run.guide, digits)
        draws = function(run.model, run.guide, digits, mean=False)
        assert float(means.min()) > 0
        assert float(means.max()) < 1
        assert len(means.unique()) > 100
        assert draws.unique().tolist() == [0.0, 1.0]


def test_modules_are_as_they_were(images):
    """Batch norm and dropout are off meanwhile, their statistics untouched, and every flag is put back."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 64))

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x.flatten(1))

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.1).to_event(1))

    encoder[3].eval()
    modules = [*encoder.modules(), *decoder.modules()]
    flags = [m.training for m in modules]
    tensors = [t.clone() for m in (encoder, decoder) for t in m.state_dict().values()]
    first = generate.interpolations(model, guide, images, images, steps=2)
    generate.samples(model, guide, images)
    generate.reconstructions(model, guide, images)
    generate.traversals(model, guide, images)
    assert torch.equal(first[0], first[1])  # nothing was dropped
    assert [m.training for m in modules] == flags
    after = [t for m in (encoder, decoder) for t in m.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(tensors, after, strict=True))


def test_every_row_is_reached(digits):
    """More rows than go through at once, a ragged end, a plate that draws its own rows: row by row the same."""
    many = data.load("digits", binarize="fixed")[0].head(1101)
    run = fit(*pair("two_latents", many), many, epochs=1)
    means = generate.posterior_means(run.model, run.guide, many)["z1"]
    assert means.shape == (1101, 6)
    assert torch.allclose(means[1050:], generate.posterior_means(run.model, run.guide, many[1050:])["z1"], atol=1e-5)
    assert generate.samples(run.model, run.guide, digits, count=1101).shape == (1101, 64)
    run = fit(*subsampling(6, 4), digits, epochs=1)
    found = generate.posterior_means(run.model, run.guide, digits)["z"]
    encoder = run.guide.scope.params["encoder$$$weight"], run.guide.scope.params["encoder$$$bias"]
    want = nn.functional.linear(digits.as_subclass(torch.Tensor), *encoder)
    assert torch.allclose(found, want.detach(), atol=1e-6)


def test_labels_condition(digits):
    """The same latent under another label gives another picture, and the labels go with their rows."""
    run = fit(*pair("labelled", digits), (digits, digits.labels), epochs=1)
    found = [generate.samples(run.model, run.guide, (digits, torch.full((6,), y)), count=4, seed=1) for y in (3, 7)]
    assert not torch.equal(*found)
    mixed = generate.samples(run.model, run.guide, (digits, torch.tensor([3, 7, 3, 7, 3, 7])), count=4, seed=1)
    assert torch.allclose(mixed[0::2], found[0][0::2], atol=1e-6)
    assert torch.allclose(mixed[1::2], found[1][1::2], atol=1e-6)


def test_a_split_that_redraws_its_values_is_looked_at_in_one_drawing():
    train = data.load("digits", binarize="dynamic")[0].head(20)
    run = fit(*pair("two_latents", train), train, epochs=1)
    found = [generate.posterior_means(run.model, run.guide, train)["z1"] for _ in range(2)]
    assert torch.equal(*found)


# Other latents


def matrix_pair():
    """A latent matrix [3, 2] a datum, beside a vector."""

    def model(x):
        with pyro.plate("data", len(x)):
            m = pyro.sample("m", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
            v = pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(m.sum(-1) + v, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("m", dist.Normal(x[..., None] * torch.tensor([0.5, 0.25]), 0.5).to_event(2))
            pyro.sample("v", dist.Normal(0.1 * x, 0.5).to_event(1))

    return model, guide


def scalar_pair():
    """A latent number a datum, without an event, beside a vector."""

    def model(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.Normal(0.0, 1.0))
            v = pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(s[..., None] + v, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("s", dist.Normal(x.mean(-1), 0.5))
            pyro.sample("v", dist.Normal(0.1 * x, 0.5).to_event(1))

    return model, guide


def inner_plate_pair():
    """Two latents a datum in a plate of their own, left of the data, beside a vector."""

    def model(x):
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("parts", 2):
                p = pyro.sample("p", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(v + p.sum(-2)[..., None], 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("v", dist.Normal(0.1 * x, 0.5).to_event(1))
            with pyro.plate("parts", 2):
                pyro.sample("p", dist.Normal(x[..., :2].movedim(-1, -2), 0.5))

    return model, guide


def discrete_pair():
    """A class a datum that the guide draws."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(4) / 4))
            v = pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(k[..., None] + v, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=torch.stack([x[..., 0], -x[..., 0], x[..., 1], x[..., 2]], -1)))
            pyro.sample("v", dist.Normal(0.1 * x, 0.5).to_event(1))

    return model, guide


OTHERS = {"matrix": matrix_pair, "scalar": scalar_pair, "inner plate": inner_plate_pair, "discrete": discrete_pair}


@pytest.mark.parametrize("name", OTHERS)
def test_other_latents(name):
    model, guide = OTHERS[name]()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert generate.samples(model, guide, x, count=9).shape == (9, 3)
    assert generate.reconstructions(model, guide, x).shape == (5, 3)
    assert generate.interpolations(model, guide, x, -x, steps=4).shape == (4, 5, 3)
    means = generate.posterior_means(model, guide, x)
    assert torch.allclose(means["v"], 0.1 * x)
    if name == "matrix":
        assert means["m"].shape == (5, 3, 2)
        found = generate.interpolations(model, guide, x, -x, steps=3)
        assert torch.allclose(found[0], 0.85 * x, atol=1e-6)
        assert torch.allclose(found[1], torch.zeros(5, 3), atol=1e-6)


@pytest.mark.parametrize("name", ["matrix", "scalar", "inner plate"])
def test_a_walk_beside_other_latents(name):
    """The other latents stay at the first datum's means, whatever their shape."""
    model, guide = OTHERS[name]()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    rest = {"matrix": 0.75 * x[0], "scalar": x[0].mean(), "inner plate": x[0, :2].sum()}[name]
    found = generate.traversals(model, guide, x, site="v", values=(-1.0, 2.0))
    assert found.shape == (3, 2, 3)
    for d in range(3):
        for i, value in enumerate((-1.0, 2.0)):
            v = 0.1 * x[0]
            v[d] = value
            assert torch.allclose(found[d, i], v + rest, atol=1e-5)


def observed_parts_pair():
    """Two numbers are observed a datum, in a plate of their own left of the data."""

    def model(x):
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("parts", 2):
                pyro.sample("x", dist.Normal(v.sum(-1), 1.0), obs=x.movedim(-1, -2))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("v", dist.Normal(0.1 * x[..., :1], torch.full((3,), 0.5)).to_event(1))

    return model, guide


def test_a_site_observed_in_an_inner_plate():
    model, guide = observed_parts_pair()
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    assert generate.samples(model, guide, x, count=1).shape == (1, 2)
    assert generate.samples(model, guide, x, count=9).shape == (9, 2)
    assert generate.samples(model, guide, x, count=1200).shape == (1200, 2)
    assert generate.reconstructions(model, guide, x).shape == (5, 2)


def test_only_vectors_are_walked_in():
    model, guide = scalar_pair()
    with pytest.raises(UsageError, match="'s'"):
        generate.traversals(model, guide, torch.zeros(4, 3), site="s")


# Refusals


def test_what_makes_no_sense_is_refused(x):
    oracle = linear()
    for use, words in (
        (lambda: generate.samples(oracle.model, oracle.guide, x, count=0), "count.*0"),
        (lambda: generate.interpolations(oracle.model, oracle.guide, x, x, steps=1), "steps.*1"),
        (lambda: generate.interpolations(oracle.model, oracle.guide, x, x[:3]), "as many"),
        (lambda: generate.traversals(oracle.model, oracle.guide, x, site="y"), "'z'.*'y'"),
        (lambda: generate.traversals(oracle.model, oracle.guide, x, dims=[3]), "below 3.*3"),
        (lambda: generate.traversals(oracle.model, oracle.guide, x, dims=[-1]), "below 3.*-1"),
        (lambda: generate.attribute_vector(oracle.model, oracle.guide, x, x[:3, 0]), "attribute.*7.*3"),
        (lambda: generate.attribute_vector(oracle.model, oracle.guide, x, x[:, 0] / 0), "attribute.*finite"),
        (lambda: generate.attribute_vector(oracle.model, oracle.guide, x, torch.ones(7)), "attribute.*vary"),
        (lambda: generate.moved(oracle.model, oracle.guide, x, torch.ones(2)), "direction.*3.*2"),
        (lambda: generate.moved(oracle.model, oracle.guide, x, torch.ones(3), site="y"), "'z'.*'y'"),
    ):
        with pytest.raises(UsageError, match=words):
            use()
    with pytest.raises(ContractError, match=r"\[7, 4\]"):
        generate.samples(oracle.model, oracle.guide, x[:, :4])


def test_an_untrained_pair_of_params_is_refused(digits):
    """Generating would make the parameters up."""
    with pytest.raises(ContractError, match=r"'slope'|'loc'"):
        generate.samples(*pair("params_only"), digits)


def test_a_map_pair_generates(x):
    """A point mass has no weights, and still has pictures."""
    slope = torch.nn.Parameter(torch.full((5, 2), 0.1))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.repeat_interleave(3, -1)[..., :5], 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.param("slope", slope)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x @ slope).to_event(1))

    x = x.float()
    run = fit(model, guide, x, epochs=1, objective=Trace_ELBO())
    want = (x @ slope).repeat_interleave(3, -1)[:, :5].detach()
    assert torch.allclose(generate.reconstructions(run.model, run.guide, x), want, atol=1e-6)


def two_sites():
    """x = z + noise [3], y = 10 + z_0 + noise, with a plate of features inside for y's copies [2, N]."""

    def model(x, y=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)
            with pyro.plate("copies", 2):
                pyro.sample("y", dist.Normal(10 + z[..., 0], 0.1), obs=y)

    def guide(x, y=None):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 1.01, 0.1).to_event(1))

    return model, guide


def test_predictive_draws_hold_every_observed_site_and_are_joint():
    (model, guide), x = two_sites(), torch.randn(600, 3)  # more rows than one run of the pair takes
    data_of_both = (x, 10 + x[:, 0].expand(2, -1).T)

    def transposed(program):
        return lambda x, y: program(x, y.T)

    own = [transposed(p) for p in (model, guide)]
    prior = generate.prior_predictive(*own, data_of_both, count=700)
    assert {name: list(v.shape) for name, v in prior.items()} == {"x": [700, 3], "y": [700, 2]}
    # y - 10 - x_0 has variance 0.02 where both come from one z; 700 draws: a ratio beyond 1.4 has p < 1e-10
    assert 0.02 / 1.4 < float((prior["y"][:, 0] - 10 - prior["x"][:, 0]).var()) < 0.02 * 1.4
    assert 1.01 / 1.4 < float(prior["x"].var()) < 1.01 * 1.4
    post = generate.posterior_predictive(*own, data_of_both)
    assert {name: list(v.shape) for name, v in post.items()} == {"x": [600, 3], "y": [600, 2]}
    assert float((post["x"] - x).var()) < 0.05
    means = generate.posterior_predictive(*own, data_of_both, mean=True)
    torch.testing.assert_close(means["y"][:, 0], means["y"][:, 1])  # the mean has no noise
    assert torch.equal(generate.samples(*own, data_of_both, count=5), generate.samples(*own, data_of_both, count=5))
    assert generate.samples(*own, data_of_both, count=5).shape == (5, 3)  # of the first site alone
