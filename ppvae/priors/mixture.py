"""Mixture priors: mixtures of learned normals, and the VampPrior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final
from weakref import WeakKeyDictionary

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from ppvae.distributions.batch_shape import ParametricDistribution
from ppvae.errors import ContractError, UsageError
from ppvae.errors.ranges import check_numbers
from ppvae.nn.context import call_with_context, needs_context, takes_context

_MAX_ELEMENTS = 1 << 22  # the largest number of elements (rows x components x event) of a chunk


@final
class Mixture(ParametricDistribution):
    """A mixture of components, log p(z) = logsumexp_c (log_softmax(logits)_c + log p_c(z)).

    `components` is a distribution of batch shape [components], which `expand` never copies. Rows are summed in chunks,
    so that no tensor exceeds about 4 million elements; the result does not depend on the chunks. `logits` [components]
    default to equal weights. Not reparameterised: a draw chooses its component.

    >>> two = dist.Normal(torch.tensor([[-1.0], [1.0]]), 1.0).to_event(1)
    >>> Mixture(two).expand([4]).log_prob(torch.zeros(3, 4, 1)).shape
    torch.Size([3, 4])
    """

    def __init__(self, components: Any, logits: Tensor | None = None, validate_args: bool | None = None):
        (count,) = components.batch_shape
        self.components, self.logits = components, logits
        self._size = count * components.event_shape.numel()
        super().__init__(torch.Size(), components.event_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> Any:
        return self.components.support

    @property
    def mean(self) -> Tensor:
        means = self.components.mean.flatten(1)
        weights = means.new_full((len(means),), 1 / len(means)) if self.logits is None else self.logits.softmax(-1)
        return (weights @ means).reshape(self.event_shape).expand(self.shape())

    def _log_prob(self, value: Tensor) -> Tensor:
        lead = value.shape[: value.dim() - len(self.event_shape)]
        rows = value.reshape(-1, 1, *self.event_shape)
        count = self.components.batch_shape[0]
        weights = 0.0 if self.logits is None else self.logits.log_softmax(-1)
        parts = [
            torch.logsumexp(self.components.log_prob(part) + weights, -1)
            for part in rows.split(max(1, _MAX_ELEMENTS // max(1, self._size)))
        ]
        log_prob = torch.cat(parts)
        if self.logits is None:
            log_prob = log_prob - torch.log(torch.tensor(float(count), dtype=log_prob.dtype, device=log_prob.device))
        return log_prob.reshape(lead).expand(torch.broadcast_shapes(self.batch_shape, lead))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            shape = torch.Size(sample_shape) + self.batch_shape
            template = self.components.sample()
            logits = template.new_zeros(len(template)) if self.logits is None else self.logits
            selected = torch.distributions.Categorical(logits=logits).sample((shape.numel(),))
            # the r-th row with a component takes the r-th draw of that component
            order = selected.argsort(stable=True)
            counts = selected.bincount(minlength=len(template))
            starts = counts.cumsum(0) - counts
            rank = torch.empty_like(selected)
            rank[order] = torch.arange(len(selected), device=selected.device) - starts[selected[order]]
            draws = self.components.sample((int(counts.max()),))
            return draws[rank, selected].reshape(shape + self.event_shape)


@final
class MixtureOfNormals(nn.Module):
    """A mixture of normals with independent dims, trained in the objective with everything else.

    log p(z) = logsumexp_c (log_softmax(logits)_c + sum_d log N(z_d; loc_cd, exp(log_scale_cd))).

    Args:
        latent: the size of z.
        components: the number of components. Locations start at standard normal draws, scales at one, weights
            equal; a single component starts as the standard normal.

    Returns batch shape [], event shape [latent]. Raises ValueError for fewer than one component.
    Source: Dilokthanakul et al. 2016 (arXiv 1611.02648); Tomczak and Welling 2018 (arXiv 1705.07120).

    >>> MixtureOfNormals(2, components=10)().shape()
    torch.Size([2])
    """

    def __init__(self, latent: int, components: int = 10):
        check_numbers(latent=latent, components=components)
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, latent) if components > 1 else torch.zeros(1, latent))
        self.log_scale = nn.Parameter(torch.zeros(components, latent))

    def forward(self) -> dist.TorchDistribution:
        return Mixture(dist.Normal(self.loc, self.log_scale.exp()).to_event(1), self.logits)


@final
class VampPrior(nn.Module):
    """The mixture of the posterior at learned pseudo-inputs, log p(z) = log (1/K) sum_k q(z | u_k).

    The density is deterministic: every call sums all K components. Without gradients and in evaluation mode the
    components are cached until a parameter or buffer of the posterior, or a pseudo-input, changes. The prior shares the
    posterior module, with its mode (training or evaluation) and its parameters, which get gradients through both.
    Pseudo-inputs are not clipped to the range of the data.

    Args:
        posterior: the module q(z | x) that the pair's guide uses.
        pseudo_inputs: their initial values, [K, *event]; `VampPrior.from_data` takes them from data.
        context: for a posterior that declares `context`, the context of each pseudo-input, [K, ...]; real numbers are
            trained as the pseudo-inputs are, labels are fixed.

    Returns batch shape [], event shape [latent]; draws choose k uniformly.
    Raises ValueError for a missing context, or for one that the posterior does not declare; ContractError for a point
    mass, which has no density.
    Source: Tomczak and Welling 2018 (arXiv 1705.07120).

    >>> from ppvae import nn, posteriors
    >>> posterior = posteriors.DiagonalNormal(nn.mlp(64, 2 * 8))
    >>> prior = VampPrior.from_data(posterior, torch.rand(100, 64), components=20)
    >>> prior.pseudo_inputs.shape, prior().log_prob(torch.zeros(5, 8)).shape
    (torch.Size([20, 64]), torch.Size([5]))
    """

    context: Tensor | None

    def __init__(self, posterior: nn.Module, pseudo_inputs: Tensor, context: Tensor | None = None):
        super().__init__()
        name = type(posterior).__name__
        if context is None and needs_context(posterior):
            raise UsageError(
                f"VampPrior: expected a context for each pseudo-input, which the posterior {name} declares, found none"
            )
        if context is not None and not (takes_context(posterior) and len(context) == len(pseudo_inputs)):
            raise UsageError(
                f"VampPrior: expected a context for each of {len(pseudo_inputs)} pseudo-inputs and a posterior that "
                f"declares it, found {len(context)} for {name}"
            )
        self.posterior = posterior
        self.pseudo_inputs = nn.Parameter(pseudo_inputs.detach().clone())
        if context is not None and context.is_floating_point():
            self.context = nn.Parameter(context.detach().clone())
        else:
            self.register_buffer("context", context)

    @classmethod
    def from_data(
        cls,
        posterior: nn.Module,
        data: Any,
        components: int = 500,
        noise: float = 0.01,
        seed: int = 0,
        context: Tensor | None = None,
    ) -> VampPrior:
        """Pseudo-inputs initialised at distinct rows of data [N, *event] or of a split, plus normal noise.

        Args:
            posterior: the module q(z | x) that the pair's guide uses.
            data: the training data.
            components: K, the number of pseudo-inputs.
            noise: the scale of the noise.
            seed: of the choice of rows and of the noise.

        `context` [N, ...] holds the contexts of the rows, where the posterior declares one.
        Raises ValueError where there are fewer rows than components.
        """
        check_numbers(components=components, noise=noise, seed=seed)
        if not 1 <= components <= len(data):
            raise UsageError(f"components: expected 1 to {len(data)}, as there are rows of data, found {components}")
        generator = torch.Generator().manual_seed(seed)
        index = torch.randperm(len(data), generator=generator)[:components]
        rows = data.read(index) if hasattr(data, "read") else data[index.to(data.device)]
        selected = None if context is None else context[index.to(context.device)]
        return cls(posterior, rows + float(noise) * torch.randn(rows.shape, generator=generator).to(rows), selected)

    def forward(self) -> dist.TorchDistribution:
        if _is_traced():
            return Mixture(self._components())
        if torch.is_grad_enabled() or any(m.training for m in self.posterior.modules()):
            _CACHED.pop(self, None)
            return Mixture(self._components())
        state = self._fingerprint()
        if self not in _CACHED or _CACHED[self][0] != state:
            _CACHED[self] = state, self._components()
        return Mixture(_CACHED[self][1])

    def _components(self) -> Any:
        components = call_with_context(self.posterior, self.pseudo_inputs, context=self.context)
        if isinstance(components, dist.Delta):
            raise ContractError(
                f"VampPrior: expected a posterior with a density, found {type(self.posterior).__name__}, a point mass"
            )
        return components

    def _fingerprint(self) -> Any:
        """A fingerprint of all tensors: address, version and sum (fused optimizers do not bump versions).

        It includes the torch-function modes, under which layers may compute otherwise (such as products in bfloat16).
        """
        tensors = [*self.parameters(), *self.buffers()]
        sums = torch.stack([t.sum(dtype=torch.float64) for t in tensors]).tolist()
        return (
            torch.is_inference_mode_enabled(),
            torch._C._len_torch_function_stack(),
            [(t.data_ptr(), t.dtype, t._version, s) for t, s in zip(tensors, sums, strict=True)],
        )


# by prior: a fingerprint and the components. No attribute, for the guards of captured steps would see it change
_CACHED: WeakKeyDictionary[VampPrior, tuple[Any, Any]] = WeakKeyDictionary()


def _is_traced() -> bool:
    """Whether operations are being traced into a graph, which itself computes constant parts once."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None
