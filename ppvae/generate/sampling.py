"""Samples from the model, and reconstructions of data."""

from typing import Any

from torch import Tensor

from ppvae.errors.calls import explain_call
from ppvae.errors.ranges import check_numbers
from ppvae.generate.pair import open_pair
from ppvae.inference.tracing import Program


@explain_call
def samples(model: Program, guide: Program, x: Any, count: int = 64, *, mean: bool = True, seed: int = 0) -> Tensor:
    """Ancestral samples from the model, [count, *event]: z ~ p(z), then the mean of (or a draw from) p(x | z).

    `x` gives the shape of the data and the covariates of the model.

    >>> import torch
    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> samples(pair.model, pair.guide, torch.zeros(4, 3), count=5).shape
    torch.Size([5, 3])
    """
    check_numbers(count=count, seed=seed)
    with open_pair(model, guide, x, seed) as pair:
        return pair.decode({}, pair.repeat_rows(count), mean)


@explain_call
def reconstructions(model: Program, guide: Program, x: Any, *, mean: bool = True, seed: int = 0) -> Tensor:
    """Each datum encoded and decoded, [N, *event]: z ~ q(z | x), then the mean of (or a draw from) p(x | z).

    >>> import torch
    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> reconstructions(pair.model, pair.guide, torch.zeros(4, 3)).shape
    torch.Size([4, 3])
    """
    check_numbers(seed=seed)
    with open_pair(model, guide, x, seed) as pair:
        return pair.decode(pair.encode(mean=False), pair.batch, mean)
