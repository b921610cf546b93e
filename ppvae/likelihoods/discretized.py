"""Likelihoods over equally spaced levels in [0, 1], such as pixels with 256 grey values v / 255."""

from collections.abc import Sequence

import pyro.distributions as dist
from torch import Tensor, nn

from ppvae import distributions
from ppvae.distributions.discretized import check_levels
from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers
from ppvae.likelihoods.network_outputs import (
    NetworkLikelihood,
    block_output_shape,
    event_dim,
    level_logits,
    split_blocks,
)


class Categorical(NetworkLikelihood):
    """Independent categorical pixels, a logit for each level, log p(x | z) = sum_d log softmax(l_d)[x_d (levels - 1)].

    `net` maps [..., latent] to [..., levels * first, *rest]: the logits of level 0 for all pixels, then those of
    level 1, ..., along the first event dim. Data are v / (levels - 1), v = 0 ... levels - 1, as `data.load` gives them;
    with 2 levels, 0 and 1. A log-mass in nats; returns batch shape [...], event shape [first, *rest].

    Args:
        net: the network.
        levels: the number of values of each element.

    Raises ValueError for fewer than 2 levels, or an output that does not divide.
    Source: van den Oord et al. 2016 (arXiv 1601.06759), section 2.2.

    >>> import torch
    >>> from ppvae.nn import mlp
    >>> Categorical(mlp(8, 4 * 64), levels=4)(torch.zeros(5, 8)).shape()
    torch.Size([5, 64])
    """

    def __init__(self, net: nn.Module, levels: int = 256):
        super().__init__(net)
        self.levels = self.parameters_per_element = check_levels(levels)

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        logits = level_logits(self.net(z), z, self.levels)
        return distributions.Levels(logits).to_event(event_dim(logits, z) - 1)


class DiscretizedLogistic(NetworkLikelihood):
    """Independent discretised logistic pixels, log p(x | z) = sum_d log [F(x_d + h) - F(x_d - h)].

    F is the logistic distribution of location loc_d(z) and scale exp(log_scale_d(z)), in units of the data, h half a
    level; the two end bins are unbounded, so that it sums to one. `net` maps [..., latent] to
    [..., 2 * first, *rest]: locations, then log-scales, along the first event dim. Data are v / (levels - 1). A
    log-mass in nats; returns batch shape [...], event shape [first, *rest].

    Args:
        net: the network.
        levels: the number of values of each element.

    Raises ValueError for fewer than 2 levels, or an output that does not divide.
    Source: Kingma et al. 2016 (arXiv 1606.04934).

    >>> import torch
    >>> from ppvae.nn import mlp
    >>> DiscretizedLogistic(mlp(8, 2 * 64))(torch.zeros(5, 8)).shape()
    torch.Size([5, 64])
    """

    parameters_per_element = 2

    def __init__(self, net: nn.Module, levels: int = 256):
        super().__init__(net)
        self.levels = check_levels(levels)

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        loc, log_scale = split_blocks(self.net(z), z, 2, "location, log-scale")
        return distributions.DiscretizedLogistic(loc, log_scale, self.levels).to_event(event_dim(loc, z))


class MixtureOfDiscretizedLogistics(nn.Module):
    """Pixels of C coupled channels, mixtures of M discretised logistics as in PixelCNN++.

    log p(x | z) = sum_p log sum_m softmax(l_p)_m prod_c DL(x_cp; loc_mcp + sum_{j<c} tanh(r_mcjp) x_jp, log_scale_mcp):
    given the component, the location of a channel is linear in the previous channels. `net` maps [..., latent] to
    [..., outputs * first, *rest], outputs = M (1 + 2 C + C (C - 1) / 2): blocks of M logits, M C locations, M C
    log-scales and M C (C - 1) / 2 couplings r, along the first event dim. Data are v / (levels - 1), of event shape
    [C * first, *rest]: images [C, H, W] (first = 1) or the same flattened (first = H * W). A log-mass in nats; returns
    batch shape [...].

    Args:
        net: the network.
        components: M, the components of the mixture of each pixel.
        channels: C, the coupled elements of a pixel: 3 for colour, 1 for none.
        levels: the number of values of each element.

    Raises ValueError for fewer than 2 levels, or an output that does not divide.
    Source: Salimans et al. 2017 (arXiv 1701.05517), equations 1-3; data in [0, 1] instead of [-1, 1].

    >>> import torch
    >>> from ppvae.nn import conv_decoder
    >>> net = conv_decoder(8, (5 * 10, 8, 8), channels=(8,), hidden=16)
    >>> MixtureOfDiscretizedLogistics(net, components=5, channels=3)(torch.zeros(2, 8)).shape()
    torch.Size([2, 3, 8, 8])
    """

    def __init__(self, net: nn.Module, components: int = 5, channels: int = 1, levels: int = 256):
        check_numbers(components=components, channels=channels)
        super().__init__()
        if components < 1 or channels < 1:
            raise UsageError(f"components, channels: expected 1 or more of each, found {components}, {channels}")
        self.net, self.components, self.channels, self.levels = net, components, channels, check_levels(levels)

    @property
    def outputs(self) -> int:
        """How many parameters the network gives a pixel."""
        m, c = self.components, self.channels
        return m * (1 + 2 * c + c * (c - 1) // 2)

    def output_shape(self, event: Sequence[int]) -> tuple[int, ...]:
        return block_output_shape(event, self.outputs, self.channels)

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        out, lead, m, c = self.net(z), z.shape[:-1], self.components, self.channels
        split_blocks(out, z, self.outputs, "logits, locations, log-scales, couplings")
        event = out.shape[len(lead) :]
        first = event[0] // self.outputs
        parameters = out.reshape(*lead, self.outputs, -1)
        logits, loc, log_scale, coupling = parameters.split([m, m * c, m * c, m * c * (c - 1) // 2], -2)
        return distributions.MixtureOfDiscretizedLogistics(
            logits,
            loc.unflatten(-2, (m, c)),
            log_scale.unflatten(-2, (m, c)),
            coupling.tanh().unflatten(-2, (m, c * (c - 1) // 2)),
            levels=self.levels,
            event_shape=(c * first, *event[1:]),
        )
