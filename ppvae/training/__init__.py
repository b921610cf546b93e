"""Training of model/guide pairs with SVI: the loop, validation, checkpoints, run folders.

`fit` trains a pair and returns a `Run`; `load` reads a run folder back. One module a subject: `trainer` is the loop
over epochs, `step` one optimizer step, `validation` the ELBO of held-out data, `checkpoint` the saved state.
"""

from ppvae.training.fit import fit
from ppvae.training.run import Run, load

__all__ = ["Run", "fit", "load"]
