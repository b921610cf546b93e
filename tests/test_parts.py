"""Laws of conditionals together: what composes, and what a part that declares a context is given."""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppvae import VAE, likelihoods, nn, posteriors, priors, terms

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


def data_for(name: str, *shape: int) -> Tensor:
    noise = torch.rand(*shape, generator=torch.Generator().manual_seed(1))
    return (noise > 0.5).float() if name.startswith("Bernoulli") else noise


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
