"""Calls without arguments, and functions of the user's own that are no such functions: one sentence each."""

from __future__ import annotations

import functools
import inspect
import re

import pytest
import torch

from ppvae import check, evaluation, fit, generate, log_marginal, objectives, terms
from ppvae.errors import UsageError
from ppvae.models import LinearGaussian

PAIR = LinearGaussian(3, 2)
X = torch.zeros(20, 3)
FUNCTIONS = {
    f"{room.__name__}.{name}": getattr(room, name)
    for room in (evaluation, generate)
    for name in room.__all__
    if inspect.isfunction(getattr(room, name))
    and next(iter(inspect.signature(getattr(room, name)).parameters)) == "model"
} | {"fit": fit, "terms": terms, "log_marginal": log_marginal}


def test_functions_of_pairs_are_found():
    assert len(FUNCTIONS) > 20


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_call_says_how_the_function_is_called(name):
    function, plain = FUNCTIONS[name], name.rpartition(".")[2]
    for call in (function, functools.partial(function, PAIR.model, PAIR.guide)):
        with pytest.raises(UsageError, match=rf"^{plain}: expected {plain}\(model, guide, .*, found a call without"):
            call()
    with pytest.raises(UsageError, match=r"without .*\. Pass a pair as pair\.model, pair\.guide$"):
        function(PAIR)


def test_the_words():
    cases = (
        (lambda: check(PAIR, X), "check: expected check(model, guide, data), found a call without data. Pass"),
        (lambda: fit(PAIR, PAIR.guide, X, epochs=1),
         "fit: model: expected a Pyro function, found an object of LinearGaussian. Pass a pair as pair.model, pair"),
        (lambda: log_marginal(PAIR.model, X, X), "guide: expected a Pyro function, found an object of Tensor"),
        (lambda: evaluation.compare("one", "other"), "found a call with too many positional arguments"),
        (lambda: fit(PAIR, X, epochs=1),
         "fit: expected fit(model, guide, data, epochs=...), found a call without data"),
        (lambda: fit(PAIR.model, PAIR.guide, X), "(model, guide, data, epochs=...), found a call without epochs"),
        (lambda: fit(PAIR.model, PAIR.guide, X, epoch=1), "found epoch=; did you mean 'epochs'?"),
        (lambda: log_marginal(PAIR.model, PAIR.guide), "log_marginal(model, guide, data), found a call without data"),
        (lambda: log_marginal(PAIR.model, PAIR.guide, X, 3), "found a call with too many positional arguments"),
    )  # fmt: skip
    for call, words in cases:
        with pytest.raises(UsageError, match=re.escape(words)):
            call()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"scheduler": 3}, "scheduler: expected a function of the optimizer, as .* found an object of int"),
        ({"optimizer": lambda params: None}, "optimizer: expected .* found one that gives an object of NoneType"),
        ({"optimizer": functools.partial(torch.optim.Adam, lr=-1.0)}, "optimizer: it cannot be made .Invalid learning"),
        ({"optimizer": functools.partial(torch.optim.Adam, lr="a")}, "optimizer: it cannot be made "),
        ({"callbacks": [lambda: None]}, r"callbacks: expected a list of functions of \(run, metrics\)"),
        ({"callbacks": [lambda run: None]}, r"callbacks: expected a list of functions of \(run, metrics\)"),
    ],
)  # fmt: skip
def test_functions_of_the_users_own(given, words):
    with pytest.raises(UsageError, match=words):
        fit(PAIR.model, PAIR.mean_field, X, epochs=1, **given)


@pytest.mark.parametrize("value", [None, "1", b"x", [1.0], {}, {1}, 1j, 10**400, torch.ones(2), len])
def test_a_schedule_that_gives_no_number(value):
    with pytest.raises(UsageError, match=r"schedule: expected a number at step 0, found "):
        objectives.ELBO(beta=lambda step: value)
    objectives.ELBO(beta=lambda step: torch.tensor(0.5))


def test_compare_of_a_list_asks_for_names():
    with pytest.raises(UsageError, match=r"expected a dict, as .* found list"):
        evaluation.compare([[], []])
