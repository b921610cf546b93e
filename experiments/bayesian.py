"""Models with a posterior over their parameters, beside the right answers: log p of all data, and leave-one-out.

Each model is fitted to a small data set on mini-batches, on the ELBO for its global latents and IWAE for its local
ones. log p of all data integrates local latents inside, at each draw of the global ones; leave-one-out densities are by
PSIS-LOO, corrected for the guide. The right answers: for the mixture and the topics, the sum over all assignments of
data, or of words, to components, each in closed form; for the last layer, quadrature over its two weights and z; for
factor analysis, annealing from the prior over global and local latents, and NUTS on the model with z integrated out,
whose draws go to `arviz.loo`. The guides cover one of the equal modes of the posterior that have components, topics or
signs exchanged: "other modes" is the log of their number, which log p of all data by importance weights lacks where the
modes are well apart, and which leave-one-out does not contain."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import arviz as az
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor
from torch import nn as tnn

from experiments.cells import Cells, Workspace, group_cells, markdown, mean, run, train, values
from ppvae import likelihoods, log_marginal, nn, objectives, posteriors, priors
from ppvae.evaluation import annealed, loo
from ppvae.models import BayesianFactorAnalysis, BayesianGaussianMixture, BayesianTopicModel, LastLayerVAE


@dataclass(frozen=True)
class Settings:
    """The models, the schedule, and the draws of the evaluation; NUTS and annealing for factor analysis."""

    models: tuple[str, ...] = ("mixture", "topics", "last layer", "factor analysis")
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 600
    lr: float = 0.03
    particles: int = 2000
    local_particles: int = 50
    nuts_draws: int = 300
    temperatures: int = 200


SMOKE = {"seeds": (0,), "epochs": 2, "particles": 50, "local_particles": 2, "nuts_draws": 10, "temperatures": 3}
NOISE = 0.3  # of the last layer's data
OTHER_MODES = math.log(2)  # two components, two topics, or two signs of z


def load(model: str) -> Tensor:
    """The data of a model, float64."""
    generator = torch.Generator().manual_seed(4)
    if model == "mixture":
        x = torch.randn(10, 1, generator=generator).double()
        return 0.4 * x + torch.tensor([-1.0, 1.0]).double()[torch.arange(10) % 2, None]
    if model == "factor analysis":
        z, noise = torch.randn(25, 1, generator=generator), torch.randn(25, 3, generator=generator)
        return (z * torch.tensor([0.9, -0.7, 0.5]) + 0.5 * noise).double()
    if model == "topics":
        return torch.tensor([[2, 1, 0, 0], [0, 0, 1, 2], [1, 2, 0, 0], [1, 0, 1, 1]]).double()
    z, noise = torch.randn(2, 15, 1, generator=generator).double()
    return 1.5 * z.tanh() + 0.4 + NOISE * noise


def build(model: str, x: Tensor) -> Any:
    """The pair, float64."""
    if model == "mixture":
        return BayesianGaussianMixture.from_data(x, 2)
    if model == "factor analysis":
        return BayesianFactorAnalysis(len(x), x.shape[1], 1).double()
    if model == "topics":
        encoder = tnn.Sequential(nn.Log1p(), nn.mlp(4, 2, hidden=(16,)))
        return BayesianTopicModel(len(x), 4, priors.Dirichlet(2), posteriors.Dirichlet(encoder, floor=0.2)).double()
    encoder, likelihood = nn.mlp(1, 2, hidden=(16,)), likelihoods.Normal(tnn.Identity(), NOISE)
    prior, posterior = priors.StandardNormal(1), posteriors.DiagonalNormal(encoder)
    return LastLayerVAE(len(x), prior, tnn.Tanh(), likelihood, posterior, hidden=1, outputs=1, scale=2.0).double()


# -- right answers -----------------------------------------------------------------------------------------------------


def one_hot_assignments(count: int, components: int) -> Tensor:
    """Every assignment of `count` things to components, [components^count, count, components]."""
    every = torch.tensor(list(itertools.product(range(components), repeat=count)))
    return tnn.functional.one_hot(every, components).double()


def log_beta(concentration: Tensor) -> Tensor:
    """log of the multivariate beta function over the last dim."""
    return concentration.lgamma().sum(-1) - concentration.sum(-1).lgamma()


def mixture_evidence(x: Tensor, pair: BayesianGaussianMixture) -> float:
    """log p(x) of a mixture, summed over all assignments [N, features], each of which is normal-gamma."""
    a = one_hot_assignments(len(x), len(pair.loc))
    prior = torch.full((len(pair.loc),), pair.concentration).double()
    count, total, squares = a.sum(1)[..., None], a.mT @ x, a.mT @ x.square()
    kappa, shape = pair.kappa + count, pair.shape + count / 2
    rate = pair.rate + 0.5 * (squares - total.square() / kappa)
    log_p = torch.lgamma(shape) - math.lgamma(pair.shape) + pair.shape * math.log(pair.rate) - shape * rate.log()
    log_p = log_p + 0.5 * (math.log(pair.kappa) - kappa.log()) - count / 2 * math.log(2 * math.pi)
    return (log_p.sum((1, 2)) + log_beta(prior + a.sum(1)) - log_beta(prior)).logsumexp(0).item()


def topics_evidence(x: Tensor, pair: BayesianTopicModel) -> float:
    """log p(x) of documents [N, words] given their lengths, summed over all assignments of words to topics."""
    topics, words = pair.topics.log_concentration.shape
    document = torch.arange(len(x)).repeat_interleave(x.sum(1).long())
    word = torch.cat([torch.arange(words).repeat_interleave(row.long()) for row in x])
    a = one_hot_assignments(len(word), topics)
    alpha, smoothing = torch.ones(topics).double(), torch.full((words,), pair.smoothing).double()
    by_document = tnn.functional.one_hot(document, len(x)).double().T @ a
    by_topic = a.mT @ tnn.functional.one_hot(word, words).double()
    log_p = (log_beta(alpha + by_document) - log_beta(alpha)).sum(1)
    log_p = log_p + (log_beta(smoothing + by_topic) - log_beta(smoothing)).sum(1)
    orders = (x.sum(1) + 1).lgamma() - (x + 1).lgamma().sum(1)
    return (log_p.logsumexp(0) + orders.sum()).item()


def by_sums(evidence: Callable[..., float], x: Tensor, pair: Any) -> tuple[float, Tensor]:
    """(log p(x), leave-one-out densities [N]) from a function of the data."""
    log_px = evidence(x, pair)
    rows = torch.arange(len(x))
    return log_px, torch.tensor([log_px - evidence(x[rows != n], pair) for n in range(len(x))]).double()


def by_quadrature(x: Tensor, scale: float, points: int = 201) -> tuple[float, Tensor]:
    """(log p(x), leave-one-out densities [N]) of w tanh(z) + b with normal noise, on grids of w, b and z."""
    grid = torch.linspace(-5 * scale, 5 * scale, points).double()
    z = torch.linspace(-6, 6, 241).double()
    log_prior_z = dist.Normal(0.0, 1.0).log_prob(z) + math.log(float(z[1] - z[0]))
    parts = []
    for w in grid:
        mean = (w * z.tanh())[:, None, None] + grid[:, None]
        parts.append((dist.Normal(mean, NOISE).log_prob(x[:, 0]) + log_prior_z[:, None, None]).logsumexp(0))
    log_lik = torch.stack(parts)  # [w, b, N]
    log_prior = dist.Normal(0.0, scale).log_prob(grid) + math.log(float(grid[1] - grid[0]))
    joint = log_lik.sum(-1) + log_prior[:, None] + log_prior
    log_px = joint.logsumexp((0, 1))
    return log_px.item(), log_px - (joint[..., None] - log_lik).logsumexp((0, 1))


def by_chains(s: Settings, x: Tensor, pair: BayesianFactorAnalysis, seed: int) -> tuple[float, Tensor]:
    """(log p(x) by annealing, leave-one-out densities [N] by NUTS with z integrated out)."""
    est = annealed(
        pair.model, pair.guide, x, num_chains=64, num_temperatures=s.temperatures, start="prior", seed=seed,
        progress=False,
    )  # fmt: skip
    features, latent = pair.locations["weight"].shape
    noise_dims = len(pair.locations["precision"])

    def density(draw: dict[str, Tensor]) -> dist.TorchDistribution:
        variance = draw["precision"].reciprocal().expand(*draw["loc"].shape)
        return dist.LowRankMultivariateNormal(draw["loc"], draw["weight"], variance)

    def model(x: Tensor) -> None:
        one = torch.ones(()).double()
        alpha = pyro.sample("alpha", dist.Gamma(one, one).expand([latent]).to_event(1))
        scale = alpha.rsqrt().expand(features, latent)
        draw = {
            "weight": pyro.sample("weight", dist.Normal(torch.zeros_like(scale), scale).to_event(2)),
            "loc": pyro.sample("loc", dist.Normal(0 * one, one).expand([features]).to_event(1)),
            "precision": pyro.sample("precision", dist.Gamma(2 * one, one).expand([noise_dims]).to_event(1)),
        }
        with pyro.plate("data", len(x)):
            pyro.sample("x", density(draw), obs=x)

    pyro.set_rng_seed(seed)
    chain = MCMC(NUTS(model), s.nuts_draws, warmup_steps=s.nuts_draws // 2, disable_progbar=True)
    chain.run(x)
    draws = chain.get_samples()
    log_lik = torch.stack([density({n: v[i] for n, v in draws.items()}).log_prob(x) for i in range(s.nuts_draws)])
    tree = az.from_dict(posterior={"loc": draws["loc"][None].numpy()}, log_likelihood={"x": log_lik[None].numpy()})
    return est.log_px.item(), torch.tensor(az.loo(tree, pointwise=True, reff=0.7).loo_i.values)


def right_answer(s: Settings, model: str, x: Tensor, pair: Any, seed: int) -> tuple[float, Tensor]:
    """(log p(x), leave-one-out densities [N])."""
    if model in ("mixture", "topics"):
        return by_sums(mixture_evidence if model == "mixture" else topics_evidence, x, pair)
    return by_quadrature(x, pair.scale) if model == "last layer" else by_chains(s, x, pair, seed)


# -- the table ---------------------------------------------------------------------------------------------------------


def compute(s: Settings, workspace: Workspace, model: str, seed: int) -> dict[str, Any]:
    """Trains one model; log p of all data and leave-one-out densities, with the right ones."""
    x = load(model)
    torch.manual_seed(seed)
    pair = build(model, x)
    objective = objectives.ELBO(4) if model == "mixture" else objectives.IWAE(4)
    train(pair, x, None, workspace, epochs=s.epochs, lr=s.lr, seed=seed, objective=objective, batch_size=len(x) // 2)
    options = {"num_particles": s.particles, "local_particles": s.local_particles, "progress": False}
    est = log_marginal(pair.model, pair.guide, x, **options)
    accuracy = loo(pair.model, pair.guide, x, **options)
    log_px, exact = right_answer(s, model, x, pair, seed)
    return {
        "digest": est.digest, "log_px": est.log_px.item(), "log_px_error": est.std_error.item(), "right_log_px": log_px,
        "elpd": accuracy.total, "right_elpd": exact.sum().item(), "k_hat": accuracy.guide_k_hat,
        "largest": float((accuracy.elpd - exact).abs().max()), "unreliable_loo": int((~accuracy.reliable).sum()),
    }  # fmt: skip


def table(cells: Cells) -> str:
    """One row per model."""
    header = (
        "model", "seeds", "log p(x)", "right", "other modes", "k-hat of the guide", "elpd by loo", "right",
        "largest difference of a datum", "unreliable",
    )  # fmt: skip
    lines = []
    for (model,), r in group_cells(cells, "model").items():
        estimate = f"{mean(r, 'log_px'):.2f} ± {max(values(r, 'log_px_error')):.2f}"
        numbers = f"{mean(r, 'right_log_px'):.2f}", f"{OTHER_MODES:.2f}", f"{max(values(r, 'k_hat')):.2f}"
        accuracy = f"{mean(r, 'elpd'):.2f}", f"{mean(r, 'right_elpd'):.2f}", f"{max(values(r, 'largest')):.3f}"
        lines.append((model, len(r), estimate, *numbers, *accuracy, int(sum(values(r, "unreliable_loo")))))
    return markdown(header, lines)


def main(args: list[str] | None = None) -> None:
    """Computes the table."""
    run("bayesian", Settings, ("model", "seed"), compute, table, SMOKE, __doc__, args)


if __name__ == "__main__":
    main()
