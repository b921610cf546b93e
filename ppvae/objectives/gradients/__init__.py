"""Gradient estimators: how the gradient of a bound is estimated, for any objective, without a change of its value.

This module resolves the names that `gradient=` takes; the estimators are listed in `GRADIENTS`.
"""

from collections.abc import Callable, Mapping

from ppvae.compilation.side_effects import learning_step
from ppvae.errors import UsageError
from ppvae.objectives.gradients.ancestor_score import AncestorScore
from ppvae.objectives.gradients.covariance import Covariance
from ppvae.objectives.gradients.discrete.arms import ARMS, disarm
from ppvae.objectives.gradients.discrete.double_cv import DoubleCV
from ppvae.objectives.gradients.discrete.enumerated import Enumerated
from ppvae.objectives.gradients.discrete.per_site import PerSite
from ppvae.objectives.gradients.discrete.rebar import REBAR, relax
from ppvae.objectives.gradients.discrete.sites import SiteEstimator
from ppvae.objectives.gradients.discrete.straight_through import StraightThrough
from ppvae.objectives.gradients.discrete.unordered_set import UnorderedSet
from ppvae.objectives.gradients.discrete.vargrad import VarGrad
from ppvae.objectives.gradients.dreg import DReG
from ppvae.objectives.gradients.estimator import GradientEstimator
from ppvae.objectives.gradients.gdreg import GDReG
from ppvae.objectives.gradients.pathwise import STL, Pathwise
from ppvae.objectives.gradients.score_function import ScoreFunction, vimco

__all__ = [
    "ARMS", "GRADIENTS", "REBAR", "STL", "AncestorScore", "Covariance", "DReG", "DoubleCV", "Enumerated", "GDReG",
    "Gradient", "GradientEstimator", "Pathwise", "PerSite", "ScoreFunction", "SiteEstimator", "StraightThrough",
    "UnorderedSet", "VarGrad", "disarm", "learning_step", "relax", "resolve_gradient", "vimco",
]  # fmt: skip

GRADIENTS: dict[str, Callable[[], GradientEstimator]] = {
    "pathwise": Pathwise,
    "stl": STL,
    "dreg": DReG,
    "gdreg": GDReG,
    "score": ScoreFunction,
    "vimco": vimco,
    "covariance": Covariance,
    "vargrad": VarGrad,
    "disarm": disarm,
    "arms": ARMS,
    "double_cv": DoubleCV,
    "rebar": REBAR,
    "relax": relax,
    "unordered_set": UnorderedSet,
    "straight_through": StraightThrough,
    "enumerated": Enumerated,
    "ancestor_score": AncestorScore,
}


Gradient = str | GradientEstimator | Mapping[str, str | GradientEstimator]  # by name, as an object, or by site


def resolve_gradient(gradient: Gradient) -> GradientEstimator:
    """The estimator of a name, or of names by site; an estimator is returned as it is.

    Raises UsageError for an unknown name.
    """
    if isinstance(gradient, GradientEstimator):
        return gradient
    if isinstance(gradient, Mapping):
        if nested := next((site for site, one in gradient.items() if isinstance(one, Mapping)), None):
            raise UsageError(f"gradient: expected an estimator for site {nested!r}, found a dict of its own")
        return PerSite({site: resolve_gradient(one) for site, one in gradient.items()})
    if isinstance(gradient, type) and issubclass(gradient, GradientEstimator):
        raise UsageError(f"gradient: expected an object, found the class {gradient.__name__}: call it")
    if not isinstance(gradient, str) or gradient not in GRADIENTS:
        raise UsageError(
            f"gradient: expected one of {', '.join(GRADIENTS)}, a GradientEstimator, or a dict of them by site; found "
            f"{gradient!r}" + (". ARMS takes categorical sites as well" if gradient == "CARMS" else "")
        )
    return GRADIENTS[gradient]()
