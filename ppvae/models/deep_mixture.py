"""Deep mixtures with a class and a continuous latent, and semi-supervised VAEs, with labels for some of the data."""

from typing import final

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from ppvae.errors import DataError, UsageError
from ppvae.models.composed_model import ComposedModel
from ppvae.nn import ConcatContext, rows_of
from ppvae.nn.context import needs_context
from ppvae.posteriors import OneHot

UNKNOWN_LABEL = -1  # the label of an unlabelled datum, as in scikit-learn


class DeepMixture(ComposedModel):
    """p(x) = sum_y p(y) int p(z | y) p(x | z, y) dz with guide q(y | x) q(z | x, y); y is enumerated, a one-hot vector.

    A part that declares `context` is given y: with a prior p(z | y) and a likelihood p(x | z) this is the Gaussian
    mixture VAE. y is summed out of weights and ELBOs exactly.

    Labels may be given as the batch's second tensor, -1 where unknown. Where a label is known, y equals it in model and
    guide, and log p(x) is log p(x, label); the classifier q(y | x) is trained on labelled data by
    `objectives.auxiliary.AuxiliaryLoss(ELBO(), pair.log_label, weight)`.

    Args:
        clusters: p(y), `priors.OneHot(classes)`.
        prior: p(z | y), or p(z): `priors.ConditionalNormal(torch.nn.Linear(classes, 2 * latent))`.
        likelihood: p(x | z), or p(x | z, y).
        posterior: q(z | x, y), or q(z | x): `nn.ConcatContext(posteriors.DiagonalNormal(net))` with a network of
            [..., event + classes].
        classifier: q(y | x), `posteriors.OneHot(net, classes)`.

    `objectives.ELBO()` trains it. Raises DataError for a label outside the classes, by its row.
    Source: Kingma et al. 2014 (arXiv 1406.5298); Dilokthanakul et al. 2016 (arXiv 1611.02648).

    >>> from ppvae import likelihoods, nn, posteriors, priors
    >>> pair = DeepMixture(
    ...     clusters=priors.OneHot(10),
    ...     prior=priors.ConditionalNormal(torch.nn.Linear(10, 2 * 8)),
    ...     likelihood=likelihoods.Bernoulli(nn.mlp(8, 64)),
    ...     posterior=nn.ConcatContext(posteriors.DiagonalNormal(nn.mlp(64 + 10, 2 * 8))),
    ...     classifier=posteriors.OneHot(nn.mlp(64, 10), classes=10),
    ... )
    >>> pair.guide(torch.zeros(5, 64)).shape
    torch.Size([5, 8])
    """

    def __init__(
        self, clusters: nn.Module, prior: nn.Module, likelihood: nn.Module, posterior: nn.Module, classifier: OneHot
    ):
        super().__init__("deep_mixture")
        self.label_weight = 0.0  # of `log_label` in the objective of the command line
        self.clusters, self.prior, self.likelihood = clusters, prior, likelihood
        self.posterior, self.classifier = posterior, classifier

    def model(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """p(x, y, z), with y observed where the label is known."""
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", self.call_part("clusters"))
            if label is not None:
                known = label != UNKNOWN_LABEL
                with poutine.mask(mask=known):
                    fn = dist.Categorical(logits=y.log())
                    pyro.sample("label", fn, obs=torch.where(known, label, 0), infer={"is_label": True})
            z = pyro.sample("z", self.call_part("prior", context=y))
            return pyro.sample("x", self.call_part("likelihood", z, context=y), obs=x)

    def guide(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """q(y | x) q(z | x, y), with a known label in place of q(y | x)."""
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", self.probabilities(x, label), infer={"enumerate": "parallel"})
            return pyro.sample("z", self.call_part("posterior", x, context=y))

    def probabilities(self, x: Tensor, label: Tensor | None = None) -> dist.TorchDistribution:
        """q(y | x), or the point mass at a known label; batch shape [batch], event shape [classes]."""
        pyro.module(f"{self._name}.classifier", self.classifier)
        logits = self.classifier.net(x)
        if label is not None:
            classes = logits.shape[-1]
            if label.dim() != 1:
                raise DataError(
                    f"label: expected class numbers [batch], found shape {list(label.shape)}; of one-hot rows pass "
                    f"y.argmax(-1)"
                )
            certain = torch.eye(classes + 1, classes).roll(1, 0).to(logits).log()  # a row for -1 comes first
            rows = rows_of(certain, label, "label: expected {first} (unknown) or classes 0 to {last}", UNKNOWN_LABEL)
            logits = torch.where((label == UNKNOWN_LABEL).unsqueeze(-1), logits, rows)
        return self.classifier.head(logits)

    def classify(self, x: Tensor) -> Tensor:
        """q(y | x), the probability of each class, [batch, classes]; `.argmax(-1)` is the label.

        Data are a tensor, an array or a table. The classifier is in evaluation mode, and there is no gradient. Raises
        UsageError for several tensors, DataError for numbers of another precision than the classifier's.
        """
        if isinstance(x, tuple):
            raise UsageError(f"classify: expected the data x without labels, found a tuple of {len(x)}: pass x alone")
        x = x if isinstance(x, Tensor) else torch.tensor(np.asarray(x))
        training = self.classifier.training
        self.classifier.eval()
        try:
            with torch.no_grad():
                return self.classifier(x).probs
        except RuntimeError as error:
            found, wanted = (str(t.dtype).removeprefix("torch.") for t in (x, next(self.classifier.parameters(), x)))
            if found == wanted:
                raise
            raise DataError(
                f"classify: expected data of {wanted} as the classifier's parameters, found {found}: pass "
                f"x.to(torch.{wanted}) (of an array or frame, .astype('{wanted}'))"
            ) from error
        finally:
            self.classifier.train(training)

    def log_label(self, x: Tensor, label: Tensor) -> Tensor:
        """log q(label | x) of known labels, 0 otherwise, [batch] nats: for `AuxiliaryLoss`."""
        known = label != UNKNOWN_LABEL
        one_hot = torch.eye(self.classifier.classes).to(x)
        y = rows_of(one_hot, torch.where(known, label, 0), "label: expected classes {first} to {last}")
        return torch.where(known, self.probabilities(x).log_prob(y), 0.0)


@final
class SemiSupervisedVAE(DeepMixture):
    """The model M2, p(x) = sum_y p(y) int p(z) p(x | z, y) dz with guide q(y | x) q(z | x, y): a label and a style.

    A `DeepMixture` whose likelihood and posterior take y concatenated to their input, or as `context` where they, or
    their networks, declare it. Data are x alone, or (x [batch, *event], label [batch]) with -1 for unknown labels. With
    all labels known it is the conditional VAE, and log p(x, label) = log p(label) + log p(x | label).

    Args:
        labels: p(y), `priors.OneHot(classes)`.
        prior: p(z).
        likelihood: p(x | z, y), a part whose network takes [..., latent + classes].
        posterior: q(z | x, y), a part whose network takes [..., event + classes].
        classifier: q(y | x), `posteriors.OneHot(net, classes)`.
        event_dim: 1, or 3 for images [C, H, W], where y becomes further channels.

    Raises DataError for a label outside the classes, by its row.
    Source: Kingma et al. 2014 (arXiv 1406.5298).

    >>> from ppvae import likelihoods, nn, posteriors, priors
    >>> vae = SemiSupervisedVAE(
    ...     labels=priors.OneHot(10),
    ...     prior=priors.StandardNormal(8),
    ...     likelihood=likelihoods.Bernoulli(nn.mlp(8 + 10, 64)),
    ...     posterior=posteriors.DiagonalNormal(nn.mlp(64 + 10, 2 * 8)),
    ...     classifier=posteriors.OneHot(nn.mlp(64, 10), classes=10),
    ... )
    >>> vae.guide(torch.zeros(2, 64), torch.tensor([3, -1])).shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        labels: nn.Module,
        prior: nn.Module,
        likelihood: nn.Module,
        posterior: nn.Module,
        classifier: OneHot,
        event_dim: int = 1,
    ):
        likelihood = likelihood if needs_context(likelihood) else ConcatContext(likelihood)
        posterior = posterior if needs_context(posterior) else ConcatContext(posterior, event_dim=event_dim)
        super().__init__(labels, prior, likelihood, posterior, classifier)
