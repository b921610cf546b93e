"""log p(x) of independent bits, summed in one pass over their logits."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ppvae.compilation.cpp_library import VECTORIZED, kept_library, load_library
from ppvae.compilation.matmul_backend import are_plain, need_gradients

# log p = sum_d (x_d - [l_d > 0]) l_d - log prod_d (1 + exp(-|l_d|)): one logarithm for up to 992 factors, whose product
# is at most 2^31 in each lane, in float32, and 2^992 in float64. Rows with infinities or NaN are summed once more.
SOURCE = r"""
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {
constexpr int64_t LANES = 32, MOST = 992;

float power_of_e(float x) {  // for x in [-87, 0]: 2^n e^r with |r| <= log(2) / 2
    const float n = float(int32_t(x * 1.442695041f - 0.5f));
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const float high = 1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720 + r * (1.0f / 5040)));
    const float value = 1 + r * (1 + r * (0.5f + r * (1.0f / 6 + r * high)));
    const int32_t bits = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof(scale));
    return value * scale;
}

float factor(float logit) {
    const float size = std::fabs(logit);
    return 1 + power_of_e(size < 87 ? -size : -87.0f);
}

float linear(float logit, float x) { return (logit > 0 ? x - 1 : x) * logit; }

double sum_of_part(const float* __restrict__ logits, const float* __restrict__ x, int64_t n) {
    float sums[LANES], products[LANES];
    for (int64_t j = 0; j < LANES; ++j) {
        sums[j] = 0;
        products[j] = 1;
    }
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int64_t j = 0; j < LANES; ++j) {
            sums[j] += linear(logits[i + j], x[i + j]);
            products[j] *= factor(logits[i + j]);
        }
    double sum = 0, product = 1;
    for (int64_t j = 0; j < LANES; ++j) {
        sum += sums[j];
        product *= products[j];
    }
    for (; i < n; ++i) {
        sum += linear(logits[i], x[i]);
        product *= factor(logits[i]);
    }
    return sum - std::log(product);
}

double log_prob(double logit, double x) {
    if (x != 0 && x != 1) return x * logit - std::fmax(logit, 0.0) - std::log1p(std::exp(-std::fabs(logit)));
    const double of_other = x == 1 ? -logit : logit;  // no product of zero and infinity
    return of_other > 0 ? -of_other - std::log1p(std::exp(-of_other)) : -std::log1p(std::exp(of_other));
}
}  // namespace

extern "C" void sum_log_probs(
    int threads, const float* logits, const float* x, float* out, int64_t rows, int64_t rows_of_x, int64_t n
) {
    _Pragma("omp parallel for num_threads(threads) if(threads > 1)")
    for (int64_t row = 0; row < rows; ++row) {
        const float *l = logits + row * n, *v = x + row % rows_of_x * n;
        double sum = 0;
        for (int64_t i = 0; i < n; i += MOST) sum += sum_of_part(l + i, v + i, n - i < MOST ? n - i : MOST);
        if (!std::isfinite(sum)) {
            sum = 0;
            for (int64_t i = 0; i < n; ++i) sum += log_prob(l[i], v[i]);
        }
        out[row] = float(sum);
    }
}
"""
MIN_BITS = 64  # of an event; fewer are left to torch


@functools.cache
def keep_library() -> None:
    """Compiles the function and keeps it for later processes, in half a second; done once on a machine."""
    if kept_library(SOURCE, VECTORIZED) is None:
        load_library(SOURCE, "log-likelihoods of bits are computed by torch's kernels", VECTORIZED, keep=True)


@functools.cache
def _library() -> Any:
    """The function that was kept before its first use in this process, so that equal calls give equal numbers."""
    return kept_library(SOURCE, VECTORIZED)


def bernoulli_log_prob(fn: Any, x: Tensor) -> Tensor | None:
    """log p(x), [*batch], of `Bernoulli(logits=...).to_event(n)` in float32 on the CPU, where no gradient is asked for.

    None where something else is given, or where the compiled function was not kept on this machine. It reads memory
    once, where `fn.log_prob(x)` reads and writes it several times, and adds up in float64.

    >>> logits, x = torch.linspace(-9, 9, 100).expand(2, 100), torch.ones(2, 100)
    >>> fn = dist.Bernoulli(logits=logits.contiguous(), validate_args=False).to_event(1)
    >>> found = bernoulli_log_prob(fn, x)
    >>> found is None or bool(torch.allclose(found, fn.log_prob(x)))
    True
    """
    if type(fn) is not dist.Independent:
        return None
    base, kind = fn.base_dist, type(fn.base_dist)
    logits = vars(base).get("logits")
    if vars(kind).get("same_density_as", kind) is not dist.Bernoulli or not isinstance(logits, Tensor):
        return None
    if fn._validate_args or base._validate_args or need_gradients([logits, x]) or not are_plain([logits, x]):
        return None
    n, shape = math.prod(fn.event_shape), x.shape[next((i for i, size in enumerate(x.shape) if size != 1), 0) :]
    is_broadcast_over_rows = x.numel() >= n and logits.shape[logits.dim() - len(shape) :] == shape
    if n < MIN_BITS or not is_broadcast_over_rows or not (logits.is_contiguous() and x.is_contiguous()):
        return None
    if (library := _library()) is None:
        return None
    out = torch.empty(fn.batch_shape, dtype=torch.float32, device="cpu")
    addresses = [ctypes.c_void_p(t.data_ptr()) for t in (logits, x, out)]
    counts = [ctypes.c_int64(count) for count in (out.numel(), x.numel() // n, n)]
    library.sum_log_probs(torch.get_num_threads(), *addresses, *counts)
    return out
