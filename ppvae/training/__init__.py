"""Training pairs with SVI, and keeping what was trained."""

from ppvae.training.fit import fit
from ppvae.training.run import Run, load

__all__ = ["Run", "fit", "load"]
