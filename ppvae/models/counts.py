"""Models of counts: single cells with batches and library sizes, and documents as bags of words."""

from typing import final

import pyro
import torch
from torch import Tensor, nn

from ppvae.errors import DataError, UsageError
from ppvae.errors.ranges import check_numbers
from ppvae.likelihoods import Multinomial
from ppvae.models.composed_model import ComposedModel
from ppvae.nn import ConcatContext, Labels
from ppvae.priors import ConditionalNormal


@final
class CountVAE(ComposedModel):
    """p(x | s, l) = int p(z) p(x | z, s, l) dz with guide q(z | x, s), for counts x of batch s with library size l.

    The batch is concatenated as a one-hot vector to z, and in the guide to log(1 + x), so that z need not encode it.
    The library size is data, or a latent: p(x | s) = int p(z) p(log l | s) p(x | z, s, l) dz dl. Data are (x [batch,
    features], s [batch], l [batch]), or (x, s) for a latent l. Sites "z", "log_library" [1], and "x".

    A library size that is data must be known without x, such as sequencing depth; the sum of the row is not (see
    `likelihoods.Poisson`): use a latent library size instead.

    Args:
        prior: p(z).
        likelihood: p(x | z, s, l), a part of counts with library=True whose network takes [..., latent + batches]:
            `likelihoods.ZeroInflatedNegativeBinomial(net, concentration=(features,), library=True)`.
        posterior: q(z | x, s), a part whose network takes [..., features + batches].
        batches: the number of batches.
        library: p(log l | s), a part of one dim that takes s as `context`, see `CountVAE.library_of`.
        library_posterior: q(log l | x, s), a part whose network takes [..., features + batches].

    Raises DataError, by its row, for a batch outside the range, a row without counts, and a value that is no count;
    UsageError for data without library sizes where they are not latent; ValueError for only one of the library parts.
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
        check_numbers(batches=batches)
        super().__init__("count_vae")
        if (library is None) != (library_posterior is None):
            raise UsageError("library, library_posterior: expected both of them or neither, found one")
        self.prior, self.likelihood, self.posterior = prior, likelihood, posterior
        self.library, self.library_posterior = library, library_posterior
        self.concat_batch = ConcatContext(nn.Identity(), Labels(batches))

    def model(self, x: Tensor, batch: Tensor, library: Tensor | None = None) -> Tensor:
        """p(z, x | s, l), or p(z, l, x | s)."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.call_part("prior"))
            if library is None:
                if self.library is None:
                    raise UsageError(
                        "library: expected data (x, batch, library), or a latent one: pass library and "
                        "library_posterior; found (x, batch)"
                    )
                library = pyro.sample("log_library", self.call_part("library", context=batch)).squeeze(-1).exp()
            return pyro.sample(
                "x", self.call_part("likelihood", self.concat_batch(z, context=batch), context=library), obs=x
            )

    def guide(self, x: Tensor, batch: Tensor, library: Tensor | None = None) -> Tensor:
        """q(z | x, s), and q(l | x, s) for a latent l."""
        features = self.concat_batch(validate_counts(x).log1p(), context=batch)
        with pyro.plate("data", len(x)):
            if library is None and self.library_posterior is not None:
                pyro.sample("log_library", self.call_part("library_posterior", features))
            return pyro.sample("z", self.call_part("posterior", features))

    @staticmethod
    def library_of(x: Tensor, batch: Tensor) -> ConditionalNormal:
        """p(log l | s) initialised at the mean and scale of the log row sums of each batch.

        Raises DataError for a batch without rows, and for a value that is no count.

        >>> prior = CountVAE.library_of(torch.full((4, 5), 20.0), torch.tensor([0, 0, 1, 1]))
        >>> round(prior(context=torch.tensor([1])).mean.exp().item(), 2)
        100.0
        """
        log_total = validate_counts(x).sum(-1).log()
        prior = ConditionalNormal.of_labels(int(batch.max()) + 1, latent=1)
        with torch.no_grad():
            for s, row in enumerate(prior.net.weight):  # type: ignore[arg-type]
                log_totals = log_total[batch == s]
                if not len(log_totals):
                    last = int(batch.max())
                    raise DataError(f"batch: expected rows of each batch 0 to {last}, found none of batch {s}")
                row.copy_(torch.stack([log_totals.mean(), log_totals.std(correction=0).clamp(min=1e-2).log()]))
        return prior


@final
class TopicModel(ComposedModel):
    """p(x | N) = int p(theta) Multinomial(x; N, softmax(topics(theta))) dtheta with guide q(theta | x).

    Data are counts of words x [batch, words]; the model is conditioned on the length N of each document: log p(x) means
    log p(x | N) of the bag, with the multinomial coefficient, which `evaluation.perplexity` removes. Sites "theta"
    [topics] and "x" [words].

    Args:
        prior: p(theta) over proportions: `priors.Dirichlet` (LDA) or `priors.LogisticNormal`.
        topics: a network from proportions [..., topics] to logits of words [..., words]: `nn.Topics` for a mixture of
            topics, or `torch.nn.Linear` for a product of experts (ProdLDA).
        posterior: q(theta | x): `posteriors.LogisticNormal` or `Dirichlet`.

    Raises DataError, by its row, for a document without words and for a value that is no count.
    Source: Blei et al. 2003, Latent Dirichlet allocation; Srivastava and Sutton 2017 (arXiv 1703.01488).

    >>> from ppvae import nn, posteriors, priors
    >>> pair = TopicModel(
    ...     prior=priors.LogisticNormal.like_dirichlet(5, 0.1),
    ...     topics=nn.Topics(5, 100),
    ...     posterior=posteriors.LogisticNormal(torch.nn.Sequential(nn.Log1p(), nn.mlp(100, 2 * 5))),
    ... )
    >>> pair.guide(torch.ones(4, 100)).shape, pair.words.shape
    (torch.Size([4, 5]), torch.Size([5, 100]))
    """

    def __init__(self, prior: nn.Module, topics: nn.Module, posterior: nn.Module):
        super().__init__("topic_model")
        self.prior, self.likelihood, self.posterior = prior, Multinomial(topics), posterior

    def model(self, x: Tensor) -> Tensor:
        """p(theta, x | N)."""
        length = validate_counts(x).sum(-1)
        with pyro.plate("data", len(x)):
            theta = pyro.sample("theta", self.call_part("prior"))
            return pyro.sample("x", self.call_part("likelihood", theta, context=length), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """q(theta | x)."""
        counts = validate_counts(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("theta", self.call_part("posterior", counts))

    @property
    def words(self) -> Tensor:
        """p(word | topic), [topics, words]."""
        with torch.no_grad():
            theta = self.prior().sample()
            return self.likelihood.net(torch.eye(len(theta)).to(theta)).softmax(-1)


def validate_counts(x: Tensor) -> Tensor:
    """The counts [batch, D], validated. No value is read on the host unless one is wrong, so that steps can be
    captured.

    Raises DataError, by the row, for a value that is no count, and for a row of zeros.
    """
    if x.dim() != 2:
        raise DataError(f"x: expected rows of counts [batch, D], found {list(x.shape)}")
    counts = (x >= 0) & (x == x.floor())
    fine, rows = counts.all(-1) & (x.sum(-1) > 0), torch.arange(len(x), device=x.device)
    try:
        return x.index_select(0, torch.where(fine, rows, len(x)))  # an invalid row selects an index out of range
    except (IndexError, RuntimeError):
        if bool(fine.all()):
            raise
        row = int((~fine).nonzero()[0])
        if bool(counts[row].all()):
            raise DataError(f"x: expected a count in each row, found none at row {row} of the batch") from None
        column = int((~counts[row]).nonzero()[0])
        found = f"{x[row, column].item():g} at row {row} of the batch, column {column}"
        raise DataError(f"x: expected counts 0, 1, 2, ..., found {found}") from None
