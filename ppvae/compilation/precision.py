"""Reduced precision for the matrix products of network layers; log-densities and all else stay in float32."""

import contextlib
import functools
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
    """Runs linear and convolutional layers, and their gradients, with products of reduced precision.

    "bf16": inputs and weights of a layer are rounded to bfloat16, the products are accumulated in float32, and the
    result is rounded to bfloat16; bias, weights and weight updates stay in float32. A processor without bfloat16
    products multiplies the rounded factors in float32, which gives the same numbers up to the order of the sums.
    "tf32": float32 products on a GPU, in layers and elsewhere, keep 10 bits of each factor. "float32": no change.

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
    """Raises UsageError for an unknown precision, or one that the device does not have."""
    if precision not in PRECISIONS:
        raise UsageError(f"precision: expected one of {', '.join(PRECISIONS)}; found {precision!r}")
    if precision == "tf32" and place is not None and place.type != "cuda":
        raise UsageError(f"precision: 'tf32' expects a GPU, found {place.type!r}; take 'bf16' or 'float32'")


@functools.cache
def has_bfloat16_products() -> bool:
    """Whether this processor multiplies bfloat16 numbers with sums in float32, by oneDNN, at least as fast as float32.

    oneDNN answers for the instructions that it may use, `ONEDNN_MAX_CPU_ISA` included: AVX-512, AMX, or SVE with BF16.
    Without them torch accumulates transposed convolutions in bfloat16, and takes several times as long as in float32.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and bool(supported())


class _Bfloat16(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_bfloat16_layer if func in _LAYERS else _call)(func, *args, **(kwargs or {}))


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _bfloat16_layer(
    layer: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """A float32 layer whose factors and result are rounded to bfloat16."""
    if input.dtype != torch.float32 or weight.dtype != torch.float32:
        return layer(input, weight, bias, *args, **kwargs)
    if input.device.type != "cpu" or has_bfloat16_products():
        out = layer(input.bfloat16(), weight.bfloat16(), None, *args, **kwargs).float()
    else:
        out = layer(input.bfloat16().float(), weight.bfloat16().float(), None, *args, **kwargs).bfloat16().float()
    return out if bias is None else out + bias.reshape(-1, *(1,) * (weight.dim() - 2))
