"""Pairs whose guide moves its draws by leapfrog steps along tempered densities from guide to posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, final

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn

from ppvae.errors import UsageError, site_error
from ppvae.errors.ranges import check_numbers
from ppvae.models.composed_model import ComposedModel
from ppvae.models.guides.sites import GivenValues, LatentSites
from ppvae.rng import fork_rng

Program = Callable[..., Any]


@final
class Annealed(ComposedModel):
    """A pair with its guide's draws moved by trained leapfrog steps towards the posterior; p(x) stays the same.

    Step i follows the gradient of log pi_i = (1 - b_i) log q(z | x) + b_i log p(x, z), with 0 < b_1 < .. < b_steps = 1:
    z += e_i rho / 2, rho += e_i grad log pi_i(z), z += e_i rho / 2. Between steps the momentum is refreshed in part,
    (rho, left) = rotation of (rho, new noise). All of it maps (z, noise) to (z, momenta) one to one at constant volume:
    the guide samples "z_start" and "z_noise" as auxiliary sites, and "z" and "z_momentum" are their images. The model
    samples "z_momentum" [steps, *event] from the standard normal, so that weights in the extended space are those of
    p(x), and log p(x), bounds and gradients are valid as of any other pair. With `refresh=False` one momentum is drawn,
    and the guide is the flow of a Hamiltonian variational auto-encoder.

    Trained are the temperatures b_i, the step sizes e_i of each dim, and the share of the momentum that is kept;
    and through the steps the base pair itself, whose parameters are shared. Each step costs a forward and backward
    pass of model and guide. Gradients are pathwise: "stl" and "dreg" hold a guide's maps constant. Plots and
    samples of latents are better made with the base pair, whose sites have no momenta; refined proposals of log p(x)
    are fitted to it as well.

    Args:
        model, guide: the base pair; all its latents are over real numbers, and sampled with a density by the guide.
        batch: a few data, a tensor or a tuple of them, from which the shapes of the latents are read.
        steps: the number of leapfrog steps.
        refresh: refresh the momentum between steps, in part; otherwise the steps are a deterministic map.
        step_size: the initial e_i, in units of the latents.

    Attributes:
        base_pair: the base model and guide.

    Raises ContractError, by the site's name, for a latent over another space than the real numbers, a point mass, or
    one that the guide enumerates or does not sample.
    Source: Geffner and Domke 2021 (arXiv 2107.04150), Zhang et al. 2021 (arXiv 2107.10211), differentiable annealed
    importance sampling; Caterini et al. 2018 (arXiv 1805.11328), Hamiltonian VAE; Salimans et al. 2015 (arXiv
    1410.6460).

    >>> from ppvae.models import LinearGaussian
    >>> base, x = LinearGaussian(3, 2), torch.zeros(4, 3)
    >>> pair = Annealed(base.model, base.guide, x, steps=2)
    >>> [name for name, _ in pair.named_parameters()][:3]
    ['kernel.temperatures', 'kernel.damping', 'kernel.log_step.0']
    """

    def __init__(
        self, model: Program, guide: Program, batch: Any, steps: int = 4, refresh: bool = True, step_size: float = 0.1
    ):
        check_numbers(steps=steps, step_size=step_size)
        if steps < 1:
            raise UsageError(f"steps: expected at least 1, found {steps}")
        super().__init__("annealed")
        batch = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
        with torch.no_grad(), fork_rng(), pyro.get_param_store().scope():
            self.event_shapes = _latents(model, guide, batch)
        like = next(t for t in batch if t.is_floating_point())
        self.kernel = _Kernel(list(self.event_shapes.values()), steps, refresh, step_size).to(like)
        bases = (getattr(program, "__self__", program) for program in (model, guide))
        self.bases = nn.ModuleList({id(base): base for base in bases if isinstance(base, nn.Module)}.values())
        self.base_pair = model, guide

    def model(self, *batch: Any) -> Any:
        """p(x, z) of the base model, and standard normal momenta."""
        latents = LatentSites(self.event_shapes)
        with latents:
            out = self.base_pair[0](*batch)
        for name in self.event_shapes:
            with latents.context(name):
                pyro.sample(f"{name}_momentum", self._noise(name))
        return out

    def guide(self, *batch: Any) -> None:
        """q(z | x) moved by the steps."""
        self.register_part("kernel")
        kernel = self.kernel
        latents = LatentSites(self.event_shapes, "_start")
        with latents:
            self.base_pair[1](*batch)
        noise = {}
        for name in self.event_shapes:
            with latents.context(name):
                fn = self._noise(name)
                noise[name] = pyro.sample(f"{name}_noise", fn, infer={"is_auxiliary": True})
        rows = {name: noise[name].unbind(-1 - len(event)) for name, event in self.event_shapes.items()}
        z, momentum, left = dict(latents.values), {name: row[0] for name, row in rows.items()}, []
        for i, beta in enumerate(kernel.betas()):
            step = {name: kernel.log_step[j][i].exp() for j, name in enumerate(z)}
            z = {name: z[name] + step[name] / 2 * momentum[name] for name in z}
            slope = self._slope(batch, z, latents.subsamples, beta)
            momentum = {name: momentum[name] + step[name] * slope[name] for name in z}
            z = {name: z[name] + step[name] / 2 * momentum[name] for name in z}
            if kernel.damping is not None and i + 1 < len(kernel.temperatures):
                keep = kernel.damping.sigmoid()
                new = (1 - keep**2).sqrt()
                left.append({name: new * momentum[name] - keep * rows[name][i + 1] for name in z})
                momentum = {name: keep * momentum[name] + new * rows[name][i + 1] for name in z}
        for name, event in self.event_shapes.items():
            momenta = torch.stack([*(each[name] for each in left), momentum[name]], -1 - len(event))
            with latents.context(name):
                pyro.sample(name, dist.Delta(z[name], event_dim=len(event)))
                pyro.sample(f"{name}_momentum", dist.Delta(momenta, event_dim=1 + len(event)))

    def _noise(self, name: str) -> dist.TorchDistribution:
        like, event = self.kernel.temperatures, self.event_shapes[name]
        count = 1 if self.kernel.damping is None else len(like)
        zeros = torch.zeros(count, *event, dtype=like.dtype, device=like.device)
        return dist.Normal(zeros, 1.0).to_event(zeros.dim())

    def _slope(
        self, batch: tuple[Any, ...], z: Mapping[str, Tensor], subsamples: Mapping[str, Tensor], beta: Tensor
    ) -> dict[str, Tensor]:
        """The gradient of log pi at z, of each site."""
        through = torch.is_grad_enabled()
        with torch.enable_grad():
            at = {name: v if through and v.requires_grad else v.detach().requires_grad_() for name, v in z.items()}
            log_densities = []
            for share, program in zip((beta, 1 - beta), self.base_pair, strict=True):
                with poutine.block(), poutine.trace() as tracer, GivenValues({**at, **subsamples}):
                    program(*batch)
                log_densities.append(share * _log_density(tracer.get_trace()))
            slopes = torch.autograd.grad(torch.stack(log_densities).sum(), list(at.values()), create_graph=through)
        return dict(zip(at, slopes, strict=True))


class _Kernel(nn.Module):
    """Temperatures, step sizes and the share of the momentum that a refreshment keeps."""

    def __init__(self, events: list[torch.Size], steps: int, refresh: bool, step_size: float):
        super().__init__()
        self.temperatures = nn.Parameter(torch.zeros(steps))
        self.damping = nn.Parameter(torch.zeros(())) if refresh and steps > 1 else None
        self.log_step = nn.ParameterList(torch.full((steps, *event), math.log(step_size)) for event in events)

    def betas(self) -> Tensor:
        """b_1 < .. < b_steps = 1."""
        return self.temperatures.softmax(0).cumsum(0)


def _log_density(trace: Any) -> Tensor:
    """The sum of all log-densities of a trace, without the scales of plates."""
    trace.compute_log_prob()
    return sum(node["log_prob"].sum() / node["scale"] for node in trace.nodes.values() if node["type"] == "sample")


def _latents(model: Program, guide: Program, batch: tuple[Any, ...]) -> dict[str, torch.Size]:
    """Event shapes of the guide's latents by name. ContractError for one that gradients do not move."""
    q = poutine.trace(guide).get_trace(*batch)
    p = poutine.trace(poutine.replay(model, trace=q)).get_trace(*batch)
    out = {}
    for name, node in q.nodes.items():
        if node["type"] != "sample" or isinstance(node["fn"], _Subsample) or node["is_observed"]:
            continue
        support = getattr(node["fn"].support, "base_constraint", node["fn"].support)
        base = getattr(node["fn"], "base_dist", node["fn"])
        fixed = isinstance(base, dist.Delta) or (node["infer"] or {}).keys() & {"enumerate", "is_auxiliary"}
        if support not in (constraints.real, constraints.real_vector) or fixed:
            raise site_error(
                name, "a latent over real numbers with a density in the guide, for leapfrog steps",
                f"{type(base).__name__} over {support}", "write it as a function of a real latent, as by biject_to",
            )  # fmt: skip
        out[name] = node["fn"].event_shape
    for name, node in p.nodes.items():
        if node["type"] == "sample" and not (node["is_observed"] or isinstance(node["fn"], _Subsample) or name in out):
            raise site_error(
                name, "a latent that the guide samples, for leapfrog steps", "one that it does not",
                "sample it in the guide, too",
            )  # fmt: skip
    return out
