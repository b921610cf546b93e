"""Estimating log p(x), and knowing how far to trust the estimate."""

from ppvae.evaluation.annealing import annealed
from ppvae.evaluation.bidirectional import Bracket, bdmc
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.exact import Quadrature, quadrature
from ppvae.evaluation.marginal import log_marginal

__all__ = ["Bracket", "Estimate", "Quadrature", "annealed", "bdmc", "log_marginal", "quadrature"]
