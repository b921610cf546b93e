"""The adapter from conditionals to a Pyro pair."""

from __future__ import annotations

import inspect
from typing import Any

import pyro
from torch import Tensor, nn

from ppvae.errors import UsageError
from ppvae.naming import unique


class VAE(nn.Module):
    """A variational autoencoder composed of a prior p(z), a likelihood p(x | z) and a posterior q(z | x).

    The parts are modules that return a distribution: `prior()`, `likelihood(z)`, `posterior(x)`. One that declares
    `context` gets the batch's second tensor under that name. `model` and `guide` are Pyro functions with sites "z" and
    "x" in a plate "data"; they take x [batch, *event].

    Source: Kingma and Welling 2014 (arXiv 1312.6114); Rezende et al. 2014 (arXiv 1401.4082).

    >>> import torch
    >>> from ppvae import likelihoods, nn, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(8),
    ...     likelihood=likelihoods.Bernoulli(nn.mlp(8, 64)),
    ...     posterior=posteriors.DiagonalNormal(nn.mlp(64, 2 * 8)),
    ... )
    >>> vae.guide(torch.zeros(5, 64)).shape
    torch.Size([5, 8])
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module, posterior: nn.Module):
        super().__init__()
        self.prior, self.likelihood, self.posterior = prior, likelihood, posterior
        self._name = unique("vae")
        self._wants_context = {
            name: "context" in inspect.signature(part.forward).parameters for name, part in self.named_children()
        }

    def _call(self, part: str, *args: Tensor, context: Tensor | None) -> Any:
        conditional = getattr(self, part)
        pyro.module(f"{self._name}.{part}", conditional)
        if not self._wants_context[part]:
            return conditional(*args)
        if context is None:
            raise UsageError(f"{part}: expected a context, the batch's second tensor; found a batch of one tensor")
        return conditional(*args, context=context)

    def model(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """p(x, z): draws z from the prior and observes x."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self._call("prior", context=context))
            return pyro.sample("x", self._call("likelihood", z, context=context), obs=x)

    def guide(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """q(z | x): draws z from the posterior."""
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self._call("posterior", x, context=context))
