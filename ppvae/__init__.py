"""Deep latent-variable models as probabilistic programs: define a pair, train it with SVI, estimate log p(x)."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_functions = {
    "VAE": "ppvae.models",
    "check": "ppvae.training",
    "fit": "ppvae.training",
    "load": "ppvae.training",
    "log_marginal": "ppvae.evaluation",
    "terms": "ppvae.inference",
}
_modules = {
    "data", "distributions", "evaluation", "generate", "inference", "likelihoods", "models", "nn", "objectives",
    "plots", "posteriors", "priors", "report", "training",
}  # fmt: skip
__all__ = sorted([*_functions, *_modules])

if TYPE_CHECKING:
    from ppvae.evaluation import log_marginal as log_marginal
    from ppvae.inference import terms as terms
    from ppvae.models import VAE as VAE
    from ppvae.training.fit import fit as fit
    from ppvae.training.inspection import check as check
    from ppvae.training.run import load as load


def __getattr__(name: str) -> Any:
    """Loads parts on first use: `ppvae --help` must not wait for torch."""
    if name in _functions:
        return getattr(importlib.import_module(_functions[name]), name)
    if name in _modules:
        return importlib.import_module(f"ppvae.{name}")
    raise AttributeError(f"module 'ppvae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
