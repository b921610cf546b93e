"""What a process does once, so that the runs of a pair that follow are fast."""

from __future__ import annotations

import functools

import torch

from ppvae.compilation.runtime import keep_freed


@functools.cache
def warm_up() -> None:
    """Has freed memory kept, and torch's vectorised log1p set up: the same numbers as ever, sooner.

    On some processors (AVX-512 of a Zen 4, torch 2.14) log1p, and softplus and cross-entropy with it, take up to ten
    times as long until lgamma, or a kernel of inductor's, has run once in the process.
    """
    keep_freed()
    torch.lgamma(torch.ones(1, device="cpu"))
