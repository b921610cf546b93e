"""Times training steps and log p(x) of ppvae beside hand-written PyTorch, Pyro, NumPyro and Pythae, in one run.

`python -m experiments.bench` (or `make bench`) gives each of them a process of its own, as its users do, so that none
works with the memory and threads that another has set up; takes rounds of them in turn, a row of the table after the
other; prints medians and ratios with the machine and the thread count; and writes JSON and a picture of cost against
batch, particles and latent size. "Hand-written, warm" is the hand-written one in a process that ppvae has prepared as
it does for itself (`inference/warm.py`). NumPyro and Pythae are timed where they are installed (`pip install -e
".[bench]"`).

The network is 784-200-200-(50)-200-200-784 with tanh, batch 100, Adam; the hierarchy has a second layer of
latents, 50-100-100-(25), and the convolutional one three layers of kernels each way. A "step" is one of Adam on loss
and"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Timed = Callable[[], float]  # a round: seconds per step, or microseconds per (datum, particle)


@dataclass(frozen=True)
class Settings:
    """What is timed."""

    rounds: int = 7
    batch: int = 100
    steps: int = 100  # of a round, fewer by the number of particles
    iwae: int = 50
    num_eval: int = 100  # data of log p(x)
    particles: int = 5000
    latent: int = 50
    hidden: tuple[int, ...] = (200, 200)

    def steps_of(self, particles: int) -> int:
        """Steps of a round, so that rounds take about as long."""
        return min(self.steps, max(10, self.steps // particles))


SMOKE = Settings(rounds=1, steps=2, batch=20, iwae=5, num_eval=50, particles=100, hidden=(16,), latent=4)


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
