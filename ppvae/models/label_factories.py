"""Factories of pairs with labels, for the command line: they take --labels, or data with labels, as (x, labels)."""

from typing import Any

from torch import Tensor
from torch.nn import Identity, Module

from ppvae import likelihoods, nn, posteriors, priors
from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers, check_ranges, check_sequences
from ppvae.factories.pairs import trained_with
from ppvae.models.deep_mixture import SemiSupervisedVAE
from ppvae.models.factories import Likelihood, build_part
from ppvae.models.vae import ConditionalVAE


@trained_with("ELBO")
def semi_supervised_vae(
    train: Tensor,
    latent: int = 8,
    hidden: tuple[int, ...] = (200, 200),
    likelihood: Likelihood = likelihoods.Bernoulli,
    label_weight: float = 100.0,
    num_labels: int | None = None,
) -> SemiSupervisedVAE:
    """The model M2 on flat data with labels for some of them: --labels, and --labelled N to keep N of them.

    Args:
        train: the training data [N, features].
        latent: the size of z.
        hidden: the widths of the hidden layers of encoder, decoder and classifier.
        likelihood: p(x | z, y), a class of ppvae.likelihoods.
        label_weight: the weight on log q(label | x) of labelled data; 0 leaves the classifier to the ELBO.
        num_labels: how many labels there are.

    Raises `UsageError` without labels, and for a likelihood that cannot be built, by name.

    >>> import torch
    >>> pair = semi_supervised_vae(torch.rand(50, 64).round(), num_labels=10)
    >>> pair.classify(torch.zeros(5, 64)).shape
    torch.Size([5, 10])
    """
    check_numbers(latent=latent, label_weight=label_weight)
    check_sequences(hidden=hidden)
    check_ranges(num_labels=num_labels)
    features, labels = _sizes("semi_supervised_vae", train, num_labels)
    pair = SemiSupervisedVAE(
        labels=priors.OneHot(labels),
        prior=priors.StandardNormal(latent),
        likelihood=_likelihood(train, likelihood, latent + labels, hidden),
        posterior=posteriors.DiagonalNormal(nn.mlp(features + labels, 2 * latent, hidden=hidden)),
        classifier=posteriors.OneHot(nn.mlp(features, labels, hidden=hidden), classes=labels),
    )
    pair.label_weight = label_weight
    return pair


def conditional_vae(
    train: Tensor,
    latent: int = 8,
    hidden: tuple[int, ...] = (200, 200),
    likelihood: Likelihood = likelihoods.Bernoulli,
    num_labels: int | None = None,
) -> ConditionalVAE:
    """p(x | label) on flat data: takes --labels.

    Args:
        train: the training data [N, features].
        latent: the size of z.
        hidden: the widths of the hidden layers of encoder and decoder.
        likelihood: p(x | z, label), a class of ppvae.likelihoods.
        num_labels: how many labels there are.

    Raises `UsageError` without labels, and for a likelihood that cannot be built, by name.
    """
    check_numbers(latent=latent)
    check_sequences(hidden=hidden)
    check_ranges(num_labels=num_labels)
    features, labels = _sizes("conditional_vae", train, num_labels)
    return ConditionalVAE(
        prior=priors.StandardNormal(latent),
        likelihood=_likelihood(train, likelihood, latent + labels, hidden),
        posterior=posteriors.DiagonalNormal(nn.mlp(features + labels, 2 * latent, hidden=hidden)),
        of=nn.Labels(labels),
    )


def _sizes(name: str, train: Tensor, num_labels: int | None) -> tuple[int, int]:
    if train.dim() != 2:
        raise UsageError(f"{name}: expected flat data [N, features], found {list(train.shape)}; load them flat")
    if num_labels is None:
        raise UsageError(f"{name}: expected the label of each datum, found none; pass --labels, or num_labels")
    return train.shape[1], num_labels


def _likelihood(train: Tensor, likelihood: Any, inputs: int, hidden: tuple[int, ...]) -> Module:
    """A likelihood whose network takes z and the label, and starts at the mean of the data."""
    part: Any = build_part("likelihood", likelihood, {"net": Identity()})
    event = tuple(train.shape[1:])
    outputs = part.output_shape(event) if hasattr(part, "output_shape") else event
    part.net = nn.mlp(inputs, outputs[0], hidden=hidden[::-1])
    if hasattr(part, "output_for_mean"):
        nn.set_output_bias(part.net, part.output_for_mean(train.double().mean(0)))
    return part
