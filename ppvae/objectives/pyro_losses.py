"""Objectives of Pyro's as `fit` takes them: a loss that is one number, on batches of any size."""

import copy
from typing import Any, final

from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    ReweightedWakeSleep,
    TraceTailAdaptive_ELBO,
)
from torch import Tensor

from ppvae.errors import UsageError

TRACED = (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO)
WITHOUT_LOSS = (TraceTailAdaptive_ELBO,)


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
        return _total(self._of(args).loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The sum of the objective's losses; the gradient of each is added to `.grad` of its parameters."""
        return _total(self._of(args).loss_and_grads(model, guide, *args, **kwargs))

    def _of(self, batch: tuple[Any, ...]) -> ELBO:
        """The objective for batches of these shapes."""
        if not isinstance(self.objective, TRACED):
            return self.objective
        shapes = tuple(tuple(t.shape) if isinstance(t, Tensor) else t for t in batch)
        return self._traced.setdefault(shapes, copy.copy(self.objective))

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return self.objective._get_trace(model, guide, args, kwargs)


def _total(loss: Any) -> float:
    return sum(loss) if isinstance(loss, tuple) else loss
