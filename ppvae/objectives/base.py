"""What every objective is: a bound per datum, as a loss in Pyro's convention."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor

from ppvae.errors import ContractError, UsageError
from ppvae.inference.inspection import inspect
from ppvae.inference.structure import Structure
from ppvae.inference.terms import Terms, evaluate_terms
from ppvae.inference.tracing import Program, trace_pair
from ppvae.objectives.gradients.estimators import Gradient, gradient_named
from ppvae.objectives.schedules import Scheduled


@dataclass(frozen=True)
class Call:
    """A pair on one batch, as an objective looks at it."""

    model: Program
    guide: Program
    batch: tuple[Any, ...]
    s: Structure
    num_particles: int
    options: dict[str, Any] = field(default_factory=dict)

    def terms(self, **options: Any) -> Terms:
        """The pair's terms; options as `ppvae.inference.terms` takes them."""
        index = None
        if self.s.draws_subsample:  # drawn here, so that all particles look at the same data
            index = torch.randperm(self.s.full_size, device=self.batch[0].device)[: self.s.subsample_size]
        return evaluate_terms(
            self.model, self.guide, self.batch, self.num_particles, structure=self.s, index=index,
            **{**self.options, **options},
        )  # fmt: skip


class Objective(PyroELBO):
    """A bound per datum as a Pyro loss; subclasses say how log-weights [particles, batch] are reduced to it.

    Args:
        num_particles: draws per datum.
        gradient: an estimator of the gradient, or its name: "pathwise", "stl", "dreg", "gdreg", "score", "vimco".
    """

    separate = True  # whether a datum's bound depends on no other datum, so that a batch can be cut
    stl_unbiased = False  # whether leaving out the guide's score (STL) leaves the gradient unbiased

    def __init__(self, num_particles: int, gradient: str | Gradient = "pathwise"):
        if num_particles < 1:
            raise UsageError(f"num_particles: expected at least 1, found {num_particles}")
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self.gradient = gradient_named(gradient)
        self.gradient.suits(self)
        self._scheduled: dict[str, Scheduled] = {}
        self._steps = torch.zeros((), dtype=torch.int64)  # taken; a tensor, as what a captured step may read
        self._known: tuple[Program, Program, Structure] | None = None

    @abstractmethod
    def reduce(self, log_weight: Tensor) -> Tensor:
        """The bound per datum, [batch] nats, of log-weights [particles, batch]; further dims on the right stay.

        A number added to every log-weight of a datum must come out added to its bound.
        """

    def weigh(self, t: Terms) -> Tensor:
        """The log-weights that are reduced, [particles, batch]."""
        return t.log_weight

    def bound(self, t: Terms) -> Tensor:
        """The bound per datum, [batch] nats."""
        return self.reduce(self.weigh(t))

    def learning_signal(self, log_weight: Tensor) -> Tensor:
        """The part of the bound that each particle has a share in, [particles, batch]: all of it, if nothing is known.

        What a particle has no share in only adds noise to the score function's estimate.
        """
        return self.reduce(log_weight).expand_as(log_weight)

    def without(self, log_weight: Tensor, others: Tensor) -> Tensor:
        """The bound with each draw's log-weight in turn replaced by another: [which is replaced, batch].

        Both are [particles, batch]. Bounds of a sum of weights have it in O(K); this serves all, in O(K^2).
        """
        same = torch.eye(len(log_weight), dtype=torch.bool, device=log_weight.device)[..., None]
        return self.reduce(torch.where(same, others, log_weight[:, None]))

    def dreg_weights(self, log_weight: Tensor) -> Tensor:
        """By what a doubly reparameterised gradient weights each path, beside the pathwise one: [particles, batch].

        1 - (d^2 bound / d log w_k^2) / (d bound / d log w_k).
        """
        raise UsageError(f"{type(self).__name__}: expected a gradient other than {type(self.gradient).__name__}")

    @property
    def draws(self) -> int:
        """Draws per datum in all."""
        return self.num_particles

    @property
    def options(self) -> dict[str, Any]:
        """What `terms` is asked for besides."""
        return {}

    def refuse(self, s: Structure) -> None:
        """Raises ContractError where the bound does not exist for a pair."""
        if s.weights_refusal:
            raise ContractError(s.weights_refusal)

    def refuse_gradient(self, s: Structure) -> None:
        """Raises ContractError where the gradient's estimator does not exist for a pair."""
        self.gradient.refuse(self, s)

    def value(self, call: Call) -> Tensor:
        """The bound summed over the batch, a scalar."""
        return self.bound(call.terms()).sum()

    def surrogate(self, call: Call) -> Tensor:
        """The bound summed over the batch, whose gradient is the estimator's: a scalar."""
        return self.gradient.surrogate(self, call)

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        """Pyro's hook for a pair of traces; everything here goes through `terms`."""
        return trace_pair(model, guide, args, self._structure(model, guide, args), {}, num_particles=self.draws)

    def _structure(self, model: Program, guide: Program, batch: tuple[Any, ...]) -> Structure:
        if self._known is None or self._known[:2] != (model, guide):
            s = inspect(model, guide, batch, weights=False)
            self.refuse(s)
            if s.scale_refusal:
                raise ContractError(s.scale_refusal)
            if s.has_global_latents and s.full_size != s.batch_size(batch):
                raise ContractError(
                    f"a latent is shared by all data: expected all of them in the batch, found "
                    f"{s.batch_size(batch)} of {s.full_size}; train on whole batches, or on pyro.infer.Trace_ELBO()"
                )
            self.refuse_gradient(s)
            self._known = (model, guide, s)
        return self._known[2]

    def _call(self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        if kwargs:
            raise UsageError(f"a pair is called as model(*batch): expected no keywords, found {sorted(kwargs)}")
        return Call(model, guide, args, self._structure(model, guide, args), self.draws, self.options)

    def _scaled(self, total: Tensor, call: Call) -> Tensor:
        rows = call.s.batch_size(call.batch)
        return -total * (call.s.represented_size(rows) / rows)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the bound, summed over the batch, times the data plate's scale: a scalar tensor."""
        call = self._call(model, guide, args, kwargs)
        return self._scaled(self.surrogate(call), call)

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a number, without a gradient."""
        with torch.no_grad():
            call = self._call(model, guide, args, kwargs)
            return self._scaled(self.value(call), call).item()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a number; its gradient is added to `.grad` of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        self.advance()
        return loss.item()

    def advance(self) -> None:
        """Goes on to the schedules' next step, as `loss_and_grads` does, and as a step from a graph has to."""
        self.go_to(self.taken + 1)

    def scheduled(self) -> dict[str, float]:
        """The numbers that may follow the steps, as they are now."""
        return {name: float(number.now) for name, number in self._scheduled.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold: the steps taken, the gradient's baseline."""
        return {"step": self.taken, "gradient": self.gradient.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint; an empty one starts anew."""
        self.go_to(state.get("step", 0))
        self.gradient.load_state_dict(state.get("gradient", {}))

    @property
    def learns(self) -> bool:
        """Whether it learns from the steps of training, by a network that is its own: a baseline that does."""
        return self.gradient.learns

    @property
    def taken(self) -> int:
        """How many steps its schedules have gone."""
        return int(self._steps)

    def _now(self, name: str) -> Tensor:
        value = getattr(self, name)
        if value != self._scheduled[name].value:  # set anew by the user
            self._scheduled[name] = Scheduled(value, self._scheduled[name].warmup)
            self._scheduled[name].go_to(self.taken)
        return self._scheduled[name].now

    def go_to(self, step: int) -> None:
        """Sets its schedules to what they are after so many steps."""
        self._steps.fill_(step)
        for number in self._scheduled.values():
            number.go_to(step)
