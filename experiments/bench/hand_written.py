"""Hand-written PyTorch, eager or under `torch.compile`, and bare matrix products."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.bench import Settings, Timed
from experiments.bench.pairs import TwoLayers, build, data
from ppvae import VAE
from ppvae.compilation.matmul_backend import onednn_linear


def step(kind: str, s: Settings, particles: int, compile: bool) -> Timed:
    """Seconds per step on the ELBO of one draw, with the KL in closed form if there is one, or on the IWAE bound."""
    loss, parameters = loss_and_parameters(build(kind, s), particles)
    loss = torch.compile(loss) if compile else loss
    adam = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    def one(batch: Tensor) -> None:
        value = loss(batch)
        adam.zero_grad()
        value.backward()
        adam.step()
        value.item()

    return per_step(one, data(kind, s.batch), s.steps_of(particles))


def loss_and_parameters(pair: VAE | TwoLayers, particles: int) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """The loss of a batch, and what it is a function of."""
    if isinstance(pair, TwoLayers):
        return _two_layers(pair), list(pair.networks.parameters())
    return _one_layer(pair, particles), list(pair.parameters())


def per_step(one: Callable[[Tensor], object], batch: Tensor, steps: int) -> Timed:
    """Seconds per step, averaged over a round."""

    def run() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            one(batch)
        return (time.perf_counter() - start) / steps

    return run


def _one_layer(pair, particles: int) -> Callable[[Tensor], Tensor]:  # type: ignore[no-untyped-def]
    encoder, decoder = pair.posterior.net, pair.likelihood.net

    def loss(x: Tensor) -> Tensor:
        loc, log_scale = encoder(x).chunk(2, dim=-1)
        noise = torch.randn_like(loc.expand(particles, *loc.shape) if particles > 1 else loc)
        z = loc + log_scale.exp() * noise
        log_lik = _log_lik(decoder(z), x)
        if particles == 1:
            kl = (0.5 * (loc**2 + (2 * log_scale).exp()) - log_scale - 0.5).sum(-1)
            return (kl - log_lik).mean()
        log_weight = log_lik + (0.5 * noise**2 - 0.5 * z**2 + log_scale).sum(-1)
        return math.log(particles) - log_weight.logsumexp(0).mean()

    return loss


def _two_layers(pair: TwoLayers) -> Callable[[Tensor], Tensor]:
    nets = pair.networks

    def log_normal(z: Tensor, outputs: Tensor) -> Tensor:
        loc, log_scale = outputs.chunk(2, dim=-1)
        return (-0.5 * ((z - loc) / log_scale.exp()) ** 2 - log_scale).sum(-1)

    def loss(x: Tensor) -> Tensor:
        of_z1 = nets["encoder"](x)
        loc, log_scale = of_z1.chunk(2, dim=-1)
        z1 = loc + log_scale.exp() * torch.randn_like(loc)
        of_z2 = nets["second"](z1)
        loc, log_scale = of_z2.chunk(2, dim=-1)
        z2 = loc + log_scale.exp() * torch.randn_like(loc)
        log_p = _log_lik(nets["decoder"](z1), x) + log_normal(z1, nets["above"](z2)) - 0.5 * (z2**2).sum(-1)
        return (log_normal(z1, of_z1) + log_normal(z2, of_z2) - log_p).mean()

    return loss


def _log_lik(logits: Tensor, x: Tensor) -> Tensor:
    targets = x.expand_as(logits)
    log_lik = -F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return log_lik.sum(-1) if x.dim() == 2 else log_lik.sum((-3, -2, -1))


def log_px(s: Settings, compile: bool) -> Timed:
    """Microseconds per (datum, particle) of importance sampling, 100 data and 50 particles at a time."""
    pair = build("one layer", s)
    encoder, decoder = pair.posterior.net, pair.likelihood.net  # type: ignore[union-attr]
    x, width = data("one layer", s.num_eval), min(50, s.particles)

    def weights(loc: Tensor, log_scale: Tensor, batch: Tensor) -> Tensor:
        noise = torch.randn(width, *loc.shape)
        z = loc + log_scale.exp() * noise
        return _log_lik(decoder(z), batch) + (0.5 * noise**2 - 0.5 * z**2 + log_scale).sum(-1)

    weights = torch.compile(weights) if compile else weights

    @torch.no_grad()
    def run() -> float:
        start = time.perf_counter()
        for batch in x.split(100):
            loc, log_scale = encoder(batch).chunk(2, dim=-1)
            parts = [weights(loc, log_scale, batch) for _ in range(0, s.particles, width)]
            torch.cat(parts).logsumexp(0) - math.log(s.particles)
        return (time.perf_counter() - start) / (len(x) * s.particles) * 1e6

    return run


@dataclass(frozen=True)
class Layer:
    """The matrix products of a linear layer: [rows, inputs] by [inputs, outputs], and those of its two gradients."""

    rows: int
    inputs: int
    outputs: int
    first: bool  # the first of the encoder, which needs no gradient of its input

    def flops(self, gradients: bool) -> float:
        """Floating-point operations of its one or three products; two for the first layer."""
        return 2 * self.rows * self.inputs * self.outputs * (1 + gradients * (2 - self.first))


def layers(s: Settings, rows: tuple[int, int]) -> list[Layer]:
    """The layers of encoder and decoder, for the numbers of rows of each; a side with no rows is left out."""
    sizes = [(784, *s.hidden, 2 * s.latent), (s.latent, *s.hidden, 784)]
    return [
        Layer(count, a, b, side == 0 and i == 0)
        for side, (count, widths) in enumerate(zip(rows, sizes, strict=True)) if count
        for i, (a, b) in enumerate(itertools.pairwise(widths))
    ]  # fmt: skip


def matrix_products(of: list[Layer], gradients: bool, onednn: bool, repeats: int, per: float) -> Timed:
    """`per` times the seconds of the matrix products of the layers, averaged over `repeats` per round."""
    tensors = [
        (torch.randn(n.rows, n.inputs), torch.randn(n.rows, n.outputs), torch.randn(n.outputs, n.inputs), n.first)
        for n in of
    ]
    product = (lambda a, b: onednn_linear()(a, b.T, None)) if onednn else torch.mm

    @torch.no_grad()
    def run() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            for x, y, w, first in tensors:
                product(x, w.T)
                if gradients:
                    product(y.T, x)
                    if not first:
                        product(y, w)
        return per * (time.perf_counter() - start) / repeats

    return run
