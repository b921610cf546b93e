"""The bound of a particle filter on log p(x) of a sequence."""

from typing import Any, final

import torch
from torch import Tensor

from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers
from ppvae.inference.sequences.particle_filter import FilterResult, find_windows, particle_filter
from ppvae.inference.sequences.resampling import multinomial_ancestors
from ppvae.inference.sequences.steps import require_sequence
from ppvae.inference.structure import Structure
from ppvae.objectives.gradients import AncestorScore, Gradient, Pathwise
from ppvae.objectives.objective import Objective
from ppvae.objectives.protocol import PairCall
from ppvae.objectives.reductions import log_mean_exp


@final
class FIVO(Objective):
    """The filtering bound, E[log Z], Z the estimate of p(x) by a particle filter over the steps of a sequence.

    Z = prod_t (1/K) sum_k w_tk between resampling steps, multinomial ones, at the steps whose ess is under resample K.
    The latents are sites z_1 .. z_T with observed sites between them, or a chain as `models.DeepMarkovModel` has. With
    resample = 1 it is the objective of AESMC and VSMC; with resample = 0, or a pair of one step, the IWAE bound. Where
    resampling helps it lies between the IWAE bound and log p(x). A step of training runs the pair 1 + R times, R the
    largest number of resampling steps of a sequence of the batch, and is not compiled. Autograd holds the activations
    of all runs: of a chain, or where a step reads all earlier latents, (1 + R) T K steps for each datum; of T > 16
    latents in sites of their own, of which a step reads a few, windows of at most 16 K steps for each run.

    Args:
        num_particles: K, draws per datum at each step.
        resample: the share of effective particles under which a sequence is resampled.
        gradient: "pathwise", through the particles alone, biased where a sequence is resampled: the usual choice; or
            "ancestor_score", which adds the resampling term (sum over resampling steps of d log P(ancestors) times what
            log Z gains after them), unbiased for resample = 1 or 0 and of larger variance. Between, both leave out that
            the resampling steps depend on the parameters.

    Raises:
        ContractError: an enumerated site, latents shared by all data, a latent without a reparameterised draw, or a
            weight of a step that depends on later latents.

    Source: Maddison et al. 2017 (arXiv 1705.09279); Le et al. 2018 (arXiv 1705.10306) for AESMC; Naesseth et al. 2018
    (arXiv 1705.11140) for VSMC.

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.zeros(4, 3)
    >>> bool(abs(FIVO(5).loss(pair.model, pair.guide, x) + pair.log_px(x).sum()) < 1e-4)
    True
    """

    def __init__(self, num_particles: int = 16, resample: float = 0.5, gradient: Gradient = "pathwise"):
        check_numbers(num_particles=num_particles, resample=resample)
        self.resample = resample
        super().__init__(num_particles, gradient)

    def check_estimator(self) -> None:
        super().check_estimator()
        if not isinstance(self.gradient, Pathwise | AncestorScore):
            raise UsageError(
                f"FIVO: expected gradient 'pathwise' or 'ancestor_score', found {type(self.gradient).__name__}"
            )

    def check_structure(self, s: Structure) -> None:
        require_sequence(s, "FIVO")
        super().check_structure(s)

    @property
    def capture_refusal(self) -> str:
        return "the number of its runs of the pair depends on the draws"

    def reduce(self, log_weight: Tensor) -> Tensor:
        """The bound of a sequence that is not resampled."""
        return log_mean_exp(log_weight)

    def value(self, call: PairCall) -> Tensor:
        return self.filter(call).log_px.sum()

    def surrogate(self, call: PairCall) -> Tensor:
        return self.gradient.surrogate(self, call) if isinstance(self.gradient, AncestorScore) else self.value(call)

    def filter(self, call: PairCall) -> FilterResult:
        """The particle filter of one batch, with multinomial ancestors."""
        s, index = call.structure, None
        if s.draws_subsample:
            index = torch.randperm(s.full_size, device=call.batch[0].device)[: s.subsample_size]
        pair: Any = {"model": call.model, "guide": call.guide, "batch": call.batch, "structure": s, "index": index}
        return particle_filter(
            **pair, num_particles=call.num_particles, threshold=self.resample, ancestors=multinomial_ancestors,
            dependence=find_windows(**pair),
        )  # fmt: skip
