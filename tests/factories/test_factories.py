"""The library's factories take every part by the name of its class, or say why they cannot."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from torch import Tensor

from ppvae import check, likelihoods, nn, posteriors, priors, terms
from ppvae.errors import ContractError, UsageError
from ppvae.factories.constructor_flags import ClassChoice, class_choice, constructor_arguments, is_command_line_type
from ppvae.factories.pairs import build, parameters
from ppvae.models import conv_vae, vae
from ppvae.models.factories import Part

ROLES = ("prior", "likelihood", "posterior")
CHOICES: dict[str, ClassChoice] = {role: choice for role in ROLES if (choice := class_choice(parameters(vae)[role][0]))}
PARTS = [(role, name) for role in ROLES for name in CHOICES[role].classes]
NUMBERS = {
    "classes": 3,
    "variables": 2,
    "rank": 2,
    "components": 5,
    "levels": 2,
    "steps": 1,
}  # small, where it is taken
PARTNERS = {  # parts that the default other side does not fit
    ("prior", "AutoregressiveCategorical"): "Categorical",
    ("prior", "AutoregressiveOneHot"): "OneHot",
    ("prior", "UniformOnSphere"): "PowerSpherical",
    ("posterior", "PowerSpherical"): "UniformOnSphere",
    ("posterior", "VonMisesFisher"): "UniformOnSphere",
    **{(role, name): name for role in ("prior", "posterior")
       for name in ("Bernoulli", "Categorical", "Dirichlet", "LogisticNormal", "OneHot", "RelaxedBernoulli",
                    "RelaxedOneHot")},
}  # fmt: skip
CANNOT = {  # what needs something that the factory cannot know, and what the error says
    ("prior", "GaussianProcess"): "second tensor",  # positions of a sequence
    ("likelihood", "Multinomial"): "second tensor",  # the total of each datum
    ("likelihood", "Mixed"): "'columns' cannot be given on the command line",  # the kind of each column of a table
    ("posterior", "PerDatum"): "the index of each datum",
    ("posterior", "Mixture"): "'components' cannot be given on the command line",
}


def own(role: str, name: str) -> dict[str, Any]:
    """A part as the command line writes it down, small."""
    flags = CHOICES[role].flags(CHOICES[role].constructor(name, role))
    return {"name": name} | {n: v for n, v in NUMBERS.items() if n in flags}


def pair_of(role: str, name: str, factory: Any, x: Tensor) -> tuple[Any, Any]:
    chosen = {role: own(role, name)}
    if (role, name) in PARTNERS:
        other = "posterior" if role == "prior" else "prior"
        chosen[other] = own(other, PARTNERS[role, name])
    hidden = (8,) if factory is vae else 8
    small = {} if factory is vae else {"channels": (2, 4)}
    return build(factory, {"latent": 3, "hidden": hidden, **small, **chosen}, x, num_labels=4)


def data_for(name: str, *event: int) -> Tensor:
    x = (torch.rand(12, *event, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    return 0.25 + x / 2 if name == "Beta" else x


@pytest.mark.parametrize(("role", "name"), PARTS)
def test_every_part_by_name(role: str, name: str) -> None:
    x, labels = data_for(name, 64), torch.arange(12) % 4
    torch.manual_seed(0)
    if (role, name) in CANNOT:
        with pytest.raises(UsageError, match=CANNOT[role, name]) as error:
            pair_of(role, name, vae, x)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
        return
    model, guide = pair_of(role, name, vae, x)
    assert type(getattr(model.__self__, role)).__name__ == name
    if name == "Delta":
        with pytest.raises(ContractError, match="absolutely continuous"):
            terms(model, guide, (x, labels), 2)
        return
    t = terms(model, guide, (x, labels), 2)
    assert t.log_weight.shape == (2, 12)
    assert bool(torch.isfinite(t.log_weight).all())
    assert f"{role}: {name}, a distribution over event" in check(model, guide, (x, labels))


@pytest.mark.parametrize("name", [n for role, n in PARTS if role == "likelihood" and (role, n) not in CANNOT])
def test_every_likelihood_of_images_by_name(name: str) -> None:
    x = data_for(name, 1, 8, 8)
    torch.manual_seed(0)
    model, guide = pair_of("likelihood", name, conv_vae, x)
    assert bool(torch.isfinite(terms(model, guide, (x, torch.zeros(12).long()), 2).log_weight).all())


def test_nothing_is_on_the_list_that_does_not_exist() -> None:
    assert set(CANNOT) <= set(PARTS)
    assert len(PARTS) > 50


@pytest.mark.parametrize(("role", "name"), PARTS)
def test_every_flag_has_a_help_text(role: str, name: str) -> None:
    if "cannot be given on the command line" in CANNOT.get((role, name), ""):
        pytest.skip("it cannot be made on the command line")
    for flag, (kind, _, text) in CHOICES[role].flags(CHOICES[role].constructor(name, role)).items():
        assert text, flag
        assert is_command_line_type(kind)


def test_parts_in_python_are_constructors_and_partial_ones() -> None:
    x = data_for("", 64)
    torch.manual_seed(0)
    made = vae(
        x,
        prior=functools.partial(priors.VampPrior.from_data, components=7),
        likelihood=functools.partial(likelihoods.DiscretizedLogistic, levels=2),
        posterior=functools.partial(posteriors.IAF, flows=1, features=5),
    )
    assert made.prior.posterior is made.posterior
    assert len(made.posterior.maps) == 1
    # pseudo-inputs start at different rows of the data
    nearest = torch.cdist(made.prior.pseudo_inputs, x).min(1)
    assert float(nearest.values.detach().max()) < 0.2
    assert len(nearest.indices.unique()) == 7
    widths = [layer.out_features for layer in made.posterior.net if hasattr(layer, "out_features")]
    assert widths[-1] == 2 * 8 + 5


def test_the_defaults_are_what_they_were() -> None:
    x = data_for("", 64)
    torch.manual_seed(3)
    made = vae(x, latent=2, hidden=(5,))
    torch.manual_seed(3)
    decoder = nn.mlp(2, 64, hidden=(5,))
    nn.set_output_bias(decoder, torch.logit(x.double().mean(0).clamp(0.001, 0.999)))
    encoder = nn.mlp(64, 4, hidden=(5,))
    expected = [*decoder.parameters(), *encoder.parameters()]
    for p, q in zip(made.parameters(), expected, strict=True):
        assert torch.equal(p, q)


def test_z_is_of_the_size_that_the_prior_has() -> None:
    made = vae(
        data_for("", 64), prior=functools.partial(priors.OneHot, classes=3, variables=2), posterior=posteriors.Delta
    )
    assert made.likelihood.net[0].in_features == 6
    assert made.posterior.net[-1].out_features == 6
    flow = vae(data_for("", 64), prior=functools.partial(priors.Normal, latent=5), posterior=posteriors.IAF)
    assert (flow.posterior.latent, flow.likelihood.net[0].in_features) == (5, 5)
    with pytest.raises(
        UsageError, match=r"posterior OneHot: classes: expected a divisor of the latent's size 6, found 4"
    ):
        vae(
            data_for("", 64),
            prior=functools.partial(priors.OneHot, classes=3, variables=2),
            posterior=functools.partial(posteriors.OneHot, classes=4),
        )


def test_labels_are_asked_for() -> None:
    with pytest.raises(UsageError, match=r"prior ConditionalNormal\.of_labels: .*--labels"):
        vae(data_for("", 64), prior=priors.ConditionalNormal.of_labels)
    made = vae(data_for("", 64), prior=priors.ConditionalNormal.of_labels, num_labels=6)
    assert made.prior.net.num_embeddings == 6


def test_check_tells_the_parts_and_nothing_inside_them() -> None:
    x = data_for("", 64)
    prior = functools.partial(priors.VampPrior.from_data, components=7)
    made = vae(x, latent=3, hidden=(8,), prior=prior, posterior=posteriors.IAF)
    told = [line for line in check(made.model, made.guide, x).splitlines() if " parameters. " in line]
    numbers = [sum(p.numel() for p in part.parameters()) for part in made.children()]
    prior_, likelihood_, posterior_ = told
    assert prior_.startswith(
        f"prior: VampPrior, a distribution over event [3] in real, {numbers[0]} parameters. The mix"
    )
    assert likelihood_ == (
        f"likelihood: Bernoulli, a distribution over event [64] in {{0, 1}}, {numbers[1]} parameters. "
        "Independent Bernoulli pixels, log p(x | z) = sum_d x_d l_d - softplus(l_d), l = net(z)."
    )
    assert posterior_.startswith(f"posterior: IAF, a distribution over event [3] in real, {numbers[2]} parameters. Inv")


def test_parts_that_are_made_of_each_other() -> None:
    with pytest.raises(UsageError, match=r"VampPrior.* SemiAmortized"):
        vae(data_for("", 64), prior=priors.VampPrior.from_data, posterior=posteriors.SemiAmortized)


def test_what_a_part_says_of_its_arguments_names_the_part() -> None:
    with pytest.raises(UsageError, match=r"^posterior LowRank: rank: expected at least 1, found 0$"):
        vae(data_for("", 64), posterior=functools.partial(posteriors.LowRank, rank=0))
    with pytest.raises(UsageError, match=r"^posterior LowRank: .*rank"):
        vae(data_for("", 64), posterior=posteriors.LowRank)
    with pytest.raises(UsageError, match=r"^likelihood Autoregressive: .*classes"):
        vae(
            data_for("", 64),
            prior=functools.partial(priors.Categorical, classes=3),
            likelihood=likelihoods.Autoregressive,
            posterior=functools.partial(posteriors.Categorical, classes=3),
        )


def test_a_table_with_gaps() -> None:
    x = data_for("", 6)
    x[::2, 1] = math.nan
    made = vae(x, missing=True, likelihood=likelihoods.Normal)
    assert bool(torch.isfinite(made.posterior(x).mean).all())
    assert bool(torch.isfinite(vae(x, missing=True).likelihood.net[-1].bias).all())


# The catalogue of parts


CATALOGUE = tomllib.loads((Path(__file__).parents[2] / "docs" / "catalogue" / "parts.toml").read_text())
ROWS = {  # (room, part): its reference
    (room, name): f" {entry['reference']} "
    for room in ("priors", "likelihoods", "posteriors", "nn")
    for name, entry in CATALOGUE[room].items()
}


def test_the_catalogue_has_every_part_with_the_source_of_its_docstring() -> None:
    rooms = {"prior": "priors", "likelihood": "likelihoods", "posterior": "posteriors"}
    assert {(rooms[role], name) for role, name in PARTS} == {row for row in ROWS if row[0] != "nn"}
    for (room, name), reference in ROWS.items():
        told = " ".join((inspect.getdoc(getattr(importlib.import_module(f"ppvae.{room}"), name)) or "").split())
        sources = reference.split(";")
        assert all(sources), (room, name)
        for source in sources:
            said = re.findall(r"^ \w+|\b(?:19|20)\d\d(?=,|\b *$)|\d{4}\.\d{4,5}", source)  # author, year, arXiv id
            assert len(said) in (2, 3), source
            assert [word for word in said if word.strip() not in told] == [], (name, source)


# Choosing by name


class Shape:
    """A shape.

    Args:
        sides: how many.
        lengths, names: of each side.
        solver: how it is found.
    """

    def __init__(self, sides: int, lengths: tuple[float, ...] = (1.0,), names=("a",), solver=functools.reduce):
        self.sides = sides


class Hidden(Shape):
    """A shape of which nothing can be said in flags."""

    def __init__(self, within: Shape, latent: int):
        super().__init__(latent)

    @classmethod
    def alone(cls, latent: int, depth: int = 2):
        """One that can."""
        return cls(Shape(depth), latent)


class Closed:
    """What `Shut` alone is of."""


class Shut(Closed):
    """What no flags can make."""

    def __init__(self, within: Shape):
        self.within = within


HERE = ClassChoice((__name__,), Shape, given=("latent",))


def test_names_are_looked_up_in_the_module() -> None:
    assert set(HERE.classes) == {"Hidden"}  # and not the class that all are of
    assert HERE.constructor("Hidden", "shape") == Hidden.alone
    assert HERE.constructor("Hidden.alone", "shape") == Hidden.alone
    assert list(HERE.flags(Hidden.alone)) == ["depth"]
    with pytest.raises(UsageError, match=r"--shape: no class 'Hiden' .*did you mean 'Hidden'"):
        HERE.constructor("Hiden", "shape")
    with pytest.raises(UsageError, match=r"--shape: Hidden has no classmethod 'alne'"):
        HERE.constructor("Hidden.alne", "shape")
    with pytest.raises(UsageError, match=r"--shape Shut: its argument 'within' cannot be given"):
        ClassChoice((__name__,), Closed).constructor("Shut", "shape")


def test_arguments_come_from_signature_and_docstring() -> None:
    found = constructor_arguments(Shape)
    assert {n: text for n, (_, _, text) in found.items()} == {
        "sides": "how many.", "lengths": "of each side.", "names": "of each side.", "solver": "how it is found."
    }  # fmt: skip
    assert found["names"][:2] == (tuple, ("a",))
    assert [is_command_line_type(kind) for kind, _, _ in found.values()] == [True, True, False, False]


def test_a_factory_of_ones_own_chooses_by_name_too() -> None:
    def factory(train: Tensor, net: Annotated[Part, ClassChoice(("ppvae.nn",), torch.nn.Module)] = nn.Gated):
        return (lambda x: net(), lambda x: net())

    model, _ = build(factory, {"net": {"name": "Gated", "inputs": 3, "outputs": 4}}, None)
    assert model(None).value.in_features == 3
