"""Programs whose sites, masks, scales or noise differ from batch to batch or between model and guide."""

import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoHierarchicalNormalMessenger, AutoNormalMessenger

from ppvae import VAE, check, data, fit, likelihoods, log_marginal, nn, objectives, posteriors, priors
from ppvae.errors import ContractError
from ppvae.evaluation import annealed, calibration, quadrature
from ppvae.inference import ParticlePlacement, inspect, terms
from ppvae.models import TableVAE, table_vae

# -- as many sites as the longest sequence of the batch ----------------------------------------------------------------


def chain(steps):
    """Covariance of x_0, ..., x_{steps-1} of the sequence below."""
    a = torch.tensor([[0.9 ** (i - j) if i >= j else 0.0 for j in range(steps)] for i in range(steps)]).double()
    return a @ a.T + 0.25 * torch.eye(steps, dtype=torch.float64)


def sequence_pair(by_handler=True):
    """z_t ~ N(0.9 z_{t-1}, 1), x_t ~ N(z_t, 1/4), as far as each sequence goes."""

    def model(x, n):
        with pyro.plate("data", len(x)):
            z = x.new_zeros(len(x))
            for t in range(int(n.max())):
                with poutine.mask(mask=t < n if by_handler else True):
                    z_fn, on = dist.Normal(0.9 * z, 1.0), True if by_handler else t < n
                    z = pyro.sample(f"z_{t}", z_fn.mask(on))
                    pyro.sample(f"x_{t}", dist.Normal(z, 0.5).mask(on), obs=x[..., t])

    def guide(x, n):
        c = pyro.param("c", torch.tensor(0.8))
        with pyro.plate("data", len(x)):
            for t in range(int(n.max())):
                with poutine.mask(mask=t < n):
                    pyro.sample(f"z_{t}", dist.Normal(c * x[..., t], 0.6))

    return model, guide


def sequences(long, size=60):
    generator = torch.Generator().manual_seed(0)
    n = torch.randint(2, 5, (size,), generator=generator)
    n[long] = 8
    x = torch.randn(size, 8, generator=generator)
    exact = [
        dist.MultivariateNormal(torch.zeros(k).double(), chain(k)).log_prob(v[:k].double())
        for v, k in zip(x, n.tolist(), strict=True)
    ]
    return x, n, torch.stack(exact)


@pytest.mark.parametrize("by_handler", [True, False], ids=["poutine.mask", "fn.mask"])
@pytest.mark.parametrize("long", [3, 57], ids=["longest first", "longest last"])
def test_a_longer_sequence_in_a_later_batch_is_weighed(by_handler, long):
    pyro.clear_param_store()
    x, n, exact = sequences(long)
    run = fit(*sequence_pair(by_handler), (x, n), epochs=1, batch_size=20, compile=False, valid=(x, n))
    assert math.isfinite(run.metrics["valid_elbo"])
    est = log_marginal(run.model, run.guide, (x, n), num_particles=1000, posterior_draws=2, proposal="guide")
    assert ((est.log_px - exact).abs() < 6 * est.std_error + 0.01)[est.reliable].all()
    assert abs((est.log_px - exact).mean()) < 0.03


@pytest.mark.usefixtures("hasty")
def test_a_longer_sequence_in_a_later_block_is_annealed():
    pyro.clear_param_store()
    pyro.param("c", torch.tensor(0.8))
    x, n, exact = sequences(57)
    est = annealed(*sequence_pair(), (x, n), num_temperatures=5, num_leapfrog=3)
    assert abs((est.log_px - exact).mean()) < 0.1
    assert (est.log_px - exact).abs().max() < 1


@pytest.mark.parametrize(
    "objective",
    [
        objectives.ELBO(2),
        objectives.IWAE(3),
        objectives.IWAE(3, gradient="dreg"),
        objectives.ELBO(2, gradient="stl"),
        objectives.ELBO(2, gradient="score"),
        Trace_ELBO(),
    ],
    ids=["elbo", "iwae", "dreg", "stl", "score", "pyro"],
)
def test_every_objective_trains_on_batches_with_dynamic_structure(objective):
    pyro.clear_param_store()
    x, n, _ = sequences(long=17, size=20)
    run = fit(*sequence_pair(), (x, n), objective=objective, epochs=3, batch_size=2, compile=False)
    assert math.isfinite(run.metrics["loss"])


def test_losses_on_dynamic_structure_are_those_of_a_pair_that_is_inspected_on_them():
    x, n, _ = sequences(long=17, size=20)
    values = []
    for batches in (((x[:4], n[:4]), (x, n)), ((x, n),)):
        pyro.clear_param_store()
        objective, pair = objectives.IWAE(3), sequence_pair()
        for batch in batches:
            torch.manual_seed(0)
            value = objective.loss(*pair, *batch)
        values.append(value)
    assert values[0] == values[1]


def test_dynamic_structure_are_checked_as_the_first_ones():
    def guide(x, n):
        with pyro.plate("data", len(x)):
            for t in range(int(n.max())):
                with poutine.mask(mask=t < n):
                    wide = dist.Normal(0.8 * x[..., t], 0.6)
                    pyro.sample(f"z_{t}", wide if t < 4 else dist.LogNormal(0.0, 1.0))

    pyro.clear_param_store()
    x, n, _ = sequences(long=57)
    with pytest.raises(ContractError, match=r"'z_4'.*support"):
        log_marginal(sequence_pair()[0], guide, (x, n), num_particles=10, proposal="guide")


def test_further_enumerated_sites_are_summed_out():
    def model(x, n):
        with pyro.plate("data", len(x)):
            k = torch.zeros(())
            for t in range(int(n.max())):
                with poutine.mask(mask=t < n):
                    k = pyro.sample(f"k_{t}", dist.Bernoulli(0.3 + 0.4 * k), infer={"enumerate": "parallel"})
                    pyro.sample(f"x_{t}", dist.Normal(k, 1.0), obs=x[..., t])

    x, n, _ = sequences(long=57)
    est = log_marginal(model, lambda x, n: None, (x, n), num_particles=1, proposal="guide")
    exact = []
    for v, k in zip(x.double(), n.tolist(), strict=True):
        alpha = torch.tensor([0.7, 0.3]).double().log()
        move = torch.tensor([[0.7, 0.3], [0.3, 0.7]]).double().log()
        for t in range(k):
            alpha = alpha if t == 0 else (alpha[:, None] + move).logsumexp(0)
            alpha = alpha + dist.Normal(torch.tensor([0.0, 1.0]).double(), 1.0).log_prob(v[t])
        exact.append(alpha.logsumexp(0))
    assert (est.log_px - torch.stack(exact)).abs().max() < 1e-5


# -- noise outside of sites --------------------------------------------------------------------------------------------


def normal_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


NOISES = {
    "randn_like": lambda x: x + 0.3 * torch.randn_like(x),
    "normal_": lambda x: x + 0.3 * torch.empty(len(x)).normal_(),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full((len(x),), 0.9)),
    "choice": lambda x: x + 0.1 * torch.randint(3, (len(x),)),
}
X = torch.randn(40, generator=torch.Generator().manual_seed(1))
EXACT = dist.Normal(0.0, 1.25**0.5).log_prob(X.double())


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_a_guide_that_draws_noise_outside_of_sites_is_vectorized(noise, caplog):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * noise(x), 0.6))

    with caplog.at_level(logging.WARNING, "ppvae"):
        assert inspect(normal_model, guide, X).layout is ParticlePlacement.VECTORIZED
    assert not caplog.records
    est = log_marginal(normal_model, guide, X, num_particles=4000, proposal="guide")
    assert ((est.log_px - EXACT).abs() < 5 * est.std_error).all()
    assert abs((est.log_px - EXACT).mean()) < 0.01


def test_a_model_that_draws_noise_outside_of_sites_draws_it_for_each_particle():
    def model(x):  # x ~ N(z + noise, 1/2): the noise has variance 1/4
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + 0.5 * torch.randn(len(x)), 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 1.5, 0.7))

    est = log_marginal(model, guide, X[:10], num_particles=3000, proposal="guide")
    assert (est.log_px - dist.Normal(0.0, 1.5**0.5).log_prob(X[:10].double())).abs().max() < 0.1


@pytest.mark.parametrize("rows", [None, 100])
def test_a_noisy_guide_that_enumerates_is_weighed_by_the_density_it_sampled_from(rows):
    locs = torch.tensor([-1.0, 1.0])

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.4))
            z = pyro.sample("z", dist.Normal(locs[y.long()], 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        noisy = x + torch.randn(len(x))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=noisy), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(0.8 * noisy, 0.9))

    est = log_marginal(model, guide, X[:10], num_particles=3000, rows=rows, proposal="guide")
    log_p = dist.Normal(locs.double(), 1.25**0.5).log_prob(X[:10, None].double())
    exact = (log_p + torch.tensor([0.6, 0.4]).double().log()).logsumexp(1)
    assert abs((est.log_px - exact).mean()) < 0.04


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("size", [5, 3], ids=["5 data", "as many data as dims"])
def test_a_mask_inside_an_event_is_the_same_as_one_of_rows(size):
    x, keep = torch.randn(size, 3, generator=torch.Generator().manual_seed(0)), torch.arange(size) < size - 1

    def model(x, keep):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 3), 1.0).mask(keep[:, None]).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1).mask(keep), obs=x)

    def guide(x, keep):
        with pyro.plate("data", len(x)), poutine.mask(mask=keep):
            pyro.sample("z", dist.Normal(0.8 * x, 0.2**0.5).to_event(1))

    exact = torch.where(keep, dist.Normal(0.0, 1.25**0.5).log_prob(x.double()).sum(1), 0.0)
    assert (log_marginal(model, guide, (x, keep), num_particles=10, proposal="guide").log_px - exact).abs().max() < 1e-5
    assert (annealed(model, guide, (x, keep), num_temperatures=5, num_leapfrog=3).log_px - exact).abs().max() < 1e-4


ALL_OF_IT = {
    "poutine.mask": lambda fn, mask: (fn, poutine.mask(mask=mask)),
    "fn.mask": lambda fn, mask: (fn.mask(mask), poutine.mask(mask=True)),
}


@pytest.mark.parametrize("masking", ALL_OF_IT.values(), ids=ALL_OF_IT)
@pytest.mark.parametrize("mask", [torch.tensor(True), torch.ones(5).bool(), True], ids=["no dims", "ones", "True"])
def test_a_mask_that_hides_nothing_is_none(mask, masking):
    x = torch.randn(5, generator=torch.Generator().manual_seed(0)).double()

    def model(x):
        with pyro.plate("data", len(x)):
            fn, context = masking(dist.Normal(torch.zeros_like(x), 1.0), mask)
            with context:
                z = pyro.sample("z", fn)
            fn, context = masking(dist.Normal(z, 0.5), mask)
            with context:
                pyro.sample("x", fn, obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, 0.2**0.5))

    exact = dist.Normal(0.0, 1.25**0.5).log_prob(x)
    assert (log_marginal(model, guide, x, num_particles=10, proposal="guide").log_px - exact).abs().max() < 1e-6
    assert (quadrature(model, guide, x).log_px - exact).abs().max() < 1e-6
    assert terms(model, guide, x, 3, events=True, kl=True).rates()["z"].shape[-1] == 5
    assert not calibration(model, guide, x, replications=20, assemble=lambda s, b: (s["x"],), progress=False).notes


def test_a_mask_of_no_dims_that_hides_a_site_takes_it_out():
    x = torch.full((5,), -1.0).double()  # outside of a gamma's support

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            with poutine.mask(mask=off):
                pyro.sample("x", dist.Normal(z, 1.0) if off is not False else dist.Gamma(z.exp(), 1.0).mask(off), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))

    for mask in (torch.tensor(False), False):
        off = mask
        assert log_marginal(model, guide, x, num_particles=3, proposal="guide").log_px.abs().max() < 1e-12
        assert quadrature(model, guide, x).log_px.abs().max() < 1e-6


@pytest.mark.parametrize("side", ["model", "guide"])
def test_a_mask_of_one_side_that_hides_the_latents_of_a_later_batch_is_refused(side):
    x = torch.cat([torch.ones(400), -torch.ones(400)])

    def sides(masked):
        return poutine.mask(mask=x_of[0] > 0) if masked else poutine.mask(mask=True)

    x_of = [x]

    def model(x):
        x_of[0] = x
        with pyro.plate("data", len(x)):
            with sides(side == "model"):
                z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        x_of[0] = x
        with pyro.plate("data", len(x)), sides(side == "guide"):
            pyro.sample("z", dist.Normal(0.8 * x, 0.2**0.5))

    assert "z" in check(model, guide, x[:400])
    with pytest.raises(ContractError, match=r"'z'.*same mask"):
        log_marginal(model, guide, x, num_particles=3, proposal="guide")


def test_masks_of_other_elements_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            some = torch.tensor([True, False])
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).mask(some).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1).mask(torch.ones(len(x)).bool()))

    with pytest.raises(ContractError, match=r"'z'.*same mask"):
        inspect(model, guide, X)


MASKINGS = {
    "poutine.mask": lambda fn, off: (fn, poutine.mask(mask=off)),
    "fn.mask": lambda fn, off: (fn.mask(off), poutine.mask(mask=True)),
}


@pytest.mark.parametrize("masking", MASKINGS.values(), ids=MASKINGS)
def test_an_enumerated_site_keeps_its_own_prior_where_it_is_masked(masking):
    """As in `TraceEnum_ELBO` under poutine.mask; under fn.mask Pyro's sum counts a masked site once for each value."""
    y, off = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([False, False, True])

    def model(y):
        with pyro.plate("data", len(y)):
            fn, context = masking(dist.Bernoulli(torch.full((3,), 0.9)), off)
            with context:
                z0 = pyro.sample("z0", fn, infer={"enumerate": "parallel"})
            z1 = pyro.sample("z1", dist.Bernoulli(0.8 * z0 + 0.1), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Bernoulli(0.7 * z1 + 0.2), obs=y)

    p1 = 0.9 * 0.9 + 0.1 * 0.1
    p = p1 * 0.9 + (1 - p1) * 0.2
    exact = torch.tensor([p, p, 1 - p]).double().log()
    est = log_marginal(model, lambda y: None, y, num_particles=1, proposal="guide")
    assert (est.log_px - exact).abs().max() < 1e-6
    if masking is MASKINGS["poutine.mask"]:
        loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda y: None, y)
        assert loss == pytest.approx(-exact.sum().item(), abs=1e-5)


def test_a_site_that_the_guide_enumerates_keeps_the_guides_probabilities_where_it_is_masked():
    """As in `TraceEnum_ELBO`: the mask takes it out of the density, and what follows is averaged over the guide."""
    x, keep = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=keep):
                y = pyro.sample("y", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=keep):
            pyro.sample("y", dist.Bernoulli(0.7), infer={"enumerate": "parallel"})

    y = torch.tensor([0.0, 1.0]).double()
    log_lik = dist.Normal(y, 1.0).log_prob(x[:, None].double())
    log_p = torch.where(keep[:, None], torch.tensor([0.6, 0.4]).double().log(), torch.tensor([0.3, 0.7]).double().log())
    est = log_marginal(model, guide, x, num_particles=1, proposal="guide")
    assert (est.log_px - (log_lik + log_p).logsumexp(1)).abs().max() < 1e-6
    pyro_elbo = -TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x)
    assert est.elbo.sum().item() == pytest.approx(pyro_elbo, abs=1e-5)


# -- scales ------------------------------------------------------------------------------------------------------------


def scale_pair():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.8)) * x, 0.2**0.5))

    return model, guide


def start():
    """The parameters, in Pyro's own store."""
    pyro.clear_param_store()
    pyro.param("m", torch.tensor(0.0))
    pyro.param("a", torch.tensor(0.8))


def test_one_common_scale_is_divided_out_of_weights_losses_and_metrics():
    metrics, results = [], []
    for factor in (1.0, 1 / 784, 1000.0):
        start()
        model, guide = (poutine.scale(f, scale=factor) for f in scale_pair())
        results.append(log_marginal(model, guide, X, num_particles=50, proposal="guide").log_px)
        for objective in (Trace_ELBO(), objectives.ELBO()):
            pyro.clear_param_store()
            model, guide = (poutine.scale(f, scale=factor) for f in scale_pair())
            run = fit(model, guide, X, valid=X, epochs=2, objective=objective, batch_size=10, compile=False, patience=5)
            metrics.append((run.metrics["loss"], run.metrics["valid_elbo"], run.metrics["grad_norm"]))
        assert (log_marginal(run.model, run.guide, X, proposal="guide").log_px - EXACT).abs().max() < 0.1
    assert all(torch.equal(result, results[0]) for result in results)
    assert (results[0] - EXACT).abs().max() < 1e-5
    for m in metrics:
        assert m == pytest.approx(metrics[0], rel=1e-3)


def test_a_common_scale_beside_a_subsampled_plate_is_divided_out():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 40, subsample=x):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(X.sum() / 41, 41**-0.5))

    cov = torch.eye(40, dtype=torch.float64) + 1
    exact = dist.MultivariateNormal(torch.zeros(40).double(), cov).log_prob(X.double())
    est = log_marginal(
        poutine.scale(model, scale=0.1), poutine.scale(guide, scale=0.1), X, num_particles=10, proposal="guide"
    )
    assert est.log_px.item() == pytest.approx(exact.item(), abs=1e-4)


SCALES = {
    "of the latent": (lambda z: (0.5 if z else 1.0, 1.0), "'z'.*scale 1; found scale 0.5"),
    "of the likelihood": (lambda z: (1.0 if z else 20.0, 1.0), "'x'.*scale 1; found scale 20.*subsample=x"),
    "of the model alone": (lambda z: (0.5, 1.0), "'z'.*scale 1; found scale 0.5"),
    "a weight per datum": (lambda z: (torch.linspace(0.5, 1.5, 40),) * 2, r"'z'.*a number; found a tensor.*\[40\]"),
}


@pytest.mark.parametrize(("scales", "message"), SCALES.values(), ids=SCALES)
def test_scales_that_differ_are_refused_in_one_sentence_and_train(scales, message):
    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=scales(True)[0]):
                z = pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
            with poutine.scale(scale=scales(False)[0]):
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=scales(True)[1]):
            pyro.sample("z", dist.Normal(0.8 * x, 0.6))

    start()
    for attempt in (
        lambda: log_marginal(model, guide, X, num_particles=10, proposal="guide"),
        lambda: fit(model, guide, X, epochs=1, objective=objectives.ELBO()),
    ):
        with pytest.raises(ContractError, match=message):
            attempt()
    assert "refused" in check(model, guide, X)
    assert math.isfinite(fit(model, guide, X, epochs=1, compile=False).metrics["loss"])  # the cure: Pyro's objective


def test_a_scale_around_one_pair_leaves_other_pairs_alone():
    fit(*(poutine.scale(f, scale=0.1) for f in scale_pair()), X, epochs=1, compile=False)
    start()
    est = log_marginal(*(poutine.scale(f, scale=0.2) for f in scale_pair()), X, num_particles=10, proposal="guide")
    assert (est.log_px - EXACT).abs().max() < 1e-5  # of the parameters in Pyro's store, no run has trained this pair


# -- plates and guides -------------------------------------------------------------------------------------------------


def test_a_subsample_that_the_guide_alone_draws_is_replayed_in_the_model():
    def model(x):
        with pyro.plate("data", len(x)) as i:
            z = pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[i])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=7) as i:
            pyro.sample("z", dist.Normal(0.8 * x[i], 0.2**0.5))

    start()
    assert (log_marginal(model, guide, X, num_particles=10, proposal="guide").log_px - EXACT).abs().max() < 1e-5
    assert (quadrature(model, guide, X).log_px - EXACT).abs().max() < 1e-5
    run = fit(model, guide, X, epochs=2, compile=False)
    assert run.metrics["step"] == 2 * math.ceil(40 / 7)
    assert run.metrics["train_elbo"] == pytest.approx(EXACT.mean().item(), abs=1e-3)


@pytest.mark.parametrize("kind", [AutoNormalMessenger, AutoHierarchicalNormalMessenger])
def test_effect_guides_are_taken(kind):
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.LogNormal(mu, 0.3))
            pyro.sample("x", dist.Normal(s.log(), 0.5), obs=x)

    def local(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(s.log(), 0.5), obs=x)

    pyro.clear_param_store()
    values = []
    guide = kind(model)
    for loss in (Trace_ELBO(), objectives.ELBO()):
        torch.manual_seed(0)
        values.append(loss.loss(model, guide, X))
        torch.manual_seed(0)
        values.append(loss.loss(model, guide, X))
    assert values[1] == pytest.approx(values[3], rel=1e-4)
    assert fit(model, kind(model), X, epochs=2, compile=False).metrics["step"] == 2
    pyro.clear_param_store()
    guide = kind(local)
    svi = pyro.infer.SVI(local, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(300):
        svi.step(X)
    est = log_marginal(local, guide, X, num_particles=2000, proposal="guide")
    assert (est.log_px - EXACT)[est.reliable].abs().max() < 0.05
    assert est.reliable.float().mean() > 0.9
    t = terms(local, guide, X, 4, frozen=("guide",))
    assert t.log_weight.shape == (4, 40)
    assert set(t.guide) == {"s"}


# -- caveats that fit says once ----------------------------------------------------------------------------------------


def warnings_of_fit(caplog, *arguments, **options):
    """What fit says of a pair; not that it trains one anew."""
    pyro.clear_param_store()
    with caplog.at_level(logging.WARNING, "ppvae"):
        fit(*arguments, epochs=2, compile=False, **options)
    messages = [r.getMessage() for r in caplog.records if "anew" not in r.getMessage()]
    caplog.clear()
    return messages


def test_an_obs_mask_that_the_guide_does_not_mask_is_said_once(caplog):
    y, known = torch.randint(0, 3, (40,)), torch.arange(40) % 2 == 0
    locs = torch.tensor([0.0, 1.0, 2.0])

    def model(x, y, known):
        with pyro.plate("data", len(x)):
            c = pyro.sample("y", dist.Categorical(torch.ones(3)), obs=y, obs_mask=known)
            pyro.sample("x", dist.Normal(locs[c], 1.0), obs=x)

    def guide_with(mask):
        def guide(x, y, known):
            logits = pyro.param("logits", torch.zeros(3))
            with pyro.plate("data", len(x)), poutine.mask(mask=mask(known)):
                pyro.sample("y_unobserved", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})

        return guide

    options = {"objective": TraceEnum_ELBO(max_plate_nesting=1)}
    (said,) = warnings_of_fit(caplog, model, guide_with(lambda known: True), (X, y, known), **options)
    assert "'y_unobserved'" in said
    assert "no bound" in said
    assert "mask=~obs_mask" in said
    assert not warnings_of_fit(caplog, model, guide_with(lambda known: ~known), (X, y, known), **options)  # the cure


@pytest.mark.parametrize("kind", ["table", "vae"])
def test_columns_that_are_not_standardised_are_said_once(caplog, kind):
    x = torch.stack([torch.randn(40), 900 + 20 * torch.randn(40), torch.poisson(torch.full((40,), 500.0))], -1)
    x[::5, 1] = torch.nan
    filled = x.nan_to_num(900.0)
    columns = ["real", "real", "count"] if kind == "table" else ["real"] * 3
    vae = VAE(
        priors.StandardNormal(2),
        likelihoods.Normal(nn.mlp(2, 3), scale="learned"),
        posteriors.DiagonalNormal(nn.mlp(3, 4)),
    )
    pair = TableVAE(columns, latent=2) if kind == "table" else vae
    (said,) = warnings_of_fit(caplog, pair.model, pair.guide, data.with_missing(x) if kind == "table" else filled)
    assert f"{1 if kind == 'table' else 2} column" in said
    assert "column 1, whose median of" in said
    if kind == "table":
        assert "ppvae.models:table_vae" in said
        pair, cured = table_vae(x, columns=columns), data.with_missing(x)
    else:
        assert "(x - x.mean(0)) / x.std(0)" in said
        cured = (filled - filled.mean(0)) / filled.std(0)
    assert not warnings_of_fit(caplog, pair.model, pair.guide, cured)


def test_a_shared_latent_on_batches_of_a_plate_of_their_size_is_said_once(caplog):
    def pair(plate):
        def model(x):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with plate(x):
                pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

        def guide(x):
            pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.1))

        return model, guide

    batch = pair(lambda x: pyro.plate("data", len(x)))
    for objective in (Trace_ELBO(), objectives.ELBO()):
        (said,) = warnings_of_fit(caplog, *batch, X, batch_size=10, objective=objective)
        assert "pyro.plate('data', 40, subsample=x)" in said
        assert "as if there were 10" in said
    for size in (40, 41, 100):  # whole batches
        assert not warnings_of_fit(caplog, *batch, X, batch_size=size)
    for size in (7, 10, 40):  # the cure
        assert not warnings_of_fit(caplog, *pair(lambda x: pyro.plate("data", 40, subsample=x)), X, batch_size=size)
