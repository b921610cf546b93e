"""The width of a fitted proposal: larger where the posterior is not normal, and only there; never far too large."""

from __future__ import annotations

import math

import pytest
import torch

from ppvae.evaluation.proposals import fit
from ppvae.evaluation.proposals.climbing import elbo
from ppvae.evaluation.proposals.densities import Elliptical

pytestmark = pytest.mark.usefixtures("float64")


class Decoded:
    """z ~ N(0, I) in R^d given binary x, of which a tanh network of the first dims gives the logits."""

    def __init__(self, dims: int, used: int, count: int = 4, slope: float = 4.0):
        self.dims, self.used = dims, used
        self.first = torch.randn(used, 60) / used**0.5
        self.second = slope * torch.randn(60, 100) / 60**0.5
        self.x = torch.bernoulli(self.logits(torch.randn(count, dims)).sigmoid())

    def logits(self, u):
        return (u[..., : self.used] @ self.first).tanh() @ self.second

    def sample_start(self, num_chains):
        return torch.randn(num_chains, len(self.x), self.dims)

    def log_joint(self, u):
        log_normal = -0.5 * (u.square() + math.log(2 * math.pi)).sum(-1)
        return log_normal + ((2 * self.x - 1) * self.logits(u)).sigmoid().log().sum(-1)

    def log_densities(self, u):
        return -0.5 * (u.square() + math.log(2 * math.pi)).sum(-1), self.log_joint(u)

    def gradient(self, u):
        hidden = (u[..., : self.used] @ self.first).tanh()
        error = self.x - (hidden @ self.second).sigmoid()
        gradient = -u.clone()
        gradient[..., : self.used] += ((error @ self.second.T) * (1 - hidden.square())) @ self.first.T
        return gradient


def standard(scale):
    count, dims = scale.shape[:2]
    return Elliptical(torch.zeros(count, dims), scale, torch.full((count,), math.inf))


def test_the_added_covariance_is_of_the_rough_directions():
    """Closed form: 0.9 r / (r + 0.1) of the variance of q along its eigenvectors; in ten dims half of it."""
    for dims, most in ((20, 0.9), (10, 0.45)):
        tril = torch.randn(1, dims, dims).tril(-1) + torch.eye(dims)
        vectors = torch.linalg.qr(torch.randn(dims, dims))[0]
        roughness = torch.tensor([0.0, 0.1, 1e3] + [0.0] * (dims - 3))
        added = fit.added_covariance(standard(tril), (vectors * roughness) @ vectors.T[None])
        share = (vectors * most * roughness / (roughness + 0.1)) @ vectors.T
        torch.testing.assert_close(added, tril @ share @ tril.mT, rtol=1e-9, atol=1e-9)
        q = standard(tril).with_tails(torch.tensor([30.0]), added)
        torch.testing.assert_close(
            q.scale_tril @ q.scale_tril.mT, tril @ (torch.eye(dims) + share) @ tril.mT, rtol=1e-5, atol=1e-5
        )
        assert float(q.df) == 30.0


def test_a_scale_stays_where_what_is_added_is_not_finite():
    tril = torch.eye(2).expand(2, 2, 2)
    added = torch.stack([torch.eye(2), torch.full((2, 2), math.nan)])
    q = standard(tril).with_tails(torch.full((2,), 9.0), added)
    torch.testing.assert_close(q.scale_tril[0], 2**0.5 * torch.eye(2))
    torch.testing.assert_close(q.scale_tril[1], torch.eye(2))


def test_dims_that_the_data_do_not_inform_keep_the_prior():
    """The posterior of the last 30 dims is the prior, and so is the proposal; that of the first 6 is not normal."""
    target = Decoded(36, 6, slope=2.0)
    full_rank, roughness = fit.maximize_elbo(target, standard(torch.eye(36).expand(4, 36, 36)))
    added = fit.added_covariance(full_rank, roughness).diagonal(dim1=-2, dim2=-1)
    variance = full_rank.scale_tril.square().sum(-1)
    assert float((variance[:, 6:].mean() - 1).abs()) < 0.02
    assert float((added / variance)[:, 6:].mean()) < 0.06
    assert float((added / variance)[:, :6].mean()) > 0.3
    fitted = fit.fit_proposal(target)
    assert fitted.family.tolist() == [2] * 4
    unused = fitted.density.scale_tril.square().sum(-1)[:, 6:]
    assert float((unused.mean() - 1).abs()) < 0.08


def test_a_fit_from_far_too_broad_a_start_arrives():
    """From the prior, in 30 dims that the data all inform, as from a Laplace approximation.

    Hundreds of nats lie between the two where a variance may grow sixteenfold in a round.
    """
    target = Decoded(30, 30, count=16)
    start = standard(torch.eye(30).expand(16, 30, 30))
    mode, covariance = fit.newton(target, torch.zeros(16, 30), torch.ones(16, 30))
    laplace = Elliptical(mode, torch.linalg.cholesky(covariance), start.df)
    best, found = (elbo(target, fit.maximize_elbo(target, q)[0], 400) for q in (laplace, start))
    assert float((best - found).max()) < 2
