"""Estimating log p(x), and knowing how far to trust the estimate."""

from ppvae.evaluation.annealing import annealed
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.marginal import log_marginal

__all__ = ["Estimate", "annealed", "log_marginal"]
