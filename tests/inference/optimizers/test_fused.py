"""Steps by the fused kernel are those of the optimizer, to the last bit, and leave its state as it does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR

from ppvae.inference.optimizers.fused import FusedAdam

SHAPES = [(3, 4), (4,), (), (2, 1)]
OPTIMIZERS = {
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.1, fused=True),
    "betas": lambda ps: torch.optim.Adam(ps, lr=0.1, betas=(0.5, 0.7), eps=0.1, maximize=True, fused=True),
    "amsgrad": lambda ps: torch.optim.Adam(ps, lr=0.1, amsgrad=True, weight_decay=0.3, fused=True),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.1, weight_decay=0.3, fused=True),
    "groups": lambda ps: torch.optim.Adam([{"params": ps[:1], "lr": 0.3}, {"params": ps[1:]}], lr=0.1, fused=True),
    "not fused": lambda ps: torch.optim.Adam(ps, lr=0.1),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.5),
}


def run(make, direct, event):
    """Parameters and state after twelve steps; `event` is called as event(step, optimizer, parameters) before each."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]
    optimizer = make(params)
    fused = FusedAdam(optimizer)
    for i in range(12):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        event(i, optimizer, params)
        (fused if direct else optimizer).step()
    return [p.detach() for p in params], optimizer.state_dict()


def nothing(i, optimizer, params):
    pass


def without_a_gradient(i, optimizer, params):
    if i in (3, 4, 8):
        params[i % 3].grad = None


def restored(i, optimizer, params):
    if i in (4, 7):
        state = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(state)


def replaced_state(i, optimizer, params):
    if i == 5 and "exp_avg" in optimizer.state[params[1]]:
        optimizer.state[params[1]]["exp_avg"] = torch.ones(4)


def another_rate(i, optimizer, params):
    if i == 6:
        optimizer.param_groups[0]["lr"] = 0.01


def added(i, optimizer, params):
    if i == 5:
        late = torch.ones(2, requires_grad=True)
        params.append(late)
        late.grad = torch.ones(2)
        optimizer.add_param_group({"params": [late]})


@pytest.mark.parametrize("event", [nothing, without_a_gradient, restored, replaced_state, another_rate, added])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_the_optimizer(name, event):
    (expected, state), (found, own) = (run(OPTIMIZERS[name], direct, event) for direct in (False, True))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(own, state, rtol=0, atol=0)


def test_the_kernel_is_called_directly_after_the_first_step(monkeypatch):
    p = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.Adam([p], lr=0.1, fused=True)
    fused, steps = FusedAdam(optimizer), []
    monkeypatch.setattr(torch.optim.Adam, "_init_group", spy(torch.optim.Adam._init_group, steps))
    for _ in range(4):
        p.grad = torch.ones(3)
        fused.step()
    assert len(steps) == 1


def test_schedules_are_followed_and_hooks_are_called(recwarn):
    p, seen = torch.ones(3, requires_grad=True), []
    optimizer = torch.optim.Adam([p], lr=0.1, fused=True)
    schedule, fused = ExponentialLR(optimizer, 0.5), FusedAdam(optimizer)
    for i in range(4):
        p.grad = torch.ones(3)
        if i == 2:
            optimizer.register_step_post_hook(lambda *_: seen.append(1))
        fused.step()
        schedule.step()
    assert seen == [1, 1]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 16)
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_a_schedule_of_a_restored_optimizer_is_silent(recwarn):
    p = torch.ones(3, requires_grad=True)
    before = torch.optim.Adam([p], lr=0.1, fused=True)
    p.grad = torch.ones(3)
    before.step()
    optimizer = torch.optim.Adam([p], lr=0.1, fused=True)
    optimizer.load_state_dict(before.state_dict())
    schedule = ExponentialLR(optimizer, 0.5)
    FusedAdam(optimizer).step()
    schedule.step()
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def spy(function, calls):
    def called(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return called
