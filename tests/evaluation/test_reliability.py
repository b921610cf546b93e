"""The reliability of an estimate: reasons that add up, what is recommended, and that the recommendation holds."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppvae import log_marginal
from ppvae.errors import ContractError, UsageError
from ppvae.evaluation import annealed, load_estimate, quadrature
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.importance.accumulators import LogWeightAccumulator
from ppvae.evaluation.reliability import assess_weights
from ppvae.models import LinearGaussian
from tests.evaluation.evidence.pairs import funnel, funnel_guide


@pytest.fixture(autouse=True)
def clean():
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()


def estimate(ess, k_hat, nonfinite=None, particles=1000, **words):
    ess, k_hat = torch.tensor(ess).double(), torch.tensor(k_hat).double()
    broken = torch.zeros_like(ess) if nonfinite is None else torch.tensor(nonfinite).double()
    log_px = torch.zeros_like(ess)
    return Estimate(log_px, 0.1 + log_px, ess, k_hat, log_px, broken, particles, 0, 3, "density", **words)


def test_reasons_are_apart_and_add_up_to_what_is_not_reliable():
    ess = [49.9, 50.0, 10.0, 500.0, 500.0, 500.0, math.nan]
    k_hat = [0.1, 0.1, 0.9, 0.9, math.nan, 0.2, math.nan]
    est = estimate(ess, k_hat, [0, 0, 0, 0, 0, 2, 1])
    heavy, low, broken = est.reliability.reasons.values()
    assert low.tolist() == [True, *[False] * 6]
    assert heavy.tolist() == [False, False, True, True, True, False, False]
    assert broken.tolist() == [*[False] * 5, True, True]
    assert torch.equal(heavy.int() + low.int() + broken.int(), (~est.reliable).int())
    words = est.reliability.summary
    assert words.startswith("85.7 % of the data (6 of 7) are unreliable: ")
    for text in (
        "3 with a heavy tail (95 % limit of k_hat not below 0.60)",
        "1 with ess below 50",
        "2 with non-finite weights",
    ):
        assert text in words
    assert words in est.summary()
    assert est.table()["reliability"] == words
    assert "check the densities of the 2 with non-finite weights" in est.reliability.recommendation


def test_what_is_advised_on_weights_that_are_not_finite_holds():
    """A draw of the tails of a refined proposal, a < -104, makes exp(a) zero in float32, and the density NaN.

    About a third of all seeds have one: none of 20 has with a probability of 3e-4.
    """
    x, options = torch.tensor([0.5]), {"num_particles": 20_000, "proposal": "refined"}

    def bounded(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 2.5))
            b = pyro.sample("b", dist.Normal(0.0, a.exp().clamp(min=1e-15)))
            pyro.sample("x", dist.Normal(b, 0.3), obs=x)

    runs = (log_marginal(funnel, funnel_guide, x, seed=seed, **options) for seed in range(20))
    broken = next(est for est in runs if est.nonfinite.item())
    options["seed"] = broken.seed
    assert not broken.reliable.item()
    assert "a scale underflows to 0" in broken.reliability.recommendation
    for model, at in ((bounded, x), (funnel, x.double())):
        mended = log_marginal(model, funnel_guide, at, **options)
        assert mended.nonfinite.item() == 0
        assert math.isfinite(mended.nll)


def test_the_particles_that_are_advised_are_those_that_ess_asks_for():
    est = estimate([40.0, 25.0, 100.0], [0.1, 0.1, 0.1], remedy="a remedy")
    assert est.reliability.recommendation == "about K = 2,000 particles for 2 of them"
    est = estimate([40.0, 0.25, 60.0], [0.1, 0.1, 0.9], remedy="a remedy")  # 200,000 are too many
    assert est.reliability.recommendation == "about K = 1,300 particles for 1 of them; for 2: a remedy"
    assert est.table()["what to do"] == est.reliability.recommendation
    assert estimate([60.0], [0.1]).reliability.recommendation == ""
    assert "what to do" not in estimate([60.0], [0.1]).table()
    few = estimate([10.0], [0.1], particles=20)
    assert few.reliability.recommendation == ""
    assert "non-finite" not in few.summary()
    assert "1 datum has non-finite weights" in estimate([10.0], [0.1], [3], particles=20).summary()
    assert few.reliability.summary == "fewer than 25 particles (20): too few to judge any datum"


def test_the_advice_holds():
    """A guide that is too wide has a low ess and light tails: with the particles advised nearly all can be trusted."""
    torch.manual_seed(1)
    pair = LinearGaussian(6, 3).double()
    x = torch.randn(60, 6).double()

    def wide(x):
        pyro.module("pair", pair)
        fn = pair.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(fn.mean, 9 * fn.covariance_matrix))

    est = log_marginal(pair.model, wide, x, num_particles=400, proposal="guide")
    assert int((~est.reliable).sum()) > 20
    assert est.reliability.reasons["ess below 50"].sum() > 15
    (found,) = re.findall(r"about K = ([\d,]+) particles", est.reliability.recommendation)
    more = log_marginal(pair.model, wide, x, num_particles=int(found.replace(",", "")), seed=1, proposal="guide")
    assert more.num_particles < 10_000
    assert more.reliable.double().mean() > 0.9


def discrete(x):
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(torch.ones(3)))
        pyro.sample("x", dist.Normal(8.0 * c, 0.1), obs=x)


def guess(x):
    with pyro.plate("data", len(x)):
        pyro.sample("c", dist.Categorical(torch.tensor([0.98, 0.01, 0.01])))


def test_what_helps_depends_on_the_latents(tmp_path):
    est = log_marginal(discrete, guess, torch.full((5,), 16.0), num_particles=400, proposal="guide")
    assert not est.reliable.any()
    assert "'c' summed out by infer={'enumerate': 'parallel'}" in est.summary()
    assert "annealed" not in est.summary()
    for latent, word in ((2, "quadrature"), (5, "evaluate --method annealed")):
        pair = LinearGaussian(8, latent).double()
        est = log_marginal(
            pair.model, prior_of(latent), 3 * torch.ones(20, 8).double(), num_particles=100, proposal="guide"
        )
        assert not est.reliable.any()
        assert word in est.summary()
        assert ("quadrature" in est.summary()) == (latent < 4)
        again = load_estimate(est.save(tmp_path))
        assert again.summary() == est.summary()


@pytest.mark.parametrize(("side", "latent"), [("guide", 1), ("guide", 2), ("model", 1), ("model", 2)])
def test_quadrature_is_recommended_where_each_datum_has_a_latent_once(side, latent):
    """A latent that is drawn for each value of an enumerated site has coordinates for each: 2 dims, 3 values, 6."""

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1) + y, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            y = torch.zeros(len(x))
            if side == "guide":
                y = pyro.sample("y", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(0.1 * y[..., None].expand(*y.shape, latent), 1.0).to_event(1))

    x = 3 * torch.randn(6)
    est = log_marginal(model, guide, x, num_particles=30, proposal="guide")
    assert not est.reliable.all()
    assert (f"quadrature (ppvae.evaluation.quadrature: {latent} dims" in est.summary()) == (side == "model")
    assert ("quadrature" in est.summary()) == (side == "model")
    assert "ppvae.evaluation.annealed" in est.summary()
    if side == "guide" and latent == 2:
        with pytest.raises(UsageError, match="found 6"):
            quadrature(model, guide, x)
    if side == "model":
        each = dist.Normal(torch.arange(3.0), (latent + 0.25) ** 0.5).log_prob(x[:, None])
        exact = each.logsumexp(-1) - math.log(3)
        assert torch.allclose(quadrature(model, guide, x).log_px, exact.double(), atol=1e-4)


def test_quadrature_is_not_recommended_for_latents_of_some_data():
    def model(x, known):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0).mask(known))
            pyro.sample("x", dist.Normal(torch.where(known, z, 0.0), 0.02), obs=x)

    def guide(x, known):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 2.0).mask(known))

    batch = torch.ones(6), torch.arange(6) < 3
    est = log_marginal(model, guide, batch, num_particles=30, proposal="guide")
    assert "annealed" in est.summary()
    assert "quadrature" not in est.summary()
    with pytest.raises(ContractError, match="masked ones"):
        quadrature(model, guide, batch)


def prior_of(latent):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(latent).double(), 1.0).to_event(1))

    return guide


def test_an_annealed_estimate_has_reasons_of_its_own():
    pair = LinearGaussian(4, 2).double()
    est = annealed(pair.model, pair.mean_field, torch.ones(4, 4).double(), num_chains=4, num_temperatures=5)
    assert list(est.reliability.reasons)[1] == "ess below 2 of 4 chains"
    one = torch.ones(3).double()
    stuck = Estimate(
        one, one, torch.tensor([1.0, 9.0, 9.0]).double(), one, one, 0 * one, 10, 0, 3, "density",
        method="annealed importance sampling", reliable_override=torch.tensor([False, False, True]),
        diagnostics={"acceptance": torch.tensor([0.9, 0.1, 0.9])},
    )  # fmt: skip
    assert [int(which.sum()) for which in stuck.reliability.reasons.values()] == [1, 1, 0]
    assert "more temperatures and more chains" in stuck.reliability.recommendation
    assert "1 with a low acceptance rate" in stuck.reliability.recommendation


def test_the_tail_of_a_ridge_is_never_called_reliable():
    """A mean-field guide on a ridge: the weights' tail has shape 6/7. Judged one by one, of 400 data 16 to 34 % pass.

    The posterior has precision I + 6 (1 1') and the guide its diagonal; log p(x) = 0 by construction.
    """
    precision = torch.eye(2).double() + 6.0 * torch.ones(2, 2).double()
    diagonal = precision.diagonal()
    for count in (1000, 5000):
        generator = torch.Generator().manual_seed(count)
        weights = LogWeightAccumulator(count, ())
        for _ in range(count // 1000):
            u = torch.randn(1000, 200, 2, generator=generator, dtype=torch.float64) / diagonal.sqrt()
            log_p = 0.5 * precision.logdet() - 0.5 * torch.einsum("kni,ij,knj->kn", u, precision, u)
            log_w = log_p - (0.5 * diagonal.log() - 0.5 * diagonal * u.square()).sum(-1)
            weights.add(log_w, log_w)
        found = weights.result()
        alone = (found["ess"] >= 50) & (found["k_hat"] < min(0.7, 1 - 1 / math.log10(count)))
        assert int(alone.sum()) > 20
        particles = torch.full((200,), count)
        judged = assess_weights(**{n: found[n] for n in ("ess", "k_hat", "nonfinite")}, particles=particles)
        assert not judged.reliable.any()


def test_light_tails_of_a_good_guide_stay_reliable():
    """A normal guide 5 % too wide in ten dims: nearly all of 200 data pass, as they did by themselves."""
    generator = torch.Generator().manual_seed(0)
    u = 1.05 * torch.randn(1000, 200, 10, generator=generator, dtype=torch.float64)
    log_w = (0.5 * (u / 1.05).square() - 0.5 * u.square() + math.log(1.05)).sum(-1)
    weights = LogWeightAccumulator(1000, ())
    weights.add(log_w, log_w)
    found = weights.result()
    judged = assess_weights(**{n: found[n] for n in ("ess", "k_hat", "nonfinite")}, particles=torch.full((200,), 1000))
    assert float(judged.reliable.double().mean()) > 0.98


def test_a_single_datum_is_said_in_the_singular():
    """Not "all 1 data are reliable", nor "100.0 % of the data (1 of 1) are unreliable"."""
    good, bad = (estimate([ess], [0.1], [nonfinite], particles=1000) for ess, nonfinite in ((900.0, 0), (10.0, 0)))
    assert "over 1 datum (" in good.summary()
    assert "the datum is reliable" in good.summary()
    assert "the datum is unreliable: ess below 50; its log p(x) may be far too low" in bad.summary()
