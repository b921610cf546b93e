"""Flows without an inverse in a guide: their density at a draw, and the space that they reach.

A flow with an inverse is evaluated at the model's values, and an error in it shows. One without is evaluated at its own
draws alone, so that a wrong Jacobian, or a range that is a part of the space, would go into every weight unseen.
"""

from typing import Any

import torch
from torch import Tensor

from ppvae.errors import site_error
from ppvae.inference.contract.support import base_distribution
from ppvae.inference.tracing import flow_of, node_log_prob

EXACT_DIMS = 64  # the Jacobian of a flow of more dims is not taken
FAR = 1e6  # a draw of the base distribution as good as infinite


def check_flow(name: str, p: dict[str, Any], q: dict[str, Any]) -> None:
    """A flow without an inverse has the density of its change of variables, and reaches wherever the prior has mass."""
    fn = base_distribution(q["fn"])
    if flow_of(fn) and fn.event_shape.numel() <= EXACT_DIMS:
        q["ppvae_log_prob"] = node_log_prob(q)  # further draws drop this one from the flow's cache
        check_flow_density(name, fn)
        check_flow_reaches_prior(name, p["fn"], fn)


def check_flow_density(name: str, fn: Any) -> None:
    """log q(z) = log q(u) - log |det dz/du| at the image z of a draw u of the base distribution."""
    u = fn.base_dist.sample().requires_grad_()
    z = _push(fn, u)
    found = fn.log_prob(z)
    dims = fn.event_shape.numel()
    flat = z.reshape(-1, dims)
    rows = [torch.autograd.grad(flat[:, i].sum(), u, retain_graph=True)[0].reshape(-1, dims) for i in range(dims)]
    log_det = torch.linalg.slogdet(torch.stack(rows, 1)).logabsdet.reshape(found.shape)
    base = fn.base_dist.log_prob(u)
    expected = base.sum(tuple(range(found.dim(), base.dim()))) - log_det if base.dim() > found.dim() else base - log_det
    rounding = 1e-6 if found.dtype is torch.float64 else 1e-3
    error = ((found - expected).abs() - rounding * (1 + expected.abs())).detach()
    if bool((error > 0).any()):
        row = int(error.argmax())
        raise site_error(
            name,
            f"log q(z) = log q(u) - log |det dz/du| of its flow, {expected.flatten()[row]:.4g} at a draw",
            f"{found.flatten()[row]:.4g}, so that its log_abs_det_jacobian is wrong",
            f"choose another flow than {type(flow_of(fn)[-1]).__name__}",
        )


def check_flow_reaches_prior(name: str, prior: Any, fn: Any) -> None:
    """A flow does not stay within a bounded part of the space that the prior fills."""
    with torch.no_grad():
        u = fn.base_dist.sample(torch.Size((64,)))
        reached = _push(fn, FAR * u.sign()).abs().amax(0)
        drawn = prior.sample(torch.Size((64,))).abs().amax(0)
    if bool((reached.isfinite() & (reached < drawn)).any()):
        raise site_error(
            name,
            "a flow that reaches wherever the prior has mass",
            f"one that stays within {float(reached.min()):.3g} of zero",
            "add a residual, as block_autoregressive(..., residual='normal') does, or choose another flow",
        )


def _push(fn: Any, u: Tensor) -> Tensor:
    for transform in flow_of(fn):
        u = transform(u)
    return u
