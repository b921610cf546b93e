"""Laws of likelihoods, over a dict of constructors: a new one is tested by one line. Then exact cases and refusals."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppvae import VAE, fit, likelihoods, log_marginal, nn, posteriors, priors, terms
from ppvae import distributions as D
from ppvae.errors import DataError, UsageError
from ppvae.inference.inspection import inspect
from ppvae.likelihoods import Column, Mixed, set_optimal_scale
from tests.laws.goodness import FAILURE, TESTS, Support, masses, p_value, points
from tests.laws.law import Laws
from tests.laws.parts import COLUMNS, LATENT, LIKELIHOODS, Case, Nets

law = Laws(LIKELIHOODS)

ROWS = 5


def perturbed(part: torch.nn.Module) -> torch.nn.Module:
    """In float64, with noise on every parameter: nothing stays at zero or equal."""
    part = part.double()
    with torch.no_grad():
        for p in part.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return part


def small(case: Case) -> torch.nn.Module:
    """One so small that it can be summed or integrated over."""
    return perturbed(case.make(Nets((case.dims,))))


def test_every_likelihood_is_under_the_laws() -> None:
    made = {type(case.make(Nets((6,)))).__name__ for case in LIKELIHOODS.values()}
    parts = {n for n in likelihoods.__all__ if isinstance(getattr(likelihoods, n), type) and n != "Column"}
    assert made == parts


def latents(*shape: int) -> Tensor:
    return torch.randn(*shape, LATENT, generator=torch.Generator().manual_seed(2)).double()


def drawn(name: str) -> tuple[torch.nn.Module, Tensor]:
    """A likelihood of flat data, and data [ROWS, features] drawn from it."""
    torch.manual_seed(0)
    case = LIKELIHOODS[name]
    part = perturbed(case.make(Nets((case.features,))))
    return part, part(latents(ROWS), **case.given(ROWS)).sample()


def vae_of(name: str, part: torch.nn.Module) -> VAE:
    encoder = nn.Missing(nn.mlp(2 * LIKELIHOODS[name].features, 2 * LATENT, hidden=(8,)))
    return VAE(priors.StandardNormal(LATENT), part, posteriors.DiagonalNormal(encoder)).to(latents(1).dtype)


def batch_of(name: str, x: Tensor) -> tuple[Tensor, ...]:
    return (x, *LIKELIHOODS[name].given(len(x)).values())


# -- laws -------------------------------------------------------------------------------------------------------------


@law(lambda n: n != "Mixed")  # whose columns are told apart below
def test_sums_or_integrates_to_one(name: str) -> None:
    torch.manual_seed(0)
    case = LIKELIHOODS[name]
    with torch.no_grad():
        _, mass = masses(small(case)(latents(3), **case.given(3)), case.support)
    torch.testing.assert_close(mass.sum(0), torch.ones(3).double(), atol=1e-6, rtol=0)


@law(lambda n: n != "Mixed")  # whose columns are told apart below
def test_sampler_fits_its_density(name: str) -> None:
    torch.manual_seed(0)
    case = LIKELIHOODS[name]
    assert p_value(small(case)(latents(3), **case.given(3)), case.support) > FAILURE / TESTS


@law()
def test_is_over_one_datum_per_latent_and_broadcasts(name: str) -> None:
    case, (part, x) = LIKELIHOODS[name], drawn(name)
    z = latents(4, ROWS)
    fn = part(z, **case.given(ROWS))
    assert (fn.batch_shape, fn.event_shape) == ((4, ROWS), (case.features,))
    log_prob = fn.log_prob(x)
    assert log_prob.shape == (4, ROWS)
    one = part(z[2, 3], **case.given()).log_prob(x[3])
    torch.testing.assert_close(log_prob[2, 3], one)
    torch.testing.assert_close(fn.expand((2, 4, ROWS)).log_prob(x)[1, 2, 3], one)
    assert fn.sample((2,)).shape == (2, 4, ROWS, case.features)


@law()
def test_output_shape_is_what_the_network_gives(name: str) -> None:
    case, (part, x) = LIKELIHOODS[name], drawn(name)
    args = (x, latents(ROWS)) if name.startswith("Autoregressive") else (latents(ROWS),)
    assert part.net(*args).shape == (ROWS, *part.output_shape((case.features,)))
    if case.images:
        assert part.output_shape((3, 4, 4))[1:] == (4, 4)
        assert case.make(Nets((3, 4, 4))).output_shape((3, 4, 4))[0] * 16 == part.output_shape((48,))[0]


@law(lambda n: LIKELIHOODS[n].images)
def test_over_images_is_the_same_as_over_their_pixels(name: str) -> None:
    case = LIKELIHOODS[name]
    torch.manual_seed(0)
    image, flat = case.make(Nets((3, 4, 4))).double(), case.make(Nets((48,))).double()
    fn = image(latents(4, ROWS), **case.given(ROWS))
    assert (fn.batch_shape, fn.event_shape) == ((4, ROWS), (3, 4, 4))
    x = fn.sample()
    assert fn.log_prob(x).shape == (4, ROWS)
    if name.startswith("Autoregressive"):
        return
    flattened = dict(image.named_parameters()) | {"log_scale": getattr(image, "log_scale", torch.zeros(0)).flatten()}
    for key, p in list(flattened.items()):
        if key.startswith("log_") and p.dim() == 3:
            flattened[key] = p.flatten()
    flat.net = torch.nn.Sequential(image.net, torch.nn.Flatten(-3))
    for key in ("log_scale", "log_concentration"):
        if isinstance(getattr(flat, key, None), torch.nn.Parameter):
            setattr(flat, key, torch.nn.Parameter(flattened[key]))
    torch.testing.assert_close(flat(latents(4, ROWS), **case.given(ROWS)).log_prob(x.flatten(-3)), fn.log_prob(x))


@law()
def test_particles_under_a_plate_are_those_one_by_one(name: str) -> None:
    part, x = drawn(name)
    vae, batch = vae_of(name, part), batch_of(name, x)
    s = inspect(vae.model, vae.guide, batch)
    assert s.layout == "vectorized"
    singles = terms(vae.model, vae.guide, batch, 3, structure=replace(s, layout="one by one"))
    given = {"z": singles.guide["z"].value}
    together = terms(vae.model, vae.guide, batch, 3, values=given, structure=s)
    assert together.log_lik.shape == (3, ROWS)
    torch.testing.assert_close(together.log_lik, singles.log_lik)
    torch.testing.assert_close(together.log_lik, part(given["z"], **LIKELIHOODS[name].given(ROWS)).log_prob(x))


@law()
def test_every_parameter_gets_a_gradient(name: str) -> None:
    part, x = drawn(name)
    vae = vae_of(name, part)
    t = terms(vae.model, vae.guide, batch_of(name, x), num_particles=4)
    assert bool(torch.isfinite(t.log_weight).all())
    t.log_weight.mean().backward()
    for key, p in vae.named_parameters():
        assert p.grad is not None, key
        assert bool(torch.isfinite(p.grad).all()), key
        assert bool((p.grad != 0).any()), key


@law()
def test_permuting_the_batch_permutes_the_result(name: str) -> None:
    part, x = drawn(name)
    order, z = torch.tensor([3, 1, 4, 0, 2]), latents(ROWS)
    context = {k: v + torch.arange(ROWS) for k, v in LIKELIHOODS[name].given(ROWS).items()}
    if name == "Multinomial":
        x = x + torch.arange(ROWS)[:, None] * torch.eye(LIKELIHOODS[name].features)[0]
    permuted = {k: v[order] for k, v in context.items()}
    torch.testing.assert_close(part(z[order], **permuted).log_prob(x[order]), part(z, **context).log_prob(x)[order])


@law()
def test_float32_is_close_to_float64(name: str) -> None:
    case, (part, _) = LIKELIHOODS[name], drawn(name)
    x = part.float()(latents(ROWS).float(), **case.given(ROWS)).sample()
    assert x.dtype == torch.float32
    single = part(latents(ROWS).float(), **case.given(ROWS)).log_prob(x)
    assert single.dtype == torch.float32
    double = part.double()(latents(ROWS), **case.given(ROWS)).log_prob(x.double())
    torch.testing.assert_close(single.double(), double, atol=1e-4, rtol=1e-4)


@law()
def test_state_survives_a_file_without_code(name: str) -> None:
    case, (part, x) = LIKELIHOODS[name], drawn(name)
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    fresh = case.make(Nets((case.features,))).double()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    z, given = latents(ROWS), case.given(ROWS)
    for other in (fresh, copy.deepcopy(part)):
        assert torch.equal(other(z, **given).log_prob(x), part(z, **given).log_prob(x))


@law()
def test_runs_on_the_device_of_its_parameters_and_waits_for_no_value(name: str) -> None:
    """The meta device has no values: what runs there neither reads one nor mixes devices."""
    case, (part, x) = LIKELIHOODS[name], drawn(name)
    given = {k: v.to("meta") for k, v in case.given(ROWS).items()}
    with pyro.validation_enabled(False):
        log_prob = part.to("meta")(latents(ROWS).to("meta"), **given).log_prob(x.to("meta"))
    assert (log_prob.device.type, log_prob.shape) == ("meta", (ROWS,))


@law(lambda n: not math.isnan(LIKELIHOODS[n].outside))
def test_data_outside_the_support_are_refused_with_place_and_cure(name: str) -> None:
    part, x = drawn(name)
    vae, column = vae_of(name, part), 3 if name == "Mixed" else 1
    x[2, column] = LIKELIHOODS[name].outside
    place = (
        rf"found {LIKELIHOODS[name].outside:g} at row 2, position \[{column}\]" if name != "Multinomial" else "at row 2"
    )
    with pytest.raises(DataError, match=rf"'x'.*{place}.*{LIKELIHOODS[name].cure}"):
        terms(vae.model, vae.guide, batch_of(name, x), 2)


@pytest.mark.parametrize(
    "name", ["Bernoulli", "Mixture of three channels", "Autoregressive MADE", "Poisson of a library"]
)
def test_trains_and_gives_log_px(name: str) -> None:
    part, _ = drawn(name)
    vae, case = vae_of(name, part.float()).float(), LIKELIHOODS[name]
    with torch.no_grad():
        x = part(latents(200).float(), **case.given(200)).sample()
    data = tuple(t.float() for t in batch_of(name, x))
    with torch.no_grad():
        for p in vae.parameters():
            p.mul_(0.3)
    run = fit(vae.model, vae.guide, data, epochs=4, batch_size=20)
    assert run.history[-1]["train_elbo"] > run.history[0]["train_elbo"]
    est = log_marginal(run.model, run.guide, tuple(t[:20] for t in data), num_particles=30, proposal="guide")
    assert bool(torch.isfinite(est.log_px).all())


# -- exact cases ------------------------------------------------------------------------------------------------------


class Fixed(torch.nn.Module):
    """A network that gives these numbers for every latent."""

    def __init__(self, out: Tensor):
        super().__init__()
        self.out = torch.nn.Parameter(out)

    def forward(self, z: Tensor) -> Tensor:
        return self.out.expand(*z.shape[:-1], *self.out.shape) + 0 * z.sum()


Z = torch.zeros(1, LATENT)


def test_categorical_of_two_levels_is_bernoulli() -> None:
    logits, x = torch.tensor([-2.0, 0.5, 3.0]), torch.tensor([[0.0, 1.0, 1.0]])
    two = likelihoods.Categorical(Fixed(torch.cat([torch.zeros(3), logits])), levels=2)(Z)
    torch.testing.assert_close(two.log_prob(x), likelihoods.Bernoulli(Fixed(logits))(Z).log_prob(x))


def test_blocks_stand_along_the_first_event_dim_in_the_order_that_docstrings_say() -> None:
    x = torch.rand(2, 3, 4)
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    net = Fixed(torch.cat([a, b]))
    counted = torch.poisson(3 * x)
    levels = (x * 3).round() / 3
    inflated = D.ZeroInflated(D.Poisson(a), b)
    cases = [
        (likelihoods.Normal(net, scale="network", floor=0.0), dist.Normal(a, b.exp()), x),
        (likelihoods.Laplace(net, scale="network", floor=0.0), dist.Laplace(a, b.exp()), x),
        (likelihoods.StudentT(net, 3.0, "network", floor=0.0), dist.StudentT(3.0, a, b.exp()), x),
        (likelihoods.Beta(net), dist.Beta(a.exp(), b.exp()), x),
        (likelihoods.DiscretizedLogistic(net, levels=4), D.DiscretizedLogistic(a, b, levels=4), levels),
        (likelihoods.NegativeBinomial(net, "network"), D.NegativeBinomial(a, b), counted),
        (likelihoods.ZeroInflatedPoisson(net), inflated, counted),
    ]
    for part, fn, value in cases:
        torch.testing.assert_close(part(Z).log_prob(value), fn.to_event(3).log_prob(value)[None], rtol=1e-4, atol=1e-4)


def test_three_blocks_of_zero_inflated_negative_binomial_counts() -> None:
    a, b, c = torch.randn(3, 4)
    x = torch.tensor([0.0, 1.0, 0.0, 5.0])
    fn = likelihoods.ZeroInflatedNegativeBinomial(Fixed(torch.cat([a, b, c])), "network")(Z)
    torch.testing.assert_close(fn.log_prob(x), D.ZeroInflated(D.NegativeBinomial(a, c), b).log_prob(x).sum()[None])


def test_blocks_of_a_mixture() -> None:
    """Logits of M components, M C locations, M C log-scales, M C (C - 1) / 2 couplings, for a pixel each."""
    torch.manual_seed(0)
    logits, loc, log_scale, r = (torch.randn(*shape, 4, 5) for shape in ((2,), (2, 3), (2, 3), (2, 3)))
    net = Fixed(torch.cat([t.reshape(-1, 4, 5) for t in (logits, loc, log_scale, r)]))
    part = likelihoods.MixtureOfDiscretizedLogistics(net, components=2, channels=3, levels=8)
    pixels = [t.flatten(-2) for t in (logits, loc, log_scale, r.tanh())]
    fn = D.MixtureOfDiscretizedLogistics(*pixels, levels=8, event_shape=(3, 4, 5))
    x = fn.sample()
    assert x.shape == (3, 4, 5)
    torch.testing.assert_close(part(Z).log_prob(x), fn.log_prob(x)[None])
    by_pixel = sum(
        D.MixtureOfDiscretizedLogistics(*(t[..., [i]] for t in pixels), levels=8).log_prob(x.flatten(1)[:, [i]])
        for i in range(20)
    )
    torch.testing.assert_close(fn.log_prob(x), by_pixel)


def test_mixture_of_one_component_is_its_component() -> None:
    a, b = torch.rand(6), torch.randn(6) - 2
    x = (torch.rand(1, 6) * 255).round() / 255
    alone = likelihoods.DiscretizedLogistic(Fixed(torch.cat([a, b])))(Z).log_prob(x)
    one = likelihoods.MixtureOfDiscretizedLogistics(Fixed(torch.cat([torch.randn(6), a, b])), components=1)
    torch.testing.assert_close(one(Z).log_prob(x), alone)
    logits, couplings = torch.randn(2), torch.zeros(6)  # the same six numbers as three channels of two pixels
    one = likelihoods.MixtureOfDiscretizedLogistics(Fixed(torch.cat([logits, a, b, couplings])), 1, channels=3)
    torch.testing.assert_close(one(Z).log_prob(x), alone)


def test_rates_are_the_library_shared_out() -> None:
    out, x = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([[3.0, 0.0, 9.0], [1.0, 2.0, 3.0]])
    library = torch.tensor([12.0, 100.0])
    fn = likelihoods.Poisson(Fixed(out), library=True)(torch.zeros(2, LATENT), context=library)
    rate = library[:, None] * out.softmax(-1)
    torch.testing.assert_close(fn.mean, rate)
    torch.testing.assert_close(fn.log_prob(x), dist.Poisson(rate).to_event(1).log_prob(x))
    image = likelihoods.Poisson(Fixed(torch.randn(2, 3, 4)), library=True)(torch.zeros(2, LATENT), context=library)
    torch.testing.assert_close(image.mean.sum((-1, -2, -3)), library)


def test_given_its_total_a_poisson_is_multinomial() -> None:
    torch.manual_seed(0)
    out, x = torch.randn(4).double(), torch.poisson(torch.full((ROWS, 4), 3.0)).double()
    z, total = torch.zeros(ROWS, LATENT).double(), x.sum(-1)
    joint = likelihoods.Poisson(Fixed(out))(z).log_prob(x)
    of_total = D.Poisson(out.logsumexp(-1)).log_prob(total)
    torch.testing.assert_close(likelihoods.Multinomial(Fixed(out))(z, context=total).log_prob(x), joint - of_total)


def test_the_data_s_own_sum_as_a_library_gives_no_density() -> None:
    """The docstring of `Poisson` says so; here is how far it is from one."""
    every = points(range(60), 2)
    part, z = (
        likelihoods.Poisson(Fixed(torch.zeros(2).double()), library=True),
        torch.zeros(len(every), LATENT).double(),
    )
    known = part(z, context=torch.full((len(every),), 5.0)).log_prob(every).exp().sum()
    own = part(z, context=every.sum(-1)).log_prob(every).exp().sum()
    assert known.item() == pytest.approx(1, abs=1e-9)
    assert own.item() > 2


def test_a_table_of_reals_is_normal() -> None:
    torch.manual_seed(0)
    net, x = nn.mlp(LATENT, 4).double(), torch.randn(ROWS, 4).double()
    mixed, normal = Mixed(net, ["real"] * 4).double(), likelihoods.Normal(net, scale=(4,)).double()
    mixed.load_state_dict(normal.state_dict())
    torch.testing.assert_close(mixed(latents(ROWS)).log_prob(x), normal(latents(ROWS)).log_prob(x))
    assert not bool(mixed.at_floor.any())


def test_a_table_reads_the_outputs_column_after_column() -> None:
    out = torch.tensor([0.3, 1.1, 2.0, 0.5, -1.0, -0.7, 0.9, 0.0, 1.0, 2.0])  # real, count, 3 levels, binary, real, 3
    row = torch.tensor([1.0, 4.0, 2.0, 1.0, -2.0, 0.0])
    part = Mixed(Fixed(out), COLUMNS, floor=0.0)
    with torch.no_grad():
        part.log_scale.copy_(torch.tensor([0.5, -0.5]))
    expected = [
        dist.Normal(0.3, math.exp(0.5)).log_prob(row[0]),
        dist.Poisson(torch.tensor(1.1).exp()).log_prob(row[1]),
        torch.tensor([2.0, 0.5, -1.0]).log_softmax(-1)[2],
        dist.Bernoulli(logits=torch.tensor(-0.7)).log_prob(row[3]),
        dist.Normal(0.9, math.exp(-0.5)).log_prob(row[4]),
        torch.tensor([0.0, 1.0, 2.0]).log_softmax(-1)[0],
    ]
    torch.testing.assert_close(part(Z).log_prob(row), torch.stack(expected).sum()[None])
    for d, term in enumerate(expected):
        alone = torch.full((6,), math.nan)
        alone[d] = row[d]
        torch.testing.assert_close(part(Z).log_prob(alone), term[None])
    assert part(Z).log_prob(torch.full((6,), math.nan)).item() == 0


def test_each_column_of_a_table_sums_to_one_and_fits_its_sampler() -> None:
    torch.manual_seed(0)
    case = LIKELIHOODS["Mixed"]
    fn = perturbed(case.make(Nets((6,))))(latents(1))
    for d, kind in enumerate(COLUMNS):
        values = {"real": None, "count": 400, "binary": 2}[kind] if isinstance(kind, str) else kind[1]
        support: Support = "real" if values is None else points(range(values))
        assert p_value(OneColumn(fn, d), support) > FAILURE / TESTS
        torch.testing.assert_close(
            masses(OneColumn(fn, d), support)[1].sum(0), torch.ones(1).double(), atol=1e-6, rtol=0
        )


class OneColumn:
    """One column of a table's rows, all others missing."""

    event_shape = torch.Size()

    def __init__(self, fn: Any, column: int):
        self.fn, self.column, self.batch_shape = fn, column, fn.batch_shape

    def log_prob(self, value: Tensor) -> Tensor:
        row = torch.full((*value.shape, *self.fn.event_shape), math.nan, dtype=value.dtype)
        row[..., self.column] = value
        return self.fn.log_prob(row)

    def sample(self, shape: Any) -> Tensor:
        return self.fn.sample(shape)[..., self.column]


def test_gaps_in_a_table_change_nothing_but_their_own_terms() -> None:
    part, x = drawn("Mixed")
    vae = vae_of("Mixed", part)
    gaps = torch.rand(ROWS, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    holed = torch.where(gaps, math.nan, x)
    t = terms(vae.model, vae.guide, holed, 3)
    z = t.model["z"].value
    alone = torch.stack([part(z).log_prob(torch.where(torch.arange(6) == d, x, math.nan)) for d in range(6)], -1)
    torch.testing.assert_close(t.log_lik, (alone * ~gaps).sum(-1))
    t.log_weight.mean().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in vae.parameters() if p.grad is not None)


@pytest.mark.parametrize("scale", ["learned", (4,)])
@pytest.mark.parametrize("kind", [likelihoods.Normal, likelihoods.Laplace])
def test_the_optimal_scale_is_where_the_gradient_is_zero(kind: Any, scale: Any) -> None:
    torch.manual_seed(0)
    part = kind(nn.mlp(LATENT, 4), scale=scale).double()
    z, x = latents(50), torch.randn(50, 4).double() * torch.tensor([0.1, 1.0, 2.0, 5.0])
    found = set_optimal_scale(part, x, z)
    log_prob = part(z).log_prob(x).mean()
    (gradient,) = torch.autograd.grad(log_prob, part.log_scale)
    assert found.shape == part.log_scale.shape
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)
    if kind is likelihoods.Normal and scale == "learned":  # -D/2 (log(2 pi sigma^2) + 1), as in the paper
        assert log_prob.item() == pytest.approx(-2 * (math.log(2 * math.pi * found.item() ** 2) + 1))


def test_the_optimal_scale_stops_at_the_floor_and_wants_a_learned_one() -> None:
    part, z = likelihoods.Normal(Fixed(torch.zeros(4)), scale="learned", floor=0.01), torch.zeros(2, LATENT)
    assert set_optimal_scale(part, torch.zeros(2, 4), z).item() == pytest.approx(0.01, rel=1e-4)
    assert bool(part.at_floor)
    for scale in (1.0, "network"):
        with pytest.raises(ValueError, match="learned scale"):
            set_optimal_scale(likelihoods.Normal(Fixed(torch.zeros(4)), scale=scale), torch.zeros(2, 4), z)


def test_learned_scale_reports_its_floor() -> None:
    part = likelihoods.Normal(Nets((6,))(1), scale="learned", floor=1e-2)
    assert not bool(part.at_floor)
    with torch.no_grad():
        part.log_scale.fill_(-20.0)
    assert bool(part.at_floor)
    assert part(torch.zeros(1, LATENT)).base_dist.scale.min().item() == pytest.approx(1e-2, rel=1e-4)
    with pytest.raises(ValueError, match="network"):
        _ = likelihoods.Normal(Nets((6,))(2), scale="network").at_floor


def test_ancestral_samples_follow_the_order_of_the_network() -> None:
    """In an order of its own, the number last in order copies the first: a sampler of another order cannot."""

    class Copy(torch.nn.Module):
        event_shape, order = (3,), torch.tensor([2, 0, 1])

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            lead = torch.broadcast_shapes(x.shape[:-1], z.shape[:-1])
            middle = x[..., 2:].expand(*lead, 1)
            return torch.cat([100 * middle - 50, 100 * middle - 50, 0 * middle], -1)

    torch.manual_seed(0)
    x = likelihoods.Autoregressive(Copy())(torch.zeros(200, LATENT)).sample()
    assert torch.equal(x[:, 0], x[:, 2])
    assert torch.equal(x[:, 1], x[:, 2])
    assert 0.3 < x.mean().item() < 0.7


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: likelihoods.Normal(Nets((6,))(1), scale=0.0), "scale"),
        (lambda: likelihoods.Normal(Nets((6,))(1), scale=-1.0), "scale"),
        (lambda: likelihoods.Normal(Nets((6,))(1), scale="fixed"), "scale"),  # type: ignore[arg-type]
        (lambda: likelihoods.Laplace(Nets((6,))(1), scale=None), "scale"),  # type: ignore[arg-type]
        (lambda: likelihoods.StudentT(Nets((6,))(1), df="network"), "df"),
        (lambda: likelihoods.StudentT(Nets((6,))(1), df=0), "df"),
        (lambda: likelihoods.NegativeBinomial(Nets((6,))(1), concentration=True), "concentration"),
        (lambda: likelihoods.Categorical(Nets((6,))(1), levels=1), "levels"),
        (lambda: likelihoods.DiscretizedLogistic(Nets((6,))(2), levels=0), "levels"),
        (lambda: likelihoods.MixtureOfDiscretizedLogistics(Nets((6,))(2), components=0), "components"),
        (lambda: likelihoods.Autoregressive(nn.MADE(4, LATENT), levels=1), "levels"),
        (lambda: Mixed(Nets((6,))(1), []), "columns"),
        (lambda: Mixed(Nets((6,))(1), ["text"]), "real, count, binary, categorical"),  # type: ignore[list-item]
        (lambda: Column("categorical"), "levels"),
        (lambda: Column("real", 3), "levels"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (likelihoods.Beta(Nets((5,))(1)), r"log a, log b.*\[1, 5\]"),
        (likelihoods.Categorical(Nets((6,))(1), levels=4), "logits of each level"),
        (likelihoods.ZeroInflatedPoisson(Nets((5,))(1)), "log-rate, gate"),
        (likelihoods.MixtureOfDiscretizedLogistics(Nets((7,))(1)), "couplings"),
        (Mixed(Nets((6,))(1), ["real", ("categorical", 4)]), "expected.*5.*2 columns"),
    ],
)
def test_a_network_of_the_wrong_size_is_refused_by_what_it_lacks(part: torch.nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        part(torch.zeros(1, LATENT))


@pytest.mark.parametrize("context", [torch.ones(4), torch.ones(ROWS, 1), torch.ones(ROWS, 6)])
@pytest.mark.parametrize(
    "part", [likelihoods.Poisson(Nets((6,))(1), library=True), likelihoods.Multinomial(Nets((6,))(1))]
)  # fmt: skip
def test_a_context_of_another_shape_is_refused(part: torch.nn.Module, context: Tensor) -> None:
    with pytest.raises(DataError, match=r"context: expected .*one number a datum \[5\]"):
        part(torch.zeros(ROWS, LATENT), context=context)


def test_a_library_below_zero_is_refused_and_one_of_zero_is_certain() -> None:
    part, z = likelihoods.Poisson(Nets((6,))(1), library=True), torch.zeros(2, LATENT)
    with pytest.raises(ValueError, match="log_rate"):
        part(z, context=torch.tensor([1.0, -1.0]))
    assert part(z, context=torch.zeros(2)).log_prob(torch.zeros(2, 6)).tolist() == [0.0, 0.0]


def test_context_is_declared_only_with_a_library() -> None:
    x = torch.ones(4, 6)
    encoder = posteriors.DiagonalNormal(nn.mlp(6, 2 * LATENT))
    without = VAE(priors.StandardNormal(LATENT), likelihoods.Poisson(Nets((6,))(1)), encoder)
    assert terms(without.model, without.guide, x, 2).log_lik.shape == (2, 4)
    with_library = VAE(priors.StandardNormal(LATENT), likelihoods.Poisson(Nets((6,))(1), library=True), encoder)
    with pytest.raises(UsageError, match="context"):
        terms(with_library.model, with_library.guide, x, 2)
