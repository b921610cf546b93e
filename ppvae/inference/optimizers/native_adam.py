"""Adam, and the norm of its gradients, in one pass over all parameters in memory, by a function in C++.

torch's fused kernel takes its gradients scaled, and their norm is another operation for each: at the sizes of a small
network, a scaled and clipped step by torch's operations takes more than twice as long.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor

from ppvae.compilation.cpp_library import VECTORIZED, load_library

BLOCK = 8192  # numbers that one thread updates at a time; sums over each are added up in order
SYMBOLS = {torch.float32: "float", torch.float64: "double"}

SOURCE = r"""
#include <cmath>
#include <cstdint>

namespace {
constexpr int LANES = 64;

template <typename T>
double sum_of_squares(const T* __restrict__ g, int64_t n) {
    T lanes[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; ++j) lanes[j] += g[i + j] * g[i + j];
    double sum = 0;
    for (int j = 0; j < LANES; ++j) sum += lanes[j];
    for (; i < n; ++i) sum += double(g[i]) * double(g[i]);
    return sum;
}

template <typename T>
void adam(int64_t n, T* __restrict__ p, const T* __restrict__ g, T* __restrict__ m, T* __restrict__ v,
          const double* s) {
    const T scale = s[0], beta1 = s[1], rest1 = s[2], beta2 = s[3], rest2 = s[4], rate = s[5], root = s[6], eps = s[7];
    const T l2 = s[8], keep = s[9];
    for (int64_t i = 0; i < n; ++i) {
        const T x = g[i] * scale + l2 * p[i];
        const T mean = beta1 * m[i] + rest1 * x, square = beta2 * v[i] + rest2 * x * x;
        m[i] = mean;
        v[i] = square;
        p[i] = keep * p[i] - rate * mean / (std::sqrt(square) * root + eps);
    }
}
}  // namespace

#define FUNCTIONS(T)                                                                                             \
    extern "C" double squares_##T(int threads, int64_t blocks, const int64_t* at, T** g, double* sums) {         \
        _Pragma("omp parallel for num_threads(threads) if(threads > 1)")                                         \
        for (int64_t i = 0; i < blocks; ++i)                                                                     \
            sums[i] = sum_of_squares<T>(g[at[3 * i]] + at[3 * i + 1], at[3 * i + 2]);                            \
        double sum = 0;                                                                                          \
        for (int64_t i = 0; i < blocks; ++i) sum += sums[i];                                                     \
        return sum;                                                                                              \
    }                                                                                                            \
    extern "C" void adam_##T(int threads, int64_t blocks, const int64_t* at, T** p, T** g, T** m, T** v,         \
                             const double* settings) {                                                           \
        _Pragma("omp parallel for num_threads(threads) if(threads > 1)")                                         \
        for (int64_t i = 0; i < blocks; ++i) {                                                                   \
            const int64_t which = at[3 * i], first = at[3 * i + 1];                                              \
            adam<T>(at[3 * i + 2], p[which] + first, g[which] + first, m[which] + first, v[which] + first,       \
                    settings);                                                                                   \
        }                                                                                                        \
    }

FUNCTIONS(float)
FUNCTIONS(double)
"""


@functools.cache
def native_library() -> Any:
    """The functions of `SOURCE`, compiled once by inductor's compiler; None where that fails, which the log says."""
    return load_library(SOURCE, "Adam takes its steps by torch's kernel", VECTORIZED)


@final
class AdamKernel:
    """Updates of one group of parameters of a `torch.optim.Adam` or `AdamW`: those of torch's kernel up to rounding.

    Args:
        params, exp_avgs, exp_avg_sqs: contiguous tensors of one type on the CPU, which are changed in place.
    """

    def __init__(self, params: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor]):
        kind, library = SYMBOLS[params[0].dtype], native_library()
        self._squares, self._adam = (getattr(library, f"{name}_{kind}") for name in ("squares", "adam"))
        self._squares.restype = ctypes.c_double
        self._params = list(params)
        self._changed = [*params, *exp_avgs, *exp_avg_sqs]
        self._places = [t.data_ptr() for t in self._changed]
        self._moments = [_addresses(tensors) for tensors in (params, exp_avgs, exp_avg_sqs)]
        self._shapes = [p.shape for p in params]
        blocks = [number for block in _blocks(params) for number in block]
        self._count = ctypes.c_int64(len(blocks) // 3)
        self._blocks = (ctypes.c_int64 * len(blocks))(*blocks)
        self._sums = (ctypes.c_double * (len(blocks) // 3))()

    @staticmethod
    def takes(tensors: Sequence[Tensor]) -> bool:
        """Whether tensors, as parameters with their moments, can be updated here."""
        kinds = {(t.dtype, t.device.type) for t in tensors}
        plain = len(kinds) == 1 and all(t.is_contiguous() and not t.is_conj() for t in tensors)
        return plain and kinds <= {(dtype, "cpu") for dtype in SYMBOLS} and native_library() is not None

    def fits(self, gradients: Sequence[Tensor]) -> bool:
        """Whether parameters and moments are where they were, and gradients are of their shapes, type and order."""
        dtype = self._changed[0].dtype
        return (
            [t.data_ptr() for t in self._changed] == self._places
            and [g.shape for g in gradients] == self._shapes
            and all(g.is_contiguous() and g.dtype is dtype and g.layout is torch.strided for g in gradients)
        )

    def sum_of_squares(self, gradients: Sequence[Tensor]) -> float:
        """The sum of squares of all gradients; NaN or infinite where one of them is."""
        total: float = self._squares(
            torch.get_num_threads(), self._count, self._blocks, _addresses(gradients), self._sums
        )
        return total

    def step(self, gradients: Sequence[Tensor], group: dict[str, Any], count: int, scale: float) -> None:
        """The update number `count`, counted from 1, by gradients times `scale`, with the settings of a group."""
        (beta1, beta2), rate, decay = group["betas"], group["lr"], group["weight_decay"]
        decoupled = group["decoupled_weight_decay"]
        settings = (
            -scale if group["maximize"] else scale, beta1, 1 - beta1, beta2, 1 - beta2,
            rate / (1 - beta1**count), 1 / math.sqrt(1 - beta2**count), group["eps"],
            0.0 if decoupled else decay, 1 - rate * decay if decoupled else 1.0,
        )  # fmt: skip
        params, exp_avgs, exp_avg_sqs = self._moments
        self._adam(
            torch.get_num_threads(), self._count, self._blocks, params, _addresses(gradients), exp_avgs, exp_avg_sqs,
            (ctypes.c_double * len(settings))(*settings),
        )  # fmt: skip
        torch.autograd.graph.increment_version(self._params)  # as operations of torch do; caches look at it


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def _blocks(params: Sequence[Tensor]) -> Iterator[tuple[int, int, int]]:
    """(parameter, first number, how many) of each block."""
    for i, p in enumerate(params):
        for first in range(0, p.numel(), BLOCK):
            yield i, first, min(BLOCK, p.numel() - first)
