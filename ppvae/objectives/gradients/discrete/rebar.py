"""REBAR and RELAX: control variates that are functions of relaxed draws, learned along with the pair."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, final

import pyro
import torch
from torch import Tensor, nn

from ppvae.compilation.side_effects import learning_step, parameters_of
from ppvae.errors import site_error
from ppvae.errors.ranges import check_numbers
from ppvae.inference.second_run import buffer_copies
from ppvae.objectives.gradients.discrete.bits import family_of, logits_of
from ppvae.objectives.gradients.discrete.relaxation import RELAXABLE, RelaxedDensities, perturbed_given, soft
from ppvae.objectives.gradients.discrete.sites import SiteDraws, SiteEstimator
from ppvae.objectives.reductions import leave_one_out_sum
from ppvae.rng import fork_rng

_adam = functools.partial(torch.optim.Adam, lr=1e-2)
WIDTH = 32  # hidden units of the network
POINTS = (32, 128)  # on a line along which gradients are added up
MISSED = 0.01  # share of a change that gradients leave out, from which it may be a jump: more points do not lower it


class _ControlVariate(nn.Module):
    """c(y) = a share(y) + r(y, logits): the weight, the temperature, and the network with its optimizer."""

    def __init__(self, temperature: float, size: int, optimizer: Callable[[Any], torch.optim.Optimizer]):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.log_temperature = nn.Parameter(torch.tensor(temperature, dtype=torch.float64).log())
        self.net = None
        if size:
            with fork_rng():
                torch.manual_seed(0)
                layers = nn.Linear(size, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)
            for p in layers[2].parameters():
                nn.init.zeros_(p)
            self.net = nn.Sequential(*layers).double()
        self.optimizer = optimizer(self.parameters())

    def forward(self, share: Tensor, features: Tensor) -> Tensor:
        c = self.weight * share
        return c if self.net is None else c + self.net(features).squeeze(-1)

    def learn(self, variance: Tensor) -> None:
        """A step down the gradient of the estimator's squared norm."""
        params = parameters_of(self.optimizer)
        found = torch.autograd.grad(variance, params, allow_unused=True, materialize_grads=True)
        learning_step(self.optimizer, [torch.nan_to_num(g, posinf=0.0, neginf=0.0) for g in found])


@final
class REBAR(SiteEstimator):
    """The score function with the bound at relaxed draws as control variate, whose gradient has a path; unbiased.

    (R - c(y~)) d log q(z) + d c(y) - d c(y~): y = sigmoid(logistic / t), or softmax(gumbels / t) of a one-hot site, is
    the relaxed value whose hard value is the guide's draw z, y~ a further one given z, and c(y) = a R(y) the bound with
    draw k replaced by y, less the bound without draw k. Weight a and temperature t follow the gradient of the
    estimator's squared norm, which has the same expectation for all of them, and are part of the checkpoint. RELAX
    (`network=True`) adds a network of y and the logits to c. The densities of model and guide are evaluated at numbers
    in (0, 1), where they have to be differentiable: for a model that rounds its latent the estimator is biased, and the
    first step warns. A step evaluates 3 K draws of the pair for one site, and second derivatives.

    Args:
        temperature: t in the first step.
        network: whether c has a network.
        optimizer: a function of the parameters of c that returns a torch optimizer.

    Raises:
        ContractError: a site that is neither Bernoulli nor one-hot categorical, by its name.

    Source: Tucker et al. 2017 (arXiv 1703.07370); Grathwohl et al. 2018 (arXiv 1711.00123).

    >>> from ppvae import VAE, likelihoods, objectives, posteriors, priors
    >>> nets = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)
    >>> vae = VAE(priors.Bernoulli(2), likelihoods.Bernoulli(nets[0]), posteriors.Bernoulli(nets[1]))
    >>> loss = objectives.ELBO(2, gradient=REBAR(0.5)).loss_and_grads(vae.model, vae.guide, torch.ones(4, 3))
    >>> nets[1].weight.grad.shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        temperature: float = 0.5,
        network: bool = False,
        optimizer: Callable[[Any], torch.optim.Optimizer] = _adam,
    ):
        check_numbers(temperature=temperature)
        self.temperature, self.network, self._optimizer_factory = temperature, network, optimizer
        self._control_variates: dict[str, _ControlVariate] = {}

    def site_surrogate(self, site: SiteDraws) -> Tensor:
        family, logits = family_of(site, repr(self), RELAXABLE), logits_of(site)
        z, kept, w = site.value.double(), site.kept, site.log_weight
        a = logits.detach().double().requires_grad_()
        without = site.objective.leave_one_out_bound(w, leave_one_out_sum(w) / max(1, len(w) - 1))
        if len(w) == 1:
            without = torch.zeros_like(w)
        with torch.enable_grad():
            noise = perturbed_given(z, a.detach(), family) - a.detach()
            perturbed = torch.stack([a + noise, perturbed_given(z, a, family)])  # y of a constant noise, y~ given z
            features = _per_datum(torch.stack([perturbed, torch.stack([a, a]).detach()], -1), site)
            control = self._control_variate(site, features, family)
            y = soft(perturbed, control.log_temperature.exp(), family)
            share = [site.objective.leave_one_out_bound(w, at) - without for at in _log_weights(site, y)]
            features = _per_datum(torch.stack([y, torch.stack([a, a]).detach()], -1), site)
            c = control(torch.stack(share), features)  # [2, K, batch]
            (path,) = torch.autograd.grad((c[0] - c[1]).sum(), a, create_graph=True)
            score = z - soft(a.detach(), 1.0, family)
            signal = site.spread(site.objective.reduce(w) - without - c[1], z)
            gradient = (signal * score + path) * kept
            control.learn(gradient.square().sum() / w.numel())
        return (gradient.detach() * logits).sum()

    def _warn_of_jumps(self, site: SiteDraws, family: type) -> None:
        """Warns where log-weights jump between relaxed values: the gradient along a line misses part of the change."""
        with fork_rng():
            torch.manual_seed(0)
            start, end = (soft(2 * torch.randn_like(site.value.double()), 1.0, family) for _ in range(2))
            few = _missed_change(site, start, end, POINTS[0])
            many = _missed_change(site, start, end, POINTS[1]) if few > MISSED else 0.0
        if many > max(MISSED, few / 2):
            warnings.warn(
                f"{self!r}: the densities at site {site.name!r} jump between values in (0, 1), as if they were rounded "
                f"({many:.0%} of a change is in jumps); the gradient is biased: take gradient='arms' or 'vimco'",
                stacklevel=4,
            )

    def _control_variate(self, site: SiteDraws, features: Tensor, family: type) -> _ControlVariate:
        if site.name not in self._control_variates:
            self._warn_of_jumps(site, family)
            size = features.shape[-1] if self.network else 0
            self._control_variates[site.name] = self._built(size)
        one = self._control_variates[site.name]
        if one.weight.device != features.device:
            one.to(features.device)
            one.optimizer.load_state_dict(one.optimizer.state_dict())  # moves the state to its parameters
        return one

    def _built(self, size: int) -> _ControlVariate:
        return _ControlVariate(self.temperature, size, self._optimizer_factory)

    def state_dict(self) -> dict[str, Any]:
        return {
            name: {
                "parameters": {n: p.detach().cpu().clone() for n, p in one.named_parameters()},
                "optimizer": one.optimizer.state_dict(),
            }
            for name, one in self._control_variates.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._control_variates = {}
        for name, saved in state.items():
            first = saved["parameters"].get("net.0.weight")
            one = self._built(0 if first is None else first.shape[1])
            one.load_state_dict(saved["parameters"])
            one.optimizer.load_state_dict(saved["optimizer"])
            self._control_variates[name] = one

    def __repr__(self) -> str:
        return f"{'RELAX' if self.network else 'REBAR'}({self.temperature})"


def relax() -> REBAR:
    """RELAX: REBAR with a network in the control variate.

    Source: Grathwohl et al. 2018 (arXiv 1711.00123).
    """
    return REBAR(network=True)


def _per_datum(values: Tensor, site: SiteDraws) -> Tensor:
    """[2, K, *inner plates, batch, *event, features] -> [2, K, batch, elements]."""
    data = values.dim() - site.event_dims - 2
    values = values.movedim(data, 2)
    return values.reshape(*values.shape[:3], -1)


def _log_weights(site: SiteDraws, y: Tensor) -> Tensor:
    """The log-weights at relaxed values [2, K, *shape of the value], with their gradient: [2, K, batch] nats.

    Earlier sites keep their values; later ones have the values of further draws of this site, which do not depend on
    the guide's draw.
    """
    names, call, count = list(site.terms.guide), site.call, len(site.log_weight)
    earlier = {n: site.terms.guide[n].value.detach() for n in names[: names.index(site.name)]}
    later = names[names.index(site.name) + 1 :]
    if later:
        with torch.no_grad(), buffer_copies():
            further = call.again(count, earlier).guide
        earlier |= {n: further[n].value for n in later}
    given = {n: torch.cat([value, value]) for n, value in earlier.items()}
    given[site.name] = y.flatten(0, 1).to(site.value)
    try:
        with buffer_copies(), pyro.validation_enabled(False), RelaxedDensities(site.name):
            t = call.again(2 * count, given)
    except ValueError as error:
        raise site_error(
            site.name, "densities that are evaluated at numbers in (0, 1), for REBAR and RELAX",
            "a distribution that validates its values", "make the distribution inside model and guide, or with "
            "validate_args=False",
        ) from error  # fmt: skip
    return site.objective.log_weights(t).unflatten(0, (2, count))


def _missed_change(site: SiteDraws, start: Tensor, end: Tensor, points: int) -> float:
    """The share of the change of log-weights from one relaxed value to another that is not the integral of gradients.

    Root mean square over draws and data, by the midpoint rule; with one state of the random numbers everywhere.
    """

    def at(*places: float) -> tuple[Tensor, Tensor]:
        """Log-weights and their derivatives along the line, [2, K, batch]."""
        torch.manual_seed(1)
        y = torch.stack([start + t * (end - start) for t in places]).detach().requires_grad_()
        w = _log_weights(site, y)
        (gradient,) = torch.autograd.grad(w.sum(), y)
        return w.detach(), _per_datum((gradient * (end - start)).unsqueeze(-1), site).sum(-1)

    ends, _ = at(0.0, 1.0)
    slopes = [at((i + 0.5) / points, (i + 1.5) / points)[1].mean(0) for i in range(0, points, 2)]
    change = ends[1] - ends[0]
    missed = (change - torch.stack(slopes).mean(0)).square().mean().sqrt()
    rounding = 100 * torch.finfo(site.value.dtype).eps * (1 + ends.abs().max())
    return float(torch.where(missed > rounding, missed / change.square().mean().sqrt(), 0.0))
