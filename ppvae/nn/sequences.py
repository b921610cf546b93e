"""Networks of padded sequences, which ignore the padding."""

import torch
from torch import Tensor, nn

from ppvae.errors import DataError, UsageError
from ppvae.errors.ranges import check_numbers
from ppvae.nn.context import rows_of


def known_times(steps: int, lengths: Tensor) -> Tensor:
    """The mask of valid steps of sequences of lengths [batch], [batch, steps].

    Raises DataError for lengths below 1 or above the number of steps, by their row.

    >>> known_times(3, torch.tensor([1, 3])).tolist()
    [[True, False, False], [True, True, True]]
    """
    check_numbers(steps=steps)
    if steps < 1:
        raise UsageError(f"steps: expected at least 1, found {steps}")
    if lengths.dtype == torch.bool or lengths.dim() != 1:
        raise DataError(
            f"lengths: expected a whole number for each sequence, [batch], found {lengths.dtype} "
            f"{list(lengths.shape)}; of a mask [batch, steps] pass mask.sum(1)"
        )
    table = torch.ones(steps, steps, dtype=torch.bool, device=lengths.device).tril()
    return rows_of(table, lengths, "lengths: expected {first} to {last}, as there are steps", first=1)


def require_sequences(x: Tensor) -> None:
    """Raises DataError for data that are no sequences [batch, T, *event], as those of a file that is loaded flat."""
    if x.dim() < 3:
        raise DataError(
            f"x: expected sequences [batch, T, *event], found {list(x.shape)}; data.load(..., flat=False), on the "
            f"command line --no-flat, keeps the dims of a file's rows; numbers [batch, T] are x.unsqueeze(-1)"
        )


class Backward(nn.Module):
    """A recurrent network run backward in time, [batch, T, features] -> [batch, T, hidden].

    The output at time t depends on x_t, x_(t+1), ... up to the end of the sequence, and is 0 in the padding. `context`
    are the lengths [batch]; without it all sequences have T steps.

    Args:
        rnn: `torch.nn.GRU(features, hidden, batch_first=True)`, or another recurrent network with batch_first.

    Raises DataError for lengths outside 1 .. T.
    Source: Krishnan et al. 2017 (arXiv 1609.09869), section 4.

    >>> Backward(nn.GRU(3, 5, batch_first=True))(torch.zeros(2, 4, 3), context=torch.tensor([4, 1])).shape
    torch.Size([2, 4, 5])
    """

    def __init__(self, rnn: nn.Module):
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, *, context: Tensor | None = None) -> Tensor:
        steps = x.shape[1]
        if context is None:
            return self.rnn(x.flip(1))[0].flip(1)
        known = known_times(steps, context)
        order = (context.unsqueeze(1) - 1 - torch.arange(steps, device=x.device)).clamp(min=0).unsqueeze(-1)
        out = self.rnn(torch.gather(x, 1, order.expand(x.shape)))[0]
        return torch.where(known.unsqueeze(-1), torch.gather(out, 1, order.expand(*x.shape[:2], out.shape[-1])), 0.0)
