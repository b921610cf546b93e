"""Laws of posteriors, each over a dict of constructors: a new one is tested by one line; then what is known exactly."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor
from torch.distributions import kl_divergence

from ppvae import VAE, data, fit, likelihoods, load, log_marginal, nn, objectives, posteriors, priors, terms
from ppvae.errors import ContractError, DataError, UsageError
from ppvae.inference import check, inspect
from ppvae.models import LinearGaussian
from ppvae.parameter_names import unique_name
from ppvae.posteriors.sphere import PowerSphericalDistribution
from tests.laws.latents import FAILURE, Part, fit_of, integral, perturbed, values_of
from tests.laws.law import Laws
from tests.laws.parts import FEATURES, POINT, POSTERIORS, flow, net, semi

law = Laws(POSTERIORS)

PER_DATUM = {n for n in POSTERIORS if n.startswith("PerDatum")}


def made(name: str) -> tuple[Part, torch.nn.Module]:
    torch.manual_seed(0)
    part = {**POSTERIORS, **POINT}[name]
    return part, perturbed(part.make(part.size)).eval()


def batch(part: Part, count: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    """x [count, FEATURES], binary, and what else the part is given."""
    x = (torch.rand(count, FEATURES, generator=torch.Generator().manual_seed(1)) > 0.5).double()
    return x, ({} if part.context is None else {"context": part.context[:count]})


def single(name: str) -> tuple[Part, Any]:
    """The posterior of one datum, of batch shape []."""
    part, module = made(name)
    x, given = batch(part)
    return part, module(x[0], **{k: v[0] for k, v in given.items()})


@law()
def test_density_is_one(name: str) -> None:
    part, fn = single(name)
    assert fn.batch_shape == ()
    assert abs(integral(fn, part.kind) - 1) < part.tolerance


@law()
def test_draws_follow_the_density(name: str) -> None:
    part, fn = single(name)
    torch.manual_seed(1)
    assert fit_of(fn, part.kind) > FAILURE / len(POSTERIORS)


@law()
def test_expands_to_particles_and_broadcasts(name: str) -> None:
    part, module = made(name)
    x, given = batch(part)
    fn = module(x, **given)
    assert fn.batch_shape == (5,)
    z = values_of(part.kind, fn, 4, 5)
    rows = [module(x[i], **{k: v[i] for k, v in given.items()}).log_prob(z[:, i]) for i in range(5)]
    many = fn.expand([4, 5])
    assert (many.batch_shape, many.event_shape) == ((4, 5), fn.event_shape)
    for value in (fn.log_prob(z), many.log_prob(z), fn.expand([1, 5]).expand([4, 5]).log_prob(z)):
        torch.testing.assert_close(value, torch.stack(rows, 1))
    one = z[:, :1]  # the same value under every datum's posterior, as a mixture of them asks
    torch.testing.assert_close(fn.log_prob(one), fn.log_prob(one.expand_as(z)))
    draws = many.sample((2,))
    assert draws.shape == (2, 4, 5, *fn.event_shape)
    assert many.log_prob(draws).shape == (2, 4, 5)
    assert bool(many.support.check(draws).all())
    assert len(draws[:, :, 0].reshape(8, -1).unique(dim=0)) > 1, "particles are independent"


@law(also=POINT)
def test_permutes_with_the_batch(name: str) -> None:
    part, module = made(name)
    x, given = batch(part)
    order = torch.tensor([3, 1, 4, 0, 2])
    fn, moved = module(x, **given), module(x[order], **{k: v[order] for k, v in given.items()})
    if name in POINT:
        torch.testing.assert_close(moved.v, fn.v[order])
        return
    z = values_of(part.kind, fn, 5)
    torch.testing.assert_close(moved.log_prob(z[order]), fn.log_prob(z)[order])


@law()
def test_says_honestly_whether_it_is_reparameterised(name: str) -> None:
    part, module = made(name)
    x, given = batch(part)
    fn = module(x, **given)
    discrete = part.kind == "discrete"
    assert fn.has_rsample == part.reparameterised
    assert discrete == bool(fn.support.is_discrete) == bool(fn.has_enumerate_support)
    assert not fn.sample().requires_grad
    if not discrete:
        assert fn.rsample().requires_grad


@law(lambda n: POSTERIORS[n].kind != "discrete")
def test_own_draws_have_their_density(name: str) -> None:
    """With a cached inverse or without, value and gradient are the same."""
    part, module = made(name)
    x, given = batch(part)
    fn = module(x, **given)
    torch.manual_seed(2)
    z = fn.rsample((3,))
    own, afresh = fn.log_prob(z), module(x, **given).log_prob(z)
    torch.testing.assert_close(own, afresh, rtol=1e-8, atol=1e-8)
    parameters = [p for p in module.parameters() if p.requires_grad]
    for a, b in zip(
        *(torch.autograd.grad(v.sum(), parameters, retain_graph=True, allow_unused=True) for v in (own, afresh)),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        z = fn.rsample((3,))
    own = torch.autograd.grad(fn.log_prob(z).sum(), parameters, allow_unused=True)
    afresh = torch.autograd.grad(module(x, **given).log_prob(z.clone()).sum(), parameters, allow_unused=True)
    for a, b in zip(own, afresh, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@law(lambda n: POSTERIORS[n].reparameterised)
def test_paths_give_the_gradient_of_an_expectation(name: str) -> None:
    """d/dp E[f(z)] by paths against the score function, with f smooth: 5 standard errors, along a random p."""
    torch.manual_seed(0)
    part, module = made(name)
    x, given = batch(part, 1)
    shift = {n: torch.randn_like(p) for n, p in module.named_parameters()}
    weights = torch.randn(module(x, **given).event_shape[0]).double()

    def moved(by: Tensor) -> Any:
        changed = {n: p.detach() + by * shift[n] for n, p in module.named_parameters()}
        return torch.func.functional_call(module, changed, (x,), given)

    differences = []
    for _ in range(40):
        by = torch.zeros(2).double().requires_grad_()
        z = moved(by[0]).rsample((1000,))
        height = (z @ weights).tanh()
        score = (height - height.mean()).detach() * moved(by[1]).log_prob(z.detach())
        slope = torch.autograd.grad(height.mean() + score.mean(), by)[0]
        differences.append(slope[0] - slope[1])
    difference = torch.stack(differences)
    assert float(difference.mean().abs()) < 5 * float(difference.std()) / 40**0.5


@law(also=POINT)
def test_dtype_follows_the_module_and_state_saves_without_pickles(name: str) -> None:
    part, module = made(name)
    x, given = batch(part)
    fn = module(x, **given)
    z = fn.sample()
    assert fn.log_prob(z).dtype == torch.float64
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    torch.manual_seed(9)
    other = part.make(part.size).double().eval()
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    torch.testing.assert_close(other(x, **given).log_prob(z), fn.log_prob(z), rtol=0, atol=0)
    exact = fn.log_prob(z) if name not in POINT else None
    again = module.float()(x.float(), **given)
    draws = again.sample((3,))
    assert draws.dtype in (torch.float32, torch.long)
    assert again.log_prob(draws).dtype == torch.float32
    if name not in POINT:
        torch.testing.assert_close(again.log_prob(z.to(draws.dtype)).double(), exact, rtol=1e-4, atol=2e-4)


@law()
def test_density_is_a_function_of_the_data_alone(name: str) -> None:
    part, module = made(name)
    x, given = batch(part)
    z = values_of(part.kind, module(x, **given), 5)
    first = module(x, **given).log_prob(z)
    torch.rand(3)
    with torch.no_grad():
        torch.testing.assert_close(module(x, **given).log_prob(z), first, rtol=1e-12, atol=1e-12)


@law(lambda n: n not in PER_DATUM and not n.startswith("Semi"))
def test_nothing_is_made_on_another_device(name: str) -> None:
    part, module = made(name)  # the meta device refuses tensors of any other, and looks at none
    x, _ = batch(part)
    z = values_of(part.kind, module(x), 5).to("meta")
    with torch.no_grad(), pyro.validation_enabled(False):
        assert module.to("meta")(x.to("meta")).expand([4, 5]).log_prob(z).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@law()
def test_same_on_a_gpu(name: str) -> None:
    part, module = made(name)
    x, given = batch(part)
    fn = module(x, **given)
    z = values_of(part.kind, fn, 5)
    exact = fn.log_prob(z)
    moved = module.cuda()(x.cuda(), **{k: v.cuda() for k, v in given.items()})
    torch.testing.assert_close(moved.log_prob(z.cuda()).cpu(), exact)
    assert moved.expand([4, 5]).sample().device.type == "cuda"


def partner(part: Part, size: int) -> torch.nn.Module:
    """A prior over the same space."""
    return {
        "real": lambda: priors.StandardNormal(size),
        "interval": lambda: priors.RelaxedBernoulli(size),
        "simplex": lambda: priors.Dirichlet(size),
        "sphere": lambda: priors.UniformOnSphere(size),
        "discrete": lambda: priors.Bernoulli(size),
    }[part.kind]()  # fmt: skip


def pair_of(name: str) -> tuple[VAE, tuple[Tensor, ...]]:
    part, module = made(name)
    x, given = batch(part)
    size = module(x, **given).event_shape[0]
    prior = partner(part, size)
    if name == "OneHot":
        prior = priors.OneHot(3, size // 3)
    elif name == "RelaxedOneHot":
        prior = priors.RelaxedOneHot(size)
    likelihood = likelihoods.Bernoulli(nn.mlp(size, FEATURES, hidden=(6,)))
    if name.startswith("Semi"):
        prior, likelihood = module.prior, module.likelihood
    return VAE(prior, likelihood, module).double(), (x, *given.values())


@law(lambda n: n != "Categorical")
def test_works_in_a_pair_under_the_particle_plate(name: str) -> None:
    vae, data_ = pair_of(name)
    structure = inspect(vae.model, vae.guide, data_)
    assert structure.layout == "vectorized"
    assert bool(structure.non_reparameterized) != POSTERIORS[name].reparameterised
    t = terms(vae.model, vae.guide, data_, num_particles=4, structure=structure)
    assert t.log_weight.shape == (4, 5)
    assert bool(t.log_weight.isfinite().all())
    (t.log_weight**2).sum().backward()
    for parameter, p in vae.named_parameters():
        assert p.grad is not None, parameter
        assert bool((p.grad != 0).any()), parameter
        assert bool(p.grad.isfinite().all()), parameter


@law(lambda n: n != "Categorical")
def test_trains_and_estimates(name: str) -> None:
    vae, data_ = pair_of(name)
    vae.float()
    data_ = tuple(t.float() if t.is_floating_point() else t for t in data_)
    run = fit(vae.model, vae.guide, data_ if len(data_) > 1 else data_[0], epochs=3, batch_size=3, progress=False)
    est = log_marginal(run.model, run.guide, data_, num_particles=200, progress=False, proposal="guide")
    assert bool(est.log_px.isfinite().all())
    assert bool((est.elbo <= est.log_px + 1e-6).all())


# ----------------------------------------------------------------------------------------------- what is known exactly


def test_diagonal_normal_reads_location_then_log_scale() -> None:
    part = posteriors.DiagonalNormal(torch.nn.Identity())
    fn = part(torch.tensor([[1.0, 2.0, 0.0, math.log(3.0)]])).base_dist
    assert fn.loc.tolist() == [[1.0, 2.0]]
    torch.testing.assert_close(fn.scale, torch.tensor([[1.0, 3.0]]))


def test_full_rank_reads_location_diagonal_and_rows_below() -> None:
    fn = posteriors.FullRank(torch.nn.Identity())(
        torch.tensor([1.0, 2.0, 3.0, 0.0, math.log(2.0), -1.0, 4.0, 5.0, 6.0])
    )
    assert fn.loc.tolist() == [1.0, 2.0, 3.0]
    expected = torch.tensor([[1.0, 0.0, 0.0], [4.0, 2.0, 0.0], [5.0, 6.0, math.exp(-1.0)]])
    torch.testing.assert_close(fn.scale_tril, expected)
    with pytest.raises(ValueError, match=r"latent \* \(latent \+ 3\) / 2"):
        posteriors.FullRank(torch.nn.Identity())(torch.zeros(8))


def test_low_rank_is_the_dense_normal() -> None:
    torch.manual_seed(0)
    outputs, z = torch.randn(3 * 4).double(), torch.randn(5, 3).double()
    loc, log_scale, w = outputs[:3], outputs[3:6], outputs[6:].reshape(3, 2)
    dense = dist.MultivariateNormal(loc, w @ w.T + torch.diag((2 * log_scale).exp()))
    fn = posteriors.LowRank(torch.nn.Identity(), rank=2)(outputs)
    torch.testing.assert_close(fn.log_prob(z), dense.log_prob(z))
    with pytest.raises(ValueError, match="found 13"):
        posteriors.LowRank(torch.nn.Identity(), rank=2)(torch.zeros(13))


def oracle() -> tuple[LinearGaussian, Tensor]:
    torch.manual_seed(3)
    pair = LinearGaussian(5, 2, scale=0.6).double().eval()
    with torch.no_grad():
        pair.weight.copy_(torch.tensor([[1.0, 0.8], [0.9, 1.0], [-0.5, -0.3], [0.2, 0.4], [0.7, 0.6]]))
    return pair.requires_grad_(False), torch.randn(100, 5).double()


def guide_of(posterior: torch.nn.Module) -> Callable[[Tensor], Any]:
    name = unique_name("posterior")

    def guide(x: Tensor) -> Any:
        pyro.module(name, posterior)
        with pyro.plate("data", len(x)):
            return pyro.sample("z", posterior(x))

    return guide


@pytest.mark.parametrize("name", ["FullRank", "LowRank"])
def test_exact_parameters_give_constant_weights(name: str) -> None:
    pair, x = oracle()
    exact = pair.posterior(torch.cat([torch.zeros(1, 5), torch.eye(5)]).double())
    bias, slope = exact.loc[0], (exact.loc[1:] - exact.loc[0]).T
    covariance = exact.covariance_matrix[0]
    if name == "FullRank":
        posterior: Any = posteriors.FullRank(torch.nn.Linear(5, 5).double())
        tril = torch.linalg.cholesky(covariance)
        rest = torch.stack([tril[0, 0].log(), tril[1, 1].log(), tril[1, 0]])
    else:  # c W W^T with W = (1, r) takes the covariance, and part of each variance
        posterior = posteriors.LowRank(torch.nn.Linear(5, 6).double(), rank=1)
        share = covariance[0, 1].abs()
        w = torch.stack([share.sqrt(), covariance[0, 1] / share.sqrt()])
        rest = torch.cat([(covariance.diagonal() - w**2).log() / 2, w])
    with torch.no_grad():
        posterior.net.weight.copy_(torch.cat([slope, torch.zeros(len(rest), 5)]))
        posterior.net.bias.copy_(torch.cat([bias, rest]))
    t = terms(pair.model, guide_of(posterior), x, num_particles=7)
    torch.testing.assert_close(t.log_weight, pair.log_px(x).expand(7, 100), rtol=0, atol=1e-9)


def test_full_rank_reaches_the_exact_posterior() -> None:
    pair, x = oracle()
    torch.manual_seed(0)
    posterior = posteriors.FullRank(nn.mlp(5, posteriors.FullRank.outputs(2), hidden=())).double()
    guide = guide_of(posterior)
    objective = Trace_ELBO(num_particles=5, vectorize_particles=True)
    for lr, epochs in ((0.05, 150), (0.005, 300)):
        fit(pair.model, guide, x, objective=objective, epochs=epochs, batch_size=100, progress=False,
            optimizer=lambda ps, lr=lr: torch.optim.Adam(ps, lr=lr))  # fmt: skip
    gap = kl_divergence(posterior(x), pair.posterior(x)).detach()
    assert float(gap.mean()) < 2e-3
    est = log_marginal(pair.model, guide, x, num_particles=500, progress=False, proposal="guide")
    assert float((est.log_px - pair.log_px(x)).abs().max()) < 1e-2
    assert bool(est.reliable.all())
    diagonal = log_marginal(pair.model, pair.mean_field, x, num_particles=2000, progress=False, proposal="guide")
    assert float((pair.log_px(x) - diagonal.elbo).mean()) > 0.1, "a diagonal cannot do it"


@pytest.mark.parametrize("family", [posteriors.IAF, posteriors.SplineCoupling])
@pytest.mark.parametrize("latent", [1, 3])
def test_flow_posterior_starts_as_the_diagonal_normal(family: Any, latent: int) -> None:
    torch.manual_seed(0)
    posterior = family(torch.nn.Identity(), latent=latent, features=2).double()
    outputs, z = torch.randn(4, 2 * latent + 2).double(), torch.randn(6, 4, latent).double()
    diagonal = posteriors.DiagonalNormal(torch.nn.Identity())(outputs[:, : 2 * latent])
    torch.testing.assert_close(posterior(outputs).log_prob(z), diagonal.log_prob(z))
    with pytest.raises(ValueError, match=f"2 \\* {latent} \\+ 2 outputs"):
        posterior(outputs[:, 1:])


@pytest.mark.parametrize("family", [posteriors.IAF, posteriors.SplineCoupling])
def test_flow_posterior_is_the_change_of_variables(family: Any) -> None:
    torch.manual_seed(0)
    posterior = perturbed(family(torch.nn.Identity(), latent=3, features=2, hidden=(8,)))
    outputs = torch.randn(8).double()
    loc, scale = outputs[:3], outputs[3:6].exp()
    fn = posterior(outputs)

    def forward(noise: Tensor) -> Tensor:
        if family is posteriors.IAF:
            z = loc + scale * noise
            for network in posterior.maps:
                mean, log_scale = network(z, context=outputs[6:])
                z = mean + log_scale.exp() * z
            return z
        return loc + scale * posterior.flow(outputs[6:]).transform.inv(noise)

    for noise in torch.randn(5, 3).double():
        z = forward(noise)
        log_det = torch.autograd.functional.jacobian(forward, noise).slogdet().logabsdet
        expected = dist.Normal(0.0, 1.0).log_prob(noise).sum() - log_det
        torch.testing.assert_close(fn.log_prob(z), expected, rtol=1e-7, atol=1e-7)


def test_iaf_is_autoregressive_and_turns_around() -> None:
    torch.manual_seed(0)
    posterior = perturbed(posteriors.IAF(torch.nn.Identity(), latent=4, features=2, hidden=(8,)))
    h, z = torch.randn(2).double(), torch.randn(4).double()
    for i, network in enumerate(posterior.maps):
        for output in range(2):
            jacobian = torch.autograd.functional.jacobian(lambda u, k=output, n=network: n(u, context=h)[k], z)
            zero = jacobian.triu() if i % 2 == 0 else jacobian.tril()
            assert bool((zero == 0).all())
            assert bool((jacobian != 0).any())
        of_h = torch.autograd.functional.jacobian(lambda c, n=network: torch.stack(n(z, context=c)), h)
        assert bool((of_h != 0).any((0, 2)).all()), "every element depends on the features"


def test_iaf_inverse_is_cached_for_own_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    from ppvae.posteriors import flows

    posterior = posteriors.IAF(torch.nn.Identity(), latent=3, features=2)
    fn = posterior(torch.randn(5, 8, requires_grad=True))
    calls = []
    inverse = flows.InverseAutoregressive._inverse
    monkeypatch.setattr(flows.InverseAutoregressive, "_inverse", lambda s, y: calls.append(1) or inverse(s, y))
    z = fn.rsample()
    fn.log_prob(z)
    assert not calls
    fn.log_prob(z.clone())
    assert len(calls) == 2


def test_spline_draws_bring_their_density(monkeypatch: pytest.MonkeyPatch) -> None:
    from ppvae.priors.flows import zuko

    fn = posteriors.SplineCoupling(torch.nn.Identity(), latent=3, features=2)(torch.randn(5, 8, requires_grad=True))
    calls, log_prob = [], zuko.distributions.NormalizingFlow.log_prob
    monkeypatch.setattr(
        zuko.distributions.NormalizingFlow, "log_prob", lambda s, x: calls.append(1) or log_prob(s, x)
    )  # fmt: skip
    z = fn.rsample()
    fn.log_prob(z)
    assert not calls
    fn.log_prob(z.clone())
    assert len(calls) == 1


@pytest.mark.parametrize("concentration", [0.0, 1e-6, 0.5, 30.0, 1e4, 1e8])
@pytest.mark.parametrize("elements", [2, 3, 10])
def test_power_spherical_is_right_at_any_concentration(concentration: float, elements: int) -> None:
    mpmath.mp.dps = 60
    torch.manual_seed(0)
    loc = torch.nn.functional.one_hot(torch.tensor(elements - 1)).double()
    kappa, b = mpmath.mpf(concentration), mpmath.mpf(elements - 1) / 2
    a = b + kappa
    log_normaliser = (a + b) * mpmath.log(2) + b * mpmath.log(mpmath.pi) + mpmath.loggamma(a) - mpmath.loggamma(a + b)
    for spread in (0.0, 1e-4, 0.1, 1.0, 10.0):
        z = loc + spread * torch.randn(elements).double()
        z = (z / z.norm()).float()
        cosine = mpmath.mpf(z[-1].item()) / mpmath.sqrt(sum(mpmath.mpf(v) ** 2 for v in z.tolist()))
        expected = float(kappa * mpmath.log(1 + cosine) - log_normaliser)
        fn = PowerSphericalDistribution(loc.float(), torch.tensor(concentration))
        # a rounding of z moves the density by concentration * distance * eps
        tolerance = 1e-5 + 1e-6 * concentration * min(spread, 1.0)
        assert fn.log_prob(z).item() == pytest.approx(expected, rel=1e-5, abs=tolerance)
    for dtype in (torch.float32, torch.float64):
        fn = PowerSphericalDistribution(loc.to(dtype), torch.tensor(concentration, dtype=dtype))
        draws = fn.sample((1000,))
        assert bool(fn.support.check(draws).all())
        assert bool(fn.log_prob(draws).isfinite().all())
    if concentration == 0.0:
        uniform = priors.UniformOnSphere(elements).double()()
        for place in (draws, -loc):  # the far pole as well
            torch.testing.assert_close(fn.log_prob(place), uniform.log_prob(place))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_power_spherical_points_where_it_says(place: int, sign: float) -> None:
    torch.manual_seed(0)
    loc = torch.full((3,), 1e-6).double()
    loc[place] = sign
    loc = (loc / loc.norm()).requires_grad_()
    z = PowerSphericalDistribution(loc, torch.tensor(50.0).double()).rsample((2000,))
    direction = z.mean(0) / z.mean(0).norm()
    assert float((direction @ loc).detach()) > 0.999
    (slope,) = torch.autograd.grad(z.sum(), loc)
    assert float(slope.abs().max()) < 1e4, "the reflection is far from singular at both poles"


KL: dict[str, tuple[torch.nn.Module, list[float], torch.nn.Module]] = {
    "normal": (posteriors.DiagonalNormal(torch.nn.Identity()), [0.3, -1.0, -0.5, 0.4], priors.StandardNormal(2)),
    "full rank": (posteriors.FullRank(torch.nn.Identity()), [0.3, -1.0, -0.5, 0.4, 0.9], priors.Normal(2)),
    "low rank": (posteriors.LowRank(torch.nn.Identity(), 1), [0.3, -1.0, -0.5, 0.4, 0.9, -0.4], priors.Normal(2)),
    "power spherical": (
        posteriors.PowerSpherical(torch.nn.Identity()),
        [0.3, -1.0, 0.2, 3.0],
        priors.UniformOnSphere(3),
    ),
    "dirichlet": (posteriors.Dirichlet(torch.nn.Identity()), [0.3, 1.0, 2.0], priors.Dirichlet(3, 0.7)),
    "bernoulli": (posteriors.Bernoulli(torch.nn.Identity()), [0.3, -1.0], priors.Bernoulli(2)),
    "categorical": (posteriors.Categorical(torch.nn.Identity(), 3), [0.3, -1, 2, 0, 1, 0.5], priors.Categorical(3, 2)),
    "one-hot": (posteriors.OneHot(torch.nn.Identity(), 3), [0.3, -1, 2, 0, 1, 0.5], priors.OneHot(3, 2)),
}


@pytest.mark.parametrize("name", KL)
def test_closed_form_kl_is_the_mean_over_draws(name: str) -> None:
    torch.manual_seed(0)
    posterior, outputs, prior = KL[name]
    with torch.no_grad():
        q, p = posterior(torch.tensor(outputs).double()), perturbed(prior)()
        z = q.sample((100_000,))
        ratio, exact = q.log_prob(z) - p.log_prob(z), kl_divergence(q, p)
    assert exact.shape == ()
    assert abs(float(ratio.mean() - exact)) < 4 * float(ratio.std()) / 100_000**0.5


def test_kl_from_a_dense_normal_to_something_else_is_left_to_sampling() -> None:
    q = posteriors.FullRank(torch.nn.Identity())(torch.zeros(5))
    with pytest.raises(NotImplementedError):
        kl_divergence(q, priors.Laplace(2)())


def test_enumerated_posterior_gives_log_p_exactly() -> None:
    torch.manual_seed(0)
    x = (torch.rand(6, FEATURES) > 0.5).double()
    cases = {
        "Bernoulli": (priors.Bernoulli(3, learned=True), posteriors.Bernoulli(net(3))),
        "OneHot": (priors.OneHot(3, 2, learned=True), posteriors.OneHot(net(6), 3)),
        "Autoregressive": (priors.AutoregressiveOneHot(3, 2), posteriors.OneHot(net(6), 3)),
    }
    for prior, posterior in cases.values():
        size = prior().event_shape[0]
        vae = perturbed(VAE(prior, likelihoods.Bernoulli(nn.mlp(size, FEATURES, hidden=(6,))), posterior))
        values = vae.prior().enumerate_support()
        joint = vae.prior().log_prob(values)[:, None] + vae.likelihood(values[:, None]).log_prob(x)
        exact = joint.logsumexp(0).detach()
        guide = config_enumerate(vae.guide, "parallel")
        t = terms(vae.model, guide, x, num_particles=2)
        torch.testing.assert_close(t.log_weight, exact.expand(2, 6), rtol=0, atol=1e-10)
        q = vae.posterior(x)
        log_q = q.log_prob(values[:, None])
        torch.testing.assert_close(t.elbo[0], (log_q.exp() * (joint - log_q)).sum(0), rtol=0, atol=1e-10)
        loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(vae.model, guide, x)
        torch.testing.assert_close(-loss, t.elbo[0].sum(), rtol=1e-9, atol=1e-9)
        sampled = log_marginal(vae.model, vae.guide, x, num_particles=3000, progress=False, proposal="guide")
        assert float(((sampled.log_px - exact) / sampled.std_error.clamp(min=1e-4)).abs().max()) < 5


def test_discrete_posteriors_read_a_variable_after_the_other() -> None:
    torch.manual_seed(0)
    outputs = torch.randn(4, 6).double()
    log_q = outputs.reshape(4, 2, 3).log_softmax(-1)
    expected = log_q[:, 0, 2] + log_q[:, 1, 0]
    index, written = torch.tensor([2, 0]), torch.tensor([0.0, 0, 1, 1, 0, 0])
    torch.testing.assert_close(posteriors.Categorical(torch.nn.Identity(), 3)(outputs).log_prob(index), expected)
    torch.testing.assert_close(posteriors.OneHot(torch.nn.Identity(), 3)(outputs).log_prob(written), expected)
    relaxed = posteriors.RelaxedOneHot(torch.nn.Identity(), 3)
    torch.testing.assert_close(relaxed.discrete(outputs).log_prob(written), expected)
    nearest = relaxed(outputs).sample((50_000,)).reshape(-1, 4, 2, 3).argmax(-1)
    share = (nearest == torch.tensor([2, 0])).all(-1).double().mean(0)
    torch.testing.assert_close(share, expected.exp(), atol=0.012, rtol=0)  # the largest element is the class drawn
    with pytest.raises(ValueError, match=r"variables \* 3"):
        posteriors.Categorical(torch.nn.Identity(), 3)(outputs[:, 1:])


def test_categorical_posterior_with_an_embedding() -> None:
    torch.manual_seed(0)
    decoder = torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.Flatten(-2), torch.nn.Linear(8, FEATURES))
    x = (torch.rand(6, FEATURES) > 0.5).float()
    for prior in (priors.Categorical(3, 2), priors.AutoregressiveCategorical(3, 2)):
        vae = VAE(prior, likelihoods.Bernoulli(decoder), posteriors.Categorical(net(6), 3))
        t = terms(vae.model, config_enumerate(vae.guide), x, num_particles=2)
        values = prior().enumerate_support()
        joint = prior().log_prob(values)[:, None] + vae.likelihood(values[:, None]).log_prob(x)
        torch.testing.assert_close(t.log_weight[0], joint.double().logsumexp(0), rtol=0, atol=1e-5)
        fit(vae.model, vae.guide, x, epochs=1, progress=False)


@pytest.mark.parametrize("kind", ["Bernoulli", "OneHot"])
def test_relaxed_pair_trains_and_its_discrete_pair_is_evaluated(kind: str) -> None:
    torch.manual_seed(0)
    x = (torch.rand(40, FEATURES) > 0.5).float()
    if kind == "Bernoulli":
        prior, posterior = priors.RelaxedBernoulli(4), posteriors.RelaxedBernoulli(net(4))
    else:
        prior, posterior = priors.RelaxedOneHot(2, 2), posteriors.RelaxedOneHot(net(4), 2)
    vae = VAE(prior, likelihoods.Bernoulli(nn.mlp(4, FEATURES, hidden=(6,))), posterior)
    before = [p.clone() for p in vae.parameters()]
    fit(vae.model, vae.guide, x, epochs=3, batch_size=20, objective=objectives.ELBO(num_particles=2), progress=False)
    assert not any(torch.equal(a, b) for a, b in zip(before, vae.parameters(), strict=True))
    discrete = vae.discrete
    assert set(discrete.parameters()) == set(vae.parameters())
    assert not hasattr(discrete, "discrete")
    est = log_marginal(discrete.model, discrete.guide, x, num_particles=500, progress=False, proposal="guide")
    values = discrete.prior().enumerate_support()
    with torch.no_grad():
        joint = discrete.prior().log_prob(values)[:, None] + discrete.likelihood(values[:, None]).log_prob(x)
    assert float(((est.log_px - joint.double().logsumexp(0)) / est.std_error).abs().max()) < 5
    given = VAE(vae.prior.discrete, vae.likelihood, vae.posterior)  # relaxes the prior itself, with the same logits
    told = "relaxed discrete latent: log p\\(x\\) is that of the relaxed model"
    relaxed = log_marginal(vae.model, vae.guide, x, num_particles=5, progress=False, proposal="guide")
    assert re.search(told, " ".join(relaxed.notes))
    assert re.search(told, check(vae.model, vae.guide, x))
    assert not re.search(told, " ".join(est.notes) + check(discrete.model, discrete.guide, x))
    z = given.guide(x)
    torch.testing.assert_close(given.prior().log_prob(z), vae.prior().log_prob(z))
    assert given.discrete.prior is vae.prior.discrete


def test_relaxed_temperature_is_state() -> None:
    posterior = posteriors.RelaxedBernoulli(net(4))
    posterior.temperature.fill_(0.1)
    assert posterior.state_dict()["temperature"].item() == pytest.approx(0.1)
    torch.manual_seed(0)
    cold = posterior(torch.zeros(500, FEATURES)).sample()
    assert float(((cold < 0.05) | (cold > 0.95)).double().mean()) > 0.6


def test_per_datum_is_its_table() -> None:
    torch.manual_seed(0)
    posterior = posteriors.PerDatum(7, 4)
    x, index = data.indexed(torch.randn(7, FEATURES))
    rows = torch.tensor([6, 0, 3])
    fn = posterior(x[rows], context=index[rows]).base_dist
    (table,) = posterior.parameters()
    torch.testing.assert_close(fn.loc, table[rows, :2])
    torch.testing.assert_close(fn.scale, table[rows, 2:].exp())
    assert table.shape == (7, 4)
    assert float(table.detach().abs().max()) < 0.1


def test_per_datum_reaches_every_exact_posterior_and_refuses_new_data() -> None:
    pair, x = oracle()
    x = x[:20]
    torch.manual_seed(0)
    posterior = posteriors.PerDatum(20, posteriors.FullRank.outputs(2), posteriors.FullRank).double()

    def model(x: Tensor, context: Tensor) -> Tensor:
        return pair.model(x)

    def guide(x: Tensor, context: Tensor) -> Tensor:
        pyro.module("per_datum", posterior)
        with pyro.plate("data", len(x)):
            return pyro.sample("z", posterior(x, context=context))

    for lr in (0.1, 0.01):
        fit(model, guide, data.indexed(x), epochs=120, batch_size=20, progress=False,
            objective=Trace_ELBO(num_particles=10, vectorize_particles=True),
            optimizer=lambda ps, lr=lr: torch.optim.Adam(ps, lr=lr))  # fmt: skip
    gap = kl_divergence(posterior(x, context=torch.arange(20)), pair.posterior(x)).detach()
    assert float(gap.mean()) < 2e-2
    est = log_marginal(model, guide, data.indexed(x), num_particles=500, progress=False, proposal="guide")
    assert float((est.log_px - pair.log_px(x)).abs().max()) < 2e-2
    for index in (torch.tensor([3, 20]), torch.tensor([-1, 3])):
        with pytest.raises(DataError, match=r"from 0 to 19.*Refit"):
            posterior(x[:2], context=index)
    with pytest.raises(DataError, match=r"data\.indexed"):
        posterior(x[:2], context=torch.tensor([0.0, 1.0]))
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(nn.mlp(2, 5)), posteriors.PerDatum(20, 4))
    with pytest.raises((ContractError, DataError), match="Refit"):
        log_marginal(
            vae.model, vae.guide, data.indexed(torch.randn(30, 5)), num_particles=5, progress=False, proposal="guide"
        )


def per_datum(count: int) -> tuple[VAE, Tensor]:
    torch.manual_seed(0)
    likelihood = likelihoods.Bernoulli(nn.mlp(2, FEATURES, hidden=(6,)))
    x = (torch.rand(count, FEATURES, generator=torch.Generator().manual_seed(4)) > 0.5).float()
    x[:, 0], x[:, 1] = 1.0, torch.arange(count) % 2  # no row of zeros, which would stand for any datum
    return VAE(priors.StandardNormal(2), likelihood, posteriors.PerDatum(count, 4)), x


def test_per_datum_takes_no_other_data_under_the_same_index(tmp_path: Path) -> None:
    vae, x = per_datum(30)
    train, other = data.indexed(x), data.indexed(1 - x)
    with pytest.raises(UsageError, match=r"valid: PerDatum has parameters for the training data alone.*refit"):
        fit(vae.model, vae.guide, train, valid=other, epochs=1, progress=False)
    run = fit(vae.model, vae.guide, train, epochs=1, directory=tmp_path / "run", progress=False)
    again, _ = per_datum(30)
    loaded = load(tmp_path / "run", again.model, again.guide)
    for model, guide in ((run.model, run.guide), (loaded.model, loaded.guide)):
        some = tuple(t[3:20] for t in train)
        assert bool(
            log_marginal(model, guide, some, num_particles=5, progress=False, proposal="guide").log_px.isfinite().all()
        )
        for wrong in (other, (x.flip(0), train[1]), (x, train[1].roll(1))):
            with pytest.raises(DataError, match=r"PerDatum.*another datum at index.*Refit"):
                log_marginal(model, guide, wrong, num_particles=5, progress=False, proposal="guide")
    with pytest.raises(DataError, match="another datum"):
        fit(vae.model, vae.guide, other, epochs=1, progress=False)
    load(tmp_path / "run", vae.model, vae.guide)


def test_per_datum_tells_values_apart_and_precisions_not() -> None:
    vae, _ = per_datum(4)
    x, index = torch.randn(4, FEATURES).double(), torch.arange(4)
    vae.posterior(x, context=index)
    vae.double().float().eval()
    for same in (x.float(), x.float().double(), x):
        vae.posterior(same, context=index)
    for row in range(4):
        for column in range(FEATURES):
            moved = x.clone()
            moved[row, column] += 1e-4
            with pytest.raises(DataError, match=f"index {row}"):
                vae.posterior(moved, context=index)
    with pytest.raises(DataError, match="index 0"):
        vae.posterior(x.roll(1, dims=-1), context=index)


@pytest.mark.parametrize("rate", [0.5, 50.0])
def test_semi_amortized_never_ends_below_its_start(rate: float) -> None:
    torch.manual_seed(0)
    x = (torch.rand(50, FEATURES) > 0.5).double()
    posterior = perturbed(semi(2, rate=rate), by=1.0)
    gains = {}
    for steps in (0, 1, 8):
        posterior.steps = steps
        with torch.no_grad():
            fn = posterior(x).base_dist
            end = torch.cat([fn.loc, fn.scale.log()], -1)
            gains[steps] = posterior.elbo(x, end) - posterior.elbo(x, posterior.net(x))
        assert float(gains[steps].min()) >= -1e-12
    assert float(gains[0].abs().max()) < 1e-12
    assert float(gains[8].mean()) > 0.05


def test_semi_amortized_reaches_the_best_diagonal_guide() -> None:
    pair, x = oracle()
    network, decoder = torch.nn.Linear(5, 4).double(), torch.nn.Linear(2, 5).double()
    with torch.no_grad():
        network.weight.zero_()
        network.bias.zero_()
        decoder.weight.copy_(pair.weight)
        decoder.bias.copy_(pair.loc)
    likelihood = likelihoods.Normal(decoder, scale=pair.log_scale.exp().item()).double()
    prior = priors.StandardNormal(2).double()
    posterior = posteriors.SemiAmortized(network, prior, likelihood, steps=400, rate=0.9, through=False).double()
    with torch.no_grad():
        fn = posterior(x).base_dist
    exact = pair.posterior(x)
    torch.testing.assert_close(fn.loc, exact.loc, atol=1e-5, rtol=0)
    precision = exact.precision_matrix.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(fn.scale, precision.rsqrt().expand(100, 2), atol=1e-5, rtol=0)


def test_semi_amortized_gradient_goes_through_its_steps_or_past_them() -> None:
    x = (torch.rand(5, FEATURES, generator=torch.Generator().manual_seed(0)) > 0.5).double()
    slopes = {}
    for through in (True, False):
        torch.manual_seed(0)
        posterior = perturbed(semi(2, through=through))
        fn = posterior(x).base_dist
        loss = (fn.loc**2).sum() + fn.scale.log().sum()
        names, parameters = zip(*posterior.named_parameters(), strict=True)
        slopes[through] = dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))
        if through:  # against finite differences, in a decoder's and the network's own parameters
            for name in ("likelihood.net.0.weight", "net.2.bias"):
                p = dict(posterior.named_parameters())[name]
                direction = torch.randn_like(p)
                ends = []
                for by in (-1e-5, 1e-5):
                    with torch.no_grad():
                        p.add_(by * direction)
                        end = posterior(x).base_dist
                        ends.append(((end.loc**2).sum() + end.scale.log().sum()).item())
                        p.sub_(by * direction)
                expected = (ends[1] - ends[0]) / 2e-5
                assert (slopes[True][name] * direction).sum().item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert slopes[False]["likelihood.net.0.weight"] is None
    assert not torch.allclose(slopes[True]["net.2.bias"], slopes[False]["net.2.bias"])


def test_semi_amortized_past_its_steps_has_the_exact_derivative_of_independent_quadratics() -> None:
    """A decoder with orthogonal columns: d loc after the steps / d loc before, and values, are those through them."""
    decoder = torch.nn.Linear(3, 5).double()
    with torch.no_grad():
        decoder.weight.copy_(torch.linalg.qr(torch.randn(5, 3).double()).Q * torch.tensor([0.3, 1.0, 1.5]))
    likelihood = likelihoods.Normal(decoder, scale=0.7).double()
    x, outputs = torch.randn(4, 5).double(), torch.randn(4, 6).double()
    outputs[:, 3:] = -1.0  # no step leaps over the optimum
    outputs.requires_grad_()
    found = {}
    for through in (True, False):
        posterior = posteriors.SemiAmortized(
            torch.nn.Identity(), priors.StandardNormal(3), likelihood, steps=4, num_particles=6, through=through
        ).double()
        posterior.net = Constant(outputs)
        loc = posterior(x).base_dist.loc
        found[through] = loc, torch.autograd.grad((loc * torch.arange(12.0).reshape(4, 3)).sum(), outputs)[0][:, :3]
    torch.testing.assert_close(found[True], found[False])
    assert float(found[True][1].std()) > 0.1


class Constant(torch.nn.Module):
    def __init__(self, value: Tensor):
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value


def test_semi_amortized_past_its_steps_trains_its_network() -> None:
    """Four draws of noise, far fewer than dims: the ELBO at the network's own outputs stays beside the refined one.

    With a constant shift in place of the diagonal it falls hundreds of nats below, and training with it.
    """
    x = data.load("digits", binarize="fixed")[0].read()[:500].repeat(1, 8)
    torch.manual_seed(0)
    prior, likelihood = priors.StandardNormal(16), likelihoods.Bernoulli(nn.mlp(16, 512, hidden=(50,)))
    net = nn.mlp(512, 32, hidden=(50,))
    posterior = posteriors.SemiAmortized(net, prior, likelihood, num_particles=4, through=False)
    vae = VAE(prior, likelihood, posterior)
    fit(vae.model, vae.guide, x, epochs=15, batch_size=50, progress=False, compile=False)
    with torch.no_grad():
        start, fn = net(x), posterior(x).base_dist
        torch.manual_seed(0)
        bounds = [
            float((likelihood(z := q.rsample()).log_prob(x) + prior().log_prob(z) - q.log_prob(z)).mean())
            for q in (posterior.head(start), posterior.head(torch.cat([fn.loc, fn.scale.log()], -1)))
        ]
    assert bounds[0] > bounds[1] - 50
    assert bounds[1] > -240


@pytest.mark.parametrize("through", [True, False])
def test_semi_amortized_without_steps_is_the_normal_of_its_network(through: bool) -> None:
    network, likelihood = net(4), pair_of("SemiAmortized")[0].likelihood
    posterior = posteriors.SemiAmortized(network, priors.StandardNormal(2), likelihood, steps=0, through=through)
    x = torch.rand(5, 6).double().round()
    loc, log_scale = network.double()(x).chunk(2, -1)
    found = posterior.double()(x)
    torch.testing.assert_close(found.base_dist.loc, loc)
    torch.testing.assert_close(found.base_dist.scale, log_scale.exp())
    found.rsample().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_semi_amortized_pair_is_the_same_with_gradients_and_without() -> None:
    vae, (x,) = pair_of("SemiAmortized")
    z = torch.randn(3, 5, 2).double()
    with torch.no_grad():
        quiet = terms(vae.model, vae.guide, x, 3, values={"z": z})
    torch.testing.assert_close(terms(vae.model, vae.guide, x, 3, values={"z": z}).log_weight, quiet.log_weight)
    stl = terms(vae.model, vae.guide, x, 3, frozen=("guide",))
    torch.testing.assert_close(
        stl.log_guide, terms(vae.model, vae.guide, x, 3, values={"z": stl.guide["z"].value}).log_guide
    )  # fmt: skip
    for bad, word in (({"steps": -1}, "steps"), ({"num_particles": 3}, "even")):
        with pytest.raises(ValueError, match=word):
            posteriors.SemiAmortized(net(4), priors.StandardNormal(2), vae.likelihood, **bad)
    elsewhere = posteriors.SemiAmortized(net(4), priors.Dirichlet(2), vae.likelihood).double()
    with pytest.raises(ContractError, match=r"SemiAmortized: expected a prior over real vectors.*Dirichlet"):
        elsewhere(x)


def test_delta_trains_and_is_refused_by_log_marginal() -> None:
    torch.manual_seed(0)
    x = (torch.rand(30, FEATURES) > 0.5).float()
    likelihood = likelihoods.Bernoulli(nn.mlp(2, FEATURES, hidden=(6,)))
    vae = VAE(priors.StandardNormal(2), likelihood, posteriors.Delta(net(2)))
    run = fit(vae.model, vae.guide, x, epochs=20, batch_size=30, progress=False,
              optimizer=lambda ps: torch.optim.Adam(ps, lr=0.02))  # fmt: skip
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    with pytest.raises(ContractError, match=r"'z'.*Delta"):
        log_marginal(run.model, run.guide, x, num_particles=5, progress=False, proposal="guide")
    per_datum = VAE(priors.StandardNormal(2), likelihood, posteriors.PerDatum(30, 2, family=posteriors.Delta))
    fit(per_datum.model, per_datum.guide, data.indexed(x), epochs=1, progress=False)


@pytest.mark.parametrize("log_scale", [-12.0, 12.0])
@pytest.mark.parametrize("name", ["DiagonalNormal", "FullRank", "LowRank", "IAF", "SplineCoupling"])
def test_extreme_scales_are_finite_and_right(name: str, log_scale: float) -> None:
    torch.manual_seed(0)
    _, module = made(name)
    module = module if name != "SplineCoupling" else perturbed(flow(posteriors.SplineCoupling)(2))
    size = {"FullRank": 5, "LowRank": 6}.get(name, 4) if name not in ("IAF", "SplineCoupling") else 7
    outputs = torch.randn(3, size).double()
    outputs[:, 2:4] = log_scale
    outputs[:, 4:] *= math.exp(log_scale) if name in ("FullRank", "LowRank") else 1.0
    noise = torch.randn(3, 2).double()
    z = outputs[:, :2] + math.exp(log_scale) * noise
    exact = module.head(outputs).log_prob(z)
    single = module.float().head(outputs.float())
    assert bool(exact.isfinite().all())
    draws = single.rsample((100,))
    assert bool(single.log_prob(draws).isfinite().all())
    # float32 holds z - loc to |loc| eps / scale
    tolerance = 1e-4 if log_scale > 0 else 0.5
    torch.testing.assert_close(single.log_prob(z.float()).double(), exact, rtol=1e-4, atol=tolerance)


def test_extreme_outputs_of_bounded_posteriors_are_finite() -> None:
    torch.manual_seed(0)
    huge = torch.tensor([[-1e4, 0.0, 1e4], [80.0, -80.0, 0.0]])
    for posterior, outputs in (
        (posteriors.Dirichlet(torch.nn.Identity()), huge),
        (posteriors.LogisticNormal(torch.nn.Identity()), torch.cat([huge, torch.zeros(2, 3)], -1)),
        (posteriors.PowerSpherical(torch.nn.Identity()), huge * 1e15),
        (posteriors.Bernoulli(torch.nn.Identity()), huge),
        (posteriors.OneHot(torch.nn.Identity(), 3), huge),
        (posteriors.RelaxedBernoulli(torch.nn.Identity()), huge),
        (posteriors.RelaxedOneHot(torch.nn.Identity(), 3), huge),
    ):
        fn = posterior(outputs)
        z = fn.sample((200,))
        assert bool(fn.support.check(z).all()), type(posterior)
        assert bool(fn.log_prob(z).isfinite().all()), type(posterior)


def test_every_posterior_is_under_the_laws() -> None:
    assert {n.split()[0] for n in {**POSTERIORS, **POINT}} == set(posteriors.__all__)
