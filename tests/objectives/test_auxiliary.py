"""AuxiliaryLoss."""

from __future__ import annotations

import pytest
import torch
from pyro.infer import Trace_ELBO

from ppvae import objectives
from ppvae.errors import UsageError
from ppvae.inference.param_store import ParamScope
from ppvae.objectives import (
    ELBO,
    IWAE,
)  # fmt: skip
from ppvae.objectives.auxiliary import AuxiliaryLoss
from tests.objectives.pairs import pair

pytestmark = pytest.mark.filterwarnings("ignore:STL is biased")


@pytest.mark.parametrize("of", [lambda: ELBO(3), lambda: IWAE(3, gradient="dreg"), lambda: objectives.TVO(4)])
def test_plus_adds_a_term_of_the_batch_to_loss_and_gradient(of) -> None:
    p, x = pair()
    shift = torch.tensor([0.5], dtype=torch.float64)
    losses, gradients = [], []
    for objective in (of(), AuxiliaryLoss(of(), lambda x: (p.loc * shift - x).sum(-1), weight=2.0)):
        with ParamScope().entered():
            objective.loss(p.model, p.mean_field, x)
            torch.manual_seed(1)
            p.zero_grad()
            losses.append(objective.loss_and_grads(p.model, p.mean_field, x))
            gradients.append(p.loc.grad.clone())
    term = 2.0 * (p.loc.detach() * shift - x).sum()
    assert losses[1] == pytest.approx(losses[0] - float(term), abs=1e-9)
    torch.testing.assert_close(gradients[1], gradients[0] - 2.0 * 6 * shift.expand(5))


def test_plus_follows_the_schedules_of_its_bound() -> None:
    p, x = pair()
    objective = AuxiliaryLoss(ELBO(warmup=4), lambda x: x.sum(-1))
    for step in range(3):
        assert objective.scheduled_values()["beta"] == step / 4
        objective.loss_and_grads(p.model, p.mean_field, x)
    again = AuxiliaryLoss(ELBO(warmup=4), lambda x: x.sum(-1))
    again.load_state_dict(objective.state_dict())
    assert again.scheduled_values() == objective.scheduled_values()


def test_plus_refuses_what_it_cannot_add() -> None:
    p, x = pair()
    with pytest.raises(UsageError, match="bound: expected an objective of ppvae, found Trace_ELBO"):
        AuxiliaryLoss(Trace_ELBO(), lambda x: x.sum(-1))
    with pytest.raises(UsageError, match=r"term: expected one number per datum \[6\], found \[\]"):
        AuxiliaryLoss(ELBO(), lambda x: x.sum()).loss(p.model, p.mean_field, x)
