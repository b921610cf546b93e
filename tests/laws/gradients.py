"""Means of gradient estimates against exact gradients, which are sums over all draws of a toy.

Statistical laws fail wrongly with probability below FAILURE in all, over every coordinate of every gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ppvae.objectives import Objective
from ppvae.objectives.gradients import REBAR, DoubleCV, ScoreFunction
from tests.laws.objectives import EstimatorCase, ObjectiveCase, inspected_once
from tests.programs.toys import AFTER, BITS, DATUM, ENUMERATED, MIXED, ONE, SHARED, TWO, Toy

FAILURE, COORDINATES = 1e-6, 2000
LIMIT = NormalDist().inv_cdf(1 - FAILURE / (2 * COORDINATES))
SIZE = 10_000
TOYS = {"one": ONE, "shared": SHARED, "two": TWO, "bits": BITS, "mixed": MIXED, "after": AFTER, "enum": ENUMERATED}
REPARAMETERIZED, DISCRETE = ("one", "shared", "two"), ("bits", "mixed", "after")

Gradients = dict[str, Tensor]


def samples(toy: Toy, objective: Objective, size: int = SIZE, seed: int = 0, shared: bool = True) -> Gradients:
    """Independent estimates of the bound's gradient, [size] by parameter; `shared`: of a pair inspected once."""
    pyro.clear_param_store()
    model, guide, x, params = _pair(toy, size) if shared else toy.pair(size)
    torch.manual_seed(seed)
    with inspected_once():
        averages = isinstance(objective.gradient, ScoreFunction | DoubleCV | REBAR)  # which are empty in a first step
        for _ in range(2 if averages else 1):
            for p in params.values():
                p.grad = None
            objective.loss_and_grads(model, guide, x)
    return {n: torch.zeros(size) if p.grad is None else -p.grad for n, p in params.items()}


def folded_samples(toy: Toy, objective: Objective, size: int = 500, runs: int = 150) -> Gradients:
    """Estimates from many runs over parameters that all data share."""
    pyro.clear_param_store()
    params = {n: nn.Parameter(torch.tensor(v)) for n, v in toy.values.items()}

    def side(body, names):
        def run(x):
            own = {n: pyro.param(f"folded.{n}", params[n]) for n in names}
            with pyro.plate("data", len(x)):
                body(own, x)

        return run

    model, guide = side(toy.model, toy.model_params), side(toy.guide, toy.guide_params)
    x = torch.full((size,), DATUM)
    torch.manual_seed(0)
    found = {n: [] for n in params}
    for _ in range(runs):
        for p in params.values():
            p.grad = None
        objective.loss_and_grads(model, guide, x)
        for n, p in params.items():
            found[n].append(-p.grad / size)
    return {n: torch.stack(g) for n, g in found.items()}


def _pair(toy: Toy, size: int) -> Any:
    """The pair of a toy, made once."""
    if (id(toy), size) not in _pairs:
        _pairs[id(toy), size] = (toy, toy.pair(size))
    return _pairs[id(toy), size][1]


_pairs: dict[tuple[int, int], tuple[Toy, Any]] = {}


def errors(found: Gradients, exact: dict[str, float]) -> dict[str, float]:
    """Standard errors between the mean of samples and its expectation, by parameter."""
    size = len(next(iter(found.values())))
    # a gradient without variance has rounding errors alone
    return {n: abs(float(found[n].mean()) - e) / (float(found[n].std()) / size**0.5 + 1e-9) for n, e in exact.items()}


@functools.cache
def exact(toy: str, count: int, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """The gradient of E[reduce(log-weights of `count` draws)]."""
    return TOYS[toy].gradient(count, reduce)


def check_gradient_is_unbiased(case: ObjectiveCase, estimator: EstimatorCase, toy: str) -> None:
    """The mean of the estimates is the gradient of the expectation of the objective's value."""
    assert case.reduce is not None
    found = errors(samples(TOYS[toy], case.build(2, estimator.build())), exact(toy, case.draws, case.reduce))
    assert max(found.values()) < LIMIT, found


def exact_of_surrogate(toy: Toy, count: int, surrogate: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
    """The mean of an estimator that is the gradient of surrogate(log_joint, log_q) at draws that are held constant."""
    params = toy.leaves()

    def of(points: Any, indices: tuple[Tensor, ...]) -> Tensor:
        joint = torch.stack([(points.log_lik + points.log_prior)[i] for i in indices])
        return surrogate(joint, torch.stack([points.log_guide[i] for i in indices]))

    mass = toy.points(params).log_mass.detach()
    held = replace(toy, points=lambda p: replace(toy.points(p), log_mass=mass))
    total = held.expectation(count, of, params)
    grads = torch.autograd.grad(total, list(params.values()))
    return {n: float(g) for n, g in zip(params, grads, strict=True)}


def wake(joint: Tensor, log_q: Tensor) -> Tensor:
    weights = (joint - log_q).detach().softmax(0)
    return (weights * (joint + log_q)).sum(0)


def covariance(joint: Tensor, log_q: Tensor, partition: list[tuple[float, float]]) -> Tensor:
    f = (joint - log_q).detach()
    total = torch.zeros(())
    for b, width in partition:
        v = (b * f).softmax(0)
        centred = f - (v * f).sum(0)
        total = total + width * (v * (joint - log_q + centred * (b * joint + (1 - b) * log_q))).sum(0)
    return total
