"""Large draws of a graph, from the stream of torch's generator and several times as fast."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ppvae.compilation.cpp_library import VECTORIZED, load_library

aten = torch.ops.aten
MIN_NUMBERS = 2**14  # of one draw; below, reading and writing the state takes as long as is gained

# The generator's bytes: seed u64, left i32, seeded i32, next u64, words u64[624], and a normal kept for later.
# torch advances its Mersenne twister one number at a time; here all words at once, in vectors. The uniforms are equal
# to the bit, the normals up to rounding: of 16 uniforms, the first 8 give radii and the last 8 angles.
SOURCE = r"""
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {
constexpr int WORDS = 624, SHIFT = 397, BLOCK = 16;

uint32_t twist(uint32_t high, uint32_t low) {
    return (((high & 0x80000000u) | (low & 0x7fffffffu)) >> 1) ^ ((0u - (low & 1u)) & 0x9908b0dfu);
}

void renew(uint32_t* s) {
    for (int i = 0; i < WORDS - SHIFT; ++i) s[i] = s[i + SHIFT] ^ twist(s[i], s[i + 1]);
    for (int i = WORDS - SHIFT; i < WORDS - 1; ++i) s[i] = s[i + SHIFT - WORDS] ^ twist(s[i], s[i + 1]);
    s[WORDS - 1] = s[SHIFT - 1] ^ twist(s[WORDS - 1], s[0]);
}

float uniform(uint32_t y) {
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    y ^= y >> 18;
    return float(int32_t(y & 0xffffff)) * (1.0f / (1 << 24));
}

class Twister {
  public:
    explicit Twister(unsigned char* bytes) : bytes_(bytes) {
        std::memcpy(&left_, bytes + 8, sizeof(left_));
        std::memcpy(&next_, bytes + 16, sizeof(next_));
        for (int i = 0; i < WORDS; ++i) std::memcpy(&words_[i], bytes + 24 + 8 * i, sizeof(uint32_t));
    }

    ~Twister() {
        std::memcpy(bytes_ + 8, &left_, sizeof(left_));
        std::memcpy(bytes_ + 16, &next_, sizeof(next_));
        for (int i = 0; i < WORDS; ++i) {
            const uint64_t word = words_[i];
            std::memcpy(bytes_ + 24 + 8 * i, &word, sizeof(word));
        }
    }

    void fill(float* out, int64_t n) {
        while (n > 0) {
            if (left_ == 1) {  // one more than there are left
                renew(words_);
                left_ = WORDS + 1;
                next_ = 0;
            }
            const int64_t count = left_ - 1 < n ? left_ - 1 : n;
            for (int64_t i = 0; i < count; ++i) out[i] = uniform(words_[next_ + i]);
            left_ -= int32_t(count);
            next_ += uint64_t(count);
            out += count;
            n -= count;
        }
    }

  private:
    unsigned char* bytes_;
    int32_t left_;
    uint64_t next_;
    uint32_t words_[WORDS];
};

// log x for x in [2^-24, 1]: x = 2^e m with m in [sqrt(1/2), sqrt(2)), log m = 2 artanh((m - 1) / (m + 1)).
float logarithm(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const int32_t e = (bits - 0x3f3504f3) >> 23;
    bits -= e << 23;
    float m;
    std::memcpy(&m, &bits, sizeof(m));
    const float s = (m - 1) / (m + 1), t = s * s;
    const float tail = t * (1.0f / 3 + t * (1.0f / 5 + t * (1.0f / 7 + t * (1.0f / 9))));
    return float(e) * 0.693147182f + 2 * (s + s * tail);
}

void box_muller(float* __restrict__ d) {
    for (int j = 0; j < BLOCK / 2; ++j) {
        const float radius = std::sqrt(-2 * logarithm(1 - d[j])), angle = 6.2831855f * d[j + BLOCK / 2];
        const int32_t quarter = int32_t(angle * 0.636619747f + 0.5f);
        const float q = float(quarter);  // pi / 2 in three parts, of which products with 0 to 4 are exact
        const float r = ((angle - q * 1.5703125f) - q * 4.837512969970703e-4f) - q * 7.549789948768648e-8f, t = r * r;
        const float sine = r + r * t * (-1.0f / 6 + t * (1.0f / 120 + t * (-1.0f / 5040 + t * (1.0f / 362880))));
        const float cosine =
            1 + t * (-0.5f + t * (1.0f / 24 + t * (-1.0f / 720 + t * (1.0f / 40320 + t * (-1.0f / 3628800)))));
        const bool odd = quarter & 1;
        const float x = odd ? sine : cosine, y = odd ? cosine : sine;
        d[j] = radius * ((quarter + 1) & 2 ? -x : x);
        d[j + BLOCK / 2] = radius * (quarter & 2 ? -y : y);
    }
}
}  // namespace

extern "C" void fill_uniform(int threads, unsigned char* state, float* out, int64_t n) { Twister(state).fill(out, n); }

extern "C" void fill_normal(int threads, unsigned char* state, float* out, int64_t n) {
    Twister twister(state);
    twister.fill(out, n);
    _Pragma("omp parallel for num_threads(threads) if(threads > 1)")
    for (int64_t i = 0; i < n / BLOCK; ++i) box_muller(out + BLOCK * i);
    if (n % BLOCK) {  // the last numbers, drawn anew
        twister.fill(out + n - BLOCK, BLOCK);
        box_muller(out + n - BLOCK);
    }
}
"""


@functools.cache
def _library() -> Any:
    """The functions of `SOURCE`, compiled once by inductor's compiler; None where that fails, which the log says."""
    return load_library(SOURCE, "noise is drawn by torch's kernels", VECTORIZED)


def with_fast_draws(noise: fx.GraphModule) -> fx.GraphModule:
    """The same graph with large float32 uniform and standard normal draws on the CPU by `fast_uniform`, `fast_normal`.

    It is changed in place. Draws of other types, layouts and devices stay.
    """
    for node in list(noise.graph.nodes):
        fast, value = _FAST.get(node.target), node.meta.get("val")
        is_large = isinstance(value, Tensor) and value.numel() >= MIN_NUMBERS
        if fast is None or not is_large or not _is_standard(node) or _library() is None:
            continue
        with noise.graph.inserting_before(node):
            new = noise.graph.call_function(fast, (list(value.shape),))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        noise.graph.erase_node(node)
        for memory in node.all_input_nodes:
            if not memory.users:
                noise.graph.erase_node(memory)
    noise.recompile()
    return noise


def _is_standard(node: fx.Node) -> bool:
    """Whether a draw is of contiguous float32 on the CPU, from the default generator, with mean 0 and scale 1."""
    value, scaled = node.meta["val"], node.target is aten.normal_.default and node.args[1:] not in ((), (0.0, 1.0))
    plain = value.dtype == torch.float32 and value.device.type == "cpu" and value.is_contiguous()
    return plain and not scaled and node.kwargs.get("generator") is None


def fast_uniform(shape: Sequence[int]) -> Tensor:
    """`torch.rand(shape)` in float32 on the CPU: the same values to the bit, and the same state afterwards.

    >>> from ppvae.rng import fork_rng
    >>> with fork_rng():
    ...     expected = torch.rand(100)
    >>> with fork_rng():
    ...     fast_uniform([100]).equal(expected)
    True
    """
    return _fill(_library().fill_uniform, torch.empty(shape, dtype=torch.float32, device="cpu"))


def fast_normal(shape: Sequence[int]) -> Tensor:
    """`torch.randn(shape)` of 16 numbers or more in float32 on the CPU: the same values up to rounding, the same state.

    >>> from ppvae.rng import fork_rng
    >>> with fork_rng():
    ...     expected = torch.randn(100)
    >>> with fork_rng():
    ...     bool(((fast_normal([100]) - expected).abs() < 1e-6).all())
    True
    """
    return _fill(_library().fill_normal, torch.empty(shape, dtype=torch.float32, device="cpu"))


def _fill(kernel: Callable[..., None], out: Tensor) -> Tensor:
    state = torch.default_generator.get_state()
    addresses = [ctypes.c_void_p(t.data_ptr()) for t in (state, out)]
    kernel(torch.get_num_threads(), *addresses, ctypes.c_int64(out.numel()))
    torch.default_generator.set_state(state)
    return out


_FAST: dict[Any, Callable[[Sequence[int]], Tensor]] = {
    aten.normal_.default: fast_normal,
    aten.randn.default: fast_normal,
    aten.rand.default: fast_uniform,
}
