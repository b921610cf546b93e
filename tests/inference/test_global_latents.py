"""Terms of pairs with global latents: per-datum weights given the global latents, and the global latents' own ratio."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuide, AutoGuideList, AutoMultivariateNormal, AutoNormal

from ppvae.errors import ContractError
from ppvae.inference import inspect, terms
from tests.programs.conjugate import CONJUGATE, MIXING, TRIALS, mixture, regression
from tests.programs.strangers import PAIRS


@pytest.fixture(autouse=True)
def _empty_store():
    pyro.clear_param_store()
    torch.manual_seed(0)


@pytest.mark.parametrize("name", CONJUGATE)
@pytest.mark.parametrize("draws", [None, 3])
def test_the_joint_weight_is_the_sum_of_local_and_global_ones(name, draws):
    c = CONJUGATE[name]()
    t = terms(*c.pair, c.batch, 4, global_draws=draws)
    s, k, n = (4, 1, len(c.batch[0])) if draws is None else (3, 4, len(c.batch[0]))
    assert t.local_log_weight.shape == (s, k, n)
    assert t.global_log_ratio.shape == (s,)
    joint = t.local_log_weight.sum(-1) + t.global_log_ratio[:, None]
    torch.testing.assert_close(t.log_weight, joint.reshape(-1, 1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dependent", [True, False])
def test_local_and_global_weights_of_a_regression_are_those_written_by_hand(dependent):
    c = regression(dependent=dependent)
    y, f = c.batch
    t = terms(*c.pair, c.batch, 5, global_draws=2)
    w, z = t.guide["w"].value.reshape(10, 1, 2), t.guide["z"].value
    assert bool((w.unflatten(0, (2, 5)) == w.unflatten(0, (2, 5))[:, :1]).all())  # five particles share a draw
    assert len(w.unique(dim=0)) == 2
    assert len(z.unique(dim=0)) == 10
    p = dist.Normal((w * f).sum(-1), 0.8).log_prob(z) + dist.Normal(z, 0.5).log_prob(y)
    share, center = 0.64 / 0.89, (w * f).sum(-1) if dependent else f @ pyro.param("w_mean")
    q = dist.Normal(share * y + (1 - share) * center, 1.3 * (share * 0.25) ** 0.5).log_prob(z)
    torch.testing.assert_close(t.local_log_weight, (p - q).unflatten(0, (2, 5)), rtol=0, atol=1e-10)
    p = dist.Normal(torch.zeros(2).double(), 1.5).to_event(1).log_prob(w[::5, 0])
    q = dist.MultivariateNormal(pyro.param("w_mean"), scale_tril=pyro.param("w_tril")).log_prob(w[::5, 0])
    torch.testing.assert_close(t.global_log_ratio, p - q, rtol=0, atol=1e-10)


@pytest.mark.parametrize("in_plate", [False, True])
def test_enumerated_local_latents_are_summed_out_for_each_datum(in_plate):
    c = mixture(in_plate)
    t = terms(*c.pair, c.batch, 4)
    p = t.guide["p"].value.reshape(4, 2, 1)
    by_component = (
        dist.Binomial(TRIALS, p).log_prob(c.batch[0]) + torch.tensor(MIXING, dtype=torch.float64).log()[:, None]
    )
    torch.testing.assert_close(t.local_log_weight[:, 0], by_component.logsumexp(1), rtol=0, atol=1e-10)


def test_the_scale_of_a_batch_is_that_of_its_own_size():
    c = regression()
    s = inspect(*c.pair, [t[:5] for t in c.batch])
    for rows in (1, 4, 12):
        t = terms(*c.pair, [t[:rows] for t in c.batch], 3, structure=s)
        assert t.scale == pytest.approx(12 / rows)
        assert t.local_log_weight.shape == (3, 1, rows)


def test_local_terms_of_a_pair_without_global_latents_are_its_terms():
    model, guide, batch = PAIRS["modules"]()
    t = terms(model, guide, batch, 3)
    assert t.local is t


# -- pairs whose data have no weights of their own --------------------------------------------------------------------

X = torch.randn(6, generator=torch.Generator().manual_seed(1))


def model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def local_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.8 * x, 0.5))


def after_local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.8 * x, 0.5))
    pyro.sample("loc", dist.Normal(z.mean(-1, keepdim=True)[..., 0], 0.5))


def reads_rows(x):
    pyro.sample("loc", dist.Normal(x.mean(), 0.5))
    local_guide(x)


def by_number(x):
    pyro.sample("loc", dist.Normal(0.0, len(x) ** -0.5))
    local_guide(x)


def point_at_local(x):
    pyro.sample("loc", dist.Normal(0.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(0.8 * x))


def point_at_global(x):
    pyro.sample("loc", dist.Delta(torch.tensor(0.3)))
    local_guide(x)


def coupled(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z - z.mean(-1, keepdim=True), 0.5), obs=x)


def summed_out(x):
    k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor([0.0, 1.0])[k], 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def image_beside_a_local_density(x):
    """z is an image of a helper that all data share, whatever other latents are."""
    helper = dist.MultivariateNormal(torch.zeros(len(x) + 1), 0.3 * torch.eye(len(x) + 1))
    a = pyro.sample("a", helper, infer={"is_auxiliary": True})
    pyro.sample("loc", dist.Delta(a[..., 0]))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(a[..., 1:] if a.dim() == 1 else a[..., 0, 1:]))
        e = pyro.sample("e", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("u", dist.Delta(0.3 * x + e))


def two_locals(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        z, u = pyro.sample("z", dist.Normal(loc, 1.0)), pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + u, 0.5), obs=x)


REFUSED = {
    "guided after the local ones": (model, after_local, r"'loc'.*depends on a local latent.*before the local ones"),
    "images of one helper": (model, AutoMultivariateNormal(model), r"'z'.*image of.*AutoGuideList"),
    "an image beside a density": (two_locals, image_beside_a_local_density, r"'z'.*image of 'a'.*AutoGuideList"),
    "a point mass on a local one": (model, point_at_local, r"'z'.*Delta \(point mass\)"),
    "coupled data": (coupled, AutoNormal(model), r"'x'.*depends on its own row alone"),
    "summed out": (summed_out, local_guide, r"'k'.*summed out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_pair_without_local_weights_says_why(name):
    program, guide, message = REFUSED[name]
    guide(X)
    s = inspect(program, guide, X, weights=False)
    assert s.has_global_latents
    with pytest.raises(ContractError, match=message):
        terms(program, guide, X, structure=s).local  # noqa: B018
    assert torch.isfinite(terms(program, guide, X, structure=s).log_weight).all()


def scaled_by_rows(x):
    loc = pyro.sample("loc", dist.Normal(0.0, x.std()))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def own_subsample(x):
    with pyro.plate("data", len(x), subsample_size=4) as i:
        loc = x[i].mean(-1)
    pyro.sample("loc", dist.Normal(loc, 0.5))


def of_a_subsample(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x), subsample_size=4) as i:
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x[i])


@pytest.mark.parametrize("pair", [(scaled_by_rows, point_at_global), (of_a_subsample, own_subsample)])
def test_a_prior_and_a_guide_of_a_subsample_that_read_rows_are_told(pair):
    s = inspect(*pair, X, weights=False)
    assert s.local_refusal == ""
    assert s.globals_read_rows
    assert "the density of a global latent depends on the rows" in "\n".join(s.description)


class LocalGuide(AutoGuide):
    """An amortised part of an AutoGuideList, whose plates it uses."""

    def forward(self, x):
        with self._create_plates(x)["data"]:
            return {"z": pyro.sample("z", dist.Normal(0.8 * x, 0.5))}


def auto_list():
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, hide=["z"])))
    guide.append(LocalGuide(model))
    return guide


def auto_delta_last():
    guide = AutoGuideList(model)
    guide.append(LocalGuide(model))
    guide.append(AutoDelta(poutine.block(model, hide=["z"])))
    return guide


def composed():
    auto = AutoMultivariateNormal(poutine.block(model, hide=["z"]))

    def guide(x):
        auto(x)
        local_guide(x)

    return guide


GUIDES = {
    "reads rows": lambda: reads_rows, "by their number": lambda: by_number, "point": lambda: point_at_global,
    "list": auto_list, "AutoDelta": auto_delta_last, "composed": composed,
}  # fmt: skip


@pytest.mark.parametrize("name", GUIDES)
def test_a_pair_with_local_weights_has_them_whatever_the_guide_of_its_global_latents(name):
    guide = GUIDES[name]()
    guide(X)
    s = inspect(model, guide, X, weights=False)
    assert s.local_refusal == ""
    assert s.globals_read_rows == (name in ("reads rows", "by their number"))
    assert bool(s.weights_refusal) == (name in ("point", "AutoDelta"))
    t = terms(model, guide, X, 3, structure=s, global_draws=2)
    loc, z = t.guide["loc"].value.reshape(6, 1), t.guide["z"].value
    p, q = dist.Normal(loc, 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(X), dist.Normal(0.8 * X, 0.5).log_prob(z)
    torch.testing.assert_close(t.local.log_weight, (p - q).double(), rtol=0, atol=1e-4)
    if s.weights_refusal:  # log q of a point is zero
        expected = -0.5 * (loc[::3, 0] / 2) ** 2 - math.log(2) - 0.5 * math.log(2 * math.pi)
        torch.testing.assert_close(t.global_log_ratio, expected.double(), rtol=0, atol=1e-5)
