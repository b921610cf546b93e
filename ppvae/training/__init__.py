"""Training of model/guide pairs with SVI: the loop, validation, checkpoints, run folders.

`check` inspects a pair on data, `fit` trains it and returns a `Run`, `load` reads a run folder back. One module a
subject: `trainer` is the loop over epochs, `step` one optimizer step, `validation` the ELBO of held-out data,
`checkpoint` the saved state.
"""

from ppvae.training.fit import fit
from ppvae.training.inspection import check
from ppvae.training.run import Run, load

__all__ = ["Run", "check", "fit", "load"]
