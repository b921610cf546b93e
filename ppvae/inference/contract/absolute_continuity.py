"""Absolute continuity: a guide must have mass wherever its prior has, or its weights are wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ppvae.errors import refused
from ppvae.inference.contract.support import base_distribution, event_size, is_discrete, mask_of, support_name


def check_absolute_continuity(
    model: Mapping[str, Any], guide: Mapping[str, Any], model_roles: Mapping[str, str], guide_roles: Mapping[str, str]
) -> bool:
    """Refuses a guide that is not absolutely continuous with its prior; True where it gives a lower bound only."""
    lower = False
    points: dict[str, int] = {}
    for name, role in guide_roles.items():
        if role == "auxiliary":
            continue
        p, q = model[name], guide[name]
        if not _same_mask(mask_of(p), mask_of(q)):
            raise refused(
                name, "the same mask in model and guide", "a mask that differs between the two",
                "mask both sides of a latent alike",
            )  # fmt: skip
        prior, posterior = base_distribution(p["fn"]), base_distribution(q["fn"])
        discrete = getattr(p["fn"], "has_enumerate_support", False) or is_discrete(prior)
        if isinstance(posterior, dist.Delta):
            if discrete:
                lower = True
            elif isinstance(prior, dist.Delta):
                continue
            else:
                points[name] = event_size(q)
        elif not discrete:
            _check_support_covers(name, p, q)
        elif type(prior) is not type(posterior):  # a guide that never gives some values leaves their mass out
            with torch.no_grad():
                lower = lower or not bool(q["fn"].support.check(p["fn"].sample(torch.Size((64,)))).all())
    helpers = {n: event_size(guide[n]) for n, role in guide_roles.items() if role == "auxiliary"}
    if sum(points.values()) != sum(helpers.values()) and (points or helpers):
        if points:
            name = next(iter(points))
            raise refused(
                name,
                f"a guide absolutely continuous with its prior {type(base_distribution(model[name]['fn'])).__name__}",
                "a Delta (point mass), under which importance weights look perfect and are wrong",
                "use a guide with a density to estimate log p(x); Delta can still be trained (MAP)",
            )  # fmt: skip
        name = next(iter(helpers))
        raise refused(
            name, "a helper that a Delta site turns into a latent, dim for dim",
            f"{helpers[name]} dims per datum that the model has no density for",
            "give the latent a density of its own in the guide",
        )  # fmt: skip
    return lower


def check_families(model: Mapping[str, Any], guide: Mapping[str, Any]) -> None:
    """Refuses a continuous guide of a discrete latent, and the other way round."""
    for name, q in guide.items():
        if name not in model or isinstance(base_distribution(q["fn"]), dist.Delta):
            continue
        prior, posterior = base_distribution(model[name]["fn"]), base_distribution(q["fn"])
        if is_discrete(prior) != is_discrete(posterior):
            kind = "discrete" if is_discrete(prior) else "continuous"
            raise refused(
                name,
                f"a {kind} guide, as its prior {type(prior).__name__} is",
                type(posterior).__name__,
                "choose a guide that is absolutely continuous with the prior",
            )


def _same_mask(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        a, b = torch.broadcast_tensors(a, b)
        return bool((a == b).all())
    return (a is None or a is True) == (b is None or b is True) and isinstance(a, Tensor) == isinstance(b, Tensor)


def _check_support_covers(name: str, p: dict[str, Any], q: dict[str, Any]) -> None:
    prior, posterior = p["fn"].support, q["fn"].support
    while isinstance(prior, constraints.independent):
        prior = prior.base_constraint
    while isinstance(posterior, constraints.independent):
        posterior = posterior.base_constraint
    thin = (constraints.simplex, dist.constraints.sphere)  # of measure zero among real vectors
    if posterior in (constraints.real, constraints.real_vector) and prior not in thin:
        return
    if type(prior) is type(posterior) and not vars(prior):
        return
    inner, outer = _bounds(prior), _bounds(posterior)
    if inner is not None and outer is not None:
        if bool((outer[0] <= inner[0]).all()) and bool((inner[1] <= outer[1]).all()):
            return
    else:  # no interval: ask the guide about draws of the prior
        with torch.no_grad():
            draws = p["fn"].sample(torch.Size((64,)))
            if bool(q["fn"].support.check(draws).all()):
                return
    raise refused(
        name,
        f"a guide whose support holds the prior's ({support_name(prior)})",
        f"{type(base_distribution(q['fn'])).__name__} on {support_name(posterior)}",
        "choose a guide, or transform it, so that it reaches wherever the prior has mass",
    )


def _bounds(support: Any) -> tuple[Tensor, Tensor] | None:
    """Lower and upper end of an interval; None for a support that is none."""
    if support is constraints.real or support is constraints.real_vector:
        return torch.tensor(-torch.inf), torch.tensor(torch.inf)
    intervals = (
        constraints.interval, constraints.half_open_interval, constraints.greater_than, constraints.greater_than_eq,
        constraints.less_than,
    )  # fmt: skip
    if not isinstance(support, intervals):
        return None
    low, high = getattr(support, "lower_bound", -torch.inf), getattr(support, "upper_bound", torch.inf)
    return torch.as_tensor(low), torch.as_tensor(high)
