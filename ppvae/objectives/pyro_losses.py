"""Objectives of Pyro's, and functions, as `fit` takes them: a loss that is one number, on batches of any size."""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

from pyro.infer import (
    ELBO,
    EnergyDistance,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    ReweightedWakeSleep,
    Trace_MMD,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from torch import Tensor

from ppvae.errors import UsageError, site_error
from ppvae.inference.structure import Role, Structure
from ppvae.inference.tracing import Program, sample_sites, trace_program

TRACED = (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO)
WITHOUT_LOSS = (TraceTailAdaptive_ELBO,)
SIMULATED = (EnergyDistance, Trace_MMD)  # distances to simulated data, which are no sums over a batch


def as_elbo(objective: Any) -> ELBO:
    """An objective of `fit` as an ELBO: an object of one, or a function of (model, guide, *batch).

    Raises:
        UsageError: a class, or anything else.
    """
    if isinstance(objective, ELBO):
        return objective
    if isinstance(objective, type) and issubclass(objective, ELBO):
        found = f"the class {objective.__name__}. Pass an object of it, as {objective.__name__}()"
    elif isinstance(objective, SIMULATED):
        found = f"{type(objective).__name__}. Train on it with ppvae.inference.SVI(model, guide, optimizer, loss)"
    elif callable(objective) and not isinstance(objective, type):
        if _takes_pair_and_batch(objective):
            return LossFunction(objective)
        found = f"{getattr(objective, '__name__', type(objective).__name__)}{inspect.signature(objective)}"
    else:
        found = f"{objective!r}"
    raise UsageError(
        "objective: expected an object of a pyro.infer.ELBO, as Trace_ELBO(), or a function of (model, guide, *batch) "
        f"that gives a loss; found {found}"
    )


def _takes_pair_and_batch(function: Callable[..., Any]) -> bool:
    """Whether a function takes model, guide and a batch by position, as far as it has a signature."""
    try:
        kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):
        return True
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return inspect.Parameter.VAR_POSITIONAL in kinds or sum(kind in positional for kind in kinds) >= 3


@final
class LossFunction(ELBO):
    """A loss of one's own, loss(model, guide, *batch), as `pyro.infer.SVI` takes it in place of an ELBO.

    The loss is a tensor of one number with a gradient: minus a bound, summed over the batch, times the plate's scale.
    """

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        return float(self._call(model, guide, args, kwargs))

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = self._call(model, guide, args, kwargs)
        if not loss.requires_grad:
            raise self._error("one without a gradient, as .item(), .detach() or torch.no_grad() leave it")
        return loss

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss; its gradient is added to `.grad` of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.detach()

    def _call(self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        loss = self.function(model, guide, *args, **kwargs)
        if not isinstance(loss, Tensor):
            raise self._error(f"{type(loss).__name__}. Of an ELBO pass the object, or its differentiable_loss")
        if loss.numel() != 1:
            raise self._error(f"one of shape {list(loss.shape)}: sum it over the batch")
        return loss.reshape(())

    def _error(self, found: str) -> UsageError:
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return UsageError(
            f"objective: expected a function whose loss is a tensor of one number with a gradient, found {found} "
            f"({name})"
        )

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError


def check_guide_of_loss(objective: ELBO, guide: Program, batch: Sequence[Any], s: Structure) -> None:
    """Raises ContractError for a guide's latent, factor or helper that has no gradient under `TraceMeanField_ELBO`."""
    if not isinstance(objective, TraceMeanField_ELBO):
        return
    if s.non_reparameterized:
        raise site_error(
            s.non_reparameterized[0], f"a reparameterised latent for {type(objective).__name__}, which has pathwise "
            "gradients alone", "one without", "pass objective=pyro.infer.Trace_ELBO()"
        )  # fmt: skip
    extra = (Role.FACTOR, Role.AUXILIARY)
    if not set(extra) & set(s.guide_roles.values()):
        return
    for name, node in sample_sites(trace_program(guide, batch, Structure(), {})):
        if s.guide_roles.get(name) in extra and not node["fn"].has_rsample:
            raise site_error(
                name, f"a guide whose helpers and factors are reparameterised, for {type(objective).__name__}",
                "one with has_rsample=False", "take pyro.infer.Trace_ELBO()",
            )  # fmt: skip


def single_loss(objective: ELBO) -> ELBO:
    """The objective with a loss that is one number on batches of any size, as most are already.

    Raises:
        UsageError: the objective has gradients and no loss, of which nothing could be reported or checked.
    """
    if isinstance(objective, WITHOUT_LOSS):
        raise UsageError(
            f"objective: expected one whose loss is a number, found {type(objective).__name__}, which has gradients "
            f"alone; take ppvae.objectives.Renyi or IWAE, or train it with pyro.infer.SVI"
        )
    return PyroLoss(objective) if isinstance(objective, (ReweightedWakeSleep, *TRACED)) else objective


@final
class PyroLoss(ELBO):
    """An objective of Pyro's with several losses, which are summed, or one that is traced anew for each shape of batch.

    `pyro.infer.ReweightedWakeSleep` has two losses, of the model's parameters and of the guide's. A graph that
    `torch.jit` has traced holds sizes of its batch as constants, so that another batch, such as a smaller last one,
    needs a graph of its own.
    """

    def __init__(self, objective: ELBO):
        super().__init__(num_particles=objective.num_particles, max_plate_nesting=objective.max_plate_nesting)
        self.objective = objective
        self._traced: dict[Any, ELBO] = {}

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        with _explain_observations():
            return _total(self._of(args).loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The sum of the objective's losses; the gradient of each is added to `.grad` of its parameters."""
        with _explain_observations():
            return _total(self._of(args).loss_and_grads(model, guide, *args, **kwargs))

    def _of(self, batch: tuple[Any, ...]) -> ELBO:
        """The objective for batches of these shapes."""
        if not isinstance(self.objective, TRACED):
            return self.objective
        shapes = tuple(tuple(t.shape) if isinstance(t, Tensor) else t for t in batch)
        return self._traced.setdefault(shapes, copy.copy(self.objective))

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return self.objective._get_trace(model, guide, args, kwargs)


@contextmanager
def _explain_observations() -> Iterator[None]:
    """Turns the TypeError of a pair without the argument `observations` of the sleep phase into a UsageError."""
    try:
        yield
    except TypeError as error:
        if "observations" not in str(error):
            raise
        raise UsageError(
            "objective: ReweightedWakeSleep with insomnia < 1 calls model and guide with observations={site: simulated "
            "value}, and one of them has no such argument. Give it to both, observations=None by default, and let the "
            "guide read the values where they are given; or pass insomnia=1"
        ) from error


def _total(loss: Any) -> float:
    return sum(loss) if isinstance(loss, tuple) else loss
