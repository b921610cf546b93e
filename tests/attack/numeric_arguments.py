"""The public functions and constructors that take numbers, found by their annotations, and a way to call each."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ppvae import data, evaluation, generate, likelihoods, models, nn, plots, posteriors, priors, report
from ppvae.objectives import ELBO, schedules
from ppvae.training import Run

ROOMS = (
    "ppvae", "ppvae.data", "ppvae.distributions", "ppvae.evaluation", "ppvae.generate", "ppvae.inference",
    "ppvae.likelihoods", "ppvae.models", "ppvae.nn", "ppvae.objectives", "ppvae.objectives.gradients",
    "ppvae.objectives.schedules", "ppvae.plots", "ppvae.posteriors", "ppvae.priors", "ppvae.report", "ppvae.training",
)  # fmt: skip
LEFT_OUT = {  # results and structures, which the library itself makes; distributions, whose numbers torch validates
    "Bracket", "Calibration", "Estimate", "Gaps", "GradientAudit", "Interval", "PredictiveAccuracy", "PredictiveCheck",
    "ProposalBracket", "Quadrature", "Representation", "Structure", "Terms",
    *(f"distributions.{name}" for name in (
        "Bernoulli", "Beta", "DiscretizedLogistic", "Levels", "MixtureOfDiscretizedLogistics", "StudentT")),
}  # fmt: skip
LEFT_OUT |= {  # what only the library calls, an abstract class, and names of columns by their kinds
    "inference.SVI", "inference.SVI.use", "inference.Structure.with_guide_sites", "inference.Structure.plate_scale",
    "inference.Structure.represented_size", "objectives.Objective", "data.LazySplit.fixed", "data.LazySplit.head",
    "evaluation.Calibration.verdict", "report.pictures", "report.write",
}  # fmt: skip
NOT_ONE_NUMBER = {"sample_shape", "batch_shape", "event", "options", "columns"}


class Worked(BaseException):
    """The pair is run: the arguments were taken."""


def program(*_: Any) -> None:
    """A model, or a guide, that must not be run before the arguments are checked."""
    raise Worked


RUN = Run(program, program, history=[])
X = torch.rand(20, 6, generator=torch.Generator().manual_seed(0)).round()
NET = torch.nn.Linear(6, 6)
NORMAL, BERNOULLI = priors.StandardNormal(3), likelihoods.Bernoulli(torch.nn.Linear(3, 6))
POSTERIOR = posteriors.DiagonalNormal(torch.nn.Linear(6, 6))


def of_pair(function: Callable[..., Any], *rest: Any) -> Callable[..., Any]:
    return partial(function, program, program, X, *rest)


def estimate() -> evaluation.Estimate:
    pair = models.LinearGaussian(6, 2)
    return evaluation.log_marginal(pair.model, pair.guide, X, num_particles=30, proposal="guide")


def _representation() -> evaluation.Representation:
    pair = models.LinearGaussian(6, 2)
    return evaluation.representation(pair.model, pair.guide, X, surgery_draws=0)


def calls() -> Mapping[str, Callable[..., Any]]:
    """{name: the function or constructor, with valid values of what it needs}; arguments are passed by name."""
    est = estimate()
    cases: dict[str, Callable[..., Any]] = {
        "fit": partial(_root("fit"), program, program, X, epochs=1),
        "log_marginal": of_pair(_root("log_marginal")), "terms": of_pair(_root("terms")),
        "evaluation.Estimate.bound": est.bound,
        "evaluation.coherence": partial(evaluation.coherence, torch.rand(2, 6), X),
        "evaluation.looseness": partial(evaluation.looseness, est, est),
        "evaluation.gradients": of_pair(evaluation.gradients, ELBO(2), ["pathwise"]),
        "evaluation.kfold": of_pair(evaluation.kfold, program),
        "generate.attribute_vector": of_pair(generate.attribute_vector, torch.arange(20) % 2),
        "generate.decode": of_pair(generate.decode, torch.zeros(20, 2)),
        "generate.interpolations": of_pair(generate.interpolations, X),
        "generate.moved": of_pair(generate.moved, torch.ones(2)),
        "objectives.schedules.Cyclical": partial(schedules.Cyclical, period=5),
        "objectives.schedules.Linear": partial(schedules.Linear, steps=5),
        "objectives.schedules.ScheduledScalar": partial(schedules.ScheduledScalar, schedule=1.0),
        "objectives.schedules.ScheduledScalar.set_step": schedules.ScheduledScalar(1.0).set_step,
        "objectives.Objective.set_step": ELBO(1).set_step,
        "priors.AutoregressiveCategorical": partial(priors.AutoregressiveCategorical, classes=3, variables=2),
        "priors.AutoregressiveOneHot": partial(priors.AutoregressiveOneHot, classes=3, variables=2),
        "priors.Categorical": partial(priors.Categorical, classes=3),
        "priors.OneHot": partial(priors.OneHot, classes=3),
        "priors.RelaxedOneHot": partial(priors.RelaxedOneHot, classes=3),
        "priors.Bernoulli.relaxed": priors.Bernoulli(3).relaxed,
        "priors.OneHot.relaxed": priors.OneHot(3).relaxed,
        "priors.ConditionalNormal.of_labels": partial(priors.ConditionalNormal.of_labels, num_labels=2, latent=3),
        "priors.LogisticNormal.like_dirichlet": partial(
            priors.LogisticNormal.like_dirichlet, latent=3, concentration=1.0
        ),
        "priors.VampPrior.from_data": partial(priors.VampPrior.from_data, POSTERIOR, X, components=3),
        "likelihoods.Mixed": partial(likelihoods.Mixed, NET, columns=("real",) * 3),
        "likelihoods.Column": partial(likelihoods.Column, kind="categorical", levels=3),
        "likelihoods.MixtureOfDiscretizedLogistics": partial(
            likelihoods.MixtureOfDiscretizedLogistics, NET, components=2
        ),
        "likelihoods.DiscretizedLogistic": partial(likelihoods.DiscretizedLogistic, NET),
        "posteriors.PerDatum": partial(posteriors.PerDatum, size=20, outputs=6, family=posteriors.DiagonalNormal),
        "posteriors.SemiAmortized": partial(posteriors.SemiAmortized, NET, NORMAL, BERNOULLI),
        "nn.MADE": partial(nn.MADE, features=6, latent=3, outputs=1),
        "nn.Codebook": partial(nn.Codebook, codes=4, size=3),
        "nn.ConcatContext": partial(nn.ConcatContext, NET), "nn.Leading": partial(nn.Leading, NET, event_dim=1),
        "nn.Gated": partial(nn.Gated, inputs=3, outputs=2),
        "nn.MaskedConv2d": partial(nn.MaskedConv2d, inputs=3, outputs=3, size=3, colours=1, itself=True),
        "nn.Nearness": partial(nn.Nearness, nn.Codebook(4, 3)),
        "nn.PixelCNN": partial(nn.PixelCNN, shape=(1, 4, 4), decoder=NET, features=2),
        "nn.Pyramid": partial(nn.Pyramid, channels=1, width=4, sides=(1, 2, 4), times=(1, 1, 1)),
        "nn.Residual": partial(nn.Residual, channels=4, activation=torch.nn.ELU),
        "nn.Topics": partial(nn.Topics, topics=2, words=6),
        "nn.Topics.from_data": partial(nn.Topics.from_data, X + 1, topics=2),
        "nn.conv_decoder": partial(nn.conv_decoder, inputs=3, shape=(1, 4, 4)),
        "nn.conv_encoder": partial(nn.conv_encoder, shape=(1, 4, 4), outputs=3),
        "nn.residual_decoder": partial(nn.residual_decoder, inputs=3, shape=(1, 4, 4)),
        "nn.residual_encoder": partial(nn.residual_encoder, shape=(1, 4, 4), outputs=3),
        "nn.known_times": partial(nn.known_times, steps=3, lengths=torch.tensor([1, 2])),
        "nn.mlp": partial(nn.mlp, inputs=3, outputs=2), "nn.gated_mlp": partial(nn.gated_mlp, inputs=3, outputs=2),
        "nn.on_images": partial(nn.on_images, channels=1, side=4),
        "nn.rows_of": partial(nn.rows_of, torch.zeros(3, 2), torch.tensor([1]), "an index"),
        "models.Annealed": of_pair(models.Annealed),
        "models.BayesianFactorAnalysis": partial(models.BayesianFactorAnalysis, size=20, features=6, latent=2),
        "models.BayesianGaussianMixture": partial(models.BayesianGaussianMixture, size=20, features=6, components=2),
        "models.BayesianGaussianMixture.from_data": partial(models.BayesianGaussianMixture.from_data, X, components=2),
        "models.BayesianTopicModel": partial(
            models.BayesianTopicModel, size=20, words=6, prior=priors.Dirichlet(3), posterior=posteriors.Dirichlet(NET)
        ),
        "models.ConditionalVAE": partial(models.ConditionalVAE, NORMAL, BERNOULLI, POSTERIOR),
        "models.CountVAE": partial(models.CountVAE, NORMAL, likelihoods.Poisson(NET), POSTERIOR, batches=2),
        "models.DeepMarkovModel": partial(models.DeepMarkovModel, latent=3, transition=NET, emission=NET, encoder=NET,
                                          combiner=NET),
        "models.GaussianMixture": partial(models.GaussianMixture, features=6, components=2),
        "models.GaussianMixture.from_data": partial(models.GaussianMixture.from_data, X, components=2),
        "models.LastLayerVAE": partial(models.LastLayerVAE, size=20, prior=NORMAL, features=NET, likelihood=BERNOULLI,
                                       posterior=POSTERIOR, hidden=6, outputs=6),
        "models.LinearGaussian": partial(models.LinearGaussian, features=6, latent=2),
        "models.LinearGaussian.maximum_likelihood": partial(models.LinearGaussian.maximum_likelihood, X, latent=2),
        "models.QuantizedVAE": partial(models.QuantizedVAE, priors.OneHot(4), BERNOULLI, NET, nn.Codebook(4, 3)),
        "models.SemiSupervisedVAE": partial(models.SemiSupervisedVAE, priors.OneHot(2), NORMAL, BERNOULLI, POSTERIOR,
                                            posteriors.OneHot(NET, classes=2)),
        "evaluation.Representation.active": partial(_representation().active, "z"),
        "report.least_reliable": partial(report.least_reliable, est),
        "report.write_generated": partial(report.write_generated, RUN, X, "."),
        "nn.Labels": nn.Labels,
        "models.TableVAE": partial(models.TableVAE, columns=("real",) * 6),
        "models.conditional_vae": partial(models.conditional_vae, X, num_labels=2),
        "models.semi_supervised_vae": partial(models.semi_supervised_vae, X, num_labels=2),
        "models.conv_vae": partial(models.conv_vae, torch.rand(5, 1, 4, 4).round()),
        "models.very_deep_vae": partial(
            models.very_deep_vae, torch.rand(5, 1, 4, 4), sides=(1, 2, 4), blocks=(1, 1, 1)
        ),
        "data.Split.head": data.load("digits")[0].head, "data.Split.fixed": data.load("digits")[0].fixed,
        "data.load": partial(data.load, "digits"), "data.first_rows": partial(data.first_rows, (X,), count=2),
        "plots.density_maps": partial(plots.density_maps, {"a": torch.zeros(100)}),
        "plots.image_grid": partial(plots.image_grid, torch.rand(4, 6), event_shape=(1, 2, 3)),
        "plots.parallel_coordinates": partial(plots.parallel_coordinates, {"a": {"b": X}}),
        "plots.plane": plots.plane,
    }  # fmt: skip
    for name in ("annealed", "bdmc", "bracket", "calibration", "gaps", "impute", "interval", "loo", "predictive_check",
                 "quadrature", "refined_log_marginal", "representation", "waic"):  # fmt: skip
        cases[f"evaluation.{name}"] = of_pair(getattr(evaluation, name))
    for name in (
        "posterior_means",
        "posterior_predictive",
        "prior_predictive",
        "reconstructions",
        "samples",
        "traversals",
    ):
        cases[f"generate.{name}"] = of_pair(getattr(generate, name))
    for name in ("MAF", "Autoregressive", "Bernoulli", "Dirichlet", "GaussianProcess", "Laplace", "LogisticNormal",
                 "MixtureOfNormals", "NeuralSpline", "Normal", "RealNVP", "RelaxedBernoulli", "StandardNormal",
                 "StudentT", "UniformOnSphere"):  # fmt: skip
        cases[f"priors.{name}"] = partial(getattr(priors, name), latent=3)
    for name in ("Autoregressive", "Categorical", "Laplace", "NegativeBinomial", "Normal", "StudentT",
                 "ZeroInflatedNegativeBinomial"):  # fmt: skip
        cases[f"likelihoods.{name}"] = partial(getattr(likelihoods, name), NET)
    for name in posteriors.__all__:
        cls = getattr(posteriors, name)
        if f"posteriors.{name}" not in public():
            continue
        if name in ("IAF", "SplineCoupling"):
            cases[f"posteriors.{name}"] = partial(cls, NET, latent=3, features=3)
        elif name in ("Categorical", "OneHot", "RelaxedOneHot"):
            cases[f"posteriors.{name}"] = partial(cls, NET, classes=3)
        elif f"posteriors.{name}" not in cases:
            cases[f"posteriors.{name}"] = partial(cls, NET)
    cases["models.table_vae"] = partial(models.table_vae, X, columns=("real",) * 6)
    for name in ("vae", "linear_gaussian", "factor_analysis", "gaussian_mixture"):
        cases[f"models.{name}"] = partial(getattr(models, name), X)
    with_sizes = ("IAF", "Categorical", "OneHot", "RelaxedOneHot", "SplineCoupling")
    made = {name: cases[f"posteriors.{name}"]() for name in with_sizes}
    made["LowRank"] = posteriors.LowRank(NET, rank=1)
    for name in posteriors.__all__:
        if hasattr(getattr(posteriors, name), "outputs"):
            cases[f"posteriors.{name}.outputs"] = made.get(name, getattr(posteriors, name)).outputs
    for name, (function, _) in public().items():
        if name.startswith("objectives.") and name not in cases:
            cases[name] = function
    return cases


def _root(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module("ppvae"), name)


def numbers(function: Any) -> list[str]:
    """The arguments of a function whose annotation has int or float in it."""
    target = function.__init__ if inspect.isclass(function) else function
    hints = typing.get_type_hints(target, include_extras=True)
    return [name for name in inspect.signature(function).parameters
            if _kinds(hints.get(name)) & {int, float} and name not in NOT_ONE_NUMBER]  # fmt: skip


def kinds(function: Any, name: str) -> set[Any]:
    """The types in the annotation of an argument."""
    target = function.__init__ if inspect.isclass(function) else function
    return _kinds(typing.get_type_hints(target, include_extras=True).get(name))


def _kinds(annotation: Any) -> set[Any]:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        return _kinds(arguments[0])
    if typing.get_origin(annotation) is typing.Literal:
        return {str}
    if not arguments:
        return {annotation}
    inner = [_kinds(a) for a in arguments if a is not Ellipsis and not isinstance(a, list)]
    return set().union({typing.get_origin(annotation)}, *inner)


def public() -> dict[str, tuple[Any, list[str]]]:
    """{name: (function or class, its arguments that are numbers)} of all rooms, methods counted in."""
    found: dict[str, tuple[Any, list[str]]] = {}
    seen: set[int] = set()
    for room in ROOMS:
        module = importlib.import_module(room)
        own = [
            n for n in dir(module) if not n.startswith("_") and getattr(getattr(module, n), "__module__", "") == room
        ]
        for name in getattr(module, "__all__", own):
            thing = getattr(module, name)
            label = f"{room}.{name}".removeprefix("ppvae.")
            if inspect.ismodule(thing) or not callable(thing) or id(thing) in seen:
                continue
            seen.add(id(thing))
            methods = vars(thing) if inspect.isclass(thing) else {}
            members = {label: thing} if name not in LEFT_OUT else {}
            members |= {f"{label}.{n}": getattr(thing, n) for n in methods
                        if not n.startswith("_") and inspect.isroutine(getattr(thing, n))}  # fmt: skip
            for member, function in members.items():
                if member in LEFT_OUT:
                    continue
                try:
                    arguments = numbers(function)
                except (TypeError, ValueError, NameError):
                    continue
                if arguments:
                    found[member] = function, arguments
    return found
