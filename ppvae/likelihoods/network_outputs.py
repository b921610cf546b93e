"""How likelihoods read the output of their network: event dims, blocks of parameters, and learned scalars."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ppvae.errors import DataError, UsageError

ParameterSource = float | Literal["learned", "network"] | tuple[int, ...]


class NetworkLikelihood(nn.Module):
    """A likelihood whose parameters are the output of a network at z, `parameters_per_element` blocks of them."""

    parameters_per_element = 1

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def output_shape(self, event: Sequence[int]) -> tuple[int, ...]:
        """The event shape of the network output for data of an event shape."""
        return block_output_shape(event, self.parameters_per_element)


def event_dim(out: Tensor, z: Tensor) -> int:
    """The number of event dims of a network's output, given latent vectors [..., latent]."""
    return out.dim() - z.dim() + 1


def split_blocks(out: Tensor, z: Tensor, count: int, what: str) -> tuple[Tensor, ...]:
    """Splits an output [..., count * first, *rest] along its first event dim into `count` blocks [..., first, *rest].

    Raises ValueError, with `what` the blocks are, for a dim that does not divide.

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
    """The event shape of an output of `count` blocks for data of an event shape, or for each pixel of `channels`.

    >>> block_output_shape((3, 32, 32), 2), block_output_shape((3, 32, 32), 10, channels=3)
    ((6, 32, 32), (10, 32, 32))
    """
    return (count * event[0] // channels, *event[1:])


def level_logits(out: Tensor, z: Tensor, levels: int) -> Tensor:
    """Logits of levels, moved from blocks along the first event dim to the end: [..., first, *rest, levels].

    >>> level_logits(torch.zeros(5, 12), torch.zeros(5, 2), 4).shape
    torch.Size([5, 3, 4])
    """
    split_blocks(out, z, levels, "the logits of each level")
    dim = z.dim() - 1
    return out.unflatten(dim, (levels, -1)).movedim(dim, -1)  # a view: a copy takes half of the time of a step


def register_log_parameter(part: nn.Module, name: str, value: ParameterSource, start: float = 1.0) -> None:
    """Registers the logarithm of a positive parameter of a module as `log_<name>`.

    A number becomes a buffer; "learned" (a scalar) or a shape become parameters initialised at `start`; "network"
    registers nothing, as the network predicts it.

    Raises ValueError for anything else.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not value > 0:
            raise UsageError(f"{name}: expected a positive number, found {value}")
        part.register_buffer(f"log_{name}", torch.tensor(float(value)).log())
    elif value == "learned" or isinstance(value, tuple):
        shape = value if isinstance(value, tuple) else ()
        part.register_parameter(f"log_{name}", nn.Parameter(torch.full(shape, start).log()))
    elif value != "network":
        raise UsageError(f"{name}: expected a number, 'learned', 'network' or the event's shape, found {value!r}")


def context_per_datum(context: Tensor, z: Tensor, what: str, dtype: torch.dtype) -> Tensor:
    """A context with one number for each datum [batch], as `dtype`. DataError, with `what` it is, for another shape."""
    try:
        fits = torch.broadcast_shapes(context.shape, z.shape[:-1]) == z.shape[:-1]
    except RuntimeError:
        fits = False
    if not fits:
        raise DataError(
            f"context: expected {what}, one number a datum {list(z.shape[:-1])}, found shape {list(context.shape)}"
        )
    return context.to(dtype)
