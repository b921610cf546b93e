"""Toy pairs with discrete latents, as in `tests.programs.toys`: exact references for gradients through their draws."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from tests.programs.toys import AFTER, BITS, DATUM, MIXED, Params, Points, Toy, bernoulli_log_prob, normal
from tests.programs.toys import normal_log_prob as log_normal

X = torch.tensor(DATUM, dtype=torch.float64)


def _values(*sizes: int) -> tuple[Tensor, ...]:
    """All joint values of latents with so many values each, [points] for each latent."""
    table = torch.tensor(list(itertools.product(*map(range, sizes))), dtype=torch.float64)
    return tuple(table.T)


# -- one bit ----------------------------------------------------------------------------------------------------------


def _bit_model(p: Params, x: Tensor) -> None:
    a = pyro.sample("a", dist.Bernoulli(logits=p["u"]))
    pyro.sample("x", normal(p["d"] * a, p["e"]), obs=x)


def _bit_guide(p: Params, x: Tensor) -> None:
    pyro.sample("a", dist.Bernoulli(logits=p["f"] * x + p["g"]))


def _bit_points(p: Params) -> Points:
    (a,) = _values(2)
    log_q = bernoulli_log_prob(a, (p["f"] * DATUM + p["g"]).expand(2))
    return Points(log_q, log_normal(X, p["d"] * a, p["e"]), bernoulli_log_prob(a, p["u"].expand(2)), log_q)


BIT = Toy(
    ("u", "d", "e"), ("f", "g"), {"u": -0.3, "d": 1.5, "e": -0.1, "f": -0.6, "g": -0.4},
    _bit_model, _bit_guide, _bit_points,
)  # fmt: skip


# -- a vector of bits, whose likelihood is not additive ---------------------------------------------------------------

VECTOR_PARAMS = ("u", "v", "d", "e")
_VECTOR = {"u": -0.3, "v": 0.8, "d": 1.5, "e": 0.1, "f": 0.9, "g": -1.6, "h": 0.2}


def _vector_loc(p: Params, z: Tensor) -> Tensor:
    return p["d"] * (z[..., 0] + 2 * z[..., 1] * z[..., 2]) - z[..., 1] + p["v"] * z[..., 2]


def _vector_prior(p: Params) -> Tensor:
    return torch.stack([p["u"], p["v"], p["u"] * p["v"]], -1)


def _vector_logits(p: Params) -> Tensor:
    return torch.stack([p["f"] * DATUM, p["g"], p["h"]], -1)


def _vector_model(p: Params, x: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(logits=_vector_prior(p)).to_event(1))
    pyro.sample("x", normal(_vector_loc(p, z), p["e"]), obs=x)


def _vector_guide(p: Params, x: Tensor) -> None:
    pyro.sample("z", dist.Bernoulli(logits=_vector_logits(p)).to_event(1))


def _vector_points(p: Params) -> Points:
    z = torch.stack(_values(2, 2, 2), -1)
    log_q = bernoulli_log_prob(z, _vector_logits(p)).sum(-1)
    prior = bernoulli_log_prob(z, _vector_prior(p)).sum(-1)
    return Points(log_q, log_normal(X, _vector_loc(p, z), p["e"]), prior, log_q)


VECTOR = Toy(VECTOR_PARAMS, ("f", "g", "h"), _VECTOR, _vector_model, _vector_guide, _vector_points)


# -- the same bits in an inner plate, and with one of them masked and not read ----------------------------------------


def _plate_model(p: Params, x: Tensor) -> None:
    with pyro.plate("inner", 3, dim=-2):
        z = pyro.sample("z", dist.Bernoulli(logits=_vector_prior(p).T))
    pyro.sample("x", normal(_vector_loc(p, z.movedim(-2, -1).unsqueeze(-3)), p["e"]), obs=x)


def _plate_guide(p: Params, x: Tensor) -> None:
    with pyro.plate("inner", 3, dim=-2):
        pyro.sample("z", dist.Bernoulli(logits=_vector_logits(p).T))


PLATE = replace(VECTOR, model=_plate_model, guide=_plate_guide)
_KEPT = torch.tensor([True, True, False])


def _masked_loc(p: Params, z: Tensor) -> Tensor:
    return p["d"] * (z[..., 0] + 2 * z[..., 1] * z[..., 0]) - z[..., 1]


def _masked_model(p: Params, x: Tensor) -> None:
    with pyro.plate("inner", 3, dim=-2):
        z = pyro.sample("z", dist.Bernoulli(logits=_vector_prior(p).T).mask(_KEPT[:, None]))
    pyro.sample("x", normal(_masked_loc(p, z.movedim(-2, -1).unsqueeze(-3)), p["e"]), obs=x)


def _masked_guide(p: Params, x: Tensor) -> None:
    with pyro.plate("inner", 3, dim=-2):
        pyro.sample("z", dist.Bernoulli(logits=_vector_logits(p).T).mask(_KEPT[:, None]))


def _masked_points(p: Params) -> Points:
    z = torch.stack(_values(2, 2), -1)
    log_q = bernoulli_log_prob(z, _vector_logits(p)[:2]).sum(-1)
    prior = bernoulli_log_prob(z, _vector_prior(p)[:2]).sum(-1)
    return Points(log_q, log_normal(X, _masked_loc(p, z), p["e"]), prior, log_q)


MASKED = Toy(
    VECTOR_PARAMS, ("f", "g", "h"), _VECTOR, _masked_model,
    _masked_guide, _masked_points,
)  # fmt: skip


# -- the same bits, whose prior is the guide at another datum: model and guide share parameters -----------------------


def _shared_prior(p: Params) -> Tensor:
    return torch.stack([-0.4 * p["f"], p["g"], p["h"]], -1)


def _shared_model(p: Params, x: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(logits=_shared_prior(p)).to_event(1))
    pyro.sample("x", normal(_vector_loc(p, z), p["e"]), obs=x)


def _shared_points(p: Params) -> Points:
    z = torch.stack(_values(2, 2, 2), -1)
    log_q = bernoulli_log_prob(z, _vector_logits(p)).sum(-1)
    prior = bernoulli_log_prob(z, _shared_prior(p)).sum(-1)
    return Points(log_q, log_normal(X, _vector_loc(p, z), p["e"]), prior, log_q)


SHARED_BITS = Toy(
    ("v", "d", "e", "f", "g", "h"), ("f", "g", "h"), {n: v for n, v in _VECTOR.items() if n != "u"},
    _shared_model, _vector_guide, _shared_points,
)  # fmt: skip


# -- one of four values, as a number and as a one-hot vector; given it, a bit -----------------------------------------


def _loc(p: Params, c: Tensor) -> Tensor:
    return p["d"] * c * (c - 2) + p["v"] * c


def _prior_logits(p: Params) -> Tensor:
    return torch.stack([p["u"], torch.zeros_like(p["u"]), -p["u"], 0.5 * p["v"]], -1)


def _guide_logits(p: Params) -> Tensor:
    return torch.stack([p["f"] * DATUM, torch.zeros_like(p["f"]), p["g"], p["h"]], -1)


def _category_model(p: Params, x: Tensor) -> None:
    c = pyro.sample("c", dist.Categorical(logits=_prior_logits(p)))
    pyro.sample("x", normal(_loc(p, c.double()), p["e"]), obs=x)


def _category_guide(p: Params, x: Tensor) -> None:
    pyro.sample("c", dist.Categorical(logits=_guide_logits(p)))


def _category_points(p: Params) -> Points:
    (c,) = _values(4)
    log_q = _guide_logits(p).log_softmax(-1)
    return Points(log_q, log_normal(X, _loc(p, c), p["e"]), _prior_logits(p).log_softmax(-1), log_q)


_CATEGORY = {"u": -0.3, "v": 0.8, "d": 0.7, "e": 0.1, "f": 0.6, "g": -0.4, "h": 0.3}
CATEGORY = Toy(("u", "v", "d", "e"), ("f", "g", "h"), _CATEGORY, _category_model, _category_guide, _category_points)


def _one_hot_loc(p: Params, c: Tensor) -> Tensor:
    return (c * torch.stack([_loc(p, torch.full_like(p["d"], float(i))) for i in range(4)], -1)).sum(-1)


def _one_hot_model(p: Params, x: Tensor) -> None:
    c = pyro.sample("c", dist.OneHotCategorical(logits=_prior_logits(p)))
    pyro.sample("x", normal(_one_hot_loc(p, c), p["e"]), obs=x)


def _one_hot_guide(p: Params, x: Tensor) -> None:
    pyro.sample("c", dist.OneHotCategorical(logits=_guide_logits(p)))


ONE_HOT = Toy(CATEGORY.model_params, CATEGORY.guide_params, _CATEGORY, _one_hot_model, _one_hot_guide, _category_points)


def _straight_through_guide(p: Params, x: Tensor) -> None:
    pyro.sample("c", dist.OneHotCategoricalStraightThrough(logits=_guide_logits(p)))


STRAIGHT_THROUGH = replace(ONE_HOT, guide=_straight_through_guide)


# -- the same, of which two values are impossible: their logits are -inf in model and guide ---------------------------

_POSSIBLE = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf], dtype=torch.float64)


def _two_of_four_model(p: Params, x: Tensor) -> None:
    c = pyro.sample("c", dist.OneHotCategorical(logits=_prior_logits(p) + _POSSIBLE))
    pyro.sample("x", normal(_one_hot_loc(p, c), p["e"]), obs=x)


def _two_of_four_guide(p: Params, x: Tensor) -> None:
    pyro.sample("c", dist.OneHotCategorical(logits=_guide_logits(p) + _POSSIBLE))


def _two_of_four_points(p: Params) -> Points:
    c = 2 * _values(2)[0]
    log_q = _guide_logits(p)[::2].log_softmax(-1)
    return Points(log_q, log_normal(X, _loc(p, c), p["e"]), _prior_logits(p)[::2].log_softmax(-1), log_q)


TWO_OF_FOUR = replace(ONE_HOT, model=_two_of_four_model, guide=_two_of_four_guide, points=_two_of_four_points)


# -- a bit given a value, as a number and as a one-hot vector ---------------------------------------------------------


def _layers_model(p: Params, x: Tensor) -> None:
    b = pyro.sample("b", dist.Bernoulli(logits=p["v"]))
    c = pyro.sample("c", dist.Categorical(logits=_prior_logits(p) * (1 + b[..., None])))
    pyro.sample("x", normal(_loc(p, c.double()) - b, p["e"]), obs=x)


def _layers_guide(p: Params, x: Tensor) -> None:
    c = pyro.sample("c", dist.Categorical(logits=_guide_logits(p)))
    pyro.sample("b", dist.Bernoulli(logits=p["k"] * (c.double() - 1) + p["h"]))


def _layers_points(p: Params) -> Points:
    c, b = _values(4, 2)
    log_c = _guide_logits(p).log_softmax(-1)[c.long()]
    log_q = log_c + bernoulli_log_prob(b, p["k"] * (c - 1) + p["h"])
    prior = (_prior_logits(p) * (1 + b[:, None])).log_softmax(-1)[torch.arange(8), c.long()]
    prior = prior + bernoulli_log_prob(b, p["v"].expand(8))
    return Points(log_q, log_normal(X, _loc(p, c) - b, p["e"]), prior, log_q)


LAYERS = Toy(
    ("u", "v", "d", "e"), ("f", "g", "h", "k"), {**_CATEGORY, "k": 0.7}, _layers_model, _layers_guide, _layers_points
)


def _one_hot_layers_model(p: Params, x: Tensor) -> None:
    b = pyro.sample("b", dist.Bernoulli(logits=p["v"]))
    c = pyro.sample("c", dist.OneHotCategorical(logits=_prior_logits(p) * (1 + b[..., None])))
    pyro.sample("x", normal(_one_hot_loc(p, c) - b, p["e"]), obs=x)


def _one_hot_layers_guide(p: Params, x: Tensor) -> None:
    c = pyro.sample("c", dist.OneHotCategorical(logits=_guide_logits(p)))
    number = (c * torch.arange(4.0)).sum(-1)
    pyro.sample("b", dist.Bernoulli(logits=p["k"] * (number - 1) + p["h"]))


ONE_HOT_LAYERS = replace(LAYERS, model=_one_hot_layers_model, guide=_one_hot_layers_guide)


def one_hot_pair(offset: Tensor) -> tuple[nn.Module, Callable[[Tensor], None], Callable[[Tensor], None]]:
    """(encoder, model, guide): one of four values, whose logits have an offset in the guide; of the type of that."""
    torch.manual_seed(0)
    encoder, decoder = (nn.Linear(*sizes, dtype=offset.dtype) for sizes in ((3, 4), (4, 3)))
    prior = torch.where(offset == -torch.inf, offset, 0.0)  # no value that the guide leaves out

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(logits=prior))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.OneHotCategorical(logits=encoder(x) + offset))

    return encoder, model, guide


TOYS = {
    "bit": BIT, "vector": VECTOR, "shared": SHARED_BITS, "category": CATEGORY, "one hot": ONE_HOT, "layers": LAYERS,
    "straight through": STRAIGHT_THROUGH, "two of four": TWO_OF_FOUR, "one-hot layers": ONE_HOT_LAYERS,
    "plate": PLATE, "masked": MASKED, "bits": BITS, "mixed": MIXED, "after": AFTER,
}  # fmt: skip
