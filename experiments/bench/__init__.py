"""Times training steps and log p(x) of ppvae beside hand-written PyTorch, Pyro, NumPyro and Pythae, in one run.

`python -m experiments.bench` (or `make bench`) runs each contender in a process of its own, so that none uses memory or
threads that another has set up; it runs rounds of the contenders in turn, one row of the table after the other; prints
medians and ratios with the machine and the number of threads; and writes JSON and a figure of cost by batch size,
particles and latent size. NumPyro and Pythae are timed if they are installed (`pip install -e ".[bench]"`).

Contenders are in the strongest form that their users would write: hand-written steps and those under `torch.compile`
take the fused Adam, in a process prepared by `compilation.process_setup` as ppvae's own runs are, and flush subnormal
numbers to zero as ppvae's compiled steps and XLA do; NumPyro donates its buffers. `torch.compile(mode="max-autotune")`
gained nothing on a processor and is not used.

The network is 784-200-200-(50)-200-200-784 with tanh, batch 100, Adam; the hierarchy has a second layer of latents,
50-100-100-(25), and the convolutional one three layers of kernels each way. A "step" is loss, gradient and one update
of Adam.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Timed = Callable[[], float]  # runs one round; returns seconds per step, or microseconds per (datum, particle)


@dataclass(frozen=True)
class Settings:
    """Sizes of the networks, batches and rounds."""

    rounds: int = 7
    batch: int = 100
    steps: int = 100  # per round, divided by the number of particles
    iwae: int = 50
    num_eval: int = 100  # data of log p(x)
    particles: int = 5000
    latent: int = 50
    hidden: tuple[int, ...] = (200, 200)

    def steps_of(self, particles: int) -> int:
        """Steps per round, so that rounds take about the same time."""
        return min(self.steps, max(10, self.steps // particles))


SMOKE = Settings(rounds=1, steps=2, batch=20, iwae=5, num_eval=50, particles=100, hidden=(16,), latent=4)


def processor() -> str:
    """The processor's name, or the architecture where the system does not report a name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
