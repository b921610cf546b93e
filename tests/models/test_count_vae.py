"""Counts with batches and library sizes against the plain VAE and quadrature."""

from __future__ import annotations

import functools
import math
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from ppvae import VAE, check, fit, likelihoods, log_marginal, nn, objectives, posteriors, priors, terms
from ppvae.errors import DataError, PpvaeError, UsageError
from ppvae.evaluation import quadrature
from ppvae.inference.svi import SVI
from ppvae.models import CountVAE

pytestmark = pytest.mark.usefixtures("float64")
LATENT, GENES = 1, 4
LIKELIHOODS = {
    "Poisson": (1, {}),
    "NegativeBinomial": (1, {"concentration": (GENES,)}),
    "ZeroInflatedNegativeBinomial": (2, {"concentration": (GENES,)}),
}
each = pytest.mark.parametrize("name", LIKELIHOODS)


def likelihood(name: str, inputs: int) -> torch.nn.Module:
    blocks, options = LIKELIHOODS[name]
    net = nn.mlp(inputs, blocks * GENES, hidden=(5,))
    return getattr(likelihoods, name)(net, library=True, **options)


def posterior(inputs: int, latent: int = LATENT) -> posteriors.DiagonalNormal:
    """Near the prior and wider, so that weights are as bounded as the likelihood is."""
    made = posteriors.DiagonalNormal(nn.mlp(inputs, 2 * latent, hidden=(5,)))
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(0.1)
        made.net[-1].bias[latent:] += 0.2
    return made


def pair(name: str = "NegativeBinomial", batches: int = 2, latent_library: bool = False) -> CountVAE:
    library = ()
    if latent_library:
        prior = priors.ConditionalNormal.of_labels(batches, latent=1)
        with torch.no_grad():
            prior.net.weight.copy_(torch.tensor([[2.0, math.log(0.3)], [2.5, math.log(0.2)]])[:batches])
        of_batch = posteriors.DiagonalNormal(torch.nn.Linear(GENES + batches, 2))
        with torch.no_grad():
            of_batch.net.weight.zero_()
            of_batch.net.bias.copy_(torch.tensor([2.2, math.log(0.5)]))
        library = (prior, of_batch)
    return CountVAE(
        priors.StandardNormal(LATENT), likelihood(name, LATENT + batches), posterior(GENES + batches), batches, *library
    )


def data(rows: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.poisson(torch.full((rows, GENES), 2.0))
    x[:, 0] += 1
    return x, torch.arange(rows) % 2, torch.linspace(5.0, 15.0, rows)


# -- the density ------------------------------------------------------------------------------------------------------


class WithOne(torch.nn.Module):
    """A network of [..., d + 1] as one of [..., d]: the last is 1, the only batch."""

    def __init__(self, net: torch.nn.Module, log1p: bool):
        super().__init__()
        self.net, self.log1p = net, log1p

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.cat([x.log1p() if self.log1p else x, torch.ones_like(x[..., :1])], -1))


@each
def test_one_batch_and_a_known_library_is_the_vae(name):
    one, (x, _, library) = pair(name, batches=1), data()
    plain = VAE(one.prior, one.likelihood, posteriors.DiagonalNormal(WithOne(one.posterior.net, True)))
    t = terms(one.model, one.guide, (x, torch.zeros(6, dtype=torch.long), library), 4)
    decoder = one.likelihood.net
    plain.likelihood.net = WithOne(decoder, False)
    other = terms(plain.model, plain.guide, (x, library), 4, values={"z": t.guide["z"].value})
    torch.testing.assert_close(other.log_weight, t.log_weight)


def by_quadrature(vae: CountVAE, x: Tensor, batch: Tensor, library: Tensor) -> Tensor:
    """log p(x | s, l) by Gauss-Hermite quadrature over z, [batch]."""
    node, weight = np.polynomial.hermite_e.hermegauss(60)
    z = torch.tensor(node)[:, None, None].expand(60, len(x), 1)
    y = torch.eye(2)[batch].expand(60, len(x), 2)
    log_lik = vae.likelihood(torch.cat([z, y], -1), context=library).log_prob(x)
    return (log_lik + torch.tensor(weight / weight.sum()).log()[:, None]).logsumexp(0)


@each
def test_log_px_of_a_known_library_is_the_quadrature(name):
    vae, batch = pair(name), data()
    exact = by_quadrature(vae, *batch).detach()
    est = log_marginal(vae.model, vae.guide, batch, num_particles=6000, seed=1, progress=False, proposal="guide")
    assert bool(est.reliable.all())
    assert bool(((est.log_px - exact).abs() < 4 * est.std_error + 1e-9).all())  # fails once in 2500
    assert bool((est.std_error < 0.02).all())
    torch.testing.assert_close(quadrature(vae.model, vae.guide, batch).log_px, exact, atol=1e-6, rtol=0)


def test_log_px_of_a_latent_library_integrates_it_out():
    vae, (x, batch, _) = pair(latent_library=True), data()
    node, weight = np.polynomial.hermite_e.hermegauss(60)
    loc, log_scale = vae.library.net(batch).chunk(2, -1)
    each = [
        by_quadrature(vae, x, batch, (loc + n * log_scale.exp())[:, 0].exp()) + math.log(w)
        for n, w in zip(node, weight / weight.sum(), strict=True)
    ]
    exact = torch.stack(each).logsumexp(0).detach()
    est = log_marginal(vae.model, vae.guide, (x, batch), num_particles=6000, seed=1, progress=False, proposal="guide")
    assert bool(est.reliable.all())
    assert bool(((est.log_px - exact).abs() < 4 * est.std_error + 1e-9).all())  # fails once in 2500
    assert bool((est.std_error < 0.02).all())
    torch.testing.assert_close(quadrature(vae.model, vae.guide, (x, batch)).log_px, exact, atol=1e-5, rtol=0)


def test_a_library_that_is_known_is_no_latent():
    """The pair with a latent library, given sizes, is the pair without one."""
    vae, (x, batch, library) = pair(latent_library=True), data()
    known = CountVAE(vae.prior, vae.likelihood, vae.posterior, 2)
    t = terms(vae.model, vae.guide, (x, batch, library), 3)
    assert list(t.guide) == ["z"]
    other = terms(known.model, known.guide, (x, batch, library), 3, values={"z": t.guide["z"].value})
    torch.testing.assert_close(other.log_weight, t.log_weight)


def test_batches_matter_and_their_names_do_not():
    vae, (x, batch, library) = pair(), data()
    z = terms(vae.model, vae.guide, (x, batch, library), 3).guide["z"].value
    ours = terms(vae.model, vae.guide, (x, batch, library), 3, values={"z": z}).log_weight
    other = terms(vae.model, vae.guide, (x, 1 - batch, library), 3, values={"z": z}).log_weight
    assert bool((other != ours).all())
    with torch.no_grad():  # the columns of the one-hot vectors, the other way round
        for net in (vae.likelihood.net, vae.posterior.net):
            net[0].weight[:, -2:] = net[0].weight[:, -2:].flip(1)
    renamed = terms(vae.model, vae.guide, (x, 1 - batch, library), 3, values={"z": z}).log_weight
    torch.testing.assert_close(renamed, ours)


def test_the_prior_of_libraries_starts_at_the_sums_of_each_batch():
    x = torch.tensor([[1.0, 3.0], [10.0, 6.0], [20.0, 0.0], [2.0, 3.0]])
    prior = CountVAE.library_of(x, torch.tensor([0, 0, 1, 1]))
    fn = prior(context=torch.tensor([0, 1]))
    logs = torch.tensor([[4.0, 16.0], [20.0, 5.0]]).log()
    torch.testing.assert_close(fn.mean[:, 0].detach(), logs.mean(-1))
    torch.testing.assert_close(fn.variance[:, 0].detach().sqrt(), logs.std(-1, correction=0))
    with pytest.raises(DataError, match="batch: expected rows of each batch 0 to 2, found none of batch 1"):
        CountVAE.library_of(x, torch.tensor([0, 0, 2, 2]))


# -- what is refused --------------------------------------------------------------------------------------------------

USES = {
    "check": lambda p, d: check(p.model, p.guide, d),
    "fit": lambda p, d: fit(p.model, p.guide, d, epochs=1, batch_size=2, progress=False),
    "log_marginal": lambda p, d: log_marginal(p.model, p.guide, d, num_particles=2, progress=False, proposal="guide"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("wrong", "message"), [
    (-1.0, r"x: expected counts 0, 1, 2, \.\.\., found -1 at row . of the batch, column 2"),
    (1.5, r"x: expected counts 0, 1, 2, \.\.\., found 1.5 at row . of the batch, column 2"),
    ("nothing", r"x: expected a count in each row, found none at row . of the batch"),
    ("batch", r"labels: expected classes 0 to 1, found 2 at row . of the batch"),
])  # fmt: skip
def test_what_is_wrong_is_refused_by_its_row(use, wrong, message):
    x, batch, library = data()
    if wrong == "batch":
        batch[3] = 2
    elif wrong == "nothing":
        x[3] = 0.0
    else:
        x[3, 2] = wrong
    with pytest.raises(DataError, match=message):
        USES[use](pair(), (x, batch, library))


def test_wrong_counts_are_named_in_a_captured_step_too(monkeypatch):
    from ppvae.inference import compiled_step

    monkeypatch.setattr(compiled_step, "WAIT", 1)
    monkeypatch.setattr(sys.modules["ppvae.training.trainer"], "WORTH_CAPTURING", 0.0)
    x, batch, library = data(40)
    x[-1, 1] = 0.5
    seeds = [s for s in range(20) if 39 in torch.randperm(40, generator=torch.Generator().manual_seed(s))[-4:]]
    vae = pair()
    batch, options = (x, batch, library), {"epochs": 3, "batch_size": 4, "compile": None, "seed": seeds[0]}
    with pytest.raises(PpvaeError, match=r"found 0.5 at row . of the batch, column 1"):
        fit(vae.model, vae.guide, batch, progress=False, **options)


@pytest.mark.slow
def test_compiled_steps_are_its_own_and_name_wrong_counts():
    vae, (x, batch, library) = pair("ZeroInflatedNegativeBinomial"), data()
    losses = {}
    for kernels in ("eager", "compiled"):
        svi = SVI(vae.model, vae.guide, functools.partial(torch.optim.SGD, lr=0.0), objectives.ELBO())
        svi.use(kernels, settled=True)
        torch.manual_seed(0)
        losses[kernels] = [svi.step(x, batch, library) for _ in range(3)]
        assert svi.kernels == kernels
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-9)
    x[3, 1] = 0.5
    with pytest.raises(DataError, match=r"found 0.5 at row 3 of the batch, column 1"):
        svi.step(x, batch, library)


def test_data_without_library_sizes_and_half_a_library_are_refused():
    vae, (x, batch, _) = pair(), data()
    with pytest.raises(UsageError, match=r"library: expected data \(x, batch, library\), or a latent one"):
        check(vae.model, vae.guide, (x, batch))
    with pytest.raises(ValueError, match="library, library_posterior: expected both of them or neither, found one"):
        CountVAE(vae.prior, vae.likelihood, vae.posterior, 2, library=priors.ConditionalNormal.of_labels(2, latent=1))
