"""The VAE: the adapter from conditionals to a model/guide pair; conditional and vector-quantised VAEs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from ppvae import posteriors
from ppvae.errors import ContractError, support_name
from ppvae.errors.ranges import check_numbers
from ppvae.models.composed_model import ComposedModel, call_conditional, describe_tensor, require_module
from ppvae.nn import Codebook, ConcatContext, Nearness
from ppvae.rng import fork_rng


class VAE(ComposedModel):
    """A variational autoencoder composed of a prior p(z), a likelihood p(x | z) and a posterior q(z | x).

    The parts are modules that return a distribution: `prior()`, `likelihood(z)`, `posterior(x)`. One that declares
    `context` gets the batch's second tensor under that name. `model` and `guide` are Pyro functions with sites "z" and
    "x" in a plate "data"; they take x [batch, *event].

    A relaxed posterior makes the pair a relaxed model: a discrete prior is relaxed too, by its `relaxed()`, with the
    same logits (Maddison et al. 2017, arXiv 1611.00712). Train that pair, evaluate `discrete`.

    Raises `ContractError`, naming the part, for one that is no module, and at the first data for parts that do not fit
    together.
    Source: Kingma and Welling 2014 (arXiv 1312.6114); Rezende et al. 2014 (arXiv 1401.4082).

    >>> from ppvae import likelihoods, nn, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(8),
    ...     likelihood=likelihoods.Bernoulli(nn.mlp(8, 64)),
    ...     posterior=posteriors.DiagonalNormal(nn.mlp(64, 2 * 8)),
    ... )
    >>> vae.guide(torch.zeros(5, 64)).shape
    torch.Size([5, 8])
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module, posterior: nn.Module):
        super().__init__("vae")
        for role, part in (("prior", prior), ("likelihood", likelihood), ("posterior", posterior)):
            require_module(role, part)
        if hasattr(posterior, "discrete") and hasattr(prior, "relaxed"):
            prior = prior.relaxed()  # type: ignore[operator]
        self.prior, self.likelihood, self.posterior = prior, likelihood, posterior
        self._checked_shapes: Any = None  # the data shapes for which the parts have been checked

    @property
    def discrete(self) -> VAE:
        """The discrete VAE on the networks and logits of a VAE with relaxed prior and posterior.

        The relaxed and the discrete model differ in log p(x); report that of the discrete one:
        `log_marginal(vae.discrete.model, vae.discrete.guide, x)`. AttributeError for a VAE of other parts.
        """
        return VAE(self.prior.discrete, self.likelihood, self.posterior.discrete)  # type: ignore[arg-type]

    def model(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """p(x, z): draws z from the prior and observes x."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.call_part("prior", context=context))
            return pyro.sample("x", self.call_part("likelihood", z, context=context), obs=x)

    def guide(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """q(z | x): draws z from the posterior."""
        shapes = x.shape[1:], None if context is None else context.shape[1:]
        if self._checked_shapes != shapes:
            with _without_side_effects(self):
                _check_parts(self, x, context)
            self._checked_shapes = shapes
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self.call_part("posterior", x, context=context))


@final
class ConditionalVAE(VAE):
    """p(x | c) = int p(z | c) p(x | z, c) dz with guide q(z | x, c), conditioned on labels or features c.

    `nn.ConcatContext` concatenates c to the inputs of likelihood and posterior; a prior that declares `context` is
    given c itself. log p(x) means log p(x | c). Data are (x [batch, *event], c [batch, ...]).

    Args:
        prior: p(z | c), or p(z).
        likelihood: p(x | z, c), a part whose network takes [..., latent + features].
        posterior: q(z | x, c), a part whose network takes [..., event + features].
        of: maps c to features [..., features], such as `nn.Labels(classes)`; the identity by default.
        event_dim: 1, or 3 for images [C, H, W], where features become further channels.

    Raises DataError for a label outside the classes; UsageError for data without a second tensor; ContractError for
    parts that do not fit together.
    Source: Sohn et al. 2015, Learning structured output representation using deep conditional generative models.

    >>> from ppvae import likelihoods, nn, posteriors, priors
    >>> vae = ConditionalVAE(
    ...     prior=priors.StandardNormal(8),
    ...     likelihood=likelihoods.Bernoulli(nn.mlp(8 + 10, 64)),
    ...     posterior=posteriors.DiagonalNormal(nn.mlp(64 + 10, 2 * 8)),
    ...     of=nn.Labels(10),
    ... )
    >>> vae.guide(torch.zeros(5, 64), torch.arange(5)).shape
    torch.Size([5, 8])
    """

    def __init__(
        self,
        prior: nn.Module,
        likelihood: nn.Module,
        posterior: nn.Module,
        of: nn.Module | None = None,
        event_dim: int = 1,
    ):
        super().__init__(prior, ConcatContext(likelihood, of), ConcatContext(posterior, of, event_dim))


@final
class QuantizedVAE(VAE):
    """p(x) = sum_k p(k) p(x | c_k1 .. c_kM), its guide prod_m q(k_m | x), q(k | x) ~ exp(-|e_m(x) - c_k|^2 / (2 s^2)).

    A VQ-VAE with stochastic quantisation: M codes of V values, distributed by distance to the encoder output. The
    nearest code of the original is the limit s -> 0, a point mass, which gives only a lower bound on log p(x) and needs
    a straight-through gradient. s and p(k) are learned jointly with the networks, and log p(x) includes p(k). Site "z":
    the codes as concatenated one-hot vectors, [M * V].

    `IWAE(10, gradient="vimco")` trains it; ELBO() on `pyro.infer.config_enumerate(vae.guide)` while there are few
    joint values (65536, all of which are summed out of log p(x), too); ELBO() where `posterior` is relaxed, and then
    `vae.discrete` is the pair to evaluate.

    Args:
        prior: p(k), `priors.AutoregressiveOneHot(V, M)`, or `priors.OneHot(V, M, learned=True)` for independent codes.
        likelihood: p(x | c_k1 .. c_kM), a part whose network takes [..., M * size].
        encoder: e(x), a network [..., *event] -> [..., M * size].
        codebook: c_1 .. c_V, `nn.Codebook(V, size)`, shared by encoder and decoder.
        scale: the initial s.
        posterior: `posteriors.OneHot`, or `posteriors.RelaxedOneHot`, for a prior that has a relaxed counterpart.

    Raises ContractError at the first data for parts that do not fit together, naming them.
    Source: van den Oord et al. 2017 (arXiv 1711.00937); Takida et al. 2022, SQ-VAE (arXiv 2205.07547).

    >>> from ppvae import likelihoods, nn, priors
    >>> vae = QuantizedVAE(
    ...     prior=priors.AutoregressiveOneHot(16, variables=4),
    ...     likelihood=likelihoods.Bernoulli(nn.mlp(4 * 8, 64)),
    ...     encoder=nn.mlp(64, 4 * 8),
    ...     codebook=nn.Codebook(16, size=8),
    ... )
    >>> vae.guide(torch.zeros(5, 64)).shape
    torch.Size([5, 64])
    """

    def __init__(
        self,
        prior: nn.Module,
        likelihood: nn.Module,
        encoder: nn.Module,
        codebook: Codebook,
        scale: float = 1.0,
        posterior: Callable[[nn.Module, int], nn.Module] = posteriors.OneHot,
    ):
        check_numbers(scale=scale)
        net = nn.Sequential(encoder, Nearness(codebook, scale))
        super().__init__(prior, nn.Sequential(codebook, likelihood), posterior(net, len(codebook.table)))


@contextmanager
def _without_side_effects(vae: VAE) -> Iterator[None]:
    """Runs without gradients, Pyro statements, use of the random state, or updates of batch-norm statistics."""
    training = [m for m in vae.modules() if m.training]
    try:
        with torch.no_grad(), poutine.block(), fork_rng():
            vae.eval()
            yield
    finally:
        for module in training:
            module.training = True


def _check_parts(vae: VAE, x: Tensor, context: Tensor | None) -> None:
    """Raises ContractError for parts that do not fit together on a batch, naming them."""
    q = _require_distribution("posterior", call_conditional(vae.posterior, "data x", x, context=context), vae.posterior)
    p = _require_distribution("prior", call_conditional(vae.prior, context=context, name="prior "), vae.prior)
    if len(q.batch_shape) > 1:
        raise ContractError(
            f"posterior {type(vae.posterior).__name__}: expected batch shape [batch], found {list(q.batch_shape)} with "
            f"event shape {list(q.event_shape)}; add .to_event({len(q.batch_shape) - 1}) to the distribution"
        )
    names = [f"{type(part).__name__} ({_describe_support(fn)})" for part, fn in ((vae.prior, p), (vae.posterior, q))]
    pair = f"prior {names[0]} and posterior {names[1]} do not fit together: "
    if p.event_shape != q.event_shape:
        cure = ""
        if len(p.event_shape) < len(q.event_shape) and p.batch_shape:
            cure = f"; add .to_event({len(q.event_shape) - len(p.event_shape)}) to the prior's distribution"
        shapes = f"{list(p.event_shape)} and {list(q.event_shape)}"
        raise ContractError(f"{pair}expected z of one shape, found {shapes}{cure}")
    posterior_draws, prior_draws = q.sample(torch.Size((8,))), p.expand(q.batch_shape).sample(torch.Size((8,)))
    if prior_draws.is_floating_point() != posterior_draws.is_floating_point():
        types = f"{describe_tensor(prior_draws[0])} and {describe_tensor(posterior_draws[0])}"
        raise ContractError(f"{pair}expected z of one type, found {types}")
    if not _contains(p, posterior_draws):
        raise ContractError(
            f"{pair}expected z in one space, found that the posterior draws some that the prior has not"
        )
    if not isinstance(q.base_dist if hasattr(q, "base_dist") else q, dist.Delta) and not _contains(q, prior_draws):
        raise ContractError(
            f"{pair}expected z in one space, found that the prior has some that the posterior never draws"
        )
    fn = call_conditional(vae.likelihood, f"z of the posterior {names[1]}", posterior_draws[0], context=context)
    fn = _require_distribution("likelihood", fn, vae.likelihood)
    if fn.event_shape != x.shape[1:]:
        missing = x.dim() - 1 - len(fn.event_shape)
        cure = f"; add .to_event({missing}) to its distribution" if fn.shape() == x.shape and missing > 0 else ""
        cure = cure or _output_cure(vae.likelihood, fn.event_shape, x.shape[1:])
        raise ContractError(
            f"likelihood {type(vae.likelihood).__name__} does not fit the data: expected the event shape "
            f"{list(x.shape[1:])} of x, found {list(fn.event_shape)}{cure}"
        )


def _output_cure(likelihood: nn.Module, found: torch.Size, event: torch.Size) -> str:
    """The cure for a network with too few outputs, whose likelihood takes several numbers for each of the datum."""
    if hasattr(likelihood, "output_shape") or found[1:] != event[1:] or not found or not event:
        return ""
    times, rest = divmod(event[0], found[0])
    if times < 2 or rest:
        return ""
    return (
        f"; its network must give {times} numbers for each of x. Where ppvae builds the network, say so in the class: "
        f"def output_shape(self, event): return torch.Size([{times} * event[0], *event[1:]])"
    )


def _require_distribution(role: str, fn: Any, part: nn.Module) -> Any:
    if isinstance(fn, dist.Distribution):
        return fn
    if isinstance(fn, torch.distributions.Distribution):
        raise ContractError(
            f"{role} {type(part).__name__}: expected a distribution of Pyro, found {type(fn).__name__} of "
            f"{type(fn).__module__}; import it from pyro.distributions, which has those of torch under the same names, "
            f"or derive one of your own from pyro.distributions.TorchDistribution"
        )
    found = f"a tensor {describe_tensor(fn)}" if isinstance(fn, Tensor) else type(fn).__name__
    raise ContractError(
        f"{role} {type(part).__name__}: expected a distribution, found {found}; return one from its forward, as "
        f"dist.Normal(loc, scale).to_event(1)"
    )


def _contains(fn: Any, z: Tensor) -> bool:
    """Whether values (NaN aside) are in the support of a distribution and not all of density zero."""
    try:
        inside = fn.support.check(z)
    except (NotImplementedError, AttributeError):  # a distribution without a support
        return True
    known = ~z.isnan().reshape(*inside.shape, -1).any(-1)
    if not bool((inside | ~known).all()):
        return False
    with pyro.validation_enabled(False):
        return not bool((fn.log_prob(z) == -torch.inf).all())


def _describe_support(fn: Any) -> str:
    """The support of a distribution in words, for messages."""
    try:
        support = fn.support
    except (NotImplementedError, AttributeError):
        return f"a {type(fn).__name__}"
    return f"discrete, {support_name(support)}" if support.is_discrete else support_name(support)
