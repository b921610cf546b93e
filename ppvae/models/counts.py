"""Counts of single cells, or of other things that were counted in batches and to different depths."""

from __future__ import annotations

from typing import final

import pyro
import torch
from torch import Tensor, nn

from ppvae.errors import DataError, UsageError
from ppvae.models.composed import Composed, checked_counts
from ppvae.nn import ConcatContext, Labels
from ppvae.priors import ConditionalNormal


@final
class CountVAE(Composed):
    """p(x | s, l) = int p(z) p(x | z, s, l) dz with guide q(z | x, s), for counts x of batch s with library size l.

    The batch is put as a one-hot vector beside z, and beside log(1 + x) for the guide, so that z need not carry it. The
    library size is data, or a latent: p(x | s) = int p(z) p(log l | s) p(x | z, s, l) dz dl. Data are (x [batch,
    features], s [batch], l [batch]), or (x, s) where l is a latent. Sites "z", "log_library" [1], and "x".

    A library size that is data must be known without x, as sequencing depth is; a row's own sum is not
    (see `likelihoods.Poisson`), and then the latent one is right.

    Args:
        prior: p(z).
        likelihood: p(x | z, s, l), a part of counts with library=True whose network takes [..., latent + batches]:
            `likelihoods.ZeroInflatedNegativeBinomial(net, concentration=(features,), library=True)`.
        posterior: q(z | x, s), a part whose network takes [..., features + batches].
        batches: how many there are.
        library: p(log l | s), a part of one dim that takes s as `context`, as `CountVAE.library_of` makes it.
        library_posterior: q(log l | x, s), a part whose network takes [..., features + batches].

    Raises DataError, by its row, for a batch outside, a row without counts, and what is no count; UsageError for data
    without library sizes where they are no latent; ValueError for one part of the library alone.
    Source: Lopez et al. 2018, Deep generative modeling for single-cell transcriptomics (scVI).

    >>> from ppvae import likelihoods, nn, posteriors, priors
    >>> genes, batches = 100, 2
    >>> pair = CountVAE(
    ...     prior=priors.StandardNormal(8),
    ...     likelihood=likelihoods.NegativeBinomial(nn.mlp(8 + batches, genes), concentration=(genes,), library=True),
    ...     posterior=posteriors.DiagonalNormal(nn.mlp(genes + batches, 2 * 8)),
    ...     batches=batches,
    ... )
    >>> pair.guide(torch.ones(5, genes), torch.tensor([0, 1, 1, 0, 1])).shape
    torch.Size([5, 8])
    """

    def __init__(
        self,
        prior: nn.Module,
        likelihood: nn.Module,
        posterior: nn.Module,
        batches: int,
        library: nn.Module | None = None,
        library_posterior: nn.Module | None = None,
    ):
        super().__init__("count_vae")
        if (library is None) != (library_posterior is None):
            raise ValueError("library, library_posterior: expected both of them or neither, found one")
        self.prior, self.likelihood, self.posterior = prior, likelihood, posterior
        self.library, self.library_posterior = library, library_posterior
        self.beside = ConcatContext(nn.Identity(), Labels(batches))

    def model(self, x: Tensor, batch: Tensor, library: Tensor | None = None) -> Tensor:
        """p(z, x | s, l), or p(z, l, x | s)."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self._call("prior"))
            if library is None:
                if self.library is None:
                    raise UsageError(
                        "library: expected data (x, batch, library), or a latent one: pass library and "
                        "library_posterior; found (x, batch)"
                    )
                library = pyro.sample("log_library", self._call("library", context=batch)).squeeze(-1).exp()
            return pyro.sample("x", self._call("likelihood", self.beside(z, context=batch), context=library), obs=x)

    def guide(self, x: Tensor, batch: Tensor, library: Tensor | None = None) -> Tensor:
        """q(z | x, s), and q(l | x, s) where l is a latent."""
        seen = self.beside(checked_counts(x).log1p(), context=batch)
        with pyro.plate("data", len(x)):
            if library is None and self.library_posterior is not None:
                pyro.sample("log_library", self._call("library_posterior", seen))
            return pyro.sample("z", self._call("posterior", seen))

    @staticmethod
    def library_of(x: Tensor, batch: Tensor) -> ConditionalNormal:
        """p(log l | s) that starts at mean and scale of the logarithms of the sums of the rows of each batch.

        Raises DataError for a batch without rows, and for what is no count.

        >>> prior = CountVAE.library_of(torch.full((4, 5), 20.0), torch.tensor([0, 0, 1, 1]))
        >>> round(prior(context=torch.tensor([1])).mean.exp().item(), 2)
        100.0
        """
        log_total = checked_counts(x).sum(-1).log()
        prior = ConditionalNormal.of_labels(int(batch.max()) + 1, latent=1)
        with torch.no_grad():
            for s, row in enumerate(prior.net.weight):  # type: ignore[arg-type]
                own = log_total[batch == s]
                if not len(own):
                    last = int(batch.max())
                    raise DataError(f"batch: expected rows of each batch 0 to {last}, found none of batch {s}")
                row.copy_(torch.stack([own.mean(), own.std(correction=0).clamp(min=1e-2).log()]))
        return prior
