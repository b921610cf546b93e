"""Laws of every model: it goes through check, fit, log_marginal, generate and captured steps as any other pair does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

from ppvae import check, data, fit, generate, likelihoods, load, log_marginal, nn, objectives, posteriors, priors, terms
from ppvae.inference.inspection import inspect
from ppvae.models import (
    VAE,
    Annealed,
    BayesianFactorAnalysis,
    BayesianGaussianMixture,
    BayesianTopicModel,
    Block,
    ConditionalVAE,
    CountVAE,
    DeepMarkovModel,
    DeepMixture,
    GaussianMixture,
    GaussianProcessVAE,
    HierarchicalVAE,
    JointPosterior,
    LadderVAE,
    LastLayerVAE,
    LinearGaussian,
    MultimodalVAE,
    QuantizedVAE,
    SemiSupervisedVAE,
    TableVAE,
    TopDownVAE,
    TopicModel,
    mixture_of_experts,
    product_of_experts,
    smoothed,
    stepwise,
    very_deep_vae,
)
from tests.compilation.test_compiled_steps import check_same
from tests.laws.law import Laws

Batch = tuple[Tensor, ...]


ELBO = functools.partial(objectives.ELBO, 2)
VIMCO = functools.partial(objectives.IWAE, 3, gradient="vimco")


@dataclass(frozen=True)
class Case:
    """A model, made anew at each call, its data, and the shape of what it generates."""

    make: Callable[[], Any]
    data: Callable[[], Batch]
    words: str  # what `check` says of it
    objective: Callable[[], Any] = ELBO

    def pair(self) -> tuple[Any, Any, Batch]:
        """(model, guide, batch) in float64, the same each time."""
        torch.manual_seed(0)
        made = self.make().double()
        return made.model, made.guide, self.data()


def real(rows: int = 6, features: int = 4) -> Batch:
    return (torch.randn(rows, features, generator=torch.Generator().manual_seed(1)).double(),)


def binary(rows: int = 6, features: int = 4) -> Batch:
    return (real(rows, features)[0].gt(0).double(),)


def labelled() -> Batch:
    return (*binary(), torch.tensor([0, 2, 1, 1, 0, 2]))


def partly_labelled() -> Batch:
    return (*binary(), torch.tensor([0, -1, 1, -1, 2, -1]))


def bits(inputs: int) -> likelihoods.Bernoulli:
    return likelihoods.Bernoulli(nn.mlp(inputs, 4, hidden=(5,)))


def normal(inputs: int, latent: int = 2) -> posteriors.DiagonalNormal:
    return posteriors.DiagonalNormal(nn.mlp(inputs, 2 * latent, hidden=(5,)))


def classes(inputs: int = 4) -> posteriors.OneHot:
    return posteriors.OneHot(nn.mlp(inputs, 3, hidden=(5,)), 3)


def conditional(of: Any = None) -> ConditionalVAE:
    return ConditionalVAE(priors.StandardNormal(2), bits(2 + 3), normal(4 + 3), of)


def semi_supervised() -> SemiSupervisedVAE:
    labels = priors.OneHot(3, learned=True)
    return SemiSupervisedVAE(labels, priors.StandardNormal(2), bits(2 + 3), normal(4 + 3), classes())


def deep_mixture() -> DeepMixture:
    prior = priors.ConditionalNormal(torch.nn.Linear(3, 2 * 2))
    return DeepMixture(priors.OneHot(3, learned=True), prior, bits(2), nn.ConcatContext(normal(4 + 3)), classes())


def hierarchical() -> HierarchicalVAE:
    layers, up = [normal(2, 3), normal(2)], [normal(4, 3), normal(3), normal(2)]
    return HierarchicalVAE(priors.StandardNormal(2), layers, bits(3), up)


def ladder() -> LadderVAE:
    up = [nn.mlp(4, 5, hidden=(5,)), nn.mlp(5, 5, hidden=(5,))]
    return LadderVAE(priors.StandardNormal(2), [normal(2, 3)], bits(3), up, [normal(5, 3), normal(5)])


def top_down() -> TopDownVAE:
    blocks = [Block(normal(5), normal(5 + 3), nn.Added(nn.mlp(2, 5, hidden=(5,)))) for _ in range(2)]
    return TopDownVAE(torch.zeros(5), blocks, bits(5), nn.mlp(4, 3, hidden=(5,)))


def images() -> Batch:
    return (real(6, 48)[0].mul(2).round().clamp(0, 3).div(3).reshape(6, 3, 4, 4),)


def very_deep() -> TopDownVAE:
    return very_deep_vae(*images(), sides=(1, 4), blocks=(1, 1), width=4, latent=2, components=2, levels=4)


def sequences() -> Batch:
    lengths = torch.tensor([3, 2, 1, 2, 3, 3])
    x = real(18, 3)[0].gt(0).double().reshape(6, 3, 3)
    return x * (torch.arange(3) < lengths[:, None]).unsqueeze(-1), lengths


def deep_markov() -> DeepMarkovModel:
    emission = likelihoods.Bernoulli(nn.mlp(2, 3, hidden=(5,)))
    encoder = nn.Backward(torch.nn.GRU(3, 4, batch_first=True))
    return DeepMarkovModel(2, normal(2), emission, encoder, normal(2 + 4))


def with_gaps() -> Batch:
    x = real(18, 3)[0].reshape(6, 3, 3)
    x[0, 2:] = x[3, 0] = x[4, :2] = torch.nan
    return (data.with_missing(x),)


def gaussian_process(steps: Any) -> GaussianProcessVAE:
    likelihood = likelihoods.Normal(nn.mlp(2, 3, hidden=(5,)))
    return GaussianProcessVAE(priors.GaussianProcess(2, 1.5), likelihood, normal(3), steps)


def modalities() -> Batch:
    present = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1], [0, 1], [1, 0]]).bool()
    return (*binary(), *real(6, 3), present)


def multimodal(experts: Any) -> MultimodalVAE:
    second = likelihoods.Normal(nn.mlp(2, 3, hidden=(5,)))
    return MultimodalVAE(priors.StandardNormal(2), [bits(2), second], [normal(4), normal(3)], experts)


def quantized(prior: Any, **options: Any) -> QuantizedVAE:
    encoder = nn.mlp(4, 2 * 3, hidden=(5,))
    return QuantizedVAE(prior, bits(2 * 3), encoder, nn.Codebook(3, 3), **options)


def quantized_relaxed() -> QuantizedVAE:
    return quantized(priors.OneHot(3, 2, learned=True), posterior=posteriors.RelaxedOneHot)


def counted(rows: int = 6, features: int = 4) -> Batch:
    x = torch.poisson(3 + 0 * real(rows, features)[0], generator=torch.Generator().manual_seed(2))
    x[:, 0] += 1
    return (x,)


def topics(prior: Any, posterior: Any) -> TopicModel:
    return TopicModel(prior, nn.Topics(3, 4), posterior)


def in_batches() -> Batch:
    return (*counted(), torch.tensor([0, 1, 1, 0, 1, 0]))


def counts(latent_library: bool) -> CountVAE:
    net = nn.mlp(2 + 2, 2 * 4, hidden=(5,))
    likelihood = likelihoods.ZeroInflatedNegativeBinomial(net, concentration=(4,), library=True)
    library = (priors.ConditionalNormal.of_labels(2, latent=1), normal(4 + 2, 1)) if latent_library else ()
    return CountVAE(priors.StandardNormal(2), likelihood, normal(4 + 2), 2, *library)


def mixed() -> Batch:
    x = torch.stack([real(6, 1)[0][:, 0], counted()[0][:, 0], *binary(6, 1)[0].T, torch.arange(6) % 3.0], -1)
    return (x,)


def bayesian_topics() -> BayesianTopicModel:
    return BayesianTopicModel(6, 4, priors.Dirichlet(3), posteriors.Dirichlet(nn.mlp(4, 3, hidden=(5,)), floor=0.1))


def last_layer() -> LastLayerVAE:
    likelihood = likelihoods.Bernoulli(torch.nn.Identity())
    features = nn.mlp(2, 5, hidden=(5,))
    return LastLayerVAE(6, priors.StandardNormal(2), features, likelihood, normal(4), hidden=5, outputs=4)


def joint() -> JointPosterior:
    decoder = bits(5).double()

    def model(x: Tensor) -> Any:
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", pyro.distributions.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            loc = top.sum(-1, keepdim=True).expand(*top.shape[:-1], 3)
            z = pyro.sample("z", pyro.distributions.Normal(loc, 1.0).to_event(1))
            pyro.module("joint_decoder", decoder)
            return pyro.sample("x", decoder(torch.cat([top, z], -1)), obs=x)

    full = posteriors.FullRank(nn.mlp(4, posteriors.FullRank.outputs(5), hidden=(5,)))
    return JointPosterior(model, lambda size: full, binary())


def plain(posterior: torch.nn.Module) -> VAE:
    return VAE(priors.StandardNormal(2), bits(2), posterior)


def annealed(refresh: bool) -> Annealed:
    base = plain(normal(4, 2)).double()
    return Annealed(base.model, base.guide, binary(), steps=3, refresh=refresh)


MODELS = {
    "probabilistic PCA": Case(lambda: LinearGaussian(4, 2), real, "site 'z': latent, MultivariateNormal"),
    "factor analysis": Case(lambda: LinearGaussian(4, 2, torch.ones(4)), real, "site 'z': latent, MultivariateNormal"),
    "mixture": Case(lambda: GaussianMixture(4, 3), real, "site 'c': enumerated"),
    "mixture, diagonal": Case(lambda: GaussianMixture(4, 3, rank=0), real, "site 'c': enumerated"),
    "mixture of factor analysers": Case(lambda: GaussianMixture(4, 3, rank=2), real, "site 'c': enumerated"),
    "conditional VAE": Case(lambda: conditional(nn.Labels(3)), labelled, "site 'z': latent, Normal"),
    "conditional VAE of features": Case(conditional, lambda: (*binary(), *real(6, 3)), "site 'z': latent, Normal"),
    "semi-supervised VAE": Case(semi_supervised, partly_labelled, "guide site 'y': enumerated"),
    "semi-supervised VAE without labels": Case(semi_supervised, binary, "guide site 'y': enumerated"),
    "hierarchical VAE": Case(hierarchical, binary, "guide site 'z3': latent"),
    "ladder VAE": Case(ladder, binary, "guide site 'z2': latent"),
    "top-down VAE": Case(top_down, binary, "guide site 'z2': latent, Normal"),
    "VDVAE": Case(very_deep, images, "guide site 'z1': latent, Normal over event [32]"),
    "deep Markov model": Case(deep_markov, sequences, "guide site 'z': latent, MarkovChain over event [3, 2]"),
    "topics, logistic-normal": Case(
        lambda: topics(priors.LogisticNormal(3), posteriors.LogisticNormal(nn.mlp(4, 6, hidden=(5,)))),
        counted, "model site 'theta': latent, LogisticNormalDistribution over event [3]",
    ),
    "topics, Dirichlet": Case(
        lambda: topics(priors.Dirichlet(3, learned=True), posteriors.Dirichlet(nn.mlp(4, 3, hidden=(5,)), floor=0.1)),
        counted, "model site 'theta': latent, DirichletDistribution over event [3]",
    ),
    "counts of a library size": Case(
        lambda: counts(False), lambda: (*in_batches(), torch.linspace(10.0, 20.0, 6).double()),
        "model site 'x': observed, ZeroInflated",
    ),
    "counts": Case(lambda: counts(True), in_batches, "guide site 'log_library': latent"),
    "Gaussian process VAE": Case(
        lambda: gaussian_process(smoothed), with_gaps, "guide site 'z': latent, GaussianProcessVector"
    ),
    "Gaussian process VAE, stepwise": Case(
        lambda: gaussian_process(stepwise), with_gaps, "guide site 'z': latent, GaussianProcessVector"
    ),
    "multimodal VAE, product of experts": Case(
        lambda: multimodal(product_of_experts), modalities, "model site 'x2': observed, Normal"
    ),
    "multimodal VAE, mixture of experts": Case(
        lambda: multimodal(mixture_of_experts), modalities, "guide site 'z': latent, NormalMixture"
    ),
    "quantised VAE": Case(
        lambda: quantized(priors.AutoregressiveOneHot(3, 2)), binary, "site 'z': latent, OneHotVector", VIMCO
    ),
    "quantised VAE, relaxed": Case(quantized_relaxed, binary, "site 'z': latent, Concrete"),
    "table": Case(
        lambda: TableVAE(["real", "count", "binary", ("categorical", 3)], latent=2, hidden=(5,)), mixed,
        "model site 'x': observed, Columns over event [4]",
    ),
    "Bayesian mixture": Case(
        lambda: BayesianGaussianMixture(6, 4, 3), real, "site 'loc': latent, Normal over event [3, 4], shared"
    ),
    "Bayesian factor analysis": Case(
        lambda: BayesianFactorAnalysis(6, 4, 2), real, "site 'weight': latent, Normal over event [4, 2], shared"
    ),
    "Bayesian PCA": Case(
        lambda: BayesianFactorAnalysis(6, 4, 2, isotropic=True), real, "site 'precision': latent, Gamma over event [1]"
    ),
    "topics, latent": Case(bayesian_topics, counted, "site 'topics': latent, Dirichlet over event [3, 4], shared"),
    "VAE, annealed": Case(lambda: annealed(True), binary, "guide site 'z_noise': auxiliary, Normal over event [3, 2]"),
    "VAE, Hamiltonian": Case(lambda: annealed(False), binary, "model site 'z_momentum': latent, Normal"),
    "two latents under a joint posterior": Case(
        joint, binary, "guide site 'joint_latent': auxiliary, MultivariateNormal over event [5]"
    ),
    "VAE of a mixture posterior": Case(
        lambda: plain(posteriors.Mixture([normal(4, 2), normal(4, 2)])), binary, "guide site 'z': latent, Stratified"
    ),
    "VAE with a Bayesian last layer": Case(
        last_layer, binary, "site 'weight': latent, Normal over event [6, 4], shared"
    ),
    "deep mixture": Case(deep_mixture, binary, "guide site 'y': enumerated"),
}  # fmt: skip
law = Laws(MODELS)


@pytest.fixture(autouse=True)
def clean():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


@law()
def test_check_says_what_it_is_and_particles_are_vectorised(name):
    case = MODELS[name]
    model, guide, batch = case.pair()
    words = str(check(model, guide, batch))
    assert case.words in words
    assert "vectorised under a plate" in words


@law()
def test_every_parameter_is_trained(name):
    case = MODELS[name]
    model, guide, batch = case.pair()
    run = fit(model, guide, batch, valid=batch, objective=case.objective(), epochs=2, batch_size=4, progress=False)
    joint = inspect(model, guide, batch).has_global_latents  # its ELBO is one of all data
    assert torch.tensor([run.metrics[n] for n in ("loss", *([] if joint else ["valid_elbo"]))]).isfinite().all()
    for name, p in model.__self__.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.isfinite().all()), name
        assert bool((p.grad != 0).any()), name


@law()
def test_log_px_is_estimated_and_samples_are_like_the_data(name):
    case = MODELS[name]
    model, guide, batch = case.pair()
    with torch.no_grad():
        est = log_marginal(model, guide, batch, num_particles=30, progress=False, proposal="guide")
        assert bool(est.log_px.isfinite().all())
        assert bool((est.log_px >= est.elbo - 1e-9).all())
        assert generate.samples(model, guide, batch, count=5).shape == (5, *batch[0].shape[1:])
        assert generate.reconstructions(model, guide, batch).shape == batch[0].shape


@law()
def test_a_saved_run_is_loaded_and_evaluated_as_it_was(name, tmp_path):
    case = MODELS[name]
    model, guide, batch = case.pair()
    run = fit(model, guide, batch, objective=case.objective(), epochs=1, directory=tmp_path / "run", progress=False)
    loaded = load(tmp_path / "run", *case.pair()[:2])
    before, after = (
        log_marginal(r.model, r.guide, batch, num_particles=10, progress=False, proposal="guide") for r in (run, loaded)
    )
    torch.testing.assert_close(after.log_px, before.log_px)
    assert generate.samples(loaded.model, loaded.guide, batch, count=2).shape == (2, *batch[0].shape[1:])


@law()
def test_captured_steps_are_its_own_to_the_last_bit(name, caplog):
    case = MODELS[name]
    check_same(case.pair, case.objective, caplog)


@law()
def test_a_permuted_batch_has_permuted_weights(name):
    case = MODELS[name]
    model, guide, batch = case.pair()
    s = inspect(model, guide, batch)
    order = torch.randperm(len(batch[0]), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        t = terms(model, guide, batch, 3)
        drawn = {n: v for n, v in t.guide.items() if n not in s.enumerated}
        values = {
            n: v.value if n in s.global_sites else v.value.index_select(v.value.dim() - s.event_dims[n] - 1, order)
            for n, v in drawn.items()
        }
        other = terms(model, guide, tuple(b[order] for b in batch), 3, values=values)
    torch.testing.assert_close(other.local.log_weight, t.local.log_weight[:, order])
