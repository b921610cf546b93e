"""Toy pairs whose expectations over the guide are finite sums: exact references for gradient estimators.

A toy's parameters are numbers. `Toy.pair(size)` gives each of `size` equal data its own copy of them, so that one run
of an objective gives `size` independent estimates of the gradient. `Toy.points` lists the values of one particle (all
discrete values, quadrature nodes of continuous ones) with their probabilities and log-densities, written by hand.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

DATUM = 0.8  # the datum
Params = dict[str, Tensor]


@dataclass(frozen=True)
class Points:
    """The possible values of one particle: log-probability, log p(x | z), log p(z), log q(z), each [points]."""

    log_mass: Tensor
    log_lik: Tensor
    log_prior: Tensor
    log_guide: Tensor

    @property
    def log_weight(self) -> Tensor:
        return self.log_lik + self.log_prior - self.log_guide


@dataclass(frozen=True)
class Toy:
    model_params: tuple[str, ...]
    guide_params: tuple[str, ...]
    values: dict[str, float]
    model: Callable[[Params, Tensor], None]
    guide: Callable[[Params, Tensor], None]
    points: Callable[[Params], Points]

    def pair(self, size: int):
        """(model, guide, batch, parameters [size] by name), all in float64."""
        store = {n: torch.nn.Parameter(torch.full((size,), v, dtype=torch.float64)) for n, v in self.values.items()}

        def side(body, names):
            def run(x):
                params = {n: pyro.param(f"toy.{n}", store[n]) for n in names}
                with pyro.plate("data", len(x)):
                    body(params, x)

            return run

        batch = torch.full((size,), DATUM, dtype=torch.float64)
        return side(self.model, self.model_params), side(self.guide, self.guide_params), batch, store

    def leaves(self) -> Params:
        return {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in self.values.items()}

    def expectation(self, count: int, of: Callable[[Points, tuple[Tensor, ...]], Tensor], params: Params) -> Tensor:
        """The sum over all `count`-tuples of draws of their probability times of(points, indices), which is
        [count, tuples] or [tuples]."""
        points = self.points(params)
        n = len(points.log_mass)
        indices = tuple(torch.tensor(i) for i in zip(*itertools.product(range(n), repeat=count), strict=True))
        mass = sum(points.log_mass[i] for i in indices).exp()
        return (mass * of(points, indices)).sum()

    def gradient(
        self, count: int, reduce: Callable[[Tensor], Tensor], weigh=lambda p: p.log_weight
    ) -> dict[str, float]:
        """d/dparams E[reduce(log-weights [count, tuples])]."""
        params = self.leaves()
        total = self.expectation(count, lambda p, i: reduce(torch.stack([weigh(p)[k] for k in i])), params)
        grads = torch.autograd.grad(total, list(params.values()))
        return {n: float(g) for n, g in zip(params, grads, strict=True)}


def normal_log_prob(value: Tensor, loc: Tensor | float, log_scale: Tensor) -> Tensor:
    return -0.5 * ((value - loc) / log_scale.exp()) ** 2 - log_scale - 0.5 * math.log(2 * math.pi)


def gauss_hermite(count: int) -> tuple[Tensor, Tensor]:
    """(nodes, log-weights) of Gauss-Hermite quadrature for a standard normal."""
    noise, weight = np.polynomial.hermite_e.hermegauss(count)
    return torch.tensor(noise), torch.tensor(weight / weight.sum()).log()


def bernoulli_log_prob(value: Tensor, logits: Tensor) -> Tensor:
    return value * logits - torch.nn.functional.softplus(logits)


def normal(loc: Tensor, log_scale: Tensor) -> dist.Normal:
    return dist.Normal(loc, log_scale.exp())


# -- one layer --------------------------------------------------------------------------------------------------------


def _one_model(p: Params, x: Tensor) -> None:
    z = pyro.sample("z", normal(p["m"], p["s"]))
    pyro.sample("x", normal(p["d"] * z, p["e"]), obs=x)


def _one_guide(p: Params, x: Tensor) -> None:
    pyro.sample("z", normal(p["a"] * x + p["b"], p["t"]))


def _one_points(p: Params, count: int = 28, detach: bool = False) -> Points:
    noise, mass = gauss_hermite(count)
    loc = p["a"] * DATUM + p["b"]
    z = loc + p["t"].exp() * noise
    z = z.detach() if detach else z
    return Points(
        mass,
        normal_log_prob(torch.tensor(DATUM), p["d"] * z, p["e"]),
        normal_log_prob(z, p["m"], p["s"]),
        normal_log_prob(z, loc, p["t"]),
    )


ONE = Toy(
    ("m", "s", "d", "e"), ("a", "b", "t"),
    {"m": 0.3, "s": 0.2, "d": 1.3, "e": -0.4, "a": 0.3, "b": 0.2, "t": -0.3},
    _one_model, _one_guide, _one_points,
)  # fmt: skip
DETACHED = replace(ONE, points=functools.partial(_one_points, detach=True))  # samples without a gradient path
COARSE = replace(ONE, points=functools.partial(_one_points, count=13))  # for expectations over many draws


# -- one layer, whose prior is the guide at a pseudo-input (VampPrior): model and guide share parameters --------------

PSEUDO = -0.4


def _vamp_model(p: Params, x: Tensor) -> None:
    z = pyro.sample("z", normal(p["a"] * PSEUDO + p["b"], p["t"]))
    pyro.sample("x", normal(p["d"] * z, p["e"]), obs=x)


def _vamp_points(p: Params) -> Points:
    noise, mass = gauss_hermite(28)
    loc = p["a"] * DATUM + p["b"]
    z = loc + p["t"].exp() * noise
    prior = normal_log_prob(z, p["a"] * PSEUDO + p["b"], p["t"])
    return Points(
        mass, normal_log_prob(torch.tensor(DATUM), p["d"] * z, p["e"]), prior, normal_log_prob(z, loc, p["t"])
    )


SHARED = Toy(
    ("a", "b", "t", "d", "e"), ("a", "b", "t"), {"d": 1.3, "e": -0.4, "a": 0.3, "b": 0.2, "t": -0.1},
    _vamp_model, _one_guide, _vamp_points,
)  # fmt: skip


# -- two layers, the guide from below ---------------------------------------------------------------------------------


def _two_model(p: Params, x: Tensor) -> None:
    z2 = pyro.sample("z2", normal(p["m"], p["s2"]))
    z1 = pyro.sample("z1", normal(p["c"] * z2, p["s1"]))
    pyro.sample("x", normal(p["d"] * z1, p["e"]), obs=x)


def _two_guide(p: Params, x: Tensor) -> None:
    z1 = pyro.sample("z1", normal(p["a"] * x, p["t1"]))
    pyro.sample("z2", normal(p["g"] * z1, p["t2"]))


def _two_points(p: Params) -> Points:
    noise, mass = gauss_hermite(18)
    first, second = (n.reshape(-1) for n in torch.meshgrid(noise, noise, indexing="ij"))
    z1 = p["a"] * DATUM + p["t1"].exp() * first
    z2 = p["g"] * z1 + p["t2"].exp() * second
    log_prior = normal_log_prob(z2, p["m"], p["s2"]) + normal_log_prob(z1, p["c"] * z2, p["s1"])
    log_guide = normal_log_prob(z1, p["a"] * DATUM, p["t1"]) + normal_log_prob(z2, p["g"] * z1, p["t2"])
    mass = (mass[:, None] + mass).reshape(-1)
    return Points(mass, normal_log_prob(torch.tensor(DATUM), p["d"] * z1, p["e"]), log_prior, log_guide)


TWO = Toy(
    ("m", "s2", "c", "s1", "d", "e"), ("a", "t1", "g", "t2"),
    {"m": 0.3, "s2": 0.1, "c": 0.7, "s1": -0.3, "d": 1.2, "e": -0.2, "a": 0.5, "t1": -0.3, "g": 0.4, "t2": -0.2},
    _two_model, _two_guide, _two_points,
)  # fmt: skip


# -- two binary latents, the second given the first -------------------------------------------------------------------


def _bits_model(p: Params, x: Tensor) -> None:
    a = pyro.sample("a", dist.Bernoulli(logits=p["u"]))
    b = pyro.sample("b", dist.Bernoulli(logits=p["v"] * a - 0.2))
    pyro.sample("x", normal(p["d"] * a - b, p["e"]), obs=x)


def _bits_guide(p: Params, x: Tensor) -> None:
    a = pyro.sample("a", dist.Bernoulli(logits=p["f"] * x))
    pyro.sample("b", dist.Bernoulli(logits=p["g"] + p["h"] * a))


def _bits_points(p: Params) -> Points:
    a, b = torch.tensor([[0.0, 0, 1, 1], [0, 1, 0, 1]], dtype=torch.float64)
    log_prior = bernoulli_log_prob(a, p["u"].expand(4)) + bernoulli_log_prob(b, p["v"] * a - 0.2)
    log_guide = bernoulli_log_prob(a, (p["f"] * DATUM).expand(4)) + bernoulli_log_prob(b, p["g"] + p["h"] * a)
    return Points(log_guide, normal_log_prob(torch.tensor(DATUM), p["d"] * a - b, p["e"]), log_prior, log_guide)


BITS = Toy(
    ("u", "v", "d", "e"), ("f", "g", "h"), {"u": -0.3, "v": 0.8, "d": 1.5, "e": -0.1, "f": 0.4, "g": 0.3, "h": -0.7},
    _bits_model, _bits_guide, _bits_points,
)  # fmt: skip


# -- a binary latent and, given it, one with a path; and the other way round ------------------------------------------


def _mixed_model(p: Params, x: Tensor) -> None:
    a = pyro.sample("a", dist.Bernoulli(logits=p["u"]))
    z = pyro.sample("z", normal(p["v"] * a, p["s"]))
    pyro.sample("x", normal(z, p["e"]), obs=x)


def _mixed_guide(infer):
    def guide(p: Params, x: Tensor) -> None:
        a = pyro.sample("a", dist.Bernoulli(logits=p["f"] * x), infer=infer)
        pyro.sample("z", normal(p["g"] * x + p["h"] * a, p["t"]))

    return guide


def _mixed_points(p: Params) -> Points:
    noise, mass = gauss_hermite(16)
    a = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None].expand(2, 16).reshape(-1)
    noise = noise.repeat(2)
    loc = p["g"] * DATUM + p["h"] * a
    z = loc + p["t"].exp() * noise
    log_a = bernoulli_log_prob(a, (p["f"] * DATUM).expand(32))
    log_prior = bernoulli_log_prob(a, p["u"].expand(32)) + normal_log_prob(z, p["v"] * a, p["s"])
    return Points(
        mass.repeat(2) + log_a,
        normal_log_prob(torch.tensor(DATUM), z, p["e"]),
        log_prior,
        log_a + normal_log_prob(z, loc, p["t"]),
    )


_MIXED = {"u": -0.3, "v": 1.2, "s": -0.1, "e": -0.2, "f": 0.6, "g": 0.4, "h": 0.5, "t": -0.4}
MIXED = Toy(("u", "v", "s", "e"), ("f", "g", "h", "t"), _MIXED, _mixed_model, _mixed_guide({}), _mixed_points)
ENUMERATED = Toy(
    ("u", "v", "s", "e"), ("f", "g", "h", "t"), _MIXED, _mixed_model, _mixed_guide({"enumerate": "parallel"}),
    _mixed_points,
)  # fmt: skip


def _after_guide(p: Params, x: Tensor) -> None:
    z = pyro.sample("z", normal(p["g"] * x, p["t"]))
    pyro.sample("a", dist.Bernoulli(logits=p["f"] * z + p["h"]))


def _after_points(p: Params) -> Points:
    noise, mass = gauss_hermite(16)
    a = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None].expand(2, 16).reshape(-1)
    z = p["g"] * DATUM + p["t"].exp() * noise.repeat(2)
    log_a = bernoulli_log_prob(a, p["f"] * z + p["h"])
    log_prior = bernoulli_log_prob(a, p["u"].expand(32)) + normal_log_prob(z, p["v"] * a, p["s"])
    log_guide = log_a + normal_log_prob(z, p["g"] * DATUM, p["t"])
    return Points(mass.repeat(2) + log_a, normal_log_prob(torch.tensor(DATUM), z, p["e"]), log_prior, log_guide)


AFTER = Toy(("u", "v", "s", "e"), ("f", "g", "h", "t"), _MIXED, _mixed_model, _after_guide, _after_points)
