"""Calls that a public function does not take: one sentence shows a call that works."""

import pytest
import torch

import ppvae
from ppvae.errors import UsageError
from ppvae.evaluation import compare
from ppvae.models import LinearGaussian

pair, x = LinearGaussian(3, 2), torch.randn(20, 3)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: ppvae.fit(pair), "missing a required argument: 'guide'"),
        (lambda: ppvae.fit(pair, x, epochs=1), "missing a required argument: 'data'"),
        (lambda: ppvae.fit(pair.model, pair.mean_field, x), "missing a required argument: 'epochs'"),
        (lambda: ppvae.fit(pair.model, pair.mean_field, x, epoch=1), "no argument 'epoch'; did you mean 'epochs'?"),
        (lambda: ppvae.fit(pair, pair.mean_field, x, epochs=1), "model: expected a Pyro function"),
        (lambda: ppvae.fit(pair.model, x, x, epochs=1), "guide: expected a Pyro function, found an object of Tensor"),
        (lambda: ppvae.log_marginal(pair, x), "missing a required argument: 'data'"),
        (lambda: ppvae.check(pair, x), "missing a required argument: 'data'"),
        (lambda: compare("one", "other"), "too many positional arguments"),
    ],
)
def test_a_wrong_call_shows_a_right_one(call, problem):
    with pytest.raises(UsageError) as raised:
        call()
    assert problem in str(raised.value)
    assert "Call it as" in str(raised.value)


def test_the_calls_that_are_shown_work():
    scope = {"vae": type("Pair", (), {"model": pair.model, "guide": pair.mean_field}), "x": x} | vars(ppvae)
    shown = []
    for call in (ppvae.fit, ppvae.check, ppvae.log_marginal):
        with pytest.raises(UsageError) as raised:
            call()
        shown.append(str(raised.value).split("Call it as ")[1])
        eval(shown[-1], scope | {call.__name__: call})
    assert shown[0] == "fit(vae.model, vae.guide, x, epochs=10)"


def test_compare_of_a_list_asks_for_names():
    with pytest.raises(UsageError, match=r"expected a dict, as .* found list"):
        compare([[], []])
