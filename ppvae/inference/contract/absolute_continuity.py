"""Absolute continuity: a guide needs mass wherever its prior has mass, or its importance weights are wrong."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ppvae.errors import site_error, support_name
from ppvae.inference.contract.change_of_variables import check_change_of_variables
from ppvae.inference.contract.flows import check_flow
from ppvae.inference.contract.support import (
    base_distribution,
    base_support,
    is_discrete,
    mask_of,
    same_mask,
)
from ppvae.inference.structure import Role
from ppvae.inference.tracing import Program, has_inverse, latent_support_of

ROUNDED = (dist.RelaxedBernoulliStraightThrough, dist.RelaxedOneHotCategoricalStraightThrough)


def check_absolute_continuity(
    guide_program: Program, batch: Sequence[Any], model: Mapping[str, Any], guide: Mapping[str, Any],
    guide_roles: Mapping[str, Role], plate: str, joint: bool,
) -> bool:  # fmt: skip
    """Refuses a guide that is not absolutely continuous with its prior; returns whether it gives a lower bound only.

    A guide that omits values of a discrete latent gives a lower bound of log p(x).

    Args:
        plate: name of the data plate.
        joint: a latent is shared by all data, so that weights are joint.
    """
    lower_bound_only = check_each_latent(model, guide, guide_roles)
    points = _points(model, guide, guide_roles)
    auxiliary = [name for name, role in guide_roles.items() if role is Role.AUXILIARY]
    if points or auxiliary:
        check_change_of_variables(guide_program, batch, model, guide, points, auxiliary, plate, joint)
    return lower_bound_only


def check_each_latent(model: Mapping[str, Any], guide: Mapping[str, Any], guide_roles: Mapping[str, Role]) -> bool:
    """Masks and supports of each latent alone; whether the guide omits values of a discrete one."""
    lower_bound_only = False
    for name, role in guide_roles.items():
        if role is Role.AUXILIARY:
            continue
        p, q = model[name], guide[name]
        check_same_mask(name, mask_of(p), mask_of(q))
        if _is_point_mass(q):
            lower_bound_only = lower_bound_only or _has_discrete_prior(p)
        elif _has_discrete_prior(p):
            lower_bound_only = lower_bound_only or _omits_values(p, q)
        else:
            check_support_covers_prior(name, p, q)
            if not has_inverse(q):
                check_flow(name, p, q)
    return lower_bound_only


def _is_point_mass(node: dict[str, Any]) -> bool:
    return isinstance(base_distribution(node["fn"]), dist.Delta)


def _has_discrete_prior(p: dict[str, Any]) -> bool:
    return getattr(p["fn"], "has_enumerate_support", False) or is_discrete(base_distribution(p["fn"]))


def _omits_values(p: dict[str, Any], q: dict[str, Any]) -> bool:
    """Whether the guide of a discrete latent gives no mass to some of 64 draws of its prior."""
    if type(base_distribution(p["fn"])) is type(base_distribution(q["fn"])):
        return False
    return _holds_draws(q["fn"], p["fn"]) is False


def _holds_draws(outer: Any, inner: Any) -> bool | None:
    """Whether one distribution gives mass to 64 draws of another; None where neither support nor density tells."""
    support = latent_support_of(outer)
    try:
        with torch.no_grad():
            draws = inner.sample(torch.Size((64,)))
            inside = outer.log_prob(draws) > -torch.inf if support is None else support.check(draws)
            return bool(inside.all())
    except (NotImplementedError, RuntimeError, ValueError, KeyError):
        return None


def check_same_mask(name: str, p: Any, q: Any) -> None:
    """A latent has one mask, in the model and in the guide."""
    if not same_mask(p, q):
        raise site_error(
            name, "the same mask in model and guide", "a mask that differs between the two",
            "mask both sides of a latent alike",
        )  # fmt: skip


def _points(model: Mapping[str, Any], guide: Mapping[str, Any], guide_roles: Mapping[str, Role]) -> list[str]:
    """The continuous latents whose guide is a Delta and whose prior is none."""
    return [
        name
        for name, role in guide_roles.items()
        if role is not Role.AUXILIARY
        and _is_point_mass(guide[name])
        and not _has_discrete_prior(model[name])
        and not _is_point_mass(model[name])
    ]


def check_families(model: Mapping[str, Any], guide: Mapping[str, Any]) -> None:
    """A discrete latent has a discrete guide, a continuous latent a continuous one."""
    for name, q in guide.items():
        if name not in model or isinstance(base_distribution(q["fn"]), dist.Delta):
            continue
        prior, posterior = base_distribution(model[name]["fn"]), base_distribution(q["fn"])
        if rounded := next((fn for fn in (posterior, prior) if isinstance(fn, ROUNDED)), None):
            raise site_error(
                name, "draws at which their distribution has a density",
                f"{type(rounded).__name__}, whose draws are rounded, and whose density is that of others",
                "take a Bernoulli or OneHotCategorical on both sides, with gradient='arms' or 'straight_through'; or "
                "the relaxed distribution without rounding",
            )  # fmt: skip
        if is_discrete(prior) != is_discrete(posterior):
            kind = "discrete" if is_discrete(prior) else "continuous"
            raise site_error(
                name,
                f"a {kind} guide, as its prior {type(prior).__name__} is",
                type(posterior).__name__,
                "choose a guide that is absolutely continuous with the prior",
            )


def check_support_covers_prior(name: str, p: dict[str, Any], q: dict[str, Any]) -> None:
    """The support of a continuous latent's guide contains the support of its prior."""
    prior, posterior = (base_support(latent_support_of(node["fn"])) for node in (p, q))
    thin = (constraints.simplex, dist.constraints.sphere)  # of measure zero among real vectors
    if posterior in (constraints.real, constraints.real_vector) and prior not in thin:
        return
    if prior is not None and type(prior) is type(posterior) and not vars(prior):
        return
    inner, outer = _bounds(prior), _bounds(posterior)
    if inner is not None and outer is not None:
        if bool((outer[0] <= inner[0]).all()) and bool((inner[1] <= outer[1]).all()):
            return
    elif _holds_draws(q["fn"], p["fn"]) is not False:  # not intervals, or unknown
        return
    raise site_error(
        name,
        f"a guide whose support holds the prior's ({support_name(prior)})",
        f"{type(base_distribution(q['fn'])).__name__} on {support_name(posterior)}",
        "choose a guide, or transform it, so that it reaches wherever the prior has mass",
    )


def _bounds(support: Any) -> tuple[Tensor, Tensor] | None:
    """(lower, upper) end of an interval; None for any other support."""
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
