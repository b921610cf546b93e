"""Estimating log p(x), and knowing how far to trust the estimate."""

from ppvae.evaluation.annealing.ais import annealed
from ppvae.evaluation.annealing.bdmc import Bracket, bdmc
from ppvae.evaluation.calibration import Calibration, calibration
from ppvae.evaluation.compare import Comparison, compare, looseness
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.importance.log_marginal import log_marginal
from ppvae.evaluation.imputation import Imputations, impute
from ppvae.evaluation.local.gaps import Gaps, gaps
from ppvae.evaluation.quadrature import Quadrature, quadrature
from ppvae.evaluation.representation import Representation, representation
from ppvae.evaluation.results import load_estimate
from ppvae.evaluation.topics import coherence, perplexity

__all__ = [
    "Bracket", "Calibration", "Comparison", "Estimate", "Gaps", "Imputations", "Quadrature", "Representation",
    "annealed", "bdmc", "calibration", "coherence", "compare", "gaps", "impute", "load_estimate", "log_marginal",
    "looseness", "perplexity", "quadrature", "representation",
]  # fmt: skip
