"""The structure of a model/guide pair: its data plate, the roles of its sites, its parameters, its particle layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from torch import Tensor

from ppvae.errors import site_error

NOT_NORMALIZED = "the model is not normalised"  # how the remark on such a model begins


class Role(StrEnum):
    """What a site contributes to the log-weight; a string, so that `Role.LATENT == "latent"`."""

    LATENT = "latent"  # sampled by the guide, with a density in model and guide
    OBSERVED = "observed"  # a site with obs= in the model
    ENUMERATED = "enumerated"  # summed out exactly, over its whole support
    AUXILIARY = "auxiliary"  # sampled by the guide alone; a Delta site maps it to a latent
    CANCELLED = "cancelled"  # sampled from its prior, the unobserved half of `obs_mask`: its density ratio is one
    FACTOR = "factor"  # `pyro.factor`, counted in the model; what the guide observes is a term of the loss alone

    def __repr__(self) -> str:
        return repr(self.value)


class ParticlePlacement(StrEnum):
    """Where particles stand in the tensors of a run; a string, so that `ParticlePlacement.FOLDED == "folded"`."""

    VECTORIZED = "vectorized"  # in a dim of their own, under a plate left of all others
    FOLDED = "folded"  # in the batch dim: [particles * batch, ...]
    ONE_BY_ONE = "one by one"  # nowhere: one run per particle

    def __repr__(self) -> str:
        return repr(self.value)


def lone_role(node: Mapping[str, Any]) -> Role:
    """The role of a guide's site, as far as the guide alone shows it."""
    infer = node["infer"] or {}
    if node["is_observed"]:
        return Role.FACTOR
    if infer.get("enumerate") in ("parallel", "sequential"):
        return Role.ENUMERATED
    return Role.AUXILIARY if infer.get("is_auxiliary") else Role.LATENT


class SiteDict(dict[str, Any]):
    """A property of sites by name; a site of another batch than the inspected one is refused by its name."""

    def __missing__(self, name: str) -> Any:
        raise site_error(
            name, "a site of the batch that was inspected, the first of the data", "one that only a later batch has",
            "order the data so that the batch with most sites, as with the longest sequence, comes first",
        )  # fmt: skip


@dataclass(frozen=True)
class Structure:
    """The result of inspecting a pair: data plate, site roles, parameters, particle layout, and what is refused."""

    plate: str = ""  # name of the data plate
    plate_nesting: int = 1  # number of plate dims, the data plate's included
    scale: float = 1.0  # the data plate's full size over its size in the batch
    common_scale: float = 1.0  # the factor of one poutine.scale around model and guide, divided out of every weight
    full_size: int = 0  # the data plate's full size
    draws_subsample: bool = False  # the plate draws its own subsample; the pair is called with the whole data set
    subsample_size: int = 0  # rows of that subsample; 0 where the plate draws none
    has_subsample_size: bool = False  # the plate is given a subsample_size, which may equal this batch's size
    has_fixed_full_size: bool = False  # the plate's full size is a constant and not the batch's size
    layout: ParticlePlacement = ParticlePlacement.ONE_BY_ONE
    has_global_latents: bool = False  # a latent stands outside the data plate and is shared by all data
    global_sites: tuple[str, ...] = ()  # sites of either side outside the data plate
    local_refusal: str = ""  # why no datum has a log-weight of its own given the global latents
    globals_read_rows: bool = False  # a density of a global latent depends on the rows of the batch
    lower_bound_only: bool = False  # the guide omits values of a discrete latent: estimates are lower bounds
    enumerated: tuple[str, ...] = ()  # sites of either side that are summed out
    model_roles: Mapping[str, Role] = field(default_factory=dict)
    guide_roles: Mapping[str, Role] = field(default_factory=dict)
    event_dims: Mapping[str, int] = field(default_factory=dict)  # number of event dims by site
    labels: tuple[str, ...] = ()  # observed sites with infer={"is_label": True}, which are no dims of x
    observed_dims: int = 0  # numbers observed per datum, without labels
    base_measure: str = ""  # base measure of the observed sites' log-densities
    unmasked: tuple[str, ...] = ()  # observed sites without a mask
    model_params: Mapping[str, Tensor] = field(default_factory=dict, repr=False)  # unconstrained, by name
    guide_params: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    non_reparameterized: tuple[str, ...] = ()  # guide sites that are sampled without reparameterisation
    straight_through: tuple[str, ...] = ()  # of these, discrete sites whose draws have a gradient, which is biased
    no_inverse: tuple[str, ...] = ()  # guide sites with a density at their own draws alone: flows without an inverse
    from_base: tuple[str, ...] = ()  # of these, the sites whose given values are draws of their base distributions
    learned_maps: tuple[str, ...] = ()  # latents mapped from auxiliary sites by parameters of the map itself
    discrete: tuple[str, ...] = ()  # discrete latents that the guide samples, not enumerates
    latent_dims: int = 0  # numbers that the guide samples per datum
    quadrature_dims: int = 0  # the same where each datum has each latent once, so that quadrature is exact; else 0
    relaxed: tuple[str, ...] = ()  # latents whose prior is a continuous relaxation of a discrete distribution
    unnormalized: tuple[str, ...] = ()  # model sites that are no normalised density: factors, improper priors
    draws_noise: bool = False  # sites are enumerated, and the guide depends on random numbers drawn outside of sites
    bound_refusal: str = ""  # the error of a pair whose sites do not add up to a bound, as under scales that differ
    weights_refusal: str = ""  # the error raised where weights or log p(x) are asked for; training is possible
    row_order: str = ""  # what binds the pair to the order of its rows, in words; set where it is trained
    training_caveats: tuple[str, ...] = ()  # what `fit` says once of a pair that it trains
    description: tuple[str, ...] = field(default=(), repr=False)  # lines of text for `check`

    further: dict[Any, Structure] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", ParticlePlacement(self.layout))  # a plain string is accepted
        for name in ("model_roles", "guide_roles", "event_dims"):
            object.__setattr__(self, name, SiteDict(getattr(self, name)))

    def with_guide_sites(self, sites: Mapping[str, tuple[Role, int]]) -> Structure:
        """The structure of a batch with further sites in the guide, given (role, event dims) of its sites by name."""
        new = {name: site for name, site in sites.items() if name not in self.guide_roles}
        if not new:
            return self
        key = "guide", *new
        if key not in self.further:
            self.further[key] = replace(
                self,
                guide_roles={**self.guide_roles, **{name: role for name, (role, _) in new.items()}},
                event_dims={**self.event_dims, **{name: dims for name, (_, dims) in new.items()}},
                enumerated=(*self.enumerated, *(n for n, (role, _) in new.items() if role is Role.ENUMERATED)),
            )
        return self.further[key]

    @property
    def params(self) -> dict[str, Tensor]:
        """Every registered parameter, unconstrained, by name."""
        return {**self.model_params, **self.guide_params}

    @property
    def observed_site(self) -> str:
        """The model's observed site; "x" where there are several."""
        found = [name for name, role in self.model_roles.items() if role is Role.OBSERVED]
        return found[0] if len(found) == 1 else "x"

    def is_discrete(self, name: str) -> bool:
        """Whether a latent of the guide is discrete: sampled, or summed out."""
        return name in self.discrete or name in self.enumerated

    @property
    def remarks(self) -> tuple[str, ...]:
        """Caveats that every reported log p(x) of this pair carries."""
        remarks = []
        if self.relaxed:
            remarks.append(
                f"site {self.relaxed[0]!r} is a relaxed discrete latent: log p(x) is that of the relaxed model, "
                f"another one than the discrete; of a VAE, evaluate vae.discrete"
            )
        if self.unnormalized:
            remarks.append(
                f"{NOT_NORMALIZED}: site {self.unnormalized[0]!r} is no density, so that log p(x) includes "
                f"a constant which differs between models; it compares with no other model"
            )
        return tuple(remarks)

    def batch_size(self, batch: Sequence[Any]) -> int:
        """The number of data that one call of the pair evaluates."""
        return self.subsample_size if self.draws_subsample else len(batch[0])

    def plate_scale(self, rows: int) -> float:
        """The data plate's scale in a batch of `rows` data: the number of data that it stands for, over `rows`."""
        return self.full_size / rows if self.has_fixed_full_size and rows else 1.0

    def represented_size(self, rows: int) -> float:
        """The number of data that the scaled loss of a batch of `rows` data stands for, times the common scale."""
        return (self.full_size if self.has_fixed_full_size else rows) * self.common_scale
