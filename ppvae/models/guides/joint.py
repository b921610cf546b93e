"""One posterior, such as a flow, over several latents of a model jointly."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, final

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.distributions.transforms import Transform

from ppvae.errors import ContractError, site_error
from ppvae.models.composed_model import ComposedModel
from ppvae.rng import fork_rng

JOINT = "joint_latent"  # the auxiliary site


@final
class JointPosterior(ComposedModel):
    """A model with one posterior over all its latents: q(u | x) of their unconstrained values, one after another.

    The guide draws u [size] from `posterior(x)`, such as `posteriors.SplineCoupling` or `posteriors.FullRank`, as the
    auxiliary site "joint_latent". The latents are pieces of u, each mapped onto the support of its site: dependence
    between latents, which a guide of a factor each lacks, is that of the posterior. The density is exact:
    log q(z | x) = log q(u | x) - sum over sites of log |det dz/du|.

    Args:
        model: a Pyro program; its latents stand in one plate over the data, and may stand in further ones within it.
        posterior: a function of the size of u that returns the part q(u | x). It is given the first tensor of the
            batch, and the second if it declares `context`.
        batch: a few data, a tensor or a tuple of them, from which the shapes of the latents are read.

    Attributes:
        size: of u, the number of unconstrained numbers of a datum.

    Raises ContractError, by the site's name, for a discrete latent, one outside the data plate or in a plate that draws
    a subsample, or one whose support depends on other values; ContractError for a posterior of another size.
    Source: Rezende and Mohamed 2015 (arXiv 1505.05770); Kucukelbir et al. 2017 (arXiv 1603.00788) for the maps.

    >>> import pyro, torch
    >>> from ppvae import nn, posteriors
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         scale = pyro.sample("scale", dist.Gamma(torch.tensor(2.0), 2.0))
    ...         loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...         pyro.sample("x", dist.Normal(loc, scale.unsqueeze(-1)).to_event(1), obs=x)
    >>> flow = lambda size: posteriors.SplineCoupling(nn.mlp(2, 2 * size + 16), latent=size)
    >>> pair = JointPosterior(model, flow, torch.zeros(4, 2))
    >>> pair.size
    3
    """

    def __init__(self, model: Callable[..., Any], posterior: Callable[[int], nn.Module], batch: Any):
        super().__init__("joint_posterior")
        batch = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
        with torch.no_grad(), fork_rng(), pyro.get_param_store().scope():
            trace = poutine.trace(model).get_trace(*batch)
        self.plate, self.latents = _latents(trace, len(batch[0]))
        self.size = sum(latent.count for latent in self.latents)
        self.posterior = posterior(self.size)
        base = getattr(model, "__self__", model)
        self.bases = nn.ModuleList([base] if isinstance(base, nn.Module) else [])
        self.program = (model,)  # in a tuple: a module is no second child

    def model(self, *batch: Any) -> Any:
        """The model itself."""
        return self.program[0](*batch)

    def guide(self, *batch: Any) -> None:
        """q(u | x), and the latents as images of u."""
        with pyro.plate(self.plate, len(batch[0])):
            fn = self.call_part("posterior", batch[0], context=batch[1] if len(batch) > 1 else None)
            if tuple(fn.event_shape) != (self.size,):
                raise ContractError(
                    f"posterior: expected one over the {self.size} unconstrained numbers of "
                    f"{', '.join(latent.name for latent in self.latents)}, found event shape {list(fn.event_shape)}"
                )
            u = pyro.sample(JOINT, fn, infer={"is_auxiliary": True})
            depth = max(len(latent.inner) for latent in self.latents)
            lead = u.shape[: max(0, u.dim() - 2 - depth)]  # particles; the dims of inner plates are of size one
            pieces = u.reshape(*lead, *u.shape[-2:]).split([latent.count for latent in self.latents], -1)
            for latent, piece in zip(self.latents, pieces, strict=True):
                sizes = [1] * (depth - len(latent.inner)) + [size for _, size in latent.inner]
                free = piece.reshape(*piece.shape[:-1], *sizes, *latent.shape).movedim(len(lead), len(lead) + depth)
                value = latent.transform(free)
                log_det = latent.transform.log_abs_det_jacobian(free, value)
                batch = free.dim() - len(latent.shape)
                log_det = log_det.reshape(*log_det.shape[:batch], -1).sum(-1)
                with ExitStack() as stack:
                    for i, (name, size) in enumerate(latent.inner):
                        if name:
                            stack.enter_context(pyro.plate(name, size, dim=i - len(latent.inner) - 1))
                    delta = dist.Delta(value, log_density=-log_det, event_dim=value.dim() - batch)
                    pyro.sample(latent.name, delta)


@dataclass(frozen=True)
class _Latent:
    """A latent of the model: the map from free coordinates, and their shape for one element of the plates."""

    name: str
    transform: Transform
    shape: torch.Size
    inner: tuple[tuple[str, int], ...]  # (name, size) of the plates at dims .., -3, -2; ("", 1) where it is in none

    @property
    def count(self) -> int:
        """The number of free coordinates of a datum."""
        return self.shape.numel() * math.prod(size for _, size in self.inner)


def _latents(trace: Any, rows: int) -> tuple[str, list[_Latent]]:
    """(data plate, latents of a model in its order)."""
    plates: set[str] = set()
    found = []
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or node["is_observed"] or isinstance(node["fn"], _Subsample):
            continue
        frames = {f.dim: f for f in node["cond_indep_stack"] if f.dim is not None}
        inner = {dim: f for dim, f in frames.items() if dim < -1}
        data = frames.get(-1)
        whole = all((f.full_size or f.size) == f.size for f in inner.values())
        if data is None or {data.size, data.full_size or rows} != {rows} or not whole:
            raise site_error(
                name, f"a latent in one plate over the {rows} data, and in others as a whole, for a joint posterior",
                f"plates {[f'{f.name} of size {f.full_size or f.size}' for f in frames.values()]}",
                "write a guide of its own for it",
            )  # fmt: skip
        plates.add(data.name)
        support = node["fn"].support
        numbers = vars(getattr(support, "base_constraint", support)).values()
        if support.is_discrete or any(isinstance(v, Tensor) and v.numel() > 1 for v in numbers):
            raise site_error(
                name, "a continuous latent with a support of its own, for a joint posterior", f"one over {support}",
                "sum it out, or write a guide of its own for it",
            )  # fmt: skip
        transform = biject_to(support)
        shape = torch.Size(transform.inverse_shape(node["fn"].event_shape))
        dims = range(min(inner, default=-1), -1)
        sizes = tuple((inner[d].name, inner[d].size) if d in inner else ("", 1) for d in dims)
        found.append(_Latent(name, transform, shape, sizes))
    if len(plates) != 1:
        raise ContractError(
            f"model: expected latents in one plate over the data, for a joint posterior, found plates {sorted(plates)}"
        )
    return plates.pop(), found
