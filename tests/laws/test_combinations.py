"""Every prior with every likelihood and posterior: what fits trains and gives log p(x), what does not says why.

What fits is read off the parts: prior and posterior live in one space, and at most one part wants a context.
"""

from __future__ import annotations

import inspect
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ppvae import VAE, fit, likelihoods, log_marginal, posteriors, priors
from ppvae.errors import ContractError, PpvaeError
from ppvae.inference import check
from tests.laws.parts import FEATURES, LATENT, LIKELIHOODS, POINT, POSTERIORS, PRIORS, Nets, net

ROWS, CLASSES = 6, 3


class Combination(NamedTuple):
    prior: str
    likelihood: str
    posterior: str


def by_class(parts: dict[str, Any], make: Callable[[Any], torch.nn.Module]) -> dict[str, Any]:
    """The first constructor of each class, by the name of the class."""
    first: dict[str, Any] = {}
    for part in parts.values():
        torch.manual_seed(0)
        first.setdefault(type(make(part)).__name__, part)
    return first


OF_PRIOR = by_class(PRIORS, lambda p: p.make(LATENT))
OF_LIKELIHOOD = by_class(LIKELIHOODS, lambda p: p.make(Nets((FEATURES,))))
OF_POSTERIOR = by_class({**POSTERIORS, **POINT}, lambda p: p.make(LATENT))
EVERY = [Combination(*names) for names in itertools.product(OF_PRIOR, OF_LIKELIHOOD, OF_POSTERIOR)]


def test_every_class_of_a_room_is_combined() -> None:
    for room, found in ((priors, OF_PRIOR), (likelihoods, OF_LIKELIHOOD), (posteriors, OF_POSTERIOR)):
        classes = {
            n for n in room.__all__ if inspect.isclass(cls := getattr(room, n)) and issubclass(cls, torch.nn.Module)
        }
        assert set(found) == classes


# ------------------------------------------------------------------------------------------------------- what fits


@cache
def context_of(part: str, room: str) -> Tensor | None:
    """The batch's second tensor as the part wants it, [ROWS, ...]."""
    if part == "PerDatum":
        return torch.arange(ROWS)
    if part == "GaussianProcess":
        return torch.linspace(0, 1, LATENT).expand(ROWS, LATENT)
    if room == "likelihood":
        total = OF_LIKELIHOOD[part].context
        return None if total is None else torch.full((ROWS,), total)
    label = (OF_PRIOR if room == "prior" else OF_POSTERIOR)[part].context
    return None if label is None else label.expand(ROWS)


def wanting(c: Combination) -> list[str]:
    """The parts that want a context of their own."""
    return [room for room, part in zip(c._fields, c, strict=True) if context_of(part, room) is not None]


def space(fn: Any) -> tuple[Any, ...]:
    support = fn.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return tuple(fn.event_shape), bool(support.is_discrete), str(support).removesuffix("()").removesuffix("Vector")


@cache
def spaces(prior: str, posterior: str) -> tuple[Any, ...]:
    """Where z lives under the prior and under the posterior."""
    p, q = OF_PRIOR[prior].make(LATENT), OF_POSTERIOR[posterior].make(LATENT)
    if hasattr(p, "relaxed") and hasattr(q, "discrete"):
        p = p.relaxed()
    given = {} if (context := context_of(posterior, "posterior")) is None else {"context": context}
    of_posterior = space(q(torch.zeros(ROWS, FEATURES), **given))
    if prior == "VampPrior":  # lives where its posterior does
        return (None if given or posterior == "Delta" else of_posterior), of_posterior
    given = {} if (context := context_of(prior, "prior")) is None else {"context": context}
    return space(p(**given)), of_posterior


def fits(c: Combination) -> bool:
    of_prior, of_posterior = spaces(c.prior, c.posterior)
    return of_prior == of_posterior and len(wanting(c)) <= 1


@cache
def fitting() -> dict[Combination, bool]:
    return {c: fits(c) for c in EVERY}


def covering(combinations: list[Combination]) -> Iterator[Combination]:
    """Few combinations in which every two parts that go together at all do so once, the greediest first."""

    def pairs(c: Combination) -> set[tuple[tuple[str, str], ...]]:
        return set(itertools.combinations(zip(c._fields, c, strict=True), 2))

    open_ = set().union(*map(pairs, combinations))
    for wanted in (3, 2, 1):
        for c in combinations:
            if len(pairs(c) & open_) >= wanted:
                open_ -= pairs(c)
                yield c


# ------------------------------------------------------------------------------------------------------ the tests


def composed(c: Combination) -> tuple[VAE, tuple[Tensor, ...]]:
    """The pair and data [ROWS, FEATURES] drawn from its likelihood, with the context that one of its parts wants."""
    torch.manual_seed(0)
    prior, posterior = OF_PRIOR[c.prior].make(LATENT), OF_POSTERIOR[c.posterior].make(LATENT)
    shape, *_ = spaces(c.prior, c.posterior)[1]
    z = torch.rand(ROWS, *shape)
    integers = c.posterior == "Categorical"
    z = z.mul(CLASSES).long() if integers else z
    case = OF_LIKELIHOOD[c.likelihood]
    likelihood = case.make(Nets((FEATURES,), shape[0], CLASSES if integers else 0))
    contexts = [context_of(part, room) for room, part in zip(c._fields, c, strict=True)]
    with torch.no_grad():
        x = likelihood(z, **{k: v.float() for k, v in case.given(ROWS).items()}).sample()
    if c.prior == "VampPrior":
        encoder = posteriors.DiagonalNormal(posterior.net) if c.posterior == "SemiAmortized" else posterior
        prior = priors.VampPrior(encoder, torch.rand(2, FEATURES))
    if c.posterior == "SemiAmortized":
        posterior = posteriors.SemiAmortized(net(2 * LATENT), prior, likelihood, steps=1, num_particles=2)
    given = [t for t in contexts if t is not None]
    return VAE(prior, likelihood, posterior), (x, *given[-1:])


def trains_and_estimates(c: Combination) -> None:
    vae, data = composed(c)
    run = fit(vae.model, vae.guide, data, epochs=1, batch_size=3, progress=False)
    assert torch.tensor([run.metrics["loss"], run.metrics["grad_norm"]]).isfinite().all()
    for name, p in vae.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.isfinite().all()), name
    pair = getattr(vae, "discrete", vae)
    if c.posterior == "Delta":
        with pytest.raises(ContractError, match=r"'z'.*Delta"):
            log_marginal(vae.model, vae.guide, data, num_particles=5, progress=False, proposal="guide")
        return
    est = log_marginal(pair.model, pair.guide, data, num_particles=5, progress=False, proposal="guide")
    assert bool(est.log_px.isfinite().all())
    assert not est.lower_bound_only


def refusal(c: Combination) -> str:
    try:
        vae, data = composed(c)
        check(vae.model, vae.guide, data)
    except (PpvaeError, ValueError) as error:
        return str(error)
    raise AssertionError("expected a refusal, found none")


def says_why_not(c: Combination) -> None:
    text = refusal(c)
    assert "\n" not in text
    assert len(text) < 400
    assert "could not run" not in text
    assert any(part in text for part in c), text
    of_prior, of_posterior = spaces(c.prior, c.posterior)
    if of_prior != of_posterior and len(wanting(c)) < 2:
        assert c.prior in text, text  # with Relaxed before it where the VAE has relaxed it
        assert c.posterior in text, text


def run_through(combinations: list[Combination], record_property: Callable[[str, object], None]) -> None:
    for c in combinations:
        try:
            (trains_and_estimates if fitting()[c] else says_why_not)(c)
        except BaseException as error:
            error.add_note(f"in the combination {c}")
            raise
    for name, parts in zip(("priors", "likelihoods", "posteriors"), zip(*combinations, strict=True), strict=True):
        record_property(name, sorted(set(parts)))
    for word, good in (("fitting", True), ("refused", False)):
        record_property(word, [" ".join(c) for c in combinations if fitting()[c] == good])
        record_property(f"all {word}", sum(v == good for v in fitting().values()))


@pytest.mark.parametrize("prior", OF_PRIOR)
def test_every_two_parts_together(prior: str, record_property: Callable[[str, object], None]) -> None:
    chosen = [c for c in covering([c for c in EVERY if fitting()[c]]) if c.prior == prior]
    refused = [c for c in covering([c for c in EVERY if not fitting()[c]]) if c.prior == prior]
    run_through(chosen + refused, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("prior", OF_PRIOR)
def test_every_combination(prior: str, record_property: Callable[[str, object], None]) -> None:
    run_through([c for c in EVERY if c.prior == prior], record_property)


def test_the_rule_and_the_cover() -> None:
    """Some combinations whose answer is known, and that no pair of parts is left out."""
    known = {
        ("StandardNormal", "Bernoulli", "DiagonalNormal"): True,
        ("StandardNormal", "Bernoulli", "OneHot"): False,
        ("OneHot", "Poisson", "OneHot"): True,
        ("Categorical", "Mixed", "Categorical"): True,
        ("Bernoulli", "Bernoulli", "RelaxedBernoulli"): True,
        ("Dirichlet", "Multinomial", "LogisticNormal"): True,
        ("UniformOnSphere", "Normal", "DiagonalNormal"): False,
        ("ConditionalNormal", "Normal", "IAF"): True,
        ("ConditionalNormal", "Normal", "PerDatum"): False,
        ("VampPrior", "Normal", "OneHot"): True,
        ("VampPrior", "Normal", "Delta"): False,
    }
    assert {c: fitting()[Combination(*c)] for c in known} == known
    for good in (True, False):
        every = [c for c in EVERY if fitting()[c] == good]
        few = list(covering(every))
        together: dict[bool, set[Any]] = defaultdict(set)
        for which, some in ((True, every), (False, few)):
            for c in some:
                together[which] |= {(i, j, c[i], c[j]) for i, j in ((0, 1), (0, 2), (1, 2))}
        assert together[True] == together[False]
        assert len(few) < len(every) / 3
