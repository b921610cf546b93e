"""Deltas that map auxiliary sites to latents: densities where the Jacobian is right, refused where it is not."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal

from ppvae import log_marginal
from ppvae.errors import ContractError
from ppvae.inference import inspect, terms

N = 6

pytestmark = pytest.mark.usefixtures("float64")

AUTOGUIDES = (AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal)


def proportions(x):
    """w ~ Dirichlet(a), shared by all classes x."""
    w = pyro.sample("w", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Categorical(w), obs=x)


def correlation(x):
    """L ~ LKJ(1), whose correlation is uniform in two dims, shared by all pairs x."""
    factor = pyro.sample("L", dist.LKJCholesky(2, torch.tensor(1.0)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor), obs=x)


def rates(x):
    """Four rates in a plate at dim -1, whose sum is Gamma(8, 1), shared by all counts x."""
    with pyro.plate("topics", 4):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Poisson(rate.sum(-1, keepdim=True)), obs=x)


def levels(x):
    """A latent shared by all data and one of each datum, both positive: with their logs, linear and Gaussian."""
    shared = pyro.sample("shared", dist.LogNormal(torch.tensor(0.0), 1.0))
    with pyro.plate("data", len(x)):
        own = pyro.sample("own", dist.LogNormal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(shared.log() + own.log(), 1.0), obs=x)


def log_px_of_classes(x):
    a = torch.tensor([1.0, 2.0, 3.0])
    counts = torch.bincount(x, minlength=3)
    return torch.lgamma(a.sum()) - torch.lgamma(a.sum() + len(x)) + (torch.lgamma(a + counts) - torch.lgamma(a)).sum()


def log_px_of_pairs(x):
    rho = torch.linspace(-1, 1, 20_003)[1:-1]
    factors = torch.zeros(len(rho), 2, 2)
    factors[:, 0, 0], factors[:, 1, 0], factors[:, 1, 1] = 1.0, rho, (1 - rho**2).sqrt()
    log_lik = dist.MultivariateNormal(torch.zeros(2), scale_tril=factors[:, None]).log_prob(x).sum(1)
    return log_lik.logsumexp(0) - math.log(len(rho) + 1)


def log_px_of_counts(x):
    total = float(x.sum())
    return math.lgamma(8 + total) - math.lgamma(8) - (8 + total) * math.log(1 + len(x)) - torch.lgamma(x + 1).sum()


def log_px_of_levels(x):
    return dist.MultivariateNormal(torch.zeros(len(x)), 2 * torch.eye(len(x)) + 1).log_prob(x)


SHARED = {
    "simplex": (proportions, torch.tensor([0, 2, 2, 1, 2, 0]), log_px_of_classes),
    "correlation": (correlation, torch.tensor([[0.5, 0.3], [-1.0, -0.8], [0.2, 0.6]]), log_px_of_pairs),
    "plate": (rates, torch.tensor([7.0, 9.0, 8.0]), log_px_of_counts),
    "local and global": (levels, torch.tensor([0.5, -0.3, 1.0]), log_px_of_levels),
}


@pytest.mark.parametrize("guide", AUTOGUIDES)
@pytest.mark.parametrize("name", SHARED)
def test_automatic_guides_are_densities_on_every_support(name, guide):
    model, x, log_px = SHARED[name]
    auto = guide(model, init_scale=0.5)
    auto(x)
    svi = pyro.infer.SVI(model, auto, pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO(2))
    for _ in range(150):
        svi.step(x)
    est = log_marginal(model, auto, x, num_particles=10_000, seed=1, proposal="guide")
    error = abs(float(est.log_px.sum() - log_px(x)))
    assert error < 4 * float(est.std_error.max()) + 0.02
    assert error < 0.1


# -- a helper of each datum -------------------------------------------------------------------------------------------


def positive(x):
    """z ~ LogNormal, x ~ Normal(log z): with log z, linear and Gaussian."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)


def real(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_through(make):
    """A guide whose helper has the exact posterior of log z, and whose Delta is a function of helper and data."""

    def guide(x):
        with pyro.plate("data", len(x)):
            h = pyro.sample("helper", dist.Normal(x / 2, 0.5**0.5), infer={"is_auxiliary": True})
            pyro.sample("z", make(h, x))

    return guide


@pytest.mark.parametrize(
    ("model", "make"),
    [
        (positive, lambda h, x: dist.Delta(h.exp(), log_density=-h)),
        (real, lambda h, x: dist.Delta(h)),
    ],
    ids=["exp", "identity"],
)
def test_a_delta_with_its_jacobian_gives_exact_weights(model, make):
    x = torch.randn(N)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    found = terms(model, guide_through(make), x, 3).log_weight
    torch.testing.assert_close(found, exact.expand(3, N), rtol=0, atol=1e-9)


def test_a_helper_in_several_dims_whose_map_is_no_elementwise_one():
    matrix = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.5], [1.0, 0.0, 1.0]])
    log_det = torch.linalg.slogdet(matrix).logabsdet

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide_with(log_density):
        def guide(x):
            posterior = dist.MultivariateNormal(x / 2, 0.5 * torch.eye(3))
            inverse = torch.linalg.inv(matrix)
            helper = dist.MultivariateNormal(posterior.loc @ inverse, inverse.T @ posterior.covariance_matrix @ inverse)
            with pyro.plate("data", len(x)):
                h = pyro.sample("helper", helper, infer={"is_auxiliary": True})
                pyro.sample("z", dist.Delta(h @ matrix, log_density=log_density, event_dim=1))

        return guide

    x = torch.randn(N, 3)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum(-1)
    found = terms(model, guide_with(-log_det), x, 3).log_weight
    torch.testing.assert_close(found, exact.expand(3, N), rtol=0, atol=1e-9)
    for wrong in (torch.tensor(0.0), log_det):
        with pytest.raises(ContractError, match="log_density"):
            terms(model, guide_with(wrong), x, 3)


@pytest.mark.parametrize(
    ("model", "make", "words"),
    [
        (positive, lambda h, x: dist.Delta(h.exp()), "'z'.*log_density = -log"),
        (positive, lambda h, x: dist.Delta(h.exp(), log_density=h), "'z'.*log_density = -log"),
        (real, lambda h, x: dist.Delta(2 * h), "'z'.*log_density = -log"),
        (real, lambda h, x: dist.Delta(x / 2), "'z'.*Delta"),
        (real, lambda h, x: dist.Delta(h.detach()), "'z'.*Delta"),
        (real, lambda h, x: dist.Delta(h.flip(0)), "'z'.*helpers of other data"),
        (real, lambda h, x: dist.Delta(h.mean() + 0 * h), "'z'"),
        (real, lambda h, x: dist.Delta(h.exp(), log_density=-h), "'z'.*over all of the prior's support"),
        (
            real,
            lambda h, x: dist.Delta(h.sigmoid(), log_density=-(h.sigmoid() * (-h).sigmoid()).log()),
            "'z'.*over all of the prior's support",
        ),
    ],
    ids=["forgotten", "sign", "scaled", "unrelated", "detached", "of others", "mean", "half line", "interval"],
)
def test_a_delta_that_is_no_change_of_variables_is_refused(model, make, words):
    """Each gave weights that look good: a density in which the Jacobian, or the helper, is missing."""
    with pytest.raises(ContractError, match=words):
        log_marginal(model, guide_through(make), torch.randn(N), num_particles=10, proposal="guide")
    assert inspect(model, guide_through(make), torch.randn(N), weights=False).weights_refusal


@pytest.mark.parametrize("guide", [AutoDiagonalNormal, AutoMultivariateNormal])
def test_one_helper_of_all_data_is_told_as_that_and_the_cure_works(guide):
    x = torch.randn(N)
    auto = guide(real)
    auto(x)
    with pytest.raises(ContractError, match=f"{N} dims in all.*as AutoNormal does"):
        terms(real, auto, x)
    auto = AutoNormal(real, init_scale=0.7)
    auto(x)
    assert log_marginal(real, auto, x, num_particles=10, progress=False, proposal="guide").log_px.isfinite().all()


@pytest.mark.parametrize("drawn_from", ["the latent", "the data, and the latent from it"])
def test_the_cures_of_a_helper_without_a_delta_give_exact_weights(drawn_from):
    x = torch.randn(N)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)

    def guide_with(infer):
        def guide(x):
            with pyro.plate("data", len(x)):
                if drawn_from == "the latent":
                    z = pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
                    pyro.sample("h", dist.Normal(z, 1.0), infer=infer)
                else:
                    h = pyro.sample("h", dist.Normal(x / 2, 1.0), infer=infer)
                    pyro.sample("z", dist.Normal((x + h) / 3, (1 / 3) ** 0.5))

        return guide

    def with_helper(x):  # the guide's density of the helper given the latent
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("h", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ContractError, match=r"'h'.*remove it, or mark a helper, which a Delta makes a latent"):
        terms(real, guide_with({}), x)
    with pytest.raises(ContractError, match=r"'h'.*Remove it where no latent is drawn from it; else sample it in the"):
        terms(real, guide_with({"is_auxiliary": True}), x)
    est = log_marginal(with_helper, guide_with({}), x, num_particles=4000, progress=False, proposal="guide")
    assert (est.log_px - exact).abs().max() < (1e-9 if drawn_from == "the latent" else 0.1)


def test_a_delta_beside_a_helper_that_another_delta_uses():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + w.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            h = pyro.sample(
                "helper", dist.Normal(torch.zeros(len(x), 3), 1.0).to_event(1), infer={"is_auxiliary": True}
            )
            pyro.sample("w", dist.Delta(h[..., :2], event_dim=1))
            pyro.sample("z", dist.Delta(x))

    with pytest.raises(ContractError, match=r"'z'.*Delta"):
        terms(model, guide, torch.randn(N))
