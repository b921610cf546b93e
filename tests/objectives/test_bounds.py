"""Importance-weighted bounds: against closed forms, against each other, against Pyro's RenyiELBO."""

from __future__ import annotations

import itertools

import pyro
import pytest
import torch
from pyro.infer import RenyiELBO

from ppvae import objectives
from ppvae.inference import terms
from ppvae.objectives import (
    CIWAE,
    ELBO,
    IWAE,
    MIWAE,
    PIWAE,
    TVO,
    InfoVAE,
    Renyi,
    ReweightedWakeSleep,
)  # fmt: skip
from tests.laws.objectives import (
    value,
)
from tests.objectives.pairs import pair
from tests.objectives.test_elbo import same_as_pyro
from tests.programs.strangers import PAIRS
from tests.programs.toys import ONE, TWO

pytestmark = pytest.mark.filterwarnings("ignore:STL is biased")


def test_exact_guide_gives_log_px_at_any_number_of_particles() -> None:
    p, x = pair()
    for objective in (objectives.ELBO(4), objectives.IWAE(1), objectives.IWAE(7)):
        assert objective.loss(p.model, p.guide, x) == pytest.approx(-float(p.log_px(x).sum()), abs=1e-10)


def test_bounds_are_ordered() -> None:
    # means over 4000 draws: a reversal by chance has probability below 1e-9 (gaps are over 6 standard errors)
    p, x = pair()
    x = x[:1].expand(4000, 5)
    elbo, iwae2, iwae20 = (-o.loss(p.model, p.mean_field, x) / 4000 for o in (
        objectives.ELBO(1), objectives.IWAE(2), objectives.IWAE(20)
    ))  # fmt: skip
    assert elbo < iwae2 < iwae20 < float(p.log_px(x[:1])) + 0.01


def test_bounds_that_are_the_same_are_the_same_on_the_same_draws(float64):
    model, guide, x, _ = TWO.pair(5)
    pairs = [
        (CIWAE(0.0, 6), IWAE(6)),
        (CIWAE(1.0, 6), ELBO(6)),
        (Renyi(1.0, 6), ELBO(6)),
        (Renyi(0.0, 6), IWAE(6)),
        (MIWAE(6, 1), IWAE(6)),
        (MIWAE(1, 6), ELBO(6)),
        (PIWAE(3, 2), IWAE(6)),
        (TVO(6, 1), ELBO(6)),
        (ReweightedWakeSleep(6), IWAE(6)),
        (ELBO(6, free_bits=-0.0), ELBO(6)),
        (InfoVAE(0.0, 1.0, num_particles=6), ELBO(6)),
    ]
    for ours, same in pairs:
        assert value(ours, model, guide, x) == pytest.approx(value(same, model, guide, x), abs=1e-10), ours
    for alpha, far in ((1 - 1e-4, 1e-3), (1 + 1e-4, 1e-3), (1e-4, 1e-3)):
        same = ELBO(6) if alpha > 0.5 else IWAE(6)
        assert value(Renyi(alpha, 6), model, guide, x) == pytest.approx(value(same, model, guide, x), abs=far)
    distinct = [ELBO(6), IWAE(6), Renyi(0.5, 6), CIWAE(0.5, 6), MIWAE(2, 3), MIWAE(3, 2), TVO(6, 2), TVO(6, 5)]
    values = sorted(value(o, model, guide, x) for o in distinct)
    assert min(b - a for a, b in itertools.pairwise(values)) > 1e-4


def test_bounds_are_reductions_of_the_weights(float64):
    """Groups of K follow one another in MIWAE; TVO's terms are means under tempered weights."""
    model, guide, x, _ = TWO.pair(5)
    MIWAE(2, 3).loss(model, guide, x)
    torch.manual_seed(1)
    t = terms(model, guide, x, 6)
    w, lw = t.log_weight.exp(), t.log_weight
    miwae = torch.stack([w[:2].mean(0), w[2:4].mean(0), w[4:].mean(0)]).log().mean(0)
    assert value(MIWAE(2, 3), model, guide, x) == pytest.approx(-float(miwae.sum()), abs=1e-10)
    renyi = w.pow(0.3).mean(0).log() / 0.3
    assert value(Renyi(0.7, 6), model, guide, x) == pytest.approx(-float(renyi.sum()), abs=1e-10)
    ends, tvo = [0.0, 0.1, 0.1**0.5, 1.0], torch.zeros(5)
    for low, high in itertools.pairwise(ends):
        tvo = tvo + (high - low) * (w**low / (w**low).sum(0) * lw).sum(0)
    assert value(TVO(6, 3, first=0.1), model, guide, x) == pytest.approx(-float(tvo.sum()), abs=1e-10)


def test_means_of_bounds_are_ordered_by_their_particles(float64):
    """E[ELBO] <= E[MIWAE(2, 3)] = E[IWAE_2] <= E[IWAE_6] <= E[IWAE_12] <= log p(x): gaps of many standard errors."""
    model, guide, x, _ = ONE.pair(40_000)
    p = ONE.points(ONE.leaves())
    log_px = float((p.log_mass + p.log_weight).logsumexp(0))
    bounds = [-value(o, model, guide, x) / len(x) for o in (ELBO(1), MIWAE(2, 3), IWAE(6), IWAE(12))]
    assert all(a < b for a, b in itertools.pairwise([*bounds, log_px + 1e-3])), bounds
    iwae2 = -value(IWAE(2), model, guide, x, seed=2) / len(x)
    assert bounds[1] == pytest.approx(iwae2, abs=0.03)  # standard error 0.005
    pyro.clear_param_store()
    model, guide, x, _ = ONE.pair(2000)
    tvo = [-value(TVO(200, n), model, guide, x) / len(x) for n in (1, 2, 8, 40)]
    assert all(a < b for a, b in itertools.pairwise([*tvo, log_px + 0.02])), tvo


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("name", ["modules", "params", "masked"])
def test_renyi_is_pyros_where_the_plate_has_no_scale(name, alpha, float64):
    model, guide, batch = PAIRS[name]()
    pyros = RenyiELBO(alpha=alpha, num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    same_as_pyro(Renyi(alpha, 3), pyros, model, guide, batch)
