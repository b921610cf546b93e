"""Annealed guides: log p(x) stays that of the base pair, and the gap of a wrong guide closes."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppvae import check, fit, likelihoods, log_marginal, nn, objectives, posteriors, priors, terms
from ppvae.errors import ContractError
from ppvae.evaluation import bracket, refined_log_marginal
from ppvae.inference.inspection import inspect
from ppvae.models import VAE, Annealed, HierarchicalVAE, JointPosterior, LinearGaussian
from tests.programs.strangers import PAIRS

pytestmark = pytest.mark.usefixtures("float64")


def base() -> LinearGaussian:
    torch.manual_seed(0)
    return LinearGaussian(5, 2, 0.5).double().requires_grad_(False).eval()


def wrong(x: Tensor) -> None:
    """A guide that knows nothing of x."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.full((len(x), 2), 0.3), 1.0).to_event(1))


def data() -> Tensor:
    return torch.randn(20, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("refresh", [True, False])
def test_weights_are_unbiased_for_p_x(refresh: bool):
    """The mean of p(x)'s estimates over 4000 particles is p(x) within 5 standard errors, before any training."""
    x, exact = data()[:4], base().log_px(data()[:4])
    pair = Annealed(base().model, wrong, x, steps=3, refresh=refresh, step_size=0.2)
    torch.manual_seed(0)
    with torch.no_grad():
        ratio = (terms(pair.model, pair.guide, x, 4000).log_weight - exact).exp()
    assert bool(((ratio.mean(0) - 1).abs() < 5 * ratio.std(0) / 4000**0.5).all())


@pytest.mark.parametrize("refresh", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_closes_the_gap_of_a_wrong_guide(refresh: bool):
    """Of 13.6 nats between log p(x) and the ELBO, four trained steps leave under a quarter."""
    x = data()
    pair = Annealed(base().model, wrong, x, steps=4, refresh=refresh)
    run = fit(
        pair.model, pair.guide, x, objective=objectives.ELBO(4), epochs=100, batch_size=20, progress=False,
        compile=False, optimizer=lambda ps: torch.optim.Adam(ps, lr=0.08),
    )  # fmt: skip
    est = log_marginal(run.model, run.guide, x, num_particles=1000, progress=False, proposal="guide")
    exact = base().log_px(x)
    before = float(
        (exact - log_marginal(base().model, wrong, x, num_particles=1000, progress=False, proposal="guide").elbo).mean()
    )
    assert float((exact - est.elbo).mean()) < 0.25 * before
    assert float(est.reliable.double().mean()) > 0.8
    assert bool(((est.log_px - exact).abs() < 5 * est.std_error)[est.reliable].all())  # 1e-5 by chance


def test_without_a_step_it_is_the_base_pair():
    pair, x = Annealed(base().model, wrong, data(), steps=3, step_size=1e-9), data()
    t = terms(pair.model, pair.guide, x, 5)
    z = t.model["z"].value
    expected = terms(base().model, wrong, x, 5, values={"z": z}).log_weight
    torch.testing.assert_close(t.log_weight, expected, atol=1e-6, rtol=0)


def hierarchical() -> Any:
    def normal(inputs: int, latent: int) -> posteriors.DiagonalNormal:
        return posteriors.DiagonalNormal(nn.mlp(inputs, 2 * latent, hidden=(5,)))

    decoder = likelihoods.Bernoulli(nn.mlp(3, 4, hidden=(5,)))
    return HierarchicalVAE(priors.StandardNormal(2), [normal(2, 3)], decoder, [normal(4, 3), normal(3, 2)]).double()


def folded() -> Any:
    """A pair whose decoder takes rows alone."""
    net = nn.mlp(2, 4, hidden=(5,)).double()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            assert z.dim() == 2
            pyro.module("decoder", net)
            pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 0.9).to_event(1))

    return model, guide


def subsampled() -> Any:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=5) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x[rows])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=5) as rows:
            pyro.sample("z", dist.Normal(0.6 * x[rows], 0.6).to_event(1))

    return model, guide


BASES = {"hierarchy": hierarchical, "folded": folded, "plate with a subsample": subsampled}


@pytest.mark.parametrize("name", BASES)
def test_other_pairs(name: str):
    """log p(x) is that of the base pair: off by 5 joint standard errors in one of 1e5 runs."""
    torch.manual_seed(0)
    built = BASES[name]()
    model, guide = (built.model, built.guide) if hasattr(built, "model") else built
    x = data()[:10, :4].gt(0).double()
    pair = Annealed(model, guide, x, steps=2, step_size=0.2)
    assert "_momentum': latent" in str(check(pair.model, pair.guide, x))
    assert inspect(pair.model, pair.guide, x).layout == ("folded" if name == "folded" else "vectorized")
    ours = log_marginal(pair.model, pair.guide, x, num_particles=2000, progress=False, proposal="guide")
    theirs = log_marginal(model, guide, x, num_particles=2000, progress=False, seed=1, proposal="guide")
    error = (ours.std_error**2 + theirs.std_error**2).sqrt()
    assert bool(((ours.log_px - theirs.log_px).abs() < 5 * error).all())


def test_a_base_pair_is_saved_moved_and_trained_with_it():
    vae = VAE(
        priors.StandardNormal(2), likelihoods.Bernoulli(nn.mlp(2, 4)), posteriors.DiagonalNormal(nn.mlp(4, 4))
    ).double()
    pair = Annealed(vae.model, vae.guide, data()[:3, :4], steps=2)
    names = {name for name, _ in pair.named_parameters()}
    assert len(names) == len(list(vae.parameters())) + 3
    assert {p.dtype for p in pair.float().parameters()} == {torch.float32}


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_gradients_past_its_maps_are_refused(gradient: str):
    """A guide held constant would leave temperatures and steps untrained; those of densities alone are taken."""
    pair, x = Annealed(base().model, wrong, data(), steps=2), data()
    assert set(inspect(pair.model, pair.guide, x).learned_maps) == {"z", "z_momentum"}
    with pytest.raises(ContractError, match=r"site 'z.*': expected a guide whose parameters.*pathwise"):
        objectives.ELBO(3, gradient=gradient).loss_and_grads(pair.model, pair.guide, x)
    joint = JointPosterior(base().model, lambda d: posteriors.FullRank(nn.mlp(5, 5)), x).double()
    assert inspect(joint.model, joint.guide, x).learned_maps == ()
    objectives.ELBO(2, gradient=gradient).loss_and_grads(joint.model, joint.guide, x)


def test_latents_that_leapfrog_steps_cannot_move():
    x = data()

    def sphere(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Dirichlet(torch.ones(len(x), 2)))

    def point(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(torch.zeros(len(x), 2), event_dim=1))

    def none(x: Tensor) -> None:
        pass

    for guide, words in (
        (sphere, "found Dirichlet over"),
        (point, "found Delta over"),
        (none, "Sample it in the guide"),
    ):
        with pytest.raises(ContractError, match=rf"site 'z': expected a latent .*{words}"):
            Annealed(base().model, guide, x)
    model, guide, batch = PAIRS["markov"]()  # its states are summed out
    with pytest.raises(ContractError, match="expected a latent"):
        Annealed(model, guide, batch)


def test_refined_proposals_are_of_its_base_pair():
    """Closed form p(x) = N(0, 1 + scale^2), by the scale that the run trained; six standard errors, and a bracket."""

    def model(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 0.7).to_event(1))

    x = 2 * data()[:, :3]
    pair = Annealed(model, guide, x, steps=2)
    options: Any = {"progress": False, "compile": False, "optimizer": lambda ps: torch.optim.Adam(ps, lr=0.05)}
    run = fit(pair.model, pair.guide, x, epochs=20, batch_size=20, **options)
    scale = run.model.scope.params["scale"].detach().exp()
    assert scale > 0.7
    for sides in ((run.model, run.guide), (pair.model, pair.guide)):
        est = refined_log_marginal(
            *sides, x, num_particles=500, guide_particles=500, posterior_draws=2, bracket_data=20, progress=False
        )
        exact = dist.Normal(0.0, (1 + scale**2).sqrt()).log_prob(x).sum(-1)
        assert bool(((est.log_px - exact).abs() < 6 * est.std_error + 1e-9).all())
        assert est.posterior is not None
        assert set(est.posterior) == {"z"}
        assert est.guide_estimate is not None
        assert float(est.guide_estimate.log_px.mean()) < float(exact.mean()) + 0.1
        assert est.settings["bracket_width"] < 0.01
        assert "base pair" in " ".join(est.notes)
    with pytest.raises(ContractError, match=r"found a helper\. Use proposal='refined'"):
        bracket(pair.model, pair.guide, x, proposal="guide", progress=False)
