"""Evaluation of a trained pair: log p(x) with a diagnosis of its reliability, and the quality of guide and latents.

`evidence` holds what reports log p(x) (`log_marginal`, `bracket`, `interval`), `global_latents` what is given latents
that all data share (predictive densities, cross-validation), `predictive` predictive checks, `importance` importance
sampling, `proposals` the densities it may draw from, `annealing` AIS and BDMC, `local` guides fitted to one datum,
`gradient_audit` the comparison of gradient estimators. The
other modules are an evaluation each, results and their files (`estimate`, `results`, `arviz`), and `blocks`, the
scaffold of all evaluations. A new one is a function of one block of data, `run_blocks`, and a result:

    with start_evaluation(model, guide, data, seed=seed) as run:  # checks the data, inspects the pair once
        def compute(block):  # named tensors [N, ...]; the noise of block.weights is a function of seed and block
            errors = [squared_error(t) for _, _, t in block.weights(run.model, run.guide, num_particles, seed, rows)]
            return {"error": torch.cat(errors).mean(0)}
        found = run_blocks(run, compute, settings, desc="reconstruction error", directory=directory)

The result depends neither on `rows` nor on the number of processes, and a call with a directory resumes from the blocks
in it; `settings` names everything else that it is a function of. tests/evaluation/test_recipe.py runs this.
"""

from ppvae.evaluation.annealing.ais import annealed
from ppvae.evaluation.annealing.bdmc import Bracket, bdmc
from ppvae.evaluation.calibration import Calibration, calibration
from ppvae.evaluation.compare import Comparison, compare, looseness
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.evidence.bracket import ProposalBracket, bracket
from ppvae.evaluation.evidence.interval import Interval, interval
from ppvae.evaluation.evidence.log_marginal import log_marginal
from ppvae.evaluation.evidence.refined import refined_log_marginal
from ppvae.evaluation.global_latents.cross_validation import kfold, loo, waic
from ppvae.evaluation.global_latents.elpd import PredictiveAccuracy
from ppvae.evaluation.gradient_audit.audit import gradients
from ppvae.evaluation.gradient_audit.result import GradientAudit
from ppvae.evaluation.imputation import Imputations, impute
from ppvae.evaluation.local.gaps import Gaps, gaps
from ppvae.evaluation.predictive.check import predictive_check
from ppvae.evaluation.predictive.result import PredictiveCheck
from ppvae.evaluation.quadrature import Quadrature, quadrature
from ppvae.evaluation.representation import Representation, representation
from ppvae.evaluation.results import load_estimate
from ppvae.evaluation.topics import coherence, perplexity

__all__ = [
    "Bracket", "Calibration", "Comparison", "Estimate", "Gaps", "GradientAudit", "Imputations", "Interval",
    "PredictiveAccuracy", "PredictiveCheck", "ProposalBracket", "Quadrature", "Representation", "annealed", "bdmc",
    "bracket", "calibration", "coherence", "compare", "gaps", "gradients", "impute", "interval", "kfold",
    "load_estimate", "log_marginal", "loo", "looseness", "perplexity", "predictive_check", "quadrature",
    "refined_log_marginal", "representation", "waic",
]  # fmt: skip
