"""Every objective and every gradient estimator by a constructor, and the laws that every combination of them obeys.

A new objective joins `OBJECTIVES`, a new gradient estimator `ESTIMATORS`: tests/objectives runs the laws here and in
`tests.laws.gradients` over all combinations. The tests that call them use the fixture `float64`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pyro
import pytest
import torch
from torch import Tensor, nn

from ppvae.errors import ContractError
from ppvae.inference.inspection import inspect
from ppvae.inference.param_store import ParamScope
from ppvae.objectives import (
    CIWAE,
    ELBO,
    FIVO,
    IWAE,
    MIWAE,
    PIWAE,
    TCVAE,
    TVO,
    Capacity,
    InfoVAE,
    Objective,
    Renyi,
    ReweightedWakeSleep,
)
from ppvae.objectives.gradients import GRADIENTS, GradientEstimator
from tests.programs.strangers import PAIRS, Pair, hierarchy
from tests.programs.toys import MIXED, ONE, TWO

# -- groups of `tests.programs.strangers.PAIRS`

DISCRETE = frozenset({"discrete"})
ENUMERATED = frozenset({"enumerated_model", "enumerated_vector", "markov", "semi_supervised", "enumerated_both"})
ENUMERATED_GUIDE = frozenset({"semi_supervised", "enumerated_both"})
AUXILIARY = frozenset({"auto_normal", "auxiliary"})
GLOBAL = frozenset({"shared_latent"})
WHOLE_DATA = frozenset({"indexes", "local_params"})
SEVERAL_LATENTS = frozenset({"hierarchical", "inner_plate", "sequential_plate", "masked", "supports"})

# -- what the bounds are, as reductions of log-weights [draws, ...]


def mean(log_weight: Tensor) -> Tensor:
    return log_weight.mean(0)


def log_mean_exp(log_weight: Tensor) -> Tensor:
    return log_weight.logsumexp(0) - math.log(len(log_weight))


def renyi(log_weight: Tensor) -> Tensor:
    return log_mean_exp(0.4 * log_weight) / 0.4


def convex(log_weight: Tensor) -> Tensor:
    return 0.3 * mean(log_weight) + 0.7 * log_mean_exp(log_weight)


def thermodynamic(log_weight: Tensor, partition: list[tuple[float, float]]) -> Tensor:
    return sum(width * ((b * log_weight).softmax(0) * log_weight).sum(0) for b, width in partition)


@dataclass(frozen=True)
class EstimatorCase:
    """A gradient estimator: `refuses` names the pairs of `PAIRS` on which it is not defined."""

    build: Callable[[], GradientEstimator | None]
    refuses: frozenset[str] = frozenset()
    needs_paths: bool = False  # every latent has to be reparameterised
    unbiased: bool = True  # for every objective that it serves
    general: bool = True  # it serves every objective that is a reduction of log-weights


ESTIMATORS = {
    "pathwise": EstimatorCase(GRADIENTS["pathwise"], DISCRETE, needs_paths=True),
    "stl": EstimatorCase(GRADIENTS["stl"], DISCRETE | ENUMERATED_GUIDE, needs_paths=True, unbiased=False),
    "dreg": EstimatorCase(GRADIENTS["dreg"], DISCRETE | ENUMERATED_GUIDE, needs_paths=True),
    "gdreg": EstimatorCase(GRADIENTS["gdreg"], DISCRETE | ENUMERATED, needs_paths=True),
    "score": EstimatorCase(GRADIENTS["score"]),
    "vimco": EstimatorCase(GRADIENTS["vimco"]),
    "covariance": EstimatorCase(GRADIENTS["covariance"], ENUMERATED_GUIDE, unbiased=False, general=False),
    # of discrete latents; tests/objectives/gradients/test_discrete.py holds their means against enumeration
    **{
        name: EstimatorCase(GRADIENTS[name], unbiased=False, general=False)
        for name in ("vargrad", "disarm", "arms", "double_cv", "rebar", "relax", "unordered_set")
    },
    "straight_through": EstimatorCase(GRADIENTS["straight_through"], unbiased=False, general=False),
    "enumerated": EstimatorCase(GRADIENTS["enumerated"], unbiased=False, general=False),
    "ancestor_score": EstimatorCase(GRADIENTS["ancestor_score"], DISCRETE, needs_paths=True, general=False),
    "own": EstimatorCase(lambda: None, unbiased=False, general=False),  # of objectives that define `surrogate`
}
OF_DISCRETE = ("vargrad", "arms", "double_cv", "rebar", "unordered_set")
GENERAL = tuple(name for name, estimator in ESTIMATORS.items() if estimator.general)
SCORES = ("pathwise", "score", "vimco")


@dataclass(frozen=True)
class ObjectiveCase:
    """An objective: `build(num_particles, gradient)`, the estimators that serve it, the pairs that it refuses.

    The expectation of its value at two particles is that of `reduce` over the log-weights of `draws` draws.
    """

    build: Callable[[int, Any], Objective]
    estimators: tuple[str, ...] = GENERAL
    refuses: frozenset[str] = frozenset()
    reduce: Callable[[Tensor], Tensor] | None = None
    draws: int = 2
    sums_out_guide: bool = False  # sites enumerated in the guide are summed out, and their probabilities not trained


OBJECTIVES = {
    "elbo": ObjectiveCase(lambda k, g: ELBO(k, gradient=g), (*GENERAL, *OF_DISCRETE), reduce=mean, draws=1),
    "beta": ObjectiveCase(lambda k, g: ELBO(k, beta=0.5, gradient=g), refuses=ENUMERATED),
    "warm-up": ObjectiveCase(lambda k, g: ELBO(k, beta=0.5, warmup=3, gradient=g), ("pathwise",), ENUMERATED),
    "kl": ObjectiveCase(lambda k, g: ELBO(k, analytic_kl=True, gradient=g), SCORES, ENUMERATED, mean, 1),
    "free bits": ObjectiveCase(
        lambda k, g: ELBO(k, free_bits=0.1, gradient=g), ("pathwise",), ENUMERATED | AUXILIARY | GLOBAL
    ),
    "capacity": ObjectiveCase(lambda k, _: Capacity(1.0, num_particles=k), ("pathwise",), ENUMERATED),
    "iwae": ObjectiveCase(IWAE, reduce=log_mean_exp, sums_out_guide=True),
    "renyi": ObjectiveCase(lambda k, g: Renyi(0.6, k, g), refuses=ENUMERATED_GUIDE, reduce=renyi),
    "ciwae": ObjectiveCase(lambda k, g: CIWAE(0.3, k, g), reduce=convex),
    "miwae": ObjectiveCase(lambda k, g: MIWAE(k, 3, g), (*GENERAL, "arms"), reduce=log_mean_exp, sums_out_guide=True),
    "piwae": ObjectiveCase(lambda k, g: PIWAE(k, 2, g), ("pathwise", "dreg"), ENUMERATED_GUIDE),
    "tvo": ObjectiveCase(
        lambda k, g: TVO(k, 3, gradient=g), (*SCORES, "covariance"), ENUMERATED_GUIDE,
        functools.partial(thermodynamic, partition=TVO(2, 3).partition()),
    ),
    "fivo": ObjectiveCase(
        lambda k, g: FIVO(k, gradient=g), ("pathwise", "ancestor_score"), ENUMERATED | GLOBAL, log_mean_exp
    ),
    "wake": ObjectiveCase(lambda k, _: ReweightedWakeSleep(k), ("own",), ENUMERATED_GUIDE),
    "sleep": ObjectiveCase(
        lambda k, _: ReweightedWakeSleep(k, 1.0, 1.0), ("own",),
        ENUMERATED_GUIDE | AUXILIARY | GLOBAL | WHOLE_DATA
        | {"enumerated_vector", "markov", "inner_plate", "sequential_plate", "obs_mask", "masked"},
    ),
    "tcvae": ObjectiveCase(
        lambda k, _: TCVAE(num_data=50, num_particles=k), ("pathwise",),
        ENUMERATED | AUXILIARY | GLOBAL | WHOLE_DATA | SEVERAL_LATENTS | {"flow"},
    ),
    "infovae": ObjectiveCase(
        lambda k, _: InfoVAE(num_particles=k), ("pathwise",), ENUMERATED | AUXILIARY | GLOBAL
    ),
}  # fmt: skip
COMBINATIONS = [(name, estimator) for name, case in OBJECTIVES.items() for estimator in case.estimators]


def value(objective: Objective, model: Any, guide: Any, *batch: Any, seed: int = 1) -> float:
    """The loss on the draws of a seed; the first call inspects the pair."""
    objective.loss(model, guide, *batch)
    torch.manual_seed(seed)
    return objective.loss(model, guide, *batch)


# -- pairs that laws share: what an inspection finds does not depend on the objective, and takes longer than a loss

_inspect = functools.lru_cache(maxsize=100)(inspect)


@contextmanager
def inspected_once() -> Iterator[None]:
    """Every objective gets the structure of a pair from one inspection."""
    with mock.patch("ppvae.objectives.objective.inspect", _inspect):
        yield


@functools.cache
def _shared(build: Callable[..., Pair], *args: Any) -> tuple[ParamScope, Pair]:
    """A pair, made once, and the param store that it registers its parameters in."""
    with (scope := ParamScope()).entered():
        return scope, build(*args)


@contextmanager
def shared_pair(build: Callable[..., Pair], *args: Any) -> Iterator[Pair]:
    """A pair, made and inspected once, whose parameters have no gradients."""
    scope, pair = _shared(build, *args)
    with scope.entered(), inspected_once():
        for p in scope.params.values():
            p.grad = None
        yield pair


# -- laws


def check_value_is_independent_of_gradient(
    case: ObjectiveCase, estimators: Mapping[str, EstimatorCase] = ESTIMATORS
) -> None:
    """Loss, `loss_and_grads` and `differentiable_loss` agree for all estimators on the same draws."""
    for toy in (ONE,) if "hierarchical" in case.refuses else (TWO, MIXED):
        pyro.clear_param_store()
        model, guide, x, params = toy.pair(5)
        found: list[float] = []
        for name in case.estimators:
            objective = case.build(3, estimators[name].build())
            with inspected_once():
                if toy is MIXED and estimators[name].needs_paths:
                    with pytest.raises(ContractError, match=r"'a'.*reparameterised"):
                        objective.loss(model, guide, x)
                    continue
                found.append(value(objective, model, guide, x))
                torch.manual_seed(1)
                found.append(float(objective.differentiable_loss(model, guide, x).detach()))
                torch.manual_seed(1)
                found.append(objective.loss_and_grads(model, guide, x))
        if found:
            assert max(found) - min(found) < 1e-10
            assert not any(p.grad is None for p in params.values())


def check_pair(case: ObjectiveCase, estimator: EstimatorCase, pair: str) -> None:
    """A pair of `PAIRS` has a finite loss and finite gradients, or is refused as stated."""
    objective = case.build(3, estimator.build())
    losses, refusal = [], ""
    with shared_pair(PAIRS[pair]) as (model, guide, batch):
        try:
            for loss in (objective.loss, objective.loss_and_grads):
                torch.manual_seed(3)
                losses.append(loss(model, guide, *batch))
        except ContractError as error:
            refusal = str(error)
        gradients = {name: p.grad for name, p in pyro.get_param_store().named_parameters()}
    assert bool(refusal) == (pair in case.refuses | estimator.refuses), refusal
    if refusal:
        assert "expected" in refusal
        assert "found" in refusal
        return
    assert math.isfinite(losses[0])
    assert losses[1] == pytest.approx(losses[0], abs=1e-9)
    for name, gradient in gradients.items():
        if gradient is None:
            assert case.sums_out_guide, name
            assert pair in ENUMERATED_GUIDE, name
        else:
            assert torch.isfinite(gradient).all(), name


def check_plate_scale(case: ObjectiveCase, estimator: EstimatorCase) -> None:
    """A plate of 600 with 6 data in the batch: loss and gradients are a hundred times those of a plate of 6."""
    if "hierarchical" in case.refuses:
        return
    found = []
    for full in (6, 600):
        with shared_pair(hierarchy, full) as (model, guide, batch):
            torch.manual_seed(4)
            loss = case.build(3, estimator.build()).loss_and_grads(model, guide, *batch)
            grads = {n: p.grad for n, p in pyro.get_param_store().named_parameters()}
        found.append((loss, grads))
    assert found[1][0] == pytest.approx(100 * found[0][0], rel=1e-12)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], 100 * gradient, rtol=1e-9, atol=1e-12)


def check_batch_norm(case: ObjectiveCase, estimator: EstimatorCase) -> None:
    """A step updates running statistics as one run of the pair does, however often a side is run."""
    objective = case.build(2, estimator.build())
    found, once = running_statistics(objective), _running_statistics_of_one_run(objective.draws)
    assert len(found) == 6
    for a, b in zip(found, once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def _batch_norm() -> Pair:
    return PAIRS["conv"]()


def _buffers(pair: Pair) -> list[Tensor]:
    nets = [c.cell_contents for f in pair[:2] for c in f.__closure__ if isinstance(c.cell_contents, nn.Module)]
    return [b for net in nets for b in net.buffers()]


def running_statistics(objective: Objective) -> list[Tensor]:
    """The buffers of a pair with batch norm after a loss and a step, from the same buffers every time."""
    with shared_pair(_batch_norm) as pair:
        for b, start in zip(_buffers(pair), _buffers(_batch_norm()), strict=True):
            b.copy_(start)
        model, guide, batch = pair
        torch.manual_seed(2)
        objective.loss(model, guide, *batch)
        torch.manual_seed(3)
        objective.loss_and_grads(model, guide, *batch)
        return [b.clone() for b in _buffers(pair)]


@functools.cache
def _running_statistics_of_one_run(draws: int) -> list[Tensor]:
    return running_statistics(ELBO(draws))


def check_leave_one_out_bound(objective: Objective, dtype: torch.dtype) -> None:
    """Of 12 draws: `leave_one_out_bound` against 12 bounds, with one dominant weight or with weights alike."""
    digits = 1e-12 if dtype == torch.float64 else 1e-5
    assert objective.draws == 12
    for spread in (0.0, 1.0, 30.0):
        log_weight, replacement = (spread * torch.randn(2, 12, 7)).to(dtype)
        log_weight[5, :3] += 200.0
        found = objective.leave_one_out_bound(log_weight, replacement)
        plain = Objective.leave_one_out_bound(objective, log_weight, replacement)
        assert found.dtype == dtype
        assert float((found - plain).abs().max()) < digits * (1 + float(plain.abs().max()))


def check_shift(objective: Objective) -> None:
    """A constant added to a datum's log-weights is added to its bound."""
    log_weight = torch.randn(objective.draws, 7)
    torch.testing.assert_close(objective.reduce(log_weight + 2.5), objective.reduce(log_weight) + 2.5)
