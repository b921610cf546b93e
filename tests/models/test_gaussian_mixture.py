"""Mixtures of normals and of factor analysers against scikit-learn, sums over clusters and closed forms."""

from __future__ import annotations

import functools

import pytest
import sklearn.mixture
import torch
from torch import Tensor

from ppvae import fit, log_marginal, objectives
from ppvae.models import GaussianMixture, LinearGaussian

RANKS = (None, 0, 2)


def random_mixture(rank: int | None, components: int = 3, features: int = 4) -> GaussianMixture:
    torch.manual_seed(0)
    made = GaussianMixture(features, components, rank).double()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_()
    return made


def covariance(p: GaussianMixture, c: int) -> Tensor:
    if p.rank is None:
        lower = p.factor[c].tril(-1) + p.log_scale[c].exp().diag()
        return lower @ lower.T
    noise = (2 * p.log_scale[c]).exp().diag()
    return noise + p.factor[c] @ p.factor[c].T if p.rank else noise


@pytest.mark.parametrize("rank", RANKS)
def test_log_px_is_the_sum_over_clusters(rank):
    p, x = random_mixture(rank), torch.randn(7, 4).double()
    dense = [torch.distributions.MultivariateNormal(p.loc[c], covariance(p, c)).log_prob(x).exp() for c in range(3)]
    joint = torch.stack(dense, -1) * p.logits.softmax(-1)
    torch.testing.assert_close(p.log_px(x), joint.sum(-1).log())
    torch.testing.assert_close(p.posterior(x).probs, joint / joint.sum(-1, keepdim=True))
    est = log_marginal(p.model, p.guide, x, num_particles=30, progress=False, proposal="guide")
    torch.testing.assert_close(est.log_px, joint.sum(-1).log())
    assert bool(est.reliable.all())


def test_one_cluster_is_factor_analysis():
    p, x = random_mixture(2, components=1), torch.randn(7, 4).double()
    fa = LinearGaussian(4, 2, torch.ones(4)).double()
    with torch.no_grad():
        fa.weight.copy_(p.factor[0])
        fa.loc.copy_(p.loc[0])
        fa.log_scale.copy_(p.log_scale[0])
    torch.testing.assert_close(p.log_px(x), fa.log_px(x))


def three_clusters() -> Tensor:
    torch.manual_seed(0)
    loc = torch.tensor([[0.0, 0, 0], [4, 0, 1], [0, 4, -1]])
    shapes = [torch.eye(3) + 0.5 * torch.randn(3, 3).tril(-1) for _ in range(3)]
    return torch.cat([m + torch.randn(150, 3) @ s.T for m, s in zip(loc, shapes, strict=True)]).double()


@pytest.mark.parametrize(("rank", "kind"), [(None, "full"), (0, "diag")])
def test_svi_reaches_what_em_reaches_from_the_same_start(rank, kind):
    """From seed 1; two climbers may part for two hills, and from seed 0 they do: each then has a higher one once."""
    x = three_clusters()
    pair = GaussianMixture.from_data(x, 3, rank, seed=1)
    precision = (-2 * pair.log_scale).exp().detach()
    em = sklearn.mixture.GaussianMixture(
        3, covariance_type=kind, weights_init=[1 / 3] * 3, means_init=pair.loc.detach().numpy(), max_iter=2000,
        precisions_init=(precision.diag_embed() if rank is None else precision).numpy(), tol=1e-9, reg_covar=0.0,
    ).fit(x.numpy())  # fmt: skip
    adam = functools.partial(torch.optim.Adam, lr=5e-2)
    start = float(pair.log_px(x).mean().detach())
    fit(
        pair.model, pair.guide, x, objective=objectives.ELBO(), optimizer=adam, epochs=150, batch_size=len(x),
        progress=False,
    )  # fmt: skip
    assert em.score(x.numpy()) > start + 0.1
    assert abs(float(pair.log_px(x).mean().detach()) - em.score(x.numpy())) < 0.01


def test_from_data_starts_at_rows_of_the_data():
    x = torch.randn(20, 3)
    p = GaussianMixture.from_data(x, 4, seed=2)
    assert all(bool((x == row).all(-1).any()) for row in p.loc)
    assert len(p.loc.unique(dim=0)) == 4


@pytest.mark.parametrize(("given", "message"), [
    ({"components": 0}, "components: expected at least 1, found 0"),
    ({"components": 2, "rank": 3}, "rank: expected None or 0 to 2 for 3 features, found 3"),
    ({"components": 2, "rank": -1}, "rank: expected None or 0 to 2"),
])  # fmt: skip
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(3, **given)


def test_more_clusters_than_rows_are_refused():
    with pytest.raises(ValueError, match="components: expected 1 to 5, as there are rows of data, found 6"):
        GaussianMixture.from_data(torch.randn(5, 3), 6)
