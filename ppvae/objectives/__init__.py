"""Objectives: reductions of a pair's `Terms` that Pyro's `SVI(..., loss=objective)` and `fit` both take.

They follow Pyro's convention: a loss is minus the bound, summed over the batch, times the data plate's scale. How the
gradient is estimated is a separate choice, `gradient=`, that never changes a value: see `ppvae.objectives.gradients`.
"""

from ppvae.objectives.aggregate_posterior import TCVAE, InfoVAE
from ppvae.objectives.bounds import CIWAE, IWAE, MIWAE, PIWAE, Renyi
from ppvae.objectives.elbo import ELBO, Capacity
from ppvae.objectives.objective import Objective
from ppvae.objectives.tvo import TVO
from ppvae.objectives.wake_sleep import ReweightedWakeSleep

__all__ = [
    "CIWAE", "ELBO", "IWAE", "MIWAE", "PIWAE", "TCVAE", "TVO", "Capacity", "InfoVAE", "Objective", "Renyi",
    "ReweightedWakeSleep",
]  # fmt: skip
