"""The audit of gradient estimators: bias against enumeration, variances against those of independent samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ppvae import VAE, evaluation, likelihoods, objectives, posteriors, priors
from ppvae.errors import ContractError, UsageError
from ppvae.objectives import ELBO, IWAE
from ppvae.objectives.gradients import GradientEstimator, ScoreFunction, StraightThrough, UnorderedSet
from ppvae.objectives.gradients.control_variates import NoBaseline
from tests.laws.gradients import samples
from tests.programs.discrete_toys import TOYS, one_hot_pair

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:the straight-through")]


def test_variance_and_signal_are_those_of_independent_estimates():
    """One datum: the variance of 200 steps is within half of that of 10,000 estimates (standard error 10 %)."""
    toy = TOYS["layers"]
    model, guide, x, _ = toy.pair(1)
    found = evaluation.gradients(model, guide, x, ELBO(2), ["vimco", "arms"], draws=200)
    assert found.estimators == ("vimco", "arms")
    assert set(found.variance) == {"c", "b", "model"}  # h is of both sites
    of = {"c": ("f", "g", "h"), "b": ("k", "h"), "model": toy.model_params}
    for i, name in enumerate(found.estimators):
        known = samples(toy, ELBO(2, gradient=name))
        for site, params in of.items():
            wanted = sum(float(known[n].var()) for n in params)
            assert float(found.variance[site][i]) == pytest.approx(wanted, rel=0.5)
            exact = sum(toy.gradient(1, lambda w: w.mean(0))[n] ** 2 for n in params) ** 0.5
            assert float(found.signal[site][i]) == pytest.approx(exact, rel=1e-6)
        assert not any(bool(b[i]) for b in found.biased.values())  # by chance with probability 3e-4


def test_a_biased_estimator_is_called_biased_and_a_wrong_one_of_the_user_too():
    class Doubled(GradientEstimator):
        def check_structure(self, objective, s):
            pass

        def surrogate(self, objective, call):
            t = call.terms(frozen=("latents",))
            return objective.bound(t).sum() * 2 - objective.bound(t).sum().detach()

    model, guide, x, _ = TOYS["vector"].pair(1)
    found = evaluation.gradients(
        model, guide, x, ELBO(2), {"st": StraightThrough(5.0), "own": Doubled(), "ok": "vimco"}, draws=300
    )
    assert found.biased["z"].tolist() == [True, True, False]
    assert found.biased["model"].tolist() == [False, True, False]
    assert float(found.bias["model"][1]) == pytest.approx(1.0, abs=0.2)  # twice the gradient
    assert "biased by" in found.table()["st"]
    assert "no bias found" in found.table()["ok"]


def vae() -> VAE:
    torch.manual_seed(0)
    nets = nn.Linear(3, 4), nn.Linear(4, 3)
    return VAE(priors.Bernoulli(3), likelihoods.Bernoulli(nets[0]), posteriors.Bernoulli(nets[1])).double()


def test_an_audit_leaves_the_pair_and_the_noise_as_they_were_and_is_repeatable():
    pair = vae()
    x = torch.ones(5, 4)
    before = {n: p.clone() for n, p in pair.named_parameters()}
    for p in pair.parameters():
        p.grad = torch.full_like(p, 7.0)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    estimators = ["relax", UnorderedSet(3), {"z": "double_cv"}]
    audits = [evaluation.gradients(pair.model, pair.guide, x, IWAE(2), estimators, draws=10)]
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(4)  # noise is a function of the seed of the audit
    audits.append(evaluation.gradients(pair.model, pair.guide, x, IWAE(2), estimators, draws=10))
    assert all(torch.equal(p, before[n]) for n, p in pair.named_parameters())
    assert all(bool((p.grad == 7).all()) for p in pair.parameters())
    assert audits[0].estimators == ("relax", "UnorderedSet(3)", "z: double_cv")
    assert all(torch.equal(audits[0].variance[s], audits[1].variance[s]) for s in audits[0].variance)


def test_it_is_saved_and_loaded(tmp_path):
    pair = vae()
    found = evaluation.gradients(pair.model, pair.guide, torch.ones(2, 4), ELBO(2), ["vimco"], draws=10)
    again = evaluation.GradientAudit.load(found.save(tmp_path))
    assert again.table() == found.table()
    assert torch.equal(again.variance["z"], found.variance["z"])


def test_reparameterised_latents_have_no_reference_and_refused_estimators_are_notes():
    model, guide, x, _ = TOYS["mixed"].pair(2)
    found = evaluation.gradients(model, guide, x, ELBO(2), ["pathwise", {"a": "arms", "z": "stl"}], draws=10)
    assert found.estimators == ("a: arms, z: stl",)
    assert found.bias["z"].isnan().all()
    assert any("'a'" in note and "pathwise" in note for note in found.notes)
    assert any("no bias is computed" in note and "'z'" in note for note in found.notes)


def test_what_cannot_be_audited_is_refused():
    from pyro.infer import Trace_ELBO

    pair, x = vae(), torch.ones(2, 4)
    for arguments, error, message in (
        ((Trace_ELBO(), ["vimco"]), UsageError, "Trace_ELBO.*objectives.ELBO"),
        ((ELBO, ["vimco"]), UsageError, "found the class ELBO. Take objectives.ELBO()"),
        ((ELBO(2), []), UsageError, "estimators"),
        ((ELBO(2), None), UsageError, "estimators: expected a list.* found None"),
        ((ELBO(2), "vimco"), UsageError, "estimators: expected a list.* found 'vimco'"),
        ((ELBO(2), ["vimco", "vimco"]), UsageError, "found vimco twice: pass a dict"),
        ((ELBO(2), ["pathwise"]), ContractError, "refuses every estimator"),
    ):
        with pytest.raises(error, match=message):
            evaluation.gradients(pair.model, pair.guide, x, *arguments)
    with pytest.raises(UsageError, match="at least 10"):
        evaluation.gradients(pair.model, pair.guide, x, ELBO(2), ["vimco"], draws=2)
    with pytest.raises(UsageError, match="expected one of"):
        objectives.ELBO(2).with_gradient("antithetic")


def test_it_measures_what_an_unbiased_estimator_without_baseline_loses():
    model, guide, x, _ = TOYS["bits"].pair(4)
    found = evaluation.gradients(
        model, guide, x, ELBO(4), {"none": ScoreFunction(NoBaseline()), "vargrad": "vargrad"}, draws=100
    )
    assert float(found.variance["a"][1]) < float(found.variance["a"][0])


def rarely(logit):
    """A pair whose guide draws the last two of four values with odds exp(logit), and a batch."""
    _, *pair = one_hot_pair(torch.tensor([0.0, 0.0, logit, logit]))
    return (*pair, torch.randn(3, 3))


def test_draws_too_rare_to_be_seen_make_no_bias():
    """Gradients of the rare values are zero in all steps, and their error as well."""
    unbiased = {"vimco": "vimco", "double_cv": "double_cv", "arms": "arms", "set": UnorderedSet(2)}
    found = evaluation.gradients(*rarely(-10.0), ELBO(2), unbiased, draws=100)
    assert not any(bool(of_site.any()) for of_site in found.biased.values())


def test_gradients_that_are_not_finite_are_named():
    class Broken(GradientEstimator):
        def check_structure(self, objective, s):
            pass

        def surrogate(self, objective, call):
            return objective.bound(call.terms(frozen=("latents",))).sum() * torch.nan

    found = evaluation.gradients(*rarely(0.0), ELBO(2), {"broken": Broken(), "ok": "vimco"}, draws=10)
    assert bool(found.bias["z"][0].isnan())
    assert "not finite" in found.table()["broken"]
    assert "not finite" not in found.table()["ok"]
