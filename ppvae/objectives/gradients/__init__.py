"""Gradient estimators: how the gradient of a bound is estimated, for any objective, without a change of its value.

This module resolves the names that `gradient=` takes; the estimators are listed in `GRADIENTS`.
"""

from collections.abc import Callable

from ppvae.errors import UsageError
from ppvae.objectives.gradients.covariance import Covariance
from ppvae.objectives.gradients.dreg import DReG
from ppvae.objectives.gradients.estimator import GradientEstimator
from ppvae.objectives.gradients.gdreg import GDReG
from ppvae.objectives.gradients.pathwise import STL, Pathwise
from ppvae.objectives.gradients.score_function import ScoreFunction, vimco

__all__ = [
    "GRADIENTS", "STL", "Covariance", "DReG", "GDReG", "GradientEstimator", "Pathwise", "ScoreFunction",
    "resolve_gradient", "vimco",
]  # fmt: skip

GRADIENTS: dict[str, Callable[[], GradientEstimator]] = {
    "pathwise": Pathwise,
    "stl": STL,
    "dreg": DReG,
    "gdreg": GDReG,
    "score": ScoreFunction,
    "vimco": vimco,
    "covariance": Covariance,
}


def resolve_gradient(gradient: str | GradientEstimator) -> GradientEstimator:
    """The estimator of a name; an estimator is returned as it is. Raises UsageError for an unknown name."""
    if isinstance(gradient, GradientEstimator):
        return gradient
    if gradient not in GRADIENTS:
        raise UsageError(f"gradient: expected one of {', '.join(GRADIENTS)}; found {gradient!r}")
    return GRADIENTS[gradient]()
