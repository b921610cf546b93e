"""Reduced precision for the matrix products of network layers; log-densities and all else stay in float32."""

import contextlib
import functools
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ppvae.errors import UsageError

log = logging.getLogger("ppvae")
PRECISIONS = ("float32", "tf32", "bf16")
TIMING_ROUNDS = 5
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
    check_precision(precision, choices=PRECISIONS)
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


def check_precision(
    precision: str, place: torch.device | None = None, choices: tuple[str, ...] = (*PRECISIONS, "auto")
) -> None:
    """Raises UsageError for an unknown precision, or one that the device does not have."""
    if precision not in choices:
        raise UsageError(
            f"precision: expected one of {', '.join(PRECISIONS)}; found {precision!r}. Pass 'auto' to fit or "
            f"log_marginal for the faster of float32 and bf16"
        )
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


def faster_precision(run: Callable[[], object], gradients: bool, on_any_rank: Callable[[bool], bool] = bool) -> str:
    """ "bf16" where the layers of a run are faster in it on all ranks, else "float32", with a line in the log."""
    slowdown = slowdown_of_bfloat16(run, gradients)
    if not on_any_rank(slowdown >= 1.0):
        return "bf16"
    log.warning("ppvae: precision: layers take %.2f times as long in bf16 as in float32, which is used", slowdown)
    return "float32"


def slowdown_of_bfloat16(run: Callable[[], object], gradients: bool) -> float:
    """The time that the layers of a run take in bfloat16, with their gradients if asked, in units of that in float32.

    The layers are those that the run calls, each timed by itself on random inputs of the same shapes, by medians over
    interleaved rounds. 1 for a run without a layer in float32.
    """
    with _RecordLayers() as recorder:
        run()
    times = {"float32": 0.0, "bf16": 0.0}
    with torch.random.fork_rng(), torch.set_grad_enabled(gradients):
        for layer, tensors, settings in recorder.calls.values():
            inputs = [
                t if t is None else torch.randn(t.shape, device=t.device, requires_grad=gradients) for t in tensors
            ]
            rounds: dict[str, list[float]] = {precision: [] for precision in times}
            for _ in range(TIMING_ROUNDS + 1):
                for precision, seconds in rounds.items():
                    seconds.append(_seconds_of_layer(layer, inputs, settings, precision))
            for precision, seconds in rounds.items():
                times[precision] += statistics.median(seconds[1:])  # the first round creates kernels
    return times["bf16"] / times["float32"] if recorder.calls else 1.0


def _seconds_of_layer(layer: Any, inputs: list[Tensor | None], settings: tuple[Any, ...], precision: str) -> float:
    start = time.perf_counter()
    with layer_precision(precision):
        out = layer(*inputs, *settings)
    if out.requires_grad:
        out.sum().backward()
    if out.device.type == "cuda":
        torch.cuda.synchronize(out.device)
    return time.perf_counter() - start


class _RecordLayers(TorchFunctionMode):
    """Records the float32 layers of a run by shapes and settings, with one call of each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, list[Tensor | None], tuple[Any, ...]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t.detach() if isinstance(t, Tensor) else None for t in args[:3]]
        if func in _LAYERS and not kwargs and all(t is None or t.dtype == torch.float32 for t in tensors):
            key = (func, *(t if t is None else t.shape for t in tensors), *map(str, args[3:]))
            self.calls[key] = func, tensors, args[3:]
        return func(*args, **(kwargs or {}))


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
