"""Terms of plain Pyro pairs against a reference that evaluates one datum and one particle at a time."""

import functools
import itertools
import logging
import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.poutine.subsample_messenger import _Subsample
from torch import nn

from ppvae import check, log_marginal
from ppvae.evaluation import annealed
from ppvae.inference import ParticlePlacement, inspect, simulate, terms
from ppvae.models import LinearGaussian
from tests.programs.strangers import DATASET_SIZE, PAIRS, SIZE, hierarchy

K = 3
LAYOUTS = ("vectorized", "folded", "one by one")
DRAWS_SUBSAMPLE = ("indexes", "local_params")  # their plate draws the rows
PER_DATUM_PARAMS = ("auto_normal",)  # a parameter for every datum: the datum must stay where it is
GLOBAL_LATENT = ("shared_latent",)
GUIDE_ENUMERATED = ("semi_supervised", "enumerated_both")


pytestmark = pytest.mark.usefixtures("float64")


def prepare_pair(name):
    """(model, guide, batch, structure, index) of a pair with its modules in eval mode and its parameters registered."""
    model, guide, batch = PAIRS[name]()
    structure = inspect(model, guide, batch)
    with poutine.trace(param_only=True):
        terms(model, guide, batch, structure=replace(structure, layout=ParticlePlacement.ONE_BY_ONE))
    for fn in (model, guide):
        for cell in getattr(fn, "__closure__", None) or ():
            if isinstance(cell.cell_contents, nn.Module):
                cell.cell_contents.eval()
    index = torch.tensor([7, 2, 9, 0]) if name in DRAWS_SUBSAMPLE else None
    return model, guide, batch, structure, index


def one_by_one_terms(model, guide, batch, structure, index, **options):
    return terms(
        model,
        guide,
        batch,
        K,
        structure=replace(structure, layout=ParticlePlacement.ONE_BY_ONE),
        index=index,
        **options,
    )


def sampled_values(t):
    """The values that the guide sampled, by site; enumerated sites left out."""
    return {n: s.value for n, s in t.guide.items() if s.role != "enumerated"}


# -- one datum, one particle ------------------------------------------------------------------------------------------


def sample_nodes(fn, args):
    """The sample sites of one run of a function, without plates and deterministic sites."""
    nodes = poutine.trace(fn).get_trace(*args).nodes.items()
    return {
        n: node for n, node in nodes
        if node["type"] == "sample" and not isinstance(node["fn"], _Subsample)
        and not node["infer"].get("_deterministic")
    }  # fmt: skip


def pyro_log_probs(fn, args, values, pick):
    """Pyro's log-densities of one run at given latents, {site: pick(log_prob)}, with masks and without scales."""
    trace = poutine.trace(poutine.condition(fn, data=values)).get_trace(*args)
    trace.compute_log_prob()
    out = {}
    for name, node in trace.nodes.items():
        sampled = node["type"] == "sample" and not isinstance(node["fn"], _Subsample)
        if sampled and not name.endswith("_unobserved") and not node["infer"].get("_deterministic"):
            out[name] = pick(node["log_prob"]) / node["scale"]
    return out


def single_datum_log_probs(name, model, guide, batch, structure, rows, values, b):
    """(model, guide) log-densities by site of datum b alone, at latents of shape [*inner, 1, *event]."""
    if name in GLOBAL_LATENT:
        return pyro_log_probs(model, batch, values, torch.sum), pyro_log_probs(guide, batch, values, torch.sum)
    if name in DRAWS_SUBSAMPLE:  # the plate takes the same datum over and over
        taken = poutine.Trace()
        same = torch.full((len(rows),), int(rows[b]))
        taken.add_node(structure.plate, name=structure.plate, type="sample", is_observed=False, value=same, infer={})
        values = {n: v.expand(len(rows), *v.shape[1:]) for n, v in values.items()}
        model, guide = poutine.replay(model, trace=taken), poutine.replay(guide, trace=taken)
        return tuple(pyro_log_probs(fn, batch, values, lambda t: t.sum() / len(rows)) for fn in (model, guide))
    if name in PER_DATUM_PARAMS:  # other data and their latents are replaced by something else
        args = [torch.where((torch.arange(SIZE) == b).reshape(-1, *(1,) * (t.dim() - 1)), t, 2 - t) for t in batch]
        full = {}
        for n, v in values.items():
            full[n] = torch.where((torch.arange(SIZE) == b).reshape(-1, *(1,) * (v.dim() - 1)), v, v + 0.25)
        for n in [n for n in full if n + "_unconstrained" in full]:  # Delta sites follow their helper
            full[n] = full[n + "_unconstrained"] if n != "rate" else full[n + "_unconstrained"].exp()
        return tuple(pyro_log_probs(fn, args, full, lambda t: t[..., b].sum()) for fn in (model, guide))
    args = [t[b : b + 1] for t in batch]
    return pyro_log_probs(model, args, values, torch.sum), pyro_log_probs(guide, args, values, torch.sum)


def enumerated_supports(fn, args):
    """{site: (support [S, *event], shape of plates)} of the sites marked for parallel enumeration."""
    out = {}
    for name, node in sample_nodes(fn, args).items():
        if node["infer"].get("enumerate") == "parallel":
            fn_ = node["fn"]
            support = fn_.enumerate_support(expand=False)
            shape = fn_.batch_shape[:-1] if fn_.batch_shape else ()
            out[name] = support.reshape(len(support), *fn_.event_shape), tuple(shape)
    return out


def select_particle(value, event_dim, plate_nesting, k, b, combination):
    """One datum of one particle, [*inner, 1, *event], from [*enumerated, particles, *inner, batch, *event]."""
    lead = plate_nesting + 1 + len(combination)
    value = value.reshape(*(1,) * (lead + event_dim - value.dim()), *value.shape)
    plates = value.dim() - event_dim
    for i, choice in enumerate(reversed(combination)):  # the first enumerated site has the rightmost dim
        assert value.shape[i] in (1, len(combination) and value.shape[i])
        value = value.narrow(i, choice if value.shape[i] > 1 else 0, 1)
    value = value.narrow(len(combination), k if value.shape[len(combination)] > 1 else 0, 1)
    if b is not None and value.shape[plates - 1] > 1:
        value = value.narrow(plates - 1, b, 1)
    return value.reshape(value.shape[len(combination) + 1 :])


def reference_terms(name, model, guide, batch, structure, rows, values, k, b):
    """(log weight, elbo, model terms, guide terms) of particle k and datum b; enumerated sites are summed in a loop."""
    args = batch if name in DRAWS_SUBSAMPLE + PER_DATUM_PARAMS + GLOBAL_LATENT else [t[b : b + 1] for t in batch]
    in_guide = enumerated_supports(guide, args)
    in_model = {n: s for n, s in enumerated_supports(model, args).items() if n not in sample_nodes(guide, args)}
    event_dims = {n: node["fn"].event_dim for n, node in sample_nodes(guide, args).items()}
    weights, log_q = [], []
    for combination in itertools.product(*(range(len(support)) for support, _ in in_guide.values())):
        datum = None if name in GLOBAL_LATENT else b
        fixed = {
            n: select_particle(v, event_dims[n], structure.plate_nesting, k, datum, combination)
            for n, v in values.items()
        }  # fmt: skip
        for choice, (n, (support, _)) in zip(combination, in_guide.items(), strict=True):
            fixed[n] = support[choice][None]
        joint, q = [], None
        lists = [itertools.product(range(len(s)), repeat=math.prod(shape)) for s, shape in in_model.values()]
        for assignment in itertools.product(*lists):
            for choice, (n, (support, shape)) in zip(assignment, in_model.items(), strict=True):
                fixed[n] = support[list(choice)].reshape(*shape, 1, *support.shape[1:])
            p, q = single_datum_log_probs(name, model, guide, batch, structure, rows, fixed, b)
            joint.append(sum(p.values()))
        log_q.append(sum((q[n] for n in in_guide), torch.zeros(())))
        weights.append(torch.stack(joint).logsumexp(0) - sum(q.values()) + log_q[-1])
    weights, log_q = torch.stack(weights), torch.stack(log_q)
    elbo = (log_q.exp() * (weights - log_q)).sum() if in_guide else weights[0]
    return weights.logsumexp(0), elbo, p, q


@pytest.mark.parametrize("name", PAIRS)
def test_weights_are_those_of_one_datum_and_one_particle_at_a_time(name):
    model, guide, batch, structure, index = prepare_pair(name)
    t = terms(model, guide, batch, K, structure=structure, index=index)
    t = t if structure.layout != "folded" else one_by_one_terms(model, guide, batch, structure, index)
    count = 1 if name in GLOBAL_LATENT else t.batch_size
    assert t.log_weight.shape == (K, count)
    results = [
        [reference_terms(name, model, guide, batch, structure, index, sampled_values(t), k, b) for b in range(count)]
        for k in range(K)
    ]
    expected = torch.stack([torch.stack([r[0] for r in row]) for row in results])
    torch.testing.assert_close(t.log_weight, expected, rtol=0, atol=1e-9)
    if name not in GUIDE_ENUMERATED:
        assert torch.equal(t.elbo, t.log_weight)
    if t.contraction is None and name not in GLOBAL_LATENT:
        for side, which in ((t.model, 2), (t.guide, 3)):
            for n, site in side.items():
                if site.role != "cancelled":
                    expected = torch.stack([torch.stack([r[which][n] for r in row]) for row in results])
                    torch.testing.assert_close(site.log_prob.double(), expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(t.log_lik + t.log_prior - t.log_guide, t.log_weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", GUIDE_ENUMERATED)
def test_the_elbo_is_an_expectation_over_what_the_guide_enumerates(name):
    model, guide, batch, structure, index = prepare_pair(name)
    t = terms(model, guide, batch, K, structure=structure)
    found = [
        torch.stack(
            [
                reference_terms(name, model, guide, batch, structure, index, sampled_values(t), k, b)[1]
                for b in range(SIZE)
            ]
        )
        for k in range(K)
    ]
    torch.testing.assert_close(t.elbo, torch.stack(found), rtol=0, atol=1e-9)


def parts_model(x):
    """u above three parts, each of a kind y: z ~ N(y, 1), x ~ N(y + z + u, 1)."""
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        with pyro.plate("parts", 3, dim=-2):
            y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.3)))
            z = pyro.sample("z", dist.Normal(y, 1.0))
            pyro.sample("x", dist.Normal(y + z + u, 1.0), obs=x.T)


def parts_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("u", dist.Normal(x.mean(-1) / 2, 1.0))
        with pyro.plate("parts", 3, dim=-2):
            y = pyro.sample("y", dist.Bernoulli(logits=x.T), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(x.T / 2 - y, 1.0))


@pytest.mark.parametrize(
    "quantity",
    ["log_weight", "elbo"],
)
def test_a_site_enumerated_in_an_inner_plate_of_the_guide(quantity):
    """Parts are independent given u: weights multiply sums over y, and the elbo adds expectations over y."""
    x = torch.randn(SIZE, 3)
    t = terms(parts_model, parts_guide, x, K)
    u, z = t.guide["u"].value.reshape(K, 1, SIZE), t.guide["z"].value  # [2, K, 3, SIZE]
    y = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    prior = dist.Bernoulli(0.3).log_prob(y) + dist.Normal(y, 1.0).log_prob(z)
    part = prior + dist.Normal(y + z + u, 1.0).log_prob(x.T) - dist.Normal(x.T / 2 - y, 1.0).log_prob(z)
    above = (dist.Normal(0.0, 1.0).log_prob(u) - dist.Normal(x.mean(-1) / 2, 1.0).log_prob(u)).squeeze(1)
    log_q = dist.Bernoulli(logits=x.T).log_prob(y)
    expected = {
        "log_weight": above + part.logsumexp(0).sum(-2),
        "elbo": above + (log_q.exp() * (part - log_q)).sum((0, -2)),
    }
    torch.testing.assert_close(getattr(t, quantity), expected[quantity], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "quantity",
    [
        "log_weight",
        "elbo",
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_sites_enumerated_in_an_inner_plate_of_either_side(quantity, inside):
    """The guide enumerates y of every part; the model alone c, of every part or of the datum above them."""
    kind = torch.tensor([-1.0, 1.0])

    def model(x):
        with pyro.plate("data", len(x)):
            c = None if inside else pyro.sample("c", dist.Bernoulli(torch.tensor(0.4)), infer={"enumerate": "parallel"})
            with pyro.plate("parts", 3, dim=-2):
                y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.3)))
                if inside:
                    c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.4)), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(y + kind[c.long()] * (1 + y), 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("data", len(x)), pyro.plate("parts", 3, dim=-2):
            pyro.sample("y", dist.Bernoulli(logits=x.T), infer={"enumerate": "parallel"})

    x = torch.randn(SIZE, 3)
    t = terms(model, guide, x, K)
    y = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3))).reshape(8, 3, 1)  # all kinds of all parts
    prior = dist.Bernoulli(0.3).log_prob(y)
    given = [dist.Normal(y + k * (1 + y), 1.0).log_prob(x.T) + (math.log(w) if inside else 0) for k, w in
             zip(kind.tolist(), (0.6, 0.4), strict=True)]  # fmt: skip
    if inside:
        log_p = (prior + torch.logaddexp(*given)).sum(1)
    else:
        log_p = torch.logaddexp(math.log(0.6) + (prior + given[0]).sum(1), math.log(0.4) + (prior + given[1]).sum(1))
    # the expectation over the 8 kinds of y is not computed: NaN, and never a wrong number
    expected = {"log_weight": log_p.logsumexp(0), "elbo": torch.full((SIZE,), math.nan)}
    same = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-10, equal_nan=True)
    same(getattr(t, quantity), expected[quantity].expand(K, SIZE))


@pytest.mark.parametrize("where", ["model", "guide"])
def test_a_shared_site_that_is_enumerated(where):
    """One k for all data: log w = log sum_k p(k) prod_i p(x_i, z_i | k) / q(z_i), one number per particle."""
    locs, prior, q = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.5, 0.3, 0.2])
    infer = {"enumerate": "parallel"}

    def model(x):
        k = pyro.sample("k", dist.Categorical(prior), infer=infer if where == "model" else {})
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(locs[k], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        if where == "guide":
            pyro.sample("k", dist.Categorical(q), infer=infer)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    x = torch.randn(SIZE)
    t = terms(model, guide, x, K)
    z = t.guide["z"].value.reshape(K, SIZE)
    data = dist.Normal(z, 1.0).log_prob(x) - dist.Normal(x / 2, 1.0).log_prob(z)
    joint = torch.stack([(dist.Normal(loc, 1.0).log_prob(z) + data).sum(-1) for loc in locs]) + prior.log()[:, None]
    assert t.has_global_latents
    torch.testing.assert_close(t.log_weight, joint.logsumexp(0)[:, None], rtol=0, atol=1e-10)
    elbo = (q[:, None] * (joint - q[:, None].log())).sum(0) if where == "guide" else joint.logsumexp(0)
    torch.testing.assert_close(t.elbo, elbo[:, None], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PAIRS)
def test_layouts_agree_wherever_they_run(name):
    model, guide, batch, structure, index = prepare_pair(name)
    single = one_by_one_terms(model, guide, batch, structure, index)
    ran = []
    for layout in LAYOUTS:
        if layout == "folded" and (structure.has_global_latents or structure.draws_subsample):
            continue  # particles folded into the batch would share what is shared, or take other rows
        at_layout = replace(structure, layout=layout)
        try:
            t = terms(model, guide, batch, K, values=sampled_values(single), structure=at_layout, index=index)
        except (ValueError, RuntimeError):
            continue
        ran.append(layout)
        torch.testing.assert_close(t.log_weight, single.log_weight, rtol=0, atol=1e-10)
        torch.testing.assert_close(t.elbo, single.elbo, rtol=0, atol=1e-10)
    assert structure.layout in ran
    assert "one by one" in ran


@pytest.mark.parametrize(
    ("name", "layout"), [(n, {"conv": "folded", "rnn": "folded"}.get(n, "vectorized")) for n in PAIRS]
)
def test_the_fastest_layout_that_is_right_is_found(name, layout):
    assert inspect(*PAIRS[name]()).layout == layout


def sums_over_dim_one(x):
    """A decoder that sums over dim 1: with as many data as features it runs under a particle plate, and is wrong."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(SIZE), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(1), 1.0), obs=x)


def test_a_network_that_runs_on_particles_and_means_something_else_is_folded(caplog):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.3 * x[:, None], torch.ones(SIZE)).to_event(1))

    x = torch.randn(SIZE)
    with caplog.at_level(logging.WARNING, "ppvae"):
        structure = inspect(sums_over_dim_one, guide, x)
    assert structure.layout == "folded"
    assert len(caplog.records) == 1
    assert "folded into the batch" in caplog.records[0].getMessage()
    t = terms(sums_over_dim_one, guide, x, 2000, structure=structure)
    # z sums to N(0, 6), x to N(0, 7). A mean of 2000 weights: z-score below 5, so that it fails once in 2e6.
    weights = t.log_weight.exp()
    exact = dist.Normal(0.0, math.sqrt(SIZE + 1)).log_prob(x).exp()
    assert ((weights.mean(0) - exact).abs() < 5 * weights.std(0) / math.sqrt(2000)).all()


def test_a_vectorised_layout_that_loses_weights_is_not_taken():
    """A decoder that gives -inf under a particle plate and numbers without one must not count as the same."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("odd", torch.full_like(z, -torch.inf) if z.dim() > 1 else torch.zeros_like(z))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    assert inspect(model, guide, torch.randn(SIZE)).layout != "vectorized"


# -- values, and where they are held ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_values_give_the_same_terms_again(name):
    model, guide, batch, structure, index = prepare_pair(name)
    t = terms(model, guide, batch, K, structure=structure, index=index)
    again = terms(model, guide, batch, K, values=sampled_values(t), structure=structure, index=index)
    torch.testing.assert_close(again.log_weight, t.log_weight, rtol=0, atol=1e-12)
    for n, site in t.guide.items():
        assert torch.equal(again.guide[n].value, site.value)


def test_values_without_the_guide_broadcast():
    """Values for one particle, and for one datum, go to all."""
    pair = LinearGaussian(3, 2)
    x, z = torch.randn(4, 3), torch.randn(5, 1, 2)
    t = terms(pair.model, pair.guide, x, 5, values={"z": z.expand(5, 4, 2)})
    for b in range(4):
        own = terms(pair.model, pair.guide, x[b : b + 1], 5, values={"z": z})
        torch.testing.assert_close(t.log_weight[:, b], own.log_weight[:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("frozen", [("guide",), ("model",), ("guide", "model")])
def test_frozen_sides_change_no_value(name, frozen):
    model, guide, batch, structure, index = prepare_pair(name)
    found = []
    for sides in ((), frozen):
        torch.manual_seed(3)
        found.append(terms(model, guide, batch, K, structure=structure, index=index, frozen=sides))
    torch.testing.assert_close(found[0].log_weight, found[1].log_weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[0].elbo, found[1].elbo, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_frozen_sides_take_no_gradient_and_give_it_back(name):
    model, guide, batch, structure, index = prepare_pair(name)
    t = one_by_one_terms(model, guide, batch, structure, index)
    fixed = {n: v.detach() for n, v in sampled_values(t).items()}  # or sampled values would carry the guide's gradient
    own = {"guide": list(structure.guide_params.values()), "model": list(structure.model_params.values())}
    for frozen, other in (("guide", "model"), ("model", "guide")):
        t = one_by_one_terms(model, guide, batch, structure, index, values=fixed, frozen=(frozen,))
        assert all(p.requires_grad for side in own.values() for p in side)
        total = t.log_weight.sum() + t.elbo.sum()  # q(y | x) of an enumerated y is in the elbo alone
        if own[frozen] and total.requires_grad:
            grads = torch.autograd.grad(total, own[frozen], allow_unused=True, retain_graph=True)
            assert all(g is None for g in grads)
        if own[other]:
            grads = torch.autograd.grad(total, own[other], allow_unused=True)
            assert any(g is not None and g.abs().max() > 1e-6 for g in grads)


def exact_linear_gaussian():
    """A linear-Gaussian model, and its exact posterior as a guide with parameters of its own."""
    pair = LinearGaussian(5, 3, scale=0.6)
    with torch.no_grad():
        pair.loc.normal_()
        m = pair.weight.T @ pair.weight + 0.36 * torch.eye(3)
        slope = torch.linalg.solve(m, pair.weight.T)
    own = {
        "slope": slope,
        "shift": -slope @ pair.loc.detach(),
        "tril": torch.linalg.cholesky(0.36 * torch.linalg.inv(m)).detach(),
    }  # contiguous, or pyro.param would make parameters of copies
    own = {n: nn.Parameter(t.detach().clone(memory_format=torch.contiguous_format)) for n, t in own.items()}

    def guide(x):
        slope, shift, tril = (pyro.param(f"exact.{n}", p) for n, p in own.items())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(x @ slope.T + shift, scale_tril=tril))

    return pair, guide, own


def test_sticking_the_landing_at_the_exact_posterior_has_no_noise():
    """log w is constant in z there, so that the pathwise gradient is zero for every draw (Roeder et al. 2017)."""
    pair, guide, own = exact_linear_gaussian()
    x = torch.randn(4, 5)
    t = terms(pair.model, guide, x, K, frozen=("guide",))
    torch.testing.assert_close(t.log_weight, pair.log_px(x).expand(K, 4), rtol=0, atol=1e-10)
    held = torch.autograd.grad(t.log_weight.sum(), own.values())
    assert all(g.abs().max() < 1e-12 for g in held)
    free = torch.autograd.grad(terms(pair.model, guide, x, K).log_weight.sum(), own.values())
    assert all(g.abs().max() > 1e-2 for g in free)


def chain(x):
    """z2 ~ N(0, 1), z1 ~ N(z2, 1), x ~ N(z1, 1)."""
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
        z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
        pyro.sample("x", dist.Normal(z1, 1.0), obs=x)


def test_frozen_keeps_the_paths_through_a_hierarchical_guide():
    """z1 | x ~ N(2x/3, 2/3) and z2 | z1 ~ N(z1/2, 1/2) exactly: zero, but only if z1's path into q(z2 | z1) is kept."""
    own = [nn.Parameter(torch.tensor(v)) for v in (2 / 3, math.sqrt(2 / 3), 0.5, math.sqrt(0.5))]

    def guide(x):
        a, s, c, r = (pyro.param(f"chain.{i}", p) for i, p in enumerate(own))
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(a * x, s))
            pyro.sample("z2", dist.Normal(c * z1, r))

    x = torch.randn(4)
    t = terms(chain, guide, x, K, frozen=("guide",))
    exact = dist.Normal(0.0, math.sqrt(3)).log_prob(x)
    torch.testing.assert_close(t.log_weight, exact.expand(K, 4), rtol=0, atol=1e-12)
    held = torch.autograd.grad(t.log_weight.sum(), own)
    assert all(g.abs() < 1e-12 for g in held)
    free = torch.autograd.grad(terms(chain, guide, x, K).log_weight.sum(), own)
    assert all(g.abs() > 1e-2 for g in free)


# -- scale, modes, noise ----------------------------------------------------------------------------------------------


def test_the_scale_of_the_data_plate_is_divided_out():
    found = []
    for full in (SIZE, 100, 10_000):
        model, guide, batch = hierarchy(full)
        pyro.clear_param_store()
        torch.manual_seed(5)
        t = terms(model, guide, batch, K)
        assert t.scale == pytest.approx(full / SIZE)
        assert torch.isfinite(t.log_weight).all()
        found.append(t.log_weight)
        whole = log_marginal(model, guide, batch, num_particles=30, proposal="guide")
        found.append(whole.log_px)
    for other in (2, 4):
        torch.testing.assert_close(found[other], found[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(found[other + 1], found[1], rtol=0, atol=1e-12)


def modules_of(*functions):
    found = []
    for fn in functions:
        owners = [c.cell_contents for c in getattr(fn, "__closure__", None) or ()] + [fn]
        found += [m for o in owners if isinstance(o, nn.Module) for m in o.modules()]
    return found


@pytest.mark.parametrize("name", ["modules", "conv", "rnn", "classes", "flow"])
@pytest.mark.parametrize(
    "look", [inspect, check, lambda *pair: log_marginal(*pair, num_particles=30, proposal="guide")]
)
def test_evaluation_leaves_modules_as_they_were(name, look):
    model, guide, batch = PAIRS[name]()
    modules = modules_of(model, guide)
    assert modules
    modules[0].eval()
    modes = [m.training for m in modules]
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in modules]
    look(model, guide, batch)
    assert [m.training for m in modules] == modes
    for module, state in zip(modules, before, strict=True):
        for key, value in module.state_dict().items():
            assert torch.equal(value, state[key]), key


class Noisy(nn.Module):
    """Two ways to drop out: a module, and a function that asks for `self.training`."""

    def __init__(self):
        super().__init__()
        self.first, self.dropout, self.second = nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(self.dropout(torch.tanh(self.first(x))))

    def by_method(self, x):
        return self.second(nn.functional.dropout(torch.tanh(self.first(x)), 0.5, self.training))


@pytest.mark.parametrize("method", [False, True])
def test_dropout_is_off_while_evaluating(method):
    net = Noisy()
    call = net.by_method if method else net

    def model(x):
        pyro.module("noisy", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(call(x) + z[..., None], 1.0).to_event(1), obs=x)

    x = torch.randn(SIZE, 4)
    found = [log_marginal(model, lambda x: None, x, num_particles=1, seed=s, proposal="guide").log_px for s in (0, 1)]
    assert torch.equal(*found)
    assert net.training
    net.eval()
    lik = torch.stack([dist.Normal(net(x) + z, 1.0).to_event(1).log_prob(x) for z in (0.0, 1.0)])
    torch.testing.assert_close(found[0], lik.logsumexp(0) - math.log(2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_looking_at_a_pair_does_not_disturb_the_noise(name):
    model, guide, batch = PAIRS[name]()
    state = torch.get_rng_state()
    inspect(model, guide, batch)
    check(model, guide, batch)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["modules", "hierarchical", "conv", "inner_plate", "obs_mask", "discrete", "labelled"])
def test_simulate_draws_every_latent_and_observation(name):
    model, _, batch, _, _ = prepare_pair(name)
    drawn = simulate(model, batch)
    plain = sample_nodes(model, batch)
    assert drawn.keys() == plain.keys()
    assert {n: v.shape for n, v in drawn.items()} == {n: node["value"].shape for n, node in plain.items()}
    observed = [n for n, node in plain.items() if node["is_observed"]]
    assert observed
    assert all(not torch.equal(drawn[n], plain[n]["value"]) for n in observed)


def test_simulate_draws_from_the_model():
    """Mean and covariance of x are those of the closed form; each z-score below 5: fails once in 1e5 (28 numbers)."""
    pair = LinearGaussian(4, 2, scale=0.5)
    with torch.no_grad():
        pair.loc.copy_(torch.arange(4.0))
    count = 4000
    x = simulate(pair.model, torch.zeros(count, 4))["x"].detach()
    cov = (pair.weight @ pair.weight.T + 0.25 * torch.eye(4)).detach()
    assert ((x.mean(0) - pair.loc).abs() < 5 * (cov.diagonal() / count).sqrt()).all()
    centred = x - pair.loc.detach()
    spread = (cov.diagonal()[:, None] * cov.diagonal() + cov**2) / count
    assert ((centred.T @ centred / count - cov).abs() < 5 * spread.sqrt()).all()
    z = torch.randn(count, 2)
    at_z = simulate(pair.model, torch.zeros(count, 4), {"z": z})
    assert torch.equal(at_z["z"], z)
    rest = at_z["x"] - z @ pair.weight.T - pair.loc
    assert (rest.mean(0).abs() < 5 * 0.5 / math.sqrt(count)).all()
    assert ((rest.std(0) / 0.5 - 1).abs() < 5 / math.sqrt(2 * count)).all()


def test_the_number_of_particles_must_be_positive():
    pair = LinearGaussian(3, 2)
    with pytest.raises(ValueError, match="num_particles: expected at least 1, found 0"):
        terms(pair.model, pair.guide, torch.zeros(4, 3), 0)


def test_per_event_densities_add_up():
    model, guide, batch, structure, _ = prepare_pair("modules")
    t = terms(model, guide, batch, K, structure=structure)
    for site in (t.model["obs"], t.model["latent"], t.guide["latent"]):
        assert site.per_event().shape[-1] == site.distribution.event_shape[-1]
        torch.testing.assert_close(site.per_event().sum(-1), site.log_prob, rtol=0, atol=1e-12)


def test_every_pair_is_its_own():
    """The dict's pairs are what they say: as many rows as promised, in float64."""
    for name, build in PAIRS.items():
        batch = build()[2]
        assert len(batch[0]) == (DATASET_SIZE if name in DRAWS_SUBSAMPLE else SIZE)
        assert batch[0].dtype is torch.float64


# -- enumerated sites that a mask takes out ---------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["guide", "model"])
@pytest.mark.parametrize("own", [False, True])  # the distribution's own mask, or a handler's
def test_a_masked_enumerated_site_is_not_there(side, own, float64):
    """A class that is known for some data, by obs_mask, and summed out for the others."""
    loc, classes = torch.randn(3, 4), torch.tensor([0.2, 0.3, 0.5])
    infer = {"enumerate": "parallel"}
    known = torch.tensor([True, True, False, False])

    def model(x, y):
        with pyro.plate("data", len(x)):
            seen = pyro.sample("seen", dist.Categorical(classes).mask(known), obs=y)
            fn = dist.Categorical(classes)
            with poutine.mask(mask=True if own else ~known):
                unseen = pyro.sample("unseen", fn.mask(~known) if own else fn, infer=infer if side == "model" else {})
            c = torch.where(known, seen, unseen)
            pyro.sample("x", dist.Normal(loc[c], 1.0).to_event(1), obs=x)

    def guide(x, y):
        if side == "guide":
            fn = dist.Categorical(torch.full((len(x), 3), 1 / 3))
            with pyro.plate("data", len(x)), poutine.mask(mask=True if own else ~known):
                pyro.sample("unseen", fn.mask(~known) if own else fn, infer=infer)

    x, y = torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
    joint = dist.Normal(loc, 1.0).to_event(1).log_prob(x[:, None]) + classes.log()
    t = terms(model, guide, (x, y), 2)
    exact = torch.where(known, joint[torch.arange(4), y], joint.logsumexp(-1))
    bound = torch.where(known, exact, joint.mean(-1) + math.log(3)) if side == "guide" else exact
    torch.testing.assert_close(t.log_weight, exact.expand(2, 4))
    torch.testing.assert_close(t.elbo, bound.expand(2, 4))


# Scopes


@pytest.mark.parametrize("prefix", ["enc", "a/b"])
@pytest.mark.parametrize("plate", ["data", "rows/all"])
def test_a_scope_changes_names_alone(prefix, plate):
    """The site of a plate's subsample is renamed by the scope, and the plate is not."""

    def model(x):
        with pyro.plate(plate, len(x), subsample_size=8) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[i])

    def guide(x):
        with pyro.plate(plate, len(x), subsample_size=8) as i:
            pyro.sample("z", dist.Normal(0.8 * x[i], 0.2**0.5))

    x = torch.randn(43, generator=torch.Generator().manual_seed(0))
    exact = dist.Normal(0.0, 1.25**0.5).log_prob(x)
    pair = scope(model, prefix=prefix), scope(guide, prefix=prefix)
    est = log_marginal(*pair, x, num_particles=300, proposal="guide")
    assert (est.log_px - exact).abs().max() < 1e-5
    assert torch.equal(est.log_px, log_marginal(model, guide, x, num_particles=300, proposal="guide").log_px)
    if (prefix, plate) == ("enc", "data"):
        found = annealed(*pair, x[:16], num_chains=2, num_temperatures=3, compile=False).log_px
        assert torch.equal(
            found, annealed(model, guide, x[:16], num_chains=2, num_temperatures=3, compile=False).log_px
        )
