"""Toy pairs with rarer features: auxiliary sites, inner plates, masks, missing data, gamma latents, enumeration.

As in `toys`, the values of one particle are listed with densities written by hand, so that expectations are exact.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from tests.programs.toys import DATUM, Params, Points, Toy, bernoulli_log_prob, gauss_hermite, normal, normal_log_prob

# -- a helper in the guide, and a latent that is made of it -----------------------------------------------------------


def _helped_model(p: Params, x: Tensor) -> None:
    z = pyro.sample("z", dist.LogNormal(p["m"], p["s"].exp()))
    pyro.sample("x", normal(p["d"] * z, p["e"]), obs=x)


def _helped_guide(p: Params, x: Tensor) -> None:
    helper = pyro.sample("helper", normal(p["a"] * x, p["t"]), infer={"is_auxiliary": True})
    pyro.sample("z", dist.Delta(helper.exp(), log_density=-helper))


def _helped_points(p: Params) -> Points:
    noise, mass = gauss_hermite(40)
    u = p["a"] * DATUM + p["t"].exp() * noise
    log_prior, log_guide = normal_log_prob(u, p["m"], p["s"]) - u, normal_log_prob(u, p["a"] * DATUM, p["t"]) - u
    return Points(mass, normal_log_prob(torch.tensor(DATUM), p["d"] * u.exp(), p["e"]), log_prior, log_guide)


HELPED = Toy(
    ("m", "s", "d", "e"), ("a", "t"), {"m": 0.1, "s": -0.2, "d": 0.9, "e": 0.1, "a": 0.3, "t": -0.6},
    _helped_model, _helped_guide, _helped_points,
)  # fmt: skip


def _positive_guide(p: Params, x: Tensor) -> None:
    pyro.sample("z", dist.LogNormal(p["a"] * x, p["t"].exp()))


POSITIVE = replace(HELPED, guide=_positive_guide)

# -- two latents of a datum in an inner plate, below one that is its own ----------------------------------------------


def _inner_model(p: Params, x: Tensor) -> None:
    u = pyro.sample("u", normal(p["m"], p["s"]))
    with pyro.plate("parts", 2, dim=-2):
        z = pyro.sample("z", normal(p["c"] * u, p["r"]))
        pyro.sample("x", normal(z, p["e"]), obs=torch.stack([x, -x]))


def _inner_guide(p: Params, x: Tensor) -> None:
    u = pyro.sample("u", normal(p["a"] * x, p["t"]))
    with pyro.plate("parts", 2, dim=-2):
        pyro.sample("z", normal(p["g"] * torch.stack([x, -x]) + p["h"] * u, p["q"]))


def _inner_points(p: Params) -> Points:
    noise, mass = gauss_hermite(7)
    first, second, third = (n.reshape(-1) for n in torch.meshgrid(noise, noise, noise, indexing="ij"))
    mass = (mass[:, None, None] + mass[:, None] + mass).reshape(-1)
    u = p["a"] * DATUM + p["t"].exp() * first
    log_lik, log_prior, log_guide = 0.0, normal_log_prob(u, p["m"], p["s"]), normal_log_prob(u, p["a"] * DATUM, p["t"])
    for x, n in ((DATUM, second), (-DATUM, third)):
        loc = p["g"] * x + p["h"] * u
        z = loc + p["q"].exp() * n
        log_lik = log_lik + normal_log_prob(torch.tensor(x), z, p["e"])
        log_prior, log_guide = (
            log_prior + normal_log_prob(z, p["c"] * u, p["r"]),
            log_guide + normal_log_prob(z, loc, p["q"]),
        )
    return Points(mass, log_lik, log_prior, log_guide)


INNER = Toy(
    ("m", "s", "c", "r", "e"), ("a", "t", "g", "h", "q"),
    {"m": 0.2, "s": 0.1, "c": 0.7, "r": -0.1, "e": -0.1, "a": 0.2, "t": -0.2, "g": 0.5, "h": 0.3, "q": -0.4},
    _inner_model, _inner_guide, _inner_points,
)  # fmt: skip

# -- a datum that is missing by obs_mask, a latent and an observation that are masked out -----------------------------


def _gaps_model(p: Params, x: Tensor) -> None:
    there = torch.ones(len(x), dtype=torch.bool)
    z = pyro.sample("z", normal(p["m"], p["s"]))
    pyro.sample("x", normal(p["d"] * z, p["e"]), obs=x, obs_mask=there)
    pyro.sample("y", normal(z, p["e"]), obs=x, obs_mask=~there)
    with poutine.mask(mask=~there):
        extra = pyro.sample("extra", normal(z, p["s"]))
        pyro.sample("w", normal(extra, p["e"]), obs=x)


def _gaps_guide(p: Params, x: Tensor) -> None:
    z = pyro.sample("z", normal(p["a"] * x + p["b"], p["t"]))
    with poutine.mask(mask=torch.zeros(len(x), dtype=torch.bool)):
        pyro.sample("extra", normal(p["b"] * z, p["t"]))


def _gaps_points(p: Params) -> Points:
    noise, mass = gauss_hermite(28)
    loc = p["a"] * DATUM + p["b"]
    z = loc + p["t"].exp() * noise
    return Points(
        mass,
        normal_log_prob(torch.tensor(DATUM), p["d"] * z, p["e"]),
        normal_log_prob(z, p["m"], p["s"]),
        normal_log_prob(z, loc, p["t"]),
    )


GAPS = Toy(
    ("m", "s", "d", "e"), ("a", "b", "t"),
    {"m": 0.3, "s": 0.2, "d": 1.3, "e": -0.4, "a": 0.3, "b": 0.2, "t": -0.3},
    _gaps_model, _gaps_guide, _gaps_points,
)  # fmt: skip

# -- a rate whose counts are Poisson, and a gamma guide ---------------------------------------------------------------

COUNT = 2.0


def _gamma(shape: Tensor, rate: Tensor) -> dist.Gamma:
    return dist.Gamma(shape.exp(), rate.exp())


def _rate_model(p: Params, x: Tensor) -> None:
    z = pyro.sample("z", _gamma(p["u"], p["v"]))
    pyro.sample("x", dist.Poisson(p["d"].exp() * z), obs=torch.full_like(x, COUNT))


def _rate_guide(p: Params, x: Tensor) -> None:
    pyro.sample("z", _gamma(p["f"], p["g"]))


def _log_gamma(z: Tensor, shape: Tensor, rate: Tensor) -> Tensor:
    a = shape.exp()
    return a * rate + (a - 1) * z.log() - rate.exp() * z - torch.lgamma(a)


def _rate_points(p: Params) -> Points:
    log_z = torch.linspace(-7.0, 3.0, 200)  # the trapezoid rule, whose ends are nothing
    z, width = log_z.exp(), 10.0 / 199
    mean = p["d"].exp() * z
    log_guide = _log_gamma(z, p["f"], p["g"])
    log_lik = COUNT * mean.log() - mean - math.log(2)
    return Points(log_guide + log_z + math.log(width), log_lik, _log_gamma(z, p["u"], p["v"]), log_guide)


RATE = Toy(
    ("u", "v", "d"), ("f", "g"), {"u": 0.7, "v": 0.2, "d": 0.3, "f": 1.2, "g": 0.6},
    _rate_model, _rate_guide, _rate_points,
)  # fmt: skip

# -- a component that the model sums out, above a latent that the guide draws -----------------------------------------


def _summed_model(p: Params, x: Tensor) -> None:
    k = pyro.sample("k", dist.Bernoulli(logits=p["u"]), infer={"enumerate": "parallel"})
    z = pyro.sample("z", normal(p["v"] * k, p["s"]))
    pyro.sample("x", normal(z + k, p["e"]), obs=x)


def _summed_guide(p: Params, x: Tensor) -> None:
    pyro.sample("z", normal(p["a"] * x, p["t"]))


def _summed_points(p: Params) -> Points:
    noise, mass = gauss_hermite(28)
    z = p["a"] * DATUM + p["t"].exp() * noise
    joint = [
        bernoulli_log_prob(torch.tensor(k), p["u"])
        + normal_log_prob(z, p["v"] * k, p["s"])
        + normal_log_prob(torch.tensor(DATUM), z + k, p["e"])
        for k in (0.0, 1.0)
    ]
    nothing = torch.zeros_like(z)
    return Points(mass, torch.logaddexp(*joint), nothing, normal_log_prob(z, p["a"] * DATUM, p["t"]))


SUMMED = Toy(
    ("u", "v", "s", "e"), ("a", "t"), {"u": -0.3, "v": 1.2, "s": -0.1, "e": -0.2, "a": 0.4, "t": -0.3},
    _summed_model, _summed_guide, _summed_points,
)  # fmt: skip

# -- two layers, whose model takes its parameters from the guide ------------------------------------------------------


def _tied_model(p: Params, x: Tensor) -> None:
    z2 = pyro.sample("z2", normal(p["m"], p["t1"]))
    z1 = pyro.sample("z1", normal(p["g"] * z2, p["t2"]))
    pyro.sample("x", normal(z1, p["e"]), obs=x)


def _tied_guide(p: Params, x: Tensor) -> None:
    z1 = pyro.sample("z1", normal(p["a"] * x, p["t1"]))
    pyro.sample("z2", normal(p["g"] * z1, p["t2"]))


def _tied_points(p: Params) -> Points:
    noise, mass = gauss_hermite(18)
    first, second = (n.reshape(-1) for n in torch.meshgrid(noise, noise, indexing="ij"))
    z1 = p["a"] * DATUM + p["t1"].exp() * first
    z2 = p["g"] * z1 + p["t2"].exp() * second
    log_prior = normal_log_prob(z2, p["m"], p["t1"]) + normal_log_prob(z1, p["g"] * z2, p["t2"])
    log_guide = normal_log_prob(z1, p["a"] * DATUM, p["t1"]) + normal_log_prob(z2, p["g"] * z1, p["t2"])
    return Points(
        (mass[:, None] + mass).reshape(-1), normal_log_prob(torch.tensor(DATUM), z1, p["e"]), log_prior, log_guide
    )


TIED = Toy(
    ("m", "t1", "g", "t2", "e"), ("a", "t1", "g", "t2"),
    {"m": 0.2, "e": -0.2, "a": 0.5, "t1": -0.1, "g": 0.5, "t2": -0.2},
    _tied_model, _tied_guide, _tied_points,
)  # fmt: skip

# -- a category and, given it, a number of counts: no latent has a path -----------------------------------------------

_COUNTS = torch.arange(12, dtype=torch.float64)


def _counted_model(p: Params, x: Tensor) -> None:
    k = pyro.sample("k", dist.Categorical(logits=_three(p["u"])))
    n = pyro.sample("n", dist.Poisson((p["v"] + 0.3 * k).exp()))
    pyro.sample("x", normal(p["d"] * n - k, p["e"]), obs=x)


def _counted_guide(p: Params, x: Tensor) -> None:
    k = pyro.sample("k", dist.Categorical(logits=_three(p["f"])))
    pyro.sample("n", dist.Poisson((p["g"] * x + 0.2 * k).exp()))


def _three(u: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(u), u, -u], -1)


def _counted_points(p: Params) -> Points:
    k, n = (t.reshape(-1) for t in torch.meshgrid(_COUNTS[:3], _COUNTS, indexing="ij"))

    def of(logits: Tensor, log_rate: Tensor) -> Tensor:
        return _three(logits).log_softmax(-1)[k.long()] + n * log_rate - log_rate.exp() - torch.lgamma(n + 1)

    log_guide = of(p["f"], p["g"] * DATUM + 0.2 * k)
    log_lik = normal_log_prob(torch.tensor(DATUM), p["d"] * n - k, p["e"])
    return Points(log_guide, log_lik, of(p["u"], p["v"] + 0.3 * k), log_guide)


COUNTED = Toy(
    ("u", "v", "d", "e"), ("f", "g"), {"u": 0.3, "v": -0.2, "d": 0.8, "e": 0.6, "f": 0.4, "g": -0.3},
    _counted_model, _counted_guide, _counted_points,
)  # fmt: skip

WITH_PATHS = {
    "helped": HELPED,
    "inner": INNER,
    "gaps": GAPS,
    "rate": RATE,
    "summed": SUMMED,
    "tied": TIED,
    "positive": POSITIVE,
}
RARER = WITH_PATHS | {"counted": COUNTED}
