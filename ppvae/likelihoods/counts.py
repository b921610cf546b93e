"""Likelihoods of counts, optionally scaled by a library size."""

from collections.abc import Callable

import pyro.distributions as dist
from torch import Tensor, nn

from ppvae import distributions
from ppvae.errors.ranges import check_ranges
from ppvae.likelihoods.network_outputs import (
    NetworkLikelihood,
    ParameterSource,
    context_per_datum,
    event_dim,
    register_log_parameter,
    split_blocks,
)


class _CountLikelihood(NetworkLikelihood):
    """A count likelihood with log-rates from net(z), optionally scaled by a library size, and further parameters."""

    log_concentration: Tensor

    def __init__(
        self, net: nn.Module, library: bool, names: tuple[str, ...], concentration: ParameterSource | None = None
    ):
        super().__init__(net)
        self.library, self._parameter_names, self.parameters_per_element = library, names, len(names)
        if concentration is not None:
            register_log_parameter(self, "concentration", concentration)

    @property
    def forward(self) -> Callable[..., dist.TorchDistribution]:  # type: ignore[override]
        """`forward(z)`, or with a library `forward(z, context)`: `context` is declared only then."""
        return self._forward_with_library if self.library else self._forward_without_library

    def _forward_without_library(self, z: Tensor) -> dist.TorchDistribution:
        log_rate, *extra = split_blocks(self.net(z), z, self.parameters_per_element, ", ".join(self._parameter_names))
        dims = event_dim(log_rate, z)
        return self._distribution(log_rate, *extra).to_event(dims)

    def _forward_with_library(self, z: Tensor, context: Tensor) -> dist.TorchDistribution:
        share, *extra = split_blocks(self.net(z), z, self.parameters_per_element, ", ".join(self._parameter_names))
        dims = event_dim(share, z)
        log_library = context_per_datum(context, z, "library sizes", share.dtype).log()
        log_share = share.flatten(z.dim() - 1).log_softmax(-1).reshape(share.shape)
        log_rate = log_share + log_library.reshape(*log_library.shape, *(1,) * dims)
        return self._distribution(log_rate, *extra).to_event(dims)

    def _distribution(self, log_rate: Tensor, *extra: Tensor) -> dist.TorchDistribution:
        raise NotImplementedError


class Poisson(_CountLikelihood):
    """Independent Poisson counts, log p(x | z) = sum_d x_d log r_d - r_d - log x_d!.

    Args:
        net: maps [..., latent] to [..., *event].
        library: without it, rates are r = exp(net(z)). With it, r = library * softmax(net(z)), the softmax over the
            whole event, and the library size (the expected total count, [N], > 0) is the batch's second tensor: this
            likelihood then declares `context`.

    The library must be known without x: sequencing depth, exposure time, length of a document. With the sum of the
    datum itself, the default of scvi-tools, p(x | z, library(x)) is not a density of x; to condition a Poisson on its
    sum, use `Multinomial`. Data are 0, 1, 2, ...; a log-mass in nats; returns batch shape
    [...], event shape [*event]. Raises DataError for a context of another shape.
    Source: Lopez et al. 2018, "Deep generative modeling for single-cell transcriptomics" (the parametrisation).

    >>> import torch
    >>> from ppvae.nn import mlp
    >>> Poisson(mlp(8, 64))(torch.zeros(5, 8)).shape()
    torch.Size([5, 64])
    >>> fn = Poisson(mlp(8, 64), library=True)(torch.zeros(3, 8), context=torch.tensor([10.0, 20.0, 30.0]))
    >>> fn.mean.sum(-1).round().tolist()
    [10.0, 20.0, 30.0]
    """

    def __init__(self, net: nn.Module, library: bool = False):
        super().__init__(net, library, ("log-rate",))

    def _distribution(self, log_rate: Tensor, *extra: Tensor) -> dist.TorchDistribution:
        return distributions.Poisson(log_rate)


class NegativeBinomial(_CountLikelihood):
    """Independent negative binomial counts with mean r_d(z) and concentration c, variance r + r^2 / c.

    Args:
        net: maps [..., latent] to [..., *event]; with concentration="network" to [..., 2 * first, *rest], log-rates,
            then log-concentrations, along the first event dim.
        concentration: c, a number (fixed), "learned" (one for all dims), a shape, the event's, for one a dim (scVI's
            "gene"), or "network" ("gene-cell").
        library: whether the library size is the batch's second tensor, as for `Poisson`.

    Data, shapes and errors as for `Poisson`.
    Source: Lopez et al. 2018, "Deep generative modeling for single-cell transcriptomics".

    >>> import torch
    >>> from ppvae.nn import mlp
    >>> NegativeBinomial(mlp(8, 64), concentration=(64,))(torch.zeros(5, 8)).shape()
    torch.Size([5, 64])
    """

    def __init__(self, net: nn.Module, concentration: ParameterSource = "learned", library: bool = False):
        check_ranges(concentration=concentration)
        more = ("log-concentration",) if concentration == "network" else ()
        super().__init__(net, library, ("log-rate", *more), concentration)

    def _distribution(self, log_rate: Tensor, *extra: Tensor) -> dist.TorchDistribution:
        return distributions.NegativeBinomial(log_rate, extra[0] if extra else self.log_concentration)


class ZeroInflatedPoisson(_CountLikelihood):
    """Zero-inflated Poisson counts, p(x_d) = s(g_d) [x_d = 0] + s(-g_d) Poisson(x_d; r_d), s the sigmoid.

    `net` maps [..., latent] to [..., 2 * first, *rest]: log-rates, then the log-odds g of an extra zero, along the
    first event dim.

    Args:
        net: the network.
        library: whether the library size is the batch's second tensor, as for `Poisson`.

    Data, shapes and errors as for `Poisson`.
    Source: Lambert 1992, "Zero-inflated Poisson regression".

    >>> import torch
    >>> from ppvae.nn import mlp
    >>> ZeroInflatedPoisson(mlp(8, 2 * 64))(torch.zeros(5, 8)).shape()
    torch.Size([5, 64])
    """

    def __init__(self, net: nn.Module, library: bool = False):
        super().__init__(net, library, ("log-rate", "gate"))

    def _distribution(self, log_rate: Tensor, *extra: Tensor) -> dist.TorchDistribution:
        return distributions.ZeroInflated(distributions.Poisson(log_rate), extra[0])


class ZeroInflatedNegativeBinomial(_CountLikelihood):
    """Zero-inflated negative binomial counts, for example of single cells with dropout.

    `net` maps [..., latent] to [..., 2 * first, *rest]: log-rates, then the log-odds of an extra zero; with
    concentration="network" to [..., 3 * first, *rest], log-concentrations last.

    Args:
        net: the network.
        concentration: a number (fixed), "learned" (one for all dims), a shape, the event's, for one a dim, or
            "network".
        library: whether the library size is the batch's second tensor, as for `Poisson`.

    Data, shapes and errors as for `Poisson`.
    Source: Lopez et al. 2018, "Deep generative modeling for single-cell transcriptomics".

    >>> import torch
    >>> from ppvae.nn import mlp
    >>> ZeroInflatedNegativeBinomial(mlp(8, 3 * 64), concentration="network")(torch.zeros(5, 8)).shape()
    torch.Size([5, 64])
    """

    def __init__(self, net: nn.Module, concentration: ParameterSource = "learned", library: bool = False):
        check_ranges(concentration=concentration)
        more = ("log-concentration",) if concentration == "network" else ()
        super().__init__(net, library, ("log-rate", "gate", *more), concentration)

    def _distribution(self, log_rate: Tensor, *extra: Tensor) -> dist.TorchDistribution:
        gate, *more = extra
        fn = distributions.NegativeBinomial(log_rate, more[0] if more else self.log_concentration)
        return distributions.ZeroInflated(fn, gate)


class Multinomial(NetworkLikelihood):
    """Multinomial counts (bags of N words), log p(x | z, N) = log N! - sum_d log x_d! + sum_d x_d log
    softmax(net(z))_d.

    The model is conditioned on N, the batch's second tensor [N]: log p(x) means log p(x | N). With the multinomial
    coefficient, so that it sums to one over all bags of N; Liang et al. omit it, a constant for a data set. `net` maps
    [..., latent] to logits [..., D]; data are counts [D] that sum to N; a log-mass in nats. Returns batch shape [...],
    event shape [D]. Raises DataError for a context of another shape, ValueError for a datum of more than one dim.
    Source: Liang et al. 2018 (arXiv 1802.05814); Miao et al. 2016 (arXiv 1511.06038) on documents.

    >>> import torch
    >>> from ppvae.nn import mlp
    >>> Multinomial(mlp(8, 64))(torch.zeros(5, 8), context=torch.full((5,), 10)).sample().sum(-1)
    tensor([10., 10., 10., 10., 10.])
    """

    def forward(self, z: Tensor, context: Tensor) -> dist.TorchDistribution:
        logits = self.net(z)
        if event_dim(logits, z) != 1:
            raise ValueError(f"net: expected logits [..., D], found {list(logits.shape)} for z {list(z.shape)}")
        return distributions.Multinomial(context_per_datum(context, z, "total counts", logits.dtype), logits)
