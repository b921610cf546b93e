"""Gradient estimators on one batch of a pair, compared by steps with independent noise."""

from __future__ import annotations

import copy
import math
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from ppvae.data.loader import data_columns, data_digest, read_rows
from ppvae.errors import ContractError, UsageError
from ppvae.errors.calls import explain_call
from ppvae.errors.ranges import check_numbers
from ppvae.evaluation.gradient_audit.result import GradientAudit
from ppvae.inference.device import choose_device
from ppvae.inference.inspection import inspect
from ppvae.inference.param_store import bind_pair
from ppvae.inference.second_run import buffer_copies
from ppvae.inference.sites import graph_leaves
from ppvae.inference.structure import Role, Structure
from ppvae.inference.terms import evaluate_terms
from ppvae.inference.tracing import Program
from ppvae.rng import derive_seed, fork_all_rngs, seed_all

REFERENCE = "enumerated"  # the estimator that is exact
MODEL = "model"
MIN_DRAWS = 10
SMALL = 0.01  # of the largest gradient, and of the usual error: what rounding and draws too rare to be seen may carry


@runtime_checkable
class AuditedObjective(Protocol):
    """An objective whose gradient estimator is exchanged by name or as an object."""

    def with_gradient(self, gradient: Any) -> Self: ...

    def loss_and_grads(self, model: Program, guide: Program, *args: Any) -> float: ...


@explain_call
def gradients(
    model: Program,
    guide: Program,
    batch: Any,
    objective: AuditedObjective,
    estimators: Sequence[Any] | Mapping[str, Any],
    *,
    draws: int = 200,
    warmup: int = 20,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> GradientAudit:
    """The bias, variance, signal-to-noise ratio and cost of gradient estimators of an objective, by site.

    Each estimator takes `warmup` steps for the parts that it learns, and `draws` steps with independent noise; the
    parameters of the pair stay as they are. The reference of the bias is the enumerated gradient, where all latents are
    discrete and have at most 65536 joint draws.

    Args:
        model, guide: a Pyro pair that keeps the contract, or run.model, run.guide.
        batch: one batch, a tensor [N, ...], a split, or a tuple of them.
        objective: an objective of `ppvae.objectives`; its own gradient estimator is not used.
        estimators: what `gradient=` takes (names, estimators, dicts by site), or {label: estimator}.
        draws: steps for each estimator, at least 10.
        warmup: steps before them.
        seed: of all noise; estimators of the same cost share it.
        device: of the batch; by default that of the pair's parameters.

    Raises:
        UsageError: an objective without estimators of its own, as Pyro's.
        ContractError: the pair refuses every estimator.

    >>> import torch
    >>> from ppvae import VAE, likelihoods, nn, objectives, posteriors, priors
    >>> net = nn.mlp(3, 5, hidden=(8,)), nn.mlp(5, 3, hidden=(8,))
    >>> vae = VAE(priors.Bernoulli(3), likelihoods.Bernoulli(net[0]), posteriors.Bernoulli(net[1]))
    >>> found = gradients(vae.model, vae.guide, torch.ones(4, 5), objectives.ELBO(2), ["vimco", "disarm"], draws=20)
    >>> found.estimators, sorted(found.variance)
    (('vimco', 'disarm'), ['model', 'z'])
    """
    check_numbers(draws=draws, warmup=warmup, seed=seed)
    if draws < MIN_DRAWS:
        raise UsageError(f"draws: expected at least {MIN_DRAWS} for a variance, found {draws}")
    if isinstance(objective, type) or not isinstance(objective, AuditedObjective):
        what = f"the class {objective.__name__}" if isinstance(objective, type) else type(objective).__name__
        raise UsageError(
            f"objective: expected one of ppvae.objectives, whose gradient estimator can be exchanged, found {what}. "
            f"Take objectives.ELBO() or objectives.IWAE(5)"
        )
    labelled = _labelled(estimators)
    model, guide = bind_pair(model, guide)
    columns = data_columns(batch, seed, program=model)
    place = choose_device(device, model, guide, columns)
    columns = tuple(read_rows(column, None, place) for column in columns)
    s = inspect(model, guide, columns, weights=False)
    groups = _groups(model, guide, columns, s)
    represented = s.represented_size(s.batch_size(columns))
    kept = {id(p): (p, p.grad) for group in groups.values() for p in group}
    found: dict[str, _Moments] = {}
    notes = []

    def run(one: Any, count: int, skipped: int) -> _Moments:
        with warnings.catch_warnings():  # the table says which are biased
            warnings.filterwarnings("ignore", message=".*is biased", category=UserWarning)
            audited = objective.with_gradient(copy.deepcopy(one))
        moments = _Moments(groups, -1 / represented)
        for step in range(-skipped, count):
            for p, _ in kept.values():
                p.grad = None
            seed_all(derive_seed(seed, "gradients", step))
            start = time.process_time()
            audited.loss_and_grads(model, guide, *columns)
            if step >= 0:
                moments.add(time.process_time() - start)
        return moments

    with ExitStack() as stack:
        stack.enter_context(fork_all_rngs())
        stack.enter_context(buffer_copies())
        stack.callback(_restore, kept)
        for label, one in labelled.items():
            try:
                found[label] = run(one, draws, max(warmup, 1))
            except (ContractError, UsageError) as error:
                notes.append(f"{label}: {error}")
        if not found:
            raise ContractError("gradients: the pair refuses every estimator. " + " ".join(notes))
        try:
            exact = run(REFERENCE, 1, 0).mean
        except (ContractError, UsageError) as error:
            exact = None
            notes.append(f"no bias is computed: {error}")
    of = [_summary(moments, exact) for moments in found.values()]
    fields = {
        key: {site: torch.tensor([one[site][key] for one in of], dtype=torch.float64) for site in groups}
        for key in ("variance", "signal", "bias", "p_value")
    }
    return GradientAudit(
        tuple(found), **fields, seconds=torch.tensor([m.seconds for m in found.values()], dtype=torch.float64),
        draws=draws, objective=type(objective).__name__, seed=seed, digest=data_digest(columns), notes=tuple(notes),
    )  # fmt: skip


def _labelled(estimators: Any) -> dict[str, Any]:
    """The estimators by label: those of a dict, or names and what they print."""
    if isinstance(estimators, Mapping):
        labelled = dict(estimators)
    elif isinstance(estimators, list | tuple):
        labels = [_label(one) for one in estimators]
        if twice := next((label for label in labels if labels.count(label) > 1), ""):
            raise UsageError(
                f"estimators: expected a label of its own for each, found {twice} twice: pass a dict, as "
                f"{{'first': ..., 'second': ...}}"
            )
        labelled = dict(zip(labels, estimators, strict=True))
    else:
        raise UsageError(f"estimators: expected a list, as ['vimco', 'arms'], or a dict by label, found {estimators!r}")
    if not labelled:
        raise UsageError("estimators: expected at least one, as 'vimco', found none")
    return labelled


def _label(estimator: Any) -> str:
    if isinstance(estimator, Mapping):
        return ", ".join(f"{site}: {_label(one)}" for site, one in estimator.items())
    return estimator if isinstance(estimator, str) else repr(estimator)


def _groups(model: Program, guide: Program, batch: tuple[Any, ...], s: Structure) -> dict[str, list[Tensor]]:
    """The parameters of the guide's density of each site, and those of the model alone."""
    with fork_all_rngs(), buffer_copies():
        t = evaluate_terms(model, guide, batch, 1, structure=s, frozen=("latents",))
    params = {id(p): p for p in s.params.values() if p.requires_grad}
    groups: dict[str, list[Tensor]] = {}
    for name, site in t.guide.items():
        own = dict.fromkeys(id(leaf) for leaf in graph_leaves(site.log_prob))
        if site.role in (Role.LATENT, Role.AUXILIARY) and (group := [params[i] for i in own if i in params]):
            groups[name] = group
    of_guide = {id(p) for group in groups.values() for p in group}
    rest = [p for i, p in params.items() if i not in of_guide]
    return groups | ({MODEL: rest} if rest else {})


def _restore(kept: Mapping[int, tuple[Tensor, Tensor | None]]) -> None:
    for p, grad in kept.values():
        p.grad = grad


class _Moments:
    """Running means and sums of squared deviations of the gradient of each parameter (Welford)."""

    def __init__(self, groups: Mapping[str, list[Tensor]], factor: float):
        self.groups, self.factor, self.count = groups, factor, 0
        self.mean = {name: torch.zeros(_size(group), dtype=torch.float64) for name, group in groups.items()}
        self.squares = {name: torch.zeros_like(mean) for name, mean in self.mean.items()}
        self.times: list[float] = []

    def add(self, seconds: float) -> None:
        self.count += 1
        self.times.append(seconds)
        for name, group in self.groups.items():
            pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            g = self.factor * torch.cat([piece.detach().reshape(-1).double().cpu() for piece in pieces])
            away = g - self.mean[name]
            self.mean[name] = self.mean[name] + away / self.count
            self.squares[name] = self.squares[name] + away * (g - self.mean[name])

    @property
    def seconds(self) -> float:
        return statistics.median(self.times)


def _size(group: list[Tensor]) -> int:
    return sum(p.numel() for p in group)


def _summary(moments: _Moments, exact: Mapping[str, Tensor] | None) -> dict[str, dict[str, float]]:
    out = {}
    for name, mean in moments.mean.items():
        variance = moments.squares[name] / (moments.count - 1)
        noise = float(variance.sum()) / moments.count
        signal = math.sqrt(max(0.0, float(mean.square().sum()) - noise))
        bias = p_value = math.nan
        if exact is not None:
            away = mean - exact[name]
            signal = float(exact[name].norm())
            if bool(away.isfinite().all()):
                bias = math.sqrt(max(0.0, float(away.square().sum()) - noise)) / signal if signal else math.nan
                small = SMALL * float(exact[name].abs().max())
                p_value = _p_value(away, (variance / moments.count).sqrt(), small)
        out[name] = {"variance": float(variance.sum()), "signal": signal, "bias": bias, "p_value": p_value}
    return out


def _p_value(away: Tensor, error: Tensor, small: float) -> float:
    """Of the largest of differences in standard errors, two-sided and corrected for their number.

    Draws that are too rare to be seen can carry differences that are `small`, and make a parameter's error seem smaller
    than it is: a hundredth of the usual one is added to each.
    """
    z = (away.abs() - small).clamp_min(0) / (error + SMALL * error.square().mean().sqrt() + 1e-9)
    two_sided = torch.special.erfc(z.max() / math.sqrt(2))
    return min(1.0, len(away) * float(two_sided))
