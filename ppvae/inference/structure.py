"""What is known of a pair: its data plate, its sites' roles, its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Structure:
    """What a pair is: its data plate, its sites' roles, its parameters, and how particles can be laid out."""

    plate: str = ""
    plate_nesting: int = 1
    scale: float = 1.0
    full_size: int = 0
    draws_subsample: bool = False  # the plate draws its own subsample of the data, which the pair gets whole
    subsample_size: int = 0
    has_subsample_size: bool = False  # the plate has a subsample_size, which may be this batch's size by chance
    fixed_size: bool = False  # the plate's full size is a number, not the batch's
    layout: str = "one by one"  # or "vectorized", "folded"
    has_global_latents: bool = False  # a latent is shared by all data
    lower_bound_only: bool = False  # a point mass on a discrete latent
    enumerated: tuple[str, ...] = ()
    model_roles: Mapping[str, str] = field(default_factory=dict)
    guide_roles: Mapping[str, str] = field(default_factory=dict)
    event_dims: Mapping[str, int] = field(default_factory=dict)
    observed_dims: int = 0  # numbers observed per datum
    base_measure: str = ""  # what the observed sites' log-densities are relative to
    unmasked: tuple[str, ...] = ()  # observed sites without a mask
    model_params: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    guide_params: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    non_reparameterized: tuple[str, ...] = ()  # latents that the guide does not reparameterise
    discrete: tuple[str, ...] = ()  # latents on a discrete set that are drawn, not summed out
    latent_dims: int = 0  # numbers per datum that the guide draws
    relaxed: tuple[str, ...] = ()  # latents whose prior is a relaxed discrete distribution
    scaled: str = ""  # which scale, other than the data plate's, a site has, so that its densities are not a bound's
    refusal: str = ""  # why weights and log p(x) are refused, where the pair can only be trained
    words: tuple[str, ...] = field(default=(), repr=False)

    @property
    def params(self) -> dict[str, Tensor]:
        """Every registered parameter, unconstrained, by name."""
        return {**self.model_params, **self.guide_params}

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a number for this pair should not be read without."""
        if not self.relaxed:
            return ()
        return (
            f"site {self.relaxed[0]!r} is a relaxed discrete latent: log p(x) is that of the relaxed model, another "
            f"one than the discrete; of a VAE, evaluate vae.discrete",
        )

    def size_of(self, batch: Sequence[Any]) -> int:
        """How many data one call of the pair represents by itself."""
        return self.subsample_size if self.draws_subsample else len(batch[0])

    def represented(self, rows: int) -> int:
        """How many data the loss of a batch of so many rows stands for."""
        return self.full_size if self.fixed_size else rows
