"""Several modalities, some missing, against linear algebra and the VAE of those that are there."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch

from ppvae import VAE, check, likelihoods, log_marginal, nn, posteriors, priors, terms
from ppvae.errors import ContractError, DataError
from ppvae.models import MultimodalVAE

pytestmark = pytest.mark.usefixtures("float64")
SIZES = (3, 2)
PRESENT = torch.tensor([[True, True], [True, False], [False, True], [True, True]])


class ExactExpert(torch.nn.Module):
    """What p(x | z) = N(x; w z + b, 0.8^2 I) says of z alone: a normal in z, of one dim."""

    def __init__(self, decoder: torch.nn.Linear):
        super().__init__()
        self.decoder = decoder

    def forward(self, x: torch.Tensor) -> dist.TorchDistribution:
        w = self.decoder.weight[:, 0]
        return dist.Normal(((x - self.decoder.bias) @ w / (w @ w))[:, None], 0.8 * (w @ w).rsqrt()).to_event(1)


def linear() -> MultimodalVAE:
    decoders = [torch.nn.Linear(1, size) for size in SIZES]
    return MultimodalVAE(
        priors.StandardNormal(1),
        [likelihoods.Normal(d, scale=0.8) for d in decoders],
        [ExactExpert(d) for d in decoders],
    )


def deep() -> MultimodalVAE:
    return MultimodalVAE(
        priors.StandardNormal(2),
        [likelihoods.Normal(nn.mlp(2, size, hidden=(5,))) for size in SIZES],
        [posteriors.DiagonalNormal(nn.mlp(size, 4, hidden=(5,))) for size in SIZES],
    )


def data() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(4, size) for size in SIZES)


def dense(vae: MultimodalVAE, x: torch.Tensor, which: list[int]) -> torch.Tensor:
    """log p of the modalities that are there: jointly normal where all is linear."""
    weight = torch.cat([vae.likelihoods[m].net.weight for m in which])
    bias = torch.cat([vae.likelihoods[m].net.bias for m in which])
    return torch.distributions.MultivariateNormal(bias, weight @ weight.T + 0.64 * torch.eye(len(bias))).log_prob(x)


def test_linear_modalities_are_jointly_normal_whichever_are_there():
    vae, x = linear(), data()
    whole = torch.cat(x, -1)
    exact = dense(vae, whole, [0, 1])
    exact[1], exact[2] = dense(vae, x[0], [0])[1], dense(vae, x[1], [1])[2]
    with torch.no_grad():
        est = log_marginal(vae.model, vae.guide, (*x, PRESENT), num_particles=30, progress=False)
        full = log_marginal(vae.model, vae.guide, x, num_particles=30, progress=False)
    assert float((est.log_px - exact).abs().max()) < 1e-9  # the product of exact experts is the posterior
    assert float((full.log_px - dense(vae, whole, [0, 1])).abs().max()) < 1e-9


def test_what_stands_for_a_missing_modality_is_not_looked_at():
    vae, x = deep(), data()
    z = terms(vae.model, vae.guide, (*x, PRESENT), 3).guide["z"].value
    others = [torch.where(PRESENT[:, m, None], t, 9 * torch.randn(t.shape)) for m, t in enumerate(x)]
    ours, theirs = (terms(vae.model, vae.guide, (*t, PRESENT), 3, values={"z": z}).log_weight for t in (x, others))
    torch.testing.assert_close(ours, theirs)


def test_one_modality_with_the_prior_as_an_expert_is_a_vae():
    """Of a posterior whose precision is one more than the network's own, its location nearer to 0."""
    vae, (x, _) = deep(), data()
    one = MultimodalVAE(vae.prior, list(vae.likelihoods)[:1], list(vae.posteriors)[:1])
    plain = VAE(vae.prior, vae.likelihoods[0], posteriors.DiagonalNormal(torch.nn.Identity()))
    loc, log_scale = vae.posteriors[0].net(x).chunk(2, -1)
    precision = 1 + (-2 * log_scale).exp()
    theirs = torch.cat([loc * (-2 * log_scale).exp() / precision, -precision.log() / 2], -1)
    t = terms(one.model, one.guide, x, 3)
    torch.testing.assert_close(t.log_guide, plain.posterior(theirs).log_prob(t.guide["z"].value))


@pytest.mark.parametrize("use", [
    lambda v, d: check(v.model, v.guide, d),
    lambda v, d: log_marginal(v.model, v.guide, d, num_particles=2, progress=False),
])  # fmt: skip
def test_a_datum_with_nothing_is_refused_by_its_row(use):
    none = PRESENT.clone()
    none[2] = False
    with pytest.raises(DataError, match="present: expected 1 to 2 modalities of each datum, found 0 at row 2"):
        use(deep(), (*data(), none))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="posteriors: expected one for each of 2 likelihoods, found 1"):
        MultimodalVAE(priors.StandardNormal(2), list(deep().likelihoods), list(deep().posteriors)[:1])
    vae = deep()
    with pytest.raises(DataError, match="data: expected 2 modalities"):
        check(vae.model, vae.guide, data()[:1])
    vae.prior = priors.Laplace(2)
    with pytest.raises(ContractError, match="prior: expected a normal with independent dims, found Laplace"):
        check(vae.model, vae.guide, data())
