"""Products inside networks in bfloat16 or tf32; everything else, log-densities above all, stays in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ppvae.errors import UsageError

PRECISIONS = ("float32", "tf32", "bf16")
_LAYERS = {
    torch.nn.functional.linear, torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d,
    torch.conv_transpose2d, torch.conv_transpose3d,
}  # fmt: skip


@contextlib.contextmanager
def layer_precision(precision: str) -> Iterator[None]:
    """Has linear and convolutional layers multiply in another precision, and their gradients too.

    "bf16": inputs and weights of a layer are rounded to bfloat16, its products are added up in float32, rounded again,
    and go on in float32 with its bias; weights and their updates stay in float32. "tf32": a GPU's float32 products, in
    layers and elsewhere, keep 10 bits of each factor. "float32": nothing is changed.

    >>> with layer_precision("bf16"):
    ...     torch.nn.functional.linear(torch.tensor([[1.001]]), torch.ones(1, 1))
    tensor([[1.]])
    """
    check_precision(precision)
    if precision == "bf16":
        with _Bfloat16():
            yield
    elif precision == "tf32":
        places: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
        before = [place.allow_tf32 for place in places]
        try:
            for place in places:
                place.allow_tf32 = True
            yield
        finally:
            for place, value in zip(places, before, strict=True):
                place.allow_tf32 = value
    else:
        yield


def check_precision(precision: str, place: torch.device | None = None) -> None:
    """Raises UsageError for a precision that there is not, or not at that place."""
    if precision not in PRECISIONS:
        raise UsageError(f"precision: expected one of {', '.join(PRECISIONS)}; found {precision!r}")
    if precision == "tf32" and place is not None and place.type != "cuda":
        raise UsageError(f"precision: 'tf32' expects a GPU, found {place.type!r}; take 'bf16' or 'float32'")


class _Bfloat16(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_rounded(func, *args, **(kwargs or {}))) if func in _LAYERS else func(*args, **(kwargs or {}))


def _rounded(
    layer: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """A layer whose products are those of bfloat16 numbers."""
    if input.dtype != torch.float32 or weight.dtype != torch.float32:
        return layer(input, weight, bias, *args, **kwargs)
    out = layer(input.bfloat16(), weight.bfloat16(), None, *args, **kwargs).float()
    return out if bias is None else out + bias.reshape(-1, *(1,) * (weight.dim() - 2))
