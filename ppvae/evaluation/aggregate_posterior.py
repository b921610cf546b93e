"""ELBO surgery: the aggregate posterior q(z) = mean_m q(z | x_m) at the guide's draws, and the split of the rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ppvae.evaluation.blocks import Block
from ppvae.inference.structure import Structure
from ppvae.inference.terms import Terms, cache_encoder, sample_guide
from ppvae.inference.tracing import Program

MAX_ELEMENTS = 2**21  # of an array of draws for every datum of a block


def split_rate(
    guide: Program,
    latents: Mapping[str, Tensor],
    log_q: Tensor,
    log_p: Tensor,
    blocks: Iterable[Block],
    s: Structure,
) -> tuple[tuple[Tensor, Tensor, Tensor] | None, str]:
    """Splits the rate by ELBO surgery: (rate, information lower, information upper), each [N]; or None and the reason.

    Args:
        latents: every site that the guide samples, [draws, N, *inner, *event].
        log_q, log_p: log q(z | x) and log p(z) of these draws, [draws, N].
        blocks: all the data.

    The information is log q(z | x) - log q(z), averaged over the draws; q(z) includes the draw's own datum in the lower
    bound, and not in the upper bound.
    """
    draws, count = log_q.shape
    if count < 2:
        return None, "it takes two data"
    owner = torch.arange(count, device=log_q.device).repeat(draws)
    flat = {n: v.flatten(0, 1) for n, v in latents.items()}  # [draws * N, *inner, *event]
    most = max(v[0].numel() for v in flat.values())
    others = torch.full_like(log_q, -torch.inf).reshape(-1)
    for block in blocks:
        at = cache_encoder(guide, block.batch, s, block.index)
        rows = s.batch_size(block.batch) if block.index is None else len(block.index)
        step = max(1, MAX_ELEMENTS // (rows * most))
        for low in range(0, draws * count, step):
            part = slice(low, low + step)
            values = {n: _expand_over_data(v[part], rows, s.event_dims[n]) for n, v in flat.items()}
            density = _log_guide(at, block, s, values, rows)
            place = owner[part] - block.start
            here = (place >= 0) & (place < block.size)
            density[here, place[here]] = -torch.inf
            others[part] = torch.logaddexp(others[part], density.logsumexp(1))
    others = others.reshape(draws, count)
    if bool((others == -torch.inf).all()):
        return None, "no datum's guide has mass where another's draws lie"
    inclusive = torch.logaddexp(others, log_q) - math.log(count)
    exclusive = others - math.log(count - 1)
    rate, lower, upper = ((log_q - b).mean(0).cpu() for b in (log_p, inclusive, exclusive))
    return (rate, lower, upper), ""


def _expand_over_data(value: Tensor, rows: int, events: int) -> Tensor:
    """[draws, *inner, *event] -> [draws, *inner, rows, *event]: the same draws for every datum of a batch."""
    data = value.dim() - events
    value = value.unsqueeze(data)
    return value.expand(*(rows if i == data else n for i, n in enumerate(value.shape)))


def _log_guide(guide: Program, block: Block, s: Structure, values: Mapping[str, Tensor], rows: int) -> Tensor:
    """log q(z | x) of given draws under every datum of a block, [draws, N]."""
    count = len(next(iter(values.values())))
    sites = sample_guide(guide, block.batch, count, structure=s, index=block.index, values=values)
    return Terms({}, sites, count, rows, s.scale, s.has_global_latents).log_guide[:, : block.size].clone()
