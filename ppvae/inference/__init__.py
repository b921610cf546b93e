"""Inference turns a model/guide pair, plain Pyro functions with a data plate, into `Terms`: log-densities per site.

The library has three vocabularies. A conditional is a module that returns a distribution; a model/guide pair is made of
conditionals, or written by hand; `Terms` are the log-densities of a pair on one batch. This room is the step from the
second to the third, and knows Pyro only.

- `inspect` runs a pair once on a batch, checks it against the contract (`contract`), and returns its `Structure`: the
  data plate, the role of each site, the parameters, and the layout of several particles in one run. `check` returns the
  same as a text.
- `terms` traces guide and model and returns `Terms`: each `Site` with its value, distribution and log-density
  [particles, batch], and the sums log_lik, log_prior, log_guide and log_weight. Objectives, gradient estimators and
  estimates of log p(x) are functions of `Terms`; log-densities are added up nowhere else.
- `tracing` runs programs, `enumeration` sums sites out, `particle_layout` lays out particles, `terms` evaluates a pair
  of known structure, and `inspection` finds the structure and composes above all of these. `param_store` gives every
  run a parameter scope of its own; `from_param_store` binds a pair to Pyro's store. `SVI` is a drop-in for
  `pyro.infer.SVI`.
"""

from ppvae.inference.inspection import check, inspect, terms
from ppvae.inference.param_store import from_param_store
from ppvae.inference.sites import Site
from ppvae.inference.structure import ParticlePlacement, Role, Structure
from ppvae.inference.svi import SVI
from ppvae.inference.terms import Terms, simulate

__all__ = [
    "SVI", "ParticlePlacement", "Role", "Site", "Structure", "Terms", "check", "from_param_store", "inspect",
    "simulate", "terms",
]  # fmt: skip
