"""How likelihoods read a network's output: which dims are one datum, and several parameters a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ppvae.errors import DataError

ParameterSource = float | Literal["learned", "network"] | tuple[int, ...]


class NetworkLikelihood(nn.Module):
    """A likelihood whose parameters are all a network's output at z, so many for each number of the data."""

    parameters_per_element: ClassVar[int] = 1

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def output_shape(self, event: Sequence[int]) -> tuple[int, ...]:
        """The event shape of the network's output for data of an event shape."""
        return block_output_shape(event, self.parameters_per_element)


def event_dim(out: Tensor, z: Tensor) -> int:
    """How many dims of a network's output are one datum, given latent vectors [..., latent]."""
    return out.dim() - z.dim() + 1


def split_blocks(out: Tensor, z: Tensor, count: int, what: str) -> tuple[Tensor, ...]:
    """Parameters that stand one after another along the output's first event dim: [..., count * first, *rest] ->
    `count` times [..., first, *rest]. ValueError, by `what` they are, for a dim that does not divide.

    For a flat datum [D] these are blocks of D numbers, for an image [C, H, W] blocks of C channels.

    >>> loc, log_scale = split_blocks(torch.zeros(5, 6, 8, 8), torch.zeros(5, 2), 2, "location, log-scale"); loc.shape
    torch.Size([5, 3, 8, 8])
    """
    dim = z.dim() - 1
    size = out.shape[dim] if out.dim() > dim else 1
    if size % count:
        raise ValueError(
            f"net: expected an output [..., {count} * first, *rest] ({what}), found {list(out.shape)} for z "
            f"{list(z.shape)}"
        )
    return out.chunk(count, dim)


def block_output_shape(event: Sequence[int], count: int, channels: int = 1) -> tuple[int, ...]:
    """The event shape of an output of `count` blocks for data of an event shape (for each pixel of some `channels`).

    >>> block_output_shape((3, 32, 32), 2), block_output_shape((3, 32, 32), 10, channels=3)
    ((6, 32, 32), (10, 32, 32))
    """
    return (count * event[0] // channels, *event[1:])


def level_logits(out: Tensor, z: Tensor, levels: int) -> Tensor:
    """Logits of levels, blocks along the first event dim, moved to the end: -> [..., first, *rest, levels].

    >>> level_logits(torch.zeros(5, 12), torch.zeros(5, 2), 4).shape
    torch.Size([5, 3, 4])
    """
    split_blocks(out, z, levels, "the logits of each level")
    dim = z.dim() - 1
    return out.unflatten(dim, (levels, -1)).movedim(dim, -1)  # a view: a copy would take half of a step's time


def register_log_parameter(part: nn.Module, name: str, value: ParameterSource, start: float = 1.0) -> None:
    """Gives a module the logarithm of a positive parameter as `log_<name>`: a buffer for a number, parameters that
    begin at `start` for "learned" (one) or a shape (one each), and nothing for "network", whose net gives it.

    Raises ValueError for anything else.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, found {value}")
        part.register_buffer(f"log_{name}", torch.tensor(float(value)).log())
    elif value == "learned" or isinstance(value, tuple):
        shape = value if isinstance(value, tuple) else ()
        part.register_parameter(f"log_{name}", nn.Parameter(torch.full(shape, start).log()))
    elif value != "network":
        raise ValueError(f"{name}: expected a number, 'learned', 'network' or the event's shape, found {value!r}")


def context_per_datum(context: Tensor, z: Tensor, what: str, dtype: torch.dtype) -> Tensor:
    """A context of one number a datum [batch], as `dtype`. DataError, saying `what` it is, for another shape."""
    try:
        fits = torch.broadcast_shapes(context.shape, z.shape[:-1]) == z.shape[:-1]
    except RuntimeError:
        fits = False
    if not fits:
        raise DataError(
            f"context: expected {what}, one number a datum {list(z.shape[:-1])}, found shape {list(context.shape)}"
        )
    return context.to(dtype)
