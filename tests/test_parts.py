"""Laws of conditionals and networks, each over a dict of constructors: a new part is tested by one line."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppvae import VAE, likelihoods, nn, posteriors, priors, terms
from ppvae.distributions import Bernoulli

LATENT, FEATURES = 3, 6

PRIORS: dict[str, Callable[[], torch.nn.Module]] = {"StandardNormal": lambda: priors.StandardNormal(LATENT)}


def decoder() -> torch.nn.Module:
    return nn.mlp(LATENT, FEATURES, hidden=(8,))


LIKELIHOODS: dict[str, Callable[[], torch.nn.Module]] = {
    "Bernoulli": lambda: likelihoods.Bernoulli(decoder()),
    "Normal fixed": lambda: likelihoods.Normal(decoder(), scale=0.5),
    "Normal learned": lambda: likelihoods.Normal(decoder(), scale="learned"),
    "Normal per dim": lambda: likelihoods.Normal(decoder(), scale=(FEATURES,)),
}
POSTERIORS: dict[str, Callable[[], torch.nn.Module]] = {
    "DiagonalNormal": lambda: posteriors.DiagonalNormal(nn.mlp(FEATURES, 2 * LATENT, hidden=(8,))),
}
NETWORKS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "mlp": (lambda: nn.mlp(4, 5, hidden=(6,)), (4,), (5,)),
    "mlp without hidden layers": (lambda: nn.mlp(4, 5, hidden=()), (4,), (5,)),
    "encoder 28": (lambda: nn.conv_encoder((1, 28, 28), 5, channels=(2, 3), hidden=4), (1, 28, 28), (5,)),
    "encoder 32 colour": (lambda: nn.conv_encoder((3, 32, 32), 5, channels=(2, 3), hidden=4), (3, 32, 32), (5,)),
    "encoder 28 flat": (lambda: nn.conv_encoder((1, 28, 28), 5, channels=(2, 3), hidden=4, flat=True), (784,), (5,)),
    "decoder 28": (lambda: nn.conv_decoder(4, (1, 28, 28), channels=(3, 2), hidden=4), (4,), (1, 28, 28)),
    "decoder 32 colour": (lambda: nn.conv_decoder(4, (3, 32, 32), channels=(3, 2), hidden=4), (4,), (3, 32, 32)),
    "decoder 28 flat": (lambda: nn.conv_decoder(4, (1, 28, 28), channels=(3, 2), hidden=4, flat=True), (4,), (784,)),
}


def data_for(name: str, *shape: int) -> Tensor:
    noise = torch.rand(*shape, generator=torch.Generator().manual_seed(1))
    return (noise > 0.5).float() if name.startswith("Bernoulli") else noise


@pytest.mark.parametrize("name", NETWORKS)
def test_network_takes_any_leading_dims(name: str) -> None:
    torch.manual_seed(0)
    make, inside, outside = NETWORKS[name]
    net, x = make().double(), torch.randn(2, 3, *inside).double()
    y = net(x)
    assert y.shape == (2, 3, *outside)
    torch.testing.assert_close(y[1, 2], net(x[1, 2]))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihood_is_over_one_datum_per_latent_and_broadcasts(name: str) -> None:
    torch.manual_seed(0)
    part = LIKELIHOODS[name]().double()
    z, x = torch.randn(4, 5, LATENT).double(), data_for(name, 5, FEATURES).double()
    fn = part(z)
    assert (fn.batch_shape, fn.event_shape) == ((4, 5), (FEATURES,))
    log_prob = fn.log_prob(x)
    torch.testing.assert_close(log_prob[2, 3], part(z[2, 3]).log_prob(x[3]))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihood_over_images(name: str) -> None:
    part = LIKELIHOODS[name]()
    part.net = nn.conv_decoder(LATENT, (1, 8, 8), channels=(2, 2), hidden=4)
    if name == "Normal per dim":
        part.log_scale = torch.nn.Parameter(torch.zeros(1, 8, 8))
    fn = part(torch.randn(4, 5, LATENT))
    assert (fn.batch_shape, fn.event_shape) == ((4, 5), (1, 8, 8))


@pytest.mark.parametrize("name", [n for n in LIKELIHOODS if n.startswith("Normal")])
def test_normal_likelihood_integrates_to_one(name: str) -> None:
    torch.manual_seed(0)
    part = LIKELIHOODS[name]().double()
    base = part(torch.randn(LATENT).double()).base_dist
    grid = torch.linspace(-30, 30, 200_001).double()
    density = base.expand((FEATURES,)).log_prob(grid[:, None]).exp()
    torch.testing.assert_close(torch.trapezoid(density, grid, dim=0), torch.ones(FEATURES).double(), atol=1e-6, rtol=0)


def test_bernoulli_sums_to_one_and_is_exact_at_extreme_logits() -> None:
    logits = torch.tensor([-800.0, -60.0, -25.0, -1.0, 0.0, 0.3, 25.0, 60.0, 800.0]).double()
    fn = Bernoulli(logits=logits)
    zero, one = fn.log_prob(torch.zeros(9).double()), fn.log_prob(torch.ones(9).double())
    torch.testing.assert_close(zero.exp() + one.exp(), torch.ones(9).double(), atol=1e-12, rtol=0)
    wanted = [-math.log1p(math.exp(-v)) if v > -700 else v for v in logits.tolist()]
    expected = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(
        one, dist.Bernoulli(logits=logits).log_prob(torch.ones(9).double()), rtol=1e-9, atol=1e-12
    )


def test_bernoulli_gradient_is_the_residual() -> None:
    logits = torch.linspace(-5, 5, 11).double().requires_grad_()
    x = (torch.arange(11) % 2).double()
    Bernoulli(logits=logits).log_prob(x).sum().backward()
    torch.testing.assert_close(logits.grad, x - torch.sigmoid(logits.detach()))


def test_bernoulli_refuses_grey_values() -> None:
    with pytest.raises(ValueError, match="support"):
        Bernoulli(logits=torch.zeros(2), validate_args=True).log_prob(torch.tensor([0.5, 1.0]))


@pytest.mark.parametrize("name", POSTERIORS)
def test_posterior_permutes_with_the_batch(name: str) -> None:
    torch.manual_seed(0)
    part, x = POSTERIORS[name]().double(), torch.randn(5, FEATURES).double()
    order = torch.tensor([3, 1, 4, 0, 2])
    z = torch.randn(5, LATENT).double()
    torch.testing.assert_close(part(x[order]).log_prob(z[order]), part(x).log_prob(z)[order])


def test_diagonal_normal_reads_location_then_log_scale() -> None:
    part = posteriors.DiagonalNormal(torch.nn.Identity())
    fn = part(torch.tensor([[1.0, 2.0, 0.0, math.log(3.0)]])).base_dist
    assert fn.loc.tolist() == [[1.0, 2.0]]
    torch.testing.assert_close(fn.scale, torch.tensor([[1.0, 3.0]]))


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_every_combination_has_a_finite_weight_and_a_gradient_everywhere(
    prior: str, likelihood: str, posterior: str
) -> None:
    torch.manual_seed(0)
    vae = VAE(PRIORS[prior](), LIKELIHOODS[likelihood](), POSTERIORS[posterior]())
    t = terms(vae.model, vae.guide, data_for(likelihood, 7, FEATURES), num_particles=4)
    assert t.log_weight.shape == (4, 7)
    assert bool(torch.isfinite(t.log_weight).all())
    t.log_weight.mean().backward()
    for name, p in vae.named_parameters():
        assert p.grad is not None, name
        assert bool((p.grad != 0).any()), name


def test_learned_scale_reports_its_floor() -> None:
    part = likelihoods.Normal(decoder(), scale="learned", floor=1e-2)
    assert not bool(part.at_floor)
    with torch.no_grad():
        part.log_scale.fill_(-20.0)
    assert bool(part.at_floor)
    assert part(torch.zeros(1, LATENT)).base_dist.scale.min().item() == pytest.approx(1e-2, rel=1e-4)


@pytest.mark.parametrize("scale", [0.0, -1.0, "fixed", None])
def test_normal_refuses_a_bad_scale(scale: object) -> None:
    with pytest.raises(ValueError, match="scale"):
        likelihoods.Normal(decoder(), scale=scale)  # type: ignore[arg-type]


class Conditional(torch.nn.Module):
    """A prior that is given the label."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = torch.nn.Parameter(torch.arange(2.0)[:, None].expand(2, LATENT).clone())

    def forward(self, *, context: Tensor) -> dist.TorchDistribution:
        return dist.Normal(self.loc[context], 1.0).to_event(1)


def test_a_part_that_declares_context_gets_the_second_tensor() -> None:
    vae = VAE(Conditional(), LIKELIHOODS["Bernoulli"](), POSTERIORS["DiagonalNormal"]())
    x, label = data_for("Bernoulli", 4, FEATURES), torch.tensor([0, 1, 1, 0])
    t = terms(vae.model, vae.guide, (x, label), num_particles=3)
    prior = dist.Normal(label[:, None].float().expand(4, LATENT), 1.0).to_event(1)
    torch.testing.assert_close(t.model["z"].log_prob, prior.log_prob(t.model["z"].value))
    with pytest.raises(ValueError, match="context"):
        vae.model(x)


def test_two_vaes_never_share_a_name() -> None:
    parts = [VAE(PRIORS["StandardNormal"](), decoder(), decoder()) for _ in range(2)]
    assert parts[0]._name != parts[1]._name
