"""Autoregressive likelihoods, whose elements depend on one another given the latent."""

from collections.abc import Sequence

import pyro.distributions as dist
from torch import Tensor, nn
from torch.distributions import constraints

from ppvae import distributions
from ppvae.distributions.constraints import EquallySpacedLevels
from ppvae.distributions.discretized import check_levels
from ppvae.likelihoods.network_outputs import block_output_shape, level_logits


class Autoregressive(nn.Module):
    """An autoregressive likelihood, log p(x | z) = sum_i log p(x_i | x_<i, z), of binary data or of levels.

    Args:
        masked: a network of two arguments whose leading dims broadcast, (x [..., *event], z [..., latent]) -> logits
            [..., *event], or with more than 2 levels [..., levels * first, *rest], the logits of level 0 for all
            pixels, then of level 1, ..., along the first event dim. The logits of an element may depend on z and on
            earlier elements; `net.order` lists positions of the flattened event from the first to the last,
            `net.event_shape` is the shape of one datum. `nn.MADE` and `nn.PixelCNN` are such networks;
            `nn.sees_only_the_past` tests others.
        levels: 2 for data of 0 and 1; else data are v / (levels - 1).

    A log-mass in nats; log p(x | z) takes one call of the network, a sample one call for each element. Returns batch
    shape [...], event shape [*event]. Such a likelihood can ignore z (posterior collapse): monitor the KL divergence
    (Chen et al. 2017, arXiv 1611.02731). Raises ValueError for fewer than 2 levels.
    Source: Gulrajani et al. 2016 (arXiv 1611.05013) with `nn.PixelCNN`; Germain et al. 2015 (arXiv 1502.03509) with
    `nn.MADE`.

    >>> import torch
    >>> from ppvae.nn import MADE
    >>> fn = Autoregressive(MADE(6, latent=2, outputs=4), levels=4)(torch.zeros(5, 2))
    >>> fn.log_prob(fn.sample()).shape
    torch.Size([5])
    """

    def __init__(self, masked: nn.Module, levels: int = 2):
        super().__init__()
        self.net, self.levels = masked, check_levels(levels)

    def output_shape(self, event: Sequence[int]) -> tuple[int, ...]:
        return block_output_shape(event, 1 if self.levels == 2 else self.levels)

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        event = tuple(self.net.event_shape)  # type: ignore[arg-type]

        def conditionals(x: Tensor) -> dist.TorchDistribution:
            out = self.net(x, z)
            if self.levels == 2:
                return distributions.Bernoulli(logits=out).to_event(len(event))
            latent = out[(..., *(0,) * len(event))].unsqueeze(-1)  # z's leading dims, those of x included
            return distributions.Levels(level_logits(out, latent, self.levels)).to_event(len(event))

        parameters_per_element = constraints.boolean if self.levels == 2 else EquallySpacedLevels(self.levels)
        support = constraints.independent(parameters_per_element, len(event))
        kind = z.dtype if z.is_floating_point() else next(self.net.parameters()).dtype  # z may be classes
        start = z.new_zeros((), dtype=kind).expand(*z.shape[:-1], *event)
        return distributions.Autoregressive(conditionals, start, self.net.order, support)  # type: ignore[arg-type]
