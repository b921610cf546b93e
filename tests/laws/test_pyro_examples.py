"""Pyro's own examples go through `check`, `fit` and `log_marginal` as they stand, or get one true sentence."""

import math

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

from ppvae import check, fit, log_marginal
from ppvae.errors import PpvaeError
from ppvae.inference import terms
from tests.programs.pyro_examples import examples

EXAMPLES = examples()
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_taken_or_refused_in_one_sentence(name):
    e = examples()[name]
    pyro.clear_param_store()
    if not e.inspected:
        for attempt in (lambda: check(e.model, e.guide, e.data), lambda: fit(e.model, e.guide, e.data, epochs=1)):
            with pytest.raises(PpvaeError, match=e.refusal):
                attempt()
        return
    assert ("refused" in check(e.model, e.guide, e.data)) == bool(e.refusal)
    run = fit(e.model, e.guide, e.data, objective=e.objective, epochs=2, batch_size=e.batch_size, compile=False)
    assert math.isfinite(run.metrics["loss"])
    if e.refusal:
        with pytest.raises(PpvaeError, match=e.refusal):
            log_marginal(run.model, run.guide, e.data, num_particles=10, proposal="guide")
        return
    few, many = (log_marginal(run.model, run.guide, e.data, num_particles=k, proposal="guide") for k in (10, 100))
    assert bool(many.log_px.isfinite().all())
    assert few.elbo.mean() < many.log_px.mean()  # by Jensen's inequality, far beyond the noise of these examples


@pytest.mark.parametrize("name", [n for n, e in EXAMPLES.items() if e.inspected and not e.refusal])
def test_the_elbo_of_an_example_is_pyros(name):
    """Means over many draws of both; fails by chance once in 10^5."""
    e = examples()[name]
    pyro.clear_param_store()
    run = fit(e.model, e.guide, e.data, objective=e.objective, epochs=1, batch_size=e.batch_size, compile=False)
    torch.manual_seed(0)
    loss = TraceEnum_ELBO(max_plate_nesting=1) if isinstance(e.objective, TraceEnum_ELBO) else Trace_ELBO()
    with torch.no_grad():
        theirs = torch.tensor([loss.loss(run.model, run.guide, *e.data) for _ in range(100)]).double()
    est = log_marginal(run.model, run.guide, e.data, num_particles=100, proposal="guide")
    common = 80.0 if name.startswith("scanvi") else 1.0
    factor = 0.0
    if name == "scanvi, labelled":  # Pyro's loss counts the classification loss
        t = terms(run.model, run.guide, e.data, 100)
        factor = t.guide_factors.mean(0).sum().item()
    ours, mean = est.elbo.sum().item() - factor, -common * theirs.mean().item()
    std_error = common * theirs.std().item() / 100**0.5
    assert abs(ours - mean) < 5 * 2**0.5 * std_error + 1e-3 * abs(mean)
