"""Classifiers of models with labels."""

from __future__ import annotations

import torch

from ppvae import likelihoods, nn, posteriors, priors
from ppvae.models import SemiSupervisedVAE


def test_classify_gives_the_classifiers_probabilities_in_evaluation_mode():
    torch.manual_seed(0)
    net = torch.nn.Sequential(nn.mlp(4, 3), torch.nn.Dropout(0.5))
    pair = SemiSupervisedVAE(
        labels=priors.OneHot(3),
        prior=priors.StandardNormal(2),
        likelihood=likelihoods.Bernoulli(nn.mlp(2 + 3, 4)),
        posterior=posteriors.DiagonalNormal(nn.mlp(4 + 3, 4)),
        classifier=posteriors.OneHot(net, classes=3),
    ).train()
    x = torch.rand(7, 4)
    found = pair.classify(x)
    assert torch.allclose(found, net[0](x).softmax(-1))
    assert torch.equal(found, pair.classify(x))
    assert not found.requires_grad
    assert net.training
    labels = torch.tensor([0, 2, 1, 0, 0, 1, 2])
    pair.eval()
    assert torch.allclose(pair.log_label(x, labels), found.gather(1, labels[:, None])[:, 0].log())
