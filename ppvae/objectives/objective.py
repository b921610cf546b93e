"""The base class of objectives: a bound per datum as a loss in Pyro's convention."""

import copy
from abc import ABCMeta, abstractmethod
from inspect import Signature, signature
from typing import Any, Self

import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor

from ppvae.errors import ContractError, UsageError
from ppvae.errors.ranges import check_numbers
from ppvae.inference.inspection import inspect
from ppvae.inference.structure import Structure
from ppvae.inference.terms import Terms
from ppvae.inference.tracing import Program, trace_pair
from ppvae.objectives.gradients import Gradient, Pathwise, resolve_gradient
from ppvae.objectives.protocol import PairCall
from ppvae.objectives.requirements import (
    check_reduce,
    require_bound_of_batches,
    require_no_guide_factor,
    require_reparameterized_globals,
    warn_enumerated_guide,
)
from ppvae.objectives.schedules import ScheduledScalar


class _CheckedAfterInit(ABCMeta):
    """Checks the gradient estimator once the whole constructor has run, whose attributes the hooks may read."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        objective = super().__call__(*args, **kwargs)
        objective.check_estimator()
        return objective

    @property
    def __signature__(cls) -> Signature:
        """That of the constructor, which `inspect.signature` would not look for behind a metaclass."""
        constructor = signature(getattr(cls, "__init__"))  # noqa: B009  mypy takes the attribute for an instance's
        return constructor.replace(parameters=list(constructor.parameters.values())[1:])


class Objective(PyroELBO, metaclass=_CheckedAfterInit):
    """A bound per datum as a Pyro loss: minus the bound, summed over the batch, times the data plate's scale.

    With global latents theta it is a bound on log p of all N data, from a batch of B of them: the bound of each datum
    given theta ~ q(theta), and the global latents' ratio once, E_q(theta)[N / B sum_n bound_n(theta) + log p(theta) -
    log q(theta)], unbiased over batches. Its mean over the batches of an epoch is its value on all data at once. A
    bound that is no mean of log-weights, as IWAE, has all particles of a datum share one draw of theta, and the global
    latents' part is that of an ELBO; under a point mass on theta (AutoDelta) it bounds log p(x, theta). Where no datum
    has a weight of its own given theta, as under one AutoMultivariateNormal for all latents, batches hold all data, and
    the bound is of the joint weight.

    A subclass defines `reduce`. The other hooks have defaults, which a subclass overrides where they do not apply; K is
    the number of draws per datum, log-weights are [K, batch] in float64 nats.

    Read by every gradient estimator:
        reduce(log_weight) -> [batch] nats: the bound as a function of the log-weights; further dims on the right are
            kept. No default. Checked on first use: its shape, and, by `homogeneity`, its values.
        homogeneity -> float | None: h where exp(bound) is homogeneous of degree h in the weights, so that a constant c
            added to all log-weights of a datum adds h c to its bound, and equal log-weights c have the bound h c.
            Default: 1, a bound on log p(x); -1 is minus an upper bound, None a bound of another kind.
        log_weights(t) -> [K, batch] nats: what `reduce` takes. Default: `t.log_weight`.
        bound(t) -> [batch] nats: the bound. Default: `reduce(log_weights(t))`.
        draws -> int: K. Default: `num_particles`.
        terms_options -> dict: keyword arguments of `ppvae.inference.terms`. Default: none.
    Read by some:
        learning_signal(log_weight) -> [K, batch] nats: for "score"; the factor of each draw's score, the part of the
            bound that depends on this draw: any other adds variance alone. Default: the whole bound.
        leave_one_out_bound(log_weight, replacement) -> [K, batch] nats: for "vimco"; entry k is the bound with
            log-weight k replaced. Default: K evaluations of `reduce`, O(K^2); `ppvae.objectives.reductions` has O(K).
        dreg_weights(log_weight) -> [K, batch], no unit: for "dreg" and "gdreg"; the ratio of the doubly reparameterised
            to the pathwise weight of each draw, 1 - (d^2 bound / d log w_k^2) / (d bound / d log w_k). Default: that,
            by K backward passes through `reduce`.
        stl_unbiased -> bool: whether the bound is a mean of log-weights; "stl" warns where it is False and K > 1, and
            the particles of a datum then share one draw of the global latents. Default: False.
        partition() -> [(b_j, b_{j+1} - b_j)]: for "covariance", which only an objective with it takes, as `TVO`.
    Read by `loss` and `fit`:
        check_structure(s), check_gradient(s): raise ContractError for a pair on which the bound, or its gradient
            estimator, is not defined. Default: a pair without importance weights; `gradient.check_structure`.
        value(call), surrogate(call) -> scalar nats: the bound summed over the batch, without and with a gradient.
            Default: `bound`; the gradient estimator's.
        global_bound(t) -> [1] nats: the bound of the global latents, from their terms. Default: `bound`.
        check_estimator(): raises UsageError where the gradient estimator is not defined for the objective; called after
            the constructor. Default: `gradient.check_objective`.
        factorizes_over_data -> bool: whether a datum's bound depends on no other datum, so that `fit` may split a
            batch. Default: True.

    Args:
        num_particles: draws per datum.
        gradient: an estimator of the gradient, its name in `gradients.GRADIENTS`, or a dict of these by site.

    Raises UsageError for fewer than one particle, or an estimator that is not defined for the objective.
    """

    factorizes_over_data = True
    homogeneity: float | None = 1.0

    def __init__(self, num_particles: int = 1, gradient: Gradient = "pathwise"):
        check_numbers(num_particles=num_particles)
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self.gradient = resolve_gradient(gradient)
        self._schedules: dict[str, ScheduledScalar] = {}
        self._step = torch.zeros((), dtype=torch.int64)  # a tensor, which a captured step may read
        self._inspected: tuple[Program, Program, Structure] | None = None

    @abstractmethod
    def reduce(self, log_weight: Tensor) -> Tensor:
        """The bound per datum, [batch] nats, of log-weights [K, batch]."""

    def log_weights(self, t: Terms) -> Tensor:
        return t.log_weight

    def bound(self, t: Terms) -> Tensor:
        return self.reduce(self.log_weights(t))

    def learning_signal(self, log_weight: Tensor) -> Tensor:
        return self.reduce(log_weight).expand_as(log_weight)

    def leave_one_out_bound(self, log_weight: Tensor, replacement: Tensor) -> Tensor:
        diagonal = torch.eye(len(log_weight), dtype=torch.bool, device=log_weight.device)[..., None]
        return self.reduce(torch.where(diagonal, replacement, log_weight[:, None]))

    def dreg_weights(self, log_weight: Tensor) -> Tensor:
        with torch.enable_grad():
            w = log_weight.detach().requires_grad_()
            (first,) = torch.autograd.grad(self.reduce(w).sum(), w, create_graph=True)
            if not first.requires_grad:  # a linear bound
                return torch.ones_like(first)
            rows = [torch.autograd.grad(first[k].sum(), w, retain_graph=True)[0][k] for k in range(len(w))]
        first = first.detach()
        return torch.where(first == 0, 0.0, 1 - torch.stack(rows) / first)

    @property
    def stl_unbiased(self) -> bool:
        return False

    @property
    def takes_guide_factors(self) -> bool:
        """Whether the loss counts the guide's factors: where it is `total`, and its gradient the pathwise one."""
        plain = type(self).value is Objective.value and type(self).surrogate is Objective.surrogate
        return plain and isinstance(self.gradient, Pathwise)

    @property
    def draws(self) -> int:
        return self.num_particles

    @property
    def terms_options(self) -> dict[str, Any]:
        return {}

    def check_estimator(self) -> None:
        self.gradient.check_objective(self)

    def check_structure(self, s: Structure) -> None:
        """Raises ContractError, naming the site, where the bound is not defined for a pair; warns where it sums a
        guide's sites out, whose probabilities it does not train."""
        refusal = s.local_refusal if s.has_global_latents else s.weights_refusal
        if refusal and s.weights_refusal:
            raise ContractError(s.weights_refusal)
        warn_enumerated_guide(s)

    @property
    def shares_globals(self) -> bool:
        """Whether all particles of a datum share one draw of the global latents, which is then taken pathwise."""
        return not self.stl_unbiased or self.gradient.holds_latents

    def check_gradient(self, s: Structure) -> None:
        self.gradient.check_structure(self, s)
        if not self.takes_guide_factors or any(name in s.guide_roles for name in s.enumerated):
            require_no_guide_factor(s, type(self).__name__)

    def with_gradient(self, gradient: Gradient) -> Self:
        """The same objective with another gradient estimator, from its first step on.

        Raises:
            UsageError: an estimator that is not defined for the objective.
        """
        new = copy.copy(self)
        new.gradient, new._inspected, new._step = resolve_gradient(gradient), None, torch.zeros_like(self._step)
        new._schedules = {name: ScheduledScalar(s.schedule, s.warmup) for name, s in self._schedules.items()}
        new.check_estimator()
        return new

    def value(self, call: PairCall) -> Tensor:
        return self.total(call.terms())

    def total(self, t: Terms) -> Tensor:
        """The bound summed over the batch, less the guide's factors (`pyro.factor`) as Pyro's ELBO counts them."""
        total, factors = self.bound(t).sum(), t.guide_factors
        return total if factors is None else total - factors.mean(0).sum()

    def global_bound(self, t: Terms) -> Tensor:
        return self.bound(t)

    def surrogate(self, call: PairCall) -> Tensor:
        return self.gradient.surrogate(self, call)

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        """Pyro's hook for a pair of traces; `loss` and its kin go through `terms`."""
        return trace_pair(model, guide, args, self._structure(model, guide, args), {}, num_particles=self.draws)

    def _structure(self, model: Program, guide: Program, batch: tuple[Any, ...]) -> Structure:
        if self._inspected is None or self._inspected[:2] != (model, guide):
            s = inspect(model, guide, batch, weights=False)
            check_reduce(self, batch[0].device if batch and isinstance(batch[0], Tensor) else None)
            self.check_structure(s)
            if s.bound_refusal:
                raise ContractError(s.bound_refusal)
            self._check_batch_size(s, batch)
            self.check_gradient(s)
            if self.shares_globals:
                require_reparameterized_globals(s, type(self).__name__)
            self._inspected = (model, guide, s)
        self._check_batch_size(self._inspected[2], batch)
        return self._inspected[2]

    def _check_batch_size(self, s: Structure, batch: tuple[Any, ...]) -> None:
        if s.has_fixed_full_size and s.full_size != s.batch_size(batch):
            require_bound_of_batches(s, s.batch_size(batch))

    def _call(self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PairCall:
        if kwargs:
            raise UsageError(f"a pair is called as model(*batch): expected no keywords, found {sorted(kwargs)}")
        s = self._structure(model, guide, args)
        return PairCall(model, guide, args, s, self.draws, self.terms_options, self.shares_globals)

    def _scaled_loss(self, total: Tensor, call: PairCall) -> Tensor:
        """Minus the total times the data plate's scale, and once minus the bound of the global latents."""
        rows = call.structure.batch_size(call.batch)
        loss = -total * (call.structure.represented_size(rows) / rows)
        if (t := call.globals) is None:
            return loss
        total, factors = self.global_bound(t).sum(), t.guide_factors
        return loss - call.structure.common_scale * (total if factors is None else total - factors.mean(0).sum())

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the bound, summed over the batch, times the data plate's scale: a scalar tensor."""
        call = self._call(model, guide, args, kwargs)
        return self._scaled_loss(self.surrogate(call), call)

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a number, without a gradient."""
        with torch.no_grad():
            call = self._call(model, guide, args, kwargs)
            return self._scaled_loss(self.value(call), call).item()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a number; its gradient is added to `.grad` of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        self.advance()
        return loss.item()

    def advance(self) -> None:
        """Moves the schedules to the next step: called by `loss_and_grads`, and after a captured step."""
        self.set_step(self.steps_taken + 1)

    def scheduled_values(self) -> dict[str, float]:
        """The current values of the hyperparameters that may follow a schedule, by name."""
        return {name: float(scalar.current) for name, scalar in self._schedules.items()}

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint stores: the steps taken, the gradient estimator's state."""
        return {"step": self.steps_taken, "gradient": self.gradient.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state of a checkpoint; an empty dict restores the initial state."""
        self.set_step(state.get("step", 0))
        self.gradient.load_state_dict(state.get("gradient", {}))

    @property
    def has_learned_baseline(self) -> bool:
        """Whether the gradient estimator trains something of its own in a way that a graph of the step does not."""
        return self.gradient.has_learned_baseline

    @property
    def capture_refusal(self) -> str:
        """Why a step is not captured as a graph; an empty string where it may be."""
        return "its objective has a baseline that learns" if self.has_learned_baseline else ""

    @property
    def steps_taken(self) -> int:
        """The number of steps taken, which the schedules follow."""
        return int(self._step)

    def _scheduled_value(self, name: str) -> Tensor:
        schedule = getattr(self, name)
        if schedule != self._schedules[name].schedule:  # the attribute was assigned after construction
            self._schedules[name] = ScheduledScalar(schedule, self._schedules[name].warmup)
            self._schedules[name].set_step(self.steps_taken)
        return self._schedules[name].current

    def set_step(self, step: int) -> None:
        """Sets the number of steps taken, and the schedules to it."""
        check_numbers(step=step)
        self._step.fill_(step)
        for scalar in self._schedules.values():
            scalar.set_step(step)
