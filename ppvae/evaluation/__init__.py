"""Estimating log p(x), and knowing how far to trust the estimate."""

from ppvae.evaluation.annealing import annealed
from ppvae.evaluation.bidirectional import Bracket, bdmc
from ppvae.evaluation.calibration import Calibration, calibration
from ppvae.evaluation.comparing import Comparison, compare
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.exact import Quadrature, quadrature
from ppvae.evaluation.gaps import Gaps, gaps
from ppvae.evaluation.imputation import Imputations, impute
from ppvae.evaluation.loading import load_estimate
from ppvae.evaluation.marginal import log_marginal
from ppvae.evaluation.representation import Representation, representation
from ppvae.evaluation.tightness import looseness
from ppvae.evaluation.topics import coherence, perplexity

__all__ = [
    "Bracket", "Calibration", "Comparison", "Estimate", "Gaps", "Imputations", "Quadrature", "Representation",
    "annealed", "bdmc", "calibration", "coherence", "compare", "gaps", "impute", "load_estimate", "log_marginal",
    "looseness", "perplexity", "quadrature", "representation",
]  # fmt: skip
