"""Top-down hierarchical VAEs with a residual stream of features, and the very deep VAE (VDVAE)."""

import math
from collections.abc import Sequence
from typing import final

import pyro
import torch
from torch import Tensor
from torch.nn import Module

from ppvae import nn
from ppvae.errors import ContractError, UsageError
from ppvae.errors.ranges import SIZE, check_numbers, check_sequences
from ppvae.likelihoods import MixtureOfDiscretizedLogistics
from ppvae.models.composed_model import ComposedModel, LearnedTensor
from ppvae.posteriors import DiagonalNormal


class Block(Module):
    """A latent of a `TopDownVAE`: p(z | h), q(z | h, e), and the update h <- step(h, z).

    Args:
        prior: p(z | h), a part such as `posteriors.DiagonalNormal`.
        posterior: q(z | h, e), a part whose network takes [..., h + e]; e are the encoder features.
        step: a network (h, z) -> h for the next block: `nn.Added(net)` is h + net(z).
    """

    def __init__(self, prior: Module, posterior: Module, step: Module):
        super().__init__()
        self.prior, self.posterior, self.step = prior, nn.ConcatContext(posterior), step


@final
class TopDownVAE(ComposedModel):
    """p(x, z) = prod_i p(z_i | h_i) p(x | h_0), h_L = start, h_(i-1) = step_i(h_i, z_i), from i = L down to 1.

    Its guide is q(z | x) = prod_i q(z_i | h_i, e_i), e = encoder(x), along the same h: latents above affect the data
    through h, past those below, and each factor of the guide depends on all latents above it. Features h are vectors;
    image networks unflatten them. Sites "zL" (the top) to "z1" (next to the data) and "x". With one block it is a
    `VAE`.

    Args:
        start: the initial h, a trained vector.
        blocks: `Block`s from the top down.
        likelihood: p(x | h).
        encoder: a network from x to e, [batch, e] shared by all blocks or a sequence with one for each block, from the
            top down.

    Raises ContractError for another number of encoder features, and by the part where one does not fit.
    Source: Child 2021 (arXiv 2011.10650); Kingma et al. 2016 (arXiv 1606.04934), top-down inference.

    >>> from ppvae import likelihoods, posteriors
    >>> block = lambda: Block(
    ...     prior=posteriors.DiagonalNormal(nn.mlp(32, 2 * 4)),
    ...     posterior=posteriors.DiagonalNormal(nn.mlp(32 + 16, 2 * 4)),
    ...     step=nn.Added(nn.mlp(4, 32)),
    ... )
    >>> vae = TopDownVAE(
    ...     start=torch.zeros(32),
    ...     blocks=[block(), block(), block()],
    ...     likelihood=likelihoods.Bernoulli(nn.mlp(32, 64)),
    ...     encoder=nn.mlp(64, 16),
    ... )
    >>> vae.guide(torch.zeros(5, 64)).shape
    torch.Size([5, 4])
    """

    def __init__(self, start: Tensor, blocks: Sequence[Block], likelihood: Module, encoder: Module):
        super().__init__("top_down_vae")
        self.start, self.blocks = LearnedTensor(start), torch.nn.ModuleList(blocks)
        self.likelihood, self.encoder = likelihood, encoder

    def model(self, x: Tensor) -> Tensor:
        """p(x, z), from the top down."""
        with pyro.plate("data", len(x)):
            h = self.call_part("start")
            for i in range(len(self.blocks)):
                z = pyro.sample(f"z{len(self.blocks) - i}", self.call_part(f"blocks.{i}.prior", h))
                h = self.call_part(f"blocks.{i}.step", h, z)
            return pyro.sample("x", self.call_part("likelihood", h), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """q(z | x), from the top down."""
        features = self.call_part("encoder", x)
        count = len(self.blocks)
        block_features = [features] * count if isinstance(features, Tensor) else features
        if len(block_features) != count:
            raise ContractError(f"encoder: expected features for each of {count} blocks, found {len(block_features)}")
        with pyro.plate("data", len(x)):
            h = self.call_part("start")
            for i, e in enumerate(block_features):
                z = pyro.sample(f"z{count - i}", self.call_part(f"blocks.{i}.posterior", h, context=e))
                if i + 1 < count:
                    h = self.call_part(f"blocks.{i}.step", h, z)
            return z


def very_deep_vae(
    train: Tensor,
    sides: tuple[int, ...] = (1, 4, 8, 16, 32),
    blocks: tuple[int, ...] = (1, 2, 2, 2, 1),
    width: int = 32,
    latent: int = 8,
    components: int = 5,
    levels: int = 256,
) -> TopDownVAE:
    """A small VDVAE of images [N, C, H, H]: residual blocks at ascending sizes with a latent image each.

    Each latent has `latent` channels; pixels are mixtures of discretised logistics with coupled channels. Residual
    updates are initialised at 1 / sqrt(blocks) of their size, so that h does not grow with the number of blocks.

    Args:
        train: the training data, v / (levels - 1).
        sides: the sides of the latent images, ascending, each dividing the next, the last that of the data.
        blocks: the number of latents of each size.
        width: the channels of h and of the encoder.
        latent: the channels of each latent.
        components: the mixture components of each pixel.
        levels: the number of values of each element.

    Raises ValueError for images that are not square or of another size, and for sides that do not divide.
    Source: Child 2021 (arXiv 2011.10650).

    >>> vae = very_deep_vae(torch.zeros(5, 3, 8, 8), sides=(1, 4, 8), blocks=(1, 2, 1), width=4, latent=2)
    >>> vae.guide(torch.zeros(5, 3, 8, 8)).shape
    torch.Size([5, 128])
    """
    check_numbers(latent=latent, components=components)
    SIZE.check_number("width", width)
    check_sequences(sides=sides, blocks=blocks)
    check_numbers(levels=levels)
    if not sides:
        raise UsageError("sides: expected at least one, found none")
    shape = tuple(train.shape[1:])
    if len(shape) != 3 or shape[1:] != (sides[-1], sides[-1]) or len(blocks) != len(sides):
        raise UsageError(
            f"very_deep_vae: expected images [N, C, {sides[-1]}, {sides[-1]}] and a number of blocks for each of "
            f"{len(sides)} sides, found {list(train.shape)} and {len(blocks)} numbers; load with flat=False"
        )
    every = [side for side, count in zip(sides, blocks, strict=True) for _ in range(count)]
    block_list = [
        _residual_block(width, latent, side, above, len(every))
        for side, above in zip(every, [*every[1:], 0], strict=True)
    ]
    encoder = nn.Pyramid(shape[0], width, sides, blocks)
    likelihood = MixtureOfDiscretizedLogistics(torch.nn.Identity(), components, shape[0], levels)
    outputs = torch.nn.Conv2d(width, likelihood.outputs, 1)
    likelihood.net = torch.nn.Sequential(
        nn.on_images(width, sides[-1], torch.nn.GELU(), outputs), torch.nn.Unflatten(-1, (-1, *shape[1:]))
    )
    m, c = components, shape[0]
    start = torch.zeros(likelihood.outputs)  # components of scale e^-2 side by side over [0, 1]
    start[m : m + m * c] = torch.linspace(0, 1, m + 2)[1:-1].repeat_interleave(c)
    start[m + m * c : m + 2 * m * c] = -2.0
    nn.set_output_bias(likelihood.net, start)
    return TopDownVAE(torch.zeros(width * sides[0] ** 2), block_list, likelihood, encoder)


def _residual_block(width: int, latent: int, side: int, then: int, count: int) -> Block:
    """A block at one size, whose step upsamples to the size of the next."""

    def normal(channels: int) -> DiagonalNormal:
        first = torch.nn.Conv2d(channels, width, 3, padding=1)
        second = torch.nn.Conv2d(width, 2 * latent, 3, padding=1)
        return DiagonalNormal(nn.on_images(channels, side, torch.nn.GELU(), first, torch.nn.GELU(), second))

    write, change = torch.nn.Conv2d(latent, width, 1), nn.Residual(width, torch.nn.GELU)
    grown = [torch.nn.ConvTranspose2d(width, width, then // side, stride=then // side)] if then > side else []
    step = nn.Added(nn.on_images(latent, side, write), nn.on_images(width, side, change, *grown))
    with torch.no_grad():
        for layer in (write, *list(change.change)[-1:]):
            layer.get_parameter("weight").div_(math.sqrt(count))
    return Block(normal(width), normal(2 * width), step)
